"""Forms of an image (ext4, tar, directory, OCI archive, …): what is asked for, and its delivery."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.trees import PackedFile, Tree, Trees, file_size
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.image.worker.readonly import PROGRAMS
from firebuild_bootstrap.layers.tree import copy_file
from firebuild_bootstrap.sizes import parse_size, split_fields
from firebuild_bootstrap.wire import DEFAULT_PATH
from firebuild_pki.values import dataclass

_FORM: Final = (
    "ext4, erofs, squashfs, tar, dir, oci, docker or registry, with ,dest=PATH and (ext4) ,size=2GiB or "
    "(oci, docker, registry) ,compression=gzip|zstd|uncompressed,compression-level=N,force-compression=true "
    "after it if wanted"
)
_LEVELS: Final = {"gzip": (4, 9), "zstd": (3, 22), "uncompressed": (0, 0)}
"""What compresses layers: the level by default, and the highest. Those of gzip are libdeflate's:
its 4 comes within a hundredth of what zlib's 6 gives, in a quarter of the time."""
_COMPRESSION: Final = ("compression", "compression-level", "force-compression")
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{16}\.partial")
PROGRAMS_PATH: Final = DEFAULT_PATH
"""Where the programs are that run in a sandbox, whatever the PATH of this process says."""


class OutputType(StrEnum):
    """The form of an image."""

    EXT4 = "ext4"
    TAR = "tar"
    DIR = "dir"
    EROFS = "erofs"
    SQUASHFS = "squashfs"
    OCI = "oci"
    DOCKER = "docker"
    REGISTRY = "registry"

    @property
    def has_layers(self) -> bool:
        """Whether it holds the image with its layers, and not its root file system; it is not kept then."""
        return self in (OutputType.OCI, OutputType.DOCKER, OutputType.REGISTRY)

    @property
    def file_name(self) -> str:
        """What it is called inside the store."""
        return "rootfs" if self is OutputType.DIR else f"rootfs.{self.value}"


@dataclass(frozen=True)
class Compression:
    """How layers are compressed that go out, as BuildKit's exporters have it.

    Args:
        kind: gzip, zstd or uncompressed.
        level: of gzip 0 to 9, of zstd 0 to 22.
        force: layers that came from outside are compressed like this, too, and not left as they came.
    """

    kind: str = "gzip"
    level: int = _LEVELS["gzip"][0]
    force: bool = False

    @property
    def suffix(self) -> str:
        """What the media type of a layer ends with (layer.md of the OCI image specification)."""
        return "" if self.kind == "uncompressed" else f"+{self.kind}"

    @property
    def form(self) -> str:
        """What names how a blob was made. The 1 is raised where the same data would come out otherwise."""
        return f"{self.kind}-{self.level}-1"


GZIP: Final = Compression()
"""How layers go out unless something else is asked for."""


@dataclass(frozen=True)
class OutputSpec:
    """One `--output`.

    Args:
        type: its form.
        dest: where a copy goes besides the store.
        size: bytes of an ext4 image, an error where they are too few; 0 leaves it to its content.
        compression: of the layers, where it has them.
    """

    type: OutputType
    dest: Path | None = None
    size: int = 0
    compression: Compression = GZIP


@dataclass(frozen=True)
class Artifact:
    """One finished output: `path` is relative to the image's directory, `size` in bytes.

    `digest` is `sha256:…` over the file, or over the archive that a directory would give, all times 0.
    """

    type: OutputType
    path: str
    size: int
    digest: str

    def as_json(self) -> dict[str, Any]:
        """Return it as in `image.json`."""
        return {"type": self.type.value, "path": self.path, "size": self.size, "digest": self.digest}


def parse_output(text: str) -> OutputSpec:
    """Read one `--output TYPE[,dest=PATH][,size=SIZE][,compression=KIND…]`, as CSV (RFC 4180).

    Raises:
        InputError: another type or key, an empty path or no size; the message shows what is expected.
    """
    try:
        kind, *pairs = split_fields(text) or [""]
    except ValueError as error:
        raise InputError(f"--output {text}: {error}") from error
    if kind not in tuple(OutputType):
        raise InputError(f"--output {text}: expected {_FORM}, found the type {kind!r}")
    members: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in ("dest", "size", *_COMPRESSION) or not equals or not value or key in members:
            raise InputError(f"--output {text}: expected {_FORM}, found {pair!r}")
        members[key] = value
    if "size" in members and kind != OutputType.EXT4:
        raise InputError(f"--output {text}: only ext4 has a size")
    if "dest" in members and kind == OutputType.REGISTRY:
        raise InputError(f"--output {text}: a registry has no dest", hint="the tags say where it goes")
    if not OutputType(kind).has_layers and any(name in members for name in _COMPRESSION):
        raise InputError(f"--output {text}: only oci, docker and registry have layers to compress")
    dest = Path(os.path.abspath(members["dest"])) if "dest" in members else None
    try:
        size = parse_size(members.get("size", "0"))
        return OutputSpec(OutputType(kind), dest, size, _compression(*map(members.get, _COMPRESSION)))
    except ValueError as error:
        raise InputError(f"--output {text}: {error}") from error


