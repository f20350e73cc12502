"""What the cache finds, keeps and removes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.image import layertrees
from firebuild_bootstrap.image.layertrees import LayerTrees
from firebuild_bootstrap.machine import cleanup
from firebuild_bootstrap.sandbox import detect
from firebuild_bootstrap.solve.cache import Cache, Entry, new_id
from solve.stores import key, layer, layer_trees

BASE = f"sha256:{'1' * 64}"


def settle(trees: LayerTrees) -> None:
    """Do what cleanup processes do at their end."""
    cleanup.settle(trees.home, trees.root.name, detect)


class Store:
    """A cache in a directory, with a clock that goes on by a second at each use."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = layer_trees(home).root
        self.seconds = 1e9
        self.caches: list[Cache] = []
        self.made = 0

    def now(self) -> float:
        self.seconds += 1
        return self.seconds

    def open(self) -> Cache:
        """What one more process would have; closed by the end of the test."""
        self.caches.append(Cache(layer_trees(self.home), clock=self.now))
        return self.caches[-1]

    @contextmanager
    def build(self) -> Iterator[Cache]:
        """What a build has that is over with the block."""
        trees = layer_trees(self.home)
        yield Cache(trees, clock=self.now)
        trees.close()

    def directory(self, content: str = "") -> Path:
        self.made += 1
        return layer(self.home, str(self.made), content)

    def chain(self, *names: str, size: int = 1000, base: str = "") -> list[Entry]:
        """Make what is not there yet of a chain, as a build does, and end."""
        with self.build() as cache:
            entries = cache.find([key(name) for name in names], base)
            for name in names[len(entries) :]:
                parent = entries[-1] if entries else base
                made = cache.commit(
                    key(name), self.directory(name), parent=parent, text=f"RUN {name}", size=size
                )
                entries.append(made)
        for entry in entries:
            self.use(entry.id)
        return entries

    def use(self, identity: str) -> None:
        """Have the moment of the last use on the clock of this store."""
        path = (self.root / "names" / identity).resolve()
        os.utime(path, (now := self.now(), now))

    def unpack(self, digest: str = BASE) -> None:
        """Have a base in the store, as a machine unpacks it."""
        trees = layer_trees(self.home)
        trees.adopt(digest, self.directory("base"))
        trees.close()
        self.use(digest)

    def layers(self) -> list[str]:
        """The contents of the layers that are on the disk."""
        return sorted(path.read_text() for path in (self.root / "content").glob("*/layer/fs/file"))

    def found(self, *names: str, base: str = "") -> int:
        with self.build() as cache:
            return len(cache.find([key(name) for name in names], base))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    for cache in made.caches:
        cache.trees.close()


def test_an_empty_cache_finds_nothing(store: Store) -> None:
    assert store.found("a") == 0
    assert not store.open().usage()
    assert not store.open().prune(everything=True)
    assert not store.root.exists()


def test_a_chain_is_found_as_far_as_it_is_there(store: Store) -> None:
    a, b, c = store.chain("a", "b", "c", base=BASE)
    assert [a.parent, b.parent, c.parent] == [BASE, a.id, b.id]
    assert (c.path / "file").read_text() == "c"
    assert (c.text, c.size) == ("RUN c", 1000)
    assert store.open().find([key("a"), key("b"), key("c"), key("d")], BASE) == [a, b, c]
    assert store.found("a", "x", "c", base=BASE) == 1
    assert store.found("a", "b", "c") == 0, "a lies on a base"
    assert store.found("b", base=a.id) == 1
    assert store.found("c", "b", "a", base=BASE) == 0


def test_a_layer_may_be_made_of_any_number_of_linked_ones(store: Store) -> None:
    many = [(key("s"), f"{number:016x}-{0:016x}") for number in range(5000)]
    with store.build() as cache:
        cache.commit(key("a"), store.directory("a"), sources=many)
        [found] = cache.find([key("a")])
    assert len(found.sources) == len(many)


def test_of_two_builds_that_make_the_same_the_one_that_comes_further_is_found(store: Store) -> None:
    names = [key(name) for name in "abc"]
    first, second = store.open(), store.open()
    chains: dict[Cache, list[Entry]] = {first: [], second: []}

    def commit(cache: Cache, name: str) -> None:
        below = chains[cache][-1] if chains[cache] else ""
        chains[cache].append(cache.commit(key(name), store.directory(name), parent=below))

    for cache, name in ((first, "a"), (second, "a"), (first, "b"), (second, "b")):
        commit(cache, name)
        assert store.open().find(names) == chains[first]
    commit(second, "c")
    assert store.open().find(names) == chains[second]
    commit(first, "c")
    assert store.open().find(names) == chains[second]
    assert all((entry.path / "file").read_text() == "b" for entry in (chains[first][1], chains[second][1]))


