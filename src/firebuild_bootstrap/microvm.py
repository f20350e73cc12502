"""Writes all that Firecracker needs to boot an image by hand: kernel, initramfs, drive, configuration.

The initramfs is that of the builds with one more file, which says what to execute (guest/alone.py): so the
image itself needs no init, and nothing of it is changed.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import zstandard

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.guest.init_settings import COMMAND
from firebuild_bootstrap.image.outputs import Deliveries, OutputSpec, OutputType
from firebuild_bootstrap.initramfs import Compression, initramfs_image
from firebuild_bootstrap.initramfs.cpio import Entry, directory, file, write_archive
from firebuild_bootstrap.initramfs.image import run_lz4
from firebuild_bootstrap.initramfs.modules import module_directories
from firebuild_bootstrap.machine.firecracker.api import machine_config
from firebuild_bootstrap.machine.firecracker.checks import check_kernel
from firebuild_bootstrap.machine.qemu.kernel import modules_for, release_in
from firebuild_bootstrap.running import RunRequest, command_of, stop_signal
from firebuild_pki.display import counted
from firebuild_pki.homes import absolute, open_file

if TYPE_CHECKING:
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.store import StoredImage
    from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings

KERNEL, INITRD, DRIVE, CONFIG = "vmlinux", "initrd", "rootfs.ext4", "vm.json"
"""What is written, by its names in the directory."""
_ARGUMENTS: Final = (
    "console=ttyS0",
    "reboot=k",
    "panic=-1",
    "quiet",
    "random.trust_cpu=on",
    "ip=none",
    "firebuild.root=/dev/vda",
)
# As Firecracker's own default: no probing for hardware that it does not have.
_X86_ARGUMENTS: Final = ("pci=off", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
# Documentation/arch/x86/boot.rst: the header's magic, its sectors, and where the compressed kernel is.
_MAGIC_AT, _MAGIC, _SECTORS_AT, _PAYLOAD_AT = 0x202, b"HdrS", 0x1F1, 0x248


def write_microvm(
    home: Home,
    image: StoredImage,
    target: Path,
    settings: FirecrackerSettings,
    *,
    kernel: Path | None = None,
    size: int = 0,
    machine: str,
) -> tuple[Path, ...]:
    """Write a directory from which Firecracker boots an image; files of the same names in it are replaced.

    Args:
        home: where the image and the initramfs are.
        image: held by the caller.
        target: the directory, which is made if it is not there.
        settings: processors, memory, kernel, its modules and arguments.
        kernel: instead of that of the settings; a bzImage is unpacked.
        size: bytes of the drive; 0 leaves it to its content.
        machine: this host's architecture, as `uname -m` says it.

    Returns:
        the files.

    Raises:
        InputError: there is no usable kernel, or the image says nothing to execute.
        MachineError: it can't be written.
    """
    entry = file(COMMAND.lstrip("/"), json.dumps(_command(image)).encode(), 0o600)
    if kernel is None and settings.kernel is None:
        raise InputError(
            "--firecracker: machine.firecracker.kernel is not set, and there is no --kernel",
            hint="name one: --kernel FILE, a vmlinux, or the bzImage of a distribution, which is unpacked",
        )
    source = kernel if kernel is not None else check_kernel(settings.kernel, machine)
    setting = "--kernel" if kernel is not None else "machine.firecracker.kernel"
    unpacked = read_kernel(source, machine, setting)
    modules = _modules(source, unpacked, settings.kernel_modules)
    initramfs = initramfs_image(
        home.root, compression=Compression(settings.initrd_compression), kernel_modules=modules
    )
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target} can't be made: {error.strerror}") from error
    arguments = (*_ARGUMENTS, *(_X86_ARGUMENTS if machine == "x86_64" else ()), *settings.kernel_args)
    text = json.dumps(_configuration(settings, " ".join(arguments)), indent=2) + "\n"
    drive = OutputSpec(OutputType.EXT4, dest=target / DRIVE, size=size)
    with Deliveries(home.trees) as deliveries:
        with home.held_form(image, drive) as made:
            deliveries.copy(made, drive)
        for name, data in (
            (KERNEL, unpacked),
            (INITRD, with_file(initramfs.read_bytes(), entry)),
            (CONFIG, text.encode()),
        ):
            with deliveries.writing(target / name) as partial:
                partial.write_bytes(data)
    return tuple(target / name for name in (KERNEL, INITRD, DRIVE, CONFIG))


def _command(image: StoredImage) -> dict[str, Any]:
    config, request = image.record.config, RunRequest(image=str(image.tag))
    return {
        "argv": command_of(request, config),
        "env": {"HOSTNAME": "microvm", "TERM": "xterm", **config.env},
        "workdir": config.workdir,
        "user": config.user or "0:0",
        "hostname": "microvm",
        "stop_signal": stop_signal(config),
        "volumes": config.volumes,
    }


def _configuration(settings: FirecrackerSettings, arguments: str) -> dict[str, Any]:
    """Return what Firecracker's option --config-file takes; paths are relative to where it is started."""
    return {
        "boot-source": {"kernel_image_path": KERNEL, "initrd_path": INITRD, "boot_args": arguments},
        "machine-config": machine_config(settings),
        "drives": [
            {"drive_id": "rootfs", "path_on_host": DRIVE, "is_root_device": False, "is_read_only": False}
        ],
    }


