"""What a RUN sees: the image as its root, a fresh /proc, a private /dev, and what --mount asks for.

Runs in the helper (enter.py) inside new mount, pid and ipc namespaces. Mount points are found with the
safe walk of rootfs.py and mounted on through their descriptors, so a link in the image can't redirect them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from firebuild_bootstrap.layers.root import Metadata, Root, unseen

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
_READ_ONLY = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY


class MountPoint(NamedTuple):
    """One mount of a RUN.

    Args:
        target: its place in the image, an absolute path.
        source: what is mounted there: a path outside of the image. Empty for a tmpfs or a secret.
        read_only: nothing can be written to it.
        size: of a tmpfs in bytes, 0 for what the kernel allows.
        secret: which of the secrets is the content of the file, counted from 0; -1 for none.
        mode: of the file of a secret.
        uid: its owner.
        gid: its group.
        socket: the source is a socket.
    """

    target: str
    source: str = ""
    read_only: bool = False
    size: int = 0
    secret: int = -1
    mode: int = 0
    uid: int = 0
    gid: int = 0
    socket: bool = False


class BadMount(Exception):
    """A mount can't be made where it is wanted; the message says why."""


def enter_root(
    path: str,
    script: str | None,
    mounts: Sequence[MountPoint] = (),
    secrets: Sequence[bytearray] = (),
    hidden: str = "",
    *,
    read_only: bool = False,
    init: bool = False,
) -> str | None:
    """Mount all that belongs to a RUN and make `path` the root directory.

    Args:
        path: the image's root; "/" stays where it is.
        script: text of an executable file that only this RUN sees.
        mounts: in any order: what is mounted below another one comes after it.
        secrets: content of the files of secrets.
        hidden: a directory in the root that the RUN must not look into, empty for none.
        read_only: nothing can be written but to what is mounted on it.
        init: it is the root of a whole system, whose process 1 finds what the kernel has for it.

    Returns:
        Path of the script inside, None without one.

    Raises:
        OSError: a mount failed; the message says which.
        BadMount: one of `mounts` doesn't fit to what is in the image.
    """
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    if path != "/":
        kernel.mount(path, path, flags=kernel.MS_BIND)
    if init:  # a system's users have their su and sudo
        kernel.mount("", path, flags=kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_NODEV)
    with Root(path) as root:
        _mount_dev(root)
        if init:
            _mount_system(root)
        else:
            _mount_proc(root)
        if script is not None:
            _write(root, _SCRIPT, script.encode("utf-8"), 0o755)
        _mount_all(root, mounts, secrets)
        if hidden:
            with _target(root, hidden, os.O_DIRECTORY) as target:
                kernel.mount("tmpfs", target, "tmpfs", kernel.PLAIN | kernel.MS_RDONLY, "mode=0,size=4096")
        if read_only:
            _make_read_only(root, "/")
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
        # A read-only mount forbids that and, as devices are not files, no write to them.
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
        _restrict(target)


def _restrict(target: str, more: int = 0) -> None:
    # What the outer mount forbids is locked in a user namespace, and has to be said again
    # (mount_namespaces(7)). The numbers are the same in statvfs(3) and mount(2).
    kept = os.statvfs(target).f_flag & kernel.PLAIN
    kernel.mount("", target, flags=_READ_ONLY | kept | more)


# --- what --mount asks for ----------------------------------------------------------------------


def _mount_all(root: Root, mounts: Sequence[MountPoint], secrets: Sequence[bytearray]) -> None:
    with ExitStack() as stack:
        files = stack.enter_context(_secret_files(root, mounts, secrets)) if secrets else {}
        restricted = []
        # By their paths, as BuildKit does it: a path comes before everything below it.
        for mount in sorted(mounts, key=lambda mount: mount.target):
            source = files.get(mount)
            mounted = _mount_one(root, mount, source)
            stack.callback(os.close, mounted)
            if mount.read_only or source is not None:
                restricted.append((mounted, kernel.PLAIN if source is not None else 0))
        # Only now, because a mount below another one may need a mount point made in it.
        for mounted, more in restricted:
            _restrict(f"/proc/self/fd/{mounted}", more)


@contextmanager
def _secret_files(
    root: Root, mounts: Sequence[MountPoint], secrets: Sequence[bytearray]
) -> Iterator[dict[MountPoint, str]]:
    """Yield a file for each secret that is one, in memory that nothing but mounts of it lead to."""
    folder = f"/dev/firebuild-{os.urandom(8).hex()}"  # a name that no target is
    _directory(root, folder, 0o700)
    with _target(root, folder, os.O_DIRECTORY) as target:
        kernel.mount_unswapped(target, "mode=700,size=64m")
    with ExitStack() as stack:
        files = {}
        for number, mount in enumerate(mounts):
            if mount.secret >= 0:
                path = f"{folder}/{number}"
                _write(root, path, secrets[mount.secret], mount.mode, (mount.uid, mount.gid))
                files[mount] = stack.enter_context(_target(root, path))
        yield files
    with _target(root, folder, os.O_DIRECTORY) as target:
        kernel.detach(target)
    with root.locate(folder, follow=False) as place:
        os.rmdir(place.name, dir_fd=place.directory)