def test_what_an_image_is_made_of_is_found_no_more_because_of_what_lies_on_it(store: Store) -> None:
    (old,) = store.chain("a")
    with store.build() as cache:
        new = cache.commit(key("a"), store.directory("new"), replace=True)
        on_it = cache.commit(key("b"), store.directory("b"), parent=old, base=old.id)
        assert [entry.id for entry in cache.find([key("a")])] == [new.id]
        assert cache.find([key("b")], old.id) == [on_it]


def test_what_is_committed_twice_is_there_once(store: Store) -> None:
    cache, identity = store.open(), new_id(key("a"))
    made = cache.commit(key("a"), store.directory("a"), identity=identity)
    assert store.open().commit(key("a"), store.directory("again"), identity=identity) == made
    assert (made.path / "file").read_text() == "a"


def test_what_lies_on_a_result_that_was_made_anew_is_not_found(store: Store) -> None:
    a, _b = store.chain("a", "b")
    cache = store.open()
    fresh = cache.commit(key("a"), store.directory("new"), replace=True)
    assert fresh.id != a.id
    assert store.found("a", "b") == 1
    b = cache.commit(key("b"), store.directory("b, new"), parent=fresh)
    assert cache.find([key("a"), key("b")]) == [fresh, b]
    assert store.layers() == ["a", "b", "b, new", "new"]
    assert len(cache.prune(older_than=1e6)) == 2
    assert store.layers() == ["b, new", "new"]


def test_files_from_a_stage_that_was_made_anew_are_copied_anew(store: Store) -> None:
    (stage,) = store.chain("stage")
    with store.build() as cache:
        copy = cache.commit(key("copy"), store.directory("copy"), sources=[stage.source])
    assert store.found("copy") == 1
    with store.build() as cache:
        cache.commit(key("stage"), store.directory("anew"), replace=True)
    assert store.found("copy") == 0
    assert {entry.id for entry in store.open().prune(older_than=1e6)} == {stage.id, copy.id}
    # A stage that is not there any more says nothing against what was made of it.
    (stage,) = store.chain("stage")
    with store.build() as cache:
        cache.commit(key("copy"), store.directory("copy"), sources=[stage.source], size=1)
        assert [entry.key for entry in cache.prune(everything=True)] == [key("stage")]
    assert store.found("copy") == 1


def test_what_a_build_uses_stays_with_all_below_it(store: Store) -> None:
    store.chain("a", "b", "c")
    store.chain("x", "y")
    cache = store.open()
    cache.find([key("a"), key("b")])
    used = {use.entry.text: use.in_use for use in store.open().usage()}
    assert [text for text, in_use in sorted(used.items()) if in_use] == ["RUN a", "RUN b"]
    removed = store.open().prune(everything=True)
    assert sorted(entry.text for entry in removed) == ["RUN c", "RUN x", "RUN y"]
    assert store.layers() == ["a", "b"]
    on_it = cache.commit(key("d"), store.directory("d"), parent=cache.find([key("a"), key("b")])[1])
    assert (on_it.path / "file").read_text() == "d"
    cache.trees.close()
    assert len(store.open().prune(everything=True, sweep=False)) == 3
    assert store.found("a") == 0
    assert store.layers() == ["a", "b", "d"]
    settle(store.open().trees)
    assert store.layers() == []


def test_the_least_recently_used_go_first_and_leaves_before_what_they_lie_on(store: Store) -> None:
    store.chain("a", "b", "c")
    store.chain("a", "b", "d")
    store.chain("x", "y")
    store.use(store.chain("a", "b", "c")[2].id)
    order = [use.entry.text[-1] for use in store.open().usage()]
    assert order == ["d", "y", "x", "c", "b", "a"], "what c lies on was used when c was"
    assert not store.open().prune(max_size=6000)
    assert [entry.text[-1] for entry in store.open().prune(max_size=3500, dry_run=True)] == ["d", "y", "x"]
    assert [entry.text[-1] for entry in store.open().prune(max_size=3500)] == ["d", "y", "x"]
    assert store.layers() == ["a", "b", "c"]
    assert [entry.text[-1] for entry in store.open().prune(max_size=2000)] == ["c"]
    assert store.found("a", "b") == 2


