"""The init from its first to its last line, without a kernel of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from firebuild_bootstrap.initramfs import GuestReport
from initramfs.contained import DRIVE, HERE, changed, contain
from initramfs.hosting import Happened

pytestmark = [pytest.mark.needs("userns"), pytest.mark.needs("busybox")]

REBOOTED, POWERED_OFF = -1, -2  # unshare(1) passes on how pid_namespaces(7) words the end of a machine


@pytest.fixture
def busybox(context: Path) -> Path:
    """A context that can make a system out of nothing."""
    shutil.copy("/bin/busybox", context / "busybox")
    return context


def dockerfile(context: Path, *steps: str) -> Path:
    (context / "Dockerfile").write_text("\n".join(["FROM scratch", *steps]) + "\n")
    return context


def shell(script: str) -> str:
    return f'RUN ["/bin/busybox", "sh", "-c", "{script}"]'


def report(happened: Happened) -> GuestReport:
    assert happened.status in (REBOOTED, POWERED_OFF), happened.serial
    return GuestReport.parse(happened.serial)


def test_a_build_runs_on_the_drive_and_the_machine_reboots(tree: Path, busybox: Path) -> None:
    dockerfile(
        busybox, "COPY busybox /bin/", "COPY hello.txt /srv/", shell("/bin/busybox cat /srv/hello.txt")
    )
    happened = contain(tree, busybox)
    assert report(happened) == GuestReport("success", 0)
    assert (happened.ending, happened.output) == ("success", "hello from the context\n")
    assert (happened.status, happened.refused, happened.bootstrap_left) == (REBOOTED, 0, False)


def test_the_image_sees_nothing_of_the_initramfs(tree: Path, busybox: Path) -> None:
    look = "/bin/busybox ls / /proc; /bin/busybox cat /proc/mounts; /bin/busybox env"
    happened = contain(tree, dockerfile(busybox, "COPY busybox /bin/", shell(look)))
    assert report(happened).status == "success"
    words = happened.output.split()
    assert "bin" in words
    assert "initramfs" not in words
    assert "firebuild" not in happened.output.lower()


def test_it_can_power_off_instead(tree: Path, context: Path) -> None:
    dockerfile(context, "COPY hello.txt /")
    assert contain(tree, context, f"{DRIVE} {HERE} firebuild.end=poweroff").status == POWERED_OFF


def test_a_failed_step_is_the_reports_message(tree: Path, busybox: Path) -> None:
    happened = contain(tree, dockerfile(busybox, "COPY busybox /bin/", shell("exit 7")))
    assert report(happened) == GuestReport("failed", 1, "the command exited with status 7")
    assert happened.ending == "aborted"


def test_processes_that_a_step_left_do_not_hold_the_drive(tree: Path, busybox: Path) -> None:
    dockerfile(busybox, "COPY busybox /bin/", shell("cd /bin; /bin/busybox sleep 1000 & exit 0"))
    assert report(contain(tree, busybox)) == GuestReport("success", 0)


def test_what_a_killed_vminit_left_running_does_not_hold_the_drive(
    tree: Path, context: Path, tmp_path: Path
) -> None:
    source = """
import os, signal, time
if os.fork() == 0:
    os.chdir("/image")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    broken = changed(tree, tmp_path / "tree", bootstrap=source)
    happened = contain(broken, dockerfile(context, "COPY hello.txt /"))
    assert report(happened) == GuestReport("failed", 128 + 9, "vminit was ended by SIGKILL")


def test_ctrl_alt_del_ends_the_build_politely(tree: Path, busybox: Path) -> None:
    dockerfile(busybox, "COPY busybox /bin/", shell("echo waiting; /bin/busybox sleep 1000"))
    happened = contain(tree, busybox, interrupt_at="waiting")
    assert report(happened) == GuestReport("failed", 128 + 15, "the guest was ended by SIGTERM")
    assert happened.ending == "aborted"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "import os\nos.kill(os.getpid(), 9)",
            GuestReport("failed", 128 + 9, "vminit was ended by SIGKILL"),
        ),
        (
            "import os\nos.kill(os.getpid(), 34)",
            GuestReport("failed", 128 + 34, "vminit was ended by SIGRTMIN"),
        ),
        ("import os\nos._exit(3)", GuestReport("failed", 3, "vminit ended with status 3")),
        ("1 / 0", GuestReport("failed", 70, "ZeroDivisionError: division by zero")),
    ],
)
def test_a_crash_of_vminit_is_reported(
    tree: Path, context: Path, tmp_path: Path, source: str, expected: GuestReport
) -> None:
    broken = changed(tree, tmp_path / "tree", bootstrap=source)
    assert report(contain(broken, dockerfile(context, "COPY hello.txt /"))) == expected


def test_a_fault_of_the_init_itself_is_reported_with_its_place(
    tree: Path, context: Path, tmp_path: Path
) -> None:
    broken = changed(tree, tmp_path / "tree", init_network="def bring_up(*_): raise RuntimeError('odd')")
    happened = contain(broken, dockerfile(context, "COPY hello.txt /"))
    assert report(happened) == GuestReport("internal", None, "RuntimeError: odd")
    assert "/vminit/lib" in happened.serial


@pytest.mark.parametrize(
    ("drive", "message"),
    [
        ("firebuild.root=/dev/null firebuild.rootfstype=btrfy", "the kernel has no btrfy"),
        ("firebuild.root=/dev/null firebuild.rootfstype=ext4", "/dev/null can't be mounted: "),
    ],
)
def test_a_drive_that_can_not_be_mounted_is_reported(
    tree: Path, context: Path, drive: str, message: str
) -> None:
    found = report(contain(tree, dockerfile(context, "COPY hello.txt /"), f"{drive} {HERE}"))
    assert found.status == "drive"
    assert message in found.message


def test_a_wrong_setting_is_reported(tree: Path, context: Path) -> None:
    happened = contain(tree, dockerfile(context, "COPY hello.txt /"), "firebuild.rot=/dev/vda")
    assert report(happened) == GuestReport("settings", None, "firebuild.rot: there is no such setting")


def test_metadata_without_a_build_are_reported(tree: Path, context: Path) -> None:
    happened = contain(tree, dockerfile(context, "COPY hello.txt /"), metadata="empty")
    found = report(happened)
    assert (found.status, found.exit) == ("failed", 2)
    assert "no Bootstrap block" in found.message
