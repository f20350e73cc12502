"""One request as JSON on standard input, one answer as JSON on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.guest import kernel
from firebuild_bootstrap.guest.overlay import changes, flatten, mount_layers, own_mark, resemble
from firebuild_bootstrap.layers.apply import apply
from firebuild_bootstrap.layers.reader import LAYER_LIMITS, NO_LIMITS, DamagedArchive, LayerReader
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import DIRECTORY, FILE, SYMLINK, Entry, Hashed, LayerError, write_layer
from firebuild_bootstrap.layers.tree import Files, TreeSource, file_digest, tree_entries

_WORK: Final = "work"
_BLOCK: Final = 4096


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what `request` asks for and return the answer, or `error` and `hint`.

    Where `layers` names a directory, the tree is the merged view of the layers 0, 1 and so on in there. Where
    there is a directory `upper`, it can be changed, and what is changed is in `fs` there afterwards.
    """
    layers, mount, upper = (request.pop(name, "") for name in ("layers", "mount", "upper"))
    try:
        if layers:
            try:
                _mount(layers, mount, upper)
            except OSError as error:
                return {"error": f"{error.strerror}", "hint": "", "kind": "unmountable"}
        reply = _OPERATIONS[request.pop("operation")](**request)
        if upper:
            from firebuild_bootstrap.removal import remove_tree

            kernel.unmount(mount)
            remove_tree(f"{upper}/{_WORK}")
        return reply
    except DamagedArchive as error:
        return {
            "error": f"the archive is damaged: {error.message}",
            "hint": error.hint,
            "kind": "damaged",
        }
    except LayerError as error:
        return {"error": error.message, "hint": error.hint, "asked": error.asked}
    except OSError as error:
        where = f"{error.filename!r}: " if error.filename else ""
        return {"error": f"{where}{error.strerror or error}", "hint": ""}


def _mount(layers: str, target: str, upper: str) -> None:
    names = sorted(os.listdir(layers), key=int)
    os.makedirs(target)
    if not upper:
        mount_layers(layers, names, target)
        return
    fs, work = f"{upper}/fs", f"{upper}/{_WORK}"
    os.mkdir(fs)
    os.mkdir(work)
    resemble(fs, f"{layers}/{names[-1]}")
    mount_layers(layers, names, target, fs, work)


def _unpack(archive: str, root: str, whiteouts: bool = False) -> dict[str, Any]:
    with open(archive, "rb") as source, Root(root) as target:
        limits = LAYER_LIMITS if whiteouts else NO_LIMITS
        return apply(LayerReader(source.fileno(), limits, whiteouts=whiteouts), target)._asdict()


def _unpack_upper(archive: str, root: str) -> dict[str, Any]:
    with open(archive, "rb") as source, Root(root) as target:
        return apply(
            LayerReader(source.fileno(), LAYER_LIMITS, whiteouts=True), target, marks=own_mark()
        )._asdict()


def _pack(
    root: str, archive: str, newest: int | None = None, only: list[str] | None = None
) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.taking import Taken

    wanted = None if only is None else Taken(root, only)
    return _write(archive, tree_entries(root, newest=newest, only=wanted))


def _pack_image(image: str, archive: str) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.extfs import Ext4Image
    from firebuild_bootstrap.image.worker.imagewalk import image_entries

    source = Ext4Image(image)
    try:
        return _write(archive, image_entries(source))
    finally:
        source.close()


def _copy(source: str, target: str, newest: int | None = None, layer: bool = False) -> dict[str, Any]:
    files = changes(source, newest=newest) if layer else tree_entries(source, newest=newest)
    with Root(target) as root:
        return apply(TreeSource(files, whiteouts=layer), root)._asdict()


def _flatten(trees: str, target: str, newest: int | None = None) -> dict[str, Any]:
    return flatten(_numbered(trees), target, newest=newest)._asdict()


def _numbered(directory: str) -> list[str]:
    return [f"{directory}/{name}" for name in sorted(os.listdir(directory), key=int)]


