"""The drive of a guest that sends no layers: from a base to ext4, and back to an archive."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.layertrees import ArchiveLayer
from firebuild_bootstrap.machine.external.drive import Disk
from firebuild_bootstrap.machine.workspace import Workspace

pytestmark = [pytest.mark.needs("bwrap"), pytest.mark.needs("debugfs")]


def debugfs(disk: Path, *commands: str) -> str:
    """Do what a guest would have done to the drive."""
    text = "\n".join(commands)
    done = subprocess.run(
        ["debugfs", "-w", "-f", "/dev/stdin", disk], input=text, capture_output=True, text=True, check=True
    )
    return done.stdout


def free_of(disk: Path) -> tuple[int, int]:
    text = subprocess.run(["dumpe2fs", "-h", disk], capture_output=True, text=True, check=True).stdout
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(values["Free blocks"]) * 4096, int(values["Free inodes"])


def listing(archive: Path) -> str:
    command = ["tar", "--numeric-owner", "-tvf", str(archive)]
    return str(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def base(tmp_path: Path) -> ArchiveLayer:
    """An archive with a file of 3 MiB in a directory."""
    with tarfile.open(tmp_path / "base.tar", "w") as tar:
        for name, size in ((".", 0), ("etc", 0), ("etc/big", 3 << 20)):
            member = tarfile.TarInfo(name)
            member.type = tarfile.REGTYPE if size else tarfile.DIRTYPE
            member.mode, member.size = 0o751, size
            tar.addfile(member, io.BytesIO(b"x" * size))
    return ArchiveLayer(tmp_path / "base.tar", "sha256:base")


def test_what_comes_back_is_what_was_put_there(workspace: Workspace, base: ArchiveLayer) -> None:
    disk = Disk(workspace)
    disk.fill([base])
    free, inodes = free_of(disk.path)
    assert free > 1.9 * 2**30
    assert inodes > 130_000
    before, after = (listing(path).splitlines()[1:] for path in (base.path, disk.read().path))
    assert [line.rstrip("/") for line in after] == [line.rstrip("/") for line in before]


def test_the_drive_has_the_size_that_was_asked_for(workspace: Workspace) -> None:
    disk = Disk(workspace, size=100 << 20)
    disk.fill([])
    assert disk.path.stat().st_size == 100 << 20


def test_a_size_that_the_base_does_not_fit_into_is_refused(workspace: Workspace, base: ArchiveLayer) -> None:
    with pytest.raises(InputError, match=r"machine\.disk_size: expected room for .* found 2 MiB"):
        Disk(workspace, size=2 << 20).fill([base])


def test_what_a_guest_made_comes_back_with_owners_links_and_devices(workspace: Workspace) -> None:
    disk = Disk(workspace, size=64 << 20)
    disk.fill([])
    debugfs(
        disk.path,
        "mkdir d",
        *("sif d uid 70000", "sif d gid 33", "sif d mode 042755"),
        "mknod null c 1 3",
        *("write /etc/hostname file", "ln file again", "sif file links_count 2"),
        "symlink link file",
    )
    made = disk.read()
    said = listing(made.path)
    assert "drwxr-sr-x 70000/33" in said
    assert "c--------- 0/0             1,3" in said
    assert "again" in said
    assert "file link to again" in said
    assert "link -> file" in said
    assert os.listdir(workspace.path) == [made.path.name]


def test_small_damage_is_repaired_and_great_damage_is_an_error(workspace: Workspace) -> None:
    disk = Disk(workspace, size=64 << 20)
    disk.fill([])
    debugfs(disk.path, "set_super_value free_blocks_count 1")
    disk.read()
    disk.fill([])
    with disk.path.open("r+b") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(MachineError, match=r"e2fsck found damage on the machine's drive \(status 8\)"):
        disk.read()
