"""Parts of the init for which a machine would have to be broken in odd ways."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.guest import init, init_system, kernel
from firebuild_bootstrap.guest.init_settings import InitError, InitSettings, Report
from initramfs.elves import make_module

Patch = pytest.MonkeyPatch


def failing(number: int) -> Callable[..., Any]:
    def fail(*_arguments: object, **_fields: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# --- modules ------------------------------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    folder = tmp_path / "6.1.0-test"
    folder.mkdir()
    (folder / "order").write_text("bad.ko\n")
    (folder / "bad.ko").write_bytes(make_module())
    return tmp_path


def test_a_module_that_the_kernel_refuses_is_named(modules: Path) -> None:
    with pytest.raises(InitError, match=r"refused the module bad\.ko: ") as caught:
        init_system.load_modules(str(modules), "6.1.0-test")
    assert caught.value.status == "modules"


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENODEV])
def test_a_module_that_is_there_or_has_no_hardware_does_no_harm(
    modules: Path, number: int, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(init_system, "_load", failing(number))
    init_system.load_modules(str(modules), "6.1.0-test")


def test_modules_of_another_kernel_are_only_mentioned(modules: Path, tmp_path: Path) -> None:
    init_system.load_modules(str(modules))
    release = os.uname().release
    hint = init_system.missing_modules_hint(str(modules))
    assert hint == f"; the initramfs has no modules for the kernel {release} (it has them for 6.1.0-test)"
    (modules / release).mkdir()
    assert init_system.missing_modules_hint(str(modules)) == ""
    assert "(it has none)" in init_system.missing_modules_hint(str(tmp_path / "nothing"))


# --- the drive and the kernel -------------------------------------------------------------------


def test_a_missing_drive_is_told_with_the_modules_that_are_missing(tmp_path: Path) -> None:
    device = str(tmp_path / "vda")
    with pytest.raises(
        InitError, match=rf"there is no drive {device} after 0\.1 seconds; .* \(it has none\)"
    ):
        init_system.mount_drive(device, "ext4", seconds=0.1)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EINVAL, "it holds no ext4 file system, or a broken one"),
        (errno.EACCES, "it is read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_why_a_drive_can_not_be_mounted_is_told(
    number: int, reason: str, monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel, "mount", failing(number))
    with pytest.raises(InitError, match=f"/dev/null can't be mounted: {reason}"):
        init_system.mount_drive("/dev/null", "ext4", str(tmp_path))


@pytest.fixture
def places(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Where drives are mounted; the kernel has overlays."""
    for name, path in (
        ("SCRATCH", ""),
        ("PLAIN", "image"),
        ("LAYERS", "layers"),
        ("MOUNTS", "mounts"),
        ("CACHES", "caches"),
    ):
        monkeypatch.setattr(init_system, name, str(tmp_path / path))
    (tmp_path / "filesystems").write_text("nodev\toverlay\n\text4\n")
    monkeypatch.setattr(init_system, "FILE_SYSTEMS", str(tmp_path / "filesystems"))
    return tmp_path


