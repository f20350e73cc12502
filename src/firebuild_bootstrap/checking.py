"""`firebuild store check`: whether all that a store holds is what it was when it was stored.

What killed processes leave is not wrong: parts of blobs, directories of dead builds, records of the cache
without a layer. Nobody finds those, and the next build or prune removes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.errors import FirebuildError, MachineError
from firebuild_bootstrap.image.attestations import damaged_documents
from firebuild_bootstrap.image.bases import BaseStore
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.content_store import ContentStore, allow_open_files, files_in
from firebuild_bootstrap.image.forms import forget_form, kept_forms
from firebuild_bootstrap.image.layertrees import LayerTrees
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.store import ImageStore, StoredImage
from firebuild_bootstrap.layers.tree import file_digest
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.runs import RECORD, Runs
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.home import Home

_AT_ONCE: Final = 50  # layers that one worker reads: each is a mount, and an open directory


@dataclass(frozen=True)
class Finding:
    """Something that is wrong in a store.

    Args:
        what: it is, with its path or name.
        remedy: what to do about it.
        repair: removes what is of no use to anybody any more; None where only its user can decide that.
        lost: an image needs it, which is not whole without.
    """

    what: str
    remedy: str
    repair: Callable[[], object] | None = None
    lost: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


class StoreCheck:
    """One check of a store, which need not be writable.

    Args:
        home: the store.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._needed: dict[str, list[str]] = {}  # images by the keys of their layers
        self.read = Counter[str]()
        """How many of each kind were read, `images` and so on."""
        self.unread: list[str] = []
        """What can't be read in this id mapping, for messages."""

    def findings(self) -> Iterator[Finding]:
        """Read everything, and yield what is wrong with it.

        Raises:
            MachineError: this process may open too few files, which says nothing about the store.
        """
        allow_open_files(0)
        for part in (
            self._blobs,
            self._bases,
            self._images,
            self._layers,
            self._records,
            self._drives,
            self._runs,
        ):
            try:
                yield from part()
            except OSError as error:
                yield _unreadable(error)

    def _blobs(self) -> Iterator[Finding]:
        named = self._home.images.blob_digests()
        for digest in self._home.blobs.digests():
            with closing(BlobStore(self._home.root)) as blobs:
                try:
                    path = blobs.hold(digest)
                    found = "" if path is None else _digest_of(path, digest)
                except (OSError, FirebuildError) as error:
                    yield _unreadable(error)
                    continue
            if path is not None and found != digest:
                yield Finding(
                    f"{path}: its bytes have the digest {found}",
                    "--repair removes it; then load or pull its images again",
                    partial(path.unlink, missing_ok=True),
                    lost=digest in named,
                )
            self.read["blobs"] += path is not None

    def _bases(self) -> Iterator[Finding]:
        for reference in self._home.bases.names():
            bases = BaseStore(self._home.root, lambda: self._home.trees)
            again = f"`firebuild base rm {reference}`, and import it again"
            with closing(bases):
                try:
                    base = bases.find(reference)
                    if base is None:
                        if reference in bases.names():
                            yield Finding(f"base {reference}: its files are gone", again)
                        continue
                    if not _has(base.archive, base.digest):
                        yield Finding(
                            f"{base.archive} is missing, or was modified after it was stored", again
                        )
                except MachineError as error:
                    yield Finding(error.message, again)
                except OSError as error:
                    yield _unreadable(error)
            self.read["bases"] += 1

    def _images(self) -> Iterator[Finding]:
        for tag in self._home.images.names():
            with closing(ImageStore(self._home.root, lambda: self._home.trees)) as images:
                try:
                    image = images.find(tag, hold=True)
                    if image is not None:
                        yield from self._of_image(tag, image)
                    elif tag in images.names():
                        yield Finding(f"image {tag}: its files are gone", _again(tag))
                except MachineError as error:
                    yield Finding(error.message, _again(tag))
                except OSError as error:
                    yield _unreadable(error)
            self.read["images"] += 1

    def _of_image(self, tag: Reference, image: StoredImage) -> Iterator[Finding]:
        for digest in dict.fromkeys(blob.digest for blob in image.record.blobs):
            if not self._home.blobs.path(digest).exists():
                yield Finding(f"image {tag}: its blob {digest} is missing", "load or pull it again")
        for layer in image.record.layers or ():
            path = image.directory / layer.archive
            if layer.archive and not _has(path, layer.digest):
                yield Finding(
                    f"image {tag}: {path} is missing, or was modified after it was stored", _again(tag)
                )
            stored = self._stored if layer.key and layer.outside is None else None
            if stored is not None and image.record.layer_store == stored.root.name:
                self._needed.setdefault(layer.key, []).append(str(tag))
                if not stored.is_there(layer.key):
                    yield Finding(f"image {tag}: its layer {layer.key} is missing", _again(tag))
        for path in damaged_documents(image):
            yield Finding(
                f"image {tag}: {path} is damaged",
                "--repair removes it",
                partial(path.unlink, missing_ok=True),
            )
        for form in kept_forms(image.directory, untouched=True):
            if not _has(image.directory / form.path, form.digest):
                yield Finding(
                    f"image {tag}: {image.directory / form.path} is damaged",
                    "--repair has it written again when it is asked for",
                    partial(forget_form, image.directory, form.type),
                )

    @cached_property
    def _stored(self) -> LayerTrees | None:
        """The layers of this id mapping; None where no sandbox can be made that reads them."""
        try:
            return self._home.layers
        except FirebuildError as error:
            self.unread.append(f"layers, because {error.message}")
            return None

    def _layers(self) -> Iterator[Finding]:
        stores = self._home.root / "layers"
        others = [path.name for path in stores.iterdir()] if stores.is_dir() else []
        layers = self._stored if others else None
        if layers is None:
            return
        self.unread += [
            f"layers of the id mapping {name}, which machine.ids may choose"
            for name in sorted(others)
            if name != layers.root.name
        ]
        keys = list(filter(layers.is_there, layers.keys()))
        for start in range(0, len(keys), _AT_ONCE):
            yield from self._of_layers(keys[start : start + _AT_ONCE])

    def _of_layers(self, keys: Sequence[str]) -> Iterator[Finding]:
        with closing(LayerTrees(self._home.root, self._home.trees, check=self._home.check)) as layers:
            try:
                changed = layers.changed(keys)
            except FirebuildError as error:
                if len(keys) == 1:
                    yield self._useless(keys[0], f"layer {keys[0]}: {error.message}")
                else:  # which one it is
                    for key in keys:
                        yield from self._of_layers([key])
                return
        self.read["layers"] += len(keys)
        for key in changed:
            yield self._useless(key, f"the layer {key} was modified after it was stored")

    def _useless(self, key: str, what: str) -> Finding:
        again = f"; then build {', '.join(images)} again" if (images := self._needed.get(key)) else ""
        remedy = f"--repair removes it, unless a build uses it{again}"
        return Finding(what, remedy, partial(self._home.cache.forget, key), lost=key in self._needed)

    def _records(self) -> Iterator[Finding]:
        if (self._home.root / "layers").is_dir() and self._stored is not None:
            for path in self._home.cache.damaged_records():
                yield Finding(f"{path} is damaged", "--repair removes it", self._home.cache.forget_orphans)

    def _drives(self) -> Iterator[Finding]:
        for root in files_in(self._home.root / "drives"):
            contents = ContentStore(root, durable=False)
            try:
                names = contents.names()
            except MachineError as error:
                yield _unreadable(error)
                continue
            for key in names:
                if not contents.link(key).exists() and contents.has(key):
                    remedy = "--repair removes its name; it is written again when it is needed"
                    yield Finding(
                        f"drive {key[0]}: its files are gone", remedy, partial(contents.discard, key)
                    )

    def _runs(self) -> Iterator[Finding]:
        for directory in Runs(self._home.root).unknown():
            yield Finding(
                f"{directory / RECORD} is missing or damaged, and its run has ended",
                "--repair removes what is kept of the run",
                partial(remove_tree, directory),
            )


def _again(tag: Reference) -> str:
    return f"`firebuild images rm {tag}`, and build, load or pull it again"


def _unreadable(error: OSError | FirebuildError) -> Finding:
    what = error.message if isinstance(error, FirebuildError) else str(error.strerror)
    if isinstance(error, OSError) and error.filename:
        what = f"{error.filename}: {what}"
    return Finding(f"{what}, so it can't be checked", "do that as the user whom the store belongs to")


def _has(path: Path, digest: str) -> bool:
    try:
        return _digest_of(path, digest) == digest
    except FileNotFoundError:
        return False


def _digest_of(path: Path, like: str) -> str:
    algorithm = like.partition(":")[0]
    with open(path, "rb") as file:
        return f"{algorithm}:{file_digest(file, algorithm)}"
