"""Caches that machines share: records of steps that other machines have executed, and their layers.

What travels is what `solve.cache` keeps, under the same ids, so that a layer lies on its parent there as it
did where it was made. The records come first, in one document; a layer comes when something needs it, and is
in the cache of this store from then on. Nothing of a remote cache is trusted further than whoever writes
there: a layer is verified against the digest in its record, and the record is believed.

    configuration   {"records": [{id, key, parent, sources, text, created, diff_id, blob}, …]}
    layers          the blobs that the records name, compressed

A cache that fails is done without: what is left of the others and of the store is what counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MALFORMED, UNUSABLE_TEXT, InputError, MachineError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.intake import Intake
from firebuild_bootstrap.image.layertrees import OutsideLayer
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import MAX_DOCUMENT, Descriptor, Manifest, canonical, parse_json
from firebuild_bootstrap.image.outgoing import Outgoing
from firebuild_bootstrap.image.outputs import GZIP
from firebuild_bootstrap.image.remotecache import (
    MOST_RECORDS,
    RECORDS,
    CacheBackend,
    CacheSpec,
    DirectoryBackend,
)
from firebuild_bootstrap.image.trees import DamagedArchiveError
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.solve.cache import ID, KEY, LINKED, MAX_TEXT, Cache, Entry, above
from firebuild_bootstrap.solve.keys import Parts
from firebuild_bootstrap.transfers import side_by_side
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

_PARENT: Final = re.compile("[0-9a-z:+-]{0,8192}")
_DIFF_ID: Final = re.compile("sha256:[0-9a-f]{64}")
_MOST_SOURCES: Final = 256
_END_OF_TIME: Final = float(1 << 33)


@dataclass(frozen=True)
class Record:
    """What a remote cache knows of a step.

    Args:
        entry: the layer, as `solve.cache` knows those that are here; its `origin` is the remote cache.
        diff_id: digest of the layer's archive without compression.
        blob: the archive as it travels.
    """

    entry: Entry
    diff_id: str
    blob: Descriptor


def write_records(records: Sequence[Record], blobs: BlobStore) -> Manifest:
    """Put the manifest of a cache and its records into the store of blobs; the same ones give the same bytes.

    Raises:
        InputError: they are too many.
        MachineError: the store can't be written.
    """
    layers = {record.blob.digest: replace(record.blob, annotations={}) for record in records}
    data = canonical({"records": [_as_json(record) for record in records]})
    if len(records) > MOST_RECORDS or len(data) > MAX_DOCUMENT:
        raise InputError(
            f"the cache has {counted(len(records), 'step')}, {counted(len(data), 'byte')}; "
            f"{MOST_RECORDS} steps and {MAX_DOCUMENT} bytes are allowed",
            hint="mode=min has the steps of the result's own stage only",
        )
    manifest = Manifest.made_of(Descriptor(RECORDS, blobs.add(data), len(data)), list(layers.values()))
    blobs.add(manifest.data)
    return manifest


def read_records(manifest: Manifest, data: bytes, origin: str) -> list[Record]:
    """Read the records of a cache, which nobody has looked at yet.

    Args:
        manifest: its manifest.
        data: its configuration, verified.
        origin: what to call the cache.

    Raises:
        InputError: they are not as they have to be.
    """
    document = parse_json(data, "its list of records")
    found = document.get("records") if isinstance(document, dict) else None
    if not isinstance(found, list) or len(found) > MOST_RECORDS:
        raise InputError(f"its records are damaged: expected a list of at most {MOST_RECORDS}")
    layers = {layer.digest: layer for layer in manifest.layers}
    try:
        return [_record(each, layers, origin) for each in found]
    except MALFORMED as error:
        raise InputError(f"a record of it is damaged: {one_line(str(error), 200)}") from error


def _as_json(record: Record) -> dict[str, Any]:
    entry = record.entry
    return {
        "id": entry.id,
        "key": entry.key,
        "parent": entry.parent,
        "sources": [list(source) for source in entry.sources],
        "text": entry.text,
        "created": entry.created,
        "diff_id": record.diff_id,
        "blob": record.blob.digest,
    }


def _record(document: dict[str, Any], layers: dict[str, Descriptor], origin: str) -> Record:
    text, created, sources = document["text"], float(document["created"]), document["sources"]
    if not isinstance(text, str) or len(text) > MAX_TEXT or UNUSABLE_TEXT.search(text):
        raise ValueError(f"its text is {text!r:.80}")
    if not (math.isfinite(created) and 0 <= created < _END_OF_TIME):
        raise ValueError(f"it was made at {created}")
    if len(sources) > _MOST_SOURCES:
        raise ValueError(f"it has {len(sources)} sources")
    entry = Entry(
        id=_text(document["id"], ID),
        key=_text(document["key"], KEY),
        parent=_text(document["parent"], _PARENT),
        size=layers[document["blob"]].size,
        text=text,
        created=created,
        sources=tuple((_text(key, KEY), _text(layer, ID)) for key, layer in sources),
        origin=origin,
    )
    return Record(entry, _text(document["diff_id"], _DIFF_ID), layers[document["blob"]])


def _text(value: str, form: re.Pattern[str]) -> str:
    if form.fullmatch(value) is None:
        raise ValueError(f"expected {form.pattern}, found {value!r:.100}")
    return value


class RemoteCaches:
    """The remote caches of one build.

    Args:
        cache: that of the store.
        blobs: where what comes and goes is kept.
        intake: unpacks what comes.
        outgoing: packs what goes.
        registries: how to get to them.
        tasks: told of all that may take a while, and of what fails.
        check: called again and again; what it raises ends the work.
    """

    def __init__(
        self,
        cache: Cache,
        blobs: BlobStore,
        intake: Intake,
        outgoing: Outgoing,
        *,
        registries: Registries,
        tasks: Tasks,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._cache = cache
        self._blobs = blobs
        self._intake = intake
        self._outgoing = outgoing
        self._registries = registries
        self._tasks = tasks
        self._check = check
        self._known: list[_Known] = []
        self._taken: dict[str, str] = {}

    # --- what others have made ------------------------------------------------------------------

    def load(self, specs: Iterable[CacheSpec]) -> None:
        """Read the records of remote caches; of one that can't be read the user is told.

        Raises:
            MachineError: the store can't be written.
        """
        for spec in specs:
            backend = self._backend(spec)
            try:
                manifest = backend.read(self._blobs)
                data = self._blobs.read(manifest.config.digest, MAX_DOCUMENT)
                self._known.append(_Known(backend, read_records(manifest, data, str(backend))))
            except InputError as error:
                self._tasks.warn(f"the cache {backend} is not used: {one_line(error.message, 500)}")

    def longer(self, local: list[Entry], chain: Sequence[Parts], on: str) -> list[Entry]:
        """Return the results of the first keys of a chain: those of the store, or more if others have them.

        Args:
            local: those of the store.
            chain: what the keys are made of, each of what lies on the one before it.
            on: what the first lies on, as `above` names it.

        Returns:
            as many as there are without a gap; the layers of some need not be here (`fetch`).
        """
        best, tip = local, on
        for entry in local:
            tip = above(tip, entry.id, linked=entry.linked)
        for known in self._known:
            for begun, below in ((local, tip), ([], on)):
                found = [*begun, *self._found(known, chain[len(begun) :], below)]
                best = found if len(found) > len(best) else best
        return best

    def _found(self, known: _Known, chain: Sequence[Parts], on: str) -> Iterator[Entry]:
        for parts in chain:
            record = known.by_key.get((parts.key, LINKED if parts.linked else on))
            # What contradicts the results that are here, would not be found if it were here, either.
            if record is None or self._cache.outdated(record.entry):
                return
            here, entry = self._cache.entry(record.entry.id), record.entry
            if here is not None:
                # What another result has replaced here, such as one of --no-cache, is not wanted any more.
                if (here.key, here.parent) != (entry.key, entry.parent) or not self._cache.leads_to(here):
                    return
                entry = here
            yield entry
            on = above(on, entry.id, linked=entry.linked)

    def entry(self, identity: str) -> Entry | None:
        """Return what is known of a layer, whether it is here or not."""
        if (here := self._cache.entry(identity)) is not None:
            return here
        return found[1].entry if (found := self._with(identity)) else None

    def origin(self, identity: str) -> str:
        """Return the remote cache that this build has a layer from, or would have; empty for none."""
        if identity in self._taken:
            return self._taken[identity]
        return "" if (found := self.entry(identity)) is None or found.path != Path() else found.origin

    def fetch(self, wanted: Iterable[tuple[str, str]]) -> bool:
        """Bring layers into the cache of the store that are not there.

        Args:
            wanted: ids, parents before what lies on them; each with what the first of its chain lies on.

        Returns:
            whether all of them are there. What could not be fetched is not found any more, so that something
            else may be wanted now.

        Raises:
            MachineError: the store can't be written.
        """
        missing = [
            (*found, base)
            for identity, base in wanted
            if self._cache.entry(identity) is None and (found := self._with(identity))
        ]
        failed: dict[str, InputError] = {}
        jobs = [partial(self._receive, known, record, failed) for known, record, _ in missing]
        side_by_side(jobs, self._registries.around.settings.connections, self._check)
        for known, record, base in missing:
            try:
                if record.entry.id in failed:
                    raise failed[record.entry.id]
                self._take(record, base)
            except (InputError, DamagedArchiveError) as error:
                step = one_line(record.entry.text or record.entry.key, 100)
                self._tasks.warn(
                    f"the cache {known.backend}: {step}: its layer is not used: "
                    f"{one_line(error.message, 500)}"
                )
                known.forget(record)
                return False
        return True

    def _with(self, identity: str) -> tuple[_Known, Record] | None:
        found = ((known, known.by_id.get(identity)) for known in self._known)
        return next(((known, record) for known, record in found if record is not None), None)

    def _receive(
        self, known: _Known, record: Record, failed: dict[str, InputError], check: Callable[[], None]
    ) -> None:
        try:
            if not known.lost:
                known.backend.fetch(record.blob, self._blobs, check)
        except InputError as error:
            failed[record.entry.id] = error
            # Nobody waits for as many attempts as there are layers.
            known.lost = isinstance(error, RegistryError) and error.passing

    def _take(self, record: Record, base: str) -> None:
        """Put the layer of a record, whose blob is here, into the cache."""
        layer, entry = OutsideLayer(record.diff_id, record.blob), record.entry
        write = partial(self._intake.decompress, layer)
        with self._cache.trees.unpacking(write) as (directory, report):
            notes = report.notes(f"the cached step {entry.text}")
            self._cache.import_(replace(entry, altered=bool(notes)), directory, base)
        self._taken[entry.id] = entry.origin
        for note in notes:
            self._tasks.warn(note)
        if not notes:  # or another archive would come out of the tree
            self._cache.trees.note_digest(entry.id, record.diff_id)
            if record.blob.media_type.endswith(GZIP.suffix):
                self._blobs.note_made(record.diff_id, GZIP.form, record.blob.digest, record.blob.size)

    # --- what others are to have ----------------------------------------------------------------

    def export(self, entries: Sequence[Entry], spec: CacheSpec, related: Sequence[Reference]) -> None:
        """Write steps to a remote cache, in place of what it has.

        Args:
            entries: parents before what lies on them; layers that are not here are those of `load`.
            spec: where to, and whether a failure is told or raised.
            related: images that may have some of the layers in the same registry.

        Raises:
            InputError: it is refused, or can't be reached.
            MachineError: a layer can't be packed, or a disk is full.
        """
        backend = self._backend(spec, related)
        try:
            with self._tasks.task(f"writing the cache {backend}"):
                records = [record for entry in entries if (record := self._record_of(entry)) is not None]
                backend.write(write_records(records, self._blobs), self._blobs, self._fetched)
            if len(records) < len(entries):
                self._tasks.warn(
                    f"the cache {backend} has {len(records)} of {counted(len(entries), 'step')}: "
                    "this id mapping could not keep all files of the others, or of what they were made of, "
                    "as they were"
                )
        except (InputError, MachineError) as error:
            what = f"the cache {backend} could not be written: {one_line(error.message, 500)}"
            if not spec.ignore_error:
                raise type(error)(what, hint=error.hint) from error
            self._tasks.warn(what)

    def _record_of(self, entry: Entry) -> Record | None:
        """Return what others are to know of a step; None where the layer that is here is not what it was."""
        if (entry.altered or self._cache.entry(entry.id) is None) and (found := self._with(entry.id)):
            return found[1]
        if entry.altered:
            return None
        return Record(entry, *self._outgoing.of_step(entry.id))

    def _fetched(self, blob: Descriptor) -> Path:
        """Bring the blob of a layer that goes from one remote cache to another."""
        for known in self._known:
            if any(record.blob.digest == blob.digest for record in known.by_id.values()):
                known.backend.fetch(blob, self._blobs, self._check)
                break
        return self._blobs.required(blob.digest)

    def _backend(self, spec: CacheSpec, related: Sequence[Reference] = ()) -> CacheBackend:
        if spec.reference is None:
            return DirectoryBackend(spec)
        from firebuild_bootstrap.registry.remotecache import RegistryBackend

        return RegistryBackend(self._registries, spec.reference, related)


class _Known:
    """A remote cache whose records are here."""

    def __init__(self, backend: CacheBackend, records: Iterable[Record]) -> None:
        self.backend = backend
        self.by_id = {record.entry.id: record for record in records}
        self.by_key = {(each.entry.key, each.entry.parent): each for each in self.by_id.values()}
        self.lost = False
        """Whether it does not answer any more."""

    def forget(self, record: Record) -> None:
        """Do not find a record any more; nor any other one, where the cache is lost."""
        for entry in (each.entry for each in ([*self.by_id.values()] if self.lost else [record])):
            self.by_id.pop(entry.id, None)
            self.by_key.pop((entry.key, entry.parent), None)
