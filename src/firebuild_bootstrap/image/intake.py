"""Importing images: from their blobs to layers that builds start from, and to a record in the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from firebuild_bootstrap import __version__
from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.attestations import reuse_documents
from firebuild_bootstrap.image.blobs import NOT_AS_ANNOUNCED, BlobStore
from firebuild_bootstrap.image.forms import reuse_forms
from firebuild_bootstrap.image.layertrees import LayerTrees, OutsideLayer, chain_key
from firebuild_bootstrap.image.names import UNTAGGED, Reference
from firebuild_bootstrap.image.oci import ImageDocument, Manifest, check_image
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.image.store import (
    ImageLayer,
    ImageRecord,
    ImageSource,
    ImageStore,
    StoredImage,
    has_id,
)
from firebuild_bootstrap.image.trees import DamagedArchiveError, file_size
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.layers.reader import DamagedArchive
from firebuild_bootstrap.layers.tar import Hashed
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.image.layouts import ImageInFiles


@dataclass(frozen=True)
class Loaded:
    """What was in a file or directory.

    Args:
        kind: what it is, for people; empty for a root file system, which has no image in it.
        images: those that are in the store now, held until that is closed.
    """

    kind: str
    images: tuple[StoredImage, ...] = ()


class Intake:
    """Takes images in.

    Args:
        images: where their records go.
        layers: where their layers are unpacked.
        blobs: where they have come to.
        naming: the block in which an image is published that needs the layers of these keys, see `Cache`.
        tasks: told of all that may take a while.
    """

    def __init__(
        self,
        images: ImageStore,
        layers: LayerTrees,
        blobs: BlobStore,
        *,
        naming: Callable[[Iterable[str]], AbstractContextManager[None]],
        tasks: Tasks,
    ) -> None:
        self._images = images
        self._layers = layers
        self._blobs = blobs
        self._naming = naming
        self._tasks = tasks
        self._platform = Platform.host()

    def take_in(
        self,
        tags: Sequence[Reference],
        manifest: Manifest,
        document: ImageDocument,
        *,
        digests: Sequence[str] = (),
        origin: str = "",
        pulled: bool = False,
        report: Callable[[UnpackReport], object] = lambda _: None,
    ) -> StoredImage:
        """Unpack the layers of an image whose blobs are in the store, and keep it under its names.

        Of an image that has one of the names and is the same, all that is known stays known; of one that was
        built here under another name, all that is known of its build.
        Nothing is kept of an image that is refused, but for layers and blobs that the next `prune` removes.

        Args:
            tags: its names; without any it is called by its digest.
            manifest: `Manifest.blobs` are held by the caller.
            document: its configuration.
            digests: more digests that FROM may name it by, such as that of its index.
            origin: where it is from, for display.
            pulled: it is from a registry.
            report: told what each layer could not keep.

        Returns:
            the image, held until the store of images is closed.

        Raises:
            InputError: the image is not what it says, a layer is damaged, or unpacks to too much.
            MachineError: a blob is not there, or the store can't be written.
        """
        check_image(manifest, document, self._platform)
        source = ImageSource(
            replace(manifest.descriptor, digest=self._blobs.add(manifest.data)),
            replace(manifest.config, digest=self._blobs.add(document.data)),
            tuple(digests),
            origin,
            pulled,
        )
        outside = map(OutsideLayer, document.diff_ids, manifest.layers)
        layers, key = list[ImageLayer](), ""
        for each in outside:
            key = chain_key(key, each.diff_id)
            layers.append(ImageLayer(each.blob.size, key=key, outside=each))
        self._unpack(layers, report)
        layers = [replace(layer, size=self._layers.size(layer.key)) for layer in layers]
        tag, *others = tags or (Reference.parse(f"{UNTAGGED}/{manifest.digest[7:19]}"),)
        record = ImageRecord(
            tag=str(tag),
            also_tagged=tuple(map(str, others)),
            build_id="",
            created=document.created or datetime.now(UTC).isoformat(timespec="seconds"),
            firebuild_version=__version__,
            config=document.config,
            layers=tuple(layers),
            layer_store=self._layers.root.name if layers else "",
            platform=str(document.platform),
            source=source,
            history=document.history,
        )
        found = [self._images.find(each, hold=True) for each in (tag, *others)]
        same = next((each for each in found if each and has_id(each, document, self._layers)), None)
        if same is None:
            same = self._built(document)
            if same is not None:  # where that was from says nothing of these names
                record = replace(record.joined(same.record), source=source)
        else:
            record = record.joined(same.record)
            if all(each and each.record.source == record.source for each in found):
                return same
        with self._images.stage() as staging, self._naming([layer.key for layer in layers]):
            if same is not None:
                reuse_forms(same.directory, staging.path)
                reuse_documents(same.directory, staging.path)
            self._images.commit(staging, record)
            image = self._images.find(tag, hold=True)
        if image is None:
            raise MachineError(f"the image {tag} was removed while it was stored", hint="try again")
        return image

    def _built(self, document: ImageDocument) -> StoredImage | None:
        """Return and hold an image of this id that was built here, under any name."""
        found = self._images.find(Reference.parse(document.digest), hold=True)
        return found if found is not None and found.record.build_id else None

    def load(
        self,
        source: Path,
        spool: Path,
        *,
        name: Reference | None = None,
        only: str | None = None,
        report: Callable[[UnpackReport], object] = lambda _: None,
        root: Callable[[Path, str], object] = lambda *_: None,
    ) -> Loaded:
        """Take all images in that a directory or archive has.

        Args:
            source: an OCI image layout or docker archive, or a root file system.
            spool: as for `layouts.opened`.
            name: of the image, if there is one only; by default what it is called there.
            only: take one image, and give it no name: that with this tag or digest, or the only one if empty.
            report: as for `take_in`.
            root: called with the path of a root file system, while that can be read, and what it is called.

        Raises:
            InputError: as `take_in`; it is neither; an image has no name.
            MachineError: as `take_in`.
        """
        from firebuild_bootstrap.image import layouts

        with layouts.naming(source), layouts.opened(source, spool) as (files, path):
            kind = layouts.kind_of(files)
            if not kind:
                root(path, layouts.called(source))
                return Loaded("")
            found = layouts.images_in(files, self._platform, only or "")
            if only is not None:
                found = [_chosen(found, only, source)]
            elif problem := _unnamed(found, name):
                raise InputError(f"{layouts.called(source)} has {problem[0]}", hint=problem[1])
            images = []
            for each in found:
                check_image(each.manifest, each.document, self._platform)  # before a byte of it is copied
                self._blobs.make_room(each.manifest.blobs)
                with self._tasks.task("copying the layers"):
                    each.copy_to(self._blobs, files)
                images.append(
                    self.take_in(
                        () if only is not None else (name,) if name else each.names,
                        each.manifest,
                        each.document,
                        digests=each.digests,
                        origin=f"{kind} {source}",
                        report=report,
                    )
                )
        return Loaded(kind, tuple(images))

    def unpack(self, image: StoredImage) -> None:
        """Make sure that the layers of an image which came from outside are unpacked, and hold them.

        A loss of power may have taken them, or they are wanted for other owners than before; their blobs are
        there.

        Raises:
            InputError, MachineError: as `take_in`.
        """
        self._unpack(image.record.layers or ())

    def has_all_blobs(self, image: StoredImage) -> bool:
        """Whether nothing has to be fetched of an image that came from outside."""
        return all(self._blobs.path(blob.digest).exists() for blob in image.record.blobs)

    def _unpack(
        self, layers: Sequence[ImageLayer], report: Callable[[UnpackReport], object] = lambda _: None
    ) -> None:
        keys, trees = list[str](), list[Path]()
        for layer in layers:
            if layer.outside is None:
                return  # what is built on them is there, or lost
            write = partial(self.decompress, layer.outside)
            try:
                below = self._layers.below(layer.key, keys, trees)
                tree, lost = self._layers.unpacked_from(write, layer.key, below)
            except DamagedArchiveError as error:
                raise InputError(
                    f"the layer {layer.outside.blob.digest} can't be unpacked: {error.reason}",
                    hint=NOT_AS_ANNOUNCED,
                ) from error
            report(lost)
            keys.append(layer.key)
            trees.append(tree)

    def decompress(self, layer: OutsideLayer, archive: Path) -> None:
        """Decompress the blob of a layer, which is in the store, into a new file, and verify what comes out.

        Raises:
            InputError: it is damaged, more than `layouts.most_of` allows, or not the layer that it claims.
            MachineError: the blob is not there, or the disk is full.
        """
        from firebuild_bootstrap.image.layouts import decompress_bounded

        what = f"the layer {layer.blob.digest}"
        path = self._blobs.required(layer.blob.digest)
        try:
            with (
                self._tasks.task("decompressing a layer", measure=lambda: file_size(archive)),
                open(archive, "wb") as file,
            ):
                out = Hashed(file)
                decompress_bounded(path, out, archive)
        except DamagedArchive as error:
            _check_blob(path, layer.blob.digest)
            raise InputError(f"{what} is damaged: {error.message}", hint=error.hint) from error
        except OSError as error:
            raise MachineError(f"{path} can't be read: {error.strerror}") from error
        if out.digest != layer.diff_id:
            _check_blob(path, layer.blob.digest)
            raise InputError(
                f"{what} unpacks to an archive with the digest {out.digest}, and not {layer.diff_id}",
                hint=NOT_AS_ANNOUNCED,
            )
        if not archive.stat().st_size:  # as some builders of old wrote a step that changes nothing
            archive.write_bytes(bytes(1024))


def _check_blob(path: Path, digest: str) -> None:
    """Tell a blob that was damaged on the disk from one that came so."""
    algorithm = digest.partition(":")[0]
    with open(path, "rb") as file:
        if hashlib.file_digest(file, algorithm).hexdigest() != digest.partition(":")[2]:
            raise MachineError(
                f"{path} was modified after it was stored, or the disk is failing",
                hint="`firebuild store check --repair` removes it; then load or pull its image again",
            )


def _unnamed(found: Sequence[ImageInFiles], name: Reference | None) -> tuple[str, str] | None:
    """Say why images can't be kept under their names, or one that is given, with a hint; None if they can."""
    whole = all(each.names for each in found)
    if len(found) == 1:
        return None if whole or name else ("an image without a name", "give it one: --name NAME[:TAG]")
    if whole and name is None:
        return None
    if whole:
        return f"{len(found)} images, and one name is given", "leave --name out: they keep their own names"
    tags = ", ".join(each.tag or each.manifest.digest for each in found if not each.names)
    return (
        f"{len(found)} images, and what they are called there is no whole name: {one_line(tags, 300)}",
        "load one at a time: `skopeo copy oci:DIRECTORY:TAG oci-archive:FILE`, and give it a --name",
    )


def _chosen(found: Sequence[ImageInFiles], wanted: str, source: Path) -> ImageInFiles:
    chosen = [each for each in found if not wanted or wanted in each.selectors]
    if len(chosen) == 1:
        return chosen[0]
    there = ", ".join(sorted(tag for each in found for tag in each.selectors if ":" not in tag))
    raise InputError(
        f"{source} has {counted(len(chosen), 'image')}{f' called {wanted}' if wanted else ''}, "
        "and one is wanted",
        hint=f"name one by its tag, PATH:TAG, or its digest, PATH@DIGEST; tags there are {there or 'none'}",
    )
