"""Directories under names, published all at once or not at all.

    <root>/lock                 serialises every change
    <root>/staging/<id>/        being written; its writer holds a lock on the directory
    <root>/content/<id>/        finished, never changed again; readers hold a shared lock on it
    <root>/names/<a>/<b>        symbolic link to the content: replacing it is one rename(2)

A crash leaves the old link or the new one, never a mixture; what it orphans is swept by the next change.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from firebuild_bootstrap.errors import MALFORMED, FirebuildError, InputError, MachineError, remedy_of
from firebuild_bootstrap.removal import remove_tree

Key = tuple[str, ...]
FoundT = TypeVar("FoundT")
# What is wrong with the path that was named, and not with the machine behind it.
_OF_RIGHTS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_OF_THE_PATH: Final = _OF_RIGHTS | {
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
}
_ELSEWHERE: Final = "set FIREBUILD_HOME to another directory"
ROOM: Final = f"make room or allow writing there, or {_ELSEWHERE}"
SPACE: Final = f"free some space there, or {_ELSEWHERE}"
# Open files of a process beside those that are held: what is asked for, and what it can't do without.
_OTHER_FILES: Final = 512
_OWN_FILES: Final = 64
_ATTEMPTS: Final = 100
_AT_ONCE: Final = 100
DURABLE: Final = "durable"
"""A file in an entry: all of the entry is on the disk."""


class Staging(NamedTuple):
    """A private directory that becomes an entry when it is published."""

    path: Path
    lock: int


class ContentStore:
    """Entries below `root`, which is made on the first use.

    Args:
        remove: removes a tree that may hold files of foreign owners.
        durable: write every entry to the disk before it is published. Without, a crash of the machine (not
            one of a process) may leave an entry that is not whole.
        sweeping: every change also removes what earlier ones have orphaned. Without, `sweep` does, which
            keeps a change among thousands of entries short.
    """

    def __init__(
        self,
        root: Path,
        remove: Callable[[Path], None] = remove_tree,
        *,
        durable: bool = True,
        sweeping: bool = True,
    ) -> None:
        self.root = root
        self._remove = remove
        self._durable = durable
        self._sweeping = sweeping
        self._held: dict[Path, tuple[int, int]] = {}  # the lock, and how often it was given out

    def close(self) -> None:
        """Let go of the entries that `hold` gave out."""
        while self._held:
            os.close(self._held.popitem()[1][0])

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """Give a fresh directory to fill; what is not published by the end of the block is removed.

        Raises:
            InputError, MachineError: it can't be made.
        """
        with self._changing():
            path = self.root / "staging" / secrets.token_hex(8)
            # An image may hold set-user-ID programs, which no other user of the host may get at.
            path.mkdir(mode=0o700)
            staging = Staging(path, _lock(path, fcntl.LOCK_EX))
        try:
            yield staging
        finally:
            if path.exists():
                self._remove(path)
            os.close(staging.lock)

    def publish(self, staging: Staging, *keys: Key) -> Path:
        """Make the content of `staging` the entry of each key and return its directory.

        Raises:
            InputError, MachineError: the store can't be written.
        """
        if self._durable:
            _sync_content(staging)
        with self._changing():
            content = self.root / "content" / staging.path.name
            os.rename(staging.path, content)
            self._sync_directory(content.parent)
            # Readers may lock it as soon as they can find it; there is no sweep meanwhile.
            fcntl.flock(staging.lock, fcntl.LOCK_UN)
            for key in keys:
                self._point(key, content)
            self._sweep()
        return content

    def alias(self, key: Key, other: Key) -> bool:
        """Make the content of `key` the entry `other` as well; False when there is no `key`.

        Raises:
            InputError, MachineError: the store can't be written.
        """
        with self._changing():
            if not self.has(key):
                return False
            self._point(other, self.link(key).resolve(strict=True))
            self._sweep()
        return True

    def has(self, key: Key) -> bool:
        """Whether there is an entry of that name."""
        return os.path.islink(self.link(key))

    def hold(self, key: Key) -> Path | None:
        """Return the directory of an entry; it stays until `release` or `close`, even when replaced."""
        allow_open_files(2 * len(self._held))
        link = self.link(key)
        for _attempt in range(_ATTEMPTS):
            try:
                content = link.resolve(strict=True)
                if content in self._held:  # a build may ask for the same layer again and again
                    lock, count = self._held[content]
                    self._held[content] = lock, count + 1
                    return content
                lock = _lock(content, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (FileNotFoundError, NotADirectoryError, BlockingIOError):
                if not link.is_symlink():
                    return None
                continue  # it was replaced at this moment
            if link.resolve() == content:  # it is not removed from now on
                self._held[content] = lock, 1
                return content
            os.close(lock)
        return None

    @contextmanager
    def record(
        self, key: Key, name: str, explain: Callable[[Path, Exception], MachineError], *, hold: bool
    ) -> Iterator[Path | None]:
        """Yield the path of the file `name` of an entry, to be read in the block; None for no entry.

        Args:
            key: names the entry.
            name: of the file.
            explain: makes the error for one that is missing or malformed; see `damaged_record`.
            hold: whether the entry stays held after the block.

        Raises:
            MachineError: the file is missing or malformed, or the store can't be read.
        """
        try:
            content = self.hold(key)
        except OSError as error:
            raise unreadable_store(error, self.root) from error
        if content is None:
            yield None
            return
        path = content / name
        try:
            yield path
        except (FileNotFoundError, *MALFORMED, InputError) as error:
            raise explain(path, error) from error
        except OSError as error:
            raise unreadable_store(error, self.root) from error
        finally:
            if not hold:
                self.release(content)

    def release(self, content: Path) -> None:
        """Let go of a directory that `hold` gave out."""
        lock, count = self._held.pop(content)
        if count > 1:
            self._held[content] = lock, count - 1
        else:
            os.close(lock)

    def names(self) -> list[Key]:
        """Return the names of all entries, sorted.

        Raises:
            MachineError: a directory of the store can't be read, so that there may be others.
        """
        root = os.fspath(self.root / "names")
        try:
            return sorted(tuple(link[len(root) + 1 :].split(os.sep)) for link in _links(root))
        except OSError as error:
            raise unreadable_store(error, self.root) from error

    def contents(self) -> list[Path]:
        """Return the directories of all entries, also of those without a name that may still be held."""
        return files_in(self.root / "content")

    def in_use(self, key: Key) -> bool:
        """Whether an entry is held at this moment."""
        try:
            os.close(_lock(self.link(key), fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def discard(self, key: Key, *, unused: bool = False) -> bool:
        """Remove an entry; False when there is none.

        Args:
            unused: leave it, and return False, when it is held.

        Raises:
            InputError, MachineError: the store can't be written.
        """
        with self._changing():
            link = self.link(key)
            if not self.has(key):
                return False
            lock = -1
            try:
                if unused and link.exists():
                    lock = _lock(link, fcntl.LOCK_EX | fcntl.LOCK_NB)
                link.unlink()
            except BlockingIOError:
                return False
            finally:
                if lock >= 0:
                    os.close(lock)
            self._sync_directory(link.parent)
            with suppress(OSError):  # the last version of a name goes, the name goes
                self._remove_empty(link.parent)
            self._sweep()
        return True

    def sweep(self) -> None:
        """Remove what dead writers and replaced entries left behind, without blocking changes of others."""
        seen: set[Path] = set()
        while True:
            with self._changing():
                doomed = list(islice(self._doomed(seen), _AT_ONCE))
            if not doomed:
                return
            for path, lock in doomed:
                self._remove_locked(path, lock)

    def settle(self, part: str) -> None:
        """Sweep, and mark what is on the disk (`DURABLE`) after writing it there: where `durable` is off.

        Args:
            part: name of a file or directory that entries have which are whole.

        Raises:
            InputError, MachineError, OSError: the store can't be read or written.
        """
        if not self.root.is_dir():
            return
        self.sweep()
        contents = (self.root / "content").iterdir()
        new = [path for path in contents if (path / part).exists() and not (path / DURABLE).exists()]
        if new:
            sync_file_system(self.root)
        for path in new:
            with suppress(OSError):  # it was discarded meanwhile
                (path / DURABLE).touch()

    def _point(self, key: Key, content: Path) -> None:
        link = self.link(key)
        link.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.root / "fresh"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(content, link.parent))
        os.replace(fresh, link)
        self._sync_directory(link.parent)

    def _sync_directory(self, directory: Path) -> None:
        if self._durable:
            sync(directory)

    def link(self, key: Key) -> Path:
        """Return the path of an entry by its name, which stays right when the entry is replaced."""
        return self.root.joinpath("names", *key)

    def _sweep(self) -> None:
        with suppress(OSError, MachineError):  # what can't be read is left for a later sweep
            for path, lock in self._doomed(set()) if self._sweeping else ():
                self._remove_locked(path, lock)

    def _doomed(self, seen: set[Path]) -> Iterator[tuple[Path, int]]:
        """Yield entries without a name and a holder, each with its lock."""
        used = {self.link(key).resolve() for key in self.names()}
        for folder in ("staging", "content"):
            # Links resolve to real paths, and the store may be named by another one.
            for path in (self.root / folder).resolve().iterdir():
                if path in used or path in seen:
                    continue
                seen.add(path)
                with suppress(OSError):  # in use, or another user's: left for a later sweep
                    yield path, _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _remove_empty(self, folder: Path) -> None:
        # The directory of all names stays: somebody else may have made sure of it, and wait for the lock.
        while folder != self.root / "names":
            folder.rmdir()
            folder = folder.parent

    def _remove_locked(self, path: Path, lock: int) -> None:
        try:
            with suppress(OSError, MachineError):  # it is left for a later sweep
                self._remove(path)
        finally:
            os.close(lock)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            for folder in ("staging", "content", "names"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(lock)

    def _unusable(self, error: OSError) -> FirebuildError:
        return unusable_store(f"{place_of(error, self.root)}: the store can't be written", error)

    def _failed(self, error: OSError) -> FirebuildError:
        if error.errno in _OF_RIGHTS:
            return self._unusable(error)
        # Inside the store, so not the user's.
        where = place_of(error, self.root)
        return MachineError(f"{where}: the store can't be written: {error.strerror}", hint=SPACE)


def readable(
    contents: ContentStore, read: Callable[[Key], FoundT | None], damaged: Callable[[MachineError], object]
) -> Iterator[FoundT]:
    """Yield what `read` returns of all entries, and pass the errors of damaged ones on.

    Raises:
        MachineError: this process may open too few files to read any.
    """
    allow_open_files(0)
    for key in contents.names():
        try:
            found = read(key)
            if found is None and contents.has(key):  # else it was discarded meanwhile
                raise MachineError(f"{contents.link(key)}: its files are gone", hint="remove it")
        except MachineError as error:
            damaged(error)
            continue
        if found is not None:
            yield found


def place_of(error: OSError, root: Path) -> str:
    """Return where something can't be written: what the error names, or else what it was written below.

    Calls on open files name nothing, and symlink(2) names first what the link says, which may be relative.
    """
    named = (name for name in (error.filename2, error.filename) if isinstance(name, str | os.PathLike))
    return next((os.fspath(name) for name in named if os.path.isabs(name)), str(root))


def damaged_record(path: Path, error: Exception, remedy: str) -> MachineError:
    """Return the error for a file of a store that is missing or malformed."""
    why = error.strerror if isinstance(error, OSError) else error
    return MachineError(f"{path} is damaged: {why}", hint=remedy)


def unreadable_store(error: OSError, root: Path) -> MachineError:
    """Return the error for a store that can't be read: what is in it is not known, which is not nothing."""
    where = place_of(error, root)
    return MachineError(f"{where}: the store can't be read: {error.strerror}", hint=remedy_of(error))


