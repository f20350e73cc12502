"""What a build made, as JSON that people can compare: one line for each file, and the configuration."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

from oracle.corpus import bases

_KINDS: Final = {
    tarfile.DIRTYPE: "dir",
    tarfile.SYMTYPE: "link",
    tarfile.FIFOTYPE: "fifo",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
}
# All that BuildKit writes into a layer, although its RUNs see the others, too.
_CAPABILITY: Final = "SCHILY.xattr.security.capability"
_SHOWN: Final = 80  # bytes of content; what is longer, or no text, is told by size and SHA-256

Tree = dict[str, str]


def merged(layers: Iterable[tarfile.TarFile], *, times: bool = False) -> Tree:
    """Return the files of layers that are applied one after the other, as OCI's layer.md says.

    A file is told as `file 0644 0:0 "content"`; more names of one file as `same as NAME`.
    """
    tree: Tree = {}
    for layer in layers:
        names: Tree = {}
        for member in layer:
            name = member.name.removeprefix("./").strip("/")
            folder, _, last = name.rpartition("/")
            if last == ".wh..wh..opq":
                _remove_below(tree, folder)
            elif last.startswith(".wh."):
                _remove(tree, f"{folder}/{last[4:]}".lstrip("/"))
            elif name not in ("", "."):
                if not member.isdir():
                    _remove_below(tree, name)
                names[name] = _told(layer, member, times=times)
        tree |= names
    return dict(sorted(_grouped(tree).items()))


def without_base(tree: Tree, *, times: bool = False) -> Tree:
    """Return what is not as in the bases, if the tree began as one; what is gone is told as `removed`."""
    if "bin/busybox" not in tree:
        return tree
    base = _base_tree(times)
    there = {name: told for name, told in tree.items() if base.get(name) != told}
    return dict(sorted((there | {name: "removed" for name in base if name not in tree}).items()))


@cache
def _base_tree(times: bool) -> Tree:
    archive = next(iter(bases().values())).archive
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return merged([tar], times=times)


def _remove(tree: Tree, name: str) -> None:
    tree.pop(name, None)
    _remove_below(tree, name)


def _remove_below(tree: Tree, folder: str) -> None:
    prefix = f"{folder}/" if folder else ""
    for each in [each for each in tree if each.startswith(prefix)]:
        del tree[each]


def _told(tar: tarfile.TarFile, member: tarfile.TarInfo, *, times: bool) -> str:
    if member.islnk():
        return f"same as {member.linkname.removeprefix('./').strip('/')}"
    words = [_KINDS.get(member.type, "file"), f"{member.mode & 0o7777:04o}", f"{member.uid}:{member.gid}"]
    if times:
        words.append(f"at {member.mtime:.9f}".rstrip("0").rstrip("."))
    if capability := member.pax_headers.get(_CAPABILITY):
        words.append(f"security.capability={capability.encode('utf-8', 'surrogateescape').hex()}")
    if member.issym():
        words.append(f"-> {member.linkname}")
    elif member.isdev() and not member.isfifo():
        words.append(f"{member.devmajor}:{member.devminor}")
    elif member.isfile():
        stream = tar.extractfile(member)
        words.append(_content(stream.read() if stream else b""))
    return " ".join(words)


def _content(data: bytes) -> str:
    if len(data) <= _SHOWN and data.isascii():
        return repr(data.decode())
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"


def _grouped(tree: Tree) -> Tree:
    """Call the first name of a file with several the file, whichever the archive took first."""
    groups: dict[str, list[str]] = {}
    for name, told in tree.items():
        if told.startswith("same as "):
            groups.setdefault(told.removeprefix("same as "), []).append(name)
    result = dict(tree)
    for first, others in groups.items():
        lead, *rest = sorted([first, *others])
        result[lead] = tree.get(first, f"same as {first}, which is not there")
        result |= dict.fromkeys(rest, f"same as {lead}")
    return result


def plain_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of an OCI image configuration that say how it is run; empty ones are left out."""
    members = {**(document.get("config") or {}), "author": document.get("author")}
    members.pop("ArgsEscaped", None)
    return {
        name: value
        for name, value in sorted(members.items())
        if value and (name, value) != ("WorkingDir", "/")
    }
