"""Reading ext4 images: everything that was put in comes out, and damage is named."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4
from firebuild_bootstrap.image.worker.extfs import Ext4Image, Inode
from firebuild_bootstrap.image.worker.imagewalk import image_entries, walk_image
from firebuild_bootstrap.layers.tar import LayerError, write_layer
from firebuild_bootstrap.layers.tree import tree_entries

pytestmark = [pytest.mark.needs("mke2fs"), pytest.mark.needs("debugfs")]
ENV = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "MKE2FS_CONFIG": "/nonexistent"}


def members(archive: Path) -> list[tuple[object, ...]]:
    """Everything in an archive but what mke2fs does not write: fractions of a second."""
    with tarfile.open(archive) as tar:
        return [
            (
                *(one.name, one.type, one.mode, one.size, one.linkname),
                *(int(one.mtime), one.uid, one.gid),
                *(one.devmajor, one.devminor),
                {name: value for name, value in one.pax_headers.items() if name.startswith("SCHILY")},
                opened.read() if (opened := tar.extractfile(one) if one.isreg() else None) else b"",
            )
            for one in tar
        ]


def packed(root: Path, archive: Path) -> list[tuple[object, ...]]:
    with archive.open("wb") as target:
        write_layer(target, tree_entries(str(root)))
    return members(archive)


def packed_image(image: Path, archive: Path) -> list[tuple[object, ...]]:
    opened = Ext4Image(str(image))
    with archive.open("wb") as target:
        write_layer(target, image_entries(opened))
    opened.close()
    return members(archive)


def make(root: Path, image: Path) -> Path:
    make_ext4(tree_entries(str(root)), str(image), Ext4Options())
    return image


def debugfs(image: Path, *requests: str) -> None:
    for request in requests:
        command = ["debugfs", "-w", "-R", request, str(image)]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[1:] == []


def inode(image: Path, path: str) -> Inode:
    return next(inode for found, inode in walk_image(Ext4Image(str(image))) if found == path)


def test_an_image_packs_to_the_same_archive_as_the_tree_it_was_made_of(
    rich_tree: Path, tmp_path: Path
) -> None:
    image = make(rich_tree, tmp_path / "i.ext4")
    assert packed_image(image, tmp_path / "a.tar") == packed(rich_tree, tmp_path / "b.tar")


@pytest.mark.parametrize("block", [1024, 2048, 4096])
@pytest.mark.parametrize("features", ["", "^64bit", "^metadata_csum,^dir_index", "^flex_bg"])
def test_other_layouts_are_read_too(rich_tree: Path, tmp_path: Path, block: int, features: str) -> None:
    image = tmp_path / "i.ext4"
    subprocess.run(
        [
            *("mke2fs", "-q", "-t", "ext4", "-b", str(block), "-O", features or "extent", "-d", rich_tree),
            *(image, "40M"),
        ],
        env=ENV,
        check=True,
    )
    # Older versions of mke2fs give the root directory a time of their own.
    assert packed_image(image, tmp_path / "a.tar")[1:] == packed(rich_tree, tmp_path / "b.tar")[1:]


def test_many_names_and_large_and_sparse_files_come_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "many").mkdir(parents=True)
    for number in range(3000):
        (root / "many" / f"a-rather-long-name-{number:05}").touch()
    (root / "large").write_bytes(random.Random(1).randbytes(9_000_001))
    with (root / "sparse").open("wb") as file:
        for place in range(0, 3 << 20, 3 << 16):  # enough extents for a tree of them
            file.seek(place)
            file.write(b"here")
        file.truncate(5 << 20)
    image = make(root, tmp_path / "i.ext4")
    assert len(Ext4Image(str(image)).extents(inode(image, "sparse"))) > 4
    assert packed_image(image, tmp_path / "a.tar") == packed(root, tmp_path / "b.tar")


def test_device_nodes_and_owners_of_any_number_come_out_whoever_reads(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").touch()
    image = make(tmp_path / "root", tmp_path / "i.ext4")
    debugfs(
        image,
        "mknod null c 1 3",
        "mknod large b 259 200",
        "set_inode_field file uid 100000",
        "set_inode_field file gid 70001",
        "set_inode_field file mode 0104711",
    )
    packed_image(image, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        null, large, file = (tar.getmember(name) for name in ("null", "large", "file"))
    assert (null.type, null.devmajor, null.devminor) == (tarfile.CHRTYPE, 1, 3)
    assert (large.type, large.devmajor, large.devminor) == (tarfile.BLKTYPE, 259, 200)
    assert (file.uid, file.gid, file.mode) == (100000, 70001, 0o4711)


def test_attributes_in_a_block_of_their_own_come_out(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").touch()
    os.setxattr(tmp_path / "root/file", "user.small", b"1")
    image = make(tmp_path / "root", tmp_path / "i.ext4")
    value = tmp_path / "value"
    value.write_bytes(bytes(range(256)) * 3)
    acl = "02000000 01000600ffffffff 02000400e8030000 04000400ffffffff 10000400ffffffff 20000400ffffffff"
    (tmp_path / "acl").write_bytes(bytes.fromhex(acl.replace(" ", "")))
    debugfs(
        image,
        f"ea_set -f {value} file user.large",
        f"ea_set -f {tmp_path / 'acl'} file system.posix_acl_access",
        "ea_set file trusted.host secret",
    )
    entries = image_entries(Ext4Image(str(image)))
    assert next(entry.xattrs for entry, _ in entries if entry.path == "file") == {
        "user.small": b"1",
        "user.large": bytes(range(256)) * 3,
        "system.posix_acl_access": (tmp_path / "acl").read_bytes(),
    }


def test_what_the_check_of_the_file_system_found_is_kept_and_an_empty_place_for_it_is_not(
    rich_tree: Path, tmp_path: Path
) -> None:
    image = make(rich_tree, tmp_path / "i.ext4")
    paths = [path for path, _ in walk_image(Ext4Image(str(image)))]
    assert "lost+found" not in paths
    debugfs(image, "mkdir lost+found/#12")
    paths = [path for path, _ in walk_image(Ext4Image(str(image)))]
    assert {"lost+found", "lost+found/#12"} <= set(paths)


def test_the_work_can_be_done_in_the_sandbox(trees: Trees, rich_tree: Path, tmp_path: Path) -> None:
    image = make(rich_tree, tmp_path / "i.ext4")
    made = trees.pack_image(image, tmp_path / "a.tar")
    assert members(tmp_path / "a.tar") == packed(rich_tree, tmp_path / "b.tar")
    assert made.size == (tmp_path / "a.tar").stat().st_size
    (tmp_path / "junk").write_bytes(b"no file system" * 1000)
    with pytest.raises(MachineError, match="it is not an ext4 file system"):
        trees.pack_image(tmp_path / "junk", tmp_path / "c.tar")


def overwrite(offset: int, data: bytes) -> Callable[[Path], None]:
    def change(image: Path) -> None:
        with image.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return change


def inode_field(path: str, offset: int, data: bytes) -> Callable[[Path], None]:
    """Overwrite a part of an inode."""

    def change(image: Path) -> None:
        opened = Ext4Image(str(image))
        number = inode(image, path).number
        group, index = divmod(number - 1, opened._inodes_per_group)
        descriptor = opened._range(opened._descriptors + group * 64, 64)
        table = struct.unpack_from("<I", descriptor, 8)[0]
        overwrite(table * opened.block_size + index * 256 + offset, data)(image)

    return change


def directory_block(path: str, offset: int, data: bytes) -> Callable[[Path], None]:
    """Overwrite a part of the first block of a directory."""

    def change(image: Path) -> None:
        opened = Ext4Image(str(image))
        extent = opened.extents(inode(image, path))[0]
        overwrite(extent.physical * opened.block_size + offset, data)(image)

    return change


def loop(image: Path) -> None:
    dir_inode = inode(image, "dir").number
    opened = Ext4Image(str(image))
    extent = opened.extents(inode(image, "dir/sub"))[0]
    parent = struct.pack("<IHBB4s", dir_inode, 12, 2, 2, b"..")
    back = struct.pack("<IHBB4s", dir_inode, 4096 - 24 - 12, 4, 2, b"back")
    overwrite(extent.physical * opened.block_size + 12, parent + back)(image)


EXTENT = struct.pack("<IHHI", 0, 2, 0, 9)
DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("magic", overwrite(1024 + 0x38, b"\0\0"), "it is not an ext4 file system"),
    ("features", overwrite(1024 + 0x60, b"\xff\xff\xff\xff"), "it uses unknown features"),
    ("journal", overwrite(1024 + 0x60, struct.pack("<I", 0x2C6)), "it was not cleanly unmounted"),
    ("blocks", overwrite(1024 + 0x18, b"\x09\0\0\0"), "larger than 64 KiB"),
    ("groups", overwrite(1024 + 0x28, b"\0\0\0\0"), "its superblock is invalid"),
    ("inode size", overwrite(1024 + 0x58, b"\x81\0"), "its superblock is invalid"),
    ("large inodes", overwrite(1024 + 0x58, b"\0\x80"), "its superblock is invalid"),
    ("inode number", directory_block("", 24 + 0, b"\xff\xff\xff\x7f"), "there is no inode"),
    ("entry length", directory_block("", 24 + 4, b"\x03\0"), "the directory in inode 2 is damaged"),
    ("entry name", directory_block("", 24 + 8, b"a/b"), "has an impossible name: b'a/b"),
    ("root", inode_field("", 0, b"\xa4\x81"), "its root is not a directory"),
    ("inline", inode_field("file", 0x20, struct.pack("<I", 0x10000000)), "in a way that is not known"),
    ("old map", inode_field("file", 0x20, struct.pack("<I", 0)), "in a way that is not known"),
    ("extent magic", inode_field("file", 0x28, b"\0\0"), "the extents of inode .* are damaged"),
    ("extent count", inode_field("file", 0x28 + 2, b"\x09\0"), "the extents of inode .* are damaged"),
    ("extent depth", inode_field("file", 0x28 + 6, b"\x09\0"), "the extents of inode .* are damaged"),
    (
        "overlap",
        inode_field("file", 0x28, struct.pack("<HHHHI", 0xF30A, 2, 4, 0, 0) + EXTENT + EXTENT),
        "the extents of inode .* overlap",
    ),
    ("beyond", inode_field("file", 0x28 + 12 + 6, b"\xff\x7f"), "points beyond its end"),
    ("link", inode_field("dangling", 0x4, b"\xff\xff\xff\x7f"), "is too long"),
    ("directory size", inode_field("dir", 0x4, b"\xff\xff\xff\xff"), "is too large"),
    ("attribute", inode_field("file", 0xA0 + 4 + 1, b"\x63"), "the attributes of inode .* are damaged"),
    ("loop", loop, "the directory /dir/sub/back is there twice"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES]
)
def test_damage_is_named(
    rich_tree: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    image = make(rich_tree, tmp_path / "i.ext4")
    change(image)
    with pytest.raises(LayerError, match=message) as caught:
        packed_image(image, tmp_path / "a.tar")
    assert str(caught.value).startswith(f"{image} cannot be read as ext4: ")


def test_a_file_that_is_too_small_is_named(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(b"x")
    with pytest.raises(LayerError, match="too small"):
        Ext4Image(str(tmp_path / "i"))


def test_random_damage_is_survived(rich_tree: Path, tmp_path: Path) -> None:
    good = make(rich_tree, tmp_path / "good.ext4")
    with good.open("rb") as file:
        used = [at for at in range(0, 3 << 20, 4096) if file.seek(at) == at and any(file.read(4096))]
    chance = random.Random(20)
    for _ in range(60):
        image = tmp_path / "bad.ext4"
        shutil.copyfile(good, image)
        with image.open("r+b") as file:
            for _ in range(30):
                file.seek(chance.choice(used) + chance.randrange(4096))
                file.write(chance.randbytes(1))
        try:
            packed_image(image, tmp_path / "a.tar")
        except (LayerError, tarfile.TarError):
            continue
