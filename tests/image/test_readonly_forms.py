"""EROFS and squashfs, as their own tools read them."""

from __future__ import annotations

import os
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.image.worker import readonly
from firebuild_bootstrap.image.worker.__main__ import digest
from firebuild_bootstrap.image.worker.readonly import PROGRAMS, make_readonly
from firebuild_bootstrap.layers.tar import LayerError
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sandbox import Host, Sandbox
from firebuild_bootstrap.sandbox.idmap import single
from layers.trees import MakeTar, dig

FORMS = [
    pytest.param("erofs", marks=pytest.mark.needs("mkfs.erofs")),
    pytest.param("squashfs", marks=pytest.mark.needs("sqfstar")),
]


def unpacked(form: str, image: Path, target: Path) -> Path:
    command = {
        "erofs": ["fsck.erofs", f"--extract={target}", str(image)],
        "squashfs": ["unsquashfs", "-quiet", "-no-progress", "-dest", str(target), str(image)],
    }[form]
    subprocess.run(command, capture_output=True, check=True)
    return target


@pytest.fixture
def tree(rich_tree: Path) -> Path:
    """The rich tree, with times of whole seconds, as squashfs has them, and a root that is not as usual."""
    for folder, names, files in os.walk(rich_tree, topdown=False):
        for path in (*(f"{folder}/{name}" for name in (*names, *files)), folder):
            os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    rich_tree.chmod(0o750)
    os.utime(rich_tree, (1_500_000_000, 1_500_000_000))
    return rich_tree


@pytest.mark.needs("root")
@pytest.mark.parametrize("form", FORMS)
def test_the_image_holds_the_tree(form: str, tree: Path, tmp_path: Path, trees: Trees) -> None:
    made = trees.readonly(tree, tmp_path / "i", form)
    assert made.size == (tmp_path / "i").stat().st_size
    found = unpacked(form, tmp_path / "i", tmp_path / "out")
    if form == "squashfs":  # fsck.erofs unpacks neither attributes nor hard links
        assert digest(str(found), times=True) == digest(str(tree), times=True)
    assert (found.stat().st_mode, found.stat().st_mtime) == (tree.stat().st_mode, 1_500_000_000)
    assert (found / "file").read_bytes() == (tree / "file").read_bytes()


def test_links_and_pipes_with_several_names_are_one_thing_in_squashfs(tmp_path: Path) -> None:
    (tree := tmp_path / "tree").mkdir()
    os.symlink("x", tree / "link1")
    os.mkfifo(tree / "pipe1")
    for kind in ("link", "pipe"):
        os.link(tree / f"{kind}1", tree / f"{kind}2", follow_symlinks=False)
    make_readonly("squashfs", str(tree), str(tmp_path / "i"), None)
    found = unpacked("squashfs", tmp_path / "i", tmp_path / "out")
    assert {path.name: path.lstat().st_nlink for path in found.iterdir()} == dict.fromkeys(
        ("link1", "link2", "pipe1", "pipe2"), 2
    )
    make_readonly("erofs", str(tree), str(tmp_path / "i"), None)
    assert sorted(os.listdir(unpacked("erofs", tmp_path / "i", tmp_path / "out2"))) == sorted(
        os.listdir(tree)
    )


@pytest.mark.parametrize("form", FORMS)
def test_files_with_holes_at_any_place_come_out_as_they_went_in(form: str, tmp_path: Path) -> None:
    (tree := tmp_path / "tree").mkdir()
    for size in (1 << 20, 1_000_000, 1_000_001):
        for place in (0, 500_000, size - 1):
            with (tree / f"{size}-{place}").open("wb") as file:
                file.truncate(size)
                os.pwrite(file.fileno(), b"x", place)
        with (tree / f"{size}-empty").open("wb") as file:
            file.truncate(size)
    make_readonly(form, str(tree), str(tmp_path / "i"), None)
    found = unpacked(form, tmp_path / "i", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        path.name: path.read_bytes() for path in tree.iterdir()
    }
    if form == "squashfs":  # mkfs.erofs writes the zeros
        assert (tmp_path / "i").stat().st_size < 1 << 20


@pytest.mark.parametrize("form", FORMS)
def test_the_same_tree_gives_the_same_bytes(form: str, tree: Path, tmp_path: Path) -> None:
    (tree / "late").touch()
    for number in range(300):  # so that the root is not in the first block of inodes
        (tree / f"some-{number}").touch()
    os.utime(tree / "late", (2**33, 2**33))
    for number, newest in enumerate([None, None, 1_000_000_000]):
        moved = tree.rename(tmp_path / f"tree{number}")
        make_readonly(form, str(moved), str(tmp_path / f"i{number}"), newest)
        moved.rename(tree)
    images = [(tmp_path / f"i{number}").read_bytes() for number in range(3)]
    assert images[0] == images[1] != images[2]
    found = unpacked(form, tmp_path / "i2", tmp_path / "out")
    assert {path.lstat().st_mtime for path in found.rglob("*")} == {1_000_000_000}


