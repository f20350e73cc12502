"""One request as JSON on standard input, one answer as JSON on standard output."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from firebuild_bootstrap.guest.overlay import mount_layers
from firebuild_bootstrap.image.worker.digest import digest
from firebuild_bootstrap.image.worker.errors import TreeError
from firebuild_bootstrap.image.worker.pack import copy, pack, pack_nodes
from firebuild_bootstrap.image.worker.unpack import unpack


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what `request` asks for and return the answer, or `error` and `hint`.

    Where `layers` names a directory, the tree is the merged view of the layers 0, 1 and so on in there.
    """
    try:
        if layers := request.pop("layers", ""):
            _mount(layers, request.pop("mount"))
        return _OPERATIONS[request.pop("operation")](**request)
    except TreeError as error:
        return {"error": error.message, "hint": error.hint, "asked": error.asked}
    except OSError as error:
        where = f"{error.filename!r}: " if error.filename else ""
        return {"error": f"{where}{error.strerror or error}", "hint": ""}


def _mount(layers: str, target: str) -> None:
    os.makedirs(target)
    mount_layers(layers, sorted(os.listdir(layers), key=int), target)


def _unpack(archive: str, root: str) -> dict[str, Any]:
    with open(archive, "rb") as source:
        return unpack(source, root)._asdict()


def _pack(root: str, archive: str, newest: int | None = None) -> dict[str, Any]:
    with open(archive, "wb") as target:
        members = pack(root, target, newest=newest)
        target.flush()
        os.fsync(target.fileno())
    return {"members": members, **_summary(archive)}


def _pack_image(image: str, archive: str) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.extfs import Ext4Image
    from firebuild_bootstrap.image.worker.imagewalk import walk_image

    source = Ext4Image(image)
    with open(archive, "wb") as target:
        members = pack_nodes(walk_image(source), target)
    source.close()
    return {"members": members, **_summary(archive)}


def _copy(source: str, target: str) -> dict[str, Any]:
    return copy(source, target)._asdict()


def _digest(root: str, times: bool = False) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.ext4 import measure

    return {"size": measure(root)[0], "digest": digest(root, times=times)}


def _ext4(root: str, image: str, **options: Any) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4

    make_ext4(root, image, Ext4Options(**options))
    return _summary(image)


def _overlay(directory: str) -> dict[str, Any]:
    from firebuild_bootstrap.image.worker.overlays import problem

    return {"problem": problem(directory)}


def _summary(path: str) -> dict[str, Any]:
    with open(path, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
        return {"size": os.fstat(content.fileno()).st_size, "digest": f"sha256:{found}"}


_OPERATIONS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "unpack": _unpack,
    "pack": _pack,
    "pack-image": _pack_image,
    "copy": _copy,
    "digest": _digest,
    "ext4": _ext4,
    "overlay": _overlay,
}


def main() -> None:
    """Answer the one request."""
    json.dump(answer(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
