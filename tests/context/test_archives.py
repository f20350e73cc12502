"""Archives that ADD unpacks."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from context.tarballs import COMPRESSIONS, Find, add, error_of, member, one_file, read, tar
from firebuild_bootstrap.layers.tar import DIRECTORY, FILE, HARDLINK, SYMLINK


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_is_known_by_its_content_and_not_by_its_name(
    root: Path,
    find: Find,
    compression: str,
    format: int,  # noqa: A002
) -> None:
    data = tar(member("d/", tarfile.DIRTYPE), (member("d/f"), b"data"), format=format)
    directory, file = add(find, root, COMPRESSIONS[compression](data)).entries()
    assert (directory.path, directory.kind, directory.from_directory) == ("d", DIRECTORY, True)
    assert (file.path, file.kind, file.from_directory, file.size) == ("d/f", FILE, True, 4)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_content_is_read_from_the_stream_in_order(root: Path, find: Find, compression: str) -> None:
    files = [(member(f"f{number}"), os.urandom(number * 1000)) for number in range(30)]
    resource = add(find, root, COMPRESSIONS[compression](tar(*files)))
    for _ in range(2):
        assert [(entry.path, read(entry)) for entry in resource.entries()] == [
            (info.name, data) for info, data in files
        ]


def test_content_can_also_be_read_out_of_order_and_twice(root: Path, find: Find) -> None:
    files = [(member(f"f{number}"), b"%d" % number * 600) for number in range(5)]
    entries = list(add(find, root, gzip.compress(tar(*files))).entries())
    for number in (4, 0, 2, 2):
        assert read(entries[number]) == b"%d" % number * 600
    walk = add(find, root, tar(*files)).entries()
    entry = next(walk)
    assert read(entry) == read(entry) == b"0" * 600


def test_members_that_nobody_reads_are_skipped(root: Path, find: Find) -> None:
    files = [(member(f"f{number}"), os.urandom(5000)) for number in range(4)]
    entries = add(find, root, gzip.compress(tar(*files))).entries()
    next(entries)
    assert read(next(entries)) == files[1][1]
    assert [entry.path for entry in entries] == ["f2", "f3"]


def test_a_large_member_is_never_in_memory(root: Path, find: Find) -> None:
    with open(root / "archive", "wb") as file:
        file.write(member("big", size=64 * 1024**2).tobuf())
        file.truncate(512 + 64 * 1024**2 + 1024)
    tracemalloc.start()
    try:
        for entry in find("archive", unpack=True).entries():
            assert entry.open is not None
            with entry.open() as content:
                assert sum(len(piece) for piece in iter(lambda: content.read(1024**2), b"")) == 64 * 1024**2
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024**2
    finally:
        tracemalloc.stop()


def test_owners_modes_and_times_are_kept(root: Path, find: Find) -> None:
    data = tar((member("f", uid=1234, gid=4321, mode=0o106755, mtime=1_700_000_000.25), b"x"))
    (entry,) = add(find, root, data).entries()
    assert (entry.owner, entry.mode, entry.mtime_ns) == ((1234, 4321), 0o6755, 1_700_000_000_250_000_000)


@pytest.mark.parametrize(("text", "nanoseconds"), [("1.000000007", 1_000_000_007), ("-1.5", -1_500_000_000)])
def test_times_of_extended_headers_are_exact(root: Path, find: Find, text: str, nanoseconds: int) -> None:
    (entry,) = add(find, root, tar((member("f", pax_headers={"mtime": text}), b""))).entries()
    assert entry.mtime_ns == nanoseconds


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("nan", 0),
        ("soon", 0),
        ("inf", 2**63 - 1),
        ("1e400", 2**63 - 1),
        ("-1e400", -(2**63)),
        ("1e999999999", 2**63 - 1),
        ("15022195200", 2**63 - 1),
        ("1e-999999999", 0),
        ("9000000000.5", 9_000_000_000_500_000_000),
    ],
)
def test_a_time_that_does_not_fit_becomes_the_nearest_one_and_what_is_none_1970(
    root: Path, find: Find, text: str, nanoseconds: int
) -> None:
    (entry,) = add(find, root, tar((member("f", pax_headers={"mtime": text}), b""))).entries()
    assert entry.mtime_ns == nanoseconds


@pytest.mark.parametrize("owner", [-1, 2**32 - 1, 2**55])
def test_an_owner_that_no_system_has_is_an_error(root: Path, find: Find, owner: int) -> None:
    data = tar((member("f", uid=owner), b""), format=tarfile.GNU_FORMAT)
    assert f"'f' has the owner {owner}:0" in error_of(add(find, root, data)).message


def test_links_are_kept(root: Path, find: Find) -> None:
    data = tar(
        (member("./d/first"), b"x"),
        member("./d/second", tarfile.LNKTYPE, linkname="./d/first"),
        member("soft", tarfile.SYMTYPE, linkname="../../etc/passwd"),
    )
    first, second, soft = add(find, root, data).entries()
    assert (first.path, second.path, second.kind, second.link_target) == (
        "d/first",
        "d/second",
        HARDLINK,
        "d/first",
    )
    assert (soft.kind, soft.link_target, soft.open, soft.size) == (
        SYMLINK,
        "../../etc/passwd",
        None,
        0,
    )


@pytest.mark.parametrize(
    ("name", "path"), [("/etc/f", "etc/f"), ("./a/../f", "f"), ("//f", "f"), ("/../f", "../f")]
)
def test_names_are_relative_to_the_destination(root: Path, find: Find, name: str, path: str) -> None:
    resource = add(find, root, one_file(name=name))
    if path.startswith(".."):
        assert "leads out of the tree" in error_of(resource).message
    else:
        assert [entry.path for entry in resource.entries()] == [path]


def test_the_root_of_an_archive_says_nothing_about_the_destination(root: Path, find: Find) -> None:
    data = tar(member("./", tarfile.DIRTYPE, mode=0o700, uid=1234, gid=1234))
    (entry,) = add(find, root, data).entries()
    assert (entry.path, entry.kind, entry.mode, entry.owner) == ("", DIRECTORY, 0o755, (0, 0))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"plain text",
        b"\x1f\x8bnot gzip",
        gzip.compress(b"text " * 1000, mtime=0),
        bz2.compress(b""),
        lzma.compress(b"text"),
        zstandard.ZstdCompressor().compress(b"text"),
        b"\x28\xb5\x2f\xfd broken",
        bytes(10240),
        b"x" * 512,
    ],
)
def test_what_is_no_archive_is_added_as_a_file(root: Path, find: Find, data: bytes) -> None:
    (entry,) = add(find, root, data).entries()
    assert (entry.path, entry.kind, entry.from_directory, entry.size) == (
        "archive",
        FILE,
        False,
        len(data),
    )
    assert read(entry) == data


def test_archives_inside_a_directory_stay_what_they_are(root: Path, find: Find) -> None:
    (root / "d").mkdir()
    (root / "d/a.tar").write_bytes(one_file())
    assert [entry.path for entry in find("d", unpack=True).entries()] == ["", "a.tar"]


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_come_out_with_their_holes(root: Path, find: Find, version: str, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with open(source, "wb") as file:
        file.write(b"begin")
        file.seek(5_000_000)
        file.write(b"middle")
        file.truncate(9_000_000)
    how = ["--format=gnu"] if version == "gnu" else ["--format=pax", f"--sparse-version={version}"]
    subprocess.run(["tar", "-S", *how, "-cf", root / "archive", "-C", tmp_path, "sparse"], check=True)
    assert (root / "archive").stat().st_size < 100_000
    (entry,) = find("archive", unpack=True).entries()
    assert (entry.path, entry.size) == ("sparse", 9_000_000)
    assert read(entry) == source.read_bytes()


def test_no_descriptor_is_left_open_by_archives(root: Path, find: Find) -> None:
    resource = add(find, root, gzip.compress(tar((member("a"), b"x"), (member("b"), b"y"))))
    before = len(os.listdir("/proc/self/fd"))
    entries = [(entry, read(entry)) for entry in resource.entries()]
    assert [read(entry) for entry, _ in entries] == [b"x", b"y"]
    walk = resource.entries()
    next(walk)
    del walk
    assert len(os.listdir("/proc/self/fd")) == before