def test_what_was_not_used_for_long_goes(store: Store) -> None:
    store.chain("a", "b")
    store.seconds += 1000
    store.chain("x")
    store.chain("a")
    assert [entry.text[-1] for entry in store.open().prune(older_than=500)] == ["b"]
    assert store.layers() == ["a", "x"]


def test_a_base_goes_when_nothing_lies_on_it_and_is_not_needed_to_find_what_does(store: Store) -> None:
    store.unpack()
    store.chain("a", base=BASE)
    (use,) = (use for use in store.open().usage() if use.entry.is_base)
    assert (use.layers, use.found, use.entry.parent) == (1, True, "")
    assert use.entry.size >= 4
    assert not store.open().prune()
    with store.build() as cache:
        assert cache.trees.discard(BASE)
    assert store.found("a", base=BASE) == 1
    assert not store.open().prune(older_than=1e6)
    store.unpack()
    assert not store.open().prune(max_size=10**6), "a limit of the size is no reason to unpack it again"
    assert [entry.id for entry in store.open().prune(everything=True)][1:] == [BASE]
    store.unpack()
    assert [entry.id for entry in store.open().prune()] == [BASE]
    assert store.layers() == []


def test_what_crashes_leave_is_not_found_and_is_removed(store: Store, tmp_path: Path) -> None:
    store.chain("a", "b")
    (c,) = store.chain("c")
    (d,) = store.chain("d")
    (e,) = store.chain("e")
    cache = store.root / "cache"
    (cache / "keys" / c.key).unlink()
    (cache / "records" / d.id).write_text('{"key": "x"}')
    (cache / "fresh").write_text("half")
    for name in ("keys", "records"):
        (cache / name / "stray").write_text("{")
    (cache / "keys" / key("f")).symlink_to("elsewhere")
    with store.build() as other:
        other.trees.discard(e.id)
        other.trees.adopt(f"{'0' * 16}-{'0' * 16}", store.directory("no record"))
    for name in "cdef":
        assert store.found(name) == 0
    removed = ["RUN c", *sorted(f"{name}, without a record" for name in (f"{'0' * 16}-{'0' * 16}", d.id))]
    assert [entry.text for entry in store.open().prune(dry_run=True)] == removed
    assert [entry.text for entry in store.open().prune()] == removed
    assert store.layers() == ["a", "b"]
    assert len(list((cache / "keys").iterdir())) == len(list((cache / "records").iterdir())) == 2
    assert store.chain("a", "b", "c")[2].text == "RUN c"


