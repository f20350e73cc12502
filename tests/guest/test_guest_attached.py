"""What the guest executes beside the command that it is there for, or in the place of a failed RUN."""

from __future__ import annotations

import pytest

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from guest.build import Build, run_command

pytestmark = pytest.mark.needs("bwrap", "busybox")

PROBED = wire.Attach(probed=True)
SERVICE = "busybox touch /up; until test -e /end; do busybox sleep 0.02; done; exit 5"


def probe(*argv: str) -> pb.ToGuest:
    return pb.ToGuest(probe=pb.Probe(argv=argv))


def sh(script: str) -> pb.ToGuest:
    return probe("/bin/sh", "-c", script)


def instead(script: str) -> pb.ToGuest:
    return messages.encode(run_command(script, workdir="/tmp", attach=wire.Attach()))


@pytest.mark.needs("ids")
def test_probes_are_where_the_command_is_and_run_one_after_the_other(build: Build) -> None:
    see = "until test -e /up; do busybox sleep 0.02; done; busybox id -u; pwd; echo $E; busybox cat -; "
    build.server.meanwhile = [
        sh(see + "busybox grep -c touch /proc/2/cmdline; exit 3"),
        None,
        sh("busybox yes | busybox head -c 5000; exit 4"),
        None,
        probe("/none"),
        None,
        probe("/etc"),
        None,
        sh("busybox sleep 1000 & busybox sleep 1000"),
        probe(),
        None,
        sh("busybox sleep 1000 & busybox touch /end"),
    ]
    command = run_command(SERVICE, attach=PROBED, user="app", workdir="/tmp", env={"E": "e"})
    (build.image).chmod(0o777)
    build.succeed(command)
    told = [(each.probed.exit_code, each.probed.output) for each in build.server.said]
    assert told[0] == (3, b"1000\n/tmp\ne\n1\n")
    assert told[1] == (4, b"y\n" * 2048)
    assert told[2] == (127, b"/none: not found\n")
    assert told[3] == (126, b"/etc: Permission denied\n")
    assert told[4] == (137, b"")


def test_a_command_that_closes_its_output_is_asked_all_the_same(build: Build) -> None:
    build.server.meanwhile = [
        sh("until test -e /up; do busybox sleep 0.02; done"),
        None,
        sh("busybox touch /end"),
    ]
    build.succeed(run_command(f"exec >/dev/null 2>&1; {SERVICE}", attach=PROBED))
    assert [each.probed.exit_code for each in build.server.said][:1] == [0]


def test_a_probed_command_that_is_not_there_is_said_as_any(build: Build) -> None:
    abort = build.fail(run_command("", argv=("/none",), attach=PROBED))
    assert (abort.error, abort.exit_code) == ("/none: not found", 127)


def test_probes_side_by_side_are_refused(build: Build) -> None:
    build.server.meanwhile = [sh("busybox sleep 1000"), sh("busybox sleep 1000"), sh("busybox sleep 1000")]
    abort = build.fail(run_command("busybox sleep 1000", attach=PROBED))
    assert (abort.error, abort.reason) == (
        "the server sent a probe before the last one had ended",
        "protocol",
    )


@pytest.mark.needs("ids")
def test_what_is_executed_instead_has_all_of_the_run_and_changes_nothing_of_its_failure(build: Build) -> None:
    mounts = (
        wire.CacheMount(target="/kept", id="c", uid=1000),
        wire.TmpfsMount(target="/fresh"),
    )
    build.server.meanwhile = [
        None,
        instead("busybox id -u; pwd; busybox cat /kept/a b; busybox ls /fresh; exit 9"),
    ]
    command = run_command(
        "echo a > /kept/a; echo b > b; echo c > /fresh/c; echo log; exit 7",
        user="app",
        workdir="/tmp",
        mounts=mounts,
        pauses=True,
    )
    (build.image / "tmp").mkdir(exist_ok=True)
    (build.image / "tmp").chmod(0o1777)
    abort = build.fail(command)
    (failing,) = (each.failing for each in build.server.said)
    assert (failing.failure.exit_code, failing.failure.reason) == (7, "command")
    assert (abort.error, abort.exit_code) == ("the command exited with status 7", 7)
    assert build.server.stdout == b"log\n1000\n/tmp\na\nb\n"


def test_where_nothing_can_be_executed_instead_it_is_said(build: Build) -> None:
    build.server.meanwhile = [None, messages.encode(run_command("", argv=("/none",), attach=wire.Attach()))]
    abort = build.fail(run_command("exit 7", pauses=True))
    assert abort.exit_code == 7
    assert build.server.written("stderr") == b"firebuild: /none: not found\n"
