"""What all machines do with a root file system in a directory: fill it, and say what it lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerTrees, StoredLayer
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.layers.apply import UnpackReport


def fill_tree(trees: Trees, stored: LayerTrees, layers: Sequence[Layer], root: Path) -> tuple[str, ...]:
    """Write `layers`, the lowest first, over each other into the empty directory `root`.

    Returns:
        notes on what could not be kept.

    Raises:
        MachineError: one is damaged or not in the store, or the disk is full.
    """
    notes = list[str]()
    for layer in layers:
        match layer:
            case ArchiveLayer(path):
                notes += unpack_notes(trees.unpack(path, root, whiteouts=True))
            case StoredLayer(key):
                trees.copy(stored.required(key), root, layer=True)
    return tuple(notes)


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
