"""The forms of an image: its root file system as a file or directory, written from its layers when asked for.

    <image>/rootfs.ext4         a form
    <image>/rootfs.ext4.json    what is known of it; written last, so that no half-written form has one
    <image>/making-<x>/         one that is being written
    <image>/forms.lock          held by whoever writes one

A machine that boots from a form in the store changes it, which size and modification time tell; a directory
can't tell.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MALFORMED, MachineError
from firebuild_bootstrap.image.content_store import SPACE, lock_file, sync, sync_file_system, write_whole
from firebuild_bootstrap.image.outputs import Artifact, OutputSpec, OutputType, export_tree
from firebuild_bootstrap.image.trees import Tree, Trees
from firebuild_bootstrap.sizes import checked_size
from firebuild_pki.values import dataclass

_LOCK: Final = "forms.lock"
_MAKING: Final = "making-"


@dataclass(frozen=True)
class _Kept:
    """A form in the store.

    Args:
        asked: the size that was asked for, in bytes; 0 for none.
        mtime_ns: of the file, when it was written.
    """

    artifact: Artifact
    asked: int
    mtime_ns: int

    def as_json(self) -> dict[str, Any]:
        return {**self.artifact.as_json(), "asked": self.asked, "mtime_ns": self.mtime_ns}

    def is_untouched(self, directory: Path) -> bool:
        """Whether it is as it was written, as far as can be told."""
        if self.artifact.type is OutputType.DIR:
            return False
        found = (directory / self.artifact.path).lstat()
        return (found.st_size, found.st_mtime_ns) == (self.artifact.size, self.mtime_ns)


def kept_forms(directory: Path, *, untouched: bool = False) -> tuple[Artifact, ...]:
    """Return the forms in the directory of an image, as they were written.

    Args:
        directory: of the image.
        untouched: only files that nobody has written to since, as far as their size and time tell.
    """
    found = filter(None, (_read(directory, kind) for kind in OutputType))
    return tuple(kept.artifact for kept in found if not untouched or kept.is_untouched(directory))


def forget_form(directory: Path, kind: OutputType) -> None:
    """Have a form written again when it is asked for the next time."""
    (directory / _note_name(kind)).unlink(missing_ok=True)


def is_untouched(directory: Path, kind: OutputType) -> bool:
    """Whether the directory of an image has this form, and nobody has written to it since."""
    kept = _read(directory, kind)
    return kept is not None and kept.is_untouched(directory)


def reuse_forms(older: Path, new: Path) -> None:
    """Give the new directory of an image those forms of an older one that are files and as they were written.

    Both are made of the same layers.
    """
    for kind in OutputType:
        kept = _read(older, kind)
        if kept is None or not kept.is_untouched(older):
            continue
        with suppress(OSError):  # then it is written again when somebody asks for it
            os.link(older / kept.artifact.path, new / kept.artifact.path)
            _note(new, kept)


def keep_form(directory: Path, artifact: Artifact, asked: int = 0) -> None:
    """Take note of a form that was written into the directory of an image.

    Raises:
        MachineError: it can't be written.
    """
    try:
        _note(directory, _Kept(artifact, asked, (directory / artifact.path).lstat().st_mtime_ns))
    except OSError as error:
        raise MachineError(
            f"{directory / artifact.path} could not be stored: {error.strerror}", hint=SPACE
        ) from error


@contextmanager
def held_form(
    directory: Path,
    tree: Callable[[], Tree],
    spec: OutputSpec,
    trees: Trees,
    *,
    epoch: int | None = None,
    any_size: bool = False,
    changed: bool = False,
) -> Iterator[Path]:
    """Give the path of a form, which is written into the directory of the image unless it is there.

    Nobody else writes that form again meanwhile: it would be gone, or another one, to whoever copies it.

    Args:
        directory: of an image, held by the caller, or one that becomes it.
        tree: returns the image's root file system.
        spec: which form; its destination does not count.
        trees: writes it.
        epoch: no file of it is younger (SOURCE_DATE_EPOCH).
        any_size: take an ext4 image of whatever size.
        changed: take one that somebody has written to; it is written again otherwise.

    Raises:
        InputError: the files need more than the size.
        MachineError: the disk is full.
    """
    with _locked(directory):
        kept = _read(directory, spec.type)
        fits = kept is not None and (any_size or kept.asked == spec.size)
        if kept is None or not fits or not (changed or kept.is_untouched(directory)):
            _write(directory, tree(), spec, trees, epoch)
        yield directory / spec.type.file_name


def _write(directory: Path, tree: Tree, spec: OutputSpec, trees: Trees, epoch: int | None) -> None:
    for left in directory.glob(f"{_MAKING}*"):  # by somebody who was killed
        trees.remove(left)
    making = directory / f"{_MAKING}{secrets.token_hex(4)}"
    try:
        making.mkdir(mode=0o700)
        (artifact,) = export_tree(trees, tree, (spec,), making, epoch=epoch)
        _publish(making, directory, artifact)
    except OSError as error:
        raise MachineError(f"{making}: the form can't be stored: {error.strerror}", hint=SPACE) from error
    finally:
        trees.remove(making)
    keep_form(directory, artifact, spec.size)


def _publish(making: Path, directory: Path, artifact: Artifact) -> None:
    target, made = directory / artifact.path, making / artifact.path
    if artifact.type is OutputType.DIR:
        sync_file_system(made)
    else:
        sync(made)
    (directory / _note_name(artifact.type)).unlink(missing_ok=True)
    if artifact.type is OutputType.DIR and target.exists():
        os.rename(target, making / "older")
    os.rename(made, target)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(directory / _LOCK))
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):  # what is there already can still be used
                raise MachineError(
                    f"{directory}: nothing can be written there: {error.strerror}", hint=SPACE
                ) from error
        yield


def _note_name(kind: OutputType) -> str:
    return f"{kind.file_name}.json"


def _note(directory: Path, kept: _Kept) -> None:
    write_whole(directory / _note_name(kept.artifact.type), json.dumps(kept.as_json()).encode())


def _read(directory: Path, kind: OutputType) -> _Kept | None:
    try:
        document = json.loads((directory / _note_name(kind)).read_text("utf-8"))
        artifact = Artifact(kind, kind.file_name, checked_size(document["size"]), str(document["digest"]))
        kept = _Kept(artifact, int(document["asked"]), int(document["mtime_ns"]))
    except (FileNotFoundError, IsADirectoryError, *MALFORMED):
        return None  # it is not there, or what is known of it was spoiled
    return kept if os.path.lexists(directory / artifact.path) else None
