"""One digest for everything that a tree contains."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator

from firebuild_bootstrap.image.worker.walk import Node, walk


def digest(root: str, *, times: bool = False) -> str:
    """Return `sha256:…` over the canonical listing of the tree `root`.

    Args:
        times: modification times count too.
    """
    total = hashlib.sha256()
    for line in listing(root, times=times):
        total.update(line)
    return f"sha256:{total.hexdigest()}"


def listing(root: str, *, times: bool = False) -> Iterator[bytes]:
    """Yield one NUL-terminated record for each file: path, type and mode, owner, content, attributes."""
    first_names: dict[tuple[int, int], str] = {}
    for node in walk(root):
        status = node.status
        content = _content(node, first_names)
        fields = [node.path, f"{status.st_mode:o}", f"{status.st_uid}:{status.st_gid}", content]
        fields += [f"{name}={value.hex()}" for name, value in node.xattrs().items()]
        fields += [str(status.st_mtime_ns)] if times else []
        yield b"\n".join(os.fsencode(field) for field in fields) + b"\0"


def _content(node: Node, first_names: dict[tuple[int, int], str]) -> str:
    mode = node.status.st_mode
    if stat.S_ISLNK(mode):
        return node.link_text()
    if stat.S_ISREG(mode):
        first = first_names.setdefault(node.identity, node.path)
        if first != node.path:
            return f"link {first}"
        with node.content() as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    return f"device {node.status.st_rdev}" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else ""
