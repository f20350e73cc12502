"""Running other programs with bounded output, time and memory.

`subprocess` reads all that a program writes into memory, and then waits for whoever else has its pipes open.
What is here ends a program that writes or takes too much, and with it what it has started.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, cast

from firebuild_bootstrap.errors import MORE_FILES, MORE_MEMORY, MachineError, hint_before
from firebuild_bootstrap.guest.kernel import address_space_problem
from firebuild_pki.display import counted

MOST_OUTPUT: Final = 1 << 20
"""Bytes of its output, and of its complaints, that a program may write unless told otherwise."""

SECONDS: Final = 60.0
"""How long a program may take unless told otherwise."""

_ADDRESS_SPACE: Final = 1 << 30  # with less, most builds lose their guest, or end without a word
_CHECK_SECONDS: Final = 0.2
_PIECE: Final = 1 << 16
# All that the program starts inherits it. `ulimit -d` counts KiB.
_LIMITED: Final = 'ulimit -S -d "$0"; exec "$@"'


class NotStarted(MachineError):
    """A program can't be started: the hint says what to do.

    Args:
        program: its name or path.
        error: of execve(2) or fork(2).
        install: where the program comes from: `install the package x`.
    """

    def __init__(self, program: str | Path, error: OSError, install: str) -> None:
        super().__init__(start_problem(program, error), hint=start_hint(error, install))


class LimitExceeded(Exception):
    """A program wrote too much, or took too long, and was ended: in words that begin with `it`."""


def check_children() -> None:
    """Make sure that this process learns how its children end.

    Raises:
        MachineError: it ignores SIGCHLD. Then wait(2) has no status for it, and `subprocess` takes whatever
            fails for a success.
    """
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        raise MachineError(
            "this process ignores SIGCHLD, so it can't learn whether the programs that it starts succeed",
            hint="call `signal.signal(signal.SIGCHLD, signal.SIG_DFL)` first, in the main thread",
        )


def check_address_space() -> None:
    """Make sure that this process can serve guests.

    Raises:
        MachineError: it may have too few addresses.
    """
    if problem := address_space_problem(_ADDRESS_SPACE):
        raise MachineError(
            problem, hint="raise the limit, or use one of memory itself: MemoryMax= of a service"
        )


def start_problem(program: str | Path, error: OSError) -> str:
    """Say why a program can't be started: what is missing may be /dev/null, which `subprocess` opens."""
    named = None if error.filename is None else str(error.filename)
    if isinstance(error, FileNotFoundError) and named == str(program) and os.sep not in named:
        return f"the program {program} was not found"
    missing = "" if named in (None, str(program)) else f"{named}: "
    return f"{program} can't be started: {missing}{error.strerror}"


def start_hint(error: OSError, install: str) -> str:
    """Say what to do about a program that can't be started.

    Args:
        error: of execve(2) or fork(2).
        install: where the program comes from: `install the package x`.
    """
    if error.filename == os.devnull:
        return "firebuild needs a /dev with its usual devices, as containers have it"
    why = ""
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            return MORE_FILES
        case errno.EAGAIN | errno.ENOMEM:
            return MORE_MEMORY
        case errno.EACCES:
            why = "its file has to be executable, and not lie on a file system mounted with noexec"
        case errno.ENOEXEC:
            why = "it is damaged, or made for another processor"
        case errno.ENOENT if error.filename and os.path.exists(error.filename):
            why = "the interpreter that its first line names, or its loader, is missing"
    return hint_before(why) + install


def run_program(
    command: Sequence[str | Path],
    *,
    data: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    umask: int = -1,
    seconds: float = SECONDS,
    most: int = MOST_OUTPUT,
    memory: int | None = None,
    check: Callable[[], None] = lambda: None,
    install: str = "is it installed, and for this host?",
) -> subprocess.CompletedProcess[bytes]:
    """Run a program until it ends; what it has started, and is in its session still, ends with it.

    Args:
        command: the program and its arguments.
        data: its standard input.
        env: its environment; that of this process when None.
        cwd: where to run it.
        umask: its umask; that of this process when -1.
        seconds: how long it may take.
        most: bytes of its output, and of its complaints.
        memory: bytes of data that it and each of its children may have; None for no limit.
        check: called several times a second; what it raises ends the program.
        install: where the program comes from, for the hint where it can't be started.

    Returns:
        its status, output and complaints.

    Raises:
        NotStarted: it can't be started. Where `memory` is limited the shell says so: see its status.
        LimitExceeded: it wrote more than `most`, or did not end within `seconds`.
        MachineError: as `check_children`.
    """
    check_children()
    limited = [] if memory is None else ["/bin/sh", "-c", _LIMITED, str(memory >> 10)]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            [*limited, *command],
            env=env,
            cwd=cwd,
            umask=umask,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
    except OSError as error:
        raise NotStarted(command[0], error, install) from error
    with process:
        try:
            output, complaints = converse(process, data, seconds=seconds, most=most, check=check)
        finally:
            # Before it is waited for: until then nobody else can have got its number.
            with suppress(ProcessLookupError, PermissionError):  # it may have become another user
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, complaints)


def converse(
    process: subprocess.Popen[bytes],
    data: bytes,
    *,
    seconds: float,
    most: int,
    check: Callable[[], None],
) -> tuple[bytes, bytes]:
    """Give a process, whose three streams are pipes, its input, and return what it writes until it ends.

    What its children write after its end is not waited for. Otherwise see `run_program`.
    """
    asked, streams = cast(IO[bytes], process.stdin), (process.stdout, process.stderr)
    said = {cast(IO[bytes], stream).fileno(): bytearray() for stream in streams}
    deadline = time.monotonic() + seconds
    poll = select.poll()
    for descriptor in said:
        poll.register(descriptor, select.POLLIN)
    os.set_blocking(asked.fileno(), False)
    poll.register(asked, select.POLLOUT)
    sending, rest = asked.fileno(), memoryview(data)
    ended = _end_of(process)
    poll.register(ended, select.POLLIN)
    try:
        while True:
            check()
            ready = {descriptor for descriptor, _ in poll.poll(_CHECK_SECONDS * 1000)}
            if sending in ready and not (rest := _unsent(asked, rest)):
                poll.unregister(sending)
                asked.close()
            for descriptor in ready & said.keys():
                piece = os.read(descriptor, _PIECE)
                said[descriptor] += piece
                if len(said[descriptor]) > most:
                    raise LimitExceeded(f"it wrote more than {counted(most, 'byte')}")
                if not piece:
                    poll.unregister(descriptor)
            if ready == {ended}:  # what the program has written is read before its end counts
                break
            if time.monotonic() > deadline:
                raise LimitExceeded(f"it did not end within {counted(seconds, 'second')}")
    finally:
        os.close(ended)
    output, complaints = said.values()
    return bytes(output), bytes(complaints)


def _end_of(process: subprocess.Popen[bytes]) -> int:
    """Return a descriptor that can be read from once the process has ended."""
    try:
        return os.pidfd_open(process.pid)
    except ProcessLookupError:  # and another thread has waited for it
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _unsent(asked: IO[bytes], data: memoryview) -> memoryview:
    """Write some of `data`, and return what is left."""
    try:
        return data[os.write(asked.fileno(), data[:_PIECE]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:  # it does not read what it is given
        return data[:0]
