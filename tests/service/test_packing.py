"""What a guest that takes files packed is sent: one tar stream, its groups, and nothing of holes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.dockerfile.graph import Files
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.reader import LayerReader
from firebuild_bootstrap.messages import decode_to_guest
from firebuild_bootstrap.service.packing import packed

HERE = Location("Dockerfile", 5)
Pieces = list[tuple[int, bytes]]
Received = list[tuple[tuple[bool, bool, bool, bool], tar.Entry, Pieces]]


def received(messages: Iterable[bytes]) -> Received:
    """Read what a guest would read: the group of each entry, the entry, and where its content belongs."""
    group = (False, False, False, False)

    class Data:
        def __init__(self, messages: Iterator[bytes]) -> None:
            self._messages = messages

        def read(self, _: int, /) -> bytes:
            nonlocal group
            for message in self._messages:
                data = decode_to_guest(message)
                if isinstance(data, memoryview):
                    assert 0 < len(data) <= wire.CHUNK_BYTES
                    return bytes(data)
                group = (
                    data.group.from_directory,
                    data.group.keep_owner,
                    data.group.of_tree,
                    data.group.passed,
                )
            return b""

    found: Received = []
    reader = LayerReader(Data(iter(messages)))
    for entry in reader:
        found.append((group, entry, [(offset, bytes(piece)) for offset, piece in reader.pieces()]))
    assert reader.marked or not found
    return found


def laid_out(entry: tar.Entry, pieces: Pieces) -> bytes:
    """Return the content of a file as it is on the guest's disk; zeros may have come as a hole."""
    content = bytearray(entry.size)
    for offset, piece in pieces:
        content[offset : offset + len(piece)] = piece
    assert len(content) == entry.size
    return bytes(content)


def entries(context: Path, *sources: str) -> Iterator[Entry]:
    opened = BuildContext(context)  # open for as long as its entries are used
    yield from opened.resource([Files(source) for source in sources], location=HERE).entries()


def one(name: str, content: bytes, **fields: object) -> Entry:
    kept = {"from_directory": True, "mode": 0o644, "mtime_ns": 5, **fields}
    size = len(content)
    return Entry(name, name, tar.FILE, size=size, open=lambda: io.BytesIO(content), **kept)  # type: ignore[arg-type]


def test_entries_of_every_kind_and_size_arrive_as_they_are(context: Path) -> None:
    sizes = [0, 1, 511, 512, 513, 128 * 1024, 128 * 1024 + 1, 1 << 20, (1 << 20) + 1, 3_500_000]
    files = {f"f{size}": os.urandom(size) for size in sizes}
    files |= {f"zeros{size}": os.urandom(max(0, size - 5000)) + bytes(min(size, 5000)) for size in sizes}
    (context / "d/sub").mkdir(parents=True)
    for name, content in files.items():
        (context / "d" / name).write_bytes(content)
    (context / "d/link").symlink_to("f1")
    os.link(context / "d/f513", context / "d/sub/again")
    found = received(packed(entries(context, "d")))
    assert {group for group, _, _ in found} == {(True, False, False, False)}
    contents = {entry.path: laid_out(entry, pieces) for _, entry, pieces in found if entry.kind == tar.FILE}
    assert contents == files
    kinds = {entry.path: (entry.kind, entry.linkname) for _, entry, _ in found}
    assert kinds["link"] == (tar.SYMLINK, "f1")
    assert kinds["sub/again"] == (tar.HARDLINK, "f513")
    assert kinds["sub"] == kinds[""] == (tar.DIRECTORY, "")
    status = (context / "d/f1").stat()
    (entry,) = (entry for _, entry, _ in found if entry.path == "f1")
    assert (entry.mode, entry.mtime_ns, entry.uid) == (status.st_mode & 0o7777, status.st_mtime_ns, 0)


def test_small_files_share_messages(context: Path) -> None:
    for number in range(2000):
        (context / f"f{number}").write_bytes(b"x" * 700)
    messages = list(packed(entries(context, ".")))
    assert len(messages) < 10
    assert len(received(messages)) == 2001


def test_names_that_differ_in_nothing_but_their_source_are_no_hard_links(context: Path) -> None:
    for name in ("a", "b"):
        (context / name).mkdir()
    (context / "a/f").write_text("one file")
    os.link(context / "a/f", context / "b/f")
    kinds = [entry.kind for _, entry, _ in received(packed(entries(context, "a", "b")))]
    assert kinds == [tar.DIRECTORY, tar.FILE] * 2


def test_holes_are_not_sent(context: Path) -> None:
    with open(context / "big", "wb") as file:
        file.truncate(1 << 41)
        file.seek(1 << 40)
        file.write(b"here")
    messages = list(packed(entries(context, "big")))
    assert sum(map(len, messages)) < 200_000
    ((group, entry, pieces),) = received(messages)
    assert group == (False, False, False, False)
    assert (entry.size, pieces[0][0]) == (1 << 41, 1 << 40)
    assert b"".join(piece for _, piece in pieces).rstrip(b"\0") == b"here"
    assert entry.regions == ((1 << 40, 64 * 1024),)


