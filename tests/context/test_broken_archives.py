"""Archives that ADD refuses to unpack."""

from __future__ import annotations

import gzip
import os
import tarfile
from pathlib import Path

import pytest

from context.tarballs import COMPRESSIONS, HERE, Find, add, error_of, member, one_file, read, tar
from firebuild_bootstrap.context import ContextResource
from firebuild_bootstrap.errors import InputError


def _first_error(resource: ContextResource) -> InputError:
    with pytest.raises(InputError) as caught:
        for entry in resource.entries():
            read(entry)
    assert caught.value.location == HERE
    return caught.value


@pytest.mark.parametrize("name", ["../f", "a/../../f", ".."])
def test_names_that_lead_out_are_refused(root: Path, find: Find, name: str) -> None:
    assert "leads out of the tree" in error_of(add(find, root, one_file(name=name))).message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.REGTYPE])
@pytest.mark.parametrize("name", [".", "a/.."])
def test_the_root_of_an_archive_has_to_be_a_directory(root: Path, find: Find, name: str, kind: bytes) -> None:
    data = tar(member("a"), member(name, kind, linkname="a"))
    assert "is its root directory, but not as a directory" in error_of(add(find, root, data)).message


@pytest.mark.parametrize("target", ["../../etc/shadow", "/etc/shadow", "later"])
def test_a_hard_link_needs_a_name_before_it(root: Path, find: Find, target: str) -> None:
    data = tar(member("link", tarfile.LNKTYPE, linkname=target), member("later"))
    message = error_of(add(find, root, data)).message
    assert "leads out" in message or "is not before it" in message


def test_names_that_are_not_utf8_are_refused(root: Path, find: Find) -> None:
    data = tar(member("n\udcff"), format=tarfile.GNU_FORMAT)
    assert "names in it have to be UTF-8" in error_of(add(find, root, data)).message


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "plain"])
def test_a_truncated_compressed_archive_is_an_error(root: Path, find: Find, compression: str) -> None:
    data = COMPRESSIONS[compression](
        tar(*((member(f"f{number}"), os.urandom(40_000)) for number in range(40)))
    )
    error = error_of(add(find, root, data[: len(data) - len(data) // 3]))
    assert error.location == HERE


def test_a_truncated_plain_archive_is_an_error(root: Path, find: Find) -> None:
    data = tar((member("a"), b"x" * 3000), (member("b"), b"y" * 3000))
    assert "can't be read" in error_of(add(find, root, data[:2000])).message
    assert "damaged" in error_of(add(find, root, data[: 512 + 3072 + 100])).message


@pytest.mark.parametrize("rubbish", [b"?" * 512, b"?" * 76 + bytes(436), bytes(511) + b"?", bytes(512)])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_rubbish_between_members_is_an_error_and_not_the_end(
    root: Path, find: Find, rubbish: bytes, compression: str
) -> None:
    data = tar((member("a"), b"x"), (member("b"), b"y"))
    data = COMPRESSIONS[compression](data[:1024] + rubbish + data[1024:])
    assert "damaged" in error_of(add(find, root, data)).message


@pytest.mark.parametrize("end", [513, 515, 700, 1025, 1100, 1535, 1537])
def test_an_archive_that_is_cut_off_anywhere_but_between_members_is_an_error(
    root: Path, find: Find, end: int
) -> None:
    data = tar((member("a"), b"xyz"), (member("b"), b"y"))
    assert error_of(add(find, root, data[:end])).location == HERE


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "plain"])
def test_what_follows_the_end_of_the_compressed_data_is_an_error(
    root: Path, find: Find, compression: str
) -> None:
    data = COMPRESSIONS[compression](one_file())
    assert "damaged" in error_of(add(find, root, data + b"rubbish")).message
    assert len(list(add(find, root, data + bytes(512)).entries())) == 1


def test_flipped_bits_in_a_compressed_archive_are_an_error(root: Path, find: Find) -> None:
    whole = gzip.compress(tar((member("a"), os.urandom(100_000))))
    for place in (60_000, -6, -2):
        data = bytearray(whole)
        data[place] ^= 0xFF
        assert error_of(add(find, root, bytes(data))).location == HERE


def test_an_archive_without_its_final_zeros_is_fine(root: Path, find: Find) -> None:
    assert [entry.path for entry in add(find, root, one_file()[:1024]).entries()] == ["file"]


def test_an_archive_that_vanishes_or_changes_is_an_error(root: Path, find: Find) -> None:
    resource = add(find, root, one_file(b"x" * 100_000))
    (root / "archive").write_bytes(one_file(b"x" * 10))
    assert "changed while it was being sent" in _first_error(resource).message
    (root / "archive").unlink()
    assert "No such file" in _first_error(resource).message


def test_reading_back_from_an_archive_that_has_become_broken_is_an_error(root: Path, find: Find) -> None:
    resource = add(find, root, tar((member("a"), b"x"), (member("b"), b"y")))
    entries = list(resource.entries())
    (root / "archive").write_bytes(b"?" * (root / "archive").stat().st_size)
    assert "damaged" in _first_error(resource).message
    with pytest.raises(InputError, match=r"the archive .* can't be unpacked: it is damaged") as caught:
        read(entries[1])
    assert caught.value.location == HERE
