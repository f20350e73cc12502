"""Manifests, indexes and configurations of images, as OCI and Docker have them.

What is read here comes from registries and archives: its size, its depth and the number of its parts are
bounded, and every error says which document is wrong, and where. The sources of the rules: descriptor.md,
manifest.md, image-index.md and config.md of the OCI image specification, and Docker's "Image Manifest
Version 2, Schema 2".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Final

from firebuild_bootstrap.errors import UNUSABLE_TEXT, InputError
from firebuild_bootstrap.image.blobs import DIGEST, NOT_AS_ANNOUNCED, BlobError, digest_of
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.platforms import Platform
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

MAX_DOCUMENT: Final = 4 * 1024 * 1024
"""Bytes of a manifest, an index or a configuration; registries take no more (distribution spec, "Push")."""
MAX_MEMBERS: Final = 1024
"""Layers of a manifest, and images of an index: two open files for each layer are half of the 4096 that the
kernel lets every process have (`INR_OPEN_MAX`), and its overlays end at 500 layers (`OVL_MAX_STACK`)."""
_MAX_INDEXES: Final = 3  # one in the other; more are a loop, or no image (image-index.md)
_MAX_HISTORY: Final = 10_000
_MAX_TEXT: Final = 4096

_OCI: Final = "application/vnd.oci.image"
_DOCKER: Final = "application/vnd.docker"
MANIFEST: Final = f"{_OCI}.manifest.v1+json"
INDEX: Final = f"{_OCI}.index.v1+json"
CONFIG: Final = f"{_OCI}.config.v1+json"
LAYER: Final = f"{_OCI}.layer.v1.tar"
DOCKER_MANIFEST: Final = f"{_DOCKER}.distribution.manifest.v2+json"
DOCKER_LIST: Final = f"{_DOCKER}.distribution.manifest.list.v2+json"
DOCKER_CONFIG: Final = f"{_DOCKER}.container.image.v1+json"
MANIFESTS: Final = (MANIFEST, DOCKER_MANIFEST)
INDEXES: Final = (INDEX, DOCKER_LIST)
ACCEPTED: Final = (*MANIFESTS, *INDEXES)
"""What a registry may answer with, for the header Accept."""
_OLD: Final = (f"{_DOCKER}.distribution.manifest.v1+json", f"{_DOCKER}.distribution.manifest.v1+prettyjws")
# How layers are compressed is found out from their first bytes, whatever their type says.
_LAYERS: Final = re.compile(
    r"application/vnd\.oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+(gzip|zstd))?"
    r"|application/vnd\.docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.(gzip|zstd))?"
    r"|application/vnd\.docker\.image\.rootfs\.diff\.tar"
)

REF_NAME: Final = "org.opencontainers.image.ref.name"
"""Annotation of a manifest in the index of a layout: how it is called there (annotations.md)."""
IMAGE_NAME: Final = "io.containerd.image.name"
"""The same by its full name, as containerd, docker and nerdctl write it."""


@dataclass(frozen=True)
class Descriptor:
    """What names a blob: its type, its digest and its size in bytes.

    Args:
        platform: of a manifest in an index; None where it says none.
        annotations: of an index's manifest or a layer.
        artifact_type: of an index's manifest that is no image but something like a list of packages.
    """

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as in a manifest."""
        document: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.platform is not None:
            document["platform"] = {"os": self.platform.os, "architecture": self.platform.architecture}
            if self.platform.variant:
                document["platform"]["variant"] = self.platform.variant
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        return document

    @property
    def is_image(self) -> bool:
        """Whether an entry of an index is an image; attestations and other artifacts stand beside them."""
        unknown = self.platform is not None and self.platform.os == "unknown"
        artifact = self.artifact_type not in ("", CONFIG, DOCKER_CONFIG)
        return self.media_type in ACCEPTED and not unknown and not artifact

    @classmethod
    def from_json(cls, document: object, what: str = "a descriptor") -> Descriptor:
        """Read one.

        Raises:
            InputError: it is malformed; `what` names it in the message.
        """
        members = _Object(document, what)
        digest = members.text("digest")
        if DIGEST.fullmatch(digest) is None:
            raise InputError(f"{what}: expected a sha256 or sha512 digest, found {digest!r:.200}")
        platform = members.get("platform")
        if isinstance(platform, dict) and not platform.get("os") and not platform.get("architecture"):
            platform = None  # so programs in Go write it whose platform is no pointer
        return cls(
            media_type=members.text("mediaType"),
            digest=digest,
            size=members.number("size"),
            platform=None if platform is None else _platform(_Object(platform, f"{what}: platform")),
            annotations=members.texts("annotations"),
            artifact_type=members.text("artifactType", ""),
        )

    def check(self, data: bytes) -> bytes:
        """Return `data`, which is what it describes.

        Raises:
            BlobError: length or digest are others.
        """
        found = digest_of(data, self.digest.partition(":")[0])
        if len(data) != self.size or found != self.digest:
            raise BlobError(
                f"expected {counted(self.size, 'byte')} with the digest {self.digest}, "
                f"found {len(data)} with {found}",
                hint=NOT_AS_ANNOUNCED,
            )
        return data


