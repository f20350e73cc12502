"""Writing ext4 images: e2fsprogs find nothing wrong with them, and our reader finds all that was put in."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from struct import pack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_empty_ext4, make_ext4
from firebuild_bootstrap.image.worker.ext4hash import CRC_START, advance, crc32c, crc32c_each, half_md4
from firebuild_bootstrap.image.worker.extfs import Ext4Image, Inode
from firebuild_bootstrap.image.worker.imagewalk import image_entries, walk_image
from firebuild_bootstrap.layers.tar import HOLE_BYTES, Content, Entry, Kind, LayerError, Readable, write_layer
from firebuild_bootstrap.layers.tree import tree_entries

pytestmark = [pytest.mark.needs("e2fsck"), pytest.mark.needs("debugfs")]
MIB = 2**20
ENV = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
ROOT = Entry("", "directory", 0o755)
Item = tuple[Entry, bytes]


def debugfs(image: Path, request: str) -> str:
    command = ["debugfs", "-R", request, str(image)]
    return subprocess.run(command, env=ENV, capture_output=True, check=True).stdout.decode("utf-8", "replace")


def dumped(image: Path, which: str) -> list[bytes]:
    command = ["dumpe2fs", "-h", "-o", which, "-o", "blocksize=4096", str(image)]
    said = subprocess.run(command, env=ENV, capture_output=True, check=True).stdout
    return [line for line in said.splitlines() if not line.startswith((b"Checksum:", b"Block group"))]


def clean(image: Path) -> Path:
    """Have e2fsck look for anything that it would change."""
    done = subprocess.run(["e2fsck", "-fn", image], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return image


def write(files: Iterable[tuple[Entry, Content]], image: Path, **options: int | str | bool) -> Path:
    make_ext4(files, str(image), Ext4Options(**options))  # type: ignore[arg-type]
    return clean(image)


def archive(files: Iterable[tuple[Entry, Content]]) -> bytes:
    target = io.BytesIO()
    write_layer(target, files)
    return target.getvalue()


def inodes(image: Path) -> dict[str, Inode]:
    return dict(walk_image(Ext4Image(str(image))))


def read(image: Path, path: str) -> bytes:
    opened = Ext4Image(str(image))
    return opened.content(inodes(image)[path]).read()


def test_the_image_holds_the_tree_and_is_clean(rich_tree: Path, tmp_path: Path) -> None:
    image = write(tree_entries(str(rich_tree)), tmp_path / "i.ext4")
    features = {"has_journal", "resize_inode", "dir_index", "extent", "64bit", "flex_bg", "metadata_csum"}
    assert features <= set(debugfs(image, "features").split())
    assert archive(image_entries(Ext4Image(str(image)))) == archive(tree_entries(str(rich_tree)))
    status = debugfs(image, "stat /set")
    assert "Mode:  04755" in status
    assert "Links: 2" in debugfs(image, "stat /dir/same")
    assert "user.raw" in debugfs(image, "ea_list /file")
    assert "lost+found" in debugfs(image, "ls /")
    if os.geteuid() == 0:
        assert "User:     7   Group:     8" in status
        assert "security.capability" in status


def test_the_same_entries_give_the_same_bytes(rich_tree: Path, tmp_path: Path) -> None:
    one = write(tree_entries(str(rich_tree)), tmp_path / "one")
    (tmp_path / "elsewhere").mkdir()
    rich_tree.rename(tmp_path / "elsewhere/tree")  # changes ctime, as a copy would
    two = write(tree_entries(str(tmp_path / "elsewhere/tree")), tmp_path / "two")
    other = write(tree_entries(str(tmp_path / "elsewhere/tree"), newest=1), tmp_path / "other")
    assert one.read_bytes() == two.read_bytes()
    uuids = [debugfs(image, "stats").split("Filesystem UUID:")[1].split()[0] for image in (one, other)]
    assert uuids[0] != uuids[1]
    assert uuids[0][14] == "8"


def test_the_guest_finds_the_free_space_it_was_promised(rich_tree: Path, tmp_path: Path) -> None:
    image = write(tree_entries(str(rich_tree)), tmp_path / "i.ext4", free=32 * MIB)
    free = int(debugfs(image, "stats").split("Free blocks:")[1].split()[0]) * 4096
    assert 32 * MIB <= free < 34 * MIB


def test_a_size_is_kept_and_the_least_one_is_named(rich_tree: Path, tmp_path: Path) -> None:
    (rich_tree / "data").write_bytes(os.urandom(12 * MIB))
    large = write(tree_entries(str(rich_tree)), tmp_path / "large", size=300 * MIB)
    assert (large.stat().st_size, large.stat().st_blocks * 512 < 20 * MIB) == (300 * MIB, True)
    for size in (1, 10 * MIB):
        with pytest.raises(
            LayerError, match=r"the files need size=\d+MiB, found size=(1|10240KiB)$"
        ) as caught:
            write(tree_entries(str(rich_tree)), tmp_path / "i", size=size)
        assert caught.value.asked
        assert list(tmp_path.glob("i*")) == []
    least = int(caught.value.hint.split("size=")[1].split("MiB")[0]) * MIB
    assert write(tree_entries(str(rich_tree)), tmp_path / "i", size=least).stat().st_size == least
    with pytest.raises(LayerError, match="the files need size="):
        write(tree_entries(str(rich_tree)), tmp_path / "j", size=least - MIB)


@pytest.mark.parametrize("size", [3, 7, 8, 128, 129, 512, 1025, 16 << 10])
def test_empty_drives_of_any_size_are_clean(tmp_path: Path, size: int) -> None:
    make_empty_ext4(str(tmp_path / "i"), size * MIB, journal=True)
    image = clean(tmp_path / "i")
    if size > 256:
        assert dumped(image, "superblock=32768") == dumped(image, "superblock=0")
    assert (image.stat().st_size, image.stat().st_blocks < 4 * 2048) == (size * MIB, True)
    assert ("has_journal" in debugfs(image, "features")) is (size >= 8)


@pytest.mark.needs("resize2fs")
def test_it_can_grow(rich_tree: Path, tmp_path: Path) -> None:
    image = write(tree_entries(str(rich_tree)), tmp_path / "i.ext4")
    before = archive(image_entries(Ext4Image(str(image))))
    subprocess.run(["resize2fs", image, "9G"], env=ENV, capture_output=True, check=True)
    clean(image)
    assert image.stat().st_size == 9 << 30
    assert archive(image_entries(Ext4Image(str(image)))) == before


def test_times_from_1901_to_2446_are_kept(tmp_path: Path) -> None:
    first, last = -(2**31), 2**34 - 2**31 - 1
    seconds = [
        first - 9,
        first,
        -1000,
        -1,
        0,
        1,
        2**31 - 1,
        2**31,
        2**32,
        4_102_444_800,
        2**33,
        last,
        last + 9,
    ]
    entries = [
        Entry(f"{number:02}", "fifo", 0o600, 0, 0, each * 10**9 + 5) for number, each in enumerate(seconds)
    ]
    image = write([(entry, b"") for entry in [ROOT._replace(mtime_ns=7), *entries]], tmp_path / "i")
    found = [inode.mtime_ns for path, inode in inodes(image).items() if path]
    assert found[1:-1] == [entry.mtime_ns for entry in entries[1:-1]]
    assert (found[0], found[-1]) == (first * 10**9, last * 10**9)
    assert inodes(image)[""].mtime_ns == 7


@pytest.mark.parametrize("count", [200, 800, 30_000])
def test_names_in_large_directories_are_found_by_their_hash(tmp_path: Path, count: int) -> None:
    letters = bytes(set(range(1, 256)) - {ord("/")})
    names = {b"%x" % number + letters[number % 190 :][: 30 + number % 64] for number in range(count)}
    names |= {b"n" * 255, b"\xff" * 32, b"a\nb" + b"c" * 28 + b"\xfe"}
    entries = [Entry(os.fsdecode(b"many/" + name), "fifo", 0o600) for name in sorted(names)]
    image = write(
        [(each, b"") for each in [ROOT, Entry("many", "directory", 0o700), *entries]], tmp_path / "i"
    )
    opened = Ext4Image(str(image))
    assert dict(opened.entries(opened.inode(11))).keys() == names
    assert "Hash Version: 1" in debugfs(image, "htree_dump /many")  # e2fsck has compared all hashes


def test_the_hash_of_a_name_is_that_of_debugfs(tmp_path: Path) -> None:
    names = ["a", "abcd", "x" * 31, "y" * 32, "z" * 33, "0123456789" * 25]
    seed = bytes(range(1, 17))
    found = half_md4([name.encode() for name in names], seed)
    make_empty_ext4(str(tmp_path / "i"), 3 * MIB, journal=False)
    text = "01020304-0506-0708-090a-0b0c0d0e0f10"
    for name, (major, minor) in zip(names, found, strict=True):
        said = debugfs(tmp_path / "i", f"dx_hash -h half_md4 -s {text} {name}")
        assert f"is 0x{major:08x} (minor 0x{minor:08x})" in said


def test_checksums_are_those_of_rfc_3720() -> None:
    for data, expected in (
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ):
        assert crc32c(CRC_START, data) ^ CRC_START == expected
        halves = crc32c(crc32c(CRC_START, data[:7]), data[7:])
        assert halves ^ CRC_START == expected
    records = random.Random(1).randbytes(300) + bytes(300)
    records = bytes(0 if at % 60 > 30 else byte for at, byte in enumerate(records))
    planes = crc32c_each(5, [(records, 60), (bytes(10), 1)], 10)
    each = [sum(plane[at] << 8 * shift for shift, plane in enumerate(planes)) for at in range(10)]
    assert each == [advance(crc32c(5, records[at : at + 60]), 1) for at in range(0, 600, 60)]


def sparse(count: int, distance: int, size: int) -> Item:
    regions = tuple((number * distance, HOLE_BYTES) for number in range(count))
    data = b"".join(pack("<I", number) * (HOLE_BYTES // 4) for number in range(count))
    return Entry("sparse", "file", 0o600, size=size, regions=regions), data


@pytest.mark.parametrize(("count", "depth"), [(4, 0), (5, 1), (1400, 2)])
def test_holes_stay_holes_in_files_of_terabytes(tmp_path: Path, count: int, depth: int) -> None:
    entry, data = sparse(count, 1 << 30, 8 << 40)
    entry = entry._replace(regions=(*(entry.regions or ())[:-1], ((8 << 40) - HOLE_BYTES, HOLE_BYTES)))
    image = write([(ROOT, b""), (entry, data)], tmp_path / "i")
    opened = Ext4Image(str(image))
    extents = opened.extents(inodes(image)["sparse"])
    assert inodes(image)["sparse"].block[6] == depth
    assert image.stat().st_blocks * 512 < len(data) + 4 * MIB
    content = io.BytesIO(
        b"".join(opened._range(each.physical * 4096, each.length * 4096) for each in extents)
    )
    assert content.getvalue() == data
    assert [(each.logical * 4096, each.length * 4096) for each in extents] == list(entry.regions or ())


def test_regions_need_not_be_whole_blocks_and_come_from_anywhere(tmp_path: Path) -> None:
    regions = ((1, 2), (10, 5000), (9000, 1), (12288, 4096), (16384, 10), (40_000, 7))
    data = random.Random(3).randbytes(sum(length for _, length in regions))
    whole = bytearray(50_000)
    stream = io.BytesIO(data)
    for offset, length in regions:
        whole[offset : offset + length] = stream.read(length)
    (tmp_path / "file").write_bytes(whole)
    entry = Entry("file", "file", 0o600, size=50_000, regions=regions)
    with (tmp_path / "file").open("rb") as file:
        contents: list[Content] = [data, bytearray(data), io.BytesIO(data), file.fileno()]
        for number, content in enumerate(contents):
            image = write([(ROOT, b""), (entry, content)], tmp_path / f"i{number}")
            assert read(image, "file") == whole
            assert len(Ext4Image(str(image)).extents(inodes(image)["file"])) == 2


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 262_144, 262_145, 3 * MIB + 1])
def test_files_of_any_size_come_out(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    entry = Entry("file", "file", 0o644, size=size)
    contents: list[Content] = [data, memoryview(data), io.BytesIO(data)]
    with (tmp_path / "file").open("rb") as file:
        for number, content in enumerate([*contents, file.fileno()]):
            image = write([(ROOT, b""), (entry, content)], tmp_path / f"i{number}", free=0)
            assert read(image, "file") == data


@pytest.mark.parametrize("size", [5000, 300_000])
def test_a_file_that_became_shorter_is_named(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"short")
    entry = Entry("file", "file", 0o644, size=size)
    with (tmp_path / "file").open("rb") as file:
        for content in (b"short", io.BytesIO(b"short"), file.fileno()):
            with pytest.raises(LayerError, match="/file changed while it was read"):
                write([(ROOT, b""), (entry, content)], tmp_path / "i")
            assert not (tmp_path / "i").exists()


class Zeros:
    """As many as anybody asks for."""

    def read(self, size: int, /) -> bytes:
        return bytes(size)


def test_contents_go_round_the_copies_of_the_superblock(tmp_path: Path) -> None:
    """Of the groups 1 and 3, at 128 and 384 MiB; and what looks like one stretch is several extents."""
    zeros: Readable = Zeros()
    files: list[tuple[Entry, Content]] = [(ROOT, b"")]
    files += [(Entry("a", "file", 0o600, size=127 * MIB), zeros)]
    files += [(Entry(f"b{number}", "file", 0o600, size=200_000), bytes(200_000)) for number in range(9)]
    files += [(Entry("large", "file", 0o600, size=270 * MIB), zeros)]
    # Zeros take no space when they are written to a file system that can tell; most can't.
    image = write(files, tmp_path / "k", free=0)
    opened, found = Ext4Image(str(image)), inodes(image)
    assert sum(each.length for each in opened.extents(found["large"])) == 270 * 256
    assert [len(opened.extents(found[f"b{number}"])) for number in range(9)].count(2) == 1
    image.unlink()


def test_hard_links_are_names_of_one_file_and_ext4_has_65000(tmp_path: Path) -> None:
    def files(count: int) -> Iterator[Item]:
        yield ROOT, b""
        yield Entry("a", "file", 0o600, size=1), b"x"
        for number in range(count):
            yield Entry(f"b{number:06}", "hardlink", linkname="a"), b""

    image = write(files(64_999), tmp_path / "i")
    assert "Links: 65000" in debugfs(image, "stat /b000007")
    with pytest.raises(LayerError, match="/a has more than 65000 names"):
        write(files(65_000), tmp_path / "j")
    with pytest.raises(LayerError, match="/b is another name of /missing, which was not there before"):
        write([(ROOT, b""), (Entry("b", "hardlink", linkname="missing"), b"")], tmp_path / "k")


def test_links_pipes_and_devices_have_several_names_as_files_do(tmp_path: Path) -> None:
    (tree := tmp_path / "tree").mkdir()
    os.symlink("x", tree / "l1")
    os.mkfifo(tree / "p1")
    kinds = {"l": "symlink", "p": "FIFO"}
    if os.geteuid() == 0:
        os.mknod(tree / "c1", 0o20644, os.makedev(1, 3))
        kinds["c"] = "character special"
    for name in kinds:
        os.link(tree / f"{name}1", tree / f"{name}2", follow_symlinks=False)
    image = write(tree_entries(str(tree)), tmp_path / "i")
    for name, kind in kinds.items():
        stats = [debugfs(image, f"stat /{name}{number}") for number in (1, 2)]
        assert stats[0] == stats[1]
        assert f"Type: {kind}" in stats[0]
        assert "Links: 2" in stats[0]
    assert told(read_back(image)) == told((entry, b"") for entry, _ in tree_entries(str(tree)))


ACL = "02000000 01000600ffffffff 02000400e8030000 04000400ffffffff 10000400ffffffff 20000400ffffffff"


def test_extended_attributes_are_in_the_inode_or_in_a_block(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    sets: dict[str, dict[str, bytes]] = {
        "acl": {
            "system.posix_acl_access": bytes.fromhex(ACL),
            "user.é": b"",
            "security.capability": capability,
        },
        "block": {"user.large": b"v" * 3000, "user.small": b"s", "user.other": b"o" * 301},
        "full": {"user." + "n" * 255: b"v" * (4096 - 32 - 4 - 16 - 256)},
        "inode": {"user.exact": b"v" * (96 - 4 - 4 - 16 - 8)},
        "more": {"user.exact": b"v" * (96 - 4 - 4 - 16 - 8 + 1)},
    }
    entries = [Entry(name, "file", 0o600, xattrs=xattrs) for name, xattrs in sets.items()]
    folder = Entry("z", "directory", 0o700, xattrs={"system.posix_acl_default": bytes.fromhex(ACL)})
    others = {"trusted.a": b"1", "security.ima": b"2", "system.richacl": b"3"}
    link = Entry("z/link", "symlink", 0o777, linkname="x" * 100, xattrs=others)
    image = write([(each, b"") for each in (ROOT, *entries, folder, link)], tmp_path / "i")
    opened = Ext4Image(str(image))
    found = {path: (opened.xattrs(inode), bool(inode.attribute_block)) for path, inode in walk_image(opened)}
    for name, xattrs in sets.items():
        assert found[name] == (xattrs, name in ("acl", "block", "full", "more"))
    assert found["z"] == (dict(folder.xattrs), False)
    assert found["z/link"][0] == others
    assert "v" * 65 in debugfs(image, "ea_get -V /more user.exact")
    for xattrs, complaint in (
        ({"user.a": b"v" * 4060}, "/bad has more extended attributes than"),
        ({"lustre.a": b""}, "/bad: ext4 has no extended attribute 'lustre.a'"),
        ({"user.": b""}, "/bad: ext4 has no extended attribute 'user.'"),
        ({"system.posix_acl_access": b"\2\0\0\0\0"}, "is not an access control list"),
    ):
        with pytest.raises(LayerError, match=complaint):
            write([(ROOT, b""), (Entry("bad", "file", xattrs=xattrs), b"")], tmp_path / "j")


def test_device_nodes_need_no_privileges(tmp_path: Path) -> None:
    numbers = [(0, 0), (1, 3), (255, 255), (259, 7), (8, 256), (4095, (1 << 20) - 1)]
    kinds: tuple[Kind, Kind] = ("character", "block")
    entries = [
        Entry(f"{kind}{at}", kind, 0o660, device=number)
        for kind in sorted(kinds)
        for at, number in enumerate(numbers)
    ]
    files = [(each, b"") for each in (ROOT, *entries, Entry("fifo", "fifo", 0o622))]
    image = write(files, tmp_path / "i")
    assert archive(image_entries(Ext4Image(str(image)))) == archive(files)
    assert stat.S_ISFIFO(inodes(image)["fifo"].mode)
    with pytest.raises(LayerError, match="/c: a device 4096:0 can't be in an ext4 file system"):
        write([(ROOT, b""), (Entry("c", "character", device=(4096, 0)), b"")], tmp_path / "j")


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "there is not even a root directory"),
        ([Entry("a", "fifo")], "/a comes before the root"),
        ([Entry("a/b", "fifo")], "/a/b is not beside the other entries of its directory"),
        ([Entry("", "file")], "the root is not the first entry, or not a directory"),
        ([ROOT, ROOT], "the root is not the first entry, or not a directory"),
        ([ROOT, Entry("a", "fifo"), Entry("a/b", "fifo")], "/a/b is not beside the other entries"),
        ([ROOT, Entry("n" * 256, "fifo")], "has more than 255 bytes"),
        ([ROOT, Entry("..", "fifo")], "'..' can't be the name of a file"),
        ([ROOT, Entry("a\0b", "fifo")], "can't be the name of a file"),
        ([ROOT, Entry("a", "fifo"), Entry("a", "fifo")], "/a is not in the order of the names"),
        ([ROOT, Entry("b", "directory"), Entry("a", "fifo")], "/a is not in the order of the names"),
        ([ROOT, Entry("a", "whiteout")], "/a: a whiteout can't be in a file system"),
        (
            [ROOT, Entry("l", "symlink", linkname="x" * 4096)],
            "/l: a symbolic link of 4096 bytes can't be in ext4",
        ),
        (
            [ROOT, Entry("f", "file", size=1 << 44, regions=())],
            "/f has .* bytes, and ext4 no files of more than",
        ),
    ],
)
def test_what_ext4_can_not_hold_is_refused_and_nothing_is_left(
    tmp_path: Path, entries: list[Entry], complaint: str
) -> None:
    with pytest.raises(LayerError, match=complaint):
        write([(entry, b"") for entry in entries], tmp_path / "i")
    assert list(tmp_path.iterdir()) == []


def test_there_is_room_for_more_files_than_a_group_has(tmp_path: Path) -> None:
    image = write([(ROOT, b"")], tmp_path / "i", inodes=40_000, free=0)
    assert int(debugfs(image, "stats").split("Free inodes:")[1].split()[0]) >= 40_000


def test_a_file_that_is_there_already_stays(tmp_path: Path) -> None:
    (tmp_path / "i").write_text("mine")
    with pytest.raises(FileExistsError):
        write([(ROOT, b"")], tmp_path / "i")
    assert (tmp_path / "i").read_text() == "mine"
    with pytest.raises(LayerError, match="has 16 TiB at most"):
        make_empty_ext4(str(tmp_path / "j"), (16 << 40) + 1, journal=True)


def test_a_terabyte_of_contents_needs_a_size_beforehand(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="more than 1 TiB is written only where its size is known"):
        write([(ROOT, b"")], tmp_path / "i", free=1 << 40)


def test_a_directory_of_the_image_that_is_called_lost_and_found_is_kept(tmp_path: Path) -> None:
    mine = Entry("lost+found", "directory", 0o711, 3, 4, 5)
    files = [(ROOT, b""), (mine, b""), (Entry("lost+found/mine", "fifo", 0o600), b"")]
    image = write(files, tmp_path / "i")
    assert archive(image_entries(Ext4Image(str(image)))) == archive(files)


# Names as the kernel allows them; few letters, so that several begin alike.
NAMES = st.binary(min_size=1, max_size=255).map(lambda name: name.replace(b"/", b"-").replace(b"\0", b"\n"))
SHORT = st.sampled_from([b"a", b"b", b"\xff", b"\n", b"a" * 59, b"lost+found"])
TIMES = st.integers(-(2**31) * 10**9, (2**34 - 2**31) * 10**9 - 1)
XATTRS = st.dictionaries(
    st.sampled_from(["user.a", "user.long-name", "security.capability", "user." + "x" * 80]),
    st.binary(max_size=700),
    max_size=4,
)


@st.composite
def trees(draw: st.DrawFn) -> list[Item]:
    """A tree as entries in canonical order, with contents."""
    found: list[Item] = []
    regular: list[str] = []

    def fill(path: str, depth: int) -> None:
        names = draw(st.sets(SHORT | NAMES, max_size=6))
        for name in sorted(names - {b".", b".."}):
            below = os.fsdecode(name) if not path else f"{path}/{os.fsdecode(name)}"
            kinds: list[Kind] = ["file", "symlink", "fifo", "character", "block"]
            kinds += ["directory"] if depth < 5 else []
            kinds += ["hardlink"] if regular else []
            kind = draw(st.sampled_from(kinds))
            ids = st.integers(0, 2**32 - 1)
            entry = Entry(below, kind, draw(st.integers(0, 0o7777)), draw(ids), draw(ids), draw(TIMES))
            if kind == "hardlink":
                found.append((Entry(below, kind, linkname=draw(st.sampled_from(regular))), b""))
            elif kind == "file":
                regular.append(below)
                data = draw(st.binary(max_size=50)) * draw(st.sampled_from([0, 1, 99, 4096]))
                found.append((entry._replace(size=len(data), xattrs=draw(XATTRS)), data))
            elif kind == "symlink":
                text = os.fsdecode(draw(NAMES) * draw(st.sampled_from([1, 9])))
                found.append((entry._replace(mode=0o777, linkname=text), b""))
            elif kind == "directory":
                found.append((entry._replace(xattrs=draw(XATTRS)), b""))
                fill(below, depth + 1)
            else:
                device = (draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1)))
                found.append((entry._replace(device=device if kind != "fifo" else (0, 0)), b""))

    found.append((Entry("", "directory", draw(st.integers(0, 0o7777)), 1, 2, draw(TIMES)), b""))
    fill("", 0)
    return found


def told(files: Iterable[tuple[Entry, Content]]) -> list[tuple[object, ...]]:
    """What was put in and comes out; of a hard link, a reader says what its file has."""
    return [
        (entry.path, entry.kind, entry.linkname)
        if entry.kind == "hardlink"
        else (*entry._replace(regions=None, xattrs={}), dict(entry.xattrs), content)
        for entry, content in files
        if entry.path != "lost+found"
    ]


def read_back(image: Path) -> Iterator[tuple[Entry, Content]]:
    for entry, content in image_entries(Ext4Image(str(image))):
        if entry.kind != "file" or entry.regions is not None:
            yield (
                entry,
                b""
                if entry.kind != "file"
                else Ext4Image(str(image)).content(inodes(image)[entry.path]).read(),
            )
        else:
            assert not isinstance(content, int | bytes | bytearray | memoryview)
            yield entry, bytes(content.read(entry.size)) if entry.size else b""


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees())
def test_any_tree_comes_out_as_it_went_in(tmp_path: Path, files: list[Item]) -> None:
    image = tmp_path / "i"
    image.unlink(missing_ok=True)
    write(files, image, free=0)
    assert told(read_back(image)) == told(files)


def test_a_deep_tree_comes_out(tmp_path: Path) -> None:
    paths = ["/".join(["deep"] * depth) for depth in range(1500)]
    files = [(Entry(path, "directory", 0o700), b"") for path in paths]
    image = write(files, tmp_path / "i", free=0)
    assert archive(image_entries(Ext4Image(str(image)))) == archive(files)
