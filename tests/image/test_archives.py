from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.archives import check_root_archive, decompress

MakeTar = Callable[..., Path]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("form", COMPRESSORS)
def test_an_archive_is_recognised_by_content_whatever_its_name(
    make_tar: MakeTar, tmp_path: Path, form: str
) -> None:
    plain = make_tar("etc/", ("etc/hostname", b"x" * 10_000)).read_bytes()
    source = tmp_path / "rootfs.dat"
    source.write_bytes(COMPRESSORS[form](plain))
    size, digest = decompress(source, tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == plain
    assert size == len(plain)
    assert digest.startswith("sha256:")
    check_root_archive(tmp_path / "out.tar", source)


@pytest.mark.parametrize("form", ["gz", "bz2", "xz", "zst"])
def test_a_cut_off_archive_is_refused_while_it_is_decompressed(
    make_tar: MakeTar, tmp_path: Path, form: str
) -> None:
    source = tmp_path / "cut"
    source.write_bytes(COMPRESSORS[form](make_tar(("f", b"abc" * 10_000)).read_bytes())[:-20])
    with pytest.raises(InputError, match="cut is damaged"):
        decompress(source, tmp_path / "out.tar")


@pytest.mark.parametrize("rubbish", [b"?" * 512, bytes(512)])
def test_rubbish_between_members_is_damage(make_tar: MakeTar, tmp_path: Path, rubbish: bytes) -> None:
    archive = make_tar(("a", b"x"), ("b", b"y"))
    data = archive.read_bytes()
    archive.write_bytes(data[:1024] + rubbish + data[1024:])
    with pytest.raises(InputError, match=r"tar is damaged: it is not a tar archive, or broken"):
        check_root_archive(archive, archive)


@pytest.mark.parametrize("form", ["gz", "bz2", "xz", "zst"])
def test_rubbish_after_a_good_start_is_damage(tmp_path: Path, form: str) -> None:
    source = tmp_path / "rubbish"
    source.write_bytes(COMPRESSORS[form](b"x" * 1000)[:10] + b"\xff" * 500)
    with pytest.raises(InputError, match="rubbish is damaged") as caught:
        decompress(source, tmp_path / "out.tar")
        check_root_archive(tmp_path / "out.tar", source)
    assert caught.value.hint == "make or download it again"


def test_an_error_of_the_disk_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decompress(tmp_path / "missing", tmp_path / "out.tar")
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(OSError, match="No space left"):
        decompress(tmp_path / "f", Path("/dev/full"))


def test_an_archive_that_ends_without_its_mark_was_cut_off(make_tar: MakeTar, tmp_path: Path) -> None:
    archive = make_tar(("f", b"x" * 512))
    archive.write_bytes(archive.read_bytes()[:1024])
    with pytest.raises(InputError, match="its end mark is missing"):
        check_root_archive(archive, archive)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n" * 500)
    with pytest.raises(InputError, match="text is damaged: it is not a tar archive"):
        check_root_archive(tmp_path / "text", tmp_path / "text")


@pytest.mark.parametrize("target", ["d", "implied", "implied/deep", "."])
def test_a_hard_link_to_a_directory_is_refused_when_it_is_imported(tmp_path: Path, target: str) -> None:
    with tarfile.open(tmp_path / "linked", "w") as tar:
        for name, kind in {
            "d": tarfile.DIRTYPE,
            "file": tarfile.REGTYPE,
            "implied/deep/f": tarfile.REGTYPE,
        }.items():
            entry = tarfile.TarInfo(name)
            entry.type = kind
            tar.addfile(entry)
        good, bad = tarfile.TarInfo("good"), tarfile.TarInfo("bad")
        good.type = bad.type = tarfile.LNKTYPE
        good.linkname, bad.linkname = "file", target
        tar.addfile(good)
        tar.addfile(bad)
    with pytest.raises(InputError, match=r"its member 'bad' is a hard link to .*, which is a directory"):
        check_root_archive(tmp_path / "linked", tmp_path / "linked")


def test_an_empty_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty", "w"):
        pass
    with pytest.raises(InputError, match="without files"):
        check_root_archive(tmp_path / "empty", tmp_path / "empty")


def test_an_unsafe_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil", "w") as tar:
        tar.addfile(tarfile.TarInfo("../../etc/passwd"), io.BytesIO())
    with pytest.raises(InputError, match="leads out of the tree"):
        check_root_archive(tmp_path / "evil", tmp_path / "evil")


OCI_LAYOUT = ("oci-layout", "index.json", "blobs/")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (OCI_LAYOUT, r"an OCI image layout \(oci-layout, index.json, blobs\)"),
        (("./oci-layout", "./blobs/"), "an OCI image layout"),
        (("manifest.json", "abc/"), "an image as `docker save` writes it"),
        (("manifest.json", "version", "abc"), "an image as skopeo writes it into a directory"),
    ],
)
def test_an_image_with_layers_is_recognised(make_tar: MakeTar, names: tuple[str, ...], kind: str) -> None:
    archive = make_tar(*((name, b"") for name in names if not name.endswith("/")), "blobs/x/")
    with pytest.raises(InputError, match=f"{kind}.*, expected the files of a root directory") as caught:
        check_root_archive(archive, archive)
    assert "firebuild images load" in str(caught.value.hint)


def test_a_root_directory_may_have_a_file_like_those_of_images(make_tar: MakeTar) -> None:
    archive = make_tar("etc/", ("manifest.json", b"{}"))
    check_root_archive(archive, archive)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"hsqs" + bytes(2000), "a SquashFS file system"),
        (b"QFI\xfb" + bytes(2000), "a qcow2 disk image"),
        (b"PK\x03\x04" + bytes(2000), "a zip archive"),
        (b"!<arch>\ndebian-binary   ", "a Debian package"),
        (b"070701" + bytes(2000), "a cpio archive"),
        (bytes(1080) + b"\x53\xef" + bytes(2000), "an ext2, ext3 or ext4 file system"),
        (bytes(510) + b"\x55\xaa" + bytes(2000), "a disk image with partitions"),
        (bytes(32769) + b"CD001" + bytes(20), "an ISO image"),
    ],
)
def test_what_people_take_for_an_archive_is_told_by_its_name(
    tmp_path: Path, content: bytes, kind: str
) -> None:
    (tmp_path / "it").write_bytes(content)
    with pytest.raises(InputError, match=f"it is {kind}, expected a directory or a tar archive") as caught:
        check_root_archive(tmp_path / "it", tmp_path / "it")
    assert caught.value.hint
