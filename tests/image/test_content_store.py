from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image import content_store as module
from firebuild_bootstrap.image.content_store import ContentStore
from support import unprivileged

KEY = ("a", "1")


def read(store: ContentStore) -> str | None:
    found = store.hold(KEY)
    if found is None:
        return None
    text = (found / "text").read_text()
    store.release(found)
    return text


def put(store: ContentStore, text: str, key: tuple[str, ...] = KEY) -> Path:
    with store.stage() as staging:
        (staging.path / "text").write_text(text)
        return store.publish(staging, key)


def leftovers(root: Path) -> tuple[int, int]:
    return len(os.listdir(root / "staging")), len(os.listdir(root / "content"))


def test_an_entry_is_there_when_it_is_published_and_not_before(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    assert read(store) is None
    assert store.names() == []
    with store.stage() as staging:
        (staging.path / "text").write_text("one")
        assert read(store) is None
        store.publish(staging, KEY)
    assert store.names() == [KEY]
    assert read(store) == "one"


def test_a_store_that_can_not_be_read_does_not_seem_to_be_empty(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = ContentStore(root)
    put(store, "one")
    put(store, "other", ("b", "1"))
    for path in (*root.rglob("*"), root, *list(root.parents)[:-2]):
        if path.is_relative_to(root):
            os.chown(path, 65534 if os.geteuid() == 0 else -1, -1, follow_symlinks=False)
        else:
            path.chmod(0o755)
    (root / "names/b").chmod(0)
    with unprivileged():
        for look in (store.names, store.sweep):
            with pytest.raises(MachineError, match=r"names/b: the store can't be read: Permission denied"):
                look()
        put(store, "two")  # what it replaces is left for a later sweep
        assert read(store) == "two"
    (root / "names/b").chmod(0o755)
    assert leftovers(root) == (0, 3)
    assert (store.link(("b", "1")) / "text").read_text() == "other"
    store.sweep()
    assert leftovers(root) == (0, 2)


def test_a_store_that_is_named_by_a_link_keeps_its_entries(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = ContentStore(tmp_path / "link")
    put(store, "one")
    put(store, "other", ("b", "1"))
    store.sweep()
    assert read(store) == read(ContentStore(tmp_path / "real")) == "one"
    put(ContentStore(tmp_path / "real"), "two")
    store.sweep()
    assert read(store) == "two"
    assert leftovers(tmp_path / "real") == (0, 2)


def test_no_other_user_gets_at_an_entry(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert put(ContentStore(tmp_path), "set-user-ID programs, perhaps").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_what_is_not_published_is_removed(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    with pytest.raises(ZeroDivisionError), store.stage() as staging:
        (staging.path / "text").write_text("half")
        raise ZeroDivisionError
    assert leftovers(tmp_path) == (0, 0)


def test_a_replaced_entry_goes_with_its_content(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    put(store, "one")
    put(store, "two")
    assert read(store) == "two"
    assert leftovers(tmp_path) == (0, 1)


def test_a_held_entry_stays_readable_until_the_holder_closes(tmp_path: Path) -> None:
    reader, writer = ContentStore(tmp_path), ContentStore(tmp_path)
    put(writer, "one")
    held = reader.hold(KEY)
    assert held is not None
    put(writer, "two")
    assert (held / "text").read_text() == "one"
    reader.close()
    writer.sweep()
    assert not held.exists()
    assert leftovers(tmp_path) == (0, 1)


def test_an_entry_is_discarded_with_its_empty_name(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    put(store, "one")
    put(store, "other", ("a", "2"))
    assert store.discard(KEY)
    assert not store.discard(KEY)
    assert store.names() == [("a", "2")]
    assert store.discard(("a", "2"))
    assert leftovers(tmp_path) == (0, 0)
    # A writer that made sure of this directory may be waiting for its turn.
    assert list((tmp_path / "names").iterdir()) == []
    put(store, "again")
    assert store.names() == [KEY]


def test_a_writer_killed_at_any_moment_leaves_the_old_entry_or_the_new_one(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    put(store, "old")
    seen = set()
    for moment in ("write_text", "sync", "rename", "replace", "end"):
        script = textwrap.dedent(f"""
            import os, signal, sys
            from pathlib import Path
            from firebuild_bootstrap.image import content_store as module
            def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
            moment = {moment!r}
            if moment == "sync": module._sync_content = die
            if moment == "rename": os.rename = die
            if moment == "replace": os.replace = die
            store = module.ContentStore(Path({str(tmp_path)!r}))
            with store.stage() as staging:
                (staging.path / "text").write_text("new")
                if moment == "write_text": die()
                if moment == "end": store._sweep = die
                store.publish(staging, ("a", "1"))
        """)
        done = subprocess.run([sys.executable, "-c", script], check=False)
        assert done.returncode == -signal.SIGKILL
        seen.add((moment, read(ContentStore(tmp_path))))
    assert seen == {
        ("write_text", "old"), ("sync", "old"), ("rename", "old"), ("replace", "old"), ("end", "new"),
    }  # fmt: skip
    ContentStore(tmp_path).sweep()
    assert leftovers(tmp_path) == (0, 1)
    assert os.listdir(tmp_path / "names/a") == ["1"]


def test_of_concurrent_writers_one_wins_and_nothing_is_torn(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from firebuild_bootstrap.image.content_store import ContentStore
        for _ in range(8):
            store = ContentStore(Path(sys.argv[1]))
            with store.stage() as staging:
                (staging.path / "text").write_text(sys.argv[2] * 1000)
                store.publish(staging, ("a", "1"))
    """)
    put(ContentStore(tmp_path), "w" * 1000)
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path, letter]) for letter in "xyz"]
    while any(writer.poll() is None for writer in writers):
        store = ContentStore(tmp_path)
        found = store.hold(KEY)
        assert found is not None
        text = (found / "text").read_text()
        assert len(text) == 1000
        assert len(set(text)) == 1
        store.close()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    ContentStore(tmp_path).sweep()
    assert leftovers(tmp_path) == (0, 1)


def test_the_staging_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    with store.stage() as staging:
        put(ContentStore(tmp_path), "other")
        ContentStore(tmp_path).sweep()
        assert staging.path.is_dir()


def test_what_can_not_be_removed_now_is_left_for_later(tmp_path: Path) -> None:
    put(ContentStore(tmp_path), "one")

    def refuse(path: Path) -> None:
        raise MachineError(f"{path} could not be removed")

    put(ContentStore(tmp_path, refuse), "two")
    assert leftovers(tmp_path) == (0, 2)


def test_a_store_that_can_not_be_written_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/.* the store can't be written: Not a directory") as caught:
        put(ContentStore(tmp_path / "file/store"), "x")
    assert caught.value.hint is not None
    assert "FIREBUILD_HOME" in caught.value.hint
    (tmp_path / "store/names").mkdir(parents=True)
    (tmp_path / "store/names/a").touch()
    with pytest.raises(MachineError, match="the store can't be written"):
        put(ContentStore(tmp_path / "store"), "x")


def test_a_store_on_a_full_disk_is_not_the_users_mistake(tmp_path: Path) -> None:
    full = module.unusable_store("x", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, MachineError)
    assert "free some space" in (full.hint or "")


def test_an_entry_that_nobody_may_write_any_more_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ContentStore(tmp_path)
    put(store, "x")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", "/a/link")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"^/a/link: the store can't be written: Operation not permitted"):
        put(store, "y")


def test_one_content_has_as_many_names_as_it_was_given(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    with store.stage() as staging:
        (staging.path / "text").write_text("one")
        store.publish(staging, KEY, ("a", "2"))
    assert store.alias(KEY, ("a", "3"))
    assert not store.alias(("b", "1"), ("a", "4"))
    assert store.names() == [KEY, ("a", "2"), ("a", "3")]
    assert store.discard(KEY)
    assert store.discard(("a", "2"))
    assert leftovers(tmp_path) == (0, 1)
    assert store.discard(("a", "3"))
    assert leftovers(tmp_path) == (0, 0)


def test_a_tree_is_synced_with_its_file_system_or_where_that_is_missing_with_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(os, "sync", lambda: called.append(True))
    put(ContentStore(tmp_path), "x")
    assert called == []
    store = ContentStore(tmp_path)
    with store.stage() as staging:
        (staging.path / "tree").mkdir()
        store.publish(staging, KEY)
    assert called == [True]


def test_a_content_that_is_just_being_removed_counts_as_gone(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    content = put(store, "x")
    lock = module._lock(content, fcntl.LOCK_EX)
    assert store.hold(KEY) is None
    os.close(lock)


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (("/store/content/a",), "/store/content/a"),
        (("/store/new", None, "/store/names/a"), "/store/names/a"),
        # A link says where to find what it names from its own place.
        (("../content/a", None, "/store/names/a"), "/store/names/a"),
        (("../content/a",), "/store"),
        ((7,), "/store"),
        ((), "/store"),
    ],
)
def test_the_place_of_an_error_is_one_that_its_reader_can_find(names: tuple[Any, ...], place: str) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)
    assert module.place_of(error, Path("/store")) == place
