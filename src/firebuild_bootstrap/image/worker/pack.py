"""Tree -> tar archive, in PAX format and byte for byte the same for the same tree."""

from __future__ import annotations

import os
import stat
import tarfile
import threading
from collections.abc import Iterable
from typing import IO, Any, Final, cast

from firebuild_bootstrap.image.worker.imagewalk import ImageNode
from firebuild_bootstrap.image.worker.unpack import UnpackReport, unpack
from firebuild_bootstrap.image.worker.walk import Node, walk

AnyNode = Node | ImageNode
"""A file of a tree, in a directory or in an image."""

_TYPES: Final = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


def pack(root: str, archive: IO[bytes], *, newest: int | None = None) -> int:
    """Write the tree in the directory `root` to `archive`; see `pack_nodes`."""
    return pack_nodes(walk(root), archive, newest=newest)


def pack_nodes(nodes: Iterable[AnyNode], archive: IO[bytes], *, newest: int | None = None) -> int:
    """Write the files of a tree to `archive` and return the number of members; sockets are left out.

    Args:
        nodes: parents before children.
        newest: seconds since 1970; later modification times become this one (SOURCE_DATE_EPOCH).

    Raises:
        TreeError: the tree can't be read.
    """
    first_names: dict[tuple[int, int], str] = {}
    members = 0
    with tarfile.open(fileobj=archive, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for node in nodes:
            member = _member(node, newest)
            if member is None:
                continue
            members += 1
            if member.isreg() and node.status.st_nlink > 1:
                first = first_names.setdefault(node.identity, member.name)
                if first != member.name:
                    member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
            _add(tar, node, member)
            cast(Any, tar).members = []  # or it remembers every member
    return members


def copy(source: str, target: str) -> UnpackReport:
    """Copy the content of the tree `source` into the existing directory `target`, with everything.

    Raises:
        TreeError: as `pack` and `unpack`.
    """
    read_end, write_end = os.pipe()
    failures: list[BaseException] = []

    def feed() -> None:
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pack(source, pipe)
        except BaseException as error:
            failures.append(error)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        with os.fdopen(read_end, "rb") as pipe:
            report = unpack(pipe, target)
    finally:
        feeder.join()
        if failures and not isinstance(failures[0], BrokenPipeError):
            raise failures[0]
    return report


def _add(tar: tarfile.TarFile, node: AnyNode, member: tarfile.TarInfo) -> None:
    if not member.isreg():
        tar.addfile(member)
        return
    with node.content() as content:
        tar.addfile(member, content)


def _member(node: AnyNode, newest: int | None) -> tarfile.TarInfo | None:
    status = node.status
    kind = _TYPES.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    member = tarfile.TarInfo(node.path or ".")
    member.type = kind
    member.mode = stat.S_IMODE(status.st_mode)
    member.uid, member.gid = status.st_uid, status.st_gid
    member.size = status.st_size if kind == tarfile.REGTYPE else 0
    nanoseconds = status.st_mtime_ns if newest is None else min(status.st_mtime_ns, newest * 10**9)
    member.mtime = nanoseconds // 10**9
    member.pax_headers = {
        f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
        for name, value in node.xattrs().items()
    }
    if nanoseconds % 10**9:
        whole, fraction = divmod(abs(nanoseconds), 10**9)
        member.pax_headers["mtime"] = f"{'-' if nanoseconds < 0 else ''}{whole}.{fraction:09d}"
    if kind == tarfile.SYMTYPE:
        member.linkname = node.link_text()
    elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return member
