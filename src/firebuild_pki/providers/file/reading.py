"""Reading the files that settings name, once, and not without a look at who else can."""

from __future__ import annotations

import codecs
import os
import stat
from dataclasses import dataclass, field
from shlex import quote

from firebuild_pki.errors import CAError

MAX_SIZE = 1024 * 1024
"""More bytes than any bundle of certificates has; protects from a wrong path."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and the setting that names it.

    Args:
        setting: name of the setting, below the provider's block.
        path: as written in the settings.
    """

    setting: str
    path: str

    @property
    def real_path(self) -> str:
        """The path with ``~`` expanded."""
        return os.path.expanduser(self.path)

    @property
    def quoted(self) -> str:
        """The path for a shell command in a hint."""
        return quote(self.real_path)

    def wrong(self, message: str, hint: str | None = None) -> CAError:
        """Word an error about this file; for the caller to raise."""
        return CAError(f"{self}: {message}", hint=hint)

    def __str__(self) -> str:
        return f"{self.setting} {self.real_path}"


@dataclass(frozen=True, slots=True)
class Content:
    """What was in a file, and who could read it then.

    Args:
        source: the file.
        data: its bytes, without a byte order mark.
        mode: its permission bits.
        owner: user id of its owner.
    """

    source: Source
    data: bytes = field(repr=False)
    mode: int
    owner: int

    def must_be_private(self) -> None:
        """Refuse a private key that others can use.

        Raises:
            CAError: they can; with the command that changes it.
        """
        whom = open_to(self.mode, self.owner, os.geteuid())
        if whom is None:
            return
        hint = f"chmod {self.mode & stat.S_IRWXU:o} {self.source.quoted}"
        real = os.path.realpath(self.source.real_path)
        if any(part.startswith("..") for part in real.split(os.sep)):  # how the kubelet lays secrets out
            hint = "set defaultMode: 0400 for the volume of this secret in the pod's specification"
        raise self.source.wrong(f"the private key in it can be used {whom} (mode {self.mode:04o})", hint)


def read(source: Source) -> Content:
    """Read a file, following links.

    Raises:
        CAError: it cannot be read, is not a file, is empty, or too large.
    """
    try:
        # not blocking, because a FIFO would until somebody writes
        descriptor = os.open(source.real_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error
    try:
        status = os.fstat(descriptor)
        _must_be_file(source, status)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read().removeprefix(codecs.BOM_UTF8)
    finally:
        os.close(descriptor)
    if not data.strip():
        raise source.wrong("the file is empty")
    return Content(source, data, stat.S_IMODE(status.st_mode), status.st_uid)


def open_to(mode: int, owner: int, user: int) -> str | None:
    """Tell who besides a user can use a file.

    A file of root may be readable for a group: that is how a key is handed to a service that does
    not run as root (``ssl-cert`` of Debian, ``fsGroup`` of Kubernetes).

    Args:
        mode: permission bits.
        owner: user id of the owner of the file.
        user: effective user id of this process.

    Returns:
        Words for a message, or None if nobody else can.
    """
    tolerated = stat.S_IRGRP if owner == 0 and user != 0 else 0
    if mode & stat.S_IRWXO:
        return "by every user of this machine"
    if mode & stat.S_IRWXG & ~tolerated:
        return "by its group"
    return None


def _must_be_file(source: Source, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise source.wrong("expected a file, found a directory", "name the file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise source.wrong("expected a regular file, found a pipe, a device or a socket")
    if status.st_size > MAX_SIZE:
        found = f"expected certificates or a key, found {status.st_size} bytes"
        raise source.wrong(f"{found}; no such file is larger than {MAX_SIZE}")


def _unreadable(source: Source, error: OSError | ValueError) -> CAError:
    path = source.real_path
    if isinstance(error, ValueError):
        return source.wrong("the path cannot be that of a file")
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return source.wrong(f"the link leads to {os.path.realpath(path)}, which does not exist")
        relative = f"relative paths start at {os.getcwd()}" if not os.path.isabs(path) else None
        return source.wrong("there is no such file", relative)
    if isinstance(error, PermissionError):
        hint = "let this user read the file and enter the directories above it"
        return source.wrong(f"the user id {os.geteuid()} may not read it", hint)
    return source.wrong(f"cannot be read: {error.strerror}")