def _compression(kind: str | None, level: str | None, force: str | None) -> Compression:
    kind = "gzip" if kind is None else kind
    if kind not in _LEVELS:
        raise ValueError(f"compression: expected {', '.join(_LEVELS)}, found {kind!r}")
    usual, highest = _LEVELS[kind]
    if level is not None and not (re.fullmatch("[0-9]{1,2}", level) and int(level) <= highest):
        raise ValueError(
            f"compression-level: expected a number from 0 to {highest} for {kind}, found {level!r}"
        )
    if force not in (None, "true", "false"):
        raise ValueError(f"force-compression: expected true or false, found {force!r}")
    return Compression(kind, usual if level is None else int(level), force == "true")


def parse_outputs(texts: Sequence[str]) -> tuple[OutputSpec, ...]:
    """Read all `--output`.

    Raises:
        InputError: as `parse_output`, or a destination or a type comes twice; archives may, with several
            destinations.
    """
    specs = tuple(parse_output(text) for text in texts)
    keys = [(spec.type, spec.dest if spec.type.has_layers else None) for spec in specs]
    twice = next((kind for kind, dest in keys if keys.count((kind, dest)) > 1), None)
    if twice is not None:
        raise InputError(f"--output {twice.value} is given twice", hint="copy the file afterwards")
    dests = [spec.dest for spec in specs if spec.dest is not None]
    same = next((dest for dest in dests if dests.count(dest) > 1), None)
    if same is not None:
        raise InputError(f"--output dest={same} is given twice", hint="name a file for each output")
    return specs


def check_destinations(specs: Sequence[OutputSpec]) -> None:
    """Refuse, before anything is built, a destination that could not be written at the end.

    Raises:
        InputError: its parent is not a directory, a directory is in the way of a file, or a directory to be
            filled is not empty.
    """
    for spec in specs:
        if spec.dest is not None:
            _check_destination(spec.type, spec.dest)


def check_programs(specs: Sequence[OutputSpec]) -> None:
    """Make sure, before anything is built, that the programs that write the outputs are there.

    Raises:
        MachineError: one is missing.
    """
    for spec in specs:
        program, package = PROGRAMS.get(spec.type.value, ("", ""))
        if program:
            require_program(f"--output {spec.type.value}", program, package)


def require_program(what: str, program: str, package: str) -> None:
    """Make sure that a program is there for what runs in a sandbox.

    Args:
        what: needs it.
        program: its name.
        package: of Debian, that has it.

    Raises:
        MachineError: it is missing.
    """
    if shutil.which(program, path=PROGRAMS_PATH) is None:
        raise MachineError(
            f"{what} needs the program {program}, which is not in {PROGRAMS_PATH}",
            hint=f"install the package {package}; no other directories are searched",
        )


def export_tree(
    trees: Trees, root: Tree, outputs: Sequence[OutputSpec], into: Path, *, epoch: int | None = None
) -> tuple[Artifact, ...]:
    """Write the tree `root` into the directory `into`, once for each output.

    Args:
        epoch: seconds since 1970 for reproducible outputs (SOURCE_DATE_EPOCH), None for the real times.

    Raises:
        InputError: it does not fit into the size that is asked for.
        MachineError: the disk is full, or the tree can't be read.
    """
    made = []
    for output in outputs:
        target = into / output.type.file_name
        made.append(artifact(output, target, _write(trees, root, output, target, epoch)))
    return tuple(made)


def artifact(output: OutputSpec, target: Path, packed: PackedFile) -> Artifact:
    """Describe the finished output in `target`."""
    return Artifact(output.type, target.name, packed.size, packed.digest)


