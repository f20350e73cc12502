"""The cache: results of operations by their keys, shared by all builds of a store.

    <home>/cache/results/<scope>/       for one kind of layer: in another id mapping, files have other owners
        lock           serialises every change
        keys/<key>     symbolic link whose text is the id of a layer: replacing it is one rename(2)
        records/<id>   what is known about a layer, as JSON; never changed. Whoever uses the layer holds a
                       shared lock on it; its modification time is the last use.
        layers/<id>/   the layer: what one operation changed, in whatever form the machine needs
        synced/<boot>  until when everything of one run of the kernel is surely on the disk

A layer is of use only on top of its parent. So a record names the parent by its id, not by its key: where a
key gets another result (`--no-cache`), what was made on the old one does not fit any more and is not found. A
parent exists as long as a layer on it does; so holding one layer holds all below it.

A crash leaves a layer without a record, or a record without a key. Nobody finds either; `prune` removes them.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.shelf import sync_file_system, unusable_store
from firebuild_bootstrap.image.trees import allocated
from firebuild_bootstrap.removal import remove_tree

_ID: Final = re.compile("[0-9a-f]{16}-[0-9a-f]{16}")
_KEY: Final = re.compile("[0-9a-f]{64}")
_MAX_RECORD: Final = 64 * 1024
_MAX_TEXT: Final = 300
_MAX_BOOTS: Final = 200
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Entry:
    """A layer in the cache.

    Args:
        id: its name, which no other layer ever has.
        key: the key that it is a result of.
        parent: id of the layer that it lies on; empty for what lies on a base.
        path: where it is.
        size: bytes that it takes on the disk.
        text: the instruction, for display.
        created: seconds since 1970.
        sources: layers of other stages that went into it: their keys and ids.
    """

    id: str
    key: str
    parent: str
    path: Path
    size: int
    text: str
    created: float
    sources: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Usage:
    """An entry, and how it is used.

    Args:
        entry: the entry.
        last_used: seconds since 1970; no earlier than that of any layer on top of it.
        in_use: a build holds it, or one on top of it.
        found: whether any key leads to it. What nothing leads to is of no use to anybody.
        children: how many layers lie on it.
    """

    entry: Entry
    last_used: float
    in_use: bool
    found: bool
    children: int


class Cache:
    """The cache of one scope. What `find` and `commit` return stays until `close`, whoever prunes.

    Args:
        home: the store.
        scope: the name of the kind of layers.
        remove: removes a tree that may hold files of foreign owners.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        home: Path,
        scope: str = "default",
        *,
        remove: Callable[[Path], None] = remove_tree,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = home / "cache" / "results" / scope
        # Swept by later builds and commands, should this process end amid the removal.
        self._removing = home / "removing"
        self._remove = remove
        self._clock = clock
        self._held: dict[str, int] = {}

    @staticmethod
    def scopes(home: Path) -> list[str]:
        """Return the names of all scopes of a store."""
        try:
            return sorted(os.listdir(home / "cache" / "results"))
        except FileNotFoundError:
            return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything."""
        while self._held:
            os.close(self._held.popitem()[1])

    # --- what builds do --------------------------------------------------------------------------

    def find(self, chain: Sequence[str]) -> list[Entry]:
        """Return the results of the first keys of a chain: as many as there are without a gap, in order.

        Args:
            chain: keys, each of what lies on the one before it; the first lies on a base.
        """
        with self._errors("read"):
            while True:
                found = self._prefix(chain)
                if not found or self._hold(found[-1].id):
                    return found
                # The last of them was removed at this moment.

    def commit(
        self,
        key: str,
        directory: Path,
        *,
        parent: Entry | None,
        text: str = "",
        size: int | None = None,
        sources: Iterable[Entry] = (),
        replace: bool = False,
    ) -> Entry:
        """Make `directory` the result of `key`, unless another build has made one meanwhile: then use that.

        It is there all at once. Where `directory` still exists afterwards, the result of the other build
        counts, and what comes next has to be made on that.

        Args:
            key: of the operation.
            directory: the layer, on the file system of the store; the directory itself belongs to this user.
            parent: what it was made on, from this cache, and not let go; None for a base.
            text: the instruction.
            size: bytes that it takes on the disk; None to have it measured.
            sources: results of other stages that files were taken from.
            replace: use it even if there is one.

        Raises:
            MachineError, InputError: the store can't be written, or somebody removed the parent. `directory`
                is where it was.
        """
        entry = Entry(
            id=f"{key[:16]}-{secrets.token_hex(8)}",
            key=key,
            parent=parent.id if parent is not None else "",
            path=Path(),
            size=allocated(directory) if size is None else size,
            text=text[:_MAX_TEXT],
            created=self._clock(),
            sources=tuple((source.key, source.id) for source in sources),
        )
        with self._changing():
            there = None if replace else self._at(key, entry.parent)
            if there is None:
                if entry.parent and self._record(entry.parent) is None:
                    raise MachineError(
                        f"{self._layer(entry.parent)}: somebody removed it while it was used",
                        hint="let only firebuild remove what is in the store",
                    )
                there = self._add(entry, directory)
            self._hold(there.id)
        if parent is not None:
            self.forget(parent)  # held by what lies on it now
        return there

    def forget(self, entry: Entry) -> None:
        """Let go of one entry."""
        held = self._held.pop(entry.id, None)
        if held is not None:
            os.close(held)

    def settle(self) -> None:
        """Write everything to the disk; what is not there when the machine loses its power is not used again.

        It may take long, and is best done after a build, in the background.
        """
        with self._changing():
            until = time.monotonic()
        with self._errors("written"):
            descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sync_file_system(descriptor)
            finally:
                os.close(descriptor)
            self._note_synced(until)

    # --- what people do --------------------------------------------------------------------------

    def usage(self) -> list[Usage]:
        """Return everything in the cache, least recently used first, and layers before what they lie on."""
        with self._errors("read"):
            return _Survey(self, self._records()).usage()

    def prune(
        self,
        *,
        everything: bool = False,
        max_size: int | None = None,
        older_than: float | None = None,
        dry_run: bool = False,
    ) -> list[Entry]:
        """Remove what nobody can find, and what the arguments say.

        Nothing that a build uses is removed, nor what it lies on.

        Args:
            everything: all of the rest, too.
            max_size: of the rest, least recently used first, until all takes at most so many bytes.
            older_than: of the rest what was not used for so many seconds.
            dry_run: remove nothing.

        Returns:
            what was removed.
        """
        removed: list[Entry] = []
        with self._changing():
            survey = _Survey(self, self._records())
            total = sum(entry.size for entry in survey.entries.values())
            oldest = self._clock() - older_than if older_than is not None else 0.0
            for use in survey.usage():
                entry = use.entry
                wanted = (
                    everything
                    or not use.found
                    or (max_size is not None and total > max_size)
                    or use.last_used < oldest
                )
                if not wanted or survey.children[entry.id] or use.in_use:
                    continue
                if dry_run or self._drop(entry):
                    survey.drop(entry)
                    total -= entry.size
                    removed.append(entry)
            retired = None if dry_run else self._retire(self._orphans())
        if retired is not None:
            self._remove(retired)
        return removed

    # --- records ---------------------------------------------------------------------------------

    def _prefix(self, chain: Sequence[str]) -> list[Entry]:
        found: list[Entry] = []
        for key in chain:
            entry = self._at(key, found[-1].id if found else "")
            if entry is None:
                break
            found.append(entry)
        return found

    def _at(self, key: str, parent: str) -> Entry | None:
        """Return the result of a key that lies on `parent` and does not contradict what else is there."""
        identity = self._identity(key)
        entry = self._record(identity) if identity else None
        if entry is None or entry.key != key or entry.parent != parent:
            return None
        return None if self.outdated(entry) else entry

    def outdated(self, entry: Entry) -> bool:
        """Whether a stage that files came from has got another result since."""
        return any(self._identity(stage) not in ("", layer) for stage, layer in entry.sources)

    def _identity(self, key: str) -> str:
        """Return the id of the layer that a key leads to, or an empty text."""
        try:
            identity = os.readlink(self._root / "keys" / key)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):  # EINVAL: it is no link
                raise
            return ""
        return identity if _ID.fullmatch(identity) else ""

    def _record(self, identity: str) -> Entry | None:
        """Return the layer with that id, or None if it is not there or not whole."""
        try:
            with open(self._root / "records" / identity, "rb") as file:
                document = json.loads(file.read(_MAX_RECORD))
            entry = _entry(identity, document, self._layer(identity))
            surely = document["boot"] == self._boot or document["at"] <= self._synced(document["boot"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None  # any other error may go away, and must not look like damage to `prune`
        return entry if surely and entry.path.is_dir() else None

    def _records(self) -> dict[str, Entry]:
        try:
            names = os.listdir(self._root / "records")
        except FileNotFoundError:
            return {}
        entries = (self._record(name) for name in names if _ID.fullmatch(name))
        return {entry.id: entry for entry in entries if entry is not None}

    def leads_to(self, entry: Entry) -> bool:
        """Whether the key of an entry leads to it, and not to another one."""
        return self._identity(entry.key) == entry.id

    def last_used(self, entry: Entry) -> float:
        """Return when an entry itself was last used, in seconds since 1970."""
        try:
            return os.stat(self._root / "records" / entry.id).st_mtime
        except FileNotFoundError:  # removed meanwhile
            return 0.0

    def is_held(self, entry: Entry) -> bool:
        """Whether somebody uses an entry at this moment."""
        try:
            descriptor = os.open(self._root / "records" / entry.id, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # removed meanwhile
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @cached_property
    def _boot(self) -> str:
        try:
            return _BOOT_ID.read_text("ascii").strip()
        except OSError:  # /proc is not there: trust what was written
            return "unknown"

    def _synced(self, boot: str) -> float:
        if re.fullmatch("[0-9a-f-]{1,64}", boot) is None:
            return 0.0
        try:
            return float((self._root / "synced" / boot).read_text("ascii"))
        except (FileNotFoundError, ValueError):
            return 0.0

    # --- changes ---------------------------------------------------------------------------------

    def _add(self, entry: Entry, directory: Path) -> Entry:
        """Make it all there; the last rename makes it found."""
        entry = dataclasses.replace(entry, path=self._layer(entry.id))
        record, fresh = self._root / "records" / entry.id, self._root / "fresh"
        fresh.unlink(missing_ok=True)  # of somebody who died
        fresh.write_bytes(self._document(entry))
        os.rename(directory, entry.path)
        try:
            os.rename(fresh, record)
            fresh.symlink_to(entry.id)
            os.replace(fresh, self._root / "keys" / entry.key)
        except OSError:
            record.unlink(missing_ok=True)
            with suppress(OSError):
                os.rename(entry.path, directory)
            raise
        return entry

    def _document(self, entry: Entry) -> bytes:
        document = {
            "key": entry.key,
            "parent": entry.parent,
            "size": entry.size,
            "text": entry.text,
            "created": entry.created,
            "sources": entry.sources,
            "boot": self._boot,
            "at": time.monotonic(),
        }
        return json.dumps(document).encode()

    def _hold(self, identity: str) -> bool:
        """Hold a layer until `close`, and note the use; False if it was removed meanwhile."""
        if identity in self._held:
            return True
        try:
            descriptor = os.open(self._root / "records" / identity, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # who removes it holds it for microseconds
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            return False
        self._held[identity] = descriptor
        now = self._clock()
        with suppress(OSError):
            os.utime(descriptor, (now, now))
        return True

    def _drop(self, entry: Entry) -> bool:
        """Make an entry unfindable unless somebody uses it."""
        record = self._root / "records" / entry.id
        try:
            descriptor = os.open(record, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.leads_to(entry):
                    (self._root / "keys" / entry.key).unlink(missing_ok=True)
                record.unlink()
            finally:
                os.close(descriptor)
        except BlockingIOError:
            return False
        return True

    def _orphans(self) -> Iterator[str]:
        """Yield the layers that nobody can find, and remove what else crashes left."""
        entries = self._records()
        for folder in ("records", "keys"):
            for name in os.listdir(self._root / folder):
                known = name in entries if folder == "records" else self._identity(name) in entries
                if not known:
                    (self._root / folder / name).unlink(missing_ok=True)
        boots = sorted((self._root / "synced").iterdir(), key=lambda path: path.stat().st_mtime)
        for path in boots[:-_MAX_BOOTS]:
            path.unlink(missing_ok=True)
        yield from (name for name in os.listdir(self._root / "layers") if name not in entries)

    def _retire(self, names: Iterable[str]) -> Path | None:
        """Move layers out of the way, and return the directory that holds them now."""
        retired: Path | None = None
        for name in names:
            if retired is None:
                retired = self._removing / f"layers.{secrets.token_hex(8)}"
                retired.mkdir(mode=0o700, parents=True)
            os.rename(self._layer(name), retired / name)
        return retired

    def _layer(self, identity: str) -> Path:
        return self._root / "layers" / identity

    def _note_synced(self, until: float) -> None:
        fresh = self._root / f"fresh.{secrets.token_hex(4)}"
        try:
            with open(fresh, "xb") as file:
                file.write(repr(until).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._root / "synced" / self._boot)
        finally:
            fresh.unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._errors("written"):
            for folder in ("records", "keys", "layers", "synced"):
                (self._root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename2 or error.filename or self._root
            raise unusable_store(f"{where}: the cache can't be {done}", error) from error


class _Survey:
    """All entries, and how they lie on each other."""

    def __init__(self, cache: Cache, entries: Mapping[str, Entry]) -> None:
        self._cache = cache
        self.entries = dict(entries)
        self.children: Counter[str] = Counter(entry.parent for entry in entries.values())

    def usage(self) -> list[Usage]:
        """Return everything, least recently used first, and layers before what they lie on."""
        layers = self._bottom_up()
        found = self._found(layers)
        used: dict[str, float] = {}
        held: set[str] = set()
        usages: list[Usage] = []
        for entry in reversed(layers):
            last = max(self._cache.last_used(entry), used.get(entry.id, 0.0))
            used[entry.parent] = max(last, used.get(entry.parent, 0.0))
            if entry.id in held or self._cache.is_held(entry):
                held |= {entry.id, entry.parent}
            usages.append(Usage(entry, last, entry.id in held, entry.id in found, self.children[entry.id]))
        # The sort is stable, so that of two with the same time the upper layer stays the first.
        return sorted(usages, key=lambda usage: (usage.found, usage.last_used))

    def drop(self, entry: Entry) -> None:
        """Take note that an entry is gone."""
        del self.entries[entry.id]
        self.children[entry.parent] -= 1

    def _bottom_up(self) -> list[Entry]:
        above: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            below = entry.parent if entry.parent in self.entries else ""
            above.setdefault(below, []).append(entry)
        order = above.get("", [])
        for entry in order:  # it grows meanwhile
            order += above.get(entry.id, [])
        return order

    def _found(self, layers: Sequence[Entry]) -> set[str]:
        found = {""}
        for entry in layers:
            if entry.parent in found and self._cache.leads_to(entry) and not self._cache.outdated(entry):
                found.add(entry.id)
        return found


def _entry(identity: str, document: dict[str, Any], path: Path) -> Entry:
    return Entry(
        id=identity,
        key=_text(document["key"], _KEY),
        parent=_text(document["parent"], _ID) if document["parent"] else "",
        path=path,
        size=int(document["size"]),
        text=str(document["text"]),
        created=float(document["created"]),
        sources=tuple((_text(key, _KEY), _text(layer, _ID)) for key, layer in document["sources"]),
    )


def _text(value: str, form: re.Pattern[str]) -> str:
    if form.fullmatch(value) is None:
        raise ValueError("the record is damaged")
    return value
