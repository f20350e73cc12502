"""What the cache finds, keeps and removes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.solve import cache as module
from firebuild_bootstrap.solve.cache import Cache, Entry


def key(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


class Store:
    """A cache in a directory, with a clock that goes on by a second at each use."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "cache" / "results" / "default"
        self.seconds = 1e9
        self.caches: list[Cache] = []
        self.made = 0

    def now(self) -> float:
        self.seconds += 1
        return self.seconds

    def open(self) -> Cache:
        """What one more process would have."""
        self.caches.append(Cache(self.home, clock=self.now))
        return self.caches[-1]

    def directory(self, content: str = "", size: int = 0) -> Path:
        self.made += 1
        made = self.home / "builds" / str(self.made)
        made.mkdir(parents=True)
        (made / "file").write_text(content)
        return made

    def chain(self, *names: str, size: int = 1000) -> list[Entry]:
        """Make what is not there yet of a chain, as a build does, and end."""
        with Cache(self.home, clock=self.now) as cache:
            entries = cache.find([key(name) for name in names])
            for name in names[len(entries) :]:
                parent = entries[-1] if entries else None
                made = cache.commit(
                    key(name),
                    self.directory(name),
                    parent=parent,
                    text=f"RUN {name}",
                    size=size,
                )
                entries.append(made)
            return entries

    def layers(self) -> list[str]:
        """The texts of the layers that are on the disk."""
        return sorted((path / "file").read_text() for path in (self.root / "layers").iterdir())

    def found(self, *names: str) -> int:
        with Cache(self.home, clock=self.now) as cache:
            return len(cache.find([key(name) for name in names]))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    for cache in made.caches:
        cache.close()


def test_an_empty_cache_finds_nothing(store: Store) -> None:
    assert store.found("a") == 0
    assert not store.open().usage()
    assert not (store.home / "cache").exists()
    assert Cache.scopes(store.home) == []


def test_a_chain_is_found_as_far_as_it_is_there(store: Store) -> None:
    a, b, c = store.chain("a", "b", "c")
    assert [a.parent, b.parent, c.parent] == ["", a.id, b.id]
    assert (c.path / "file").read_text() == "c"
    assert (c.text, c.size) == ("RUN c", 1000)
    assert store.open().find([key("a"), key("b"), key("c"), key("d")]) == [a, b, c]
    assert store.found("a", "x", "c") == 1
    assert store.found("b") == 0, "b lies on a"
    assert store.found("c", "b", "a") == 0


def test_the_first_of_two_builds_that_make_the_same_wins(store: Store) -> None:
    first, second = store.open(), store.open()
    won = first.commit(key("a"), store.directory("first"), parent=None)
    loser = store.directory("second")
    same = second.commit(key("a"), loser, parent=None)
    assert same == won
    assert loser.exists()
    assert (same.path / "file").read_text() == "first"
    on_it = second.commit(key("b"), store.directory("b"), parent=same)
    assert first.find([key("a"), key("b")]) == [won, on_it]


def test_what_lies_on_a_result_that_was_made_anew_is_not_found(store: Store) -> None:
    a, _b = store.chain("a", "b")
    cache = store.open()
    fresh = cache.commit(key("a"), store.directory("new"), parent=None, replace=True)
    assert fresh.id != a.id
    assert store.found("a", "b") == 1
    b = cache.commit(key("b"), store.directory("b, new"), parent=fresh)
    assert cache.find([key("a"), key("b")]) == [fresh, b]
    assert store.layers() == ["a", "b", "b, new", "new"]
    cache.prune(older_than=1e6)
    assert store.layers() == ["b, new", "new"]


