"""Layouts and archives of images, good ones and others, made by hand."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from firebuild_bootstrap.image.blobs import digest_of
from firebuild_bootstrap.image.oci import CONFIG, LAYER, MANIFEST


def layer(files: Mapping[str, bytes | str | None], *, links: Mapping[str, str] | None = None) -> bytes:
    """Return a layer: content of files by path, None for directories; `links` are hard links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            else:
                data = content.encode() if isinstance(content, str) else content
                info.size, info.mode = len(data), 0o755
                archive.addfile(info, io.BytesIO(data))
        for path, target in (links or {}).items():
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)
    return out.getvalue()


@lru_cache(maxsize=16)
def _compressed(layer: bytes) -> bytes:
    return gzip.compress(layer, mtime=0)


@dataclass
class Made:
    """An image: its layers without compression, and what its documents say."""

    layers: Sequence[bytes]
    config: dict[str, Any] = field(default_factory=dict)
    name: str = "made:1"
    platform: str = "linux/amd64"
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def config_data(self) -> bytes:
        system, architecture = self.platform.split("/")
        document = {
            "os": system,
            "architecture": architecture,
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": [digest_of(each) for each in self.layers]},
            **self.document,
        }
        return json.dumps(document).encode()

    @property
    def blobs(self) -> list[bytes]:
        return [_compressed(each) for each in self.layers]

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": described(self.config_data, CONFIG),
            "layers": [described(blob, f"{LAYER}+gzip") for blob in self.blobs],
        }

    def layout(self, **annotations: str) -> dict[str, bytes]:
        """Return the files of an OCI image layout by their paths."""
        manifest = json.dumps(self.manifest).encode()
        names = annotations or {"io.containerd.image.name": self.name}
        entry = described(manifest, MANIFEST) | {"annotations": names}
        files = {
            "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        }
        return files | {blob_path(data): data for data in (manifest, self.config_data, *self.blobs)}

    def docker(self) -> dict[str, bytes]:
        """Return the files of a docker archive by their paths."""
        paths = [f"layer{number}/layer.tar" for number in range(len(self.layers))]
        entry = {"Config": "config.json", "RepoTags": [self.name], "Layers": paths}
        files = dict(zip(paths, self.layers, strict=True))
        return {"config.json": self.config_data, **files, "manifest.json": json.dumps([entry]).encode()}


def described(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def blob_path(data: bytes) -> str:
    return f"blobs/{digest_of(data).replace(':', '/')}"


def written(files: Mapping[str, bytes], directory: Path) -> Path:
    """Write files into a directory."""
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def packed(files: Mapping[str, bytes], archive: Path) -> Path:
    """Write files into a tar archive."""
    archive.write_bytes(layer(files))
    return archive