def test_the_image_is_a_layer_that_is_only_read_and_caches_outlive_the_machine(
    places: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted: list[tuple[str, str, int]] = []

    def mount(device: str, _kind: str, target: str, *, flags: int = 0, data: str = "") -> None:
        if device == "/dev/vde":
            raise InitError("drive", "vde is broken")
        assert "noinit_itable" in data or flags
        mounted.append((device, os.path.relpath(target, places), flags))

    monkeypatch.setattr(init_system, "mount_drive", mount)
    monkeypatch.setattr(init_system, "say", print)
    kept = init_system.mount_drives("/dev/vda", "ext4", "/dev/vdc", ("one", "two", "three"))
    assert mounted == [
        ("/dev/vdc", ".", 0),
        ("/dev/vda", "layers/lower/1", kernel.MS_RDONLY),
        ("/dev/vdd", "caches/one", 0),
        ("/dev/vdf", "caches/three", 0),
    ]
    assert kept == (f"{places}/caches/one", f"{places}/caches/three")
    assert (places / "caches").stat().st_mode & 0o777 == 0o700
    assert sorted(os.listdir(places / "layers/lower")) == ["0", "1"]
    assert capsys.readouterr().out == "a cache mount starts empty: vde is broken\n"


def test_without_overlays_the_image_is_the_base_of_a_plain_tree_on_the_scratch_drive(
    places: Path, monkeypatch: Patch
) -> None:
    (places / "filesystems").write_text("\text4\n")
    mounted: list[tuple[str, ...]] = []
    monkeypatch.setattr(init_system, "ROOT", str(places / "root"))
    monkeypatch.setattr(init_system, "mount_drive", lambda *words, **_: mounted.append(words))
    monkeypatch.setattr(kernel, "mount", lambda *words, flags: mounted.append((*words, str(flags))))
    assert init_system.mount_drives("/dev/vda", "ext4", "/dev/vdb") == ()
    assert mounted == [
        ("/dev/vdb", "ext4", str(places)),
        ("/dev/vda", "ext4", f"{places}/layers/base"),
        (f"{places}/image", f"{places}/root", str(kernel.MS_BIND)),
    ]
    assert not (places / "layers/lower").exists()


def test_a_drive_that_stays_in_use_is_told_and_made_read_only(tmp_path: Path, monkeypatch: Patch) -> None:
    mounted: list[int] = []
    monkeypatch.setattr(init_system, "_unmount", lambda _target: False)
    monkeypatch.setattr(kernel, "mount", lambda *_arguments, flags: mounted.append(flags))
    assert "still in use" in init_system.release_drive(str(tmp_path), 0.1)
    assert mounted == [kernel.MS_REMOUNT | kernel.MS_RDONLY]


def test_a_drive_that_did_not_take_everything_is_told(tmp_path: Path, monkeypatch: Patch) -> None:
    class Libc:
        def syncfs(self, _descriptor: object) -> int:
            return -1

        def umount2(self, _target: bytes, _flags: int) -> int:
            return 0

    monkeypatch.setattr(init_system, "_libc", Libc)
    assert init_system.release_drive(str(tmp_path)).startswith("the drive did not take all data: ")


def test_a_file_system_that_the_kernel_refuses_is_named(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(init_system, "_FILE_SYSTEMS", (("nofs", str(tmp_path / "a"), 0, ""),))
    monkeypatch.setattr(kernel, "mount", failing(errno.ENODEV))
    with pytest.raises(InitError) as caught:
        init_system.mount_file_systems()
    assert caught.value.status == "kernel"


def test_the_machine_ends_in_one_way_or_the_other(monkeypatch: Patch) -> None:
    asked: list[int] = []

    class Libc:
        def reboot(self, command: Any) -> None:
            asked.append(command.value)

    monkeypatch.setattr(init_system, "_libc", Libc)
    init_system.end_machine("reboot")
    init_system.end_machine("poweroff")
    assert asked == [0x01234567, 0x4321FEDC, 0x4321FEDC, 0x01234567]


def test_kills_for_want_of_memory_are_counted(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("pgfault 5\noom_kill 3\n")
    assert init_system.times_out_of_memory(str(tmp_path / "vmstat")) == 3
    assert init_system.times_out_of_memory(str(tmp_path / "missing")) == 0
    (tmp_path / "vmstat").write_text("pgfault 5\n")
    assert init_system.times_out_of_memory(str(tmp_path / "vmstat")) == 0


# --- the course of things -----------------------------------------------------------------------


def test_a_killed_vminit_in_a_machine_without_memory_is_explained(tmp_path: Path) -> None:
    report = init.describe(128 + 9, str(tmp_path / "none"), out_of_memory=True)
    assert report == Report("failed", 137, "vminit was ended by SIGKILL (the machine ran out of memory)")
    assert init.describe(128 + 99, str(tmp_path / "none")).message == "vminit was ended by signal 99"


def test_the_end_of_a_long_log_is_kept(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 9000 + b"\nvminit: the reason\n\n")
    assert init.describe(4, str(tmp_path / "log")) == Report("failed", 4, "the reason")


@pytest.fixture
def steps(monkeypatch: Patch) -> list[str]:
    """Replace all that touches the machine; the names of what was called come back."""
    called: list[str] = []

    def noting(name: str, result: Any = None) -> Callable[..., Any]:
        def note(*_arguments: object) -> Any:
            called.append(name)
            return result

        return note

    for name in ("notice_ctrl_alt_del", "mount_file_systems", "name_machine", "load_modules", "mount_drive"):
        monkeypatch.setattr(init_system, name, noting(name))
    monkeypatch.setattr(init_system, "end_processes", noting("end_processes"))
    monkeypatch.setattr(init_system, "release_drive", noting("release_drive", ""))
    monkeypatch.setattr(init_system, "end_machine", noting("end_machine"))
    monkeypatch.setattr(init_system, "quiet_kernel", noting("quiet_kernel"))
    monkeypatch.setattr(init, "bring_up", noting("bring_up"))
    monkeypatch.setattr(init, "run_vminit", noting("run_vminit", 0))
    monkeypatch.setattr(init, "parse_command_line", lambda _text: InitSettings())
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(init, "say", called.append)
    return called


def test_nobody_can_start_it_by_hand(steps: list[str], monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 2)
    with pytest.raises(SystemExit, match="first process of a machine"):
        init.main()
    assert steps == []


def test_everything_happens_in_order(steps: list[str]) -> None:
    with pytest.raises(SystemExit, match="did not reboot"):
        init.main()
    assert steps == [
        *("notice_ctrl_alt_del", "mount_file_systems", "name_machine", "load_modules", "bring_up"),
        *("mount_drive", "run_vminit", "end_processes", "release_drive", "quiet_kernel"),
        *(Report("success", 0).line(), "end_machine"),
    ]


def test_a_machine_with_a_scratch_drive_unmounts_what_is_kept(steps: list[str], monkeypatch: Patch) -> None:
    released: list[str] = []

    def release(target: str) -> str:
        released.append(target)
        return ""

    monkeypatch.setattr(init_system, "mount_drives", lambda *drives: drives[-1])
    monkeypatch.setattr(init_system, "release_drive", release)
    assert init.run(InitSettings(scratch="/dev/vdb", caches=("a", "b"))) == Report("success", 0)
    assert released == ["a", "b"]
    assert "mount_drive" not in steps


def test_a_success_on_a_drive_that_was_not_unmounted_is_none(steps: list[str], monkeypatch: Patch) -> None:
    monkeypatch.setattr(init_system, "release_drive", lambda _target: "it is in use")
    assert init.run(InitSettings()) == Report("drive", 0, "it is in use")
    monkeypatch.setattr(init, "run_vminit", lambda _settings: 3)
    failed = Report("failed", 3, "vminit ended with status 3; it is in use")
    assert init.run(InitSettings()) == failed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InitError("drive", "gone"), Report("drive", None, "gone")),
        (KeyboardInterrupt(), Report("internal", None, "KeyboardInterrupt: ")),
    ],
)
def test_whatever_happens_the_machine_ends(
    steps: list[str], monkeypatch: Patch, error: BaseException, expected: Report
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(init_system, "mount_drive", fail)
    with pytest.raises(SystemExit):
        init.main()
    assert steps[-3:] == ["quiet_kernel", expected.line(), "end_machine"]


@pytest.mark.parametrize(("offset", "moved"), [(-60.0, True), (60.0, True), (0.5, False)])
def test_a_clock_is_set_only_where_it_is_off(offset: float, moved: bool, monkeypatch: Patch) -> None:
    times: list[float] = []
    monkeypatch.setattr(time, "clock_settime", lambda _clock, value: times.append(value))
    host = time.time() + offset
    init.set_clock(host)
    init.set_clock(None)
    assert times == ([host] if moved else [])


def test_vminit_in_its_child_tells_its_status_and_its_reason(tmp_path: Path) -> None:
    program = (
        "from firebuild_bootstrap.guest import init\n"
        f"init._LOG = {str(tmp_path / 'log')!r}\n"
        "settings = init.InitSettings(mmds='http://127.0.0.1:1', mmds_timeout=0.0)\n"
        "print(init.run_vminit(settings))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert "did not answer within 0 s" in init.describe(2, str(tmp_path / "log")).message


@pytest.mark.parametrize(
    ("address", "host"),
    [("http://169.254.169.254", "169.254.169.254"), ("http://10.0.0.1:8080/", "10.0.0.1"), ("unix:/x", "")],
)
def test_the_host_of_the_metadata_is_found_in_their_address(address: str, host: str) -> None:
    assert init.metadata_host(address) == host
