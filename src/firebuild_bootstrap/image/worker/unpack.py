"""tar archive -> tree: owners by number, all mode bits, times, links and extended attributes."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import IO, Any, Final, Literal, NamedTuple, cast

from firebuild_bootstrap.guest.overlay import MARKS
from firebuild_bootstrap.image.worker.errors import TreeError
from firebuild_bootstrap.image.worker.inside import Inside
from firebuild_bootstrap.tarball import DAMAGE, TarReader, mtime_ns

_XATTR: Final = "SCHILY.xattr."  # the names that GNU tar, bsdtar and star agree on
_BUFFER: Final = 1024 * 1024
_EXAMPLES: Final = 3


class UnpackReport(NamedTuple):
    """What was written, and what could not be kept as it was in the archive.

    Args:
        members: number of members written.
        devices: device nodes that were left out (outside of /dev, which every machine has its own of).
        foreign: members whose owner does not exist in this id mapping and that belong to root now.
        stripped: those of them that lost their setuid or setgid bit, which must not mean root.
        attributes: extended attributes that could not be set.
        examples: a few names for each of these lists, by the list's name.
    """

    members: int = 0
    devices: int = 0
    foreign: int = 0
    stripped: int = 0
    attributes: int = 0
    examples: Mapping[str, list[str]] = MappingProxyType({})


def unpack(archive: IO[bytes], root: str) -> UnpackReport:
    """Unpack an uncompressed tar `archive`, a file or a pipe, into the existing directory `root`.

    Raises:
        TreeError: the archive is damaged, or a member's name or link leads out of the tree.
    """
    inside = Inside(root)
    try:
        return _Unpacking(inside).run(archive)
    except DAMAGE as error:
        raise TreeError(f"the archive is damaged: {error}", "make or download it again") from error
    finally:
        inside.close()


def name_parts(name: str) -> tuple[str, ...]:
    """Split a member's name; leading slashes and `.` are dropped, as tar does.

    Raises:
        TreeError: it contains `..` or NUL.
    """
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if "\0" in name:
        raise TreeError(f"the archive's member {name!r:.200} has a NUL in its name")
    if ".." in parts:
        raise TreeError(f"the archive's member {name!r} leads out of the tree", "it is not safe to unpack")
    return parts


class _Unpacking:
    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._counts = Counter[str]()
        self._examples: dict[str, list[str]] = {}
        self._directories: dict[tuple[str, ...], tarfile.TarInfo] = {}

    def run(self, archive: IO[bytes]) -> UnpackReport:
        tar = TarReader(archive)
        while (member := tar.next()) is not None:
            self._place(tar, member)
        for parts, member in self._directories.items():  # last, because each new file changes the mtime
            descriptor = self._inside.existing(parts)
            if descriptor is not None:
                self._finish(descriptor, member)
                os.close(descriptor)
        return UnpackReport(**self._counts, examples=self._examples)

    def _lost(self, what: Literal["devices", "foreign", "stripped", "attributes"], name: str) -> None:
        self._counts[what] += 1
        names = self._examples.setdefault(what, [])
        if len(names) < _EXAMPLES:
            names.append(name)

    def _place(self, tar: TarReader, member: tarfile.TarInfo) -> None:
        parts = name_parts(member.name)
        if member.isdir():
            self._directory(parts)
            self._directories.pop(parts, None)
            self._directories[parts] = member
        elif member.ischr() or member.isblk():
            if parts[:1] != ("dev",):
                self._lost("devices", member.name)
            return
        elif parts:
            parent = self._inside.directory(parts[:-1])
            self._inside.clear_way(parent, parts[-1])
            self._write(tar, member, parts)
        self._counts["members"] += 1

    def _directory(self, parts: tuple[str, ...]) -> None:
        descriptor = self._inside.existing(parts)
        if descriptor is not None:
            os.close(descriptor)
            return
        parent = self._inside.directory(parts[:-1])
        self._inside.clear_way(parent, parts[-1])
        os.mkdir(parts[-1], 0o700, dir_fd=self._inside.directory(parts[:-1]))

    def _write(self, tar: TarReader, member: tarfile.TarInfo, parts: tuple[str, ...]) -> None:
        parent, name = self._inside.directory(parts[:-1]), parts[-1]
        if member.isreg():
            self._regular(tar, member, parent, name)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
            self._own(member, lambda uid, gid: os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False))
            os.utime(name, ns=_times(member), dir_fd=parent, follow_symlinks=False)
            self._inside.forget()
        elif member.islnk():
            self._hard_link(member, parts)
        elif member.isfifo():
            os.mkfifo(name, 0o600, dir_fd=parent)
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=parent)
            self._finish(descriptor, member)
            os.close(descriptor)
        else:
            raise TreeError(f"the archive's member {member.name!r} has the unknown type {member.type!r}")

    def _regular(self, tar: TarReader, member: tarfile.TarInfo, parent: int, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as target:
            _copy(tar.content(member), target, member)
            self._finish(target.fileno(), member)

    def _hard_link(self, member: tarfile.TarInfo, parts: tuple[str, ...]) -> None:
        target = name_parts(member.linkname)
        source = os.dup(self._inside.directory(target[:-1]))
        try:
            os.link(
                target[-1] if target else ".",
                parts[-1],
                src_dir_fd=source,
                dst_dir_fd=self._inside.directory(parts[:-1]),
                follow_symlinks=False,
            )
        except OSError as error:
            link = f"a hard link to {member.linkname!r}"
            raise TreeError(f"the archive's member {member.name!r} is {link}: {error.strerror}") from error
        finally:
            os.close(source)

    def _finish(self, descriptor: int, member: tarfile.TarInfo) -> None:
        lost = self._own(member, lambda uid, gid: os.chown(descriptor, uid, gid))
        mode = member.mode & 0o7777
        if lost and mode & 0o6000 and not member.isdir():
            self._lost("stripped", member.name)
            mode &= 0o1777
        for key, value in member.pax_headers.items():
            if key.startswith(_XATTR):
                self._attribute(descriptor, member.name, key.removeprefix(_XATTR), value)
        os.chmod(descriptor, mode)
        os.utime(descriptor, ns=_times(member))

    def _attribute(self, descriptor: int, member: str, name: str, value: str) -> None:
        if name.startswith(MARKS):  # it would mean something in a layer
            self._lost("attributes", f"{member} ({name})")
            return
        try:
            os.setxattr(descriptor, name, value.encode("utf-8", "surrogateescape"))
        except OSError:
            self._lost("attributes", f"{member} ({name})")

    def _own(self, member: tarfile.TarInfo, chown: Callable[[int, int], None]) -> bool:
        """Give a file its owner; True when it does not exist in this mapping."""
        try:
            chown(member.uid, member.gid)
        except OverflowError:
            pass
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise
        else:
            return False
        self._lost("foreign", f"{member.name} ({member.uid}:{member.gid})")
        return True


def _copy(source: IO[bytes], target: io.FileIO, member: tarfile.TarInfo) -> None:
    """Copy the content; holes of a sparse member stay holes, whatever size the archive claims for it."""
    regions = cast("list[tuple[int, int]] | None", cast(Any, member).sparse)
    if regions is None:
        shutil.copyfileobj(source, target, _BUFFER)
        return
    target.truncate(member.size)
    for offset, length in regions:
        source.seek(offset)
        target.seek(offset)
        end = offset + length
        while piece := source.read(min(end - source.tell(), _BUFFER)):
            target.write(piece)


def _times(member: tarfile.TarInfo) -> tuple[int, int]:
    """Return access and modification time in nanoseconds."""
    nanoseconds = mtime_ns(member)
    return nanoseconds, nanoseconds
