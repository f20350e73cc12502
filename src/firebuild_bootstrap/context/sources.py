"""What the sources of a COPY or ADD turn out to send."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firebuild_bootstrap.context.entries import Entry, EntryKind
from firebuild_bootstrap.context.reading import checked
from firebuild_bootstrap.dockerfile.graph import Download, GitTree, Heredoc
from firebuild_bootstrap.errors import InputError, Location

if TYPE_CHECKING:
    from firebuild_bootstrap.context.download import RemoteFile


@dataclass(frozen=True)
class Group:
    """What one match of a source sends: a single file, a directory's contents, or an archive's members.

    `source` is what was fetched for it; None for what was there.
    """

    name: str
    entries: Callable[[], Iterator[Entry]]
    source: Download | GitTree | None = None


@dataclass(frozen=True)
class ContextResource:
    """Everything that one instruction sends; `entries()` may be called again and again."""

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
        kind=EntryKind.FILE,
        mode=0o644,
        mtime_ns=mtime_ns,
        size=len(content),
        open=lambda: io.BytesIO(content),
    )
    return Group(source.name, lambda: iter((entry,)))


def remote_group(remote: RemoteFile, location: Location | None, *, unpack: bool = False) -> Group:
    """Return the group of a downloaded file: mode 0600, named after the last name in its URL.

    Args:
        remote: the download.
        location: the instruction, for errors.
        unpack: if it is an archive, its members.
    """

    def content() -> io.BufferedReader:
        return checked(_open(remote.path, location), remote.size, name=remote.url, location=location)

    if unpack:
        from firebuild_bootstrap.context.archive import Archive, is_archive  # few builds have one

        with content() as file:
            archive = is_archive(file)
        if archive:
            return Group(remote.url, Archive(remote.url, content, location).entries)
    entry = Entry(
        source=remote.url,
        path=remote.name or "download",
        kind=EntryKind.FILE,
        mode=0o600,
        mtime_ns=remote.mtime_ns,
        size=remote.size,
        open=content,
    )
    return Group(remote.url, lambda: iter((entry,)))


def _open(path: Path, location: Location | None) -> io.FileIO:
    try:
        return io.FileIO(path)
    except OSError as error:
        raise InputError(f"the download {path} can't be read: {error}", location=location) from error
