"""What a COPY or ADD sends: entries with their content, however they were found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Protocol

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.layers.reader import FIRST_TIME_NS, LAST_TIME_NS


class EntryKind(Enum):
    """What an entry becomes in the image."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"


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
        member: an archive holds it, which is unpacked as if the destination were the root.
        open: opens the content of a regular file for reading; None for everything else.
        file: where that is a file of this machine, which may have holes, the file itself.
    """

    source: str
    path: str
    kind: EntryKind
    mode: int
    mtime_ns: int
    from_directory: bool = False
    size: int = 0
    link_target: str = ""
    owner: tuple[int, int] | None = None
    member: bool = False
    open: Callable[[], BinaryIO] | None = None
    file: FileOnDisk | None = None

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


@dataclass(frozen=True)
class FetchLimits:
    """How long a download may take: without any progress, and in all (seconds)."""

    idle_seconds: float = 30.0
    total_seconds: float = 900.0
