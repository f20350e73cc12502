"""Images that tests build from and look into."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.sandbox import Sandbox
from guest.build import make_image

TOOLS = ("nc", "printf", "tail", "grep", "sync", "tr")


def busybox_base(directory: Path) -> Path:
    """An archive with busybox, some users, and neither Python nor a C library."""
    root = make_image(directory / "busybox")
    for tool in TOOLS:
        (root / "bin" / tool).symlink_to("busybox")
    archive = directory / "busybox.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root, arcname=".", filter=_by_root)
    return archive


def _by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    return member


@dataclass(frozen=True)
class Node:
    """All of a file but its times."""

    type: bytes
    mode: int
    owner: tuple[int, int]
    device: tuple[int, int]
    link: str
    content: str
    attributes: tuple[tuple[str, str], ...]


def read_ext4(image: Path, sandbox: Sandbox, scratch: Path) -> tuple[dict[str, Node], dict[str, float]]:
    """Return the files in an ext4 image, and the modification times of the regular ones."""
    archive = scratch / f"{image.parent.name}.tar"
    Trees(sandbox).pack_image(image, archive)
    nodes, times = {}, {}
    with tarfile.open(archive) as tar:
        for member in tar:
            attributes = {name: value for name, value in member.pax_headers.items() if "xattr" in name}
            nodes[member.name] = Node(
                member.type,
                member.mode,
                (member.uid, member.gid),
                (member.devmajor, member.devminor),
                member.linkname,
                _digest(tar, member),
                tuple(sorted(attributes.items())),
            )
            if member.isfile():
                times[member.name] = member.mtime
    archive.unlink()
    return nodes, times


def _digest(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if not member.isfile():
        return ""
    stream = cast(Any, tar.extractfile(member))
    return hashlib.file_digest(stream, "sha256").hexdigest()


def arguments(context: Path, dockerfile: str, *more: str | Path) -> list[str | Path]:
    (context / "Dockerfile").write_text(dockerfile)
    return ["rootfs", "--context", context, "--tag", "t/vm:1", *more]
