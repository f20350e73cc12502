"""What a COPY or ADD sends: entries with their content, which is checked while it is read."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from firebuild_bootstrap.dockerfile.graph import FileSet, Heredoc
from firebuild_bootstrap.errors import InputError, Location, reason_of
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.reader import FIRST_TIME_NS, LAST_TIME_NS
from firebuild_bootstrap.layers.tree import is_kept
from firebuild_bootstrap.wire import CHUNK_BYTES
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


READABLE: Final = "let this user read it, or list it in .dockerignore"
"""The hint where a file of a context can't be read."""

_STILL: Final = "nothing may write to the build context during a build"

SPECIAL: Final = frozenset((tar.FIFO, tar.CHARACTER, tar.BLOCK_DEVICE))
"""Kinds that only guests know that take files packed."""


def kind_name(kind: tar.Kind) -> str:
    """Return what to call a kind of entry; cache keys have it, too."""
    return f"{kind} device" if kind in (tar.CHARACTER, tar.BLOCK_DEVICE) else kind


class FileOnDisk(Protocol):
    """A file of this machine that is sent."""

    @property
    def status(self) -> os.stat_result:
        """What it was when it was found."""
        ...

    def descriptor(self) -> int:
        """Open it for reading; the caller closes it.

        Raises:
            InputError: it is gone, replaced, or can't be read.
        """
        ...

    def changed(self, how: str) -> InputError:
        """Return the error for a file whose content is not what was announced."""
        ...

    def unreadable(self, error: OSError) -> InputError:
        """Return the error for one that can't be read to its end."""
        ...


@dataclass(frozen=True)
class Entry:
    """One file, directory or link on its way into the image.

    Args:
        source: what to call it in messages: the path in the build context, archive member or URL.
        path: place below the destination with `/` between names; empty for the directory or archive itself.
            For a single file its name, which it gets if the destination is a directory.
        from_directory: it belongs to a directory or archive whose content is merged into the destination;
            otherwise it is a single file that the destination's rules rename or place.
        mode: permission bits with setuid, setgid and sticky (0 to 0o7777).
        mtime_ns: modification time in nanoseconds since 1970; what the protocol's 64 bits can't hold (before
            1677, after 2262) becomes the nearest that they can.
        size: bytes of a regular file, else 0.
        link_target: text of a symbolic link; `path` of the first name for a hard link.
        owner: uid and gid that it keeps unless the instruction has one, for what comes from an archive, an
            image or another stage; None for the instruction's own rule.
        passed: a directory on the way to what --parents names.
        member: an archive holds it, which is unpacked as if the destination were the root.
        open: opens the content of a regular file for reading; None for everything else.
        file: where that is a file of this machine, which may have holes, the file itself.
        regions: where a file of an archive has data; None where it has no holes, or `file` knows them.
        stored: yields the data of `regions` alone, up to a megabyte at once; None where only `open` reads it.
        device: major and minor number of a device.
        attributes: its extended ones; None where it has none, or `file` knows them.
    """

    source: str
    path: str
    kind: tar.Kind
    mode: int
    mtime_ns: int
    from_directory: bool = False
    size: int = 0
    link_target: str = ""
    owner: tuple[int, int] | None = None
    passed: bool = False
    member: bool = False
    open: Callable[[], BinaryIO] | None = None
    file: FileOnDisk | None = None
    regions: tar.Regions | None = None
    stored: Callable[[], Iterator[bytes]] | None = None
    device: tuple[int, int] = (0, 0)
    attributes: Mapping[str, bytes] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mtime_ns", min(max(self.mtime_ns, FIRST_TIME_NS), LAST_TIME_NS))


class Resource(Protocol):
    """All that one COPY or ADD step sends, in the order in which the guest has to write it."""

    def entries(self) -> Iterator[Entry]:
        """Yield parents before children and a hard link after its first name.

        Raises:
            InputError: a source has vanished or can't be read, or an archive is broken.
        """
        ...


NO_ATTRIBUTES: Final[Mapping[str, bytes]] = MappingProxyType({})


def attributes_of(descriptor: int) -> Mapping[str, bytes]:
    """Return the extended attributes of an open file of a build context that belong into an image.

    Capabilities are not among them: BuildKit loses those of a context, and so they have to be given by a RUN.
    """
    try:
        names = os.listxattr(descriptor)
        return {name: os.getxattr(descriptor, name) for name in sorted(names) if _is_sent(name)}
    except OSError:  # a file system without them, or one is removed meanwhile
        return NO_ATTRIBUTES


def _is_sent(name: str) -> bool:
    return is_kept(name) and not name.startswith("security.")


