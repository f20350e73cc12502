"""The digest of what a COPY sends, and the index that saves reading it again."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from firebuild_bootstrap.context import BuildContext, Entry
from firebuild_bootstrap.dockerfile.graph import Files, Heredoc
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.solve import inputs as module
from firebuild_bootstrap.solve.inputs import StatIndex, digest_of
from firebuild_bootstrap.solve.keys import Input

LATER = 10**10  # nanoseconds after which no file counts as young any more


def clock() -> int:
    return time.time_ns() + LATER


class Reads:
    """An index that counts how many files are read, empty ones left out: only attributes are read of them."""

    def __init__(self, index: StatIndex) -> None:
        self.index = index
        self.names: list[str] = []

    def digest(self, entry: Entry) -> bytes:
        assert entry.file is not None
        file = entry.file

        def opened() -> int:
            if entry.size:
                self.names.append(entry.path)
            return file.descriptor()

        return self.index.digest(file.status, opened)


def digest(root: Path, *sources: str, index: StatIndex | None = None) -> Input:
    with BuildContext(root) as context:
        resource = context.resource([Files(source) for source in sources or (".",)], check=False)
        return digest_of(resource.entries(), index or StatIndex(None, root))


def read_by(root: Path, index: StatIndex) -> list[str]:
    """The files that are read for a digest of all of `root`."""
    reads = Reads(index)
    with BuildContext(root) as context:
        for entry in context.resource([Files(".")], check=False).entries():
            if entry.file is not None:
                reads.digest(entry)
    return reads.names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "context"
    (made / "src").mkdir(parents=True)
    (made / "src" / "main.py").write_text("print()")
    (made / "src" / "empty").touch()
    (made / "src" / "link").symlink_to("main.py")
    return made


def test_times_and_the_place_of_the_context_do_not_count(root: Path, tmp_path: Path) -> None:
    before = digest(root)
    for path in (root, root / "src", root / "src" / "main.py"):
        os.utime(path, (1, 1))
    os.utime(root / "src" / "link", (1, 1), follow_symlinks=False)
    assert digest(root) == before
    os.rename(root, tmp_path / "moved")
    other = tmp_path / "moved"
    for name in ("main.py", "empty"):  # a directory lists its files in the order in which they came
        os.rename(other / "src" / name, other / name)
    os.rename(other / "empty", other / "src" / "empty")
    os.rename(other / "main.py", other / "src" / "main.py")
    assert digest(other) == before


def _rename(root: Path) -> None:
    os.rename(root / "src" / "main.py", root / "src" / "main2.py")


def _replace_link(root: Path) -> None:
    (root / "src" / "link").unlink()
    (root / "src" / "link").symlink_to("empty")


def _hard_link(root: Path) -> None:
    (root / "src" / "empty").unlink()
    os.link(root / "src" / "main.py", root / "src" / "empty")


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "src" / "main.py").write_text("print(1"),
        lambda root: (root / "src" / "main.py").chmod(0o755),
        lambda root: (root / "src").chmod(0o700),
        lambda root: (root / "src" / "new").touch(),
        lambda root: (root / "src" / "empty").unlink(),
        lambda root: (root / "dir").mkdir(),
        lambda root: (root / ".dockerignore").write_text("src/empty"),
        _rename,
        _replace_link,
        _hard_link,
    ],
)
def test_content_names_types_modes_and_links_count(root: Path, change: Callable[[Path], object]) -> None:
    index = StatIndex(None, root, clock_ns=clock)
    before = digest(root, index=index)
    change(root)
    assert digest(root, index=index).digest != before.digest


def test_a_single_file_counts_by_its_name_and_not_by_its_directory(root: Path) -> None:
    (root / "other").mkdir()
    (root / "other" / "main.py").write_text("print()")
    assert digest(root, "src/main.py") == digest(root, "other/main.py")
    assert digest(root, "src/main.py").digest != digest(root, "other").digest
    assert digest(root, "src/l*").digest == digest(root, "src/l?nk").digest


def test_what_has_no_file_on_this_machine_counts_by_its_content(root: Path) -> None:
    def entry(content: bytes, owner: tuple[int, int] | None = None) -> Entry:
        return Entry(
            "x",
            "x",
            tar.FILE,
            0o644,
            0,
            size=len(content),
            owner=owner,
            open=lambda: io.BytesIO(content),
        )

    index = StatIndex(None, root)
    found = {digest_of([each], index).digest for each in (entry(b"a"), entry(b"b"), entry(b"a", (1, 2)))}
    assert len(found) == 3
    with BuildContext(root) as context:
        inline = context.resource([Heredoc("f", "text")])
        assert digest_of(inline.entries(), index).files[0][0] == "f"


def test_nothing_is_read_twice_that_did_not_change(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "home" / "stat"
    index = StatIndex(directory, root, clock_ns=clock)
    assert read_by(root, index) == ["src/main.py"]
    assert read_by(root, index) == []
    index.save()
    index.save()
    assert read_by(root, StatIndex(directory, root)) == []
    (root / "src" / "main.py").write_text("PRINT()")
    assert read_by(root, StatIndex(directory, root)) == ["src/main.py"]
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert read_by(root, StatIndex(directory, other)) == ["src/main.py"], "each context has its own"


def test_a_file_whose_ctime_is_not_the_kernels_is_always_read(root: Path, tmp_path: Path) -> None:
    """Another image in the place of a mounted one has the same device, inode, size and times."""

    def same(status: os.stat_result, _: int) -> os.stat_result:
        return status

    index = StatIndex(tmp_path / "stat", root, clock_ns=clock)
    texts = []
    for text in ("one", "two"):
        path = root / "src" / "main.py"
        path.write_text(text)
        status = os.stat(path)
        given = os.stat_result((*status[:10], *([0.0] * 3), 10**18, 10**18, 10**18))
        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(module, "os", SimpleNamespace(**{**vars(os), "fstat": partial(same, given)}))
            texts.append(index.digest(given, partial(os.open, path, os.O_RDONLY)))
    assert texts == [hashlib.sha256(text).digest() for text in (b"one", b"two")]


def test_a_file_that_was_just_written_is_read_again(root: Path) -> None:
    """It might be written once more within the same tick, which nothing would tell."""
    status = os.stat(root / "src" / "main.py")
    ticks = 10**18 + 123_456_789
    stamped = os.stat_result((*status[:10], *([0.0] * 3), ticks, ticks, ticks))
    window = 5 * 10**7
    for age, remembered in ((0, False), (window, False), (window + 1, True)):
        assert module._racy(stamped, ticks + age) is not remembered
    future = os.stat_result((*status[:10], *([0.0] * 3), ticks, 2**70, ticks))
    assert module._racy(future, ticks + LATER)
    assert len(module._packed(future)) == len(module._packed(status))
    index = StatIndex(None, root)
    os.utime(root / "src" / "main.py")
    assert read_by(root, index) == ["src/main.py"]
    assert read_by(root, index) == ["src/main.py"]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(root: Path) -> None:
    file = root / "src" / "main.py"
    index = StatIndex(None, root, clock_ns=clock)
    real = module._content

    def content(descriptor: int, check: Callable[[], None]) -> bytes:
        read = real(descriptor, check)
        file.chmod(0o600)
        return read

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(module, "_content", content)
        read_by(root, index)
    assert read_by(root, index) == ["src/main.py"]
    # One that changed between the walk and the reading counts as what it is now.
    status = os.stat(file)
    file.write_text("changed by now")
    index = StatIndex(None, root, clock_ns=clock)
    index.digest(status, lambda: os.open(file, os.O_RDONLY))
    assert read_by(root, index) == []


def test_extended_attributes_count_and_capabilities_of_a_context_do_not(root: Path) -> None:
    index = StatIndex(None, root, clock_ns=clock)
    seen = [digest(root, index=index).digest]
    for name in ("src/main.py", "src/empty", "src"):
        for value in (b"1", b"2"):
            os.setxattr(root / name, "user.note", value)
            seen.append(digest(root, index=index).digest)
    assert len(set(seen)) == 7
    for name in ("src/main.py", "src/empty", "src"):
        os.removexattr(root / name, "user.note")
    assert digest(root, index=index).digest == seen[0]


def test_special_files_count_by_kind_and_device(root: Path) -> None:
    def entry(kind: tar.Kind, device: tuple[int, int] = (0, 0)) -> Entry:
        return Entry("x", "x", kind, 0o644, 0, device=device)

    entries = (
        entry(tar.FIFO),
        entry(tar.CHARACTER, (1, 3)),
        entry(tar.CHARACTER, (1, 5)),
        entry(tar.BLOCK_DEVICE, (1, 3)),
    )
    assert len({digest_of([each], StatIndex(None, root)).digest for each in entries}) == 4


def test_a_damaged_index_counts_as_none(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "stat"
    index = StatIndex(directory, root, clock_ns=clock)
    read_by(root, index)
    index.save()
    (file,) = directory.iterdir()
    good = file.read_bytes()
    for bad in (b"", b"x" * 100, good[:-1], good[:30] + b"x" + good[31:], b"\xff" * len(good)):
        file.write_bytes(bad)
        again = StatIndex(directory, root, clock_ns=clock)
        assert read_by(root, again) == ["src/main.py"]
        again.save()
        assert file.read_bytes() == good


def test_an_index_that_can_not_be_written_is_done_without(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "stat"
    index = StatIndex(directory, root, clock_ns=clock)
    read_by(root, index)
    index.save()
    (file,) = directory.iterdir()
    file.unlink()
    file.mkdir()  # no file can take its place
    index = StatIndex(directory, root, clock_ns=clock)
    read_by(root, index)
    index.save()
    assert list(directory.iterdir()) == [file]
    StatIndex(file / "file" / "below", root).save()


def test_an_index_forgets_what_no_build_asks_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "stat"
    monkeypatch.setattr(module, "_MAX_ENTRIES", 3)
    monkeypatch.setattr(module, "_MAX_INDEXES", 2)
    (root / "src" / "other.py").write_text("1")
    index = StatIndex(directory, root, clock_ns=clock)
    read_by(root, index)
    index.save()
    (root / "src" / "other.py").write_text("2")
    index = StatIndex(directory, root, clock_ns=clock)
    assert read_by(root, index) == ["src/other.py"]
    index.save()
    assert read_by(root, StatIndex(directory, root)) == []
    for number in range(3):
        other = tmp_path / f"context{number}"
        other.mkdir()
        (other / "file").write_text("x")
        index = StatIndex(directory, other, clock_ns=clock)
        read_by(other, index)
        index.save()
    assert len(list(directory.iterdir())) == 2
    assert read_by(root, StatIndex(directory, root)) == ["src/main.py", "src/other.py"]
