from __future__ import annotations

import io
import os
import resource
import stat
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

from firebuild_bootstrap.layers.apply import UnpackReport, apply
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import (
    DIRECTORY,
    FILE,
    OPAQUE,
    WHITEOUT,
    Entry,
    LayerError,
    LayerWriter,
    write_layer,
)
from firebuild_bootstrap.layers.tree import tree_entries
from layers.trees import MakeTar


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.uid, made.gid, made.mode = kind, os.getuid(), os.getgid(), 0o644
    for key, value in fields.items():
        setattr(made, key, value)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def run(archive: Path, root: Path) -> UnpackReport:
    with open(archive, "rb") as source, Root(str(root)) as target:
        return apply(LayerReader(source.fileno()), target)


def test_files_modes_and_times_come_out_as_they_are_in_the_archive(make_tar: MakeTar, root: Path) -> None:
    owner = {"uid": os.getuid(), "gid": os.getgid()}
    headers = {"mtime": "1500000000.123456789"}
    archive = make_tar(
        (info(".", tarfile.DIRTYPE, mode=0o711, mtime=5, **owner), b""),
        (info("a/set", mode=0o6751, pax_headers=headers), b"x"),
        (info("a", tarfile.DIRTYPE, mode=0o1700, mtime=1_000_000_000), b""),
        (info("old", mtime=-7), b""),
    )
    report = run(archive, root)
    assert report == UnpackReport(members=4)
    status = (root / "a/set").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o6751, 1_500_000_000_123_456_789)
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o1700
    assert (root / "a").stat().st_mtime == 1_000_000_000
    assert (stat.S_IMODE(root.stat().st_mode), root.stat().st_mtime) == (0o711, 5)
    assert (root / "old").stat().st_mtime == -7