def test_what_was_not_on_the_disk_when_the_power_failed_is_not_used(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(layertrees, "_BOOT_ID", boot)
    boot.write_text("first")
    store.chain("a", "b")
    with store.build() as cache:
        settle(cache.trees)
    store.chain("a", "b", "c")
    boot.write_text("second")
    assert store.found("a", "b", "c") == 2
    store.open().prune()
    assert store.layers() == ["a", "b"]


def test_a_parent_that_somebody_removed_is_an_error_and_the_layer_stays(store: Store) -> None:
    (a,) = store.chain("a")
    (store.root / "cache" / "records" / a.id).unlink()
    directory = store.directory("b")
    with pytest.raises(MachineError, match="another process removed it"):
        store.open().commit(key("b"), directory, parent=a)
    assert directory.exists()


def test_a_store_that_can_not_be_written_is_an_error_and_the_layer_stays(store: Store) -> None:
    directory = store.directory("a")
    store.chain("x")
    keys = store.root / "cache" / "keys"
    (keys / key("a")).mkdir()  # no link can take its place
    with pytest.raises(FirebuildError, match="the cache can't be written"):
        store.open().commit(key("a"), directory)
    assert (directory / "fs" / "file").read_text() == "a"
    assert store.layers() == ["x"]
    for path in (keys / key("a"), keys / key("x")):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    keys.rmdir()
    keys.write_text("")
    with pytest.raises(InputError, match="the cache can't be read"):
        store.found("a")


def test_a_layer_is_measured_unless_its_size_is_known(store: Store) -> None:
    entry = store.open().commit(key("a"), store.directory("x" * 5000), text="T" * 1000)
    assert entry.size >= 5000
    assert len(entry.text) < 1000
    assert store.open().find([key("a")]) == [entry]


def test_many_builds_and_prunes_at_once_agree(store: Store) -> None:
    """Whatever `find` and `commit` return is there, whole, for as long as it is held."""
    names = [[f"{first}", f"{first}{second}", f"{first}{second}x"] for first in "ab" for second in "ab"]
    stop = threading.Event()
    lock = threading.Lock()

    def build(names: list[str]) -> int:
        done = 0
        for _ in range(20):
            with store.build() as cache:
                entries = cache.find([key(name) for name in names])
                for name in names[len(entries) :]:
                    with lock:
                        directory = store.directory(name)
                    parent = entries[-1] if entries else ""
                    entries.append(cache.commit(key(name), directory, parent=parent, size=1))
                assert [(entry.path / "file").read_text() for entry in entries] == names
                done += 1
        return done

    def prune() -> None:
        while not stop.is_set():
            with store.build() as cache:
                cache.prune(everything=True)
                cache.usage()

    with ThreadPoolExecutor(6) as pool:
        pruning = pool.submit(prune)
        builds = [pool.submit(build, chain) for chain in names]
        try:
            assert [each.result() for each in builds] == [20] * 4
        finally:
            stop.set()
        pruning.result()
    store.open().prune(everything=True)
    assert store.layers() == []


@pytest.mark.parametrize("name", ["killing.py", "killing_images.py"])
def test_kills_at_any_moment_lose_nothing_that_was_finished_and_leave_nothing_half_made(
    tmp_path: Path, name: str
) -> None:
    program = Path(__file__).with_name(name)
    environ = {**os.environ, "PYTHONPATH": str(program.parents[1])}
    command = [sys.executable, str(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


steps = st.lists(
    st.tuples(
        st.sampled_from(["build", "anew", "prune", "hold", "drop"]), st.text("ab", min_size=1, max_size=3)
    ),
    max_size=10,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_a_parent_is_there_as_long_as_what_lies_on_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    store = Store(tmp_path_factory.mktemp("home"))
    held = store.open()
    for what, text in steps:
        names = [text[: end + 1] for end in range(len(text))]
        match what:
            case "build":
                store.chain(*names)
                assert store.found(*names) == len(names)
            case "anew":
                with store.build() as cache:
                    cache.commit(key(text[0]), store.directory(text[0]), size=1, replace=True)
            case "prune":
                store.open().prune(max_size=1000 * len(text))
            case "hold":
                held.find([key(name) for name in names])
            case "drop":
                held.trees.close()
        with store.build() as cache:
            usage = {use.entry.id: use for use in cache.usage()}
            assert all(use.entry.parent in usage or not use.entry.parent for use in usage.values())
            assert all((cache.trees.path(identity) / "file").exists() for identity in usage)
    held.trees.close()
    store.open().prune(everything=True)
    assert store.layers() == []
    for cache in store.caches:
        cache.trees.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda store, entry: (store.root / "cache/records" / entry.id).write_text('{"key":'),
        lambda store, entry: (store.root / "cache/records" / entry.id).write_text("[" * 100_000),
        lambda store, entry: (store.root / "cache/records" / entry.id).unlink(),
        lambda store, entry: (store.root / "cache/keys" / entry.key).unlink(),
        lambda store, entry: (entry.path.parent.parent / "layer.json").write_text(""),
        lambda store, entry: (entry.path.parent.parent / "layer.json").write_text("[]"),
        lambda store, entry: entry.path.rename(entry.path.with_name("elsewhere")),
        lambda store, entry: shutil.rmtree(entry.path.parent.parent),
        lambda store, entry: (store.root / "names" / entry.id).unlink(),
    ],
    ids=["half", "deep", "no record", "no key", "no note", "odd note", "no tree", "no content", "no name"],
)
def test_what_is_damaged_is_not_used_and_made_anew(
    store: Store, damage: Callable[[Store, Entry], object]
) -> None:
    a, b, _c = store.chain("a", "b", "c")
    damage(store, b)
    assert store.found("a", "b", "c") == 1
    again = store.chain("a", "b", "c")
    assert [entry.id == old.id for entry, old in zip(again, (a, b), strict=False)] == [True, False]
    assert [(entry.path / "file").read_text() for entry in again] == ["a", "b", "c"]
    store.open().prune()
    assert store.found("a", "b", "c") == 3
    store.open().prune(everything=True)
    assert store.layers() == []
    for folder in ("cache/keys", "cache/records", "content", "names", "staging"):
        assert not list((store.root / folder).iterdir()), folder
