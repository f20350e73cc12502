"""Trees and archives with everything that is easy to lose."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

MakeTar = Callable[..., Path]


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def dig(directory: Path, depth: int, name: str = "deep") -> None:
    """Make directories in each other, a file in each; the whole path may exceed PATH_MAX."""
    descriptor = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


@pytest.fixture
def make_tar(tmp_path: Path) -> MakeTar:
    """Write a tar archive of `(member, content)` pairs; a name ending in / is a directory."""

    def make(*members: object, path: Path = tmp_path / "made.tar") -> Path:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for entry in members:
                info, content = entry if isinstance(entry, tuple) else (entry, b"")
                if isinstance(info, str):
                    kind = tarfile.DIRTYPE if info.endswith("/") else tarfile.REGTYPE
                    info = member(info.rstrip("/"), kind, mode=0o755 if kind == tarfile.DIRTYPE else 0o644)
                assert isinstance(info, tarfile.TarInfo)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make


@pytest.fixture
def rich_tree(tmp_path: Path) -> Path:
    """A tree with all that is easy to lose."""
    root = tmp_path / "rich"
    (root / "dir/sub").mkdir(parents=True)
    (root / "dir").chmod(0o2750)
    (root / "file").write_bytes(b"content" * 1000)
    (root / "empty").touch()
    (root / "set").write_text("#!/bin/sh\n")
    (root / "set").chmod(0o4755)
    os.link(root / "file", root / "dir/same")
    (root / "link").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("x" * 100)
    os.mkfifo(root / "pipe", 0o622)
    (root / "ünï\udcff").write_text("odd")
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    os.setxattr(root / "file", "user.raw", b"\xff\0=\nbinary")
    os.utime(root / "file", ns=(0, 1_500_000_000_123_456_789))
    os.utime(root / "link", ns=(0, 1_400_000_000_000_000_001), follow_symlinks=False)
    if os.geteuid() == 0:
        os.chown(root / "dir", 1234, 4321)
        os.chown(root / "set", 7, 8)
        (root / "set").chmod(0o4755)
        os.setxattr(
            root / "set", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
        )
        os.chown(root / "link", 5, 6, follow_symlinks=False)
    os.utime(root / "dir", ns=(0, 1_300_000_000_000_000_000))
    return root