def test_missing_parents_are_made_and_leading_slashes_dropped(make_tar: MakeTar, root: Path) -> None:
    run(make_tar((info("/x/./y/z"), b"1")), root)
    assert (root / "x/y/z").read_text() == "1"
    assert stat.S_IMODE((root / "x").stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/.."])
def test_a_name_that_leads_out_is_refused(make_tar: MakeTar, root: Path, name: str) -> None:
    with pytest.raises(LayerError, match="leads out of the tree"):
        run(make_tar((info(name), b"")), root)
    assert os.listdir(root.parent / "outside") == []


@pytest.mark.parametrize("target", ["../outside", "/outside", "/../../outside", "../../../../outside"])
def test_a_planted_link_leads_nowhere_but_into_the_tree(make_tar: MakeTar, root: Path, target: str) -> None:
    run(make_tar((info("door", tarfile.SYMTYPE, linkname=target), b""), (info("door/evil"), b"x")), root)
    assert os.listdir(root.parent / "outside") == []
    assert (root / "outside/evil").read_text() == "x"


@pytest.mark.root
def test_a_link_to_an_absolute_directory_of_the_real_host_is_not_followed(
    make_tar: MakeTar, root: Path
) -> None:
    outside = root.parent / "outside"
    run(make_tar((info("d", tarfile.SYMTYPE, linkname=str(outside)), b""), (info("d/e/f"), b"x")), root)
    assert os.listdir(outside) == []


def test_links_in_circles_are_an_error(make_tar: MakeTar, root: Path) -> None:
    loop = (info("a", tarfile.SYMTYPE, linkname="b"), b""), (info("b", tarfile.SYMTYPE, linkname="a"), b"")
    with pytest.raises(LayerError, match="form a loop"):
        run(make_tar(*loop, (info("a/x"), b"")), root)


def test_a_file_as_a_directory_is_an_error(make_tar: MakeTar, root: Path) -> None:
    with pytest.raises(LayerError, match="f is needed as a directory and is not one"):
        run(make_tar((info("f"), b""), (info("f/x"), b"")), root)


def test_a_directory_stays_reachable_through_the_link_it_was_meant_to_be(
    make_tar: MakeTar, root: Path
) -> None:
    usr = (info("usr/bin", tarfile.DIRTYPE, mode=0o755), b"")
    run(make_tar(usr, (info("bin", tarfile.SYMTYPE, linkname="usr/bin"), b""), (info("bin/sh"), b"1")), root)
    assert (root / "usr/bin/sh").read_text() == "1"


def test_later_members_replace_earlier_ones_without_writing_through_them(
    make_tar: MakeTar, root: Path
) -> None:
    victim = root.parent / "outside/victim"
    victim.write_text("precious")
    archive = make_tar(
        (info("f", tarfile.SYMTYPE, linkname=str(victim)), b""),
        (info("f"), b"new"),
        (info("d", tarfile.DIRTYPE, mode=0o700), b""),
        (info("d"), b"a file now"),
        (info("e"), b"a directory soon"),
        (info("e", tarfile.DIRTYPE, mode=0o750), b""),
        (info("g", tarfile.SYMTYPE, linkname=str(victim.parent)), b""),
        (info("g", tarfile.DIRTYPE, mode=0o755), b""),
        (info("g/x"), b""),
        (info("g", tarfile.DIRTYPE, mode=0o711), b""),
    )
    run(archive, root)
    assert victim.read_text() == "precious"
    assert (root / "f").read_text() == "new"
    assert (root / "d").read_text() == "a file now"
    assert (root / "e").is_dir()
    assert os.listdir(root / "g") == ["x"]
    assert stat.S_IMODE((root / "g").stat().st_mode) == 0o711


def test_a_directory_that_became_a_link_keeps_its_metadata_to_itself(make_tar: MakeTar, root: Path) -> None:
    archive = make_tar(
        (info("d", tarfile.DIRTYPE, mode=0o700), b""),
        (info("d", tarfile.SYMTYPE, linkname="/other"), b""),
        (info("other", tarfile.DIRTYPE, mode=0o755), b""),
    )
    run(archive, root)
    assert stat.S_IMODE((root / "other").stat().st_mode) == 0o755


def test_a_full_directory_is_replaced_by_a_file_or_link(make_tar: MakeTar, root: Path) -> None:
    archive = make_tar(
        (info("d/x/y"), b""),
        (info("d"), b"a file"),
        (info("p/q/r/s"), b""),
        (info("p/q", tarfile.SYMTYPE, linkname="/d"), b""),
        (info("p/other"), b"o"),
    )
    run(archive, root)
    assert (root / "d").read_text() == "a file"
    assert os.readlink(root / "p/q") == "/d"
    assert (root / "p/other").read_text() == "o"


def test_hard_links_share_their_file_and_never_lead_out(make_tar: MakeTar, root: Path) -> None:
    run(make_tar((info("a/f"), b"1"), (info("g", tarfile.LNKTYPE, linkname="./a/f"), b"")), root)
    assert (root / "g").stat().st_ino == (root / "a/f").stat().st_ino
    with pytest.raises(LayerError, match="leads out"):
        run(make_tar((info("h", tarfile.LNKTYPE, linkname="../outside/x"), b"")), root)
    with pytest.raises(LayerError, match="'h' is a hard link to 'missing': No such file"):
        run(make_tar((info("h", tarfile.LNKTYPE, linkname="missing"), b"")), root)
    with pytest.raises(LayerError, match="'h' is a hard link to '/'"):
        run(make_tar((info("h", tarfile.LNKTYPE, linkname="/"), b"")), root)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([(info("h", tarfile.LNKTYPE, linkname="missing"), b"")], "'h' is a hard link to 'missing'"),
        ([(info("d", tarfile.DIRTYPE), b""), (info("h", tarfile.LNKTYPE, linkname="d"), b"")], "link to 'd'"),
        ([(info("f"), b""), (info("h", tarfile.LNKTYPE, linkname="f/x"), b"")], "f is needed as a directory"),
        ([(info("f"), b""), (info("f/x"), b"")], "f is needed as a directory"),
        ([(info("l", tarfile.SYMTYPE, linkname="l"), b""), (info("l/x"), b"")], "links form a loop"),
        ([(info("n" * 256), b"")], "'nnn.*n' is a longer name or link than Linux allows"),
        ([(info("n" * 256 + "/x"), b"")], "'nnn.*n' is a longer name or link than Linux allows"),
        (
            [(info("l", tarfile.SYMTYPE, linkname="n" * 5000), b"")],
            "'l' is a longer name or link than Linux",
        ),
    ],
)
def test_what_fits_into_no_tree_is_the_fault_of_the_archive(
    make_tar: MakeTar, root: Path, members: list[tuple[tarfile.TarInfo, bytes]], said: str
) -> None:
    with pytest.raises(DamagedArchive, match=said):
        run(make_tar(*members), root)


