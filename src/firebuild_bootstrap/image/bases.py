"""Bases, which builds start FROM: root file systems that the user imported, and finished images."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import InputError, MachineError, hint_before
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.content_store import ContentStore, Key, damaged_record, readable
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, chain_key, store_name
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputType
from firebuild_bootstrap.image.store import ImageSource, ImageStore, StoredImage
from firebuild_bootstrap.image.trees import PackedFile, Trees, file_size
from firebuild_pki.values import dataclass

_ARCHIVE: Final = "rootfs.tar"
Pull = Callable[[Reference], StoredImage | None]
"""Fetches an image from its registry into the store of images, holds it there, and returns it.

None where no registry has it. What else goes wrong is raised.
"""
HOST_CONFIG: Final = ImageConfig(cmd=("/bin/sh",))


def _now() -> datetime:
    return datetime.now(UTC)


class PullPolicy(StrEnum):
    """When a registry is asked. What was imported, built or loaded here is never pulled."""

    MISSING = "missing"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A root file system to start from.

    Args:
        name: with its tag, `debian:12`.
        layers: what it is made of, the lowest first: of an imported one a single archive.
        digest: names its files, wherever they came from: `sha256:…` of the archive; of several layers their
            ChainID (OCI image-spec, config.md).
        size: bytes of all layers.
        imported: RFC 3339, in UTC.
        history: how it was made, as in an OCI image configuration, as far as that is known.
        source: what an image from outside was there; None for all others.
        build_id: of the build that made it; empty for what came from outside.
    """

    name: str
    layers: tuple[Layer, ...]
    digest: str
    size: int
    imported: str
    config: ImageConfig
    history: tuple[Mapping[str, Any], ...] = ()
    source: ImageSource | None = None
    build_id: str = ""

    @property
    def archive(self) -> Path:
        """The uncompressed tar archive of an imported base."""
        (layer,) = self.layers
        if not isinstance(layer, ArchiveLayer):
            raise TypeError(f"{self.name} is not an imported base")
        return layer.path


