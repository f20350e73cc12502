"""A store of layers whose trees belong to this user, so that no sandbox is needed to remove them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from firebuild_bootstrap.image.layertrees import LayerTrees
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sandbox import Host, Runtime, Sandbox, find_runtime
from firebuild_bootstrap.sandbox.idmap import single

runtime = cache(find_runtime)


class PlainTrees(Trees):
    """Removes trees without a sandbox."""

    def __init__(self) -> None:
        super().__init__(sandbox(), _runtime())

    def remove(self, path: Path) -> None:
        remove_tree(path)


def sandbox() -> Sandbox:
    """In the id mapping of these trees."""
    return Sandbox(single(Host.current(), "a test"))


def _runtime() -> Runtime:
    return runtime()


def layer_trees(home: Path) -> LayerTrees:
    """Open the store; the caller closes it."""
    return LayerTrees(home, PlainTrees())


def key(name: str) -> str:
    """A key that is easy to read."""
    return name.encode().hex().ljust(64, "0")


def layer(home: Path, name: str, content: str) -> Path:
    """Make what a machine leaves of a step: a directory with the tree in it."""
    made = home / "builds" / name
    (made / "fs").mkdir(parents=True)
    (made / "fs" / "file").write_text(content)
    return made