def _write(trees: Trees, root: Tree, output: OutputSpec, target: Path, epoch: int | None) -> PackedFile:
    if output.type is OutputType.EXT4:
        return trees.ext4(root, target, Ext4Options(size=output.size), newest=epoch)
    if output.type is OutputType.TAR:
        return trees.pack(root, target, newest=epoch)
    if output.type is not OutputType.DIR:
        return trees.readonly(root, target, output.type.value, newest=epoch)
    target.mkdir()
    trees.copy(root, target, newest=epoch)
    return trees.summary(target)


class Deliveries:
    """Outputs that appear at their destinations together, each complete, once all of them are written.

    Used as a context manager: where its block fails, nothing of them is left.

    Args:
        trees: copies directories with their owners, and removes them.
    """

    def __init__(self, trees: Trees) -> None:
        self._trees = trees
        self._partial: dict[Path, tuple[Path, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for dest, (partial, _lock) in self._partial.items() if kind is None else ():
                with _writing(dest):
                    os.rename(partial, dest)
        finally:
            with ExitStack() as cleanup:
                for partial, lock in self._partial.values():
                    cleanup.callback(os.close, lock)
                    cleanup.callback(self._trees.remove, partial)

    @contextmanager
    def writing(self, dest: Path, *, directory: bool = False) -> Iterator[Path]:
        """Give an empty file or directory beside `dest` to fill, which becomes `dest` in the end.

        It is locked meanwhile: one without a lock is of somebody who was killed, and the next to write in the
        same directory removes it.

        Raises:
            MachineError: it could not be written.
        """
        with _writing(dest):
            for left in dest.parent.glob(".*.partial"):
                if _PARTIAL.fullmatch(left.name):
                    _remove_dead(left, self._trees)
            partial, lock = _locked_partial(dest.parent, directory=directory)
            self._partial[dest] = partial, lock
            with self._trees.tasks.task(f"writing {dest}", measure=lambda: file_size(partial)):
                yield partial

    def copy(self, source: Path, spec: OutputSpec) -> None:
        """Copy an output in the store to its destination, if it has one.

        Raises:
            InputError: as `check_destinations`.
            MachineError: the copy could not be written.
        """
        if spec.dest is None:
            return
        _check_destination(spec.type, spec.dest)
        with self.writing(spec.dest, directory=spec.type is OutputType.DIR) as partial:
            if spec.type is OutputType.DIR:
                self._trees.copy(source, partial)
            else:
                _copy_file(source, partial)


@contextmanager
def _writing(dest: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{dest} could not be written: {error.strerror}") from error


def _locked_partial(parent: Path, *, directory: bool) -> tuple[Path, int]:
    while True:
        # Short, because a long name of the destination would be too long with anything added to it.
        partial = parent / f".{secrets.token_hex(8)}.partial"
        partial.mkdir() if directory else partial.touch(exist_ok=False)
        with suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if partial.exists():  # nobody has taken it for a dead one's
                return partial, lock
            os.close(lock)


def _remove_dead(partial: Path, trees: Trees) -> None:
    with suppress(OSError, MachineError):  # another user's
        lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trees.remove(partial)
        finally:
            os.close(lock)


def _check_destination(kind: OutputType, dest: Path) -> None:
    try:
        _require_room(kind, dest)
    except OSError as error:  # a name that is too long, a loop of links, a directory that can't be read
        raise InputError(f"--output dest={dest}: {error.strerror}", hint=_removal(dest)) from error


def _require_room(kind: OutputType, dest: Path) -> None:
    if not dest.parent.is_dir():
        raise InputError(f"--output dest={dest}: {dest.parent} is not a directory", hint="make it first")
    if kind is not OutputType.DIR:
        if dest.is_dir():
            raise InputError(f"--output dest={dest}: it is a directory", hint="name the file to write")
    elif dest.is_symlink() or (dest.exists() and (not dest.is_dir() or any(dest.iterdir()))):
        raise InputError(
            f"--output dest={dest}: expected a new or empty directory",
            hint=_removal(dest) or "remove it first",
        )


def _removal(dest: Path) -> str | None:
    """Name the command for a directory that its user can't remove: its files may be of subordinate ids."""
    if os.path.isdir(dest) and not os.path.islink(dest):
        remove = f"firebuild rm-tree {shlex.quote(str(dest))}"
        return f"name another one; `{remove}` removes this one with all that is in it, whoever owns that"
    return None


def _copy_file(source: Path, target: Path) -> None:
    """Copy what holds data; holes stay holes, so that a large image with free space takes little."""
    with open(source, "rb", buffering=0) as reader, open(target, "r+b", buffering=0) as writer:
        copy_file(reader.fileno(), writer.fileno())
        os.fsync(writer.fileno())
