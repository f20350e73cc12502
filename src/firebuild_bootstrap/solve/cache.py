"""The cache: results of operations by their keys, shared by all builds of a store.

It is a layer of records over the store of unpacked layers (`image.layertrees`), in the same directory:

    cache.lock          serialises every change
    cache/keys/<key>    symbolic link whose text is the id of a layer: replacing it is one rename(2)
    cache/records/<id>  what is known about a layer, as JSON; never changed

A layer is of use only on top of its parent. So a record names the parent by its id, not by its key: where a
key gets another result (`--no-cache`), what was made on the old one does not fit any more and is not found.
What a build was given it holds; what it holds is not pruned, nor what that lies on, nor what an image names
(`naming`). Bases are in the same
store under their digests: they are parents, too, but can be unpacked again, and so need not be there for what
lies on them to be found.

A crash leaves a record without a layer, which nobody finds and `prune` removes: the layer itself comes last.

Several builds may make the same at once. Each goes on upon its own, all of that is kept, and the keys lead to
the chain that has most: what one has finished is not lost because another one is about to.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MALFORMED, FirebuildError, InputError, MachineError
from firebuild_bootstrap.image.content_store import lock_file, place_of, unusable_store
from firebuild_bootstrap.image.layertrees import ALTERED, LayerTrees
from firebuild_bootstrap.image.trees import allocated
from firebuild_bootstrap.sizes import checked_size
from firebuild_pki.values import dataclass

ID: Final = re.compile("[0-9a-f]{16}-[0-9a-f]{16}")
KEY: Final = re.compile("[0-9a-f]{64}")
_MAX_RECORD: Final = 4 << 20  # bytes, some 90 for each linked layer that it lies on, or that went into it
MAX_TEXT: Final = 300
LINKED: Final = "link"
"""The parent of a layer that is made on the empty tree, and lies on whatever comes before it."""


@dataclass(frozen=True)
class Entry:
    """A layer in the cache.

    Args:
        id: its key in the store of layers, which no other layer ever has; of a base, its digest.
        key: the key that it is a result of; empty for a base, and where the record is lost or damaged.
        parent: what it lies on: the id of a layer, the digest of a base, several of them as `above` names
            them, or `LINKED`; empty for none.
        size: bytes that it takes on the disk.
        text: the instruction, for display.
        created: seconds since 1970; 0 where that is not known.
        sources: layers of other stages that went into it: their keys and ids.
        origin: the remote cache that it came from; empty for one that was made here.
        altered: this id mapping could not keep all of what came from a remote cache or a virtual machine, or
            it was made of such a layer: other machines must not get it.
        path: its tree; not there yet in what `usage` and `prune` return.
    """

    id: str
    key: str
    parent: str
    size: int
    text: str
    created: float
    sources: tuple[tuple[str, str], ...] = ()
    origin: str = ""
    altered: bool = False
    path: Path = Path()

    @property
    def source(self) -> tuple[str, str]:
        """What the record of an entry holds of one whose files went into it: its key and id."""
        return self.key, self.id

    @property
    def linked(self) -> bool:
        """Whether it was made apart from what it lies on."""
        return self.parent == LINKED

    @property
    def is_base(self) -> bool:
        """Whether it is an unpacked base or image rather than the result of an operation."""
        return ID.fullmatch(self.id) is None


@dataclass(frozen=True)
class Usage:
    """An entry, and how it is used.

    Args:
        entry: the entry.
        last_used: seconds since 1970; no earlier than that of any layer on top of it.
        in_use: a build holds it, or one on top of it.
        named: an image needs it.
        found: whether any key or image leads to it. What nothing leads to is of no use to anybody.
        layers: how many lie on it.
    """

    entry: Entry
    last_used: float
    in_use: bool
    named: bool
    found: bool
    layers: int


class Cache:
    """The cache of one id mapping. What it gives out stays until `trees` is closed, whoever prunes.

    Args:
        trees: the store of layers.
        clock: seconds since 1970.
        named: returns the ids of the layers that images need.
    """

    def __init__(
        self,
        trees: LayerTrees,
        *,
        clock: Callable[[], float] = time.time,
        named: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.trees = trees
        self.named = named
        self._clock = clock
        self._root = trees.root / "cache"
        self._keys = self._root / "keys"
        self._record_files = self._root / "records"

    # --- what builds do --------------------------------------------------------------------------

    def find(self, chain: Sequence[str], base: str = "", linked: Container[str] = ()) -> list[Entry]:
        """Return the results of the first keys of a chain: as many as there are without a gap, in order.

        Args:
            chain: keys, each of what lies on the one before it.
            base: what the first lies on, as `above` names it; empty for none.
            linked: those keys whose layers are made apart.

        Raises:
            MachineError, InputError: the store can't be read.
        """
        found: list[Entry] = []
        with self._errors("read"):
            for key in chain:
                entry = self._held(self._at(key, LINKED if key in linked else base))
                if entry is None:
                    break
                found.append(entry)
                base = above(base, entry.id, linked=entry.linked)
        return found

    def commit(
        self,
        key: str,
        directory: Path,
        *,
        parent: Entry | str = "",
        text: str = "",
        size: int | None = None,
        sources: Iterable[tuple[str, str]] = (),
        identity: str = "",
        base: str = "",
        replace: bool = False,
        created: float | None = None,
        origin: str = "",
        altered: bool = False,
    ) -> Entry:
        """Make `directory` the result of `key`.

        It is there all at once, with the rename(2) of `directory`; until then the same can be done again.
        Where others have a result of `key` already, theirs is found, until this one's chain has more.

        Args:
            key: of the operation.
            directory: the directory of one of `Machine.layers`.
            parent: what it was made on: a layer of this cache or its id, the digest of a base, what `above`
                names, `LINKED`, or nothing.
            text: the instruction.
            size: bytes that it takes on the disk; None to have it measured.
            sources: results of other stages that files were taken from: their keys and ids.
            identity: a `new_id`, so that several who do the same make one entry.
            base: what the first of its chain lies on, as for `find`.
            replace: this result is to be found, and no other.
            created: when it was made, in seconds since 1970; None for now.
            origin: see `Entry`.
            altered: see `Entry`; what is made here of such layers is known to be, and what has a file
                `ALTERED` beside its tree.

        Raises:
            MachineError, InputError: the store can't be written, or somebody removed the parent. `directory`
                is where it was.
        """
        entry = Entry(
            id=identity or new_id(key),
            key=key,
            parent=parent if isinstance(parent, str) else parent.id,
            size=allocated(directory) if size is None else size,
            text=text[:MAX_TEXT],
            created=self._clock() if created is None else created,
            sources=tuple(sources),
            origin=origin,
            altered=altered or (directory / ALTERED).exists(),
        )
        with self._changing():
            done = self._held(self._record(entry.id))
            if done is not None:
                return done
            if not origin and self._made_of_altered(entry):
                entry = dataclasses.replace(entry, altered=True)
            for each in _names(entry.parent):
                # A prune that is killed may leave the record of a layer that it has removed.
                if ID.fullmatch(each) and self._held(self._record(each)) is None:
                    raise MachineError(
                        f"{self._record_files / each}: another process removed it while it was in use",
                        hint="let only firebuild remove what is in the store",
                    )
            return self._add(entry, directory, base, replace=replace)

    def import_(self, entry: Entry, directory: Path, base: str = "") -> Entry:
        """Keep a layer that came from a remote cache, under the id that it had there.

        Args:
            entry: what the remote cache says of it.
            directory: the directory of `LayerTrees.unpacking`.
            base: as for `commit`.

        Raises:
            InputError: it contradicts what is here.
            MachineError: as `commit`.
        """
        done = self.commit(
            entry.key,
            directory,
            parent=entry.parent,
            text=entry.text,
            sources=entry.sources,
            identity=entry.id,
            base=base,
            created=entry.created,
            origin=entry.origin,
            altered=entry.altered,
        )
        if (done.key, done.parent) != (entry.key, entry.parent):
            raise InputError(f"the store has another layer with the id {entry.id}")
        return done

    def entry(self, identity: str) -> Entry | None:
        """Return a layer that is there, held until the store of layers is closed; None where it is not."""
        with self._errors("read"):
            return self._held(self._record(identity))

    def size(self, identity: str) -> int:
        """Return the bytes that a layer takes; 0 where nothing is known about it."""
        with self._errors("read"):
            entry = self._record(identity)
        return entry.size if entry is not None else 0

    def created(self, identity: str) -> float:
        """Return when a layer was made, in seconds since 1970; 0 where nothing is known about it."""
        with self._errors("read"):
            entry = self._record(identity)
        return entry.created if entry is not None else 0

    @contextmanager
    def naming(self, identities: Iterable[str]) -> Iterator[None]:
        """Publish, in the block, an image that needs these layers, which the caller holds.

        No `prune` is at work meanwhile: it finds each layer held, as up to now, or named by the image.

        Raises:
            MachineError: one of them is not there.
        """
        with self._changing():
            for identity in identities:
                self.trees.required(identity)
            yield

    # --- what people do --------------------------------------------------------------------------

    def usage(self) -> list[Usage]:
        """Return everything in the cache, least recently used first, and layers before what they lie on.

        Raises:
            MachineError, InputError: the store can't be read.
        """
        with self._errors("read"):
            return self._survey().usage()

    def prune(
        self,
        *,
        everything: bool = False,
        max_size: int | None = None,
        older_than: float | None = None,
        imported: bool = False,
        dry_run: bool = False,
        sweep: bool = True,
    ) -> list[Entry]:
        """Remove what nobody can find, unpacked bases that nothing lies on, and what the arguments say.

        Nothing that a build uses or an image needs is removed, nor what it lies on.

        Args:
            everything: all of the rest, too.
            max_size: of the rest, least recently used first, until all but what images need takes at most so
                many bytes. Bases without a layer on them are then like all others.
            older_than: of the rest what was not used for so many seconds; the same goes for bases.
            imported: of the rest what came from remote caches.
            dry_run: remove nothing.
            sweep: free the space at once; `LayerTrees.settle` does it otherwise.

        Returns:
            what was removed.

        Raises:
            MachineError, InputError: the store can't be written.
        """
        if not self.trees.root.is_dir():
            return []
        removed: list[Entry] = []
        plain = max_size is None and older_than is None and not imported
        oldest = self._clock() - older_than if older_than is not None else 0.0
        with self._changing():
            survey = self._survey()
            usage = survey.usage()
            total = sum(use.entry.size for use in usage if not use.named)
            for use in usage:
                entry = use.entry
                wanted = (
                    everything
                    or not use.found
                    or (max_size is not None and total > max_size)
                    or use.last_used < oldest
                    or (imported and entry.origin)
                    or (plain and entry.is_base)
                )
                if not wanted or use.in_use or use.named or survey.layers[entry.id]:
                    continue
                if dry_run or self._drop(entry):
                    survey.forget(entry)
                    total -= entry.size
                    removed.append(entry)
            removed += self._drop_orphans(survey, dry_run=dry_run)
        if sweep and not dry_run:
            self.trees.sweep()
        return removed

    def damaged_records(self) -> list[Path]:
        """Return the records of layers that are there, but can't be understood.

        Raises:
            MachineError, InputError: the store can't be read.
        """
        with self._errors("read"):
            names = os.listdir(self._record_files) if self._record_files.is_dir() else []
            there = filter(self.trees.is_there, filter(ID.fullmatch, sorted(names)))
            return [self._record_files / name for name in there if self._record(name) is None]

    def forget(self, identity: str) -> bool:
        """Remove a layer, also where an image names it; False where a build uses it.

        Raises:
            MachineError, InputError: the store can't be written.
        """
        with self._changing():
            return self._drop(self._record(identity) or Entry(identity, "", "", 0, "", 0.0))

    def forget_orphans(self) -> None:
        """Remove records, keys and layers that do not belong together.

        Raises:
            MachineError, InputError: the store can't be written.
        """
        with self._changing():
            self._drop_orphans(self._survey(), dry_run=False)

    # --- records ---------------------------------------------------------------------------------

    def _at(self, key: str, parent: str) -> Entry | None:
        """Return the result of a key that lies on `parent` and does not contradict what else is there."""
        identity = self._identity(key)
        entry = self._record(identity) if identity else None
        if entry is None or entry.key != key or entry.parent != parent or self.outdated(entry):
            return None
        return entry

    def _held(self, entry: Entry | None) -> Entry | None:
        """Hold a layer, if it is there, until the store of layers is closed."""
        tree = self.trees.hold(entry.id) if entry is not None else None
        return dataclasses.replace(entry, path=tree) if entry is not None and tree is not None else None

    def _identity(self, key: str) -> str:
        """Return the id of the layer that a key leads to, or an empty text."""
        try:
            identity = os.readlink(self._keys / key)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):  # EINVAL: it is not a link
                raise
            return ""
        return identity if ID.fullmatch(identity) else ""

    def _record(self, identity: str) -> Entry | None:
        """Return what is known about a layer, or None if nothing is."""
        try:
            with open(self._record_files / identity, "rb") as file:
                return _entry(identity, json.loads(file.read(_MAX_RECORD)))
        except (FileNotFoundError, *MALFORMED):
            return None  # any other error may go away, and must not look like damage to `prune`

    def _survey(self) -> _Survey:
        used = self.trees.keys()
        entries: dict[str, Entry] = {}
        for identity in used:
            if not os.path.isdir(self.trees.path(identity)):
                continue
            if ID.fullmatch(identity) is None:
                entries[identity] = Entry(
                    identity, "", "", self.trees.size(identity), f"FROM {identity}", 0.0
                )
            elif (entry := self._record(identity)) is not None:
                entries[identity] = entry
        return _Survey(self, entries, used)

    def leads_to(self, entry: Entry) -> bool:
        """Whether the key of an entry leads to it, and not to another one."""
        return entry.is_base or self._identity(entry.key) == entry.id

    def outdated(self, entry: Entry) -> bool:
        """Whether a stage that files came from has got another result since."""
        return any(self._identity(stage) not in ("", layer) for stage, layer in entry.sources)

    def _made_of_altered(self, entry: Entry) -> bool:
        layers = (*_names(entry.parent), *(layer for _, layer in entry.sources))
        records = (self._record(layer) for layer in layers if ID.fullmatch(layer))
        return any(record is not None and record.altered for record in records)

    # --- changes ---------------------------------------------------------------------------------

    def _add(self, entry: Entry, directory: Path, base: str, *, replace: bool) -> Entry:
        """Make it all there, the tree itself last."""
        record = self._record_files / entry.id
        chain = [entry, *self._below(entry, base)]
        # Those that others have are worth as much, and more may lie on them.
        found = not replace and self._leads_through(chain, base)
        before = self._identity(entry.key)

        def ready() -> None:
            fresh = self._root / "fresh"
            fresh.unlink(missing_ok=True)  # of somebody who died
            fresh.write_text(_document(entry), "utf-8")
            os.rename(fresh, record)
            for each in () if found else chain:
                self._point(each.key, each.id)

        try:
            tree = self.trees.adopt(entry.id, directory, ready)
        except (OSError, FirebuildError):
            record.unlink(missing_ok=True)
            with suppress(OSError):  # what leads to nothing is removed by `prune`
                if before and not found:
                    self._point(entry.key, before)
                elif not found:
                    (self._keys / entry.key).unlink()
            raise
        return dataclasses.replace(entry, path=tree)

    def _below(self, entry: Entry, base: str) -> Iterator[Entry]:
        """Yield what an entry lies on, the uppermost first, down to `base`, which keys do not lead to."""
        below: Entry | None = entry
        while below is not None:
            names = _names(below.parent)
            for name in reversed(names):
                below = self._record(name) if ID.fullmatch(name) and name != base else None
                if below is not None:
                    yield below

    def _leads_through(self, chain: Sequence[Entry], base: str) -> bool:
        """Whether the keys of `chain`, its uppermost entry first, all have results that lie on each other."""
        on = base
        for each in reversed(chain):
            found = self._at(each.key, LINKED if each.linked else on)
            if found is None or not self.trees.path(found.id).is_dir():
                return False
            on = above(on, found.id, linked=found.linked)
        return True

    def _point(self, key: str, identity: str) -> None:
        if self._identity(key) != identity:
            fresh = self._root / "fresh"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(identity)
            os.replace(fresh, self._keys / key)

    def _drop(self, entry: Entry) -> bool:
        """Remove an entry unless somebody uses it."""
        if not self.trees.discard(entry.id, unused=True):
            return False
        if not entry.is_base:
            if self.leads_to(entry):
                (self._keys / entry.key).unlink(missing_ok=True)
            (self._record_files / entry.id).unlink(missing_ok=True)
        return True

    def _drop_orphans(self, survey: _Survey, *, dry_run: bool) -> list[Entry]:
        """Remove layers, records and keys that do not belong together, and return the layers of them.

        Crashes leave such, and damage to a record.
        """
        dropped = []
        for name in () if dry_run else os.listdir(self._record_files):
            if name not in survey.entries:
                (self._record_files / name).unlink()
        for name in () if dry_run else os.listdir(self._keys):
            if self._identity(name) not in survey.entries:
                (self._keys / name).unlink()
        for name in sorted(survey.used.keys() - survey.entries.keys() - survey.named):
            there = self.trees.path(name).is_dir()
            size = self.trees.size(name) if there else 0
            done = not self.trees.in_use(name) if dry_run else self.trees.discard(name, unused=True)
            if done and there:
                dropped.append(Entry(name, "", "", size, f"{name}, without a record", 0.0))
        return dropped

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._errors("written"):
            for folder in (self._keys, self._record_files):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock_file(self.trees.root / "cache.lock"):
                yield

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unusable_store(
                f"{place_of(error, self._root)}: the cache can't be {done}", error
            ) from error


class _Survey:
    """All entries, and how they lie on each other.

    Args:
        cache: where they are.
        entries: those that are whole, by their ids; it is this object's from now on.
        used: when each layer was last used, also of those that are no entries.
    """

    def __init__(self, cache: Cache, entries: dict[str, Entry], used: dict[str, float]) -> None:
        self._cache = cache
        self.entries = entries
        self.used = used
        self.layers = Counter(each for entry in entries.values() for each in _names(entry.parent))
        self.named = cache.named()

    def forget(self, entry: Entry) -> None:
        """Take note that an entry is removed."""
        del self.entries[entry.id], self.used[entry.id]
        self.layers.subtract(_names(entry.parent))

    def usage(self) -> list[Usage]:
        """Return everything, least recently used first, and layers before what they lie on."""
        order = self._bottom_up()
        named = set(self.named)
        for entry in reversed(order):
            if entry.id in named:
                named.update(_names(entry.parent))
        found = self._found(order) | named
        used = dict(self.used)
        held: set[str] = set()
        usages: list[Usage] = []
        for entry in reversed(order):
            last = used[entry.id]
            parents = _names(entry.parent)
            used.update({each: max(last, used.get(each, 0.0)) for each in parents})
            if entry.id in held or self._cache.trees.in_use(entry.id):
                held.update((entry.id, *parents))
            identity = entry.id
            usages.append(
                Usage(
                    entry,
                    last,
                    in_use=identity in held,
                    named=identity in named,
                    found=identity in found,
                    layers=self.layers[identity],
                )
            )
        # The sort is stable, so that of two with the same time the upper layer stays the first.
        return sorted(usages, key=lambda usage: (usage.found, usage.last_used))

    def _bottom_up(self) -> list[Entry]:
        above: dict[str, list[Entry]] = {}
        missing: dict[str, int] = {}  # of what an entry lies on, how much does not come before it yet
        order: list[Entry] = []
        for entry in self.entries.values():
            below = {each for each in _names(entry.parent) if each in self.entries}
            missing[entry.id] = len(below)
            if not below:
                order.append(entry)
            for each in below:
                above.setdefault(each, []).append(entry)
        for entry in order:  # it grows meanwhile
            for upper in above.get(entry.id, []):
                missing[upper.id] -= 1
                if not missing[upper.id]:
                    order.append(upper)
        return order

    def _found(self, order: Sequence[Entry]) -> set[str]:
        found: set[str] = set()
        for entry in order:
            # A base need not be there: it can be unpacked again.
            parents = _names(entry.parent)
            lies_well = all(
                each in found or each in self.named or ID.fullmatch(each) is None for each in parents
            )
            if lies_well and self._cache.leads_to(entry) and not self._cache.outdated(entry):
                found.add(entry.id)
        return found


def new_id(key: str) -> str:
    """Return an id that no other entry has, for a result of `key`."""
    return f"{key[:16]}-{secrets.token_hex(8)}"


def above(below: str, identity: str, *, linked: bool) -> str:
    """Name what there is once a layer lies on what `below` names: the parent of what comes next.

    One that is made apart says nothing about what it lies on, so both are named.
    """
    return "+".join(filter(None, (below, identity))) if linked else identity


def _names(parent: str) -> list[str]:
    return parent.split("+")


def _document(entry: Entry) -> str:
    document = dataclasses.asdict(entry)
    for name in ("id", "path"):
        del document[name]
    return json.dumps(document)


def _entry(identity: str, document: dict[str, Any]) -> Entry:
    return Entry(
        id=identity,
        key=_text(document["key"], KEY),
        parent=str(document["parent"]),
        size=checked_size(document["size"]),
        text=str(document["text"]),
        created=float(document["created"]),
        sources=tuple((_text(key, KEY), _text(layer, ID)) for key, layer in document["sources"]),
        origin=str(document.get("origin", "")),
        altered=document.get("altered", False) is True,
    )


def _text(value: str, form: re.Pattern[str]) -> str:
    if form.fullmatch(value) is None:
        raise ValueError("the record is damaged")
    return value