def _digest(root: str, times: bool = False) -> dict[str, Any]:
    size = 0

    def measured() -> Files:
        nonlocal size
        for entry, content in tree_entries(root):
            size += -(-_bytes_of(entry) // _BLOCK) * _BLOCK
            yield entry, content

    return {"digest": _digest_of(measured(), times=times), "size": size}


def _bytes_of(entry: Entry) -> int:
    return {FILE: entry.stored, DIRECTORY: _BLOCK, SYMLINK: len(entry.linkname)}.get(entry.kind, 0)


def digest(root: str, *, times: bool = False) -> str:
    """Return the `sha256:…` of the tree `root` as a layer.

    Args:
        root: the tree.
        times: modification times count too; else all of them are 0.
    """
    return _digest_of(tree_entries(root), times=times)


def _digest_of(files: Files, *, times: bool) -> str:
    target = Hashed()
    write_layer(target, files if times else ((entry._replace(mtime_ns=0), data) for entry, data in files))
    return target.digest


def _layer_digests(trees: str, newest: int | None = None) -> dict[str, Any]:
    digests = []
    for tree in _numbered(trees):
        target = Hashed()
        write_layer(target, changes(tree, newest=newest))
        digests.append(target.digest)
    return {"digests": digests}


def _pack_layer(root: str, blob: str, kind: str, level: int, newest: int | None = None) -> dict[str, Any]:
    from firebuild_bootstrap.layers.compression import compressing

    with open(blob, "r+b", buffering=0) as file:
        compressed = Hashed(file)
        with compressing(compressed, kind, level) as archive:
            plain = Hashed(archive)
            write_layer(plain, changes(root, newest=newest))
    return {"diff_id": plain.digest, "digest": compressed.digest}


def _ext4(root: str, image: str, newest: int | None = None, **settings: Any) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4

    options = Ext4Options(**settings)
    make_ext4(tree_entries(root, newest=newest), image, options)
    if options.internal:
        return {"size": os.stat(image).st_size, "digest": ""}
    return _described(image)


def _readonly(root: str, image: str, form: str, newest: int | None = None) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.readonly import make_readonly

    make_readonly(form, root, image, newest)
    return _described(image)


def _described(file: str) -> dict[str, Any]:
    with open(file, "rb") as content:
        found = file_digest(content, "sha256")
        return {"size": os.fstat(content.fileno()).st_size, "digest": f"sha256:{found}"}


def _overlay(directory: str) -> dict[str, Any]:
    return {"problem": overlay_problem(directory)}


def overlay_problem(directory: str) -> str:
    """Try an overlay with its upper directory in `directory`: return why that fails; empty when it works."""
    import tempfile

    from firebuild_bootstrap.removal import remove_tree

    place = tempfile.mkdtemp(prefix="overlay-", dir=directory)
    merged = f"{place}/merged"
    try:
        return _overlay_tried(place, merged)
    except OSError as error:
        return f"{error.strerror or error}"
    finally:
        with suppress(OSError):
            kernel.unmount(merged)
        remove_tree(place, ignore_errors=True)


def _copies(directory: str) -> dict[str, Any]:
    from firebuild_bootstrap.guest.comparing import can_make_nodes

    try:
        can_make_nodes(directory)
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    return {"problem": ""}


def _overlay_tried(place: str, merged: str) -> str:
    for name in (merged, *(f"{place}/{name}" for name in ("empty", "lower/old", "upper", "work"))):
        os.makedirs(name, exist_ok=True)
    for name in ("gone", "old/hidden"):
        Path(f"{place}/lower/{name}").touch()
    mount_layers(place, ["empty", "lower"], merged, "upper", "work")
    os.unlink(f"{merged}/gone")
    os.unlink(f"{merged}/old/hidden")
    os.rmdir(f"{merged}/old")
    os.mkdir(f"{merged}/old")  # opaque now, which takes an extended attribute
    kernel.unmount(merged)
    # What it has left has to mean the same as a lower layer.
    mount_layers(place, ["lower", "upper"], merged)
    found = sorted(os.listdir(merged)), os.listdir(f"{merged}/old")
    return "" if found == (["old"], []) else f"files that were removed come back: {found}"


def _packages(root: str) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.packages import packages

    return packages(root)


def _write(archive: str, files: Files) -> dict[str, Any]:
    with open(archive, "wb", buffering=0) as file:
        target = Hashed(file)
        written = write_layer(target, files)
        os.fsync(file.fileno())
    return {"members": written.entries, "size": written.size, "digest": target.digest}


_OPERATIONS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "unpack": _unpack,
    "unpack-upper": _unpack_upper,
    "pack": _pack,
    "pack-image": _pack_image,
    "copy": _copy,
    "flatten": _flatten,
    "digest": _digest,
    "layer-digests": _layer_digests,
    "pack-layer": _pack_layer,
    "ext4": _ext4,
    "readonly": _readonly,
    "overlay": _overlay,
    "copies": _copies,
    "packages": _packages,
}


def main() -> None:
    """Answer the one request."""
    json.dump(answer(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