def _modules(kernel: Path, unpacked: bytes, named: Sequence[str]) -> tuple[Path, ...]:
    """Return the directories of a kernel's modules: those of the settings, or those that lie beside it."""
    if named:
        return module_directories(named, "machine.firecracker.kernel_modules")
    return modules_for(absolute(kernel), release_in(unpacked))


def with_file(initramfs: bytes, entry: Entry) -> bytes:
    """Add a file to a compressed initramfs: Linux goes on with what follows, at a multiple of 4 bytes."""
    more = io.BytesIO()
    write_archive([directory(entry.path.rpartition("/")[0]), entry], more)
    return initramfs + bytes(-len(initramfs) % 4) + more.getvalue()


def read_kernel(path: Path, machine: str, setting: str) -> bytes:
    """Return a kernel that Firecracker boots: on x86-64 an ELF file, out of a bzImage where it is one.

    Args:
        path: of the file.
        machine: its architecture, as `uname -m` says it.
        setting: what names it, an option or a setting: for errors.

    Raises:
        InputError: it can't be read, or is of another form.
    """
    try:
        with open_file(path) as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"{setting}: {path} can't be read: {error.strerror}") from error
    if machine == "aarch64" or data[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        check_kernel(str(path), machine, setting=setting)
        return data
    sectors = data[_SECTORS_AT] or 4
    offset, length = struct.unpack("<II", data[_PAYLOAD_AT : _PAYLOAD_AT + 8].ljust(8, b"\xff"))
    start = (sectors + 1) * 512 + offset
    if start + length > len(data):
        raise InputError(f"{setting}: {path} is damaged: it is cut off after {counted(len(data), 'byte')}")
    kernel = _unpacked(f"{setting}: {path}", data[start : start + length])
    if kernel[:4] != b"\x7fELF":
        raise InputError(f"{setting}: {path} holds no vmlinux (ELF)", hint="give an uncompressed vmlinux")
    return kernel


# A number follows the compressed kernel, so that what reads one stream and no more is what is needed here.
_FORMS: Final[tuple[tuple[bytes, Callable[[bytes], bytes]], ...]] = (
    (b"\x1f\x8b", lambda data: zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data)),
    (b"\xfd7zXZ", lambda data: lzma.LZMADecompressor().decompress(data)),
    (b"\x5d\0\0", lambda data: lzma.LZMADecompressor().decompress(data)),
    (b"\x28\xb5\x2f\xfd", lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data)),
    # That number again, which lz4 takes for the size of one more block.
    (b"\x02\x21\x4c\x18", lambda data: run_lz4("-d", "-c", data=data[:-4])),
)


def _unpacked(kernel: str, payload: bytes) -> bytes:
    for magic, decompress in _FORMS:
        if payload.startswith(magic):
            try:
                return decompress(payload)
            except (lzma.LZMAError, zlib.error, zstandard.ZstdError, MachineError) as error:
                raise InputError(f"{kernel} is damaged: {error}") from error
    raise InputError(
        f"{kernel} is compressed in a form that is not read here",
        hint="the source of Linux has scripts/extract-vmlinux, which unpacks it",
    )