def test_files_from_a_stage_that_was_made_anew_are_copied_anew(store: Store) -> None:
    (stage,) = store.chain("stage")
    cache = store.open()
    copy = cache.commit(key("copy"), store.directory("copy"), parent=None, sources=[stage])
    assert store.found("copy") == 1
    with store.open() as other:
        other.commit(key("stage"), store.directory("anew"), parent=None, replace=True)
    assert store.found("copy") == 0
    cache.close()
    assert {entry.id for entry in store.open().prune(older_than=1e6)} == {stage.id, copy.id}
    # A stage that is not there any more says nothing against what was made of it.
    (stage,) = store.chain("stage")
    cache.commit(key("copy"), store.directory("copy"), parent=None, sources=[stage])
    with store.open() as other:
        other.forget(stage)
        assert [entry.key for entry in other.prune(max_size=1)] == [key("stage")]
    assert store.found("copy") == 1


def test_what_a_build_uses_stays_with_all_below_it(store: Store) -> None:
    store.chain("a", "b", "c")
    store.chain("x", "y")
    cache = store.open()
    cache.find([key("a"), key("b")])
    assert [use.in_use for use in store.open().usage() if use.entry.text in ("RUN a", "RUN b")] == [
        True,
        True,
    ]
    removed = store.open().prune(everything=True)
    assert sorted(entry.text for entry in removed) == ["RUN c", "RUN x", "RUN y"]
    assert store.layers() == ["a", "b"]
    cache.close()
    store.open().prune(everything=True)
    assert store.layers() == []
    assert list((store.home / "removing").iterdir()) == []


def test_a_build_that_goes_on_holds_its_last_layer_only(store: Store) -> None:
    cache = store.open()
    parent = None
    open_files = len(os.listdir("/proc/self/fd"))
    for name in "abcdefgh":
        parent = cache.commit(key(name), store.directory(name), parent=parent)
    assert len(os.listdir("/proc/self/fd")) == open_files + 1
    assert not store.open().prune(everything=True)
    assert parent is not None
    cache.forget(parent)
    cache.forget(parent)
    assert len(store.open().prune(everything=True)) == 8


def test_the_least_recently_used_go_first_and_leaves_before_what_they_lie_on(store: Store) -> None:
    store.chain("a", "b", "c")
    store.chain("a", "b", "d")
    store.chain("x", "y")
    store.found("a", "b", "c")
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
    store.found("a")
    assert [entry.text[-1] for entry in store.open().prune(older_than=500)] == ["b"]
    assert store.layers() == ["a", "x"]


def test_scopes_have_nothing_in_common(store: Store) -> None:
    store.chain("a")
    with Cache(store.home, "other") as other:
        assert other.find([key("a")]) == []
        other.commit(key("a"), store.directory("other"), parent=None)
        assert len(other.usage()) == 1
    assert Cache.scopes(store.home) == ["default", "other"]
    assert len(store.open().prune(everything=True)) == 1


def test_what_crashes_leave_is_not_found_and_is_removed(store: Store, tmp_path: Path) -> None:
    store.chain("a", "b")
    (c,) = store.chain("c")
    (d,) = store.chain("d")
    (e,) = store.chain("e")
    cache = store.root
    (cache / "keys" / c.key).unlink()
    (cache / "records" / d.id).write_text("{")
    (cache / "fresh").write_text("half")
    for name in ("keys", "records"):
        (cache / name / "stray").write_text("")
    (cache / "keys" / key("f")).symlink_to("elsewhere")
    os.rename(e.path, tmp_path / "gone")
    os.rename(store.directory("no record"), cache / "layers" / "stray")
    for name in "cdef":
        assert store.found(name) == 0
    assert [entry.text for entry in store.open().prune()] == ["RUN c"]
    assert store.layers() == ["a", "b"]
    assert len(list((cache / "keys").iterdir())) == len(list((cache / "records").iterdir())) == 2
    assert store.chain("a", "b", "c")[2].text == "RUN c"


