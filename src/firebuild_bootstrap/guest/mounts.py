"""What a RUN sees: the image as its root, a fresh /proc, a private /dev, and the network's files.

Runs in the helper (enter.py) inside new mount, pid and ipc namespaces. Mount points are found with the
safe walk of rootfs.py and mounted on through their descriptors, so a link in the image can't redirect them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from firebuild_bootstrap.layers.root import Root

from . import kernel

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
# In a user namespace of its own a RUN would have all capabilities, and more of the kernel to try them on.
_USER_NAMESPACES = "/proc/sys/user/max_user_namespaces"
_PROC_HIDDEN = ("kcore", "keys", "timer_list", "sched_debug", "latency_stats")
_SCRIPT = "/dev/firebuild-run"
_PLAIN = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
_READ_ONLY = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY


def enter_root(path: str, script: str | None) -> str | None:
    """Mount all that belongs to a RUN and make `path` the root directory.

    Args:
        path: the image's root; "/" stays where it is.
        script: text of an executable file that only this RUN sees.

    Returns:
        Path of the script inside, None without one.

    Raises:
        OSError: a mount failed; the message says which.
    """
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    if path != "/":
        kernel.mount(path, path, flags=kernel.MS_BIND)
    with Root(path) as root:
        _mount_dev(root)
        _mount_proc(root)
        if script is not None:
            _write(root, _SCRIPT, script.encode("utf-8"), 0o755)
    if path != "/":
        _change_root(path)
    return None if script is None else _SCRIPT


def _change_root(path: str) -> None:
    os.chdir(path)
    try:
        kernel.pivot_root(".", ".")
        kernel.detach(".")
    except OSError as error:
        # An initramfs can't be pivoted away from (pivot_root(2), EINVAL): move over it, as switch_root does.
        if error.errno != errno.EINVAL:
            raise
        kernel.mount(path, "/", flags=kernel.MS_MOVE)
        os.chroot(".")
    os.chdir("/")


@contextmanager
def _target(root: Root, path: str, flags: int = 0) -> Iterator[str]:
    """Yield a name for what `path` leads to in the image that links can't change any more."""
    with root.locate(path) as place:
        descriptor = place.open(os.O_PATH | flags)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _mount_dev(root: Root) -> None:
    # Opened before the new /dev can hide them.
    devices = {name: descriptor for name in _DEVICES if (descriptor := _outer_device(name)) is not None}
    with _target(root, "/dev", os.O_DIRECTORY) as dev:
        kernel.mount("tmpfs", dev, "tmpfs", kernel.MS_NOSUID, "mode=755,size=65536k")
    for name, descriptor in devices.items():
        _write(root, f"/dev/{name}", b"", 0o666)
        # The node is the machine's own, with its owner and mode: the root of a RUN must not change them.
        # A read-only mount forbids that and, as devices are no files, no write to them.
        _bind_read_only(root, f"/proc/self/fd/{descriptor}", f"/dev/{name}")
        os.close(descriptor)
    for name, text in _DEVICE_LINKS.items():
        _link(root, f"/dev/{name}", text)
    for name, mode in (("pts", 0o755), ("shm", 0o1777)):
        _directory(root, f"/dev/{name}", mode)
    with _target(root, "/dev/shm") as shm:  # noqa: S108 - the mount point itself
        kernel.mount("tmpfs", shm, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
    with _target(root, "/dev/pts") as pts:
        flags = kernel.MS_NOSUID | kernel.MS_NOEXEC
        try:
            kernel.mount("devpts", pts, "devpts", flags, "newinstance,ptmxmode=0666,mode=620,gid=5")
        except OSError:  # gid 5 (tty) is not mapped
            kernel.mount("devpts", pts, "devpts", flags, "newinstance,ptmxmode=0666,mode=620")


def _outer_device(name: str) -> int | None:
    """Open the machine's device to bind it; making a new one is forbidden in a user namespace."""
    try:
        descriptor = os.open(f"/dev/{name}", os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if stat.S_ISCHR(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def _bind_read_only(root: Root, source: str, path: str) -> None:
    with _target(root, path) as target:
        kernel.mount(source, target, flags=kernel.MS_BIND)
    _make_read_only(root, path)


def _make_read_only(root: Root, path: str) -> None:
    with _target(root, path) as target:
        # What the outer mount forbids is locked in a user namespace, and has to be said again
        # (mount_namespaces(7)). The numbers are the same in statvfs(3) and mount(2).
        kept = os.statvfs(target).f_flag & _PLAIN
        kernel.mount("", target, flags=_READ_ONLY | kept)


def _mount_proc(root: Root) -> None:
    with _target(root, "/proc", os.O_DIRECTORY) as proc:
        kernel.mount("proc", proc, "proc", _PLAIN)
        names = os.listdir(proc)
    _forbid_user_namespaces(root)
    for name in _PROC_HIDDEN:
        if name in names:
            _bind_read_only(root, "/dev/null", f"/proc/{name}")
    if _shares_its_kernel(root):
        # A new mount shows the one set of entries that the kernel has: whoever is its root could change the
        # modes of all of them for everybody, those in /proc/PID/net included, which can't be covered.
        _make_read_only(root, "/proc")
        return
    for name in names:
        if not name.isdecimal() and name not in _PROC_HIDDEN and not _is_link(root, f"/proc/{name}"):
            with _target(root, f"/proc/{name}") as path:
                kernel.mount(path, path, flags=kernel.MS_BIND)
            _make_read_only(root, f"/proc/{name}")


def _shares_its_kernel(root: Root) -> bool:
    """Say whether root of this sandbox is root of a machine around it, which owns the entries of /proc."""
    found = root.status("/proc/sys")
    return not kernel.in_initial_user_namespace() and found is not None and found.st_uid == 0


def _is_link(root: Root, path: str) -> bool:
    found = root.status(path, follow=False)
    return found is None or stat.S_ISLNK(found.st_mode)


def _forbid_user_namespaces(root: Root) -> None:
    """Set this user namespace's limit of inner ones to 0; the machine's own one is left as it is."""
    if kernel.in_initial_user_namespace() or root.status(_USER_NAMESPACES) is None:
        return
    with _target(root, _USER_NAMESPACES) as path, open(path, "wb", buffering=0) as limit:
        limit.write(b"0")


def _write(root: Root, path: str, content: bytes, mode: int) -> None:
    with root.locate(path, follow=False) as place:
        descriptor = os.open(
            place.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=place.directory
        )
    with open(descriptor, "wb") as file:
        file.write(content)
        os.fchmod(descriptor, mode)


def _directory(root: Root, path: str, mode: int) -> None:
    with root.locate(path, follow=False) as place:
        os.mkdir(place.name, mode, dir_fd=place.directory)
        os.chmod(place.name, mode, dir_fd=place.directory)


def _link(root: Root, path: str, text: str) -> None:
    with root.locate(path, follow=False) as place:
        os.symlink(text, place.name, dir_fd=place.directory)
