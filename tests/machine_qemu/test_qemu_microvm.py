"""`images export --firecracker`: what it writes boots as it is, here in QEMU, which reads the same kernel."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import Firebuild

pytestmark = [
    pytest.mark.needs("userns", "busybox", "qemu"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.timeout(300),
]

COMMAND = (
    'echo "$GREETING from $(busybox hostname) in $PWD"; busybox tty; read line; echo "got $line"; exit 5'
)


def test_kernel_initramfs_drive_and_arguments_boot_to_the_images_command_on_the_console(
    firebuild: Firebuild, kernel: Path, context: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    # The initramfs of the other tests here.
    config.write_text("machine: {firecracker: {initrd_compression: zstd, vcpus: 1, memory: 320MiB}}\n")
    (context / "Dockerfile").write_text(
        f'FROM busybox\nENV GREETING=hello\nWORKDIR /srv\nCMD ["/bin/sh", "-c", {json.dumps(COMMAND)}]\n'
    )
    firebuild("build", "-q", "-t", "hand", context)
    out = tmp_path / "microvm"
    done = firebuild(
        *("images", "export", "hand", "--config", config),
        *("--firecracker", out, "--kernel", kernel, "--size", "64MiB"),
    )
    names = ["vmlinux", "initrd", "rootfs.ext4", "vm.json"]
    assert done.stdout.splitlines() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert (out / "rootfs.ext4").stat().st_size == 64 << 20
    document: Any = json.loads((out / "vm.json").read_text())
    assert document["machine-config"] == {"vcpu_count": 1, "mem_size_mib": 320, "smt": False}
    (drive,) = document["drives"]
    boot = document["boot-source"]
    # Only how the machine is reset is another one's, and what software needs instead of KVM.
    arguments = boot["boot_args"].replace("reboot=k", "reboot=t") + " tsc_early_khz=2600000"
    program = shutil.which("qemu-system-x86_64")
    assert program is not None
    with subprocess.Popen(
        [
            *(program, "-M", "microvm,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", "320M"),
            *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", boot["kernel_image_path"], "-initrd", boot["initrd_path"], "-append", arguments),
            *("-drive", f"id=d,if=none,format=raw,file={drive['path_on_host']}"),
            *("-device", "virtio-blk-device,drive=d"),
        ],
        cwd=out,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as machine:
        assert machine.stdin is not None
        assert machine.stdout is not None
        said = b""
        for line in machine.stdout:
            said += line
            if line.startswith(b"/dev/pts/"):
                machine.stdin.write(b"typed\r")
                machine.stdin.close()
        assert b"hello from microvm in /srv\r\n" in said, (said, machine.wait())
        assert b"got typed\r\n" in said
        assert b'"status": "failed", "exit": 5,' in said
    assert machine.returncode == 0


def test_an_export_says_what_it_lacks(firebuild: Firebuild, context: Path, tmp_path: Path) -> None:
    (context / "Dockerfile").write_text('FROM busybox\nCMD ["sh"]\n')
    firebuild("build", "-q", "-t", "hand", context)
    export = ("images", "export", "hand")
    assert "expected either --output or --firecracker" in firebuild(*export, status=2).stderr
    assert "are for --firecracker" in firebuild(*export, "-o", "tar", "--size", "1GiB", status=2).stderr
    wanted = (*export, "--firecracker", tmp_path / "out")
    assert (
        "is not set, and there is no --kernel\n  hint: name one: --kernel FILE"
        in firebuild(*wanted, status=2).stderr
    )
    assert "--size: expected a size" in firebuild(*wanted, "--size", "x", status=2).stderr
    assert "can't be read: No such file" in firebuild(*wanted, "--kernel", tmp_path / "x", status=2).stderr
    assert not (tmp_path / "out").exists()
