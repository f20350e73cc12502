"""What the mounts of a RUN need before it begins: files of binds, caches, secrets, sockets, and mount points.

The files are kept where no RUN sees them: in a directory outside of the image, or where the machine has none,
in one of the image's root that is hidden while a RUN executes, and is gone when the build is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import field

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.apply import apply
from firebuild_bootstrap.layers.root import Root, remove_directory, unseen
from firebuild_bootstrap.layers.tree import TreeSource, tree_entries
from firebuild_pki.values import dataclass

from .agents import AgentSockets, Ask
from .caches import Caches
from .copy import Copier, Incoming
from .errors import ProtocolError, StepError
from .kernel import wipe
from .mounts import BadMount, MountPoint, make_mount_point
from .stop import Stop
from .users import Users, check_mapped

_CACHES = "caches"
_ON_A_DRIVE = wire.BindMount | wire.CacheMount | wire.SshMount
Files = Callable[[str], Iterator[Incoming]]


@dataclass(frozen=True)
class Provided:
    """What a RUN has besides the image.

    Args:
        mounts: what to mount where.
        hidden: directory of the root that the RUN must not see, empty for none.
        secrets: the content of secrets, by which `mounts` and `variables` count.
        variables: names of variables, each with the number of the secret that is its value.
        locks: descriptors that have to be open as long as anything of the RUN lives.
    """

    mounts: tuple[MountPoint, ...] = ()
    hidden: str = ""
    secrets: tuple[bytearray, ...] = field(default=(), repr=False)
    variables: tuple[tuple[str, int], ...] = ()
    locks: tuple[int, ...] = ()


class Provider:
    """Provides for the mounts of the RUNs of one build. Close it when all are over.

    Args:
        root: the image.
        files: yields those of a resource.
        ask: asks the user's SSH agents.
        stop: ends waiting for a cache.
        scratch: an existing directory that no RUN sees; empty for one in the image.
        caches: directory of cache mounts that outlive the build; empty where they don't.
    """

    def __init__(
        self,
        root: Root,
        files: Files,
        ask: Ask,
        stop: Stop,
        *,
        scratch: str = "",
        caches: str = "",
    ) -> None:
        self._root = root
        self._files = files
        self._ask = ask
        self._stop = stop
        self._outside = scratch
        self._caches = caches
        self._inside = ""  # name of the scratch directory in the image, once it is made

    def close(self) -> None:
        """Remove what is in the image.

        Raises:
            OSError: it can't be removed.
        """
        if self._inside:
            with self._root.locate(f"/{self._inside}", follow=False) as place, unseen(place):
                remove_directory(place.name, place.directory)
            self._inside = ""

    @contextmanager
    def provide(self, command: wire.RunCommand, say: Callable[[str], None]) -> Iterator[Provided]:
        """Yield what a RUN has besides the image; when that ends, only caches remain of it.

        Args:
            command: the RUN.
            say: takes a line for the user.

        Raises:
            StepError: a mount can't be provided.
            GuestError: the files did not come, or the guest was asked to end.
            OSError: the disk is full.
        """
        if not command.mounts:
            yield Provided(hidden=self.hidden)
            return
        with ExitStack() as stack:
            work = _Work(command, self._files, stack)
            try:
                if any(isinstance(mount, _ON_A_DRIVE) for mount in command.mounts):
                    scratch = self._scratch()
                    folder = stack.enter_context(_directory(scratch))
                    work.binds(folder)
                    caches = self._caches or os.path.join(scratch, _CACHES)
                    work.caches(Caches(caches, self._stop), say)
                    work.agents(folder, stack.enter_context(closing(AgentSockets(self._ask))))
                work.others()
                yield Provided(
                    tuple(work.mounts),
                    self.hidden,
                    tuple(work.secrets),
                    tuple(work.variables),
                    tuple(work.locks),
                )
            finally:
                for secret in work.secrets:
                    wipe(secret)

    def directory(self) -> AbstractContextManager[str]:
        """Return a new directory that no RUN sees, and that is gone at the end."""
        return _directory(self._scratch())

    @property
    def hidden(self) -> str:
        """Directory of the root that no RUN must see, empty for none."""
        return f"/{self._inside}" if self._inside else ""

    def _scratch(self) -> str:
        if self._outside:
            return self._outside
        if not self._inside:
            name = f".firebuild-{os.urandom(8).hex()}"
            with self._root.locate(f"/{name}", follow=False) as place, unseen(place):
                os.mkdir(name, 0o700, dir_fd=place.directory)
            self._inside = name
        return os.path.join(self._root.path, self._inside)


class _Work:
    """Provides for one RUN."""

    def __init__(self, command: wire.RunCommand, files: Files, stack: ExitStack) -> None:
        self._command = command
        self._files = files
        self._stack = stack
        self.mounts: list[MountPoint] = []
        self.secrets: list[bytearray] = []
        self.variables: list[tuple[str, int]] = []
        self.locks: list[int] = []

    def binds(self, folder: str) -> None:
        for number, mount in enumerate(self._command.mounts):
            if isinstance(mount, wire.BindMount):
                path = os.path.join(folder, str(number))
                self._receive(mount.resource, path)
                if not os.path.lexists(path):
                    raise ProtocolError(f"mount {mount.target}: the server sent no files")
                self.mounts.append(MountPoint(self._target(mount.target), path, read_only=not mount.writable))

    def caches(self, caches: Caches, say: Callable[[str], None]) -> None:
        """Take the caches in the order of their ids, so that no two builds wait for each other."""
        wanted = [mount for mount in self._command.mounts if isinstance(mount, wire.CacheMount)]
        taken: dict[str, str] = {}
        # The same one twice in a RUN is one, used as its strictest sharing says: it would wait for itself.
        for mount in sorted(wanted, key=lambda mount: (mount.id, wire.SHARING[::-1].index(mount.sharing))):
            if mount.id not in taken:
                check_mapped(f"cache mount {mount.target}", mount.uid, mount.gid)
                text = f"waiting for the cache mount {mount.id!r:.200}, which another RUN uses"
                path, lock = self._stack.enter_context(
                    caches.use(mount, lambda path: self._fill(mount, path), lambda: say(text))  # noqa: B023
                )
                taken[mount.id] = path
                self.locks.append(lock)
            self.mounts.append(
                MountPoint(self._target(mount.target), taken[mount.id], read_only=mount.read_only)
            )

    def _fill(self, mount: wire.CacheMount, path: str) -> None:
        if mount.resource:
            self._receive(mount.resource, path)
            if not os.path.isdir(path) or os.path.islink(path):
                raise StepError(f"cache mount {mount.target}: what it is filled with is not a directory")
            return
        os.mkdir(path, 0o700)
        os.chown(path, mount.uid, mount.gid)
        os.chmod(path, mount.mode)

    def agents(self, folder: str, sockets: AgentSockets) -> None:
        for number, mount in enumerate(self._command.mounts):
            if isinstance(mount, wire.SshMount):
                check_mapped(f"ssh mount {mount.target}", mount.uid, mount.gid)
                path = os.path.join(folder, str(number))
                sockets.add(path, mount)
                self.mounts.append(MountPoint(self._target(mount.target), path, socket=True))

    def others(self) -> None:
        """Provide for what takes no room on a drive."""
        for mount in self._command.mounts:
            if isinstance(mount, wire.TmpfsMount):
                self.mounts.append(MountPoint(self._target(mount.target), size=mount.size))
            elif isinstance(mount, wire.SecretMount):
                self._secret(mount)

    def _secret(self, mount: wire.SecretMount) -> None:
        number = len(self.secrets)
        memory = bytearray()
        self.secrets.append(memory)  # now, so that it is wiped whatever happens
        self._read_secret(mount.resource, memory)
        if mount.env:
            if b"\0" in memory:
                raise StepError(f"secret mount: what {mount.env} should become contains a NUL")
            self.variables.append((mount.env, number))
        if mount.target:
            check_mapped(f"secret mount {mount.target}", mount.uid, mount.gid)
            self.mounts.append(
                MountPoint(
                    self._target(mount.target),
                    secret=number,
                    mode=mount.mode,
                    uid=mount.uid,
                    gid=mount.gid,
                )
            )

    def _read_secret(self, resource: str, memory: bytearray) -> None:
        entries = self._files(resource)
        found = next(entries, None)
        if found is None or found.entry.kind != tar.FILE:
            raise ProtocolError(f"{resource}: expected a file as the secret")
        if found.entry.size > wire.MAX_SECRET_BYTES:
            raise ProtocolError(f"{resource}: a secret has at most {wire.MAX_SECRET_BYTES} bytes")
        file = os.memfd_create("secret")
        try:
            found.write(file)
            memory.extend(bytes(found.entry.size))
            os.preadv(file, [memory], 0)
        finally:
            os.close(file)
        if next(entries, None) is not None:
            raise ProtocolError(f"{resource}: expected one file as the secret")

    def _target(self, target: str) -> str:
        return wire.mount_target(self._command.workdir, target)

    def _receive(self, resource: str, path: str) -> None:
        """Write the files of a resource to `path`, which becomes a directory or a file as that is one."""
        folder, name = os.path.split(path)
        command = wire.CopyCommand(
            step=self._command.step, original=self._command.original, source=resource, target=f"/{name}"
        )
        with Root(folder) as root:
            Copier(root, Users(root), command).copy(self._files(resource))


def lay_on(path: str, image: str) -> None:
    """Copy a tree that was made apart into the image, as an overlay of layers shows it."""
    with Root(path) as apart, Root(image) as root:
        files = tree_entries(apart.descriptor)
        apply(TreeSource(each for each in files if each[0].path), root, devices=True)


@contextmanager
def _directory(scratch: str) -> Iterator[str]:
    """Yield a new directory that is removed at the end, whatever is in it."""
    name = f"run-{os.urandom(8).hex()}"
    path = os.path.join(scratch, name)
    os.mkdir(path, 0o700)
    with cleaning(lambda: _remove(scratch, name)):
        yield path


def _remove(folder: str, name: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_directory(name, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def cleaning(clean: Callable[[], None]) -> Iterator[None]:
    """Clean up at the end; where something has failed, in silence: that counts, not what it has left."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a RUN that was killed may still be on its way out
            clean()
        raise
    clean()


