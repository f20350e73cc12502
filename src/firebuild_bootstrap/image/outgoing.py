"""Exporting images: their layers as blobs, with manifest and configuration, for archives and registries."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerTrees, OutsideLayer, StoredLayer
from firebuild_bootstrap.image.layouts import write_archive
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import (
    CONFIG,
    LAYER,
    MAX_DOCUMENT,
    Descriptor,
    Manifest,
    parse_manifest,
)
from firebuild_bootstrap.image.outputs import GZIP, Compression, Deliveries, OutputSpec, OutputType
from firebuild_bootstrap.image.store import StoredImage, configuration
from firebuild_bootstrap.image.trees import Trees, file_size
from firebuild_bootstrap.layers.compression import compressing, decompressed
from firebuild_bootstrap.layers.tar import Hashed, LayerError

_PIECE: Final = 1024 * 1024


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

    def manifest(self, image: StoredImage, compression: Compression = GZIP) -> Manifest:
        """Return the manifest of an image; all that it names is in the store of blobs, and held.

        Raises:
            InputError, MachineError: as `StoredImage.layers`; a layer or blob is not there; the disk is full.
        """
        record = image.record
        if record.source is not None and not compression.force:
            data = self._blobs.read(record.source.manifest.digest, MAX_DOCUMENT)
            manifest = parse_manifest(data, record.source.manifest.media_type)
            if not isinstance(manifest, Manifest):
                raise MachineError(f"the manifest of {image.tag} is an index", hint="load the image again")
            for blob in manifest.blobs:
                self._blobs.required(blob.digest)
            return manifest
        stored = image.layers(self._layers.root.name)
        layers = [self._layer(layer, record.epoch, compression) for layer in stored]
        if record.source is not None:
            data = self._blobs.read(record.source.config.digest, MAX_DOCUMENT)
        else:
            data = configuration(image, self._layers)  # the diff ids are known by now
        config = Descriptor(CONFIG, self._blobs.add(data), len(data))
        manifest = Manifest.made_of(config, layers)
        self._blobs.add(manifest.data)
        return manifest

    def write(
        self, images: Sequence[tuple[Sequence[Reference], StoredImage]], out: IO[bytes], spec: OutputSpec
    ) -> None:
        """Write images, under the names that are given, as one archive.

        Raises:
            InputError, MachineError: as `manifest`.
            OSError: `out` can't be written.
        """
        made = [(names, self.manifest(image, spec.compression)) for names, image in images]
        write_archive(out, made, self._blobs, docker=spec.type is OutputType.DOCKER)

    def deliver(
        self,
        images: Sequence[tuple[Sequence[Reference], StoredImage]],
        spec: OutputSpec,
        deliveries: Deliveries,
    ) -> None:
        """Write an archive for `spec.dest`.

        Raises:
            InputError, MachineError: as `manifest`, or it can't be written.
        """
        if spec.dest is None:
            raise InputError(f"--output {spec.type.value}: it has to go to a file", hint="add dest=FILE")
        with deliveries.writing(spec.dest) as partial, open(partial, "r+b") as file:
            self.write(images, file, spec)
            file.flush()
            os.fsync(file.fileno())

    def of_step(self, key: str) -> tuple[str, Descriptor]:
        """Return the diff id of the layer of a step, and its blob, which is held.

        Raises:
            MachineError: the layer is not there, or the disk is full.
        """
        blob = self._layer(StoredLayer(key), None, GZIP)
        return self._layers.digest(key), blob

    def _layer(self, layer: Layer, epoch: int | None, compression: Compression) -> Descriptor:
        """Return the blob of a layer, which is made unless it is there."""
        if isinstance(layer, ArchiveLayer):
            return self._made(layer.digest, compression) or self._of_file(
                layer.path, layer.digest, compression
            )
        if layer.outside is not None:
            return self._of_outside(layer.outside, compression)
        diff_id = self._layers.known_digest(layer.key, epoch)
        if diff_id and (blob := self._made(diff_id, compression)):
            return blob
        with self._blobs.making() as path:
            packed = self._trees.pack_layer(
                self._layers.required(layer.key), path, compression.kind, compression.level, newest=epoch
            )
            self._layers.note_digest(layer.key, packed.diff_id, epoch)
            return self._keep(path, packed.diff_id, packed.digest, compression)

    def _of_outside(self, layer: OutsideLayer, compression: Compression) -> Descriptor:
        path = self._blobs.required(layer.blob.digest)
        if not compression.force or _compression_of(layer.blob.media_type) == compression.kind:
            return layer.blob
        return self._made(layer.diff_id, compression) or self._of_file(path, layer.diff_id, compression)

    def _of_file(self, archive: Path, diff_id: str, compression: Compression) -> Descriptor:
        """Make the blob of a layer whose archive, compressed or not, is a file."""
        with self._blobs.making() as path:
            try:
                with (
                    self._trees.tasks.task("compressing a layer", measure=lambda: file_size(path)),
                    open(archive, "rb") as file,
                    decompressed(file) as source,
                    open(path, "r+b") as target,
                ):
                    out, plain = Hashed(target), Hashed()
                    with compressing(out, compression.kind, compression.level) as writer:
                        while piece := source.read(_PIECE):
                            plain.write(piece)
                            writer.write(piece)
            except OSError as error:
                raise MachineError(f"{archive} could not be compressed: {error.strerror}") from error
            except LayerError as error:
                raise MachineError(f"{archive}: {error.message}", hint=error.hint) from error
            if plain.digest != diff_id:
                raise MachineError(
                    f"{archive} was modified after it was stored", hint="import, pull or load the image again"
                )
            return self._keep(path, diff_id, out.digest, compression)

    def _made(self, diff_id: str, compression: Compression) -> Descriptor | None:
        made = self._blobs.made_of(diff_id, compression.form)
        return None if made is None else Descriptor(f"{LAYER}{compression.suffix}", *made)

    def _keep(self, path: Path, diff_id: str, digest: str, compression: Compression) -> Descriptor:
        size = path.stat().st_size
        self._blobs.adopt(path, digest)
        self._blobs.note_made(diff_id, compression.form, digest, size)
        return Descriptor(f"{LAYER}{compression.suffix}", digest, size)


def _compression_of(media_type: str) -> str:
    """Return how a layer of this type is compressed; `.` comes before it in Docker's types."""
    ending = re.search(r"[+.](gzip|zstd)$", media_type)
    return ending[1] if ending else "uncompressed"
