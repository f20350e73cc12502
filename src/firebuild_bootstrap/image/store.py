"""The finished images of one user."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MALFORMED, InputError, MachineError
from firebuild_bootstrap.image.blobs import digest_of
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.content_store import (
    SPACE,
    ContentStore,
    Key,
    Staging,
    damaged_record,
    readable,
    write_whole,
)
from firebuild_bootstrap.image.forms import is_untouched, kept_forms
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerTrees, OutsideLayer, StoredLayer
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import (
    MAX_DOCUMENT,
    Descriptor,
    ImageDocument,
    is_layer_of,
    parse_config,
)
from firebuild_bootstrap.image.outputs import Artifact, OutputType
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.sizes import checked_size
from firebuild_pki.values import dataclass

_CONFIGURATION: Final = "configuration.json"


@dataclass(frozen=True)
class ImageLayer:
    """One layer of an image: an archive in its directory, or one in the store of layers.

    Args:
        size: bytes that it takes.
        key: in the store of layers; empty for an archive.
        archive: file name of the archive, `digest` is `sha256:…` of it.
        outside: what a layer that came from outside was, and is again when the image goes out.
    """

    size: int
    key: str = ""
    archive: str = ""
    digest: str = ""
    outside: OutsideLayer | None = None

    @property
    def identity(self) -> str:
        """What tells it from all others: its digest or its key."""
        return self.digest or self.key

    def as_json(self) -> dict[str, Any]:
        """Return it as in `image.json`."""
        kept: dict[str, Any] = {"archive": self.archive, "digest": self.digest}
        if self.key:
            kept = {"key": self.key}
        if self.outside is not None:
            kept |= {"diff_id": self.outside.diff_id, "blob": self.outside.blob.as_json()}
        return {**kept, "size": self.size}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ImageLayer:
        """Read it; KeyError or ValueError when it is malformed."""
        if "key" in document:
            outside = None
            if "blob" in document:
                outside = OutsideLayer(str(document["diff_id"]), Descriptor.from_json(document["blob"]))
            return cls(size=checked_size(document["size"]), key=str(document["key"]), outside=outside)
        archive = str(document["archive"])
        if "/" in archive:
            raise ValueError(f"{archive!r} is not the name of an archive")
        return cls(size=checked_size(document["size"]), archive=archive, digest=str(document["digest"]))


@dataclass(frozen=True)
class ImageSource:
    """What an image that came from outside is there: its own manifest and configuration, which are blobs.

    Args:
        digests: more digests that name it, such as that of the index which it was chosen from. Of a pulled
            one the first is what its registry has for it.
        origin: where it is from, for display.
        pulled: it is from a registry, which may have a newer one by now.
    """

    manifest: Descriptor
    config: Descriptor
    digests: tuple[str, ...] = ()
    origin: str = ""
    pulled: bool = False

    @property
    def names(self) -> frozenset[str]:
        """All digests by which FROM may name it."""
        return frozenset((self.manifest.digest, self.config.digest, *self.digests))

    def joined(self, older: ImageSource) -> ImageSource:
        """Return it with what is known from before of the same image, which has the same configuration.

        A file says nothing of a registry, which may have a newer one by now.
        """
        first, second = (older, self) if older.pulled and not self.pulled else (self, older)
        manifest = (older.manifest.digest,) if older.manifest.digest != self.manifest.digest else ()
        digests = dict.fromkeys((*first.digests, *second.digests, *manifest))
        return replace(self, digests=tuple(digests), origin=first.origin, pulled=first.pulled)

    def as_json(self) -> dict[str, Any]:
        """Return it as in `image.json`."""
        return {
            "manifest": self.manifest.as_json(),
            "config": self.config.as_json(),
            "digests": list(self.digests),
            "origin": self.origin,
            "pulled": self.pulled,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ImageSource:
        """Read it; KeyError, TypeError or ValueError when it is malformed."""
        return cls(
            manifest=Descriptor.from_json(document["manifest"]),
            config=Descriptor.from_json(document["config"]),
            digests=tuple(map(str, document["digests"])),
            origin=str(document["origin"]),
            pulled=bool(document["pulled"]),
        )


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """All that `image.json` says about an image.

    Args:
        base: what FROM named, `base_digest` its digest; empty for scratch.
        created: RFC 3339, in UTC: when its newest layer was made.
        ca_provider: name of the provider that the build's certificates came from.
        issuer_fingerprint: SHA-256 of the certificate that issued them, as hexadecimal digits.
        outputs: the forms that there are in the store; in `image.json` only those of earlier versions.
        also_tagged: more names that it was stored under.
        layers: the lowest first; None for an image of an earlier version, which has outputs alone.
        layer_store: in which `LayerTrees` those with a key are, see `store_name`.
        platform: `OS/ARCHITECTURE[/VARIANT]`.
        epoch: SOURCE_DATE_EPOCH of the build, in seconds; None for the real times.
        source: of an image that came from outside; None for one that was built here.
        history: how it was made, as in an OCI image configuration.
    """

    tag: str
    build_id: str
    created: str
    firebuild_version: str
    base: str = ""
    base_digest: str = ""
    ca_provider: str = ""
    issuer_fingerprint: str = ""
    config: ImageConfig = field(default_factory=ImageConfig)
    outputs: tuple[Artifact, ...] = ()
    also_tagged: tuple[str, ...] = ()
    layers: tuple[ImageLayer, ...] | None = None
    layer_store: str = ""
    platform: str = ""
    epoch: int | None = None
    source: ImageSource | None = None
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all layers; of an earlier version's image, those of its outputs."""
        return sum(part.size for part in (self.outputs if self.layers is None else self.layers))

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Those that it needs of an image from outside, and of the layers that are from outside."""
        own = (self.source.manifest, self.source.config) if self.source is not None else ()
        return (*own, *(layer.outside.blob for layer in self.layers or () if layer.outside is not None))

    def joined(self, older: ImageRecord) -> ImageRecord:
        """Return it with what is known from before of the same image, which has the same id.

        The build that made it first did; what is also from outside stays so, with its layers.
        """
        built = older if older.build_id or not self.build_id else self
        outside = older if self.source is None and older.source is not None else self
        return replace(
            self,
            build_id=built.build_id,
            created=older.created,
            firebuild_version=built.firebuild_version,
            base=built.base,
            base_digest=built.base_digest,
            ca_provider=built.ca_provider,
            issuer_fingerprint=built.issuer_fingerprint,
            layers=outside.layers,
            layer_store=outside.layer_store,
            epoch=built.epoch,
            source=self.source.joined(older.source) if self.source and older.source else outside.source,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the document."""
        return {
            "tag": self.tag,
            "build_id": self.build_id,
            "created": self.created,
            "firebuild_version": self.firebuild_version,
            "base": {"reference": self.base, "digest": self.base_digest},
            "ca": {"provider": self.ca_provider, "issuer_fingerprint_sha256": self.issuer_fingerprint},
            "config": self.config.as_json(),
            "outputs": [output.as_json() for output in self.outputs],
            **({"also_tagged": list(self.also_tagged)} if self.also_tagged else {}),
            **self._layers_as_json(),
        }

    def _layers_as_json(self) -> dict[str, Any]:
        if self.layers is None:
            return {}
        return {
            "platform": self.platform,
            "layers": [layer.as_json() for layer in self.layers],
            **({"layer_store": self.layer_store} if self.layer_store else {}),
            **({"source_date_epoch": self.epoch} if self.epoch is not None else {}),
            **({"source": self.source.as_json()} if self.source is not None else {}),
            **({"history": [dict(each) for each in self.history]} if self.history else {}),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ImageRecord:
        """Read the document; KeyError, TypeError or ValueError when it is malformed."""
        return cls(
            tag=document["tag"],
            build_id=document["build_id"],
            created=document["created"],
            firebuild_version=document["firebuild_version"],
            base=document["base"]["reference"],
            base_digest=document["base"]["digest"],
            ca_provider=document["ca"]["provider"],
            issuer_fingerprint=document["ca"]["issuer_fingerprint_sha256"],
            config=ImageConfig.from_json(document["config"]),
            outputs=tuple(
                Artifact(OutputType(output["type"]), output["path"], output["size"], output["digest"])
                for output in document["outputs"]
            ),
            also_tagged=tuple(str(tag) for tag in document.get("also_tagged", ())),
            layers=tuple(map(ImageLayer.from_json, document["layers"])) if "layers" in document else None,
            layer_store=str(document.get("layer_store", "")),
            platform=str(document.get("platform", "")),
            epoch=int(document["source_date_epoch"]) if "source_date_epoch" in document else None,
            source=ImageSource.from_json(document["source"]) if "source" in document else None,
            history=tuple(dict(each) for each in document.get("history", ())),
        )


@dataclass(frozen=True)
class StoredImage:
    """An image in the store.

    Args:
        directory: where its files lie; gone once the tag is built again or removed.
        location: the same by its tag: a path to hand out, which then leads to the newer image.
    """

    tag: Reference
    directory: Path
    location: Path
    record: ImageRecord

    def output(self, kind: OutputType) -> Path | None:
        """Return the path of one form, if it is in the store."""
        paths = [self.location / output.path for output in self.record.outputs if output.type is kind]
        return paths[0] if paths else None

    def layers(self, store: str) -> tuple[Layer, ...]:
        """Return its layers, the lowest first.

        Args:
            store: name of the store of layers that is to have them, see `store_name`.

        Raises:
            InputError: it has none because an earlier version built it, or they are in another store.
            MachineError: somebody has changed the archive that it is made of.
        """
        record = self.record
        if record.layers is None:
            raise InputError(
                f"the image {self.tag} is of an earlier version, which kept outputs and no layers",
                hint="build it again",
            )
        # Those from outside are unpacked again where they are wanted with other owners.
        own = any(layer.key and layer.outside is None for layer in record.layers)
        if own and record.layer_store not in ("", store):
            raise InputError(
                f"the layers of the image {self.tag} belong to the id mapping {record.layer_store}, "
                f"and the one in use is {store}",
                hint="set machine.ids as it was when the image was built, or build it again",
            )
        for layer in record.layers:
            if layer.archive == OutputType.TAR.file_name and not is_untouched(self.directory, OutputType.TAR):
                raise MachineError(
                    f"{self.directory / layer.archive} was modified after it was stored, "
                    "and the image is made of it",
                    hint=f"build {self.tag} again",
                )
        return tuple(
            StoredLayer(layer.key, outside=layer.outside)
            if layer.key
            else ArchiveLayer(self.directory / layer.archive, layer.digest)
            for layer in record.layers
        )

    def history(self) -> list[tuple[Mapping[str, Any], int | None]]:
        """Return how it was made, the oldest first, each with the bytes of its layer, if it made one."""
        layers = iter(self.record.layers or ())
        steps = list[tuple[Mapping[str, Any], int | None]]()
        for step in self.record.history:
            layer = next(layers, None) if is_layer_of(step) else None
            steps.append((step, None if layer is None else layer.size))
        return steps + [({}, layer.size) for layer in layers]

    def refreshed(self) -> StoredImage:
        """Return it with the forms that there are by now."""
        outputs = self.record.outputs if self.record.layers is None else kept_forms(self.directory)
        return replace(self, record=replace(self.record, outputs=outputs))


def configuration(image: StoredImage, layers: LayerTrees) -> bytes:
    """Return the OCI image configuration of an image: what goes out, and what its id is the digest of.

    One that came from outside has its own, a blob. Else it is written once, when somebody asks for it, and
    kept with the image from then on: to find out the diff ids all layers are read, which no build waits for.
    All else that is in it is decided when the image is stored.

    Raises:
        InputError, MachineError: as `StoredImage.layers`; a layer is not there.
    """
    path = image.directory / _CONFIGURATION
    record = image.record
    with suppress(OSError, ValueError, RecursionError, InputError):
        with open(path, "rb") as file:
            data = file.read(MAX_DOCUMENT + 1)
        # A loss of power may have spoiled it.
        if len(parse_config(data).diff_ids) == len(record.layers or ()):
            return data
    document = ImageDocument.made_of(
        Platform.parse(record.platform),
        record.config,
        diff_ids_of(image, layers),
        history=record.history,
        created=record.created,
    )
    with suppress(OSError):  # a store that is read-only: then it is written again, and comes out the same
        write_whole(path, document.data)
    return document.data


def image_id(image: StoredImage, layers: LayerTrees) -> str:
    """Return the id of an image, `sha256:…`: the digest of its configuration.

    Raises:
        InputError, MachineError: as `configuration`.
    """
    source = image.record.source
    return source.config.digest if source is not None else digest_of(configuration(image, layers))


def has_id(image: StoredImage, document: ImageDocument, layers: LayerTrees) -> bool:
    """Whether an image has this configuration; its layers are read only where it is likely.

    One whose layers can't be read has another.
    """
    record = image.record
    if record.source is not None:
        return record.source.config.digest == document.digest
    if record.created != document.created or len(record.layers or ()) != len(document.diff_ids):
        return False
    try:
        return image_id(image, layers) == document.digest
    except (InputError, MachineError):
        return False


def diff_ids_of(image: StoredImage, layers: LayerTrees) -> list[str]:
    """Return the digests of the layers of an image without compression, the lowest first.

    Raises:
        InputError, MachineError: as `StoredImage.layers`; a layer is not there.
    """
    return layers.diff_ids(image.layers(layers.root.name), image.record.epoch)


class ImageStore:
    """Images by tag, below `home`/images.

    Args:
        trees: asked for what removes images that are directories with owners of their own.
        bases: asked for the names of bases, which people take for images.
    """

    def __init__(
        self, home: Path, trees: Callable[[], Trees], bases: Callable[[], Collection[Reference]] = tuple
    ) -> None:
        self._contents = ContentStore(home / "images", lambda path: trees().remove(path))
        self._bases = bases

    def close(self) -> None:
        """Let go of the images that `find` holds."""
        self._contents.close()

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """Give a directory for the outputs, on the store's file system; removed unless it is committed.

        Raises:
            MachineError: the store can't be written.
        """
        with self._contents.stage() as staging:
            yield staging

    def commit(self, staging: Staging, record: ImageRecord) -> StoredImage:
        """Put the staged outputs under the record's tag, replacing an older image in one step.

        Raises:
            InputError: a tag is malformed, or nobody may write in the store.
            MachineError: the store can't be written; an older image is untouched.
        """
        tag, *others = (Reference.parse_tag(text) for text in (record.tag, *record.also_tagged))
        document = replace(record, outputs=()) if record.layers is not None else record
        text = json.dumps(document.as_json(), indent=2, ensure_ascii=False) + "\n"
        try:
            (staging.path / "image.json").write_text(text, "utf-8")
        except OSError as error:
            raise MachineError(
                f"{staging.path}: the image could not be stored: {error.strerror}", hint=SPACE
            ) from error
        key = self._key(tag)
        directory = self._contents.publish(staging, key, *map(self._key, others))
        return StoredImage(tag, directory, self._contents.link(key), record).refreshed()

    def layer_keys(self, store: str) -> frozenset[str]:
        """Return the keys of all layers in the `LayerTrees` of that name that an image needs.

        Whoever holds an image that has lost its name needs them too, until nobody does and it is swept.
        """
        return frozenset(
            layer.key
            for record in self._records()
            for layer in record.layers or ()
            if layer.key and (record.layer_store == store or layer.outside is not None)
        )

    def blob_digests(self) -> frozenset[str]:
        """Return the digests of all blobs that an image needs, held or named as for `layer_keys`."""
        return frozenset(blob.digest for record in self._records() for blob in record.blobs)

    def _records(self) -> Iterator[ImageRecord]:
        for directory in self._contents.contents():
            try:
                yield ImageRecord.from_json(json.loads((directory / "image.json").read_text("utf-8")))
            except (FileNotFoundError, PermissionError):  # gone by now, or another user's, who has own layers
                continue
            except (*MALFORMED, InputError):
                continue  # it is damaged, and of no use to anybody

    def find(self, tag: Reference, *, hold: bool = False) -> StoredImage | None:
        """Return an image, or None; with `hold` its files stay until `close`.

        Raises:
            MachineError: its `image.json` is damaged.
        """
        return self._find(self._key(tag), hold=hold)

    def _find(self, key: Key, *, hold: bool = False) -> StoredImage | None:
        def damaged(path: Path, error: Exception) -> MachineError:
            return damaged_record(path, error, f"remove {_name(key)} and build it again")

        with self._contents.record(key, "image.json", damaged, hold=hold) as path:
            if path is None:
                return None
            record = ImageRecord.from_json(json.loads(path.read_text("utf-8")))
            tag = _as_spelled(key, record)
        named = replace(record, tag=str(tag), also_tagged=())
        return StoredImage(tag, path.parent, self._contents.link(key), named).refreshed()

    def hold(self, image: StoredImage) -> bool:
        """Keep the files of an image until `close`, whoever removes its name; False where it is gone."""
        return self._contents.hold(self._key(image.tag)) == image.directory.resolve()

    def find_digest(self, wanted: Reference) -> StoredImage | None:
        """Return and hold the image of a name, with any tag, whose manifest, index or id has the digest.

        Raises:
            MachineError: as `find`.
        """
        for tag in self.names():
            image = self.find(tag) if tag.familiar == wanted.familiar or tag.is_untagged else None
            if image is not None and image.record.source and wanted.digest in image.record.source.names:
                return self.find(tag, hold=True)
        return None

    def inspect(self, tag: Reference, *, hold: bool = False) -> StoredImage:
        """Return an image.

        Args:
            tag: its name.
            hold: as for `find`.

        Raises:
            InputError: there is none of that tag; the hint lists those there are.
            MachineError: as `find`.
        """
        found = self.find(tag, hold=hold)
        if found is None:
            raise self._unknown(tag)
        return found

    def list(self, damaged: Callable[[MachineError], object] = lambda _: None) -> list[StoredImage]:
        """Return all images that can be read, sorted by tag.

        Args:
            damaged: told of each of the others.
        """
        found = readable(self._contents, self._find, damaged)
        return sorted(found, key=lambda image: image.tag)

    def names(self) -> tuple[Reference, ...]:
        """Return the names of all images, sorted; no image is read for that."""
        return tuple(sorted(map(_name, self._contents.names())))

    def name_of(self, wanted: Reference) -> Reference:
        """Return the name of an image, which for an id is its only one; the image is not read.

        Raises:
            InputError: there is no such image, or it has several names.
        """
        keys = self._keys_of_id(wanted) if wanted.is_id else ()
        if len(keys) > 1:
            names = ", ".join(sorted(str(_name(key)) for key in keys))
            raise InputError(f"the image {wanted} has the names {names}", hint="say which of them are to go")
        name = _name(keys[0]) if keys else wanted
        if not self._contents.has(self._key(name)):
            raise self._unknown(wanted)
        return name

    def remove(self, tag: Reference) -> None:
        """Remove an image; its files stay while it has other names.

        Raises:
            InputError: there is none of that tag, or nobody may write in the store.
            MachineError: the store can't be written.
        """
        if not self._contents.discard(self._key(tag)):
            raise self._unknown(tag)

    def tag(self, tag: Reference, other: Reference) -> None:
        """Give an image one more name, which is taken from an older image.

        Raises:
            InputError, MachineError: as `remove`.
        """
        if not self._contents.alias(self._key(tag), self._key(other)):
            raise self._unknown(tag)

    def sweep(self) -> None:
        """Remove what crashed builds left in the store."""
        self._contents.sweep()

    def _key(self, tag: Reference) -> Key:
        """Return where an image is: under an older spelling of its name, or for its id under any name."""
        keys = [_key_of(spelling, tag.tag) for spelling in tag.spellings]
        if tag.is_id:
            keys = [*self._keys_of_id(tag), *keys]
        return next(filter(self._contents.has, keys), keys[0])

    def _keys_of_id(self, wanted: Reference) -> tuple[Key, ...]:
        """Return the names of the image of an id; one that nobody has asked for is no image's."""
        images = readable(self._contents, lambda key: (key, self._find(key)), lambda _: None)
        known = ((key, _known_id(image)) for key, image in images if image is not None)
        return tuple(key for key, id_ in known if id_ == f"sha256:{wanted.tag}")

    def _unknown(self, tag: Reference) -> InputError:
        if tag in self._bases():
            hint = f"`FROM {tag}` builds an image on it; `firebuild base list` and `base rm` are for bases"
            return InputError(f"{tag} is a base, and not an image", hint=hint)
        known = ", ".join(map(str, self.names())) or "none yet"
        return InputError(f"there is no image {tag}", hint=f"images in the store: {known}")


def _known_id(image: StoredImage) -> str | None:
    """Return the id of an image if that has been asked for before, without a look at its layers."""
    if image.record.source is not None:
        return image.record.source.config.digest
    try:
        return digest_of((image.directory / _CONFIGURATION).read_bytes())
    except FileNotFoundError:
        return None


def _key_of(name: str, tag: str) -> Key:
    """Return the three file names of an image; no two names have the same, because none contains a plus."""
    parents, _, last = name.rpartition("/")
    return parents.replace("/", "+") or "library", last, tag


def _name(key: Key) -> Reference:
    parents, last, tag = key
    above = "" if parents == "library" else f"{parents.replace('+', '/')}/"
    return Reference.parse(f"{above}{last}:{tag}")


def _as_spelled(key: Key, record: ImageRecord) -> Reference:
    """Return the name of an entry in the spelling of those who built it."""
    name = _name(key)
    spelled = (Reference.parse(text) for text in (record.tag, *record.also_tagged))
    return next((tag for tag in spelled if tag == name), name)
