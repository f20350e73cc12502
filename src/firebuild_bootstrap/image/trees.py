"""Work on file trees in the id mapping of a build: what `image.worker` does, from the outside."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.layers.tar import LayerError
from firebuild_bootstrap.layers.tree import members
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sandbox import Bind, IdMode, Runtime, Sandbox, find_runtime
from firebuild_pki.display import one_line
from firebuild_pki.values import dataclass

_TREE: Final = "/tree"
_OTHER: Final = "/other"
_LAYERS: Final = "/layers"
_ARCHIVE: Final = "/archive"

Tree = Path | tuple[Path, ...]
"""A directory, or layers whose merged view it is: two at least, the lowest first."""


def tree_of(directories: Sequence[Path]) -> Tree:
    """Return the tree that one directory is, or that several are as layers, the lowest first."""
    return tuple(directories) if len(directories) > 1 else directories[0]


_VERBS: Final = {
    "digest": "read",
    "pack-layer": "pack",
    "ext4": "make an ext4 file system of",
    "readonly": "make an image of",
}


@dataclass(frozen=True)
class PackedFile:
    """A file that was made from a tree: its size in bytes and `sha256:…` digest."""

    size: int
    digest: str


@dataclass(frozen=True)
class PackedLayer:
    """A layer that was packed: the digests of its archive, without compression and with it."""

    diff_id: str
    digest: str


def file_size(path: Path) -> int:
    """Return the bytes that a file takes, without its holes; 0 where there is none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def allocated(path: Path) -> int:
    """Return the bytes that a tree takes on its disk; what nobody but its owners may enter is left out.

    Raises:
        OSError: it can't be read for another reason.
    """
    if not path.is_dir():
        with suppress(FileNotFoundError, PermissionError):
            return os.lstat(path).st_blocks * 512
        return 0
    size = 0.0
    folders: list[str | Path] = [path]
    while folders:
        try:
            # Not os.walk, which takes twice as long: a build waits for this.
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # gone by now
                        size += _share(entry.stat(follow_symlinks=False))
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return _allocated_deep(path)
            if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
                raise  # too many open files, say
    return round(size)


def _allocated_deep(path: Path) -> int:
    """Do the same where paths are longer than Linux takes; it costs three times the time."""
    size = 0.0
    with suppress(LayerError, OSError):
        for _, _, status in members(str(path)):
            size += _share(status)
    return round(size)


def _share(status: os.stat_result) -> float:
    # In units of 512 bytes whatever the block size is (stat(2)). Each name of a file counts for its part: a
    # layer may have millions, too many to remember.
    return status.st_blocks * 512 / (1 if stat.S_ISDIR(status.st_mode) else status.st_nlink)


class _UnmountableError(MachineError):
    """The layers of a tree can't be mounted as an overlay here."""


