"""The cpio archives: what Linux reads, the same bytes for the same entries."""

from __future__ import annotations

import io
import stat
import subprocess
from pathlib import Path

import pytest

from firebuild_bootstrap.initramfs import cpio
from initramfs.archives import read_cpio

ENTRIES = (
    cpio.file("b/c/file", b"content", 0o755),
    cpio.directory("b", 0o700),
    cpio.link("a", "b/c/file"),
    cpio.character_device("dev/console", 0o600, 5, 1),
    cpio.file("b-c", b""),
)


def archive(*entries: cpio.Entry) -> bytes:
    target = io.BytesIO()
    cpio.write_archive(entries, target)
    return target.getvalue()


def test_entries_come_sorted_with_their_parents_first_and_belong_to_root() -> None:
    found = read_cpio(archive(*ENTRIES))
    assert [(entry.path, entry.mode) for entry in found] == [
        ("a", stat.S_IFLNK | 0o777),
        ("b", stat.S_IFDIR | 0o700),
        ("b/c", stat.S_IFDIR | 0o755),
        ("b/c/file", stat.S_IFREG | 0o755),
        ("b-c", stat.S_IFREG | 0o644),
        ("dev", stat.S_IFDIR | 0o755),
        ("dev/console", stat.S_IFCHR | 0o600),
    ]
    assert {(entry.uid, entry.gid, entry.time) for entry in found} == {(0, 0, 0)}
    assert len({entry.inode for entry in found}) == len(found)
    assert [found[0].data, found[3].data, found[6].device] == [b"b/c/file", b"content", (5, 1)]


def test_the_order_of_the_entries_does_not_show() -> None:
    assert archive(*ENTRIES) == archive(*reversed(ENTRIES))


@pytest.mark.needs("busybox")
def test_another_reader_understands_it(tmp_path: Path) -> None:
    subprocess.run(
        ["busybox", "cpio", "-i", "-d", "b*", "a"],
        input=archive(*ENTRIES),
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "b/c/file").read_bytes() == b"content"
    assert (tmp_path / "a").resolve() == tmp_path / "b/c/file"
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700


@pytest.mark.parametrize("path", ["/etc", "../up", "a/../b", "a//b", "./a", ".."])
def test_a_path_that_leaves_the_archive_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside an archive"):
        archive(cpio.file(path, b""))


def test_two_files_with_one_path_are_refused() -> None:
    with pytest.raises(ValueError, match="two files want to be 'a'"):
        archive(cpio.file("a", b"1"), cpio.file("a", b"2"))


def test_a_file_that_is_too_large_for_the_format_is_refused() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 32

    with pytest.raises(ValueError, match="4294967296 bytes"):
        archive(cpio.file("a", Huge()))


def test_an_empty_archive_has_its_trailer() -> None:
    assert read_cpio(archive()) == []
