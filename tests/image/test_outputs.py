from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.outputs import (
    Artifact,
    Compression,
    Deliveries,
    OutputSpec,
    OutputType,
    check_destinations,
    parse_output,
    parse_outputs,
)
from firebuild_bootstrap.image.trees import Trees

pytestmark = pytest.mark.needs("bwrap")


def deliver(source: Path, spec: OutputSpec, trees: Trees) -> None:
    with Deliveries(trees) as deliveries:
        deliveries.copy(source, spec)


def test_outputs_appear_together_or_not_at_all(tmp_path: Path, trees: Trees) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"new")
    dests = [tmp_path / name / "dest" for name in ("a", "b")]
    for dest in dests:
        dest.parent.mkdir()
        dest.write_bytes(b"old")
    for failing in (True, False):
        with suppress(InterruptedError), Deliveries(trees) as deliveries:
            for dest in dests:
                deliveries.copy(source, OutputSpec(OutputType.TAR, dest))
                assert dest.read_bytes() == b"old"
            if failing:
                raise InterruptedError
        assert [dest.read_bytes() for dest in dests] == [b"old" if failing else b"new"] * 2
        assert [os.listdir(dest.parent) for dest in dests] == [["dest"]] * 2


def test_an_output_is_a_type_with_a_destination_and_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_output("tar") == OutputSpec(OutputType.TAR)
    assert parse_output("ext4,dest=/x/y=z,size=2GiB") == OutputSpec(OutputType.EXT4, Path("/x/y=z"), 2**31)
    monkeypatch.chdir("/tmp")
    assert parse_output('tar,"dest=/x,""y"""').dest == Path('/x,"y"')
    assert parse_output("dir,dest=out").dest == Path("/tmp/out")


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("3k", 3072), ("64MiB", 2**26), ("1GB", 2**30)])
def test_sizes_have_units_of_1024(text: str, size: int) -> None:
    assert parse_output(f"ext4,size={text}").size == size


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the type ''"),
        ("ext3", "the type 'ext3'"),
        ("tar,", "found ''"),
        ("tar,dest=", "found 'dest='"),
        ("tar,path=/x", "found 'path=/x'"),
        ("tar,dest=/a,dest=/b", "found 'dest=/b'"),
        ("tar,size=5", "only ext4 has a size"),
        ("ext4,size=big", "found 'big'"),
        ("registry,dest=/x", "a registry has no dest"),
        ("tar,compression=zstd", "only oci, docker and registry have layers to compress"),
        ("oci,compression=estargz", "expected gzip, zstd, uncompressed, found 'estargz'"),
        ("oci,compression-level=10", "expected a number from 0 to 9 for gzip, found '10'"),
        ("oci,compression=zstd,compression-level=-1", "expected a number from 0 to 22 for zstd, found '-1'"),
        ("oci,compression=uncompressed,compression-level=1", "from 0 to 0 for uncompressed"),
        ("oci,force-compression=yes", "force-compression: expected true or false, found 'yes'"),
        ("oci,compression=zstd,compression=zstd", "found 'compression=zstd'"),
        ('tar,dest="a,b"', "double quote that is character 10 is within a member: put the whole member in"),
        ('tar,"dest=a', "the double quote that is character 5 has no end"),
        ('tar,"dest=a"b', "expected a comma after the double quote that is character 12"),
    ],
)
def test_a_wrong_output_is_named(text: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        parse_output(text)


def test_layers_are_compressed_as_buildkit_exporters_are_told() -> None:
    assert parse_output("oci").compression == Compression("gzip", 4)
    given = "docker,compression=zstd,compression-level=19,force-compression=true"
    assert parse_output(given).compression == Compression("zstd", 19, force=True)
    kinds = {"gzip": "+gzip", "zstd": "+zstd", "uncompressed": ""}
    assert {kind: parse_output(f"registry,compression={kind}").compression.suffix for kind in kinds} == kinds


def test_no_output_can_be_asked_for_twice() -> None:
    assert len(parse_outputs(["oci,dest=/a", "oci,dest=/b,compression=zstd"])) == 2
    assert len(parse_outputs(["tar", "dir"])) == 2
    with pytest.raises(InputError, match="--output tar is given twice"):
        parse_outputs(["tar", "tar,dest=/x"])
    with pytest.raises(InputError, match="--output dest=/x is given twice"):
        parse_outputs(["tar,dest=/x", "oci,dest=/x"])


def test_an_artifact_is_described_in_json() -> None:
    artifact = Artifact(OutputType.DIR, OutputType.DIR.file_name, 5, "sha256:0")
    assert artifact.as_json() == {"type": "dir", "path": "rootfs", "size": 5, "digest": "sha256:0"}


def test_destinations_that_can_not_work_are_refused_before_the_build(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    good = [
        OutputSpec(OutputType.DIR, tmp_path / "empty"),
        OutputSpec(OutputType.TAR, tmp_path / "full/x"),
        OutputSpec(OutputType.EXT4),
    ]
    check_destinations(good)
    bad = {
        OutputSpec(OutputType.TAR, tmp_path / "no/where"): "is not a directory",
        OutputSpec(OutputType.TAR, tmp_path / "empty"): "it is a directory",
        OutputSpec(OutputType.DIR, tmp_path / "full"): "expected a new or empty directory",
        OutputSpec(OutputType.DIR, tmp_path / "full/x"): "expected a new or empty directory",
        OutputSpec(OutputType.DIR, tmp_path / "link"): "expected a new or empty directory",
    }
    for spec, message in bad.items():
        with pytest.raises(InputError, match=message):
            check_destinations([spec])


def test_a_file_is_copied_with_its_holes_and_replaces_an_older_one(tmp_path: Path, trees: Trees) -> None:
    source, dest = tmp_path / "source", tmp_path / "out/dest"
    dest.parent.mkdir()
    dest.write_text("old")
    with open(source, "wb") as writer:
        writer.seek(5 * 2**20)
        writer.write(b"middle" * 1000)
        writer.truncate(50 * 2**20)
    deliver(source, OutputSpec(OutputType.EXT4, dest), trees)
    assert dest.read_bytes() == source.read_bytes()
    assert dest.stat().st_blocks <= source.stat().st_blocks + 16
    assert os.listdir(dest.parent) == ["dest"]
    deliver(source, OutputSpec(OutputType.EXT4), trees)  # no destination, nothing to do


def test_a_failed_copy_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, trees: Trees, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, dest = tmp_path / "source", tmp_path / "out/dest"
    dest.parent.mkdir()
    dest.write_text("old")
    source.write_bytes(b"x" * 100)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(MachineError, match="dest could not be written: No space left"):
        deliver(source, OutputSpec(OutputType.TAR, dest), trees)
    assert dest.read_text() == "old"
    assert os.listdir(dest.parent) == ["dest"]


def test_an_unreadable_hole_map_is_an_error(
    tmp_path: Path, trees: Trees, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(b"x")

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lseek", broken)
    with pytest.raises(MachineError, match="Input/output error"):
        deliver(tmp_path / "source", OutputSpec(OutputType.TAR, tmp_path / "dest"), trees)


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_is_filled_at_once_with_everything(
    rich_tree: Path, tmp_path: Path, trees: Trees, exists: bool
) -> None:
    dest = tmp_path / "out/dest"
    (dest if exists else dest.parent).mkdir(parents=True)
    deliver(rich_tree, OutputSpec(OutputType.DIR, dest), trees)
    assert trees.summary(dest, times=True) == trees.summary(rich_tree, times=True)
    assert os.listdir(dest.parent) == ["dest"]
