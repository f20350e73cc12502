"""An ext4 image of ours in a real guest: its kernel finds every file, writes to it and lets it grow."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
from pathlib import Path

import pytest

from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4
from firebuild_bootstrap.image.worker.extfs import Ext4Image
from firebuild_bootstrap.image.worker.imagewalk import image_entries
from firebuild_bootstrap.initramfs import Compression, initramfs_image
from firebuild_bootstrap.initramfs.boot import EMULATED, kernel_arguments
from firebuild_bootstrap.initramfs.cpio import file, write_archive
from firebuild_bootstrap.layers.tar import Entry, write_layer
from initramfs.conftest import Kernel, alone

pytestmark = [pytest.mark.needs("e2fsck"), pytest.mark.xdist_group("qemu")]

INIT = b"""#!/vminit/bin/python3 -IBS
import fcntl, hashlib, io, os, struct, sys
sys.path[:0] = ["/vminit"]
from firebuild_bootstrap.guest import init_system as system, kernel
from firebuild_bootstrap.layers.tar import write_layer
from firebuild_bootstrap.layers.tree import tree_entries

class Hashed:
    def __init__(self): self.hash = hashlib.sha256()
    def write(self, data): self.hash.update(data)

try:
    system.mount_file_systems()
    system.load_modules()
    system.mount_drive("/dev/vda", "ext4", "/image")
    target = Hashed()
    write_layer(target, (each for each in tree_entries("/image") if each[0].path != "lost+found"))
    print("\\nhash", target.hash.hexdigest())
    print("looked up", sum(os.path.exists(f"/image/many/{name}") for name in os.listdir("/image/many")))
    root = os.open("/image", os.O_RDONLY)
    fcntl.ioctl(root, 0x40086610, struct.pack("=Q", (1 << 30) // 4096))  # EXT4_IOC_RESIZE_FS
    os.close(root)
    found = os.statvfs("/image")
    print("MiB", found.f_blocks * found.f_frsize >> 20)
    with open("/image/large", "wb") as file:
        for number in range(64):  # more than was free before
            file.write(bytes([number]) * (1 << 20))
    for number in range(500):
        os.close(os.open(f"/image/many/new-{number}", os.O_CREAT | os.O_WRONLY))
    kernel.unmount("/image")
    print("unmounted")
except BaseException as error:
    print("failed", type(error).__name__, error)
sys.stdout.flush()
system.end_machine("reboot")
"""


def entries() -> list[tuple[Entry, bytes]]:
    """What the kernel may see in another way than our reader."""
    acl = bytes.fromhex(
        "02000000 01000600ffffffff 02000400e8030000 04000400ffffffff 10000400ffffffff 20000400ffffffff"
    )
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    data = os.urandom(300_000)
    regions = ((0, 65536), (1 << 40, 65536))
    names = [f"many/name-{number:05}-{'x' * (number % 90)}" for number in range(3000)]
    return [
        (Entry("", "directory", 0o755, 1, 2, 5), b""),
        (Entry("acl", "file", 0o640, 70_000, 70_001, -7, 3, xattrs={"system.posix_acl_access": acl}), b"acl"),
        (Entry("block", "block", 0o600, 0, 0, 2**33 * 10**9 + 1, device=(259, 70_000)), b""),
        (
            Entry(
                "can", "file", 0o755, size=1, xattrs={"security.capability": capability, "user.b": b"v" * 900}
            ),
            b"1",
        ),
        (Entry("data", "file", 0o600, size=len(data)), data),
        (Entry("empty", "directory", 0o2770, 3, 4, 5), b""),
        (Entry("fast", "symlink", 0o777, linkname="x" * 59), b""),
        (Entry("fifo", "fifo", 0o622), b""),
        (Entry("hard", "hardlink", linkname="data"), b""),
        (Entry("many", "directory", 0o755, xattrs={"user.on-a-directory": b"1"}), b""),
        *((Entry(name, "file", 0o644), b"") for name in sorted(names)),
        (Entry("null", "character", 0o666, device=(1, 3)), b""),
        (Entry("slow", "symlink", 0o777, linkname="y" * 3000), b""),
        (Entry("sparse", "file", 0o600, size=1 << 41, regions=regions), b"a" * 65536 + b"b" * 65536),
        (Entry("\udcff\n" + "z" * 250, "file", 0o600), b""),
    ]


def archive(files: list[tuple[Entry, bytes]]) -> bytes:
    target = io.BytesIO()
    # What the guest reads of a hard link is what its file has.
    data = next(entry for entry, _ in files if entry.path == "data")
    write_layer(
        target,
        (
            (data._replace(path=entry.path, kind="hardlink", size=0, linkname="data"), b"")
            if entry.kind == "hardlink"
            else (entry, content)
            for entry, content in files
        ),
    )
    return target.getvalue()


def test_a_kernel_finds_all_files_and_the_image_grows_while_it_is_in_use(
    kernel: Kernel, store: Path, tmp_path: Path
) -> None:
    with alone(store):
        made = initramfs_image(store, kernel_modules=[kernel.modules], compression=Compression.NONE)
    init = io.BytesIO()
    write_archive([file("init", INIT, 0o755)], init)
    data = made.read_bytes()
    (tmp_path / "initramfs").write_bytes(data + bytes(-len(data) % 4) + init.getvalue())
    drive, files = tmp_path / "drive", entries()
    make_ext4(files, str(drive), Ext4Options(free=16 << 20))
    os.truncate(drive, 1 << 30)
    command = [
        *("qemu-system-x86_64", "-M", "microvm,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", "256"),
        *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", str(kernel.image)),
        *("-initrd", str(tmp_path / "initramfs"), "-append", kernel_arguments(extra=EMULATED)),
        *("-drive", f"file={drive},format=raw,if=none,id=d0", "-device", "virtio-blk-device,drive=d0"),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    said = done.stdout.decode("utf-8", "replace").replace("\r", "")
    assert f"\nhash {hashlib.sha256(archive(files)).hexdigest()}\n" in said, said[-3000:]
    assert "\nlooked up 3000\n" in said
    assert 950 < int(said.split("\nMiB ")[1].split()[0]) <= 1024
    assert "\nunmounted\n" in said
    checked = subprocess.run(["e2fsck", "-fn", drive], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    left = {entry.path: entry.size for entry, _ in image_entries(Ext4Image(str(drive)))}
    assert len([path for path in left if path.startswith("many/")]) == 3500
    assert left["large"] == 64 << 20
