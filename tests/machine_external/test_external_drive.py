"""The drive of a machine that somebody else runs: made, watched, read, and never read too early."""

from __future__ import annotations

import os
import tarfile
import threading
import time
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, Interrupted, MachineError
from firebuild_bootstrap.machine.external.drive import Disk, ExternalDrive, Superblock
from firebuild_bootstrap.machine.workspace import Workspace
from machine_external.tool import debugfs, mount, unmount

pytestmark = [pytest.mark.needs("bwrap"), pytest.mark.needs("debugfs")]


def own(path: Path, workspace: Workspace, **options: object) -> ExternalDrive:
    return ExternalDrive(path, fill=True, disk=Disk(workspace, size=32 << 20), **options)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "drive.img"


def test_a_drive_is_made_read_and_removed(path: Path, workspace: Workspace) -> None:
    drive = own(path, workspace)
    drive.check()
    assert drive.prepare([]) == ()
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.stat().st_size == 32 << 20
    assert path.stat().st_blocks * 512 < 8 << 20
    assert not drive.released()
    mount(path)
    assert not drive.released()
    debugfs(path, "mkdir made")
    unmount(path)
    assert drive.wait(0)
    made = drive.read(end_timeout=0)
    with tarfile.open(made.path) as tar:
        assert tar.getmember("made").isdir()
    for _ in range(2):
        drive.close()
    assert os.listdir(path.parent) == ["home"]


def test_a_drive_of_somebody_else_is_read_and_not_changed(path: Path, workspace: Workspace) -> None:
    Disk(workspace, size=32 << 20).fill([])
    (workspace.path / "disk.ext4").rename(path)
    drive = ExternalDrive(path, fill=False, disk=Disk(workspace))
    drive.check()
    drive.prepare([])
    mount(path)
    unmount(path)
    before = path.read_bytes()
    drive.read(end_timeout=0)
    drive.close()
    assert path.read_bytes() == before


def test_a_drive_that_is_still_mounted_is_waited_for(path: Path, workspace: Workspace) -> None:
    drive = own(path, workspace)
    drive.prepare([])
    mount(path)
    later = threading.Timer(0.5, unmount, [path])
    later.start()
    try:
        assert drive.read(end_timeout=30)
    finally:
        later.join()


def test_a_drive_that_stays_mounted_is_not_read(path: Path, workspace: Workspace) -> None:
    drive = own(path, workspace)
    drive.prepare([])
    mount(path)
    assert not drive.wait(0.2)
    with pytest.raises(MachineError, match=r"still has its drive .* mounted") as caught:
        drive.read(end_timeout=0.2)
    assert "end_timeout" in str(caught.value.hint)


def test_a_drive_that_nobody_used_is_not_taken_for_the_result(path: Path, workspace: Workspace) -> None:
    drive = own(path, workspace)
    drive.prepare([])
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"but not on .*: the guest never mounted it"):
        drive.read(end_timeout=30)
    assert time.monotonic() - began < 20


def test_a_drive_that_is_mounted_while_it_is_read_is_not_taken(path: Path, workspace: Workspace) -> None:
    mounting = threading.Event()
    drive = own(path, workspace, check=lambda: mount(path) if mounting.is_set() else None)
    drive.prepare([])
    mount(path)
    unmount(path)
    mounting.set()
    with pytest.raises(MachineError, match="mounted again while it was read\n  hint: leave the drive alone"):
        drive.read(end_timeout=0)


def test_a_wait_can_be_interrupted(path: Path, workspace: Workspace) -> None:
    interrupting = threading.Event()

    def check() -> None:
        if interrupting.is_set():
            raise Interrupted("enough")

    drive = own(path, workspace, check=check)
    drive.prepare([])
    interrupting.set()
    with pytest.raises(Interrupted):
        drive.wait(30)


def test_nothing_is_overwritten(path: Path, workspace: Workspace) -> None:
    path.write_text("precious")
    with pytest.raises(InputError, match="exists, and would be overwritten with the base"):
        own(path, workspace).check()
    with pytest.raises(
        InputError, match=r"machine\.external\.disk: .* exists, and would be overwritten"
    ):  # made since the check
        own(path, workspace).prepare([])
    assert path.read_text() == "precious"
    assert sorted(os.listdir(path.parent)) == ["drive.img", "home"]


def test_a_file_system_that_refuses_the_drive_is_named(
    path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(
        MachineError, match=r"machine\.external\.disk: .* can't be made: Operation not permitted"
    ):
        own(path, workspace).prepare([])
    assert os.listdir(path.parent) == ["home"]


def test_a_file_that_somebody_put_in_its_place_stays(path: Path, workspace: Workspace) -> None:
    drive = own(path, workspace)
    drive.prepare([])
    (path.parent / "other").write_text("theirs")
    (path.parent / "other").rename(path)
    drive.close()
    assert path.read_text() == "theirs"


def test_what_is_missing_is_named(tmp_path: Path, workspace: Workspace) -> None:
    with pytest.raises(InputError, match="none is not a directory that can be written to"):
        own(tmp_path / "none/drive.img", workspace).check()
    with pytest.raises(MachineError, match="can't be copied to"):
        own(tmp_path / "none/drive.img", workspace).prepare([])
    theirs = ExternalDrive(tmp_path / "none", fill=False, disk=Disk(workspace))
    with pytest.raises(InputError, match=r"machine\.external\.disk: .*none is not a file"):
        theirs.check()
    assert not theirs.released()


@pytest.mark.parametrize("content", [b"", b"x" * 4096])
def test_a_file_without_a_file_system_is_refused(path: Path, workspace: Workspace, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(MachineError, match="holds no ext4 file system") as caught:
        ExternalDrive(path, fill=False, disk=Disk(workspace)).check()
    assert "without a partition table" in str(caught.value.hint)


def test_a_drive_that_vanishes_is_named(path: Path, workspace: Workspace) -> None:
    drive = own(path, workspace)
    drive.prepare([])
    path.unlink()
    with pytest.raises(MachineError, match=r"drive .* can't be read: No such file"):
        drive.released()
    drive.close()


def test_a_drive_with_errors_is_not_clean(path: Path, workspace: Workspace) -> None:
    own(path, workspace).prepare([])
    assert Superblock.read(path).clean
    debugfs(path, "ssv state 2")
    assert not Superblock.read(path).clean
