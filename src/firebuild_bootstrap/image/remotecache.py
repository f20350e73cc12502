"""Where a cache that machines share is kept: how a user names it, its form there, and directories with one.

What travels is an artifact of OCI (image-spec, manifest.md, "Guidelines for Artifact Usage"): a manifest
whose configuration holds records of steps (`solve.remote`), and whose layers are those of images. Registries
keep it as they keep images: see `registry.remotecache`. A directory is an OCI image layout.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, Protocol

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.blobs import DIGEST, BlobStore
from firebuild_bootstrap.image.content_store import locked, place_of, unusable_store
from firebuild_bootstrap.image.layouts import FilesInDirectory, read_document
from firebuild_bootstrap.image.names import Reference, at_home
from firebuild_bootstrap.image.oci import (
    INDEX,
    MAX_DOCUMENT,
    MAX_MEMBERS,
    REF_NAME,
    Descriptor,
    Index,
    Manifest,
    blob_path,
    canonical,
    parse_manifest,
)
from firebuild_bootstrap.sizes import split_fields
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

RECORDS: Final = "application/vnd.firebuild.cache.records.v1+json"
"""Media type of the configuration. Another number where a reader of today could not read it."""
MOST_RECORDS: Final = MAX_MEMBERS
_FORM: Final = "type=registry,ref=REF or type=local,{}=DIR"
_PIECE: Final = 1024 * 1024
# Of buildx's members those that say what happens anyway.
_USUAL: Final = {
    "image-manifest": "true",
    "oci-mediatypes": "true",
    "compression": "gzip",
    "force-compression": "false",
}
_TYPES: Final = {
    "inline": "write the cache beside the image: type=registry,ref=NAME:cache",
    "gha": "keep it in a registry, or in a directory that the job caches: type=local",
    "s3": "keep it in a registry, or copy a directory there: type=local",
    "azblob": "keep it in a registry, or copy a directory there: type=local",
}
Fetch = Callable[[Descriptor], Path]
"""Returns the path of a blob, which is brought to the store of blobs if it is elsewhere."""


@dataclass(frozen=True)
class CacheSpec:
    """One `--cache-from` or `--cache-to`.

    Args:
        type: where the cache is: a registry, or a directory.
        reference: what it is called in the registry; None for a directory.
        directory: the directory.
        tag: which of the caches in a directory.
        digest: which one exactly; empty for the one with that tag.
        mode: which steps go there: `min`, those of the result's own stage, or `max`, those of every stage.
        ignore_error: a failure to write it does not end the build.
    """

    type: Literal["registry", "local"]
    reference: Reference | None = None
    directory: Path = Path()
    tag: str = "latest"
    digest: str = ""
    mode: Literal["min", "max"] = "min"
    ignore_error: bool = False

    def __str__(self) -> str:
        return str(self.reference if self.reference is not None else self.directory)


def parse_cache(text: str, *, export: bool) -> CacheSpec:
    """Read one as docker buildx writes it.

    Args:
        text: members with commas in between, as in CSV; or the name of a cache in a registry alone.
        export: whether it says where the cache goes.

    Raises:
        InputError: it is malformed, or asks for what there is not.
    """
    form = _FORM.format("dest" if export else "src")
    members = _members(text, form)
    kind = members.pop("type", "")
    if kind not in ("registry", "local"):
        hint = _TYPES.get(kind, f"write {form}")
        raise InputError(f"expected type=registry or type=local, found type={one_line(kind, 80)}", hint=hint)
    place = "ref" if kind == "registry" else "dest" if export else "src"
    named = members.pop(place, "")
    if not named:
        raise InputError(f"expected {place}= in {one_line(text, 200)!r}", hint=f"write {form}")
    mode = _choice(members, "mode", ("min", "max")) if export else "min"
    ignored = _choice(members, "ignore-error", ("false", "true")) if export else "false"
    for name, usual in _USUAL.items() if export else ():
        _choice(members, name, (usual,))
    if kind == "registry":
        if named.startswith(("/", ".", "~")):
            raise InputError(
                f"expected the name of a cache in a registry, found the path {one_line(named, 200)!r}",
                hint=f"a directory is type=local,{'dest' if export else 'src'}={one_line(named, 200)}",
            )
        spec = CacheSpec("registry", Reference.parse(named, what="the name of a cache in a registry"))
        if export and spec.reference and spec.reference.digest:
            raise InputError(
                f"a cache can't be written to a digest: {one_line(named, 200)}", hint="use a tag"
            )
    else:
        tag, digest = members.pop("tag", "latest"), "" if export else members.pop("digest", "")
        if digest and DIGEST.fullmatch(digest) is None:
            raise InputError(f"expected a digest such as sha256:…, found {one_line(digest, 100)!r}")
        spec = CacheSpec("local", directory=at_home(named, f"{place} of a cache"), tag=tag, digest=digest)
    for name in members:
        raise InputError(
            f"there is no {one_line(name, 80)!r} for a cache of type={kind}", hint=f"write {form}"
        )
    return replace(spec, mode="max" if mode == "max" else "min", ignore_error=ignored == "true")


def _members(text: str, form: str) -> dict[str, str]:
    if text and not any(sign in text for sign in "=,"):
        return {"type": "registry", "ref": text}  # as buildx reads it
    try:
        fields = split_fields(text)
    except ValueError as error:
        raise InputError(f"{one_line(text, 200)!r} can't be read: {error}", hint=f"write {form}") from error
    members = {}
    for each in fields:
        name, equals, value = each.partition("=")
        if not equals:
            raise InputError(f"expected NAME=VALUE, found {one_line(each, 80)!r}", hint=f"write {form}")
        members[name.strip().lower()] = value
    return members


def _choice(members: dict[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """Return a member, by default the first of what it may be."""
    found = members.pop(name, allowed[0])
    if found not in allowed:
        raise InputError(f"expected {name}={' or '.join(allowed)}, found {one_line(found, 80)!r}")
    return found


class CacheBackend(Protocol):
    """Where one shared cache is kept; `str` of it is what to call it."""

    def read(self, blobs: BlobStore) -> Manifest:
        """Return the manifest of the cache; its configuration is in `blobs` then, and verified.

        Raises:
            InputError: there is none, it can't be fetched, or is damaged.
            MachineError: the store of blobs can't be written.
        """
        ...

    def fetch(self, blob: Descriptor, blobs: BlobStore, check: Callable[[], None]) -> None:
        """Bring a layer to `blobs`, which verifies it.

        Raises:
            InputError, MachineError: as `read`.
        """
        ...

    def write(self, manifest: Manifest, blobs: BlobStore, fetch: Fetch) -> None:
        """Keep a cache, whose manifest and configuration are in `blobs`, instead of an older one.

        Readers find the older one or this one, whoever else writes.

        Args:
            manifest: of the cache.
            blobs: what is kept here.
            fetch: brings what is not there.

        Raises:
            InputError: it is refused, or can't be fetched.
            MachineError: the disk is full.
        """
        ...


def cache_manifest(data: bytes, media_type: str) -> Manifest:
    """Read the manifest of a cache.

    Raises:
        InputError: it is damaged, or that of something else.
    """
    manifest = parse_manifest(data, media_type, configs=(RECORDS,))
    if not isinstance(manifest, Manifest):
        raise InputError(
            "it is an index of images, and not a cache that firebuild wrote",
            hint="name the tag that --cache-to wrote: images and caches have tags of their own",
        )
    if manifest.config.size > MAX_DOCUMENT:
        raise InputError(
            f"its records have {counted(manifest.config.size, 'byte')}; {MAX_DOCUMENT} are allowed"
        )
    return manifest


class DirectoryBackend:
    """A cache in a directory; several may be there, by their tags, and share blobs.

    Args:
        spec: which one.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._root = spec.directory.absolute()
        self._tag = spec.tag
        self._digest = spec.digest
        self._files = FilesInDirectory(self._root)

    def __str__(self) -> str:
        return str(self._root)

    def read(self, blobs: BlobStore) -> Manifest:
        """See `CacheBackend`."""
        entries = self._entries()
        digest, tag = self._digest, self._tag
        found = next((e for e in entries if (e.digest == digest if digest else _tag(e) == tag)), None)
        if found is None:
            there = ", ".join(sorted(filter(None, map(_tag, entries)))[:20]) or "none"
            raise InputError(f"there is no cache {digest or tag}", hint=f"tags there are {one_line(there)}")
        data = found.check(read_document(self._files, blob_path(found.digest)))
        manifest = cache_manifest(data, found.media_type)
        self.fetch(manifest.config, blobs)
        return manifest

    def fetch(self, blob: Descriptor, blobs: BlobStore, check: Callable[[], None] = lambda: None) -> None:
        """See `CacheBackend`."""
        with blobs.writer(blob) as writer:
            if not writer.complete:
                with self._files.open(blob_path(blob.digest)) as source:
                    source.seek(writer.offset)
                    while piece := source.read(_PIECE):
                        writer.write(piece)
                        check()
            writer.commit()

    def write(self, manifest: Manifest, blobs: BlobStore, fetch: Fetch) -> None:
        """See `CacheBackend`."""
        try:
            (self._root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
            for blob in (*manifest.blobs, manifest.descriptor):
                self._add(blob, blobs, fetch)
            with locked(self._root):  # the index has all tags in it
                self._replace(self._root / "oci-layout", canonical({"imageLayoutVersion": "1.0.0"}))
                others = [entry for entry in self._entries() if _tag(entry) != self._tag]
                entry = replace(manifest.descriptor, annotations={REF_NAME: self._tag})
                self._replace(self._root / "index.json", Index.made_of((*others, entry)).data)
        except OSError as error:
            where = f"{place_of(error, self._root)} can't be written"
            raise unusable_store(where, error, "name another directory: dest=DIR") from error

    def _entries(self) -> tuple[Descriptor, ...]:
        if not self._files.has("index.json"):
            return ()
        index = parse_manifest(read_document(self._files, "index.json"), INDEX)
        return index.manifests if isinstance(index, Index) else ()

    def _add(self, blob: Descriptor, blobs: BlobStore, fetch: Fetch) -> None:
        target = self._root / blob_path(blob.digest)
        if target.exists() and target.stat().st_size == blob.size:
            return
        source = blobs.hold(blob.digest) or fetch(blob)
        with self._whole(target) as partial, open(source, "rb") as file, open(partial, "xb") as out:
            while piece := file.read(_PIECE):
                out.write(piece)

    def _replace(self, target: Path, data: bytes) -> None:
        with self._whole(target) as partial:
            partial.write_bytes(data)

    @contextmanager
    def _whole(self, target: Path) -> Iterator[Path]:
        """Give a path to write to; what is there afterwards becomes `target` in one piece."""
        partial = target.with_name(f".{target.name[:32]}-{secrets.token_hex(8)}")
        try:
            yield partial
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _tag(entry: Descriptor) -> str:
    return entry.annotations.get(REF_NAME, "")