@pytest.mark.parametrize(
    "regions",
    [(), ((0, 5),), ((1 << 20, 1), (3_000_000, 500_000)), ((10, 1), (12, 2_500_000)), ((3_500_000, 0),)],
)
def test_holes_of_a_file_of_an_archive_are_not_sent(regions: tar.Regions) -> None:
    content = bytearray(3_500_000)
    for begin, length in regions:
        content[begin : begin + length] = b"x" * length
    data = [bytes(content[begin : begin + length]) for begin, length in regions if length]
    whole = wire.CHUNK_BYTES
    cut = [piece[at : at + whole] for piece in data for at in range(0, len(piece), whole)]
    for stored in (None, lambda: iter(cut)):
        messages = list(packed([one("f", bytes(content), regions=regions, stored=stored), one("g", b"next")]))
        assert sum(map(len, messages)) < sum(map(len, data)) + 8000
        (_, entry, pieces), (_, _, following) = received(messages)
        assert laid_out(entry, pieces) == content
        assert following == [(0, b"next")]


def test_a_file_of_very_many_holes_is_sent_with_them(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firebuild_bootstrap.service.packing._MAX_REGIONS", 2)
    with open(context / "f", "wb") as file:
        for number in range(3):
            file.seek(number * 200_000)
            file.write(b"data")
    ((_, entry, pieces),) = received(packed(entries(context, "f")))
    assert entry.regions is None
    assert laid_out(entry, pieces) == (context / "f").read_bytes()


def test_groups_say_what_becomes_of_owners() -> None:
    context_file = one("a", b"A", from_directory=False)
    member = one("b", b"B", owner=(7, 8), member=True)
    of_stage = one("c", b"C", owner=(1, 2**31))
    found = received(packed([context_file, member, member, of_stage]))
    assert [group for group, _, _ in found] == [
        (False, False, False, False),
        (True, True, False, False),
        (True, True, False, False),
        (True, True, True, False),
    ]
    assert [(entry.uid, entry.gid) for _, entry, _ in found] == [(0, 0), (7, 8), (7, 8), (1, 2**31)]
    assert [laid_out(entry, pieces) for _, entry, pieces in found] == [b"A", b"B", b"B", b"C"]


def test_nothing_is_sent_for_no_entries() -> None:
    assert list(packed([])) == []


@pytest.mark.parametrize("size", [100, 3_000_000])
@pytest.mark.parametrize(
    ("change", "message"), [(-1, "it ended 1 byte before its"), (1, "it has grown beyond")]
)
def test_a_file_that_changes_is_an_error(context: Path, size: int, change: int, message: str) -> None:
    (context / "f").write_bytes(b"x" * size)
    (context / "g").write_bytes(b"x" * size)
    found = list(entries(context, "f"))
    os.truncate(context / "f", size + change)
    with pytest.raises(InputError, match=message) as caught:
        list(packed(found))
    assert caught.value.location == HERE


def test_a_file_that_loses_its_end_while_it_is_sent_is_an_error(context: Path) -> None:
    (context / "f").write_bytes(b"x" * 3_000_000)
    messages = packed(list(entries(context, "f")))
    for _ in range(3):
        next(messages)
    os.truncate(context / "f", 10)
    with pytest.raises(InputError, match="changed while it was being sent: it ended"):
        list(messages)


def test_a_file_that_vanishes_is_an_error(context: Path) -> None:
    (context / "f").write_text("x")
    found = list(entries(context, "f"))
    (context / "f").unlink()
    with pytest.raises(InputError, match="can't be read: No such file"):
        list(packed(found))


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_a_file_that_can_not_be_read_is_an_error(context: Path, size: int) -> None:
    (context / "f").write_bytes(b"x" * size)

    class Unreadable:
        """A file whose descriptor reads nothing, as one on a broken drive."""

        def __init__(self, entry: Entry) -> None:
            assert entry.file is not None
            self._file = entry.file
            self.changed, self.unreadable = self._file.changed, self._file.unreadable

        def descriptor(self) -> int:
            return os.open(context, os.O_RDONLY)

    (entry,) = entries(context, "f")
    object.__setattr__(entry, "file", Unreadable(entry))
    with pytest.raises(InputError, match=r"'f' can't be read: .*(Is a directory|Invalid argument)"):
        list(packed([entry]))


def test_content_that_is_no_file_has_to_have_its_size() -> None:
    entry = one("f", b"content")
    object.__setattr__(entry, "size", 9)
    with pytest.raises(InputError, match="expected 9 bytes, found 7"):
        list(packed([entry]))


def test_content_that_can_not_be_opened_is_an_error() -> None:
    def missing() -> BinaryIO:
        raise FileNotFoundError("f")

    entry = one("f", b"content")
    object.__setattr__(entry, "open", missing)
    with pytest.raises(InputError, match="has vanished"):
        list(packed([entry]))
