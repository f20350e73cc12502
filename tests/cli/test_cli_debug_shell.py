"""`firebuild build --debug-shell`: a shell where a RUN has failed, in real builds on real terminals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.terminals import Terminal, on_terminal
from firebuild_bootstrap.cli.shell import Turns
from firebuild_bootstrap.errors import Interrupted
from support import BIN, leftovers

pytestmark = pytest.mark.needs("userns")

DOCKERFILE = """\
FROM host
RUN echo 'app:x:1234:1234::/home/app:/bin/sh' >> /etc/passwd && echo 'app:x:1234:' >> /etc/group
RUN mkdir -m 777 /half
ENV COLOUR=blue PATH=/bin:/usr/bin
ARG SIZE=large
WORKDIR /half
COPY --chown=app file .
USER app
RUN --mount=type=secret,id=word,uid=1234 --mount=type=bind,source=file,target=/bound \\
    --mount=type=cache,target=/kept,uid=1234 \\
    echo begun > half; cp half /kept; exit 42
"""


@contextmanager
def building(home: Path, *options: str) -> Iterator[Terminal]:
    """A build on a terminal."""
    environ = {**os.environ, "FIREBUILD_HOME": str(home)}
    given = ("build", "--debug-shell", *options, ".")
    with on_terminal(BIN / "firebuild", *given, environ=environ) as terminal:
        yield terminal


@pytest.fixture
def context(host_cli: Cli) -> Path:
    """The store, with a Dockerfile whose last RUN fails in the current directory."""
    Path("file").write_text("content\n")
    Path("word").write_text("secret\n")
    Path("Dockerfile").write_text(DOCKERFILE)
    return host_cli.home


@pytest.mark.needs("ids")
def test_the_shell_has_root_user_directory_environment_and_mounts_of_what_failed(context: Path) -> None:
    with building(context, "-t", "broken", "--secret", "id=word,src=word") as user:
        said = user.read("This is a shell in its place: the build ends when the shell does.\r\n")
        assert "step 6 failed: the command exited with status 42" in said
        user.read("$ ")
        assert user.keys() == "passed on"
        user.type("id -u; pwd; cat half /bound /run/secrets/word /kept/half\n")
        assert "1234\r\n/half\r\nbegun\r\ncontent\r\nsecret\r\nbegun\r\n" in user.read("$ ")
        user.type("echo $COLOUR $SIZE $TERM $PATH; tty; stty size\n")
        assert "blue large xterm /bin:/usr/bin\r\n/dev/pts/0\r\n33 77\r\n" in user.read("$ ")
        user.resize(40, 99)
        user.type("until stty size | grep 99; do sleep 0.05; done\n")
        assert "40 99\r\n" in user.read("$ ")
        user.type("echo ready; sleep 1000\n")
        user.read("ready\r\n")
        user.type("\x03")  # ends what runs in the shell, and not the build
        user.read("$ ")
        user.type("echo mended > half; exit 0\n")
        end = user.read()
        assert user.keys() == "handled"
        assert user.status() == 1
    assert " Dockerfile:9: step 6/6 failed with exit code 42" in end
    assert leftovers(context) == []
    # What the shell did is no step's: the same RUN fails again, and on its own.
    with building(context, "-t", "broken", "--secret", "id=word,src=word", "--progress", "plain") as user:
        assert "CACHED" in user.read("$ ")
        user.type("cat half; exit\n")
        assert "begun\r\n" in user.read()
        assert user.status() == 1


@pytest.mark.needs("ids")
def test_a_signal_to_the_build_ends_the_shell_and_leaves_the_terminal_in_order(context: Path) -> None:
    with building(context, "--secret", "id=word,src=word") as user:
        user.read("$ ")
        os.kill(user.pid, signal.SIGTERM)
        assert "the build was interrupted (SIGTERM)\r\n" in user.read()
        assert user.keys() == "handled"
        assert user.status() == 130
    assert leftovers(context) == []


@pytest.mark.needs("ids")
def test_a_terminal_that_hangs_up_ends_the_build(context: Path) -> None:
    with building(context, "--secret", "id=word,src=word") as user:
        user.read("$ ")
        user.hang_up()
        assert user.status() in (74, 130)  # by the signal, or by a write to what has gone
    assert leftovers(context) == []


@pytest.mark.needs("ids")
def test_the_shell_is_on_the_terminal_wherever_errors_go(context: Path) -> None:
    environ = {**os.environ, "FIREBUILD_HOME": str(context)}
    command = f"exec {BIN / 'firebuild'} build --debug-shell --secret id=word,src=word . 2>words"
    with on_terminal(Path("/bin/sh"), "-c", command, environ=environ) as user:
        user.read("$ ")
        user.type("cat half; exit\n")
        assert "begun\r\n" in user.read()
        assert user.status() == 1
    assert "begun" not in Path("words").read_text()


def test_lines_of_json_do_not_share_a_terminal_with_a_shell(context: Path) -> None:
    with building(context, "--progress=rawjson") as user:
        said = user.read()
        assert "--debug-shell and --progress rawjson can't be used together" in said
        assert "hint: leave --progress out" in said
        assert user.status() == 2


def test_a_shell_that_is_not_there_is_said_and_the_build_fails_as_it_would_have(context: Path) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCOPY file /\nRUN anything\n")
    with building(context) as user:
        said = user.read()
        assert user.status() == 1
    assert "/bin/sh: not found" in said
    assert (
        "step 3/3 failed with exit code 127: a command, or the shell to run it, is not in the image" in said
    )


def test_shells_of_several_stages_come_one_after_the_other_and_a_failure_waits_for_all_of_them() -> None:
    turns, order, waits = Turns(), list[str](), threading.Semaphore(0)
    turns.take(lambda: None)

    def shell() -> None:
        turns.take(waits.release)
        order.append("shell")
        turns.give_back()

    def failure() -> None:
        turns.await_end(waits.release)
        order.append("failure")

    others = [threading.Thread(target=shell), threading.Thread(target=failure)]
    for number, other in enumerate(others, 1):
        other.start()
        for _ in range(number):
            assert waits.acquire(timeout=30)
    assert order == []
    turns.give_back()
    for other in others:
        other.join()
    assert order == ["shell", "failure"]

    def end() -> None:
        raise Interrupted("the build was interrupted")

    turns.take(lambda: None)
    with pytest.raises(Interrupted):
        turns.take(end)
    with pytest.raises(Interrupted):
        turns.await_end(end)
    turns.give_back()
    turns.await_end(lambda: None)


def test_without_a_terminal_it_is_an_error_before_anything_is_built(host_cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM host\nRUN false\n")
    done = host_cli("build", "--debug-shell", ".", status=2)
    assert done.first == "error: --debug-shell: standard input and output are not a terminal"
    assert done.out == ""
