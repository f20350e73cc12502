"""Layers kept unpacked, once, in the ids of the sandbox: what builds start from costs a mount.

    <home>/layers/<form>-<mapping>/     a `ContentStore`; in another id mapping a tree has other owners
        content/<id>/layer/fs/          the tree: a whole root file system, or what a step has changed
        content/<id>/layer.json         since which boot it exists, and what could not be kept
        content/<id>/durable            it is on the disk
        content/<id>/size               bytes that it takes, if somebody has asked
        content/<id>/digest-<time>      SHA-256 of its canonical archive, with no time after <time>
        making-<x>                      held by whoever unpacks an archive, so that others wait for it
        overlay.json                    whether overlays work here

Writing a tree of thousands of files to the disk takes seconds. So nobody waits for that: a tree is good for
as long as the machine runs, and beyond that once it is known to be on the disk, which `settle` sees to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Any, Final, Protocol

from firebuild_bootstrap.errors import MALFORMED, InputError, MachineError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.content_store import (
    DURABLE,
    ContentStore,
    Staging,
    try_lock,
    write_whole,
)
from firebuild_bootstrap.image.oci import Descriptor
from firebuild_bootstrap.image.trees import Tree, Trees, allocated, tree_of
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.sandbox import IdMap
from firebuild_pki.values import dataclass

# Raised where trees that exist would come out otherwise now.
_FORM: Final = 1
_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._+-]{0,200}")
_DIGEST: Final = re.compile("sha256:[0-9a-f]{64}")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PAUSE: Final = 0.05
_INFO: Final = "layer.json"
_SIZE: Final = "size"
_FOLDED: Final = 60  # layers, or a multiple of it; a machine mounts 240 with those that it makes
TREE: Final = "fs"
"""Name of the tree in a layer's directory: the tree's own mode may forbid to move it."""
ALTERED: Final = "altered"
"""A file beside the tree of a finished layer that this id mapping could not keep as it was made."""


@dataclass(frozen=True)
class ArchiveLayer:
    """Files in an uncompressed tar archive, `digest` is `sha256:…` of it.

    The lowest layer holds a whole root file system. Those above may hold whiteouts (OCI image layer).
    """

    path: Path
    digest: str


@dataclass(frozen=True)
class OutsideLayer:
    """What a layer that came from outside was there: the blob that it is unpacked from.

    Args:
        diff_id: `sha256:…` of the archive without compression.
        blob: the archive as it came.
    """

    diff_id: str
    blob: Descriptor


@dataclass(frozen=True)
class StoredLayer:
    """A layer that is kept unpacked (`LayerTrees`), by its key there.

    Args:
        key: that key.
        step: number of the step that would make it, so that it lies on what the earlier ones make; 0 where it
            is there from the beginning.
        outside: its blob, where it came from outside.
    """

    key: str
    step: int = 0
    outside: OutsideLayer | None = field(default=None, compare=False)


Layer = ArchiveLayer | StoredLayer


class LayerSink(Protocol):
    """Takes what each step has changed, as soon as the step is done. One call at a time."""

    def wanted(self, step: int, /) -> bool:
        """Say whether the guest has to send the layer of this step."""
        ...

    def write(self, step: int, data: bytes, /) -> None:
        """Take the next bytes of the layer's tar stream, at most 1 MiB; they come from an untrusted guest.

        Raises:
            InputError: there is more than the sink takes.
        """
        ...

    def finished(self, step: int, /) -> None:
        """The layer is complete; where it was not wanted: the step is done.

        Raises:
            FirebuildError: the layer can't be used.
        """
        ...


class LayerTrees:
    """Unpacked layers by key; several builds share them.

    Args:
        home: the directory of the store.
        trees: the tools in the id mapping of the builds.
        check: called again and again while another build is waited for; may raise.
    """

    def __init__(self, home: Path, trees: Trees, *, check: Callable[[], None] = lambda: None) -> None:
        self.home = home
        self.root = home / "layers" / store_name(trees.sandbox.idmap)
        self._trees = trees
        self._check = check
        self._contents = ContentStore(self.root, trees.remove, durable=False, sweeping=False)
        self._boot_id = boot_id()

    def close(self) -> None:
        """Let go of the trees that `hold`, `unpacked` and `adopt` gave out."""
        self._contents.close()

    def hold(self, key: str) -> Path | None:
        """Return the tree of `key`; it stays until `close`, even when it is discarded.

        Raises:
            InputError: `key` can't be a file name.
            MachineError: the store can't be written.
        """
        content = self._contents.hold(_name(key))
        if content is None:
            return None
        tree = content / "layer" / TREE
        spoiled = self._info(content) is None
        if spoiled or not tree.is_dir():  # without a tree somebody may be about to move it here
            self._contents.release(content)
            if spoiled:
                self._contents.discard(_name(key))
            return None
        with suppress(OSError):
            os.utime(content)  # the least recently used go first
        return tree

    def is_there(self, key: str) -> bool:
        """Whether `hold` would find a tree of `key`; nothing is written for that."""
        content = self._contents.link(_name(key))
        return self._info(content) is not None and (content / "layer" / TREE).is_dir()

    def required(self, key: str) -> Path:
        """Return the tree of `key` as `hold` does.

        Raises:
            MachineError: there is none.
        """
        tree = self.hold(key)
        if tree is None:
            raise MachineError(
                f"the layer {key} is not in the store {self.root}",
                hint="`firebuild store check` says which images need it: build or pull them again",
            )
        return tree

    def unpacked(self, archive: Path, key: str, below: Sequence[Path] = ()) -> tuple[Path, UnpackReport]:
        """Return the tree of an archive, held until `close`; it is unpacked once.

        Args:
            archive: an uncompressed tar.
            key: identifies it and all that is below it, see `chain_key`.
            below: the trees of the layers below, two at least, the lowest first; without any it is a whole
                root file system.

        Raises:
            MachineError: it can't be unpacked, or the store not be written.
        """
        return self._unpacked(key, lambda _: archive, below)

    def unpacked_from(
        self, write: Callable[[Path], None], key: str, below: Sequence[Path] = ()
    ) -> tuple[Path, UnpackReport]:
        """Return the tree of a layer that comes from outside, as `unpacked` does.

        Args:
            write: writes its archive without compression to the path that it gets; asked when the layer is
                not there yet. What it raises leaves nothing behind.
            key: as for `unpacked`.
            below: as for `unpacked`.

        Raises:
            DamagedArchiveError: the archive is damaged or leads out of the tree.
            MachineError: it can't be unpacked, or the store not be written.
        """

        def written(staging: Path) -> Path:
            archive = staging / "archive"
            write(archive)
            return archive

        return self._unpacked(key, written, below)

    def empty(self) -> Path:
        """Return an empty directory: the kernel wants two for an overlay, also of a single layer."""
        empty = self.root / "empty"
        empty.mkdir(mode=0o755, parents=True, exist_ok=True)
        return empty

    def stack(self, layers: Sequence[Layer]) -> tuple[tuple[Path, ...], tuple[UnpackReport, ...]]:
        """Return trees whose merged view `layers` are, the lowest first, held until `close`; few of them.

        Where layers are many, the lowest are kept merged into one tree, which takes the room of a copy.

        Args:
            layers: the lowest first; above a stored one there is no archive.

        Returns:
            the trees; and what could not be kept of each archive.

        Raises:
            MachineError: one is not in the store, or an archive can't be unpacked.
        """
        keys, trees, reports = list[str](), list[Path](), list[UnpackReport]()
        for layer in layers:
            match layer:
                case ArchiveLayer(path, digest):
                    keys.append(chain_key(keys[-1] if keys else "", digest))
                    below = self.below(keys[-1], keys[:-1], trees)
                    tree, report = self.unpacked(path, keys[-1], below)
                    reports.append(report)
                case StoredLayer(key):
                    keys.append(key)
                    tree = self.required(key)
            trees.append(tree)
        return self._folded(keys, trees), tuple(reports)

    def below(self, key: str, keys: Sequence[str], trees: Sequence[Path]) -> tuple[Path, ...]:
        """Return what `unpacked` takes as `below`.

        Args:
            key: of the layer that is to be unpacked, if it is not.
            keys: of those below it, the lowest first.
            trees: theirs.

        Raises:
            MachineError: they can't be merged into fewer.
        """
        if not trees or self.hold(key) is not None:
            return ()
        return (self.empty(), *self._folded(keys, trees))

    def merged(self, layers: Sequence[Layer]) -> Tree:
        """Return what a reader of trees takes for the merged view of `layers`, held until `close`.

        Args:
            layers: as for `stack`. Without any it is an empty directory.

        Raises:
            MachineError: as `stack`.
        """
        return tree_of(self.stack(layers)[0] or (self.empty(),))

    def _folded(self, keys: Sequence[str], trees: Sequence[Path]) -> tuple[Path, ...]:
        """Return `trees`, or fewer with the same merged view, so that steps can still be mounted on them."""
        if len(trees) <= 2 * _FOLDED:
            return tuple(trees)
        # By sixties, so that each further layer does not have all of them merged again.
        count = (len(trees) - _FOLDED) // _FOLDED * _FOLDED
        names = "\n".join(keys[:count])
        key = f"folded:{hashlib.sha256(names.encode()).hexdigest()}"
        tree = self.hold(key)
        if tree is None:
            with making(self.root, key, self._trees.tasks, "merges layers", self._check):
                tree = self.hold(key) or self._fold(key, trees[:count])
        return (tree, *trees[count:])

    def _fold(self, key: str, trees: Sequence[Path]) -> Path:
        with self._contents.stage() as staging:
            (staging.path / "layer" / TREE).mkdir(parents=True)
            self._trees.flatten(trees, staging.path / "layer" / TREE)
            self._publish(staging, key, {})
        return self.required(key)

    def digest(self, key: str, newest: int | None = None) -> str:
        """Return what `digests` returns of one layer."""
        return self.digests([key], newest)[0]

    def digests(self, keys: Sequence[str], newest: int | None = None) -> list[str]:
        """Return `sha256:…` of the canonical archives of layers: their diff ids in the OCI image-spec.

        To find one out the whole layer is read; it is kept beside it, so that this happens once.

        Args:
            keys: of the layers, which are held until `close`.
            newest: as in `Trees.pack`.

        Raises:
            MachineError: there is no such layer, or it can't be read.
        """
        found = {key: self.known_digest(key, newest) for key in keys}
        missing = [key for key, digest in found.items() if not digest]
        read = [self.required(key) for key in missing]
        made = self._trees.layer_digests(read, newest=newest) if read else []
        for key, digest in zip(missing, made, strict=True):
            found[key] = digest
            self.note_digest(key, digest, newest)
        return [found[key] for key in keys]

    def diff_ids(self, layers: Sequence[Layer], newest: int | None = None) -> list[str]:
        """Return what `digests` does of layers of all kinds, of which those from outside are not read.

        Raises:
            MachineError: as `digests`.
        """
        own = [layer.key for layer in layers if isinstance(layer, StoredLayer) and not layer.outside]
        found = dict(zip(own, self.digests(own, newest), strict=True))
        return [
            layer.digest
            if isinstance(layer, ArchiveLayer)
            else (layer.outside.diff_id if layer.outside else found[layer.key])
            for layer in layers
        ]

    def known_digest(self, key: str, newest: int | None = None) -> str:
        """Return what `digest` does if it was found out before, or an empty text.

        Raises:
            MachineError: as `digest`.
        """
        with suppress(OSError, UnicodeDecodeError):
            if _DIGEST.fullmatch(found := self._digest_file(key, newest).read_text("ascii")):
                return found
        return ""

    def changed(self, keys: Sequence[str]) -> list[str]:
        """Return those of layers that have not the digests any more that were found out before.

        Of the others, and of those whose digest nobody has asked for yet, it is kept. All of them are read.

        Args:
            keys: of layers, which are held until `close`; those that are gone by now do not count.

        Raises:
            MachineError: one can't be read.
        """
        found = list[str]()
        known: dict[int | None, dict[str, Path]] = {}
        for key in keys:
            if (tree := self.hold(key)) is not None:
                notes = (path.name.removeprefix("digest-") for path in tree.parent.parent.glob("digest-*"))
                times = sorted(int(note) for note in notes if note.isascii() and note.isdigit())
                dated = times and not self.known_digest(key)
                known.setdefault(times[0] if dated else None, {})[key] = tree
        for newest, trees in known.items():
            digests = self._trees.layer_digests(list(trees.values()), newest=newest)
            for key, digest in zip(trees, digests, strict=True):
                before = self.known_digest(key, newest)
                if not before:
                    self.note_digest(key, digest, newest)
                elif before != digest:
                    found.append(key)
        return found

    def note_digest(self, key: str, digest: str, newest: int | None = None) -> None:
        """Keep the digest of a layer beside it.

        Raises:
            MachineError: as `digest`.
        """
        with suppress(OSError):  # a store that is read-only: then it is found out again
            write_whole(self._digest_file(key, newest), digest.encode())

    def _digest_file(self, key: str, newest: int | None) -> Path:
        return self.required(key).parent.parent / f"digest-{'real' if newest is None else newest}"

    def adopt(self, key: str, directory: Path, ready: Callable[[], None] = lambda: None) -> Path:
        """Move a finished layer of a machine into the store, and hold it until `close`.

        The move itself comes last and is one rename(2): whoever dies before it has lost nothing, and the next
        one does all of it again.

        Args:
            key: names it from now on; where it exists already, that one stays.
            directory: the directory that holds the tree; it is gone afterwards unless the key exists.
            ready: called when nothing but the move is left to do.

        Returns:
            the tree.

        Raises:
            InputError: `key` can't be a file name.
            MachineError, OSError: it can't be moved, for example to another file system. It is where it was.
        """
        tree = self.hold(key)
        if tree is None:
            with self._contents.stage() as staging:
                self._publish(staging, key, {})
            content = self._contents.hold(_name(key))
            if content is None:
                raise MachineError(
                    f"{self.root}: another process removed the layer {key} while it was being made",
                    hint="try again",
                )
            try:
                ready()
                os.rename(directory, content / "layer")
            except BaseException:
                self._contents.release(content)
                self._contents.discard(_name(key))
                raise
            tree = content / "layer" / TREE
        return tree

    @contextmanager
    def unpacking(self, write: Callable[[Path], None]) -> Iterator[tuple[Path, UnpackReport]]:
        """Unpack the layer of a step that comes from outside; give the directory that `adopt` takes.

        Args:
            write: writes its archive without compression to the path that it gets.

        Raises:
            DamagedArchiveError: the archive is damaged or leads out of the tree.
            MachineError: it can't be unpacked, or the store not be written.
        """
        with self._contents.stage() as staging:
            archive, layer = staging.path / "archive", staging.path / "layer"
            write(archive)
            (layer / TREE).mkdir(parents=True)
            report = self._trees.unpack_upper(archive, layer / TREE)
            archive.unlink()
            yield layer, report

    def keys(self) -> dict[str, float]:
        """Return all keys, with the time (seconds since 1970) of their last use; 0 without a tree."""
        root = os.fspath(self._contents.link(()))
        found = {}
        for key in map("/".join, self._contents.names()):
            found[key] = 0.0
            with suppress(FileNotFoundError):
                found[key] = os.stat(f"{root}/{key}").st_mtime
        return found

    def size(self, key: str) -> int:
        """Return the bytes that the tree of `key` takes on its disk; measured once, it does not change."""
        content = self._contents.link(_name(key))
        with suppress(OSError, ValueError):
            return int((content / _SIZE).read_text("ascii"))
        size = allocated(content / "layer" / TREE)
        with suppress(OSError):
            write_whole(content.resolve() / _SIZE, str(size).encode())
        return size

    def path(self, key: str) -> Path:
        """Return where the tree of `key` is or would be; nobody holds it for that."""
        return self._contents.link(_name(key)) / "layer" / TREE

    def in_use(self, key: str) -> bool:
        """Whether a build holds the tree of `key` at this moment."""
        return self._contents.in_use(_name(key))

    def discard(self, key: str, *, unused: bool = False) -> bool:
        """Forget a key; its tree is removed by a `sweep` once no build holds it. False when there is none.

        Args:
            unused: leave it, and return False, when a build holds it.

        Raises:
            MachineError: the store can't be written.
        """
        return self._contents.discard(_name(key), unused=unused)

    def sweep(self) -> None:
        """Remove trees that nobody can find and nobody holds, which may take long.

        Raises:
            MachineError: the store can't be written.
        """
        self._contents.sweep()

    def overlay_problem(self, directory: Path) -> str:
        """Say why no overlay can be mounted whose upper directory is on the file system of `directory`.

        It is tried once, for as long as the machine runs.

        Returns:
            the reason; empty where overlays work.
        """
        known = self.root / "overlay.json"
        question = [self._boot_id, os.stat(directory).st_dev]
        with suppress(OSError, *MALFORMED):
            found = json.loads(known.read_text("utf-8"))
            if found["question"] == question:
                return str(found["problem"])
        problem = self._trees.overlay_problem(directory)
        with suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            write_whole(known, json.dumps({"question": question, "problem": problem}).encode())
        return problem

    def _unpacked(
        self, key: str, archive: Callable[[Path], Path], below: Sequence[Path]
    ) -> tuple[Path, UnpackReport]:
        tree = self.hold(key)
        if tree is None:
            with making(self.root, key, self._trees.tasks, "unpacks the base", self._check):
                tree = self.hold(key) or self._unpack(archive, key, below)
        info = self._info(tree.parent.parent) or {}
        return tree, UnpackReport(**info.get("report", {}))

    def _unpack(self, archive: Callable[[Path], Path], key: str, below: Sequence[Path]) -> Path:
        with self._contents.stage() as staging:
            path = archive(staging.path)
            layer = staging.path / "layer"
            layer.mkdir()
            if below:
                report = self._trees.unpack_layer(path, below, layer)
            else:
                (layer / TREE).mkdir()
                report = self._trees.unpack(path, layer / TREE, whiteouts=True)
            if path.parent == staging.path:
                path.unlink()
            self._publish(staging, key, report._asdict())
        return self.required(key)

    def _publish(self, staging: Staging, key: str, report: dict[str, Any]) -> None:
        info = {"boot": self._boot_id, "report": {**report, "examples": dict(report.get("examples", {}))}}
        (staging.path / _INFO).write_text(json.dumps(info), "utf-8")
        self._contents.publish(staging, _name(key))

    def _info(self, content: Path) -> dict[str, Any] | None:
        """Read what is known of a tree; None for one that a power failure may have spoiled."""
        try:
            info: dict[str, Any] = json.loads((content / _INFO).read_text("utf-8"))
            good = info["boot"] == self._boot_id or (content / DURABLE).exists()
        except (FileNotFoundError, *MALFORMED):
            return None
        except OSError as error:  # too many open files: that says nothing about the tree
            raise MachineError(f"{content / _INFO} can't be read: {error.strerror}") from error
        return info if good else None


@contextmanager
def making(
    root: Path, key: str, tasks: Tasks, what: str, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Wait until nobody else makes what has this key in the store `root`; or a few other keys.

    Args:
        tasks: told of the waiting.
        what: what another build does, for that.
        check: called again and again; may raise.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"making-{hashlib.sha256(key.encode()).hexdigest()[0]}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not try_lock(descriptor):
            with tasks.task(f"waiting for another build that {what}"):
                while not try_lock(descriptor):
                    check()
                    time.sleep(_PAUSE)
        yield
    finally:
        os.close(descriptor)


def store_name(idmap: IdMap) -> str:
    """Return the name of the directory of a `LayerTrees`: in another id mapping trees have other owners."""
    return f"{_FORM}-{idmap.key}"


def chain_key(below: str, digest: str) -> str:
    """Return the key of a layer on top of the one with the key `below`: the ChainID of OCI's image-spec."""
    return f"sha256:{hashlib.sha256(f'{below} {digest}'.encode()).hexdigest()}" if below else digest


def _name(key: str) -> tuple[str]:
    if _KEY.fullmatch(key) is None:
        raise InputError(f"expected the key of a layer, such as sha256:…, found {key!r:.200}")
    return (key,)


def boot_id() -> str:
    """Return what names the time since the machine was started last."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:  # then nothing is known to be of this boot
        return ""
