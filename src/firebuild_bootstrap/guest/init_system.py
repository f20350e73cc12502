"""What the init asks of the kernel: file systems, modules, the drive, the end (man 2 of each name)."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from firebuild_bootstrap import wire

from . import kernel
from .init_settings import InitError, say

ROOT = "/image"
SCRATCH = "/scratch"
LAYERS = f"{SCRATCH}/layers"
PLAIN = f"{SCRATCH}/image"
MOUNTS = f"{SCRATCH}/mounts"
CACHES = f"{SCRATCH}/caches"
MODULES = "/vminit/modules"
FILE_SYSTEMS = "/proc/filesystems"
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
_FILE_SYSTEMS = (
    ("proc", "/proc", kernel.PLAIN, ""),
    ("sysfs", "/sys", kernel.PLAIN, ""),
    ("devtmpfs", "/dev", kernel.MS_NOSUID, "mode=755"),
    ("tmpfs", "/run", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755"),
    ("tmpfs", "/tmp", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777"),  # noqa: S108 - the mount point itself
)
# Those of systemd and dockerd: the kernel's own, 1024 and 4096, are too few for databases and search engines.
# The soft one stays, because select(2) knows no higher descriptor.
_OPEN_FILES = (1024, 524288)
# Those of dockerd in a network of a container's own: a machine runs one image, whose USER may serve port 80.
_SYSCTLS = {
    "/proc/sys/net/ipv4/ip_unprivileged_port_start": "0",
    "/proc/sys/net/ipv4/ping_group_range": "0 2147483647",
}
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # linux/nsfs.h, PID_NS_INIT_INO: that of no container
_NO_HARM = (errno.EEXIST, errno.ENODEV)  # loaded or built in already; no such hardware here
_DRIVE_SECONDS = 5.0
_UNMOUNT_SECONDS = 5.0
_PAUSE = 0.02
# linux/reboot.h
_COMMANDS = {"reboot": 0x01234567, "poweroff": 0x4321FEDC}
_CAD_OFF = 0


def mount_file_systems() -> None:
    """Mount what a system needs; what is mounted already stays.

    Raises:
        InitError: the kernel refused one.
    """
    for kind, target, flags, data in _FILE_SYSTEMS:
        os.makedirs(target, exist_ok=True)
        if os.path.ismount(target):
            continue
        try:
            kernel.mount(kind, target, kind, flags, data)
        except OSError as error:
            raise InitError("kernel", str(error)) from error


def name_machine() -> None:
    """Give the machine a name that its hosts file can have: the kernel's `(none)` is none.

    A container has one already, and may forbid to change it.
    """
    with suppress(PermissionError):
        socket.sethostname(wire.HOST_NAME)


def raise_limits() -> None:
    """Let commands open as many files and listen on the same ports as in a container.

    In a container only what is of this process changes: the rest would be its host's.
    """
    with suppress(ValueError, OSError):  # a container may have a lower limit that it can't raise
        resource.setrlimit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
        return
    for path, value in _SYSCTLS.items():
        with suppress(OSError), open(path, "w", encoding="ascii") as file:  # a kernel without IPv4 has none
            file.write(value)


def load_modules(directory: str = MODULES, release: str = "") -> None:
    """Load the modules for the running kernel, in the order in which they need each other.

    A kernel that the initramfs has no modules for has to have all drivers built in.

    Raises:
        InitError: the kernel refused one.
    """
    folder = f"{directory}/{release or os.uname().release}"
    try:
        with open(f"{folder}/order", encoding="ascii") as file:
            names = file.read().split()
    except FileNotFoundError:
        return
    for name in names:
        try:
            _load(f"{folder}/{name}")
        except OSError as error:
            if error.errno not in _NO_HARM:
                raise InitError(
                    "modules", f"the kernel {os.uname().release} refused the module {name}: {error.strerror}"
                ) from error


def _load(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        number = ctypes.c_long(_FINIT_MODULE[os.uname().machine])
        if _libc().syscall(number, ctypes.c_int(descriptor), b"", ctypes.c_int(0)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


def missing_modules_hint(directory: str = MODULES) -> str:
    """Say, where a device is missing, that the initramfs has modules for other kernels only."""
    release = os.uname().release
    found = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    if release in found:
        return ""
    have = f"it has them for {', '.join(found)}" if found else "it has none"
    return f"; the initramfs has no modules for the kernel {release} ({have})"


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Wait until `condition` holds; False when it did not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE)
    return True


def mount_drives(image: str, kind: str, scratch: str, caches: Sequence[str] = ()) -> tuple[str, ...]:
    """Mount all drives so that steps can work on layers (overlay.py), which go with the scratch drive.

    Where the kernel has no overlays, the image's drive is the base that is copied to the scratch drive
    (comparing.py).

    Args:
        image: the drive with the image, which is only read: layer 1, above an empty one.
        kind: of its file system.
        scratch: an empty drive.
        caches: names of cache mounts (caches.py), whose drives have the next letters.

    Returns:
        where drives are mounted that outlive this machine.

    Raises:
        InitError: there is no such drive, or what is on it can't be mounted.
    """
    # Nobody writes the zeros of a file that is new.
    mount_drive(scratch, "ext4", SCRATCH, data="noinit_itable")
    with open(FILE_SYSTEMS, encoding="ascii") as file:
        overlays = "overlay" in file.read().split()
    below = f"{LAYERS}/lower/1" if overlays else f"{LAYERS}/base"
    for path in (f"{LAYERS}/lower/0" if overlays else PLAIN, below, MOUNTS, CACHES):
        os.makedirs(path)
    os.chmod(CACHES, 0o700)  # programs in it may have the rights of their owners
    mount_drive(image, kind, below, flags=kernel.MS_RDONLY)
    if not overlays:
        os.makedirs(ROOT, exist_ok=True)
        kernel.mount(PLAIN, ROOT, flags=kernel.MS_BIND)
    kept = []
    for number, name in enumerate(caches, 1):
        device, target = f"{scratch[:-1]}{chr(ord(scratch[-1]) + number)}", f"{CACHES}/{name}"
        try:
            mount_drive(device, "ext4", target, data="noinit_itable,discard")
        except InitError as error:  # a cache may be lost, and another takes its place for this time
            say(f"a cache mount starts empty: {error.message}")
        else:
            kept.append(target)
    return tuple(kept)


def mount_drive(
    device: str,
    kind: str,
    target: str = ROOT,
    seconds: float = _DRIVE_SECONDS,
    *,
    flags: int = 0,
    data: str = "",
) -> None:
    """Mount a drive, for which drivers may need a moment.

    Raises:
        InitError: there is none, or what is on it can't be mounted.
    """
    if not wait_for(lambda: os.path.exists(device), seconds):
        raise InitError(
            "drive", f"there is no drive {device} after {seconds:g} seconds{missing_modules_hint()}"
        )
    os.makedirs(target, exist_ok=True)
    try:
        kernel.mount(device, target, kind, flags, data)
    except OSError as error:
        reason = {
            errno.EINVAL: f"it holds no {kind} file system, or a broken one",
            errno.ENODEV: f"the kernel has no {kind}",
            errno.EACCES: "it is read-only",
            errno.EROFS: "it is read-only",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        raise InitError("drive", f"{device} can't be mounted: {reason}") from error


def release_drive(target: str = ROOT, seconds: float = _UNMOUNT_SECONDS) -> str:
    """Write everything to the drive and unmount it.

    Returns:
        why that did not work, empty when it did. The drive is read-only then, where the kernel allows it.
    """
    problem = _synced(target)
    if wait_for(lambda: _unmount(target), seconds):
        return problem
    with suppress(OSError):
        kernel.mount("", target, flags=kernel.MS_REMOUNT | kernel.MS_RDONLY)
    return problem or "the drive is still in use and could not be unmounted"


def _synced(target: str) -> str:
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # syncfs(2) tells of data that could not be written, which sync(2) does not.
        failed = _libc().syncfs(ctypes.c_int(descriptor)) < 0
        return f"the drive did not take all data: {os.strerror(ctypes.get_errno())}" if failed else ""
    finally:
        os.close(descriptor)


def _unmount(target: str) -> bool:
    return bool(_libc().umount2(os.fsencode(target), 0) == 0)


def end_processes() -> None:
    """Kill every process but this one, and wait for them."""
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def notice_ctrl_alt_del() -> None:
    """Have Ctrl-Alt-Del, Firecracker's polite request to stop, come as SIGINT instead of a hard reset."""
    _libc().reboot(ctypes.c_int(_CAD_OFF))


def times_out_of_memory(path: str = "/proc/vmstat") -> int:
    """Return how often the kernel has killed a process for want of memory."""
    try:
        with open(path, encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def quiet_kernel() -> None:
    """Keep kernel messages from being written into the middle of the report."""
    with suppress(OSError), open("/proc/sys/kernel/printk", "w", encoding="ascii") as file:
        file.write("1")


def end_machine(how: str) -> None:
    """Have the machine end: `reboot` (its hypervisor exits) or `poweroff`; each is tried after the other.

    Drives that are kept are unmounted by then. Writing the others would take time for nothing.
    """
    for name in (how, *(name for name in _COMMANDS if name != how)):
        _libc().reboot(ctypes.c_int(_COMMANDS[name]))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