@dataclass(frozen=True)
class Manifest:
    """One image: its configuration and its layers, the lowest first; `data` are its own bytes."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = MANIFEST
    data: bytes = b""

    @property
    def digest(self) -> str:
        """`sha256:…` of its bytes."""
        return digest_of(self.data)

    @property
    def descriptor(self) -> Descriptor:
        """What names it."""
        return Descriptor(self.media_type, self.digest, len(self.data))

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Everything that it names, each once."""
        return tuple({blob.digest: blob for blob in (self.config, *self.layers)}.values())

    @classmethod
    def made_of(cls, config: Descriptor, layers: Sequence[Descriptor]) -> Manifest:
        """Write a manifest: the same parts give the same bytes."""
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.as_json(),
            "layers": [layer.as_json() for layer in layers],
        }
        return cls(config, tuple(layers), MANIFEST, canonical(document))


@dataclass(frozen=True)
class Index:
    """Several images under one name, for platforms."""

    manifests: tuple[Descriptor, ...]
    media_type: str = INDEX
    data: bytes = b""

    @classmethod
    def made_of(cls, manifests: Sequence[Descriptor]) -> Index:
        """Write an index: the same entries give the same bytes."""
        entries = [entry.as_json() for entry in manifests]
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}
        return cls(tuple(manifests), INDEX, canonical(document))

    @property
    def digest(self) -> str:
        """`sha256:…` of its bytes."""
        return digest_of(self.data)

    def choose(self, platform: Platform) -> Descriptor:
        """Return the manifest (or index) for a platform, as containerd chooses.

        An exact match is best, then what the platform executes as well: linux/arm/v6 on linux/arm/v7,
        linux/386 on linux/amd64. An entry without a platform is taken where there is no other.

        Raises:
            InputError: there is none; the hint lists what there is.
        """
        for wanted in platform.runs():
            for each in self.manifests:
                if each.platform == wanted and each.is_image:
                    return each
        images = [each for each in self.manifests if each.is_image]
        unsaid = list({each.digest: each for each in images if each.platform is None}.values())
        if len(unsaid) == 1:  # though it may be listed more than once
            return unsaid[0]
        if unsaid and all(each.platform is None for each in images):
            raise InputError(
                f"there are {len(unsaid)} images under one name, none of which says its platform",
                hint="name one by its digest, or give each a tag of its own",
            )
        there = sorted({str(each.platform) for each in images if each.platform})
        hint = f"it has {', '.join(there[:20])}" if there else "it has none for any platform"
        if strange := sorted({each.media_type for each in self.manifests} - {*ACCEPTED}):
            hint += f"; not read is what is of the type {one_line(', '.join(strange[:5]), 300)}"
        raise InputError(f"there is no image for {platform} in the index", hint=hint)


@dataclass(frozen=True)
class ImageDocument:
    """The configuration of an image (config.md).

    Args:
        platform: what it is for.
        config: how a program in it is meant to run.
        diff_ids: digests of the layers without compression, the lowest first.
        history: how it was made, as it says itself; not verified by anybody.
        created: RFC 3339; empty where it says nothing.
        data: its own bytes.
    """

    platform: Platform
    config: ImageConfig
    diff_ids: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...] = ()
    created: str = ""
    data: bytes = b""

    @property
    def digest(self) -> str:
        """`sha256:…` of its bytes: what Docker calls the id of an image."""
        return digest_of(self.data)

    @classmethod
    def made_of(
        cls,
        platform: Platform,
        config: ImageConfig,
        diff_ids: Sequence[str],
        *,
        history: Sequence[Mapping[str, Any]] = (),
        created: str = "",
    ) -> ImageDocument:
        """Write a configuration: the same parts give the same bytes."""
        members = config.as_json()
        author = members.pop("author", "")
        document = {
            **({"created": created} if created else {}),
            **({"author": author} if author else {}),
            "architecture": platform.architecture,
            "os": platform.os,
            **({"variant": platform.variant} if platform.variant else {}),
            "config": members,
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
            **({"history": [dict(each) for each in history]} if history else {}),
        }
        return cls(platform, config, tuple(diff_ids), tuple(history), created, canonical(document))