def test_devices_are_left_out_and_counted_but_those_of_dev(make_tar: MakeTar, root: Path) -> None:
    device = {"devmajor": 1, "devminor": 3}
    report = run(
        make_tar(
            (info("dev/null", tarfile.CHRTYPE, **device), b""),
            (info("jail/dev/null", tarfile.CHRTYPE, **device), b""),
            (info("disk", tarfile.BLKTYPE, **device), b""),
        ),
        root,
    )
    assert (report.devices, report.members) == (2, 0)
    assert report.examples == {"devices": ["jail/dev/null", "disk"]}


def test_pipes_are_made(make_tar: MakeTar, root: Path) -> None:
    run(make_tar((info("p", tarfile.FIFOTYPE, mode=0o622), b"")), root)
    assert stat.S_ISFIFO((root / "p").stat().st_mode)
    assert stat.S_IMODE((root / "p").stat().st_mode) == 0o622


def test_an_owner_that_does_not_exist_becomes_root_and_loses_setuid(make_tar: MakeTar, root: Path) -> None:
    # No user namespace at all knows this one; it stands for any id outside of the mapping.
    nobody = 2**32 - 1
    report = run(
        make_tar(
            (info("game", uid=nobody + 1, gid=0, mode=0o4755), b""),
            (info("plain", uid=nobody + 1, gid=0), b""),
            (info("d", tarfile.DIRTYPE, uid=nobody + 1, gid=0, mode=0o2755), b""),
        ),
        root,
    )
    assert (report.foreign, report.stripped) == (3, 1)
    assert report.examples["stripped"] == ["game"]
    assert f"game ({nobody + 1}:0)" in report.examples["foreign"]
    assert stat.S_IMODE((root / "game").stat().st_mode) == 0o755
    assert (root / "game").stat().st_uid == os.geteuid()


def test_attributes_are_kept_where_possible_and_counted_where_not(make_tar: MakeTar, root: Path) -> None:
    headers = {"SCHILY.xattr.user.a": "ü\udcff", "SCHILY.xattr.nonsense": "1", "comment": "2"}
    report = run(make_tar((info("f", pax_headers=headers), b"")), root)
    assert os.getxattr(root / "f", "user.a") == "ü".encode() + b"\xff"
    assert report.examples == {"attributes": ["f (nonsense)"]}


def test_only_a_few_names_are_remembered(make_tar: MakeTar, root: Path) -> None:
    report = run(make_tar(*((info(f"d{n}", tarfile.CHRTYPE), b"") for n in range(9))), root)
    assert report.devices == 9
    assert len(report.examples["devices"]) == 3


def test_a_member_of_an_unknown_type_is_an_error(make_tar: MakeTar, root: Path) -> None:
    archive = make_tar((info("f"), b""))
    data = bytearray(archive.read_bytes())
    data[156:157] = b"Y"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    archive.write_bytes(data)
    with pytest.raises(LayerError, match="'f' has the unknown type b'Y'"):
        run(archive, root)


def test_a_damaged_archive_is_an_error(make_tar: MakeTar, root: Path) -> None:
    archive = make_tar((info("f"), b"x" * 5000))
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(LayerError, match="unexpected end of data"):
        run(archive, root)


