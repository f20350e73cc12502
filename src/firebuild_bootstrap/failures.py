"""What a failed build tells its user, and the artifacts that it keeps on request (docs/machines.md)."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from firebuild_bootstrap.errors import (
    FirebuildError,
    Interrupted,
    Location,
    StageCancelled,
    StepFailed,
    as_user_error,
    exit_status_of,
)
from firebuild_bootstrap.events import BuildFailed, StepInfo
from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.removal import remove_tree
from firebuild_pki.display import one_line

_REASON_LIMIT: Final = 4000
_NO_ROOM: Final = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
_READ_ONLY: Final = os.strerror(errno.EROFS)
# What the C library, apt, curl, git, wget, BusyBox, apk, Go and Node.js say.
_NO_NETWORK: Final = tuple(
    words.lower()
    for words in (
        os.strerror(errno.ENETUNREACH),
        "Temporary failure in name resolution",
        "Temporary failure resolving",
        "Could not resolve host",
        "unable to resolve host address",
        "bad address '",
        "DNS: transient error",
        "dial tcp: lookup",
        "EAI_AGAIN",
    )
)
# nginx, Apache, sshd, Go, Node.js, Java; Python's traceback has it on two lines.
_NO_PORT: Final = re.compile(
    r"(?:bind|listen).*permission denied|permission denied.*(?:bind|listen)"
    r"|\.bind\(.*\n(?:[ ^~]*\n)?permissionerror|address already in use|eaddrinuse"
)
_NO_DEVICE: Final = re.compile(r"mknod.*not permitted")
# sudo, sudo of a file system that is mounted nosuid, doas, pkexec and others.
_NO_RIGHTS: Final = re.compile(
    r'the "no new privileges" flag is set|effective uid is not 0|not installed setuid'
    r"|must be (?:setuid root|owned by uid 0 and have the setuid bit set)"
)


def explained(
    error: StepFailed, steps: Sequence[StepInfo], total: int, dockerfile: Path, output: Sequence[str]
) -> StepFailed:
    """Return the error with its line, its instruction and what it wrote last.

    Args:
        error: as the guest reported it.
        steps: those of the guest; the error comes back as it is where its step is not among them.
        total: steps of the whole build.
        dockerfile: path that the user named.
        output: last lines of the step.
    """
    step = next((step for step in steps if step.number == error.step), None)
    if step is None:
        return error
    what = _what(error)
    message = f"step {step.number}/{total} failed {what}\n  {one_line(step.instruction)}"
    return StepFailed(
        message + _quoted(output),
        step=error.step,
        exit_code=error.exit_code,
        hint=error.hint,
        location=Location(str(dockerfile), step.line),
        output=output,
    )


def with_remedy(
    error: StepFailed,
    machine: Machine,
    output: Sequence[str] = (),
    *,
    networked: bool = True,
    absent: Sequence[str] = (),
) -> StepFailed:
    """Return the error, with what to do where its reason, or what its step wrote last, is of the machine.

    That is a full disk, a root file system that can't be written, no network, or what containers can do and
    a RUN here can't: listen on ports of root, make device nodes, gain rights; else what its mounts lack.

    Args:
        error: as the guest reported it.
        machine: in which it happened.
        output: last lines of the step.
        networked: whether the step has the network of the machine.
        absent: how to give what mounts of the step would take and the user has not given.
    """
    if error.hint is not None:
        return error
    if any(words in text for text in (error.message, *output) for words in _NO_ROOM):
        error.hint = machine.no_room()
    elif _READ_ONLY in error.message:
        error.hint = "vminit has to write there: boot the machine with `rw`, or `mount -o remount,rw /` in it"
    elif any(words in line.lower() for line in output for words in _NO_NETWORK):
        error.hint = machine.no_network() if networked else "the step has no network: it says --network=none"
    elif hint := _not_permitted("\n".join(output).lower(), machine, networked=networked):
        error.hint = hint
    elif absent:
        error.hint = f"where the step needs it, give {'; '.join(absent)}"
    return error


def _not_permitted(output: str, machine: Machine, *, networked: bool) -> str | None:
    if networked and _NO_PORT.search(output):
        return machine.no_port() or None
    if _NO_DEVICE.search(output):
        return machine.no_device() or None
    if _NO_RIGHTS.search(output):
        return (
            "set-user-ID programs give a RUN no rights: write `USER root` before it, and the other USER after"
        )
    return None


def without_output(event: BuildFailed) -> str:
    """Return the message without the last lines of the failed step, which have been shown already."""
    return event.message.replace(_quoted(event.output), "") if event.output else event.message


def _quoted(output: Sequence[str]) -> str:
    return "\n  its last output:\n" + "\n".join(f"    {line}" for line in output) if output else ""


def located(
    error: FirebuildError, number: int, steps: Sequence[StepInfo], dockerfile: Path
) -> FirebuildError:
    """Return the error with the place of the step `number`, where it has none of its own; 0 is no step."""
    line = next((step.line for step in steps if step.number == number), 0)
    if line and error.location is None:
        error.location = Location(str(dockerfile), line)
    return error


def failure_event(error: BaseException) -> BuildFailed:
    """Return the event that tells of a build's failure."""
    return BuildFailed(
        exit_status=exit_status_of(error),
        error=type(error).__name__,
        message=str(as_user_error(error)),
        step=getattr(error, "step", 0),
        exit_code=getattr(error, "exit_code", None),
        output=getattr(error, "output", ()),
    )


def _what(error: StepFailed) -> str:
    reason = one_line(error.message, _REASON_LIMIT)
    if not error.exit_code:
        return f"({reason})"
    what = _exit_code_text(error.exit_code)
    if error.exit_code not in (126, 127) or reason.endswith(f"status {error.exit_code}"):
        return what
    return f"{what} ({reason})"  # no command's own status: the guest could not start one, and knows why


def _exit_code_text(exit_code: int) -> str:
    """Say what an exit code means where shells agree on it (POSIX XCU 2.8.2)."""
    text = f"with exit code {exit_code}"
    if exit_code == 126:
        return f"{text}: a command could not be executed"
    if exit_code == 127:
        return f"{text}: a command, or the shell to run it, is not in the image"
    try:
        return f"{text}: {signal.Signals(exit_code - 128).name}"
    except ValueError:
        return text


class FailureArtifacts:
    """Keeps what is left of a machine when its block ends with an error; an interrupted build leaves nothing,
    and so does a stage that was cancelled because another one has failed.

    Args:
        directory: where; it is made, and open to this user only.
        machine: what is left of it.
        notice: receives what could not be kept.
        info: receives the location.
    """

    def __init__(
        self,
        directory: Path,
        machine: Machine,
        *,
        notice: Callable[[str], None],
        info: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._machine = machine
        self._notice = notice
        self._info = info

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Interrupted | StageCancelled):
            return
        try:
            self._keep(error)
        except BaseException as problem:
            remove_tree(self._directory, ignore_errors=True)
            if not isinstance(problem, FirebuildError | OSError):
                raise
            # It must not hide why the build failed.
            self._notice(f"what is left of the failed build could not be kept: {problem}")

    def _keep(self, error: BaseException) -> None:
        self._machine.stop()
        self._directory.mkdir(mode=0o700, parents=True)
        for note in self._machine.keep(self._directory):
            self._notice(note)
        document = json.dumps(failure_event(error).as_json(), indent=2)
        (self._directory / "failure.json").write_text(f"{document}\n", "utf-8")
        names = ", ".join(sorted(path.name for path in self._directory.iterdir()))
        self._info(f"what is left of the failed build is kept in {self._directory}: {names}")