def test_erofs_is_written_from_an_archive_where_the_program_reads_one(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As real ones of 1.7 and newer do; Debian 13 has one, with which the tests above run as well."""
    program = tmp_path / "bin/mkfs.erofs"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ $1 != --version ] || { echo "mkfs.erofs (erofs-utils) 1.8.6"; exit; }\n'
        f'echo $SOURCE_DATE_EPOCH "$@" > {tmp_path}/said; cat > "$4"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for name, mtime_ns in (("zeros", 120), ("digits", 123), ("whole", 10**9)):
        (tree / name).touch()
        os.utime(tree / name, ns=(0, mtime_ns))
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 20)
    os.utime(tree / "sparse", (0, 2_000_000_000))
    make_readonly("erofs", str(tree), str(tmp_path / "i"), None)
    assert (tmp_path / "said").read_text().split()[0] == "2000000000"
    with tarfile.open(tmp_path / "i") as archive:
        members = {each.name: each for each in archive}
    assert members["sparse"].size == 1 << 20
    assert not any("sparse" in name for each in members.values() for name in each.pax_headers)
    times = [members[name].pax_headers.get("mtime") for name in ("zeros", "digits", "whole")]
    assert times == ["0.000000121", "0.000000123", None]


@pytest.mark.parametrize(
    ("says", "cuts"),
    [("1.7.1", True), ("1.8", True), ("1.8.4", True), ("1.8.5", False), ("1.8.10", False), ("1.9", False)],
)
def test_a_name_whose_end_a_program_would_cut_off_is_an_error(
    says: str, cuts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/mkfs.erofs"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ $1 != --version ] || {{ echo "mkfs.erofs (erofs-utils) {says}"; exit; }}\ncat > "$4"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    (tmp_path / "tree/d").mkdir(parents=True)
    (tmp_path / "tree/d" / ("n" * 254)).touch()
    make_readonly("erofs", str(tmp_path / "tree"), str(tmp_path / "short"), None)
    (tmp_path / "tree/d" / ("é" * 127 + "n")).touch()
    if not cuts:
        make_readonly("erofs", str(tmp_path / "tree"), str(tmp_path / "long"), None)
        assert (tmp_path / "long").stat().st_size
        return
    with pytest.raises(LayerError, match=r"/d/é+n… has 255 bytes, and mkfs\.erofs 1\.[78]") as caught:
        make_readonly("erofs", str(tmp_path / "tree"), str(tmp_path / "long"), None)
    assert "1.8.5 or newer" in caught.value.hint
    assert not (tmp_path / "long").exists()


@pytest.mark.needs("mkfs.erofs")
def test_a_name_of_255_bytes_is_whole_in_erofs_or_an_error(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ("n" * 255)).touch()
    if readonly._erofs_version() < (1, 8, 5):
        with pytest.raises(LayerError, match=r"the name of /n+… has 255 bytes"):
            make_readonly("erofs", str(tmp_path / "tree"), str(tmp_path / "e"), None)
        return
    make_readonly("erofs", str(tmp_path / "tree"), str(tmp_path / "e"), None)
    command = ["dump.erofs", "--ls", "--path=/", str(tmp_path / "e")]
    assert "n" * 255 in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _reads_archives(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a mkfs.erofs 1.8.6 on PATH whose image is the archive that it is given."""
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ $1 != --version ] || { echo "mkfs.erofs (erofs-utils) 1.8.6"; exit; }\ncat > "$4"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


@pytest.mark.needs("mkfs.erofs")
def test_a_time_before_1970_is_not_the_newest_of_all_in_erofs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree := tmp_path / "tree").mkdir()
    (tree / "old").touch()
    os.utime(tree / "old", ns=(0, -1_500_000_000))
    (tree / "new").touch()
    os.utime(tree / "new", (2_000_000_000, 2_000_000_000))
    if readonly._erofs_version() < (1, 7):
        with pytest.raises(
            LayerError, match=r"/old is from before 1970, which mkfs\.erofs .* takes for later"
        ):
            make_readonly("erofs", str(tree), str(tmp_path / "refused"), None)
        assert not (tmp_path / "refused").exists()
    _reads_archives(tmp_path / "bin/mkfs.erofs", monkeypatch)
    make_readonly("erofs", str(tree), str(tmp_path / "i"), None)
    with tarfile.open(tmp_path / "i") as archive:
        assert {each.name: each.mtime for each in archive if each.name in ("old", "new")} == {
            "old": 0,
            "new": 2_000_000_000,
        }


