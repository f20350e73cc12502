"""Cache mounts: what outlives a RUN, who waits for whom, and what a killed process leaves."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.guest.caches import Caches
from firebuild_bootstrap.guest.errors import GuestError, Interrupted, StepError
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.sandbox import Bind
from guest.build import Build, run_command
from guest.server import a_directory, a_file, in_tree


def cache(sharing: str = "shared", **fields: Any) -> wire.CacheMount:
    return wire.CacheMount(**{"target": "/c", "id": "x", "sharing": sharing, **fields})


def empty(path: str) -> None:
    os.mkdir(path)


def unneeded(*_: str) -> None:
    raise AssertionError("it is there, and nobody has to wait")


class Store:
    """A directory of caches, in which time passes only while somebody waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stop = Stop()
        self.seconds = 0.0
        self.caches = Caches(str(path), self.stop, clock=self._clock)

    def _clock(self) -> float:
        self.seconds += 1
        return self.seconds

    @contextmanager
    def use(
        self,
        mount: wire.CacheMount,
        fill: Callable[[str], None] = empty,
        waiting: Callable[[], None] = unneeded,
    ) -> Iterator[Path]:
        with self.caches.use(mount, fill, waiting) as (path, _):
            yield Path(path)

    def place(self, number: int = 0, identifier: str = "x") -> Path:
        return self.path / hashlib.sha256(identifier.encode()).hexdigest() / str(number)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "caches")
    yield store
    store.stop.close()


def test_the_same_id_is_the_same_directory_and_another_id_is_not(store: Store) -> None:
    with store.use(cache()) as first:
        (first / "kept").touch()
    with store.use(cache("locked"), unneeded) as again, store.use(cache(id="../../y")) as other:
        assert (again, os.listdir(again)) == (first, ["kept"])
        assert os.listdir(other) == []
    assert sorted(path.name for path in store.path.iterdir()) == sorted(
        hashlib.sha256(text).hexdigest() for text in (b"x", b"../../y")
    )
    assert (store.place().parent / "id").read_text() == "x"
    assert store.path.stat().st_mode & 0o777 == 0o700


def test_shared_ones_are_used_together_and_private_ones_are_never(store: Store) -> None:
    with store.use(cache()) as first, store.use(cache(), unneeded) as second:
        assert first == second
        with store.use(cache("private")) as third, store.use(cache("private")) as fourth:
            assert [path.parent.name for path in (third, fourth)] == ["1", "2"]
    with store.use(cache("private"), unneeded) as free:
        assert free == first


def test_there_is_an_end_to_private_ones(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firebuild_bootstrap.guest.caches._MOST_PRIVATE", 1)
    with (
        store.use(cache("private")),
        pytest.raises(StepError, match="1 private ones are in use"),
        store.use(cache("private")),
    ):
        pass


@pytest.mark.parametrize(
    ("holder", "comer"), [("locked", "locked"), ("shared", "locked"), ("locked", "shared")]
)
def test_a_locked_one_is_waited_for_and_that_is_said_once(store: Store, holder: str, comer: str) -> None:
    said: list[str] = []
    with ExitStack() as held:
        held.enter_context(store.use(cache(holder)))

        def waiting() -> None:
            said.append("waiting")
            held.close()

        with store.use(cache(comer), unneeded, waiting) as path:
            assert (said, path) == (["waiting"], store.place() / "data")


def test_who_waits_can_be_stopped(store: Store) -> None:
    with (
        store.use(cache("locked")),
        pytest.raises(GuestError, match="SIGTERM"),
        store.use(cache("locked"), waiting=lambda: store.stop.set(Interrupted(signal.SIGTERM, "SIGTERM"))),
    ):
        pass
    with store.use(cache("locked"), unneeded):
        pass


def test_a_cache_that_is_moved_away_while_somebody_waits_for_it_is_made_anew(store: Store) -> None:
    with ExitStack() as held:
        old = held.enter_context(store.use(cache("locked")))

        def prune() -> None:
            os.rename(old.parent, store.path / "removed")
            held.close()

        with store.use(cache("locked"), waiting=prune) as new:
            assert new == old
            assert not os.path.samestat(new.stat(), (store.path / "removed/data").stat())


def test_a_new_one_is_made_once_and_only_whole(store: Store) -> None:
    def breaks(path: str) -> None:
        os.mkdir(path)
        (Path(path) / "half").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), store.use(cache(), breaks):
        pass
    assert not (store.place() / "data").exists()
    made: list[str] = []

    def counted(path: str) -> None:
        made.append(path)
        os.mkdir(path)

    def enter() -> None:
        with store.caches.use(cache(), counted, lambda: None):
            barrier.wait(60)

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(os.listdir(store.place())) == ["data", "lock"]


