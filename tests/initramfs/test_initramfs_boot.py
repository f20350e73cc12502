"""Real machines: QEMU without KVM, in a network namespace where only this host's services exist.

Each boot takes some seconds, so there are few of them; the other ways in which a build ends are in
test_initramfs_contained.py, where the init is the same and the kernel is not.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from firebuild_bootstrap.initramfs import (
    EMULATED,
    Compression,
    GuestReport,
    initramfs_image,
    kernel_arguments,
)
from firebuild_bootstrap.initramfs.cpio import Entry, file, write_archive
from initramfs.conftest import Kernel, alone
from initramfs.hosting import Happened, Scenario, run

pytestmark = [pytest.mark.needs("userns"), pytest.mark.needs("busybox")]

NETWORK = "user,id=n0,net=169.254.0.0/16,host=169.254.169.254"
_SECONDS = 100.0  # on an idle machine 5 are enough


@dataclass(frozen=True)
class Machine:
    """How a machine is made; `rtc` is the clock that it starts with, `bus` the kind of its devices."""

    kernel: Path
    initramfs: Path
    drive: Path | None
    append: str
    type: str = "microvm,rtc=on"
    bus: str = "device"
    rtc: str = "utc"
    memory: int = 256

    def command(self) -> list[str]:
        drive = ["-drive", f"file={self.drive},format=raw,if=none,id=d0"] if self.drive else []
        drive += ["-device", f"virtio-blk-{self.bus},drive=d0"] if self.drive else []
        return [
            *("qemu-system-x86_64", "-M", self.type, "-accel", "tcg", "-cpu", "max", "-m", str(self.memory)),
            *(
                "-nodefaults",
                "-display",
                "none",
                "-serial",
                "stdio",
                "-no-reboot",
                "-rtc",
                f"base={self.rtc}",
            ),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs), "-append", self.append),
            *("-netdev", NETWORK, "-device", f"virtio-net-{self.bus},netdev=n0", *drive),
        ]


@pytest.fixture(scope="session")
def images(kernel: Kernel, store: Path) -> Callable[[Compression], Path]:
    """Makes initramfs images with the kernel's modules."""

    def make(compression: Compression) -> Path:
        with alone(store):
            return initramfs_image(store, kernel_modules=[kernel.modules], compression=compression)

    return make


@pytest.fixture
def machine(kernel: Kernel, images: Callable[[Compression], Path], drive: Path) -> Machine:
    initramfs = images(Compression.NONE)
    return Machine(kernel.image, initramfs, drive, kernel_arguments(extra=EMULATED, mmds_timeout=5))


def boot(
    machine: Machine, context: Path, steps: Sequence[str], **fields: str
) -> tuple[GuestReport, Happened]:
    (context / "Dockerfile").write_text("\n".join(["FROM base", *steps]) + "\n")
    happened = run(Scenario(machine.command(), str(context), seconds=_SECONDS, **fields))
    assert happened.status == 0, happened.serial  # it ended by itself
    return GuestReport.parse(happened.serial), happened


