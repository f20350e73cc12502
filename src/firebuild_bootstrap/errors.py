"""The errors that end a build, each with the exit status that tells them apart in a script.

The certificate-authority framework has its own tree (`firebuild_pki.CAError`); the command line gives
those exit status 3.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from firebuild_pki.values import dataclass

_MAX_REPORTED: Final = 10


class ExitStatus(IntEnum):
    """What `firebuild` exits with."""

    SUCCESS = 0
    STEP_FAILED = 1
    BAD_INPUT = 2
    CERTIFICATE_AUTHORITY = 3
    GUEST_LOST = 4
    TIMEOUT = 5
    MACHINE = 6
    NOT_READY = 7
    INTERNAL = 70
    OUTPUT = 74
    INTERRUPTED = 130


@dataclass(frozen=True)
class Location:
    """A place in a text that the user wrote; line and column count from 1, 0 is unknown."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        """Render as `file:line:column`, the form that editors and CI systems link to."""
        parts = [self.file, *(str(number) for number in (self.line, self.column) if number)]
        return ":".join(parts)


MAKE_ROOM: Final = "make room there, or let this user write there"
"""What helps where a file can't be written."""
UNUSABLE_TEXT: Final = re.compile("[\0\ud800-\udfff]")
"""NUL and halves of characters: JSON can write them, no environment can hold them. Python makes such halves
of bytes that are not UTF-8 (PEP 383)."""