@pytest.mark.parametrize("form", FORMS)
def test_an_attribute_whose_name_a_program_would_change_is_an_error(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree := tmp_path / "tree").mkdir()
    (tree / "f").touch()
    os.setxattr(tree / "f", "user.100%", b"kept")
    if form == "erofs":
        _reads_archives(tmp_path / "bin/mkfs.erofs", monkeypatch)
    make_readonly(form, str(tree), str(tmp_path / "i"), None)
    os.setxattr(tree / "f", "user.a=b", b"v")
    with pytest.raises(
        LayerError, match=r"/f has the extended attribute 'user.a=b', whose name .* would change"
    ):
        make_readonly(form, str(tree), str(tmp_path / "again"), None)


@pytest.mark.needs("userns", "mkfs.erofs", "sqfstar")
def test_owners_that_only_are_marks_come_out_as_they_should(tmp_path: Path, make_tar: MakeTar) -> None:
    alone = Trees(Sandbox(single(Host.current(), "")))
    (tree := tmp_path / "tree").mkdir()
    shadow = tarfile.TarInfo("etc/shadow")
    shadow.uid, shadow.gid = 7, 42
    alone.unpack(make_tar("etc/", (shadow, b"x")), tree)
    alone.readonly(tree, tmp_path / "s", "squashfs")
    listed = subprocess.run(
        ["unsquashfs", "-lln", tmp_path / "s"], capture_output=True, text=True, check=True
    )
    assert " 7/42 " in listed.stdout
    if readonly._erofs_version() < (1, 7):
        with pytest.raises(MachineError, match="etc/shadow belongs to 7:42, which this user") as caught:
            alone.readonly(tree, tmp_path / "e", "erofs")
        assert caught.value.hint is not None
        assert "1.7" in caught.value.hint
    else:
        alone.readonly(tree, tmp_path / "e", "erofs")
        command = ["dump.erofs", "--path=/etc/shadow", str(tmp_path / "e")]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "Uid: 7   Gid: 42" in listed.stdout


@pytest.mark.parametrize("form", FORMS)
def test_what_the_program_says_is_passed_on(
    form: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LayerError, match=r"(mkfs.erofs|sqfstar) failed: .*(No such file|failed to open)"):
        make_readonly(form, str(tree), str(tmp_path / "missing/i"), None)
    program = tmp_path / "bin" / PROGRAMS[form][0]
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec <&-; exit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    (tree / "large").write_bytes(os.urandom(1 << 20))  # more than a pipe holds
    with pytest.raises(LayerError, match=r"(mkfs.erofs|sqfstar) failed: it ended with 3"):
        make_readonly(form, str(tree), str(tmp_path / "i"), None)
    said = bytearray()
    readonly._listen(BytesIO(bytes(1 << 20)), said)
    assert len(said) == readonly._MOST_SAID
    monkeypatch.setattr(readonly, "_SYSTEM", ())
    monkeypatch.setenv("PATH", str(program.parent))
    program.write_bytes(b"\x7fELF")
    with pytest.raises(LayerError, match="can't be started: Exec format error") as caught:
        make_readonly(form, str(tree), str(tmp_path / "i"), None)
    assert "made for another processor; install the package" in (caught.value.hint or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LayerError, match=r"the program .* was not found") as caught:
        make_readonly(form, str(tree), str(tmp_path / "i"), None)
    assert caught.value.hint == f"install the package {PROGRAMS[form][1]}"


@pytest.mark.needs("mkfs.erofs", "sqfstar")
def test_a_path_that_is_longer_than_linux_takes_is_written_or_named(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    dig(tmp_path / "tree", 20, "d" * 250)
    make_readonly("squashfs", str(tmp_path / "tree"), str(tmp_path / "s"), None)
    command = ["unsquashfs", "-lc", str(tmp_path / "s")]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    assert max(line.count(b"d" * 250) for line in listed.splitlines()) == 20
    if readonly._erofs_version() >= (1, 7):
        make_readonly("erofs", str(tmp_path / "tree"), str(tmp_path / "e"), None)
        return
    with pytest.raises(LayerError, match=r"/ddd.*… is a longer path than mkfs\.erofs .* can read") as caught:
        make_readonly("erofs", str(tmp_path / "tree"), str(tmp_path / "e"), None)
    assert "write squashfs or ext4" in caught.value.hint
    remove_tree(tmp_path / "tree")
