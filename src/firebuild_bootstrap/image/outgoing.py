"""Images that go out: their layers as blobs, with manifest and configuration, for archives and registries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerTrees, StoredLayer
from firebuild_bootstrap.image.layouts import write_archive
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import (
    CONFIG,
    LAYER,
    MAX_DOCUMENT,
    Descriptor,
    ImageDocument,
    Manifest,
    parse_manifest,
)
from firebuild_bootstrap.image.outputs import OutputSpec, OutputType, whole_or_not
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.image.store import StoredImage
from firebuild_bootstrap.image.trees import Trees, file_size
from firebuild_bootstrap.layers.compression import GzipWriter
from firebuild_bootstrap.layers.tar import Hashed

_PIECE = 1024 * 1024


class Outgoing:
    """Makes blobs of images.

    A layer that came from outside is the blob that it was there. Of the others the canonical archive is
    compressed, once: the blob is kept until nobody has asked for it when the store is pruned.

    Args:
        layers: where the layers of the images are.
        blobs: gets theirs.
        trees: reads the layers in the id mapping of the builds.
    """

    def __init__(self, layers: LayerTrees, blobs: BlobStore, trees: Trees) -> None:
        self._layers = layers
        self._blobs = blobs
        self._trees = trees

    def manifest(self, image: StoredImage) -> Manifest:
        """Return the manifest of an image; all that it names is in the store of blobs, and held.

        Raises:
            InputError, MachineError: as `StoredImage.layers`; a layer or blob is not there; the disk is full.
        """
        record = image.record
        if record.source is not None:
            data = self._blobs.read(record.source.manifest.digest, MAX_DOCUMENT)
            manifest = parse_manifest(data, record.source.manifest.media_type)
            if not isinstance(manifest, Manifest):
                raise MachineError(f"the manifest of {image.tag} is an index", hint="load the image again")
            for blob in manifest.blobs:
                self._blobs.required(blob.digest)
            return manifest
        layers = [self._layer(layer, record.epoch) for layer in image.layers(self._layers.root.name)]
        document = ImageDocument.made_of(
            Platform.parse(record.platform),
            record.config,
            [diff_id for diff_id, _ in layers],
            history=record.history,
            created=record.created,
        )
        config = Descriptor(CONFIG, self._blobs.add(document.data), len(document.data))
        manifest = Manifest.made_of(config, [blob for _, blob in layers])
        self._blobs.add(manifest.data)
        return manifest

    def write(
        self, images: Sequence[tuple[Sequence[Reference], StoredImage]], out: IO[bytes], kind: OutputType
    ) -> None:
        """Write images, under the names that are given, as one archive.

        Raises:
            InputError, MachineError: as `manifest`.
            OSError: `out` can't be written.
        """
        made = [(names, self.manifest(image)) for names, image in images]
        write_archive(out, made, self._blobs, docker=kind is OutputType.DOCKER)

    def deliver(self, images: Sequence[tuple[Sequence[Reference], StoredImage]], spec: OutputSpec) -> None:
        """Write an archive to `spec.dest` so that it is there completely or not at all.

        Raises:
            InputError, MachineError: as `manifest`, or it can't be written; nothing of it is left.
        """
        dest = spec.dest
        if dest is None:
            raise InputError(f"--output {spec.type.value}: it has to go to a file", hint="add dest=FILE")
        with (
            whole_or_not(dest, self._trees) as partial,
            self._trees.tasks.task(f"writing {dest}", measure=lambda: file_size(partial)),
            open(partial, "r+b") as file,
        ):
            self.write(images, file, spec.type)
            file.flush()
            os.fsync(file.fileno())

    def of_step(self, key: str) -> tuple[str, Descriptor]:
        """Return the diff id of the layer of a step, and its blob, which is held.

        Raises:
            MachineError: the layer is not there, or the disk is full.
        """
        _, blob = self._layer(StoredLayer(key), None)
        return self._layers.digest(key), blob

    def _layer(self, layer: Layer, epoch: int | None) -> tuple[str, Descriptor]:
        """Return the diff id of a layer and its blob, which is made unless it is there."""
        if isinstance(layer, ArchiveLayer):
            return layer.digest, self._of_archive(layer)
        if layer.outside is not None:
            self._blobs.required(layer.outside.blob.digest)
            return layer.outside.diff_id, layer.outside.blob
        diff_id = self._layers.known_digest(layer.key, epoch)
        if diff_id and (blob := self._made(diff_id)):
            return diff_id, blob
        with self._blobs.making() as path:
            packed = self._trees.pack_layer(self._layers.required(layer.key), path, newest=epoch)
            self._layers.note_digest(layer.key, packed.diff_id, epoch)
            return packed.diff_id, self._keep(path, packed.diff_id, packed.digest)

    def _of_archive(self, layer: ArchiveLayer) -> Descriptor:
        if blob := self._made(layer.digest):
            return blob
        with self._blobs.making() as path:
            try:
                with (
                    self._trees.tasks.task("compressing a layer", total=layer.path.stat().st_size),
                    open(layer.path, "rb") as source,
                    open(path, "r+b") as file,
                ):
                    out = Hashed(file)
                    with GzipWriter(out) as writer:
                        while piece := source.read(_PIECE):
                            writer.write(piece)
            except OSError as error:
                raise MachineError(f"{layer.path} could not be compressed: {error.strerror}") from error
            return self._keep(path, layer.digest, out.digest)

    def _made(self, diff_id: str) -> Descriptor | None:
        made = self._blobs.made_of(diff_id)
        return None if made is None else Descriptor(f"{LAYER}+gzip", *made)

    def _keep(self, path: Path, diff_id: str, digest: str) -> Descriptor:
        size = path.stat().st_size
        self._blobs.adopt(path, digest)
        self._blobs.note_made(diff_id, digest, size)
        return Descriptor(f"{LAYER}+gzip", digest, size)
