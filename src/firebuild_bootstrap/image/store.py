"""The finished images of one user."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.content_store import ContentStore, Key, Staging
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import Artifact, OutputType
from firebuild_bootstrap.image.trees import Trees


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """All that `image.json` says about an image.

    Args:
        base: what FROM named, `base_digest` its digest; empty for scratch.
        created: RFC 3339, in UTC.
        ca_provider: name of the provider that the build's certificates came from.
        issuer_fingerprint: SHA-256 of the certificate that issued them, as hexadecimal digits.
        also_tagged: more names that it was stored under.
        made_of: names what the outputs were written from, and how; empty where that is not known.
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
    made_of: str = ""

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
            **({"made_of": self.made_of} if self.made_of else {}),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ImageRecord:
        """Read the document; KeyError, TypeError or ValueError when it is none."""
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
            made_of=str(document.get("made_of", "")),
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
        """Return the path of one output."""
        paths = [self.location / output.path for output in self.record.outputs if output.type is kind]
        return paths[0] if paths else None

    def is_untouched(self) -> bool:
        """Tell whether its outputs are still what was stored: a machine may have booted from one.

        A directory can't tell that.
        """
        try:
            stored = (self.directory / "image.json").stat().st_mtime_ns
            for output in self.record.outputs:
                found = (self.directory / output.path).lstat()
                size = found.st_size
                if output.type is OutputType.DIR or found.st_mtime_ns > stored or size != output.size:
                    return False
        except OSError:
            return False
        return True


class ImageStore:
    """Images by tag, below `home`/images.

    Args:
        trees: asked for what removes images that are directories with owners of their own.
    """

    def __init__(self, home: Path, trees: Callable[[], Trees]) -> None:
        self._contents = ContentStore(home / "images", lambda path: trees().remove(path))

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
            InputError: a tag is none, or nobody may write in the store.
            MachineError: the store can't be written; an older image is untouched.
        """
        tag, *others = (Reference.parse_tag(text) for text in (record.tag, *record.also_tagged))
        text = json.dumps(record.as_json(), indent=2, ensure_ascii=False) + "\n"
        try:
            (staging.path / "image.json").write_text(text, "utf-8")
        except OSError as error:
            raise MachineError(f"{staging.path}: the image could not be stored: {error.strerror}") from error
        key = self._key(tag)
        directory = self._contents.publish(staging, key, *map(self._key, others))
        return StoredImage(tag, directory, self._contents.link(key), record)

    def find(self, tag: Reference, *, hold: bool = False) -> StoredImage | None:
        """Return an image, or None; with `hold` its files stay until `close`.

        Raises:
            MachineError: its `image.json` is damaged.
        """
        return self._find(self._key(tag), hold=hold)

    def _find(self, key: Key, *, hold: bool = False) -> StoredImage | None:
        directory = self._contents.hold(key)
        if directory is None:
            return None
        path = directory / "image.json"
        try:
            record = ImageRecord.from_json(json.loads(path.read_text("utf-8")))
            tag = _as_spelled(key, record)
        except (OSError, KeyError, TypeError, ValueError, RecursionError, InputError) as error:
            raise MachineError(
                f"{path} is damaged: {error}", hint=f"remove {_name(key)} and build it again"
            ) from error
        finally:
            if not hold:
                self._contents.release(directory)
        named = replace(record, tag=str(tag), also_tagged=())
        return StoredImage(tag, directory, self._contents.link(key), named)

    def inspect(self, tag: Reference) -> StoredImage:
        """Return an image.

        Raises:
            InputError: there is none of that tag; the hint lists those there are.
            MachineError: as `find`.
        """
        found = self.find(tag)
        if found is None:
            raise self._unknown(tag)
        return found

    def list(self) -> list[StoredImage]:
        """Return all images that can be read, sorted by tag."""
        found = (self._find(key) for key in self._contents.names())
        return sorted((image for image in found if image is not None), key=lambda image: image.tag)

    def names(self) -> tuple[Reference, ...]:
        """Return the names of all images, sorted; no image is read for that."""
        return tuple(sorted(map(_name, self._contents.names())))

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
        """Return where an image is: under an older spelling of its name if it is there."""
        keys = [_key_of(spelling, tag.tag) for spelling in tag.spellings]
        return next(filter(self._contents.has, keys), keys[0])

    def _unknown(self, tag: Reference) -> InputError:
        known = ", ".join(map(str, self.names())) or "none yet"
        return InputError(f"there is no image {tag}", hint=f"images in the store: {known}")


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
