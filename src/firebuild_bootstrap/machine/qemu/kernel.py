"""The kernel that a machine boots, and the modules that belong to it."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.initramfs.modules import module_directories
from firebuild_pki.homes import absolute, open_file
from firebuild_pki.values import dataclass

_HOW: Final = (
    "on Debian: `apt-get download` the linux-image package that `apt-cache depends "
    "linux-image-cloud-amd64` names, unpack it with `dpkg -x`, and set machine.qemu.kernel to its "
    "boot/vmlinuz-… (docs/qemu.md)"
)
# Documentation/arch/x86/boot.rst: the header's magic, and where the text of the version is.
_MAGIC_AT, _MAGIC, _VERSION_AT = 0x202, b"HdrS", 0x20E
_HEADER_BYTES: Final = 0x10000
_ELF_X86_64: Final = 62
_BANNER: Final = re.compile(rb"Linux version (\d[\w.+~-]*) \(")
_RELEASE: Final = re.compile(r"\d[\w.+~-]*")


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot.

    Args:
        image: a bzImage or an uncompressed vmlinux.
        release: as `uname -r` says in the machine; empty where the image does not tell.
        modules: directories of its modules; none for a kernel that has all drivers built in.
    """

    image: Path
    release: str
    modules: tuple[Path, ...] = ()


def find_kernel(image: Path | None, modules: Sequence[Path] = (), *, root: Path = Path("/")) -> Kernel:
    """Return the kernel that the settings name, or one of this host's.

    Args:
        image: the kernel; None for the running one in /boot, or the newest that can be read.
        modules: directories of its modules; none looks beside the kernel and in this host's /lib/modules.
        root: where `boot` and `lib` of the host are.

    Raises:
        InputError: there is none, or it can't be read or booted.
    """
    if image is None:
        return _host_kernel(modules, root)
    image = absolute(image)
    release = read_release(image)
    named = module_directories(modules, "machine.qemu.kernel_modules")
    return Kernel(image, release, named or modules_for(image, release, root))


def read_release(image: Path) -> str:
    """Return the release of a kernel image; empty where it does not tell.

    Raises:
        InputError: it can't be read, or is not a kernel for x86-64.
    """
    try:
        with open_file(image) as file:
            head = file.read(_HEADER_BYTES)
            if head[:4] == b"\x7fELF":
                return _release_of_vmlinux(image, head, file.fileno())
    except OSError as error:
        raise InputError(
            f"the kernel {image} can't be read: {error.strerror}",
            hint="machine.qemu.kernel names a vmlinuz or bzImage that this user may read",
        ) from error
    if head[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        raise InputError(f"{image} is not a Linux kernel for x86-64 (bzImage or vmlinux)", hint=_HOW)
    start = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little") + 0x200
    text = head[start:].partition(b"\0")[0].decode("ascii", "replace")
    found = _RELEASE.match(text)
    return found[0] if found else ""


def _release_of_vmlinux(image: Path, head: bytes, descriptor: int) -> str:
    if int.from_bytes(head[18:20], "little") != _ELF_X86_64:
        raise InputError(f"{image} is not a program for x86-64, so no kernel to boot here", hint=_HOW)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
        return release_in(content)


def release_in(content: bytes | mmap.mmap) -> str:
    """Return the release that an uncompressed kernel of any architecture says; empty where it says none."""
    found = _BANNER.search(content)
    return found[1].decode("ascii") if found else ""


def modules_for(image: Path, release: str, root: Path = Path("/")) -> tuple[Path, ...]:
    """Return the directory of a kernel's modules: beside it, or of this host; none where there is none.

    Args:
        image: the kernel.
        release: as `uname -r` says in the machine; may be empty.
        root: where `lib` of the host is.
    """
    if not release:
        return ()
    beside = image.parent.parent
    places = (beside / "lib/modules", beside / "usr/lib/modules", root / "lib/modules")
    return tuple(place / release for place in places if (place / release).is_dir())[:1]


def _host_kernel(modules: Sequence[Path], root: Path) -> Kernel:
    unusable = []
    for image in _host_images(root / "boot"):
        try:
            kernel = find_kernel(image, modules, root=root)
        except InputError as error:
            unusable.append(error.message)
            continue
        if kernel.modules:
            return kernel
        unusable.append(f"{image} has no modules in {root / 'lib/modules'}")
    why = f": {'; '.join(unusable)}" if unusable else f": {root / 'boot'} holds none"
    raise InputError(f"machine.qemu.kernel is not set, and this host has no usable kernel{why}", hint=_HOW)


def _host_images(boot: Path) -> Iterator[Path]:
    """Yield the running kernel, then the others, the newest first."""
    running = boot / f"vmlinuz-{os.uname().release}"
    if running.exists():
        yield running
    others = (path for path in boot.glob("vmlinuz-*") if path != running)
    yield from sorted(others, key=_natural, reverse=True)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]