def parse_manifest(
    data: bytes,
    media_type: str = "",
    *,
    configs: Sequence[str] = (CONFIG, DOCKER_CONFIG, "application/octet-stream"),
) -> Manifest | Index:
    """Read a manifest or an index of OCI or Docker.

    Args:
        data: its bytes; `Descriptor.check` has compared them with what named them.
        media_type: what whoever sent it says that it is, without parameters; empty for none.
        configs: types of what its configuration may be; by default those of images.

    Raises:
        InputError: it is neither, or not as its format wants it.
    """
    members = _parsed(data, "the manifest")
    own = members.text("mediaType", "")
    if media_type in _OLD or own in _OLD or members.get("schemaVersion") == 1:
        raise InputError(
            "the manifest is of Docker's schema 1, which has no verifiable layers",
            hint="push the image again with a current tool",
        )
    # "manifests" and "layers" in one document mean two images to two readers (CVE-2021-41190).
    both = "manifests" in members and ("layers" in members or "config" in members)
    known = [kind for kind in (own, media_type) if kind in ACCEPTED]
    if both or len(set(known)) > 1:
        raise InputError("the manifest claims to be an index as well", hint="do not trust the sender")
    kind = known[0] if known else (INDEX if "manifests" in members else MANIFEST)
    if kind in INDEXES:
        found = members.objects("manifests", MAX_MEMBERS)
        return Index(tuple(Descriptor.from_json(*each) for each in found), kind, data)
    config = Descriptor.from_json(members.get("config"), "the manifest: config")
    if config.media_type not in configs:
        raise InputError(
            f"the manifest is not {'an image' if CONFIG in configs else 'a cache'} "
            f"but an artifact of the type {config.media_type!r:.200}",
            hint=f"name one of the type {configs[0]}",
        )
    layers = tuple(Descriptor.from_json(*each) for each in members.objects("layers", MAX_MEMBERS))
    for layer in layers:
        if _LAYERS.fullmatch(layer.media_type) is None:
            raise InputError(f"the manifest has a layer of the unknown type {layer.media_type!r:.200}")
    return Manifest(config, layers, kind, data)


def choose_image(
    document: Manifest | Index, platform: Platform, fetch: Callable[[Descriptor], bytes]
) -> tuple[Manifest, tuple[str, ...]]:
    """Return the manifest for a platform, from an index or indexes in it.

    Args:
        document: where to begin.
        platform: as for `Index.choose`.
        fetch: returns the bytes that a descriptor names; they are verified here.

    Returns:
        the manifest, and the digests of the indexes that led there, the outermost first.

    Raises:
        InputError: there is none for this platform, or one is not what its descriptor says.
    """
    passed: list[str] = []
    while isinstance(document, Index):
        if len(passed) == _MAX_INDEXES:
            raise InputError(
                f"there are more than {_MAX_INDEXES} indexes in indexes",
                hint="the image has to be published again",
            )
        passed.append(document.digest)
        entry = document.choose(platform)
        if entry.size > MAX_DOCUMENT:
            raise InputError(
                f"the manifest {entry.digest} has {counted(entry.size, 'byte')}; {MAX_DOCUMENT} are allowed"
            )
        document = parse_manifest(entry.check(fetch(entry)), entry.media_type)
    return document, tuple(passed)


def check_image(manifest: Manifest, document: ImageDocument, host: Platform) -> None:
    """Compare the two halves of an image with each other and with this machine.

    Raises:
        InputError: they do not fit each other, or the image is for another machine.
    """
    if len(manifest.layers) != len(document.diff_ids):
        raise InputError(
            f"the manifest of the image has {counted(len(manifest.layers), 'layer')}, "
            f"and its configuration {len(document.diff_ids)}",
            hint=NOT_AS_ANNOUNCED,
        )
    found = document.platform
    # Its variant is what it was made for; many images that run on more say none.
    if (found.os, found.architecture) not in {(each.os, each.architecture) for each in host.runs()}:
        raise InputError(
            f"the image is for {found}, and this machine is {host}", hint="take the image for this platform"
        )