class BaseStore:
    """Bases by name, below `home`/bases.

    Args:
        trees: asked for what packs directories with their owners, when there is one to pack.
        images: finished images, which FROM may name too.
        identify: returns the id of an image, `sha256:…`, for FROM with a digest.
        diff_ids: returns the digests of the layers of an image without compression, the lowest first.
        pull: fetches what is not there; None where no registry can be asked.
        policy: when it does.
        unpack: makes sure that the layers of an image which came from outside are unpacked, and holds them.
        clock: tells the time of an import.
        tasks: told of all that may take a while.
    """

    def __init__(
        self,
        home: Path,
        trees: Callable[[], Trees],
        *,
        images: ImageStore | None = None,
        identify: Callable[[StoredImage], str] = lambda _: "",
        diff_ids: Callable[[StoredImage], Sequence[str]] = lambda _: (),
        pull: Pull | None = None,
        policy: PullPolicy = PullPolicy.MISSING,
        unpack: Callable[[StoredImage], None] = lambda _: None,
        clock: Callable[[], datetime] = _now,
        tasks: Tasks | None = None,
    ) -> None:
        self._contents = ContentStore(home / "bases", lambda path: trees().remove(path))
        self._trees = trees
        self._images = images
        self._identify = identify
        self._diff_ids = diff_ids
        self._pull = pull if policy is not PullPolicy.NEVER else None
        self._policy = policy
        self._unpack = unpack
        self._clock = clock
        self._tasks = tasks or Tasks()

    def close(self) -> None:
        """Let go of the bases that `resolve` holds."""
        self._contents.close()
        if self._images is not None:
            self._images.close()

    def import_base(
        self, name: str, source: Path, config: ImageConfig | None = None, *, called: str = ""
    ) -> Base:
        """Keep a directory or tar archive (plain, gz, bz2, xz, zst) as the base `name`.

        An older base of that name is replaced.

        Args:
            name: of the base.
            source: the directory or archive.
            config: what its images inherit.
            called: what the source is called in messages, by default its path.

        Raises:
            InputError: the name or the source is wrong.
            MachineError: the store can't be written, or the source not be read in the build's id mapping.
        """
        from firebuild_bootstrap.image.archives import check_root_archive, decompress, refuse_container_image

        called = called or str(source)
        if not source.exists():
            raise InputError(f"{called} does not exist", hint="expected a directory or a tar archive")

        if source.is_dir():
            refuse_container_image(called, _names_in(source))

        def fill(archive: Path) -> PackedFile:
            if source.is_dir():
                return self._trees().pack(source, archive)
            try:
                with self._tasks.task(f"reading {Path(called).name}", measure=lambda: file_size(archive)):
                    size, digest = decompress(source, archive, name=called)
            except OSError as error:
                raise MachineError(
                    f"{called} could not be copied into the store at {archive.parent}: {error.strerror}",
                    hint="is the file readable, and is there space on the disk?",
                ) from error
            with self._tasks.task("checking the archive", total=size):
                check_root_archive(archive, called)
            return PackedFile(size, digest)

        return self._keep(name, fill, config or ImageConfig())

    def create_from_host(self, name: str) -> Base:
        """Make a base of this host's shell and core tools; it needs no download and no root.

        Raises:
            InputError: the name is wrong.
            MachineError: the host lacks a shell or `ldd`, or the store can't be written.
        """
        from firebuild_bootstrap.image.hostbase import make_host_tree

        def fill(archive: Path) -> PackedFile:
            tree = archive.with_name("tree")
            tree.mkdir()
            with self._tasks.task("collecting this host's programs"):
                make_host_tree(tree)
            # The times are those of this import: without them the same programs have the same digest.
            packed = self._trees().pack(tree, archive, newest=0)
            self._trees().remove(tree)
            return packed

        return self._keep(name, fill, HOST_CONFIG)

    def list(self, damaged: Callable[[MachineError], object] = lambda _: None) -> list[Base]:
        """Return all bases that can be read, sorted by name.

        Args:
            damaged: told of each of the others.
        """
        return list(readable(self._contents, self._read, damaged))

    def find(self, reference: Reference) -> Base | None:
        """Return the base of a name, held until `close`, or None.

        Raises:
            MachineError: its `base.json` is damaged.
        """
        return self._read(self._key(reference), hold=True)

    def remove(self, name: str) -> None:
        """Remove a base.

        Raises:
            InputError: there is none of that name.
            MachineError: the store can't be written.
        """
        reference = Reference.parse_tag(name)
        if not self._contents.discard(self._key(reference)):
            names = [str(name) for name in self.names()]
            raise InputError(f"unknown base {reference}", hint=_known(str(reference), names))

    def names(self) -> tuple[Reference, ...]:
        """Return the names of all bases, sorted; no base is read for that."""
        return tuple(
            sorted(Reference.parse(f"{name.replace('+', '/')}:{tag}") for name, tag in self._contents.names())
        )

    def sweep(self) -> None:
        """Remove what crashed imports left in the store."""
        self._contents.sweep()

    def resolve(self, reference: str) -> Base:
        """Return what FROM names: a base, a finished image, or else one of a registry. Held until `close`.

        The layers of an image that are in the store of layers are not held: whoever uses them does that.

        Raises:
            InputError: there is no such base; the message lists those there are and how to import one.
            MachineError: the store is damaged.
        """
        wanted = Reference.parse(reference, what="a base such as debian or debian:12")
        base = self.find(wanted)
        if base is None:
            return self._image(wanted)
        _check_digest(wanted, f"the base {base.name}", base.digest)
        return base

    def _keep(self, name: str, fill: Callable[[Path], PackedFile], config: ImageConfig) -> Base:
        reference = Reference.parse_tag(name)
        with self._contents.stage() as staging:
            packed = fill(staging.path / _ARCHIVE)
            document = {
                "name": str(reference),
                "digest": packed.digest,
                "size": packed.size,
                "imported": self._clock().isoformat(timespec="seconds"),
                "config": config.as_json(),
            }
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (staging.path / "base.json").write_text(text, "utf-8")
            with self._tasks.task("storing the base"):
                directory = self._contents.publish(staging, self._key(reference))
            return _base(document, directory)

    def _read(self, key: Key, *, hold: bool = False) -> Base | None:
        def damaged(path: Path, error: Exception) -> MachineError:
            return damaged_record(path, error, "import the base again")

        with self._contents.record(key, "base.json", damaged, hold=hold) as path:
            return None if path is None else _base(json.loads(path.read_text("utf-8")), path.parent)

    def _key(self, reference: Reference) -> Key:
        """Return where a base is: under an older spelling of its name if it is there."""
        keys = [_key_of(spelling, reference.tag) for spelling in reference.spellings]
        return next(filter(self._contents.has, keys), keys[0])

    def _image(self, wanted: Reference) -> Base:
        image = self._found(wanted)
        record = image.record
        if record.layers is None:
            old = self._old_layer(image)
            layers: tuple[Layer, ...] = (old,)
            _check_digest(wanted, f"the image {image.tag}", old.digest)
        else:
            layers = image.layers(store_name(self._trees().sandbox.idmap))
            if wanted.digest and not _has_digest(image, wanted):
                _check_digest(wanted, f"the image {image.tag}", self._identify(image))
            self._unpack(image)
        match layers:
            case (ArchiveLayer(_, digest),):
                pass
            case _:
                digest = reduce(chain_key, self._diff_ids(image), "")
        return Base(
            name=str(image.tag),
            layers=layers,
            digest=digest,
            size=record.size,
            imported=record.created,
            config=record.config,
            history=record.history,
            source=record.source,
            build_id=record.build_id,
        )

    def _found(self, wanted: Reference) -> StoredImage:
        """Return an image of the store, pulled before if the policy says so."""
        images = self._images
        image = images.find(wanted, hold=True) if images is not None else None
        if images is not None and wanted.digest and (image is None or not _has_digest(image, wanted)):
            image = images.find_digest(wanted) or image
        stale = image is not None and image.record.source is not None and image.record.source.pulled
        if image is None:
            pulls = not wanted.is_id
        elif wanted.digest:
            pulls = stale and not _has_digest(image, wanted)
        else:
            pulls = stale and self._policy is PullPolicy.ALWAYS
        if pulls and self._pull is not None:
            try:
                image = self._pull(wanted) or image
            except InputError as error:
                if image is None:
                    raise self._unknown(wanted, error) from error
                raise
        if image is None:
            raise self._unknown(wanted)
        return image

    def _old_layer(self, image: StoredImage) -> ArchiveLayer:
        """Return the tar output of an image that an earlier version has built."""
        for output in image.record.outputs:
            if output.type is OutputType.TAR:
                return ArchiveLayer(image.directory / output.path, output.digest)
        raise InputError(
            f"the image {image.tag} is of an earlier version and has no tar output, which FROM needs",
            hint="build it again",
        )

    def _unknown(self, wanted: Reference, refused: InputError | None = None) -> InputError:
        """Return the error for what is neither base nor image; `refused` says why it could not be pulled."""
        if wanted.is_id:
            return InputError(
                f"no image of the store has the id {wanted}",
                hint="`firebuild images inspect TAG` shows one's id",
            )
        names = [base.name for base in self.list()]
        if self._images is not None:
            names += (str(name) for name in self._images.names() if not name.is_untagged)
        plain = str(replace(wanted, digest=""))
        command = f"`firebuild base import {plain.removesuffix(':latest')} DIRECTORY-OR-TAR`"
        if refused is None:
            known = _known(plain, names)
            return InputError(
                f"unknown base or image {plain}", hint=f"{known}; build it, or import it with {command}"
            )
        return InputError(
            f"{plain} is not in the store, and can't be pulled: {refused.message}",
            hint=f"{hint_before(refused.hint)}{_nearest(plain, names)}{command} makes a base of files",
        )


def _known(wanted: str, names: Sequence[str]) -> str:
    return _nearest(wanted, names) + (f"known are {', '.join(names)}" if names else "there are none yet")


def _nearest(wanted: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _has_digest(image: StoredImage, wanted: Reference) -> bool:
    return image.record.source is not None and wanted.digest in image.record.source.names


def _check_digest(wanted: Reference, what: str, digest: str) -> None:
    if wanted.digest and wanted.digest != digest:
        raise InputError(
            f"{what} has the digest {digest}, expected {wanted.digest}",
            hint=f"name that digest, or the base or image that has {wanted.digest[:19]}…",
        )


def _names_in(directory: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{directory} can't be read: {error.strerror}") from error


def _key_of(name: str, tag: str) -> Key:
    return name.replace("/", "+"), tag  # no name contains a plus


def _base(document: dict[str, Any], directory: Path) -> Base:
    return Base(
        name=document["name"],
        layers=(ArchiveLayer(Path(os.fspath(directory), _ARCHIVE), document["digest"]),),
        digest=document["digest"],
        size=document["size"],
        imported=document["imported"],
        config=ImageConfig.from_json(document["config"]),
    )
