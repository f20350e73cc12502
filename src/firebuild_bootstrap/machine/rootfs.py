"""What all machines do with a root file system in a directory: say what it lost, and write it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from firebuild_bootstrap.image.layertrees import LayerTrees
from firebuild_bootstrap.image.outputs import Artifact, OutputSpec, OutputType
from firebuild_bootstrap.image.trees import PackedFile, Tree, Trees
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.machine.base import ArchiveLayer, Layer, StoredLayer


def export_tree(
    trees: Trees, root: Tree, outputs: Sequence[OutputSpec], into: Path, *, epoch: int | None = None
) -> tuple[Artifact, ...]:
    """Write the tree `root` into the directory `into`, once for each output.

    Args:
        epoch: seconds since 1970 for reproducible outputs (SOURCE_DATE_EPOCH), None for the real times.

    Raises:
        MachineError: the disk is full, or the tree can't be read.
    """
    made = []
    for output in outputs:
        target = into / output.type.file_name
        made.append(artifact(output, target, _write(trees, root, output, target, epoch)))
    return tuple(made)


def fill_tree(trees: Trees, stored: LayerTrees, layers: Sequence[Layer], root: Path) -> tuple[str, ...]:
    """Write `layers`, the lowest first, over each other into the empty directory `root`.

    Returns:
        notes on what could not be kept.

    Raises:
        MachineError: one is damaged or not in the store, or the disk is full.
    """
    notes = list[str]()
    for number, layer in enumerate(layers):
        match layer:
            case ArchiveLayer(path):
                notes += unpack_notes(trees.unpack(path, root, whiteouts=number > 0))
            case StoredLayer(key):
                trees.copy(stored.required(key), root, layer=True)
    return tuple(notes)


def artifact(output: OutputSpec, target: Path, packed: PackedFile) -> Artifact:
    """Describe the finished output in `target`."""
    return Artifact(output.type, target.name, packed.size, packed.digest)


def _write(trees: Trees, root: Tree, output: OutputSpec, target: Path, epoch: int | None) -> PackedFile:
    if output.type is OutputType.EXT4:
        return trees.ext4(root, target, Ext4Options(size=output.size, epoch=epoch))
    if output.type is OutputType.TAR:
        return trees.pack(root, target, newest=epoch)
    target.mkdir()
    trees.copy(root, target, newest=epoch)
    return trees.summary(target)


def unpack_notes(report: UnpackReport, source: str = "the base") -> tuple[str, ...]:
    """Say in words what unpacking `source` could not keep."""
    texts = {
        "foreign": "{count} files of {source} belong to root now, because their owners don't exist in this "
        "build's id mapping: {names}",
        "stripped": "{count} of them lost their setuid or setgid bit, which would have meant root: {names}",
        "devices": "{count} device nodes of {source} were left out, which a sandbox can't make: {names}",
        "attributes": "{count} extended attributes of {source} could not be set: {names}",
    }
    notes = []
    for what, text in texts.items():
        count, names = getattr(report, what), report.examples.get(what, [])
        if count:
            more = ", …" if count > len(names) else ""
            notes.append(text.format(count=count, source=source, names=", ".join(names) + more))
    return tuple(notes)