def check(drive: Path) -> None:
    done = subprocess.run(["e2fsck", "-f", "-n", drive], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def read(drive: Path, command: str) -> str:
    done = subprocess.run(["debugfs", "-R", command, drive], capture_output=True, text=True, check=True)
    return done.stdout


def overlaid(initramfs: Path, target: Path, *entries: Entry) -> Path:
    """An initramfs with a second archive behind it, whose files replace those of the first."""
    second = io.BytesIO()
    write_archive(entries, second)
    data = initramfs.read_bytes()
    target.write_bytes(data + bytes(-len(data) % 4) + second.getvalue())
    return target


def test_a_build_on_a_drive_without_python_is_right_and_clean(machine: Machine, context: Path) -> None:
    (context / "tree").mkdir()
    (context / "tree/run.sh").write_text("#!/bin/sh\necho script of $1\n")
    (context / "tree/run.sh").chmod(0o755)
    steps = (
        "COPY --chown=1000:1001 hello.txt /srv/data/",
        "COPY tree/ /opt/",
        "WORKDIR /opt",
        "ENV WHO=us",
        "RUN ./run.sh $WHO && id -u && ls / && echo made > /made",
        "USER app",
        "RUN id -u; cat /srv/data/hello.txt",
    )
    report, happened = boot(machine, context, steps)
    assert report == GuestReport("success", 0), happened.serial
    assert (happened.ending, happened.refused, happened.bootstrap_left) == ("success", 0, False)
    words = happened.output.split("\n")
    assert words[:2] == ["script of us", "0"]
    assert words[-3:] == ["1000", "hello from the context", ""]
    assert "initramfs" not in words
    assert machine.drive is not None
    check(machine.drive)
    assert read(machine.drive, "cat /srv/data/hello.txt") == "hello from the context\n"
    assert read(machine.drive, "cat /made") == "made\n"
    assert "User:  1000   Group:  1001" in read(machine.drive, "stat /srv/data/hello.txt")


@pytest.mark.needs("lz4")
def test_other_devices_dhcp_lz4_and_a_clock_in_1970(
    machine: Machine, images: Callable[[Compression], Path], context: Path
) -> None:
    append = kernel_arguments(network=None)
    other = replace(machine, type="q35", bus="pci", append=append, rtc="1970-01-02T00:00:00")
    other = replace(other, initramfs=images(Compression.LZ4))
    step = "RUN cat /etc/resolv.conf; [ $(/bin/busybox date +%Y) -gt 2024 ] && echo now"
    report, happened = boot(other, context, [step])
    assert report == GuestReport("success", 0), happened.serial
    server, last = happened.output.splitlines()[-2:]
    assert server.startswith("nameserver 169.254.")
    assert last == "now"


@pytest.mark.release
def test_a_clock_that_is_ahead_is_set_back(machine: Machine, context: Path) -> None:
    report, happened = boot(
        replace(machine, rtc="2060-01-01T00:00:00"), context, ["RUN /bin/busybox date +%Y"]
    )
    assert report == GuestReport("success", 0), happened.serial
    assert int(happened.output) < 2060


def test_an_initramfs_of_a_third_of_the_memory_boots_and_a_missing_drive_ends_the_machine(
    machine: Machine, context: Path, tmp_path: Path
) -> None:
    # As with a Python that has its debug information in it. A tmpfs takes no more than half of what is left.
    more = file("more", bytes((80 << 20) - machine.initramfs.stat().st_size))
    large = overlaid(machine.initramfs, tmp_path / "initramfs", more)
    report, happened = boot(replace(machine, drive=None, initramfs=large), context, ["RUN true"])
    assert "unpacking failed" not in happened.serial
    assert report == GuestReport("drive", None, "there is no drive /dev/vda after 5 seconds")


def test_a_full_drive_ends_the_build_and_stays_clean(machine: Machine, context: Path) -> None:
    (context / "large").write_bytes(os.urandom(24 << 20))
    report, happened = boot(machine, context, ["COPY large /large"])
    assert (report.status, report.exit) == ("failed", 1)
    assert "No space left on device" in report.message
    assert happened.ending == "aborted"
    assert machine.drive is not None
    check(machine.drive)


def test_nobody_at_the_metadata_address_ends_the_machine(machine: Machine, context: Path) -> None:
    report, _ = boot(machine, context, ["RUN true"], metadata="none")
    assert (report.status, report.exit) == ("failed", 2)
    assert "the metadata service at http://169.254.169.254 did not answer within 5 s" in report.message


@pytest.mark.release
def test_a_killed_vminit_leaves_a_clean_drive(machine: Machine, context: Path, tmp_path: Path) -> None:
    place = f"vminit/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"
    source = b"import os\nopen('/image/begun', 'w').write('x' * 1000)\nos.kill(os.getpid(), 9)\n"
    killed = file(f"{place}/firebuild_bootstrap/guest/bootstrap.py", source)
    changed = replace(machine, initramfs=overlaid(machine.initramfs, tmp_path / "initramfs", killed))
    report, _ = boot(changed, context, ["RUN true"])
    assert report == GuestReport("failed", 128 + 9, "vminit was ended by SIGKILL")
    assert machine.drive is not None
    check(machine.drive)
    assert len(read(machine.drive, "cat /begun")) == 1000


@pytest.mark.release
def test_a_panic_of_the_kernel_ends_the_machine(machine: Machine, context: Path, tmp_path: Path) -> None:
    init = file("init", b"#!/vminit/bin/python3 -IBS\nimport sys; sys.exit(1)\n", 0o755)
    changed = replace(machine, initramfs=overlaid(machine.initramfs, tmp_path / "initramfs", init))
    report, _ = boot(changed, context, ["RUN true"])
    assert report.status == "panic"
    assert "Attempted to kill init! exitcode=0x00000100" in report.message
