"""The network's files in the image for the time of a RUN, so that names resolve as in the machine around it.

They are files in the place of the image's own, not mounts over them: a mount point can't be replaced (a
package's `ln -sf … /etc/resolv.conf` would fail with EBUSY), and what is written to it is lost in silence.
The image's own are kept in memory meanwhile: moved aside, they would be there for a RUN that copies /etc.
After the RUN the image's own are back, with the lines that the RUN added; what it put in their place stays.
Times of directories are part of the image, and stay as if this had not happened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from firebuild_bootstrap.layers.root import ResolvedPath, Root, unseen

from .overlay import Known, describe

NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts")
_MAX_BYTES = 1 << 20


@contextmanager
def network_files(root: Root, name: str = "") -> Iterator[None]:
    """Put the machine's own files into the image, whose /etc exists, and afterwards the image's back.

    Args:
        root: the image.
        name: the machine's, which is looked up by sudo, Java, Erlang, mail servers and many others; it gets a
            line in the hosts file that has none for it.

    Raises:
        OSError: a file can't be put there or back.
    """
    with ExitStack() as stack:
        # In a machine whose root is the image they are there already.
        for path, content in ({} if root.path == "/" else _outer_files(name)).items():
            stack.enter_context(_replaced(root, path, content))
        yield


def _outer_files(name: str) -> Mapping[str, bytes]:
    found = {}
    for path in NETWORK_FILES:
        with suppress(OSError), open(path, "rb") as file:
            found[path] = file.read(_MAX_BYTES)
    if name and "/etc/hosts" in found:
        found["/etc/hosts"] = _with_name(found["/etc/hosts"], name)
    return found


def _with_name(hosts: bytes, name: str) -> bytes:
    """Return a hosts file (hosts(5)) with the machine's name, by the address that Debian gives it."""
    known = name.encode("utf-8", "surrogateescape")
    if any(known in line.partition(b"#")[0].split()[1:] for line in hosts.splitlines()):
        return hosts
    return (hosts if hosts.endswith(b"\n") or not hosts else hosts + b"\n") + b"127.0.1.1 " + known + b"\n"


@contextmanager
def _replaced(root: Root, path: str, content: bytes) -> Iterator[None]:
    with root.locate(path, follow=False) as place:
        own = describe(place)
        if place.status() is not None and (own is None or stat.S_ISDIR(own.mode)):
            yield  # a directory, a device, a huge file: such an image keeps what it has
            return
        with unseen(place):
            replacement = _Replacement.begin(place, content, own)
        try:
            yield
        finally:
            with unseen(place):
                written = replacement.end(place)
            replacement.close()
        if written is not None:
            _keep(root, path, *written)


class _Replacement:
    """A file in the place of another one.

    Args:
        content: of the file.
        descriptor: of the file; while it is open no other file gets its inode number.
        own: the image's file or symbolic link; None where it has none.
        linked: descriptor of the image's file where it has more names; -1 for none.
    """

    def __init__(self, content: bytes, descriptor: int, own: Known | None, linked: int) -> None:
        self.content = content
        self.descriptor = descriptor
        self.own = own
        self.linked = linked

    @classmethod
    def begin(cls, place: ResolvedPath, content: bytes, own: Known | None) -> _Replacement:
        linked = -1
        if own is not None:
            found = place.status()
            if found is not None and stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                linked = place.open(os.O_PATH)
            os.unlink(place.name, dir_fd=place.directory)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(place.name, flags, 0o644, dir_fd=place.directory)
        os.fchmod(descriptor, 0o644)  # whatever the umask
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        return cls(content, descriptor, own, linked)

    def close(self) -> None:
        """Let go of the files; may be repeated."""
        for descriptor in (self.descriptor, self.linked):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self.linked = -1

    def end(self, place: ResolvedPath) -> tuple[bytes, bool] | None:
        """Put the image's own file back unless the RUN has put something else into its place.

        Returns:
            what the RUN wrote into the file, and whether that comes after what was there; None for none.
        """
        written = None
        if not os.stat(".", dir_fd=place.directory).st_nlink:
            return None  # the RUN has removed the whole directory
        found = place.status()
        ours = found is not None and os.path.samestat(found, os.fstat(self.descriptor))
        # What has grown too large is not read into memory: it stays, as if it had been put there.
        if ours and os.fstat(self.descriptor).st_size <= len(self.content) + _MAX_BYTES:
            written = self._written()
            # Before: FUSE and NFS give an open file another name and remove that at its end, which the times
            # of the directory tell.
            os.close(self.descriptor)
            self.descriptor = -1
            os.unlink(place.name, dir_fd=place.directory)
            if self.own is not None and not self._link_back(place):
                _restore(place, self.own)
        return written

    def _link_back(self, place: ResolvedPath) -> bool:
        """Give the image's file its name back; False where it has no other one, and is gone therefore."""
        if self.linked < 0:
            return False
        with suppress(OSError):  # on an overlay it may be another file by now
            source = f"/proc/self/fd/{self.linked}"
            os.link(source, place.name, dst_dir_fd=place.directory, follow_symlinks=True)
            return True
        return False

    def _written(self) -> tuple[bytes, bool] | None:
        with open(self.descriptor, "rb", closefd=False) as file:
            file.seek(0)
            content = file.read()
        if content == self.content:
            return None
        behind = content.startswith(self.content)
        return (content[len(self.content) :] if behind else content), behind


def _restore(place: ResolvedPath, own: Known) -> None:
    """Make a file or symbolic link as it was: what tells no change from it is not part of a layer."""
    name, directory = place.name, place.directory
    if stat.S_ISLNK(own.mode):
        os.symlink(os.fsdecode(own.content), name, dir_fd=directory)
        os.chown(name, own.owner[0], own.owner[1], dir_fd=directory, follow_symlinks=False)
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
            file.write(own.content)
            os.fchown(file.fileno(), *own.owner)
            os.fchmod(file.fileno(), stat.S_IMODE(own.mode))  # after chown, which clears bits
            for attribute, value in own.attributes.items():
                os.setxattr(file.fileno(), attribute, value)
    os.utime(name, ns=(own.mtime_ns, own.mtime_ns), dir_fd=directory, follow_symlinks=False)


def _keep(root: Root, path: str, data: bytes, behind: bool) -> None:
    """Write what a RUN wrote into the image's own file, or where its link leads to in the image."""
    try:
        with root.locate(path) as place:
            _write(place, data, behind)
    except OSError:  # a link that leads to nothing, or to no file
        with root.locate(path, follow=False) as place:
            os.unlink(place.name, dir_fd=place.directory)
            _write(place, data, behind)


def _write(place: ResolvedPath, data: bytes, behind: bool) -> None:
    found = place.status()
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", place.path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if behind else os.O_TRUNC)
    with open(os.open(place.name, flags, 0o644, dir_fd=place.directory), "r+b") as file:
        if found is None:
            os.fchmod(file.fileno(), 0o644)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.seek(end)
        file.write(data)
