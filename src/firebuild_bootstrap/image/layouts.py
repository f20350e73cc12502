"""Images in files: OCI image layouts and docker archives, in a directory or a tar archive; read and written.

A docker archive (`docker save`) is the same thing to us: its `manifest.json` names a configuration and layers
by their paths, from which a manifest with digests is made. What Docker writes since version 25 is both, as is
what is written here for `docker load`.

All of it may be hostile: nothing is followed out of the directory or archive, what a name means is never
ambiguous, and no byte is believed that has another digest than what named it.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Final, Protocol, cast

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import (
    CONFIG,
    IMAGE_NAME,
    INDEX,
    LAYER,
    MAX_DOCUMENT,
    MAX_MEMBERS,
    REF_NAME,
    Descriptor,
    ImageDocument,
    Index,
    Manifest,
    blob_path,
    canonical,
    choose_image,
    parse_config,
    parse_json,
    parse_manifest,
)
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.layers.compression import compression_of, decompressed
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader
from firebuild_bootstrap.layers.tar import (
    DIRECTORY,
    FILE,
    HARDLINK,
    SYMLINK,
    Entry,
    Hashed,
    LayerWriter,
    Sink,
    write_all,
)
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

_LAYOUT: Final = "oci-layout"
_INDEX: Final = "index.json"
_DOCKER: Final = "manifest.json"
_ROOTS: Final = ("bin", "etc", "lib", "usr")
_MAX_FILES: Final = 20_000  # an archive with more is that of a root file system
# Suffixes of the media type of layers, by how these are compressed (image-spec, layer.md).
_TYPES: Final = {"": "", "gzip": "+gzip", "zstd": "+zstd"}
_PIECE: Final = 1024 * 1024
_FREE: Final = 1 << 30
_RATIO: Final = 200
_Called = tuple[tuple[Reference, ...], str]  # whole names, and a tag


STDIN: Final = Path("/dev/stdin")


class Files(Protocol):
    """Files by their paths, which are relative and without `..`."""

    def open(self, path: str) -> io.BufferedReader:
        """Open one.

        Raises:
            InputError: it is not there, or no regular file.
        """
        ...

    def has(self, path: str) -> bool:
        """Whether there is one, or a directory at the top."""
        ...


class FilesInDirectory:
    """The files of a directory; links are not followed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, path: str) -> bool:
        """See `Files`."""
        return os.path.lexists(self._root / path)

    def open(self, path: str) -> io.BufferedReader:
        """See `Files`."""
        *parents, name = path.split("/")
        at = -1
        try:
            at = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for parent in parents:
                below = os.open(
                    parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at
                )
                os.close(at)
                at = below
            # A pipe without a writer would be waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = open(os.open(name, flags, dir_fd=at), "rb")  # noqa: SIM115 - the caller closes it
        except OSError as error:
            raise InputError(f"{self._root}: {path} can't be read: {error.strerror}") from error
        finally:
            if at >= 0:
                os.close(at)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise InputError(f"{self._root}: {path} is not a regular file")
        return file