@pytest.mark.root
def sparse(
    name: str, size: int, regions: list[tuple[int, int]], content: bytes
) -> tuple[tarfile.TarInfo, bytes]:
    """A sparse member as `tar --sparse --format=pax` makes it: the map comes first in the content."""
    numbers = [len(regions), *(number for region in regions for number in region)]
    table = "".join(f"{number}\n" for number in numbers).encode()
    table += bytes(-len(table) % 512)
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    headers["GNU.sparse.realsize"] = str(size)
    return info("GNUSparseFile.0/x", pax_headers=headers), table + content


def test_a_sparse_member_takes_no_more_than_its_data_however_large_it_claims_to_be(
    make_tar: MakeTar, root: Path
) -> None:
    size = 1 << 40
    run(make_tar(sparse("big", size, [(0, 3), (size - 3, 3)], b"abcxyz")), root)
    status = (root / "big").stat()
    assert status.st_size == size
    assert status.st_blocks * 512 < 1 << 20
    with open(root / "big", "rb") as file:
        assert file.read(4) == b"abc\0"
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"\0xyz"


@pytest.mark.parametrize(
    ("size", "region"), [(10, (-5, 3)), (10, (1 << 70, 1)), (1 << 63, (0, 1)), (10, (5, 1 << 80))]
)
def test_a_sparse_member_with_an_impossible_map_fills_no_disk(
    make_tar: MakeTar, root: Path, size: int, region: tuple[int, int]
) -> None:
    archive = make_tar(sparse("big", size, [region], b"abc"))
    with suppress(LayerError, OSError):  # it may be refused, which a worker reports
        run(archive, root)
    assert sum(path.stat().st_blocks * 512 for path in root.iterdir()) < 1 << 20


@pytest.mark.parametrize("value", ["-", "1\n5", "9" * 5000])
def test_numbers_that_are_none_are_damage(make_tar: MakeTar, root: Path, value: str) -> None:
    with pytest.raises(LayerError, match="header"):
        run(make_tar((info("x", pax_headers={"GNU.sparse.size": value, "GNU.sparse.map": value}), b"")), root)


def test_headers_without_end_are_damage(root: Path, tmp_path: Path) -> None:
    header = info("x", tarfile.XHDTYPE, size=0).tobuf()
    (tmp_path / "chain.tar").write_bytes(header * 3000 + info("f").tobuf() + bytes(1024))
    with pytest.raises(LayerError, match="header"):
        run(tmp_path / "chain.tar", root)


def test_a_nul_in_a_name_is_refused(make_tar: MakeTar, root: Path) -> None:
    with pytest.raises(LayerError, match="NUL in its name"):
        run(make_tar((info("x", pax_headers={"path": "a\0b"}), b"")), root)


@pytest.mark.root
def test_owners_go_by_number(make_tar: MakeTar, root: Path) -> None:
    run(make_tar((info("f", uid=4242, gid=2424, uname="root", gname="root", mode=0o4755), b"")), root)
    status = (root / "f").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (4242, 2424, 0o4755)


@pytest.mark.parametrize(("text", "seconds"), [("1e400", 2**63 / 10**9), ("nan", 0), ("-1.5", -1.5)])
def test_times_that_make_no_sense_are_no_damage(
    make_tar: MakeTar, root: Path, text: str, seconds: float
) -> None:
    run(make_tar((info("f", pax_headers={"mtime": text}), b"")), root)
    assert (root / "f").stat().st_mtime == pytest.approx(seconds, abs=1)


