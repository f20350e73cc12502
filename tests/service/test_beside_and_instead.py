"""What is executed beside a command, or in the place of a failed one; and guests that lie about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.errors import BuildTimeout
from firebuild_bootstrap.events import StepFinished, StepOutput
from firebuild_bootstrap.service import Limits
from firebuild_bootstrap.service.console import Console
from firebuild_bootstrap.service.session import Session
from firebuild_bootstrap.service.stream import shell_of

RUN = wire.RunCommand(step=3, original="RUN x", argv=("x",), attach=wire.Attach(probed=True))
PAUSES = wire.RunCommand(step=3, original="RUN x", argv=("x",), pauses=True)
FAILED = pb.Failure(error="the command exited with status 4", exit_code=4, reason="command")


@dataclass
class Shell:
    """A terminal that nobody sits at."""

    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    shown: bytes = b""

    def show(self, data: bytes) -> None:
        self.shown += data

    @contextmanager
    def opened(self, why: str, check: Callable[[], object]) -> Iterator[tuple[Console, wire.Attach]]:
        check()
        self.said.append(why)
        yield Console(output=self.show), wire.Attach(input=True, terminal=True, rows=3, columns=4)
        self.said.append("closed")

    def await_end(self, check: Callable[[], object]) -> None:
        check()


def test_probes_are_executed_while_the_command_is_at_work(serve: Any) -> None:
    told: list[tuple[int, bytes]] = []
    console = Console(probed=lambda status, output: told.append((status, output)))
    running = serve(commands=[RUN], console=console)
    guest = running.guest()
    guest.hear("run")
    console.probe(("ask", "it"))
    assert list(guest.hear("probe").argv) == ["ask", "it"]
    console.probe(())
    assert list(guest.hear("probe").argv) == []
    guest.say(probed=pb.Probed(exit_code=137, output=b"late"))
    guest.done(3)
    guest.hear("finish")
    guest.done(0)
    assert running.outcome().error is None
    assert told == [(137, b"late")]


@pytest.mark.parametrize(
    ("probed", "words"),
    [
        (pb.Probed(exit_code=256), "the guest says that a probe ended with status 256 and 0 bytes of output"),
        (pb.Probed(exit_code=-1), "the guest says that a probe ended with status -1"),
        (pb.Probed(output=bytes(4097)), "the guest says that a probe ended with status 0 and 4097 bytes"),
    ],
)
def test_no_probe_ends_so(serve: Any, probed: pb.Probed, words: str) -> None:
    console = Console(probed=lambda _status, _output: None)
    running = serve(commands=[RUN], console=console)
    guest = running.guest()
    guest.hear("run")
    console.probe(("ask",))
    guest.hear("probe")
    guest.say(probed=probed)
    assert words in running.outcome().message


def test_a_probe_that_nobody_has_sent_does_not_end(serve: Any) -> None:
    running = serve(commands=[RUN], console=Console(probed=lambda _status, _output: None))
    guest = running.guest()
    guest.hear("run")
    guest.say(probed=pb.Probed())
    assert "the guest says that a probe has ended, and there was none" in running.outcome().message
    running = serve(commands=[PAUSES])
    guest = running.guest()
    guest.hear("run")
    guest.say(probed=pb.Probed())
    assert "the guest sent probed, where done or want was due" in running.outcome().message


def test_a_shell_stands_for_what_has_failed_and_the_failure_stays(serve: Any) -> None:
    shell = Shell()
    running = serve(commands=[PAUSES], shell=shell)
    guest = running.guest()
    guest.hear("run")
    guest.say(output=pb.Output(data=b"log"))
    guest.say(failing=pb.Done(duration_ms=1500, failure=FAILED))
    told = messages.decode(pb.ToGuest(run=guest.hear("run")))
    assert told == shell_of(PAUSES, wire.Attach(input=True, terminal=True, rows=3, columns=4))
    guest.say(output=pb.Output(data=b"$ "))
    guest.done(3, error="another reason", reason="internal")
    outcome = running.outcome()
    assert (outcome.step, outcome.exit_code, outcome.reason) == (3, 4, "command")
    assert shell.said == ["step 3 failed: the command exited with status 4", "closed"]
    # What is written in the shell is nobody's log, and its time is not that of the step.
    assert (shell.shown, [event.data for event in running.of(StepOutput)]) == (b"$ ", [b"log"])
    assert [(event.exit_code, event.seconds) for event in running.of(StepFinished)] == [(4, 1.5)]


def test_no_time_limit_runs_while_there_is_a_shell() -> None:
    now = [0.0]
    limits = Limits(build_timeout=10.0)
    session = Session(
        events=lambda _: None, limits=limits, on_guest_connected=lambda: None, clock=lambda: now[0]
    )
    session.connection_opened("c", "127.0.0.1:1", "TLSv1.3")
    session.enter("c")
    session.start()
    with session.unlimited():
        now[0] = 9000.0
        session.touch()  # the guest is alive
        session.pings_every(0)  # has the times looked at
    assert session.wait(0) is None
    now[0] = 9009.0
    session.touch()
    session.pings_every(0)
    assert session.wait(0) is None
    now[0] = 9011.0
    session.touch()
    session.pings_every(0)
    outcome = session.wait(30)
    assert outcome is not None
    assert isinstance(outcome.error, BuildTimeout)
    session.stop()


@pytest.mark.parametrize(
    ("command", "shell", "failing", "words"),
    [
        (PAUSES, Shell(), pb.Done(), "the guest says that step 3 is failing, and not why"),
        (PAUSES, None, pb.Done(failure=FAILED), "the guest sent failing, where done or want was due"),
        (replace(PAUSES, pauses=False), Shell(), pb.Done(failure=FAILED), "the guest sent failing, where"),
        (PAUSES, Shell(), pb.Done(failure=pb.Failure(error="x", exit_code=300)), "300"),
    ],
)
def test_only_a_run_that_pauses_fails_so(
    serve: Any, command: wire.RunCommand, shell: Shell | None, failing: pb.Done, words: str
) -> None:
    running = serve(commands=[command], shell=shell)
    guest = running.guest()
    guest.hear("run")
    guest.say(failing=failing)
    assert words in running.outcome().message
    assert shell is None or shell.said == []


@pytest.mark.parametrize(
    ("argv", "script", "shell"),
    [
        (("/bin/bash", "-o", "pipefail", "-c", "x"), None, "/bin/bash"),
        (("/bin/sh", "-c", "x"), None, "/bin/sh"),
        (("/bin/ash", "-c", "x"), "#!/bin/python", "/bin/sh"),
        (("python3", "-c", "x"), None, "/bin/sh"),
        (("./build.sh", "all", "it"), None, "/bin/sh"),
        (("make",), None, "/bin/sh"),
    ],
)
def test_the_shell_is_that_which_was_to_execute_the_run(
    argv: tuple[str, ...], script: str | None, shell: str
) -> None:
    command = replace(PAUSES, argv=argv, script=script, args={"TERM": "dumb"}, user="app", workdir="/w")
    told = shell_of(command, wire.Attach())
    assert told == replace(command, argv=(shell,), script=None, pauses=False, attach=wire.Attach())