class DamagedArchiveError(MachineError):
    """An archive is not as its format wants it, or leads out of the tree; `reason` names no file of ours."""

    def __init__(self, message: str, *, hint: str | None = None, reason: str) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class Trees:
    """Packs, unpacks, copies, measures and removes file trees; owners are those inside the sandbox.

    Every method raises MachineError when the work can't be done; the message says which file and why.

    Args:
        sandbox: in its id mapping everything happens; it sees the paths in question and no others.
        runtime: how to run Python in there; found out when None.
        tasks: told of all that may take a while.
    """

    def __init__(self, sandbox: Sandbox, runtime: Runtime | None = None, tasks: Tasks | None = None) -> None:
        self.sandbox = sandbox
        self.tasks = tasks or Tasks()
        self._runtime = runtime or find_runtime()

    def unpack(self, archive: Path, root: Path, *, whiteouts: bool = False) -> UnpackReport:
        """Unpack the uncompressed tar `archive` into the existing directory `root`.

        Args:
            whiteouts: it is a layer, which also removes files of those below it.
        """
        binds = [Bind(root, _TREE, read_only=False), Bind(archive, _OTHER)]
        with self.tasks.task("unpacking the root file system", total=file_size(archive)):
            request = {"archive": _OTHER, "root": _TREE, "whiteouts": whiteouts}
            reply = self._ask(binds, f"unpack {archive}", "unpack", **request)
        return UnpackReport(**reply)

    def unpack_layer(self, archive: Path, below: Sequence[Path], directory: Path) -> UnpackReport:
        """Unpack a layer of an image so that it becomes one of an overlay.

        Args:
            archive: an uncompressed tar with whiteouts.
            below: the trees of the layers below, two at least, the lowest first.
            directory: an existing empty one; the tree is `fs` in there afterwards.
        """
        binds = [Bind(layer, f"{_LAYERS}/{number}") for number, layer in enumerate(below)]
        binds += [Bind(directory, _OTHER, read_only=False), Bind(archive, _ARCHIVE)]
        request = {"archive": _ARCHIVE, "root": _TREE, "whiteouts": True}
        request |= {"layers": _LAYERS, "mount": _TREE, "upper": _OTHER}
        try:
            with self.tasks.task("unpacking a layer", total=file_size(archive)):
                reply = self._ask(binds, f"unpack {archive}", "unpack", **request)
            return UnpackReport(**reply)
        except _UnmountableError:
            # Directories that it changes files in, and does not name, come out with the usual mode then.
            for left in list(directory.iterdir()):
                self.remove(left)
            (directory / "fs").mkdir()
            return self.unpack_upper(archive, directory / "fs")

    def unpack_upper(self, archive: Path, directory: Path) -> UnpackReport:
        """Unpack a layer as it is, whiteouts included, so that it becomes one of an overlay.

        Args:
            archive: an uncompressed tar with whiteouts, which nobody has looked at yet.
            directory: an existing empty one.
        """
        binds = [Bind(directory, _TREE, read_only=False), Bind(archive, _ARCHIVE)]
        with self.tasks.task("unpacking a layer", total=file_size(archive)):
            request = {"archive": _ARCHIVE, "root": _TREE}
            reply = self._ask(binds, "unpack the layer of a step", "unpack-upper", **request)
        return UnpackReport(**reply)

    def pack(
        self,
        root: Tree,
        archive: Path,
        *,
        newest: int | None = None,
        only: Sequence[str] | None = None,
    ) -> PackedFile:
        """Write the tree `root` to the new file `archive`.

        Args:
            newest: see `tree_entries`.
            only: patterns of `dockerfile.graph.Files`: all that they mean is there; None for everything.
        """
        return self._write("pack", root, archive, "archive", newest=newest, only=only)

    def ext4(self, root: Tree, image: Path, options: Ext4Options, *, newest: int | None = None) -> PackedFile:
        """Write the tree `root` to the new file `image` as an ext4 file system.

        Args:
            root: what is in it.
            image: path of the file.
            options: how the file system is made.
            newest: see `tree_entries`.

        Raises:
            InputError: it does not fit into `options.size`.
        """
        return self._write("ext4", root, image, "image", newest=newest, **options._asdict())

    def readonly(self, root: Tree, image: Path, form: str, *, newest: int | None = None) -> PackedFile:
        """Write the tree `root` to the new file `image` as a read-only file system.

        Args:
            root: what is in it.
            image: path of the file.
            form: erofs or squashfs.
            newest: see `tree_entries`.
        """
        return self._write("readonly", root, image, "image", form=form, newest=newest)

    def _write(self, operation: str, root: Tree, file: Path, name: str, **request: Any) -> PackedFile:
        """Have the worker write the new file, whose path is the member `name` of what it is asked."""
        request |= {"root": _TREE, name: f"{_OTHER}/{file.name}"}
        with self._writing(file):
            reply = self._read(root, file.parent, operation, **request)
        return PackedFile(reply["size"], reply["digest"])

    def ext4_of(self, trees: Mapping[str, Path], image: Path, options: Ext4Options) -> None:
        """Write a file system with trees, each at its path, to the new file `image`; see `ext4`.

        Raises:
            InputError: they do not fit into `options.size`.
        """
        binds = [Bind(tree, f"{_TREE}/{path}") for path, tree in trees.items()]
        binds.append(Bind(image.parent, _OTHER, read_only=False))
        request = {"root": _TREE, "image": f"{_OTHER}/{image.name}", **options._asdict()}
        with self._writing(image):
            self._ask(binds, f"make {image.name}", "ext4", **request)

    def pack_image(self, image: Path, archive: Path) -> PackedFile:
        """Write what is in the ext4 file system `image` to the new tar file `archive`, as `pack` does."""
        binds = [Bind(image, _TREE), Bind(archive.parent, _OTHER, read_only=False)]
        name = f"{_OTHER}/{archive.name}"
        with self.tasks.task("reading the machine's drive", measure=lambda: file_size(archive)):
            reply = self._ask(binds, f"read {image}", "pack-image", image=_TREE, archive=name)
        return PackedFile(reply["size"], reply["digest"])

    def copy(
        self, source: Tree, target: Path, *, newest: int | None = None, layer: bool = False
    ) -> UnpackReport:
        """Copy the content of `source` into the existing directory `target`.

        Args:
            source: what to copy.
            target: where to.
            newest: as in `pack`.
            layer: `source` is the tree of one layer of an overlay, which also removes files from `target`.
        """
        request = {"source": _TREE, "target": _OTHER, "newest": newest, "layer": layer}
        try:
            with self.tasks.task("copying the root file system"):
                return UnpackReport(**self._ask_about(source, target, "copy", **request))
        except _UnmountableError:
            if isinstance(source, Path):
                raise
            return self.flatten(source, target, newest=newest)

    def flatten(self, layers: Sequence[Path], target: Path, *, newest: int | None = None) -> UnpackReport:
        """Copy the merged view of any number of layers into a directory, as `copy`, but without a mount."""
        binds = [Bind(layer, f"{_LAYERS}/{number}") for number, layer in enumerate(layers)]
        binds.append(Bind(target, _OTHER, read_only=False))
        request = {"trees": _LAYERS, "target": _OTHER, "newest": newest}
        with self.tasks.task("merging layers"):
            return UnpackReport(**self._ask(binds, "merge layers", "flatten", **request))

    def summary(self, root: Tree, *, times: bool = False) -> PackedFile:
        """Return the bytes that `root` takes in blocks of 4096, and its digest as a layer.

        Args:
            times: modification times count too.
        """
        with self.tasks.task("computing the digest"):
            reply = self._read(root, None, "digest", root=_TREE, times=times)
        return PackedFile(reply["size"], reply["digest"])

    def packages(self, root: Tree) -> dict[str, Any]:
        """Return the packages that are found in a tree; see `worker.packages.packages`."""
        with self.tasks.task("looking for packages"):
            return self._read(root, None, "packages", root=_TREE)

    def layer_digests(self, trees: Sequence[Path], *, newest: int | None = None) -> list[str]:
        """Return the `sha256:…` of the archives of layers, each by itself; `newest` as in `pack`."""
        binds = [Bind(tree, f"{_LAYERS}/{number}") for number, tree in enumerate(trees)]
        with self.tasks.task("computing the digests of layers"):
            reply = self._ask(binds, "read a layer", "layer-digests", trees=_LAYERS, newest=newest)
        return [str(digest) for digest in reply["digests"]]

    def pack_layer(
        self, tree: Path, blob: Path, kind: str, level: int, *, newest: int | None = None
    ) -> PackedLayer:
        """Write the archive of one layer of an overlay into the existing file `blob`, compressed.

        Args:
            tree: the layer.
            blob: the file.
            kind: see `layers.compression.compressing`.
            level: the same.
            newest: as in `pack`.
        """
        name = f"{_OTHER}/{blob.name}"
        with self.tasks.task("packing a layer", measure=lambda: file_size(blob)):
            request = {"root": _TREE, "blob": name, "kind": kind, "level": level, "newest": newest}
            reply = self._read(tree, blob.parent, "pack-layer", **request)
        return PackedLayer(reply["diff_id"], reply["digest"])

    def overlay_problem(self, directory: Path) -> str:
        """Try an overlay with its upper directory in `directory`; return why it fails, empty if it works."""
        binds = [Bind(directory, _OTHER, read_only=False)]
        return str(self._ask(binds, f"try an overlay in {directory}", "overlay", directory=_OTHER)["problem"])

    def copies_problem(self, directory: Path) -> str:
        """Say why a step on a copy of its root can leave no layer in `directory`; empty if it can.

        What the copy has not any more has to be in the layer, as a node or an attribute of its file system.
        """
        binds = [Bind(directory, _OTHER, read_only=False)]
        return str(self._ask(binds, f"try a layer in {directory}", "copies", directory=_OTHER)["problem"])

    def remove(self, path: Path) -> None:
        """Remove `path` and everything below, whoever owns it; nothing happens when it does not exist."""
        if not path.is_symlink() and not path.exists():
            return
        if self.sandbox.idmap.mode is IdMode.FULL:  # no owner is out of this process's own reach
            try:
                remove_tree(path)
            except OSError as error:
                raise _not_removed(path, error.strerror or str(error)) from error
            return
        parent = Bind(path.parent.resolve(), _OTHER, read_only=False)
        command = self._runtime.module("firebuild_bootstrap.removal", f"{_OTHER}/{path.name}")
        binds = [*self._runtime.binds, parent]
        done = self.sandbox.run(command, binds=binds, env=self._runtime.env, interruptible=False)
        if done.returncode != 0:
            complaint = done.stderr.decode("utf-8", "replace").strip().replace(_OTHER, str(path.parent))
            reason = one_line(complaint) or f"its worker ended with status {done.returncode}"
            raise _not_removed(path, reason)

    def _writing(self, file: Path) -> AbstractContextManager[None]:
        return self.tasks.task(f"writing {file.name}", measure=lambda: file_size(file))

    def _read(self, tree: Tree, other: Path | None, operation: str, **request: Any) -> dict[str, Any]:
        """Have something done with a tree as `_ask_about`, or with a copy of it where it can't be mounted."""
        try:
            return self._ask_about(tree, other, operation, **request)
        except _UnmountableError:
            merged = Path(mkdtemp(dir=other, prefix=".merged-"))
            merged.chmod(0o755)
            try:
                self.copy(tree, merged)
                return self._ask_about(merged, other, operation, **request)
            finally:
                self.remove(merged)

    def _ask_about(self, tree: Tree, other: Path | None, operation: str, **request: Any) -> dict[str, Any]:
        """Have something done with a tree, which the worker sees read-only, and the directory `other`."""
        if isinstance(tree, Path):
            binds = [Bind(tree, _TREE)]
        else:
            binds = [Bind(layer, f"{_LAYERS}/{number}") for number, layer in enumerate(tree)]
            request |= {"layers": _LAYERS, "mount": _TREE}
        if other is not None:
            binds.append(Bind(other, _OTHER, read_only=False))
        what = tree if isinstance(tree, Path) else "the root file system"
        return self._ask(binds, f"{_VERBS.get(operation, operation)} {what}", operation, **request)

    def _ask(self, binds: list[Bind], task: str, operation: str, **request: Any) -> dict[str, Any]:
        done = self.sandbox.run(
            self._runtime.module("firebuild_bootstrap.image.worker"),
            binds=[*self._runtime.binds, *binds],
            env=self._runtime.env,
            stdin=json.dumps({"operation": operation, **request}).encode(),
        )
        try:
            reply: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            words = done.stderr.decode("utf-8", "replace").strip().splitlines()
            last = words[-1] if words else f"its worker ended with status {done.returncode}"
            hint = self.sandbox.remedy() if last.startswith("bwrap: ") else None
            raise MachineError(f"could not {task}: {last}", hint=hint) from None
        if reply.get("asked"):
            raise InputError(reply["error"], hint=reply["hint"])
        if "error" in reply:
            message, hint = _placed(f"could not {task}: {reply['error']}", binds), reply["hint"] or None
            if os.strerror(errno.ENOSPC) in reply["error"]:
                hint = hint or MAKE_ROOM
            if reply.get("kind") == "damaged":
                raise DamagedArchiveError(message, hint=hint, reason=reply["error"])
            raise _KINDS.get(reply.get("kind", ""), MachineError)(message, hint=hint)
        return reply


_ROOM: Final = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))


def _placed(message: str, binds: Sequence[Bind]) -> str:
    """Name the place that was written to, where it is the reason, and not by its name in the sandbox."""
    for bind in binds:
        if not bind.read_only:
            inside = rf"(?<![\w./-]){re.escape(bind.target)}/"
            outside = f"{bind.source}/".replace("\\", r"\\")
            message = re.sub(inside, outside, message)
            if any(words in message for words in _ROOM) and str(bind.source) not in message:
                message = f"{bind.source}: {message}"
    return message


MAKE_ROOM: Final = (
    "`firebuild du` shows what the store takes, `firebuild cache prune` and `images prune` free some"
)
_KINDS: Final = {"unmountable": _UnmountableError}


def _not_removed(path: Path, reason: str) -> MachineError:
    return MachineError(f"{path} could not be removed: {reason}", hint="remove it as root")