def unusable_store(what: str, error: OSError, elsewhere: str = _ELSEWHERE) -> FirebuildError:
    """Return the error for a store that can't be written: an `InputError` if another directory would do.

    Args:
        elsewhere: how another directory is named.
    """
    message = f"{what}: {error.strerror}"
    if error.errno in _OF_THE_PATH:
        return InputError(message, hint=f"get the right to write there, or {elsewhere}")
    return MachineError(message, hint=f"free some space there, or {elsewhere}")


def allow_open_files(held: int) -> None:
    """Let this process hold so many open files beside what it has open anyway.

    Each layer that is in use is an open file with a lock on it, and most systems allow 1024 unless asked.

    Args:
        held: how many.

    Raises:
        MachineError: it may not open so many.
    """
    wanted = held + _OTHER_FILES
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if most != resource.RLIM_INFINITY and most < wanted:
        if most < (needed := held + _OWN_FILES):
            raise MachineError(
                f"this needs {needed} open files, and this process may have {most}",
                hint=f"raise the limit: `ulimit -Hn {wanted}` as root, or LimitNOFILE= of its service",
            )
        wanted = most
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def files_in(folder: Path) -> list[Path]:
    """Return the paths of all that is in a directory, sorted; none where there is no such directory.

    Not `Path.glob`, for which what it can't read is empty (Python 3.13).

    Raises:
        OSError: it can't be read.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def may_enter(directory: Path) -> bool:
    """Whether this user may list what is in a directory, and open it; one of another user is private."""
    return os.access(directory, os.R_OK | os.X_OK)


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file; False where somebody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _links(folder: str) -> Iterator[str]:
    """Yield the paths of all symbolic links in a directory, which need not be there, and below it."""
    # Where it can't be read for another reason, nothing is known: a sweep would remove all that it names.
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            elif entry.is_dir():
                yield from _links(entry.path)


@contextmanager
def lock_file(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock of a file for the length of the block; made where it is missing, and never removed.

    Args:
        path: the file.
        how: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`; others that hold it are waited for (flock(2)).

    Raises:
        OSError: it can't be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the exclusive lock of a directory for the length of the block.

    Raises:
        OSError: it can't be opened.
    """
    lock = _lock(directory, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _lock(directory: Path, how: int) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def sync(path: str | Path) -> None:
    """Write a file, or the list of names of a directory, to the disk.

    Raises:
        OSError: it can't be opened, is a link, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_content(staging: Staging) -> None:
    """Write what was staged to the disk: file by file, so that others' unwritten data don't hold it up."""
    with os.scandir(staging.path) as entries:
        paths = [(entry.path, entry.is_file(follow_symlinks=False)) for entry in entries]
    for path, is_file in paths:
        if is_file:
            sync(path)
    os.fsync(staging.lock)
    if not all(is_file for _, is_file in paths):
        sync_file_system(staging.path)


def sync_file_system(directory: Path) -> None:
    """Write the whole file system of a directory: trees have many files, and owners that forbid to open them.

    Raises:
        OSError: the directory can't be opened.
    """
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if syncfs is None or syncfs(descriptor) != 0:
            os.sync()
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that builds share atomically: readers see all of it, or what was there before.

    Raises:
        OSError: it can't be written; nothing of it is left.
    """
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_bytes(content)
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def forget_oldest(directory: Path, kept: int) -> None:
    """Remove the files of a directory but for those `kept` that were changed last.

    Raises:
        OSError: it can't be read, or a file not be removed.
    """
    files = [path for path in directory.iterdir() if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)[: max(len(files) - kept, 0)]:
        with suppress(FileNotFoundError):
            path.unlink()