def test_what_was_not_on_the_disk_when_the_power_failed_is_not_used(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(module, "_BOOT_ID", boot)
    boot.write_text("1-1\n")
    store.chain("a", "b")
    store.open().settle()
    store.chain("a", "b", "c")
    boot.write_text("2-2\n")
    assert store.found("a", "b", "c") == 2
    store.open().prune()
    assert store.layers() == ["a", "b"]
    (store.root / "synced" / "1-1").write_text("damaged")
    assert store.found("a") == 0
    boot.unlink()  # a system without /proc: nothing else can be known
    store.chain("x")
    assert store.found("x") == 1


def test_only_so_many_boots_are_remembered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BOOTS", 1)
    store.open().settle()
    other = store.root / "synced" / "other"
    other.write_text("1")
    os.utime(other, (1, 1))
    store.open().prune()
    assert not other.exists()


def test_a_parent_that_somebody_removed_is_an_error_and_the_layer_stays(store: Store) -> None:
    (a,) = store.chain("a")
    (store.root / "records" / a.id).unlink()
    directory = store.directory("b")
    with pytest.raises(MachineError, match="somebody removed it"):
        store.open().commit(key("b"), directory, parent=a)
    assert directory.exists()


def test_a_store_that_can_not_be_written_is_an_error_and_the_layer_stays(store: Store) -> None:
    directory = store.directory("a")
    store.chain("x")
    (store.root / "keys" / key("a")).mkdir()  # no link can take its place
    with pytest.raises(FirebuildError, match="the cache can't be written"):
        store.open().commit(key("a"), directory, parent=None)
    assert (directory / "file").read_text() == "a"
    assert store.layers() == ["x"]
    blocked = store.home / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="the cache can't be read"):
        Cache(blocked).find([key("a")])


def test_a_layer_is_measured_unless_its_size_is_known(store: Store) -> None:
    entry = store.open().commit(key("a"), store.directory("x" * 5000), parent=None, text="T" * 1000)
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
        for _ in range(50):
            with Cache(store.home) as cache:
                entries = cache.find([key(name) for name in names])
                for name in names[len(entries) :]:
                    with lock:
                        directory = store.directory(name)
                    parent = entries[-1] if entries else None
                    entries.append(cache.commit(key(name), directory, parent=parent, size=1))
                assert [(entry.path / "file").read_text() for entry in entries] == names
                done += 1
        return done

    def prune() -> int:
        removed = 0
        while not stop.is_set():
            with Cache(store.home) as cache:
                removed += len(cache.prune(everything=True))
                cache.usage()
        return removed

    with ThreadPoolExecutor(6) as pool:
        pruning = pool.submit(prune)
        builds = [pool.submit(build, chain) for chain in names]
        assert [each.result() for each in builds] == [50] * 4
        stop.set()
        pruning.result()
    store.open().prune(everything=True)
    assert store.layers() == []


def test_kills_at_any_moment_lose_nothing_that_was_finished_and_leave_nothing_half_made(
    tmp_path: Path,
) -> None:
    program = Path(__file__).with_name("killing.py")
    command = [sys.executable, program, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


steps = st.lists(
    st.tuples(
        st.sampled_from(["build", "anew", "prune", "hold", "drop"]), st.text("ab", min_size=1, max_size=3)
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_a_parent_is_there_as_long_as_what_lies_on_it(
    tmp_path_factory: Any, steps: list[tuple[str, str]]
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
                entry = held.commit(key(text[0]), store.directory(text[0]), parent=None, size=1, replace=True)
                held.forget(entry)
            case "prune":
                store.open().prune(max_size=1000 * len(text))
            case "hold":
                held.find([key(name) for name in names])
            case "drop":
                held.close()
        usage = {use.entry.id: use for use in store.open().usage()}
        assert all(use.entry.parent in usage or not use.entry.parent for use in usage.values())
        assert all(use.entry.path.is_dir() for use in usage.values())
        assert {path.name for path in (store.root / "layers").glob("*")} == set(usage)
    held.close()
    store.open().prune(everything=True)
    assert not list((store.root / "layers").glob("*"))