def kept(attributes: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Return those that belong into an image."""
    return {name: value for name, value in attributes.items() if is_kept(name)}


def changed(name: str, how: str, location: Location | None = None) -> InputError:
    """Return the error for content that is not what was announced."""
    return InputError(
        f"{name} changed while it was being sent: {how}",
        hint=_STILL,
        location=location,
    )


def ended_early(missing: int, size: int) -> str:
    """Say that content was shorter than announced."""
    return f"it ended {counted(missing, 'byte')} before its {counted(size, 'byte')}"


def has_grown(size: int) -> str:
    """Say that content was longer than announced."""
    return f"it has grown beyond its {counted(size, 'byte')}"


def unreadable(name: str, error: Exception, location: Location | None = None) -> InputError:
    """Return the error for content that can't be read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{name} has vanished since the build began", hint=_STILL, location=location)
    return InputError(
        f"{name} can't be read: {reason_of(error)}",
        hint=READABLE if isinstance(error, PermissionError) else None,
        location=location,
    )


@contextmanager
def reading(entry: Entry) -> Iterator[None]:
    """Name the entry in errors of its content.

    Raises:
        InputError: in place of the errors of the system.
    """
    try:
        yield
    except (OSError, EOFError) as error:
        raise unreadable(entry.source, error) from error


def content_of(entry: Entry) -> BinaryIO:
    """Open the content of a file.

    Raises:
        InputError: it has none, or can't be opened.
    """
    if entry.open is None:
        raise InputError(f"{entry.source}: a file without content can't be sent")
    with reading(entry):
        return entry.open()


def content(entry: Entry) -> Iterator[bytes]:
    """Yield the content of a file in pieces of at most a megabyte.

    Raises:
        InputError: it has none, has vanished, can't be read or has changed.
    """
    sent = 0
    with content_of(entry) as file, reading(entry):
        while data := file.read(CHUNK_BYTES):
            sent += len(data)
            yield data
    if sent != entry.size:
        raise changed(entry.source, f"expected {counted(entry.size, 'byte')}, found {sent}")


class Readable(Protocol):
    """Anything that content can be read from."""

    def read(self, size: int, /) -> bytes | None:
        """Return at most `size` bytes, none at the end."""
        ...

    def close(self) -> None:
        """Let go of the content."""
        ...


class SizedReader(io.RawIOBase):
    """Reads exactly as many bytes as were announced, and fails where the content has more or fewer.

    Args:
        content: where the bytes come from; closed with the reader.
        size: how many bytes were announced.
        name: what to call the content in messages.
        location: the instruction that sends it.
        broken: exceptions of `content` that mean that it is damaged or can't be read.
    """

    def __init__(
        self,
        content: Readable,
        size: int,
        *,
        name: str,
        location: Location | None,
        broken: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        super().__init__()
        self._content = content
        self._missing = size
        self._size = size
        self._name = name
        self._location = location
        self._broken = broken
        self._probed = False

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill `buffer`; the end is reported only after the size has been found right.

        Raises:
            InputError: the content has changed its size, is damaged or can't be read.
        """
        view = memoryview(buffer).cast("B")
        data = self._read(min(len(view), self._missing)) if self._missing else b""
        if self._missing and not data:
            raise self._changed(ended_early(self._missing, self._size))
        view[: len(data)] = data
        self._missing -= len(data)
        if not self._missing and not self._probed:
            self._probed = True
            if self._read(1):
                raise self._changed(has_grown(self._size))
        return len(data)

    def close(self) -> None:
        """Close the content as well."""
        if not self.closed:
            self._content.close()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            return self._content.read(size) or b""
        except self._broken as error:
            raise unreadable(self._name, error, self._location) from error

    def _changed(self, how: str) -> InputError:
        return changed(self._name, how, self._location)


def checked(
    content: Readable,
    size: int,
    *,
    name: str,
    location: Location | None,
    broken: tuple[type[Exception], ...] = (OSError,),
) -> io.BufferedReader:
    """Return `content` as a buffered file that insists on `size` bytes; see `SizedReader`."""
    return io.BufferedReader(
        SizedReader(content, size, name=name, location=location, broken=broken), buffer_size=256 * 1024
    )


@dataclass(frozen=True)
class FetchLimits:
    """What a download or a repository may take.

    Args:
        idle_seconds: without any progress.
        total_seconds: in all.
        total_bytes: on disk.
        total_entries: files and directories of a repository, those of git included.
        memory: bytes of data of git, and of each program that it starts.
    """

    idle_seconds: float = 30.0
    total_seconds: float = 900.0
    total_bytes: int = 16 << 30
    total_entries: int = 4_000_000
    memory: int = 4 << 30


@dataclass(frozen=True)
class Group:
    """What one match of a source sends: a single file, a directory's contents, or an archive's members.

    Args:
        name: to call it by.
        entries: walks through it.
        source: the source; None where nobody asks for that.
        fetch: gets what is not here yet, once; None where all is.
        digest: of what comes over the network, `ALGORITHM:hex` of a download and `gitCommit:hex` of a
            repository; empty for all else.
    """

    name: str
    entries: Callable[[], Iterator[Entry]]
    source: FileSet | None = None
    fetch: Callable[[], object] | None = None
    digest: str = ""


@dataclass(frozen=True)
class ContextResource:
    """Everything that one instruction sends; `entries()` may be called again and again.

    Args:
        groups: in the order of the sources.
    """

    groups: tuple[Group, ...]

    def entries(self) -> Iterator[Entry]:
        """Yield parents before children and a hard link after its first name.

        Raises:
            InputError: a source has vanished or can't be read, or an archive is broken.
        """
        for group in self.groups:
            yield from group.entries()


def heredoc_group(source: Heredoc, mtime_ns: int) -> Group:
    """Return the group of a heredoc: a file with mode 0644."""
    content = source.content.encode()
    entry = Entry(
        source=source.name,
        path=posixpath.basename(source.name),
        kind=tar.FILE,
        mode=0o644,
        mtime_ns=mtime_ns,
        size=len(content),
        open=lambda: io.BytesIO(content),
    )
    return Group(source.name, lambda: iter((entry,)))


@dataclass(frozen=True)
class ContextPlace:
    """What messages say of a context whose directory its user does not know.

    Args:
        where: after "the build context".
        hint: where something is not in it; None to tell what is.
    """

    where: str
    hint: str | None = None