class FilesInArchive:
    """The files of a tar archive without compression.

    Args:
        file: stays open, and can be read at any place.
        name: what to call it in messages.

    Raises:
        InputError: a name comes twice.
        DamagedArchive: it is damaged.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._top: set[str] = set()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        reader = LayerReader(file.fileno())
        for entry in reader:
            self._top.add(entry.path.partition("/")[0])
            if entry.path in self._places or entry.path in self._links:
                raise InputError(f"{name}: {entry.path} is in the archive twice", hint="make it again")
            if entry.kind == FILE and entry.regions is None:
                self._places[entry.path] = (reader.position, entry.size)
            elif entry.kind == SYMLINK:  # `docker save` had them for layers that come twice
                self._links[entry.path] = posixpath.normpath(
                    posixpath.join(posixpath.dirname(entry.path), entry.linkname)
                )
            elif entry.kind == HARDLINK:
                self._links[entry.path] = entry.linkname
            if len(self._places) + len(self._links) > _MAX_FILES:
                break

    def has(self, path: str) -> bool:
        """See `Files`."""
        return path in self._places or path in self._links or path in self._top

    def open(self, path: str) -> io.BufferedReader:
        """See `Files`."""
        place = self._places.get(self._links.get(path, path))
        if place is None:
            raise InputError(f"{self._name}: {path} is not a file in the archive", hint="make it again")
        return io.BufferedReader(_Part(self._file.fileno(), *place), _PIECE)


def called(source: Path) -> str:
    """Return what to call a directory or archive in messages."""
    return "standard input" if source == STDIN else str(source)


@contextmanager
def naming(source: Path) -> Iterator[None]:
    """Name the directory or archive in errors of the block that do not say where something is wrong.

    Raises:
        InputError: such an error.
    """
    try:
        yield
    except InputError as error:
        if called(source) in error.message:
            raise
        raise InputError(f"{called(source)}: {error.message}", hint=error.hint) from error


@contextmanager
def opened(source: Path, spool: Path) -> Iterator[tuple[Files, Path]]:
    """Open a directory or archive, which may be compressed, or be a pipe.

    Args:
        source: the path of it.
        spool: an existing directory on whose file system there is room for what has to be decompressed.

    Yields:
        its files, and a path that leads to the directory or archive itself.

    Raises:
        InputError: it is not there, damaged, unpacks to too much, or has a name twice.
        MachineError: there is no room.
    """
    if source.is_dir():
        yield FilesInDirectory(source), source
        return
    with ExitStack() as cleanup:
        try:
            file = cleanup.enter_context(open(source, "rb", buffering=0))
        except OSError as error:
            raise InputError(f"{called(source)} can't be read: {error.strerror}") from error
        try:
            counted = _Counted(file)
            reader = decompressed(counted.buffered)
            if reader is counted.buffered and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                archive: IO[bytes] = file
            else:
                # Nobody else sees it, and it is gone whoever is killed.
                archive = cleanup.enter_context(TemporaryFile(dir=spool, buffering=0))
                counted.copy_bounded(reader, _Unbuffered(archive.fileno()), spool)
            yield FilesInArchive(archive, called(source)), Path(f"/proc/self/fd/{archive.fileno()}")
        except DamagedArchive as error:
            raise InputError(f"{called(source)} is damaged: {error.message}", hint=error.hint) from error


def decompress_bounded(source: Path, out: Sink, target: Path) -> None:
    """Write what is compressed in the file `source`, unless it is far more than that holds.

    Args:
        source: is compressed, or not.
        out: takes what comes of it.
        target: where `out` writes, for errors.

    Raises:
        InputError: it is more than `most_of` allows.
        MachineError: it can't be written.
        DamagedArchive: the compressed data is damaged.
        OSError: the source can't be read.
    """
    with open(source, "rb", buffering=0) as file:
        counted = _Counted(file)
        counted.copy_bounded(decompressed(counted.buffered), out, target)


class _Unbuffered:
    """A `Sink` that writes to a descriptor at once: whoever reads from the descriptor finds all of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """See `Sink`."""
        write_all(self._descriptor, data)


class _Counted(io.RawIOBase):
    """A file, and how much of it was read."""

    def __init__(self, file: io.FileIO | io.BufferedReader) -> None:
        super().__init__()
        self._file = file
        self._count = 0
        self.buffered: io.BufferedReader = io.BufferedReader(cast(io.RawIOBase, self), 64 * 1024)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        done = self._file.readinto(buffer)
        self._count += done
        return done

    def copy_bounded(self, reader: IO[bytes], out: Sink, target: Path = Path()) -> int:
        """Copy what the decompressor of this file gives, and return its size; see `decompress_bounded`."""
        size = 0
        compressed = reader is not self.buffered
        while piece := reader.read(_PIECE):
            size += len(piece)
            if compressed and size > (most := most_of(self._count)):
                raise InputError(
                    f"more than {most >> 20} MiB come out of {counted(self._count, 'byte')}, compressed",
                    hint="it is made to fill disks, or has large files of zeros: unpack it before",
                )
            try:
                out.write(piece)
            except OSError as error:
                reason = f"{target}: an archive can't be unpacked: {error.strerror}"
                raise MachineError(reason, hint="free some space there") from error
        return size


