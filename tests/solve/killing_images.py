"""Builds that store images, and prunes that know of them, killed at any moment, side by side.

A program of its own: it forks, which a process with threads must not.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from contextlib import ExitStack
from pathlib import Path

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.store import ImageLayer, ImageRecord, ImageStore, StoredImage
from firebuild_bootstrap.solve.cache import Cache
from solve.killing import Worker
from solve.stores import PlainTrees, key, layer, layer_trees, runtime

TAGS = [Reference("image", str(number)) for number in range(4)]


class Home:
    """A store as one process sees it."""

    def __init__(self, home: Path) -> None:
        self.path = home
        self.trees = layer_trees(home)
        self.images = ImageStore(home, PlainTrees)
        self.cache = Cache(self.trees, named=lambda: self.images.layer_keys(self.trees.root.name))

    def close(self) -> None:
        self.trees.close()
        self.images.close()

    def store(self, tag: Reference, turn: int) -> None:
        """Build a chain of layers, or find it, and store it as an image."""
        chain = [key(f"{turn % 5}{depth}") for depth in range(3)]
        entries = self.cache.find(chain)
        for each in chain[len(entries) :]:
            directory = layer(self.path, f"{os.getpid()}-{turn}-{len(entries)}", each)
            entries.append(self.cache.commit(each, directory, parent=entries[-1] if entries else "", size=1))
        record = ImageRecord(
            tag=str(tag),
            build_id="b",
            created="",
            firebuild_version="0",
            layers=tuple(ImageLayer(1, key=entry.id) for entry in entries),
            layer_store=self.trees.root.name,
        )
        with self.images.stage() as staging, self.cache.naming(entry.id for entry in entries):
            self.images.commit(staging, record)

    def check(self, image: StoredImage) -> None:
        """Fail unless all that an image needs is there."""
        for each in image.record.layers or ():
            path = self.trees.path(each.key)
            assert (path / "file").read_text().startswith(each.key[:16]), each


def build(home: Path, say: int) -> None:
    """Store images for ever, with layers that others are about to prune."""
    for turn in itertools.count():
        own = Home(home)
        tag = TAGS[turn % len(TAGS)]
        own.store(tag, turn)
        own.close()  # from now on only the image keeps its layers
        if (image := own.images.find(tag, hold=True)) is not None:
            own.check(image)
        own.close()
        os.write(say, b"stored\n")


def rename(home: Path, say: int) -> None:
    """Give images other names, and remove them, for ever."""
    for turn in itertools.count():
        own = Home(home)
        tag, other = TAGS[turn % len(TAGS)], Reference("other", "1")
        try:
            own.images.tag(tag, other)
            own.images.remove(tag)
            if (image := own.images.find(other, hold=True)) is not None:
                own.check(image)
            own.images.remove(other)
        except InputError:  # somebody was faster
            pass
        own.close()
        os.write(say, b"renamed\n")


def prune(home: Path, say: int) -> None:
    """Remove layers for ever."""
    while True:
        own = Home(home)
        own.cache.prune(everything=True)
        own.close()
        os.write(say, b"pruned\n")


def main(home: Path) -> None:
    """Kill all of them again and again; what an image needs is there, and without images nothing stays."""
    runtime()  # asked once, and not by each of them
    chance = random.Random(1)
    for _ in range(8):
        workers = [Worker(work, home) for work in (build, build, rename, prune, prune)]
        for worker in workers:
            worker.wait(1 + chance.randrange(8))
        with ExitStack() as killing:  # all of them, also where one has failed
            for worker in workers:
                killing.callback(worker.kill)
        own = Home(home)
        for image in own.images.list():
            own.check(image)
        own.close()
    own = Home(home)
    own.store(TAGS[0], 0)
    own.close()
    own.cache.prune(everything=True)
    own.check(own.images.inspect(TAGS[0]))
    for tag in own.images.names():
        own.images.remove(tag)
    own.cache.prune(everything=True)
    for folder in ("cache/keys", "cache/records", "content", "names", "staging"):
        assert not list((own.trees.root / folder).iterdir()), folder


if __name__ == "__main__":
    main(Path(sys.argv[1]))