def _killed(path: str, sharing: str) -> None:
    def dies(new: str) -> None:
        os.mkdir(new)
        (Path(new) / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with Caches(path, Stop()).use(cache(sharing), dies, lambda: None):
        pass


def test_sigkill_leaves_nothing_locked_or_half_made(store: Store) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(str(store.path), "locked"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (half,) = [name for name in os.listdir(store.place()) if name.startswith("new-")]
    assert os.listdir(store.place() / half) == ["half"]
    with store.use(cache("private")) as path:
        assert (path.parent.name, os.listdir(path)) == ("0", [])
    assert sorted(os.listdir(store.place())) == ["data", "lock"]


# --- in a build -----------------------------------------------------------------------------------


def in_store(build: Build) -> Store:
    (build.directory / "caches").mkdir(mode=0o700)
    build.extra_binds.append(Bind(build.directory / "caches", "/run/caches", read_only=False))
    build.arguments += ["--caches", "/run/caches"]
    return Store(build.directory / "caches")


@pytest.mark.needs("bwrap", "busybox", "ids")
def test_caches_keep_their_content_owner_and_mode_from_run_to_run_and_build_to_build(build: Build) -> None:
    store = in_store(build)
    build.server.resources["files"] = [*a_directory("", 0o2750), *in_tree("a", b"first\n")]
    filled = cache(id="filled", target="/f", resource="files", mode=0o700)
    look = "busybox stat -c '%a %u:%g' /c /f; cat /f/a; echo more >> /f/a; { echo x > /r/y; } 2>&1"
    command = run_command(
        look, mounts=(cache(mode=0o1777, uid=1000, gid=50), filled, cache(target="/r", read_only=True))
    )
    assert build.run(command).status == 1
    again = build.run(run_command("busybox chmod 711 /f; cat /f/a", mounts=(filled,)))
    assert (again.status, build.server.successes) == (0, 1)
    lines = build.server.stdout.decode().splitlines()
    assert lines[:3] == ["1777 1000:50", "2750 0:0", "first"]
    assert "Read-only file system" in lines[3]
    assert lines[4:] == ["first", "more"]
    assert build.server.wants == ["files"]
    assert (store.place(identifier="filled") / "data").stat().st_mode & 0o7777 == 0o711
    assert sorted(path.name for path in build.image.iterdir()) == ["bin", "etc"]


@pytest.mark.needs("bwrap", "busybox")
def test_a_cache_that_begins_with_a_file_is_refused(build: Build) -> None:
    in_store(build)
    build.server.resources["files"] = a_file("one", b"1")
    abort = build.fail(run_command("true", mounts=(cache(resource="files"),)))
    assert "what it is filled with is not a directory" in abort.error


@pytest.mark.needs("bwrap", "busybox")
def test_one_cache_at_two_targets_does_not_wait_for_itself(build: Build) -> None:
    in_store(build)
    mounts = (cache("locked"), cache("shared", target="/d"), cache("private", target="/e"))
    build.succeed(run_command("echo x > /c/x; cat /d/x /e/x", mounts=mounts))
    assert build.server.stdout == b"x\nx\n"


@pytest.mark.needs("bwrap", "busybox")
def test_a_lock_lasts_as_long_as_its_run_and_no_command_of_that_can_drop_it(build: Build) -> None:
    store = in_store(build)
    shell = "for n in /proc/self/fd/*; do busybox readlink $n; done | busybox grep lock; echo up; sleep 60"
    with build.start(run_command(shell, mounts=(cache("locked"),))) as running:
        build.server.wait_for(lambda: b"up\n" in build.server.stdout)
        assert build.server.stdout == b"up\n"
        lock = os.open(store.place() / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        running.sandbox.kill()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)


@pytest.mark.needs("bwrap", "busybox")
def test_who_waits_for_a_cache_is_told_why(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    store = in_store(build)
    with ExitStack() as held:
        held.enter_context(store.use(cache("locked")))
        with build.start(run_command("echo in", mounts=(cache("locked"),))) as running:
            build.server.wait_for(lambda: b"waiting" in build.server.written("stderr"))
            held.close()
            assert running.finish().status == 0
    assert build.server.written("stderr") == (
        b"firebuild: waiting for the cache mount 'x', which another RUN uses\n"
    )


@pytest.mark.needs("bwrap", "busybox")
def test_without_a_place_for_caches_they_last_as_long_as_the_build(build: Build) -> None:
    """In a directory of the image that no command can look into, and that is gone at the end."""
    shell = "echo x >> /c/x; cat /c/x; { cat /.firebuild-*/caches/*/0/data/x; } 2>/dev/null"
    steps = [run_command(f"{shell}; true", step, mounts=(cache(),)) for step in (2, 4)]
    spy = "ls -A / | busybox grep -c firebuild; ls -A /.firebuild-*; busybox rm -rf /.firebuild-* 2>/dev/null"
    build.succeed(steps[0], run_command(f"{spy}; true", 3), steps[1])
    assert build.server.stdout == b"x\n1\nx\nx\n"
    assert sorted(path.name for path in build.image.iterdir()) == ["bin", "etc"]