def parse_config(data: bytes) -> ImageDocument:
    """Read the configuration of an image.

    Raises:
        InputError: it is malformed, or not as its format wants it.
    """
    what = "the image configuration"
    members = _parsed(data, what)
    rootfs = _Object(members.get("rootfs"), f"{what}: rootfs")
    diff_ids = rootfs.get("diff_ids")
    diff_ids = [] if diff_ids is None else diff_ids  # Go writes null for an empty list
    if not isinstance(diff_ids, list) or len(diff_ids) > MAX_MEMBERS:
        raise InputError(f"{what}: rootfs.diff_ids: expected at most {MAX_MEMBERS} digests")
    for each in diff_ids:
        if not isinstance(each, str) or DIGEST.fullmatch(each) is None or not each.startswith("sha256:"):
            raise InputError(f"{what}: rootfs.diff_ids: expected a sha256 digest, found {each!r:.200}")
    history = tuple(_history(*each) for each in members.objects("history", _MAX_HISTORY))
    return ImageDocument(
        platform=_platform(members),
        config=ImageConfig.from_json(members.whole),
        diff_ids=tuple(diff_ids),
        history=history,
        created=members.text("created", ""),
        data=data,
    )


def parse_json(data: bytes, what: str) -> Any:
    """Read a document from outside.

    Raises:
        InputError: it is not JSON; `what` names it in the message.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is damaged: it is not JSON, or nested too deeply") from error


def blob_path(digest: str) -> str:
    """Return where a blob is in an image layout (image-layout.md)."""
    return f"blobs/{digest.replace(':', '/')}"


def canonical(document: object) -> bytes:
    """Return a document as JSON in one form: sorted, without spaces, in UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def is_layer_of(history: Mapping[str, Any]) -> bool:
    """Whether an entry of the history has made a layer."""
    return not history.get("empty_layer", False)


def _platform(members: _Object) -> Platform:
    return Platform.of(members.name("os"), members.name("architecture"), members.text("variant", ""))


def _history(entry: object, what: str) -> Mapping[str, Any]:
    members = _Object(entry, what)
    texts = ("created", "created_by", "author", "comment")
    found: dict[str, Any] = {name: text for name in texts if (text := members.text(name, "", most=1 << 20))}
    return found | ({"empty_layer": True} if members.get("empty_layer") is True else {})


def _parsed(data: bytes, what: str) -> _Object:
    if len(data) > MAX_DOCUMENT:
        raise InputError(f"{what} is larger than {MAX_DOCUMENT >> 20} MiB")
    return _Object(parse_json(data, what), what)


class _Object:
    """A JSON object from outside, whose members are checked when they are read; null counts as absent."""

    def __init__(self, members: object, what: str) -> None:
        if not isinstance(members, dict):
            raise InputError(f"{what}: expected an object, found {members!r:.80}")
        self.whole: dict[str, Any] = members
        self._what = what

    def __contains__(self, name: str) -> bool:
        return self.whole.get(name) is not None

    def get(self, name: str) -> Any:
        return self.whole.get(name)

    def text(self, name: str, default: str | None = None, *, most: int = _MAX_TEXT) -> str:
        value = self.whole.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or len(value) > most or UNUSABLE_TEXT.search(value):
            raise InputError(f"{self._what}: {name}: expected a text, found {value!r:.80}")
        return value

    def name(self, name: str) -> str:
        """Return a text that must not be empty."""
        if self.whole.get(name) == "":
            raise InputError(f"{self._what}: {name}: expected a text, found an empty one")
        return self.text(name)

    def number(self, name: str) -> int:
        value = self.whole.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise InputError(f"{self._what}: {name}: expected a number of bytes, found {value!r:.80}")
        return value

    def texts(self, name: str) -> dict[str, str]:
        value = self.whole.get(name)
        if value is None:
            return {}
        found = _Object(value, f"{self._what}: {name}")
        return {key: found.text(key, most=MAX_DOCUMENT) for key in found.whole}

    def objects(self, name: str, most: int) -> list[tuple[object, str]]:
        """Return a list, each with what to call it in messages."""
        value = self.whole.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or len(value) > most:
            raise InputError(f"{self._what}: {name}: expected a list of at most {most}, found {value!r:.80}")
        return [(each, f"{self._what}: {name}[{number}]") for number, each in enumerate(value)]
