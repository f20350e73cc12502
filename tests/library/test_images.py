"""Images are configuration and layers; their forms are written when somebody asks for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from cli.library import Library
from firebuild_bootstrap import storing
from firebuild_bootstrap.dockerfile.graph import ImageRef
from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.events import ImageStored, PhaseStarted, StepStarted
from firebuild_bootstrap.image.forms import held_form, keep_form
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import Artifact, OutputSpec, OutputType
from firebuild_bootstrap.image.store import ImageRecord, StoredImage

pytestmark = pytest.mark.needs("userns", "debugfs")

TAR, DIR, EXT4 = (OutputSpec(kind) for kind in (OutputType.TAR, OutputType.DIR, OutputType.EXT4))
EPOCH = 1_700_000_000
HELLO = "FROM host\nCOPY source /source\nRUN cp /source /made && rm /bin/ls\n"


@pytest.fixture
def library(own_library: Library) -> Library:
    """Builds in a store of their own, which use the cache and ask for no output."""
    return own_library


def build(library: Library, text: str = HELLO, **options: object) -> StoredImage:
    library.events.clear()
    return library.build(text, **{"no_cache": False, "outputs": [], **options})


def names(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {name.removeprefix("./").removeprefix("usr/") for name in tar.getnames()}


def members(library: Library, image: StoredImage) -> set[str]:
    return names(library.home.form(image, TAR))


def test_a_build_stores_layers_and_no_form_and_links_its_base(library: Library) -> None:
    base = library.home.bases.resolve("host")
    image = build(library)
    assert sorted(os.listdir(image.directory)) == ["base.tar", "image.json", "provenance.json"]
    assert (image.directory / "base.tar").samefile(base.archive)
    [stored] = library.of(ImageStored)
    assert (stored.path, stored.size, stored.digest) == (str(image.location), image.record.size, "")
    assert image.record.size > base.size
    assert (image.record.outputs, image.record.base_digest) == ((), base.digest)
    document = json.loads((image.directory / "image.json").read_text())
    assert [sorted(layer) for layer in document["layers"]] == [
        ["archive", "digest", "size"],
        ["key", "size"],
        ["key", "size"],
    ]
    assert library.home.images.inspect(image.tag).record == image.record
    assert build(library).directory == image.directory


def test_a_store_on_several_file_systems_keeps_a_copy_of_the_base(library: Library) -> None:
    other = Path(tempfile.mkdtemp(prefix="firebuild-test-", dir="/dev/shm"))
    try:
        (library.home.root / "images").symlink_to(other)
        assert other.stat().st_dev != library.home.root.stat().st_dev
        image = build(library, "FROM host\n")
        kept = (image.directory / "base.tar").read_bytes()
        assert kept == library.home.bases.resolve("host").archive.read_bytes()
        shutil.rmtree(other)
        other.mkdir()
        with pytest.raises(MachineError, match=r"base\.tar could not be written"):
            storing._link(library.context / "none", other / "none" / "base.tar")
    finally:
        shutil.rmtree(other)


def test_a_form_is_written_once_and_again_where_a_machine_has_changed_it(library: Library) -> None:
    image = build(library)
    path = library.home.form(image, EXT4)
    assert path == image.location / "rootfs.ext4"
    written = path.stat()
    assert library.home.form(image, EXT4).stat() == written
    assert [output.type for output in library.home.images.inspect(image.tag).record.outputs] == ["ext4"]
    # A size of its own is another file, and who names none takes any.
    library.home.form(image, replace(EXT4, size=64 << 20))
    assert path.stat().st_size == 64 << 20
    sized = path.stat().st_ino
    assert library.home.form(image, EXT4, any_size=True).stat().st_ino == sized
    with open(path, "r+b") as file:
        file.write(b"booted")
    assert library.home.form(image, EXT4, any_size=True, changed=True).read_bytes().startswith(b"booted")
    assert not library.home.form(image, EXT4).read_bytes().startswith(b"booted")
    with pytest.raises(InputError, match="the files need size="):
        library.home.form(image, replace(EXT4, size=1 << 20))
    # What was killed while it wrote is removed by the next; a directory can't tell whether it was changed.
    (image.directory / "making-dead").mkdir()
    tree = library.home.form(image, DIR)
    (tree / "made").write_text("changed")
    assert (library.home.form(image, DIR, changed=True) / "made").read_text() == "changed"
    assert (library.home.form(image, DIR) / "made").read_text() == "one"
    found = {name for name in os.listdir(image.directory) if not name.endswith(".json")}
    assert found == {"base.tar", "forms.lock", "rootfs", "rootfs.ext4"}


def test_a_form_that_is_not_whole_is_not_taken_for_one(library: Library) -> None:
    image = build(library, "FROM scratch\nCOPY source /\n")
    path = library.home.form(image, TAR)
    whole = path.read_bytes()
    note = path.with_name("rootfs.tar.json")
    for spoiled in ("", "[]", "{}"):
        note.write_text(spoiled)
        path.write_bytes(b"half")
        assert library.home.images.inspect(image.tag).record.outputs == ()
        assert library.home.form(image, TAR).read_bytes() == whole
    path.unlink()
    assert library.home.images.inspect(image.tag).record.outputs == ()
    assert library.home.form(image, TAR).read_bytes() == whole
    nowhere = held_form(image.directory / "none", lambda: (), TAR, library.home.trees)
    with pytest.raises(MachineError, match="nothing can be written there"), nowhere:
        pass
    note.unlink()
    note.mkdir()
    with pytest.raises(MachineError, match="the form can't be stored: Is a directory"):
        library.home.form(image, TAR)
    with pytest.raises(MachineError, match=r"rootfs\.tar could not be stored: Is a directory"):
        keep_form(image.directory, Artifact(OutputType.TAR, "rootfs.tar", 1, ""))
    assert not list(image.directory.glob("making-*"))


@pytest.mark.parametrize("spec", [DIR, replace(EXT4, size=64 << 20)])
def test_a_form_that_somebody_copies_is_not_written_again_meanwhile(
    library: Library, spec: OutputSpec
) -> None:
    image = library.build("FROM host\nRUN echo one > /made\n", outputs=["ext4"])
    with ThreadPoolExecutor() as threads:
        with library.home.held_form(image, replace(spec, size=0)) as path:
            before = path.stat().st_ino
            other = threads.submit(library.home.form, image, spec)
            assert wait([other], 0.5).not_done
            assert path.stat().st_ino == before
        assert other.result(60).stat().st_ino != before


def test_a_form_is_written_by_one_whoever_asks_and_a_kill_leaves_none(library: Library) -> None:
    (library.context / "source").write_bytes(bytes(range(256)) * (1 << 17))
    image = build(library)
    library.home.layers.close()
    command = [sys.executable, "-c", "from firebuild_bootstrap.cli import main; main()"]
    command += ["images", "path", "t/built:1"]

    def asking(form: str = "ext4") -> subprocess.Popen[bytes]:
        environ = {**os.environ, "FIREBUILD_HOME": str(library.home.root)}
        return subprocess.Popen([*command, "-o", form], env=environ, stdout=subprocess.PIPE)

    killed = asking()
    while not list(image.directory.glob("making-*/rootfs.ext4")):
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    assert library.home.images.inspect(image.tag).record.outputs == ()
    several = [asking(), asking(), asking("tar")]
    ext4, same, tar = (each.communicate()[0].decode().strip() for each in several)
    assert [each.returncode for each in several] == [0, 0, 0]
    assert (ext4, tar) == (same, str(image.location / "rootfs.tar"))
    written = Path(ext4).stat()
    assert library.home.form(image, EXT4).stat() == written
    assert not list(image.directory.glob("making-*"))
    subprocess.run(["e2fsck", "-f", "-n", ext4], check=True, capture_output=True)


def test_forms_of_the_same_layers_are_kept_when_only_the_configuration_changes(library: Library) -> None:
    first = build(library, outputs=["ext4", "dir", "tar"])
    with open(first.directory / "rootfs.tar", "ab") as file:
        file.write(b"changed")
    second = build(library, HELLO + "LABEL a=b\n")
    assert second.directory != first.directory
    assert [output.type for output in second.record.outputs] == ["ext4"]
    build(library, HELLO + "RUN true\n")
    assert library.home.images.inspect(first.tag).record.outputs == ()


def test_an_image_holds_what_it_needs_whoever_removes_its_base_and_prunes(library: Library) -> None:
    image = build(library)
    build(library, HELLO.replace("cp", "cp -p"), tag="t/other:1")
    cache = library.home.cache
    library.home.layers.close()
    library.home.bases.close()
    library.home.bases.remove("host")
    library.home.images.remove(Reference.parse("t/other:1"))
    assert [(use.named, use.in_use) for use in cache.usage()].count((True, False)) == 3  # a base, two steps
    assert cache.prune(max_size=0, dry_run=True) == cache.prune(everything=True)
    assert len(cache.usage()) == 3
    assert cache.prune(everything=True) == []
    assert {"made", "source"} <= members(library, image)
    library.home.layers.close()
    # Its base can be unpacked again, should it be lost.
    library.home.layers.discard(image.record.base_digest)
    assert {"made", "source"} <= members(library, build(library, "FROM t/built:1\nRUN true\n", tag="t/x:1"))
    library.home.layers.close()
    library.home.images.close()
    for name in ("t/built:1", "t/x:1"):
        library.home.images.remove(Reference.parse(name))
    assert len(cache.prune(everything=True)) == 4
    assert library.home.layers.keys() == {}


def test_what_was_built_here_is_built_on_by_its_layers(library: Library) -> None:
    first = build(library)
    second = build(
        library,
        "FROM t/built:1\nRUN test ! -e /bin/ls\nCOPY --from=t/built:1 /made /copied\n"
        "COPY --from=named /source /again\nRUN --mount=from=named,target=/mnt cp /mnt/made /bound\n",
        tag="t/second:1",
        build_contexts={"named": ImageRef("t/built:1")},
    )
    assert first.record.layers is not None
    assert second.record.layers is not None
    assert second.record.layers[: len(first.record.layers)] == first.record.layers
    assert {"made", "copied", "again", "bound"} <= members(library, second)
    # It is cached like any base, and what was made of an older image of that name is not found.
    assert build(library, "FROM t/second:1\n", tag="t/third:1").record.layers == second.record.layers
    assert library.of(StepStarted) == []
    text = "FROM t/built:1\nRUN cat /source > /both\n"
    build(library, text, tag="t/fourth:1")
    build(library, text, tag="t/fourth:1")
    assert [event.phase for event in library.of(PhaseStarted)] == [1, 7]
    (library.context / "source").write_text("two")
    build(library)
    build(library, text, tag="t/fourth:1")
    assert [event.step for event in library.of(StepStarted)] == [1, 2]
    # A name that a base has, too, means the base.
    library.home.bases.create_from_host("t/built:1")
    assert "made" not in members(library, build(library, "FROM t/built:1\nRUN true\n", tag="t/fifth:1"))


def test_the_id_of_an_image_depends_on_its_configuration_and_its_files(library: Library) -> None:
    text = "FROM host\nWORKDIR /w\nCOPY source .\nRUN cp source made && rm /bin/ls && mkdir -p a/b\n"
    same = {
        library.home.image_id(build(library, text, tag=f"t/{name}:1", no_cache=True, epoch=EPOCH))
        for name in ("one", "two")
    }
    [identity] = same
    assert identity.startswith("sha256:")
    labelled = build(library, text + "LABEL a=b\n", tag="t/label:1", epoch=EPOCH)
    assert labelled.record.layers == library.home.images.inspect(Reference.parse("t/two:1")).record.layers
    (library.context / "source").write_text("two")
    other = build(library, text, tag="t/other:1", epoch=EPOCH)
    real = build(library, text, tag="t/real:1")
    identities = {library.home.image_id(image) for image in (labelled, other, real)} | same
    assert len(identities) == 4
    assert build(library, f"FROM t/one:1@{identity}\n", tag="t/by-id:1").record.base_digest
    with pytest.raises(InputError, match=f"the image t/one:1 has the digest {identity}, expected sha256:0"):
        build(library, f"FROM t/one:1@sha256:{'0' * 64}\n")


def times(image: StoredImage) -> set[str]:
    return {str(step["created"]) for step in image.record.history if "created" in step}


def test_an_image_that_is_built_again_from_the_cache_is_the_same_image(library: Library) -> None:
    text = "FROM scratch AS below\nLABEL a=b\nENV C=d\nFROM below\nCOPY source /\nUSER 7\n"
    image = build(library, text)
    identity = library.home.image_id(image)
    said = [(step["created_by"], step.get("empty_layer", False)) for step in image.record.history]
    assert said == [("LABEL a=b", True), ("ENV C=d", True), ("COPY source /", False), ("USER 7", True)]
    assert [step.get("created") for step in image.record.history] == [None, None, *[image.record.created] * 2]
    kept = image.directory / "configuration.json"
    for spoiled in ("", "{}", kept.read_text().replace("diff_ids", "others")):
        kept.write_text(spoiled)
        assert library.home.image_id(build(library, text, tag="t/other:1")) == identity
        assert library.home.image_id(build(library, text)) == identity
    # How it was made is a part of it, as in Docker.
    assert library.home.image_id(build(library, text + "USER 7\n")) != identity
    empty = build(library, "FROM scratch\nLABEL a=b\n")
    assert library.home.image_id(empty) == library.home.image_id(build(library, "FROM scratch\nLABEL a=b\n"))


def test_a_copy_of_nothing_has_no_layer_in_the_history_and_the_others_keep_theirs(library: Library) -> None:
    image = build(library, "FROM scratch\nCOPY none* /a/\nCOPY source /\nENV A=b\nCOPY --link none* /b/\n")
    said = [(step["created_by"], step.get("empty_layer", False)) for step in image.record.history]
    lines = [
        ("COPY none* /a/", True),
        ("COPY source /", False),
        ("ENV A=b", True),
        ("COPY --link none* /b/", True),
    ]
    assert said == lines


def test_no_time_of_an_image_is_later_than_source_date_epoch(library: Library) -> None:
    then = storing._time(EPOCH)
    assert then not in times(build(library))
    assert times(build(library, "FROM t/built:1\nLABEL a=b\n", tag="t/dated:1", epoch=EPOCH)) == {then}
    for late in ("2023-11-14T22:13:21Z", "2023-11-15T00:13:21+02:00", "9999-12-31T23:59:59.9", "yesterday"):
        assert storing._no_younger({"created": late, "a": "b"}, EPOCH) == {"created": then, "a": "b"}
    for kept in ({"created": "2023-11-14T22:13:20.000000001"}, {"created": "2020-01-01"}, {}):
        assert storing._no_younger(kept, EPOCH) == kept


def test_a_root_in_one_piece_is_an_image_too(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as where the machine is driven by a guest that knows no layers
        patch.setattr("firebuild_bootstrap.solve.results.Making.commit", lambda *_: None)
        image = build(library, HELLO, outputs=["ext4"])
        dated = build(library, HELLO, outputs=["ext4", "tar"], tag="t/dated:1", epoch=EPOCH)
        again = build(library, HELLO, tag="t/again:1", epoch=EPOCH)
    assert dated.record.layers == again.record.layers != image.record.layers
    with tarfile.open(dated.directory / "rootfs.tar") as tar:
        assert max(member.mtime for member in tar) <= EPOCH
    assert [output.type for output in image.record.outputs] == ["ext4", "tar"]
    assert image.record.layers is not None
    [layer] = image.record.layers
    assert (layer.archive, layer.digest) == ("rootfs.tar", image.record.outputs[1].digest)
    assert {"made", "source"} <= names(image.directory / "rootfs.tar")
    on_it = build(library, "FROM t/built:1\nRUN test ! -e /bin/ls && cp made again\n", tag="t/second:1")
    assert {"made", "again"} <= members(library, on_it)
    copied = build(library, "FROM scratch\nCOPY --from=t/built:1 /made /\n", tag="t/third:1")
    assert "made" in members(library, copied)
    assert library.home.image_id(image).startswith("sha256:")
    said = [(step["created_by"], step.get("empty_layer", False)) for step in image.record.history]
    lines = ["FROM host:latest", *HELLO.splitlines()[1:]]
    assert said == [*((line, True) for line in lines), ("firebuild", False)]
    with open(image.directory / "rootfs.tar", "ab") as file:
        file.write(b"changed")
    with pytest.raises(
        MachineError, match="was modified after it was stored, and the image is made of it"
    ) as caught:
        library.home.form(image, DIR)
    assert caught.value.hint == "build t/built:1 again"


def test_layers_that_are_out_of_reach_are_told_with_the_remedy(library: Library) -> None:
    image = build(library)
    record = image.directory / "image.json"
    text = record.read_text()
    record.write_text(text.replace(image.record.layer_store, "1-other"))
    elsewhere = library.home.images.inspect(image.tag)
    with pytest.raises(InputError, match="belong to the id mapping 1-other, and the one in use is") as caught:
        library.home.form(elsewhere, TAR)
    assert caught.value.hint is not None
    assert "machine.ids" in caught.value.hint
    with pytest.raises(InputError, match="belong to the id mapping 1-other"):
        build(library, "FROM t/built:1\n", tag="t/x:1")
    record.write_text(text)
    library.home.layers.close()
    library.home.layers.discard(image.record.layers[1].key if image.record.layers else "")
    with pytest.raises(MachineError, match="is not in the store"):
        library.home.image_id(image)
    # Archives are named, and no more than that.
    record.write_text(text.replace('"base.tar"', '"../base.tar"'))
    with pytest.raises(MachineError, match=r"is damaged: '../base.tar' is not the name of an archive"):
        library.home.images.inspect(image.tag)


def test_an_image_of_an_earlier_version_gives_what_it_has(library: Library) -> None:
    with library.home.images.stage() as staging:
        (staging.path / "rootfs.tar").write_bytes(b"tar")
        old = ImageRecord(
            tag="t/old:1",
            build_id="b",
            created="2025-01-01T00:00:00+00:00",
            firebuild_version="0",
            outputs=(Artifact(OutputType.TAR, "rootfs.tar", 3, f"sha256:{'0' * 64}"),),
        )
        image = library.home.images.commit(staging, old)
    assert "layers" not in json.loads((image.directory / "image.json").read_text())
    assert library.home.form(image, TAR).read_bytes() == b"tar"
    with library.home.held_form(image, TAR) as path:  # whoever takes its name away meanwhile
        assert path == image.directory / "rootfs.tar"
    assert library.home.images.layer_keys("any") == frozenset()
    with pytest.raises(
        InputError, match="t/old:1 is of an earlier version, which kept outputs and no layers"
    ):
        library.home.form(image, EXT4)
    assert build(library, tag="t/old:1").record.layers is not None