def most_of(size: int) -> int:
    """Return how many bytes may come out of `size` that are compressed.

    gzip makes text 10 times smaller, and zeros 1030 times: a database file of zeros has room in what is free.
    """
    return _FREE + _RATIO * size


class _Part(io.RawIOBase):
    """A part of a file."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._start = offset
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")[: max(self._size - self._at, 0)]
        done = os.preadv(self._descriptor, [view], self._start + self._at) if view else 0
        self._at += done
        return done


@dataclass(frozen=True)
class ImageInFiles:
    """An image in a layout or archive.

    Args:
        names: how it is called there.
        manifest: its manifest.
        document: its configuration.
        digests: more digests that name it: that of the index it was chosen from.
        paths: where its blobs are, by their digests.
        unpacked: digests of layers that are there in a compression without a media type, such as xz, and
            become archives without any.
        tag: how an index calls it, if not by a whole name.
    """

    names: tuple[Reference, ...]
    manifest: Manifest
    document: ImageDocument
    digests: tuple[str, ...]
    paths: dict[str, str]
    unpacked: frozenset[str] = frozenset()
    tag: str = ""

    @property
    def selectors(self) -> frozenset[str]:
        """The tags and digests by which one of several is chosen."""
        tags = (self.tag, *(name.tag for name in self.names), *map(str, self.names))
        return frozenset(filter(None, (*tags, self.manifest.digest, *self.digests)))

    def copy_to(self, blobs: BlobStore, files: Files) -> None:
        """Copy its blobs into a store, where they are held.

        Raises:
            InputError: one is not there, or is not what its digest says.
            MachineError: the store can't be written.
        """
        for blob in self.manifest.blobs:
            with files.open(self.paths[blob.digest]) as file, blobs.writer(blob) as writer:
                source: IO[bytes] = file
                if blob.digest in self.unpacked and not writer.complete:
                    writer.restart()
                    source = decompressed(file)
                else:
                    file.seek(writer.offset)
                while not writer.complete and (piece := source.read(_PIECE)):
                    writer.write(piece)
                writer.commit()


def kind_of(files: Files) -> str:
    """Say what images are in there as, for people; an empty text where there are none."""
    if any(map(files.has, _ROOTS)):  # a root file system that happens to have such a file
        return ""
    if files.has(_LAYOUT):
        return "OCI image layout"
    return "docker archive" if files.has(_DOCKER) else ""


def images_in(files: Files, platform: Platform, only: str = "") -> list[ImageInFiles]:
    """Return all images of a layout or docker archive; artifacts beside them are left out.

    Args:
        files: of which `kind_of` says something.
        platform: which to choose where there are several for one name.
        only: a tag or digest; what else `index.json` names is not looked at if it has that.

    Raises:
        InputError: a document in it is missing, damaged, or not what its digest says.
    """
    found = _of_layout(files, platform, only) if files.has(_LAYOUT) else _of_docker(files)
    if not found:
        raise InputError("there is no image in it", hint="an empty layout holds nothing to start from")
    return found


def read_document(files: Files, path: str) -> bytes:
    """Return a manifest, index or configuration, whose size is bounded.

    Raises:
        InputError: it is not there, or too large.
    """
    with files.open(path) as file:
        data = file.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise InputError(f"{path} is larger than {MAX_DOCUMENT >> 20} MiB", hint="no image needs that")
    return data


# --- OCI image layouts ----------------------------------------------------------------------------


def _of_layout(files: Files, platform: Platform, only: str) -> list[ImageInFiles]:
    version = parse_json(read_document(files, _LAYOUT), _LAYOUT)
    if not isinstance(version, dict) or version.get("imageLayoutVersion") != "1.0.0":
        raise InputError(f"{_LAYOUT}: expected imageLayoutVersion 1.0.0, found {version!r:.100}")
    index = parse_manifest(read_document(files, _INDEX), INDEX)
    if not isinstance(index, Index):
        raise InputError(f"{_INDEX} is not an index", hint="make the layout again")
    groups: dict[_Called, list[Descriptor]] = {}
    for entry in index.manifests:
        if entry.is_image or not entry.artifact_type:
            groups.setdefault((_names(entry), entry.annotations.get(REF_NAME, "")), []).append(entry)
    chosen = _matching(groups, only)
    found = []
    for (names, tag), entries in (chosen or groups).items():
        try:
            found.append(_of_entries(files, platform, names, tag, entries))
        except InputError as error:
            if only and not chosen:  # a digest further down is looked for, or what is not there
                continue
            called = str(names[0]) if names else tag
            said = f"{one_line(called, 200)}: {error.message}" if called else error.message
            raise InputError(said, hint=error.hint) from error
    return found


def _matching(groups: Mapping[_Called, list[Descriptor]], only: str) -> dict[_Called, list[Descriptor]]:
    """Return what has a tag or digest that is wanted; nothing where none is wanted."""
    found: dict[_Called, list[Descriptor]] = {}
    for (names, tag), entries in groups.items() if only else ():
        if only in (tag, *(name.tag for name in names), *map(str, names)):
            found[names, tag] = entries
        elif alone := [entry for entry in entries if entry.digest == only]:
            found[names, tag] = alone
    return found


def _of_entries(
    files: Files, platform: Platform, names: tuple[Reference, ...], tag: str, entries: Sequence[Descriptor]
) -> ImageInFiles:
    manifest, (_, *digests) = choose_image(
        Index(tuple(entries)), platform, lambda entry: read_document(files, blob_path(entry.digest))
    )
    document = parse_config(manifest.config.check(read_document(files, blob_path(manifest.config.digest))))
    paths = {blob.digest: blob_path(blob.digest) for blob in manifest.blobs}
    return ImageInFiles(names, manifest, document, tuple(digests), paths, tag=tag)


def _names(entry: Descriptor) -> tuple[Reference, ...]:
    """Return how an entry of `index.json` is called; a tag alone is not a name."""
    name = entry.annotations.get(IMAGE_NAME) or entry.annotations.get(REF_NAME, "")
    if not any(sign in name for sign in ":/"):
        return ()
    return (replace(Reference.parse(name, what="the name of an image"), digest="", name=""),)


# --- docker archives ------------------------------------------------------------------------------


def _of_docker(files: Files) -> list[ImageInFiles]:
    entries = parse_json(read_document(files, _DOCKER), _DOCKER)
    if isinstance(entries, dict) and "schemaVersion" in entries:
        raise InputError(
            f"{_DOCKER} is the manifest of an image, as skopeo and podman write it into a directory (dir:), "
            "expected an OCI layout or a docker archive",
            hint="`skopeo copy dir:DIRECTORY oci-archive:FILE` makes one",
        )
    if not isinstance(entries, list) or len(entries) > MAX_MEMBERS:
        raise InputError(f"{_DOCKER}: expected a list of at most {MAX_MEMBERS} images")
    return [_docker_image(files, entry) for entry in entries]


def _docker_image(files: Files, entry: object) -> ImageInFiles:
    if not isinstance(entry, dict):
        raise InputError(f"{_DOCKER}: expected an object for each image, found {entry!r:.100}")
    config_path = _text(entry.get("Config"))
    document = parse_config(read_document(files, config_path))
    config = Descriptor(CONFIG, document.digest, len(document.data))
    paths = {config.digest: config_path}
    layers, unpacked = [], set()
    for path in map(_text, _list(entry, "Layers")):
        with files.open(path) as file:
            kind = compression_of(file)
            layer = _described(file, kind)
        paths[layer.digest] = path
        layers.append(layer)
        if kind not in _TYPES:
            unpacked.add(layer.digest)
    names = tuple(
        replace(Reference.parse(_text(name), what="the name of an image"), digest="", name="")
        for name in _list(entry, "RepoTags")
    )
    return ImageInFiles(names, Manifest.made_of(config, layers), document, (), paths, frozenset(unpacked))


def _described(file: io.BufferedReader, kind: str) -> Descriptor:
    """Return what a layer of a docker archive is as a blob, whose media type says how it is compressed."""
    out, counted = Hashed(), _Counted(file)
    reader = counted.buffered if kind in _TYPES else decompressed(counted.buffered)
    size = counted.copy_bounded(reader, out)
    return Descriptor(f"{LAYER}{_TYPES.get(kind, '')}", out.digest, size)


def _list(entry: dict[str, Any], name: str) -> list[Any]:
    found = entry.get(name)
    found = [] if found is None else found
    if not isinstance(found, list) or len(found) > MAX_MEMBERS:
        raise InputError(f"{_DOCKER}: {name}: expected a list of at most {MAX_MEMBERS}, found {found!r:.100}")
    return found


def _text(found: object) -> str:
    """Return a path or name of `manifest.json`; no path in it leads out of the archive."""
    if not isinstance(found, str) or not found or ".." in found.split("/") or found.startswith("/"):
        raise InputError(f"{_DOCKER}: expected the path of a file in the archive, found {found!r:.100}")
    return found


# --- writing --------------------------------------------------------------------------------------


def write_archive(
    out: Sink, images: Sequence[tuple[Sequence[Reference], Manifest]], blobs: BlobStore, *, docker: bool
) -> None:
    """Write images as a tar archive with an OCI image layout, the same bytes for the same images.

    Args:
        out: gets it.
        images: their names and manifests; what these name is in `blobs`.
        blobs: where it is.
        docker: for `docker load` as well, with its `manifest.json`.

    Raises:
        MachineError: a blob is not there.
        OSError: `out` can't be written.
    """
    entries = [
        replace(manifest.descriptor, annotations=_annotations(name, alone=len(images) == 1))
        for names, manifest in images
        for name in names or (None,)
    ]
    writer = LayerWriter(out)
    small = {_LAYOUT: canonical({"imageLayoutVersion": "1.0.0"}), _INDEX: Index.made_of(entries).data}
    if docker:
        small[_DOCKER] = canonical([_docker_entry(names, manifest) for names, manifest in images])
    for path, data in small.items():
        writer.add(Entry(path, FILE, 0o644, size=len(data)), data)
    named = {blob.digest: blob for _, manifest in images for blob in (manifest.descriptor, *manifest.blobs)}
    for folder in sorted({"blobs", *(f"blobs/{digest.partition(':')[0]}" for digest in named)}):
        writer.add(Entry(folder, DIRECTORY, 0o755))
    for digest in sorted(named):
        with open(blobs.required(digest), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != named[digest].size:
                raise MachineError(
                    f"{file.name} was modified after it was stored", hint="load the image again"
                )
            writer.add(Entry(blob_path(digest), FILE, 0o644, size=size), file.fileno())
    writer.close()


def _annotations(name: Reference | None, *, alone: bool) -> dict[str, str]:
    """Name an entry as containerd does; skopeo and umoci go by the tag, which several images may share."""
    if name is None or name.is_untagged:
        return {}
    return {IMAGE_NAME: name.full, REF_NAME: name.tag if alone else str(name)}


def _docker_entry(names: Sequence[Reference], manifest: Manifest) -> dict[str, Any]:
    return {
        "Config": blob_path(manifest.config.digest),
        "RepoTags": [f"{name.familiar}:{name.tag}" for name in names if not name.is_untagged],
        "Layers": [blob_path(layer.digest) for layer in manifest.layers],
    }