# --- places -------------------------------------------------------------------------------------


@contextmanager
def mount_points(
    root: Root, mounts: Sequence[MountPoint] = (), borrow: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Make what is missing in the image for what a RUN has besides it, and take it away again.

    What is not empty at the end stays: the RUN has put something there. The times of the directories
    around are left as they are.

    Args:
        root: the image.
        mounts: the mounts.
        borrow: told of a directory before something is made in it or below.
    """
    created: list[str] = []
    try:
        for path in ("/proc", "/dev", "/etc"):
            make_mount_point(root, path, directory=True, created=created)
            if not root.is_directory(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        for mount in mounts:
            # What is below /dev is made in the RUN's own. What can't be made here may be behind another
            # mount, where the helper makes it; if not, that says so.
            if not mount.target.startswith("/dev/"):
                borrow(os.path.dirname(mount.target))
                with suppress(OSError):
                    make_mount_point(root, mount.target, directory=_is_directory(mount), created=created)
        yield
    except BadMount as error:
        raise StepError(str(error)) from error
    finally:
        for path in reversed(created):
            with (
                suppress(FileNotFoundError, NotADirectoryError),
                root.locate(path, follow=False) as place,
                unseen(place),
            ):
                root.remove_if_empty(path)


def _is_directory(mount: MountPoint) -> bool:
    return mount.secret < 0 and (not mount.source or stat.S_ISDIR(os.lstat(mount.source).st_mode))