def test_a_whiteout_removes_what_the_layers_below_have_and_nothing_of_its_own(root: Path) -> None:
    for name in ("gone/deep/er/f", "kept", "d/old", "d/sub/x", "e/old", "was/f"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("below")
    archive = io.BytesIO()
    writer = LayerWriter(archive)
    for entry in (
        Entry("gone", WHITEOUT),
        Entry("missing/too", WHITEOUT),
        Entry("d", DIRECTORY, 0o755),
        Entry("d", OPAQUE),
        Entry("d/new", FILE, 0o644),
        Entry("e/new", FILE, 0o644),
        Entry("e", OPAQUE),  # anywhere in the layer (layer.md of the OCI image specification)
        Entry("e/new", WHITEOUT),
        Entry("was", FILE, 0o644),
        Entry("nowhere", OPAQUE),
    ):
        writer.add(entry)
    writer.close()
    archive.seek(0)
    with Root(str(root)) as target:
        apply(LayerReader(archive, whiteouts=True), target)
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    assert found == ["d", "d/new", "e", "e/new", "kept", "was"]


def test_directories_without_end_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firebuild_bootstrap.layers.apply.REMEMBERED", 10 * 512)
    many = [(Entry(f"d{number}", DIRECTORY, 0o755), b"") for number in range(9)]
    with_attributes = [(Entry("d", DIRECTORY, 0o755, xattrs={"user.x": bytes(4096)}), b"")]
    for entries in (many, with_attributes):
        archive = io.BytesIO()
        write_layer(archive, entries)
        archive.seek(0)
        with Root(str(root)) as target:
            assert apply(LayerReader(archive), target).members == len(entries)
        archive.seek(0)
        more = io.BytesIO()
        write_layer(more, [*entries, (Entry("more", DIRECTORY, 0o755), b""), (Entry("x", DIRECTORY), b"")])
        more.seek(0)
        with Root(str(root)) as target, pytest.raises(LayerError, match="too many directories"):
            apply(LayerReader(more), target)


def test_directories_that_no_entry_describes_are_bounded_too(
    make_tar: MakeTar, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firebuild_bootstrap.layers.apply._MOST_MADE", 6)
    run(make_tar((info("a/b/c/f"), b""), (info("d/e/f/f"), b"")), root)
    archive = make_tar((info("g/h/i/f"), b""), (info("k/l/m/n/f"), b""))
    with pytest.raises(LayerError, match="needs more than 6 directories that it does not have"):
        run(archive, root)


def test_a_whiteout_leads_no_further_than_a_link_in_the_tree(root: Path) -> None:
    (root.parent / "outside/precious").touch()
    (root / "door").symlink_to("../outside")
    archive = io.BytesIO()
    writer = LayerWriter(archive)
    writer.add(Entry("door/precious", WHITEOUT))
    writer.add(Entry("door", OPAQUE))
    writer.close()
    archive.seek(0)
    with Root(str(root)) as target:
        apply(LayerReader(archive, whiteouts=True), target)
    assert (root.parent / "outside/precious").exists()


def test_a_whiteout_below_a_link_removes_what_the_link_leads_to(make_tar: MakeTar, root: Path) -> None:
    for name in ("usr/lib/gone", "usr/lib/kept", "usr/lib/new", "usr/share/old"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "lib").symlink_to("usr/lib")
    (root / "share").symlink_to("/usr/share")
    os.utime(root / "usr/lib", (1000, 1000))
    members = (
        (info(name), b"1") for name in ("usr/lib/new", "lib/.wh.new", "lib/.wh.gone", "share/.wh..wh..opq")
    )
    with open(make_tar(*members), "rb") as source, Root(str(root)) as target:
        apply(LayerReader(source.fileno(), whiteouts=True), target)
    assert sorted(os.listdir(root / "usr/lib")) == ["kept", "new"]
    assert (root / "usr/lib/new").read_bytes() == b"1"
    assert os.listdir(root / "usr/share") == []
    assert (root / "lib").is_symlink()
    assert (root / "usr/lib").stat().st_mtime == 1000


def test_a_directory_that_is_named_in_two_ways_has_what_its_entry_says(make_tar: MakeTar, root: Path) -> None:
    archive = make_tar(
        (info("lib", tarfile.SYMTYPE, linkname="usr/lib"), b""),
        (info("lib/made/file"), b"1"),
        (info("usr/lib/made", tarfile.DIRTYPE, mode=0o700, mtime=7), b""),
        (info("lib/made/more"), b"2"),
    )
    run(archive, root)
    status = (root / "usr/lib/made").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o700, 7)
    assert sorted(os.listdir(root / "usr/lib/made")) == ["file", "more"]


def test_directories_that_the_archive_does_not_list_get_no_time_of_this_machine(
    make_tar: MakeTar, root: Path
) -> None:
    run(make_tar((info("x/y/z"), b"1")), root)
    assert [(root / name).stat().st_mtime for name in (".", "x", "x/y")] == [0, 0, 0]


def test_what_the_archive_adds_to_directories_leaves_their_times(make_tar: MakeTar, root: Path) -> None:
    for name in (".", "usr", "usr/lib", "etc", "listed"):
        (root / name).mkdir(exist_ok=True)
    (root / "etc" / "old").touch()
    (root / "lib").symlink_to("usr/lib")
    for number, name in enumerate(("usr/lib", "usr", "etc", "listed", ".")):
        os.utime(root / name, (1000 + number, 1000 + number))
    listed = tarfile.TarInfo("listed")
    listed.type, listed.mode, listed.mtime = tarfile.DIRTYPE, 0o755, 7
    whiteout = info("etc/.wh.old"), b""
    members = ((info(name), b"1") for name in ("lib/a", "lib/made/b", "etc/c", "usr/d", "e", "listed/f"))
    with open(make_tar(*members, (listed, b""), whiteout), "rb") as source, Root(str(root)) as target:
        apply(LayerReader(source.fileno(), whiteouts=True), target)
    times = {name: (root / name).stat().st_mtime for name in (".", "usr", "usr/lib", "usr/lib/made", "etc")}
    assert times == {".": 1004, "usr": 1001, "usr/lib": 1000, "usr/lib/made": 0, "etc": 1002}
    assert (root / "listed").stat().st_mtime == 7
    assert not (root / "etc" / "old").exists()


def test_a_tree_may_be_deeper_than_descriptors_and_paths_are_long(tmp_path: Path, root: Path) -> None:
    os.mkdir(tmp_path / "deep")
    top = os.open(tmp_path / "deep", os.O_RDONLY)
    current = os.dup(top)
    for number in range(450):
        os.mkdir("directory", dir_fd=current)
        below = os.open("directory", os.O_RDONLY, dir_fd=current)
        if number % 100 == 99:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=below))
        os.close(current)
        current = below
    os.close(current)
    archive = io.BytesIO()
    write_layer(archive, tree_entries(top))
    os.close(top)
    again = io.BytesIO()
    with Root(str(root)) as target:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        last = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 200, before[1]))  # fewer than levels
        try:
            report = apply(LayerReader(io.BytesIO(archive.getvalue())), target)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        write_layer(again, tree_entries(target.descriptor))
    assert report.members == 455
    assert again.getvalue() == archive.getvalue()


def test_a_path_whose_directories_would_fill_the_memory_is_refused(
    make_tar: MakeTar, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firebuild_bootstrap.layers.apply.DEEPEST", 10_000)
    archive = make_tar((info("/".join("e" * 90)), b""), (info("/".join("d" * 5000)), b""))
    with (
        open(archive, "rb") as source,
        Root(str(root)) as target,
        pytest.raises(LayerError, match=r"^/d/d.{,80}… is too deep: more than 100 directories$"),
    ):
        apply(LayerReader(source.fileno()), target)


@pytest.mark.root
def test_devices_are_made_where_they_are_asked_for(make_tar: MakeTar, root: Path) -> None:
    archive = make_tar((info("n", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666, mtime=7), b""))
    with open(archive, "rb") as source, Root(str(root)) as target:
        assert apply(LayerReader(source.fileno()), target, devices=True) == UnpackReport(members=1)
    status = (root / "n").stat()
    assert (status.st_mode, status.st_rdev, status.st_mtime) == (stat.S_IFCHR | 0o666, os.makedev(1, 3), 7)