MALFORMED: Final = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""What it raises to read a JSON document that is not as it has to be. OverflowError is that of numbers:
`1e999` is infinite, and 400 digits are no float."""


class _Described(BaseException):
    """A message with its remedy and its place.

    Args:
        message: what was expected and what was found.
        hint: what to do about it.
        location: where in the user's files it is.
    """

    exit_status = ExitStatus.INTERNAL

    def __init__(self, message: str, *, hint: str | None = None, location: Location | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.location = location

    def __str__(self) -> str:
        """Render as `file:line: message`, with the hint on a line of its own."""
        where = f"{self.location}: " if self.location else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"


class FirebuildError(_Described, Exception):
    """Anything that ends a build in a way the user can understand.

    Args:
        message: what was expected and what was found.
        hint: what to do about it.
        location: where in the user's files it is.
    """


def hint_before(hint: str | None) -> str:
    """Return a hint for another one to follow it, with what stands between the two; empty for none."""
    if not hint:
        return ""
    return f"{hint} " if hint.endswith("?") else f"{hint}; "


class InputError(FirebuildError):
    """The Dockerfile, the build context, the configuration or an argument is wrong."""

    exit_status = ExitStatus.BAD_INPUT


class InputErrors:
    """All errors of an input, collected so that they are reported together."""

    def __init__(self) -> None:
        self.found: list[InputError] = []

    def add(self, error: InputError) -> None:
        """Keep an error for the report."""
        self.found.append(error)

    def collected(self) -> _Collected:
        """Return what keeps an error of its block instead of raising it."""
        return _Collected(self)

    @property
    def enough(self) -> bool:
        """Whether there are more than are shown."""
        return len(self.found) > _MAX_REPORTED

    def more_than(self, count: int) -> bool:
        """Tell whether there are more than `count`."""
        return len(self.found) > count

    def raise_all(self) -> None:
        """Raise the first, by its line, with the others in its hint.

        Raises:
            InputError: there is one.
        """
        if not self.found:
            return
        first, *others = sorted(self.found, key=lambda error: error.location.line if error.location else 0)
        if not others:
            raise first
        lines = [first.hint] if first.hint else []
        lines += [f"also {other.location}: {other.message}" for other in others[:_MAX_REPORTED]]
        raise InputError(first.message, hint="\n  ".join(lines), location=first.location) from first


@dataclass(frozen=True)
class _Collected:
    errors: InputErrors

    def __enter__(self) -> int:
        return len(self.errors.found)

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if isinstance(error, InputError):
            self.errors.add(error)
            return True
        return False


class StepFailed(FirebuildError):
    """The guest executed a step and it failed.

    Args:
        step: number of the step, 0 when none was running.
        exit_code: exit status of a failed RUN (128 + N for signal N), None for other failures.
        output: its last lines, which the message has, too.
    """

    exit_status = ExitStatus.STEP_FAILED

    def __init__(
        self,
        message: str,
        *,
        step: int = 0,
        exit_code: int | None = None,
        hint: str | None = None,
        location: Location | None = None,
        output: Sequence[str] = (),
    ) -> None:
        super().__init__(message, hint=hint, location=location)
        self.step = step
        self.exit_code = exit_code
        self.output = tuple(output)


class StageCancelled(FirebuildError):
    """A stage of the build was ended because another one has failed."""


class GuestLost(FirebuildError):
    """The guest died, never called, or stopped answering before it reported a result."""

    exit_status = ExitStatus.GUEST_LOST


class BuildTimeout(FirebuildError):
    """A time limit of the build ran out."""

    exit_status = ExitStatus.TIMEOUT


class MachineError(FirebuildError):
    """The machine (sandbox or VM) could not be prepared, started or read back."""

    exit_status = ExitStatus.MACHINE


class NotReady(FirebuildError):
    """A finished image does not answer, so that it is not stored."""

    exit_status = ExitStatus.NOT_READY


class OutputError(FirebuildError):
    """Standard output can't be written: its reader has gone, or the disk behind it is full.

    Args:
        message: what happened.
        reader_gone: the reader has closed the pipe, so that no error is shown.
    """

    exit_status = ExitStatus.OUTPUT

    def __init__(self, message: str, *, reader_gone: bool = False) -> None:
        super().__init__(message)
        self.reader_gone = reader_gone


class Interrupted(_Described):
    """The user or the system asked the build to stop (SIGINT, SIGTERM, SIGHUP).

    Not an `Exception`, like `KeyboardInterrupt`: it may arrive anywhere, and handlers for the
    errors of a file or a plugin must not catch it.
    """

    exit_status = ExitStatus.INTERRUPTED


# What an operating system refuses for want of room or rights, wherever it happens.
_SURROUNDINGS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG),
    }
)


MORE_FILES: Final = "raise the limit of open files: `ulimit -n`, or LimitNOFILE= of its service"
MORE_MEMORY: Final = (
    "raise the limits of memory and processes: ulimit -u and -v, TasksMax= of a service, "
    "--pids-limit or --memory of docker"
)
_NO_THREAD: Final = "can't start new thread"
_NOT_MAPPED: Final = "failed to map segment from shared object"  # the C library's words


def _has_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def remedy_of(error: OSError) -> str:
    """Say what lets a user do with a file what the system refused."""
    match error.errno:
        case errno.EACCES | errno.EPERM:  # reading may be what is denied
            return "let this user read and write there"
        case errno.EMFILE | errno.ENFILE:
            return MORE_FILES
        case errno.ENOMEM:
            return MORE_MEMORY
        case errno.EFBIG:
            return (
                "raise the limit of a file's size (`ulimit -f`), or use a file system that takes such files"
            )
        case errno.EIO:
            return "the disk, or what is between, fails: the kernel's log says more (dmesg)"
    return MAKE_ROOM


def reason_of(error: Exception) -> str:
    """Say why a file can't be read, without its name, the number of the error or words of a codec."""
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        return f"line {line} is not {error.encoding.upper()}"
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def as_user_error(error: BaseException) -> BaseException:
    """Return the error that explains this one: what a machine or its user did is not a mistake of ours."""
    if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
        # Who copies or renames has two names, and what is full or can't be written is the second.
        target = (
            error.filename2 if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG} else None
        )
        name = target or error.filename
        where = f"{name}: " if name else ""
        hint = remedy_of(error)
        return MachineError(f"{where}{error.strerror}", hint=hint)
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_directory():
        return InputError(
            "the current directory is not there any more: it was removed", hint="change to another one: cd /"
        )
    # Python has a RuntimeError without a number for what pthread_create(3) answers with EAGAIN.
    # And an ImportError for mmap(2) with ENOMEM where it loads a library.
    unloaded = isinstance(error, ImportError) and _NOT_MAPPED in str(error)
    unstarted = isinstance(error, RuntimeError) and _NO_THREAD in str(error)
    if isinstance(error, MemoryError) or unloaded or unstarted:
        return MachineError(
            "no more memory or threads: the limits of this process or its container are reached",
            hint=MORE_MEMORY,
        )
    if isinstance(error, UnicodeEncodeError) and any("\udc80" <= one <= "\udcff" for one in error.object):
        # Python shows bytes of arguments, environment and file names that are not UTF-8 like this (PEP 383).
        return InputError(
            "a name or a value that was given is not UTF-8 text", hint="FIREBUILD_DEBUG=1 shows where"
        )
    return error


def exit_status_of(error: BaseException) -> ExitStatus:
    """Return the exit status that tells this kind of error apart."""
    from firebuild_pki import CAError, IdentityError, SettingsError

    error = as_user_error(error)
    if isinstance(error, _Described):
        return error.exit_status
    if isinstance(error, SettingsError | IdentityError):
        return ExitStatus.BAD_INPUT
    if isinstance(error, CAError):
        return ExitStatus.CERTIFICATE_AUTHORITY
    return ExitStatus.INTERNAL
