"""Cache mounts: directories that outlive builds, shared by all builds of this machine.

    DIRECTORY/<SHA-256 of the id>/id          the id itself, for people
    DIRECTORY/<SHA-256 of the id>/<n>/lock    flock(2): shared, or exclusive for `locked` and `private`
    DIRECTORY/<SHA-256 of the id>/<n>/data/   what a RUN sees

`private` takes the first n that nobody uses, the others n = 0. A lock goes with the process that holds it,
and `data` gets its name when it is complete: so SIGKILL leaves nothing that is locked or half-made. Who
removes a cache takes the exclusive lock and moves <n> away: who gets the lock of what is moved begins anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers.root import remove_directory

from .errors import StepError
from .stop import Stop

_PAUSE = 0.2
_SAY_AFTER = 3.0
_MOST_PRIVATE = 1000


class Caches:
    """The caches in a directory.

    Args:
        directory: made when the first cache is used; nobody else must be able to enter it, because what is in
            it may be a program with the rights of its owner.
        stop: ends waiting.
        clock: monotonic seconds.
    """

    def __init__(self, directory: str, stop: Stop, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._stop = stop
        self._clock = clock

    @contextmanager
    def use(
        self, mount: wire.CacheMount, fill: Callable[[str], None], waiting: Callable[[], None]
    ) -> Iterator[tuple[str, int]]:
        """Yield the directory of a cache, and a descriptor that holds its lock.

        Args:
            mount: which one, and how it is shared.
            fill: makes the content of a new one in a directory of the given path, which does not exist yet.
            waiting: is called once where others make this one wait for some seconds.

        Raises:
            StepError: too many private ones are in use.
            GuestError: the guest was asked to end.
            OSError: the directory can't be made or locked.
        """
        folder = os.path.join(self._directory, hashlib.sha256(mount.id.encode()).hexdigest())
        for path in (self._directory, folder):
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
        _name(folder, mount.id)
        place, lock = self._taken(folder, mount, fill, waiting)
        try:
            os.utime(lock)  # the last use, for who has to choose what goes
            yield os.path.join(place, "data"), lock
        finally:
            os.close(lock)

    def _taken(
        self,
        folder: str,
        mount: wire.CacheMount,
        fill: Callable[[str], None],
        waiting: Callable[[], None],
    ) -> tuple[str, int]:
        if mount.sharing != "private":
            place = os.path.join(folder, "0")
            return place, self._ready(place, mount.sharing == "locked", fill, _LockWait(self, waiting).wait)
        for number in range(_MOST_PRIVATE):
            place = os.path.join(folder, str(number))
            with suppress(BlockingIOError):
                return place, self._ready(place, True, fill, _in_use)
        raise StepError(f"cache mount {mount.id!r:.200}: {_MOST_PRIVATE} private ones are in use")

    def _ready(
        self, place: str, exclusive: bool, fill: Callable[[str], None], wait: Callable[[], None]
    ) -> int:
        """Return a descriptor with the lock of a cache that exists."""
        wanted = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        while True:
            lock = _opened(place)
            try:
                _locked(lock, wanted, wait)
                if not exclusive and not _complete(place) and not _made_exclusive(lock):
                    # Another one makes it. Waiting for the exclusive lock would last as long as its RUN.
                    wait()
                elif _linked(lock, place):
                    if not _complete(place):
                        _make(place, fill)
                    if exclusive:
                        return lock
                    _locked(lock, fcntl.LOCK_SH, wait)
                    if _linked(lock, place) and _complete(place):
                        return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def pause(self) -> None:
        """Wait a moment.

        Raises:
            GuestError: the guest was asked to end.
        """
        self._stop.wait(_PAUSE)
        self._stop.check()

    def now(self) -> float:
        """Return monotonic seconds."""
        return self._clock()


class _LockWait:
    """Waits for a lock, and says so once."""

    def __init__(self, caches: Caches, say: Callable[[], None]) -> None:
        self._caches = caches
        self._say = say
        self._since = caches.now()
        self._said = False

    def wait(self) -> None:
        if not self._said and self._caches.now() - self._since >= _SAY_AFTER:
            self._said = True
            self._say()
        self._caches.pause()


def try_lock(place: str) -> int | None:
    """Take the exclusive lock of a cache.

    Args:
        place: its directory, `<n>` above; made where it is missing.

    Returns:
        a descriptor that holds the lock; None where another has it, or is removing the cache.

    Raises:
        OSError: the directory can't be made or locked.
    """
    lock = _opened(place)
    try:
        _locked(lock, fcntl.LOCK_EX, _in_use)
        if _linked(lock, place):
            return lock
    except BlockingIOError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _in_use() -> None:
    raise BlockingIOError


def _opened(place: str) -> int:
    while True:
        with suppress(FileExistsError):
            os.mkdir(place, 0o700)
        # Whoever removes caches may move the directory away in between.
        with suppress(FileNotFoundError):
            return os.open(os.path.join(place, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _locked(lock: int, how: int, wait: Callable[[], None]) -> None:
    while True:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
        else:
            return


def _made_exclusive(lock: int) -> bool:
    """Try to make a shared lock exclusive; either way the shared one is given up (flock(2))."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _linked(lock: int, place: str) -> bool:
    """Say whether a lock is still that of the cache at `place`."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(os.path.join(place, "lock")))
    except FileNotFoundError:
        return False


def _complete(place: str) -> bool:
    return os.path.isdir(os.path.join(place, "data"))


def _make(place: str, fill: Callable[[str], None]) -> None:
    """Make the content, while the exclusive lock is held; what a killed process has begun goes."""
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(folder):
            if name.startswith("new-"):
                remove_directory(name, folder)
        name = f"new-{os.urandom(8).hex()}"
        fill(os.path.join(place, name))
        os.rename(name, "data", src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _name(folder: str, text: str) -> None:
    path = os.path.join(folder, "id")
    if not os.path.exists(path):
        new = f"{path}-{os.urandom(8).hex()}"
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
        os.rename(new, path)
