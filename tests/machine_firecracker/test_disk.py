"""The drive of a virtual machine: from a base to ext4, and back to outputs."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.bases import Base
from firebuild_bootstrap.image.outputs import OutputType, parse_outputs
from firebuild_bootstrap.machine.base import ArchiveLayer
from firebuild_bootstrap.machine.disk import Disk
from firebuild_bootstrap.machine.local import LocalMachine
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import Host, IdMap
from firebuild_bootstrap.sandbox.idmap import single

pytestmark = [pytest.mark.needs("bwrap"), pytest.mark.needs("mke2fs"), pytest.mark.needs("debugfs")]
EPOCH = 1_000_000_000
FORMS = ["ext4", "tar", "dir"]


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


def members(archive: Path) -> list[tuple[object, ...]]:
    with tarfile.open(archive) as tar:
        return [
            (one.name, one.type, one.linkname, one.mode, one.uid, one.gid, one.size, int(one.mtime))
            for one in tar
        ]


@pytest.mark.parametrize("epoch", [None, EPOCH])
def test_what_comes_back_is_what_the_local_machine_makes_of_the_same_base(
    host_base: Base, tmp_path: Path, idmap: IdMap, epoch: int | None
) -> None:
    made = {}
    for name in ("local", "disk"):
        with Workspace(tmp_path / name, "b1", idmap) as workspace:
            machine: LocalMachine | Disk
            if name == "local":
                machine = LocalMachine(workspace, epoch=epoch)
                machine.prepare([ArchiveLayer(host_base.archive, host_base.digest)])
            else:
                machine = Disk(workspace, epoch=epoch)
                machine.fill([ArchiveLayer(host_base.archive, host_base.digest)])
            made[name] = machine.export(parse_outputs(FORMS), tmp_path / name)
    for local, disk in zip(made["local"], made["disk"], strict=True):
        assert (disk.type, disk.path) == (local.type, local.path)
        # mke2fs drops what is below a second of the base's times, and no epoch means real times in ext4.
        if epoch is not None or local.type is OutputType.DIR:
            assert (disk.size, disk.digest) == (local.size, local.digest)
    assert made["disk"][0].size == made["local"][0].size
    # The time of the root itself is that of its making.
    local_tar, disk_tar = (members(tmp_path / name / "rootfs.tar") for name in ("local", "disk"))
    assert disk_tar[1:] == local_tar[1:]


def test_without_a_size_there_are_two_gigabytes_free_and_the_file_has_holes(workspace: Workspace) -> None:
    disk = Disk(workspace)
    assert disk.fill([]) == ()
    free, inodes = free_of(disk.path)
    assert free > 1.9 * 2**30
    assert inodes > 50_000
    assert disk.path.stat().st_blocks * 512 < 300 << 20
    assert os.listdir(workspace.path) == ["disk.ext4"]


def test_the_drive_has_the_size_that_was_asked_for(workspace: Workspace) -> None:
    disk = Disk(workspace, size=100 << 20)
    disk.fill([])
    assert disk.path.stat().st_size == 100 << 20


def test_a_size_that_the_base_does_not_fit_into_is_refused(workspace: Workspace) -> None:
    with pytest.raises(InputError, match=r"machine\.disk_size: expected room for .* found 2 MiB"):
        Disk(workspace, size=2 << 20).fill([])


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
    into = workspace.path / "out"
    into.mkdir()
    [made] = disk.export(parse_outputs(["tar"]), into)
    listing = subprocess.run(
        ["tar", "--numeric-owner", "-tvf", into / made.path], capture_output=True, text=True, check=True
    ).stdout
    assert "drwxr-sr-x 70000/33" in listing
    assert "c--------- 0/0             1,3" in listing
    assert "again" in listing
    assert "file link to again" in listing
    assert "link -> file" in listing
    assert sorted(os.listdir(workspace.path)) == ["out"]


def test_owners_that_this_user_cannot_have_stay_in_archives_and_are_named_otherwise(tmp_path: Path) -> None:
    notices: list[str] = []
    with Workspace(tmp_path, "b1", single(Host.current(), "on purpose")) as workspace:
        disk = Disk(workspace, size=64 << 20, notice=notices.append)
        disk.fill([])
        debugfs(disk.path, "mkdir theirs", "sif theirs uid 33")
        disk.export(parse_outputs(["tar", "dir"]), tmp_path)
        listing = subprocess.run(
            ["tar", "--numeric-owner", "-tvf", tmp_path / "rootfs.tar"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert " 33/0 " in listing
    [notice] = notices
    assert notice.startswith("1 files of the machine's drive belong to root now")


def test_small_damage_is_repaired_and_great_damage_is_an_error(workspace: Workspace, tmp_path: Path) -> None:
    disk = Disk(workspace, size=64 << 20)
    disk.fill([])
    debugfs(disk.path, "set_super_value free_blocks_count 1")
    disk.export(parse_outputs(["tar"]), tmp_path)
    disk.fill([])
    with disk.path.open("r+b") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(MachineError, match=r"e2fsck is not content with the machine's drive \(status 8\)"):
        disk.export(parse_outputs(["tar"]), tmp_path)


def test_an_export_that_cannot_be_written_is_an_error(workspace: Workspace, tmp_path: Path) -> None:
    disk = Disk(workspace, size=64 << 20)
    disk.fill([])
    with pytest.raises(MachineError, match=r"rootfs\.tar could not be written: No such file"):
        disk.export(parse_outputs(["tar"]), tmp_path / "missing")


def test_filling_over_what_is_there_is_an_error(workspace: Workspace) -> None:
    (workspace.path / "base").mkdir()
    with pytest.raises(MachineError, match="base: File exists"):
        Disk(workspace).fill([])