def _mount_one(root: Root, mount: MountPoint, source: str | None) -> int:
    """Mount it and return a descriptor of the mount."""
    with ExitStack() as stack:
        if mount.source:
            # Never through a link, whoever put it there.
            descriptor = os.open(mount.source, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            source = f"/proc/self/fd/{descriptor}"
        kind = stat.S_IFDIR if source is None else stat.S_IFMT(os.stat(source).st_mode)
        if kind not in (stat.S_IFSOCK if mount.socket else stat.S_IFDIR, stat.S_IFREG):
            raise BadMount(f"mount {mount.target}: what was sent is neither a file nor a directory")
        try:
            make_mount_point(root, mount.target, directory=kind == stat.S_IFDIR, may=_outside_of(root))
            place = stack.enter_context(root.locate(mount.target))
            point = place.open(os.O_PATH)
        except OSError as error:
            raise BadMount(f"mount {mount.target}: {error.strerror}") from error
        stack.callback(os.close, point)
        _check_place(root, mount.target, point, kind)
        if source is not None:
            kernel.mount(source, f"/proc/self/fd/{point}", flags=kernel.MS_BIND)
        else:
            data = "mode=1777" + (f",size={mount.size}" if mount.size else "")
            kernel.mount("tmpfs", f"/proc/self/fd/{point}", "tmpfs", kernel.MS_NOSUID, data)
        return place.open(os.O_PATH)


def make_mount_point(
    root: Root,
    path: str,
    *,
    directory: bool,
    may: Callable[[int], bool] = lambda _: True,
    created: list[str] | None = None,
) -> None:
    """Make what is missing of a mount point; the times of the directories around it stay as they are.

    Args:
        root: the image.
        path: the mount point in it.
        directory: whether it is one, or a file.
        may: says whether something may be made in the directory of a descriptor; else that is left out.
        created: is extended by what is made; links that lead nowhere are followed only with it.

    Raises:
        OSError: something can't be made, or a parent is not a directory.
        BadMount: it is in /proc.
    """
    names = path.strip("/").split("/")
    for length in range(1, len(names) + 1):
        # The parents are there, but for those of what a link leads to.
        parents = None if created is None else (0, 0)
        with root.locate("/".join(names[:length]), parents=parents, created=created) as place:
            if place.path.startswith("/proc/"):  # from where links of the kernel lead on
                raise BadMount(f"mount {path}: it leads into /proc, which a RUN needs as it is")
            if place.status() is not None or not may(place.directory):
                continue
            with unseen(place):
                if directory or length < len(names):
                    root.make_directory(place.path, Metadata(mode=0o755))
                else:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    os.close(os.open(place.name, flags, 0o644, dir_fd=place.directory))
            if created is not None:
                created.append(place.path)


def _outside_of(root: Root) -> Callable[[int], bool]:
    """Return what says whether a directory is in another mount than the image, which nobody cleans up."""
    with root.locate("/") as place:
        image = _mount_of(place.directory)
    return lambda directory: _mount_of(directory) != image


def _mount_of(descriptor: int) -> str:
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        return next(line for line in file if line.startswith("mnt_id:"))  # proc(5)


def _check_place(root: Root, target: str, point: int, kind: int) -> None:
    found = os.fstat(point)
    if stat.S_ISDIR(found.st_mode) != (kind == stat.S_IFDIR):
        here, there = ("a directory", "a file") if stat.S_ISDIR(found.st_mode) else ("a file", "a directory")
        raise BadMount(f"mount {target}: there is {here} in the image, and {there} can't be mounted on it")
    # Links may lead there, whatever the path is.
    needed = [status for path in ("/", "/dev", "/proc") if (status := root.status(path)) is not None]
    if any(os.path.samestat(found, status) for status in needed):
        raise BadMount(f"mount {target}: it leads to /, /dev or /proc, which a RUN needs as they are")


def _mount_system(root: Root) -> None:
    """Mount what an init expects (systemd.io, CONTAINER_INTERFACE), all writable: the machine is its own."""
    for kind, path, flags, data in (
        ("proc", "/proc", kernel.PLAIN, ""),
        ("sysfs", "/sys", kernel.PLAIN, ""),
        ("cgroup2", "/sys/fs/cgroup", kernel.PLAIN, ""),
        ("tmpfs", "/run", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755"),
    ):
        if path in ("/sys", "/run"):  # small images have none; what is made goes with the machine
            make_mount_point(root, path, directory=True)
        with _target(root, path, os.O_DIRECTORY) as target:
            kernel.mount(kind, target, kind, flags, data)


def _mount_proc(root: Root) -> None:
    with _target(root, "/proc", os.O_DIRECTORY) as proc:
        kernel.mount("proc", proc, "proc", kernel.PLAIN)
    # Not through the descriptor from before, which leads to the directory below the mount.
    with _target(root, "/proc", os.O_DIRECTORY) as proc:
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


def _write(
    root: Root, path: str, content: bytes | bytearray, mode: int, owner: tuple[int, int] | None = None
) -> None:
    with root.locate(path, follow=False) as place:
        descriptor = os.open(
            place.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=place.directory
        )
    with open(descriptor, "wb") as file:
        file.write(content)
        if owner is not None:
            os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)


def _directory(root: Root, path: str, mode: int) -> None:
    with root.locate(path, follow=False) as place:
        os.mkdir(place.name, mode, dir_fd=place.directory)
        os.chmod(place.name, mode, dir_fd=place.directory)


def _link(root: Root, path: str, text: str) -> None:
    with root.locate(path, follow=False) as place:
        os.symlink(text, place.name, dir_fd=place.directory)
