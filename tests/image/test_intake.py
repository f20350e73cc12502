"""Images from outside become layers that builds start from, or are refused and leave nothing behind."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import zstandard

from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image import layouts as reading
from firebuild_bootstrap.image.intake import Loaded
from firebuild_bootstrap.image.layertrees import StoredLayer
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import LAYER, MAX_DOCUMENT
from firebuild_bootstrap.image.platforms import Platform
from image.layouts import Made, blob_path, described, layer, packed, written

pytestmark = pytest.mark.needs("bwrap")

BOTTOM = layer({"etc/": None, "etc/one": "1", "etc/two": "2", "dir/": None, "dir/a": "a", "dir/b": "b"})
TOP = layer({"etc/.wh.one": "", "etc/three": "3", "dir/.wh..wh..opq": "", "dir/c": "c"})
GOOD = Made([BOTTOM, TOP], {"Env": ["A=b"], "Cmd": ["run"], "StopTimeout": 7})
ONE = Made([BOTTOM])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    (tmp_path / "home").mkdir()
    home = Home(tmp_path / "home")
    yield home
    home.close()


def load(home: Home, source: Path, name: str = "") -> Loaded:
    return home.intake.load(source, home.root, name=Reference.parse(name) if name else None)


def files_of(home: Home, name: str, tmp_path: Path) -> dict[str, str]:
    """Return the files of an image with their content."""
    image = home.images.inspect(Reference.parse(name))
    tree = home.layers.merged(image.layers(home.layers.root.name))
    archive = tmp_path / "files.tar"
    archive.unlink(missing_ok=True)
    home.trees.pack(tree, archive)
    with tarfile.open(archive) as opened:
        members = [member for member in opened if member.isfile()]
        return {each.name: opened.extractfile(each).read().decode() for each in members}  # type: ignore[union-attr]


def kept(home: Home) -> set[str]:
    """Return what there is of images in a store, but for empty directories."""
    home.close()
    home.blobs.sweep()
    home.cache.prune(everything=True)
    names = {str(name) for name in home.images.names()} | set(home.blobs.digests()) | set(home.layers.keys())
    return names | {path.name for path in home.root.glob("**/staging/*")}


MERGED = {"etc/two": "2", "etc/three": "3", "dir/c": "c"}


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (lambda path: written(GOOD.layout(), path), "OCI image layout"),
        (lambda path: packed(GOOD.layout(), path), "OCI image layout"),
        (lambda path: packed(GOOD.docker(), path), "docker archive"),
        (lambda path: written(GOOD.docker(), path), "docker archive"),
    ],
)
def test_an_image_in_any_form_is_the_same_image(
    home: Home, tmp_path: Path, write: Callable[[Path], Path], kind: str
) -> None:
    loaded = load(home, write(tmp_path / "image"))
    assert loaded.kind == kind
    (image,) = loaded.images
    assert str(image.tag) == "made:1"
    assert home.image_id(image) == described(GOOD.config_data, "")["digest"]
    assert files_of(home, "made:1", tmp_path) == MERGED
    assert image.record.config.env == {"A": "b"}
    assert image.record.config.others == {"StopTimeout": 7}
    base = home.bases.resolve("made:1")
    assert all(isinstance(each, StoredLayer) for each in base.layers)
    keys = [each.key for each in base.layers if isinstance(each, StoredLayer)]
    assert [home.layers.hold(key) is not None for key in keys] == [True, True]


@pytest.mark.parametrize(
    ("compress", "kind"),
    [
        (zstandard.compress, "+zstd"),
        (lzma.compress, ""),
        (partial(gzip.compress, mtime=0), "+gzip"),
        (lambda data: data, ""),
    ],
)
def test_layers_may_be_compressed_in_every_way_and_their_media_types_say_how(
    home: Home, tmp_path: Path, compress: Callable[[bytes], bytes], kind: str
) -> None:
    files = GOOD.docker()
    for path in ("layer0/layer.tar", "layer1/layer.tar"):
        files[path] = compress(files[path])
    archive = tmp_path / "image.tar"
    archive.write_bytes(compress(layer(files)))
    (image,) = load(home, archive).images
    assert files_of(home, "made:1", tmp_path) == MERGED
    blobs = [each.outside.blob for each in image.record.layers or () if each.outside]
    assert [blob.media_type for blob in blobs] == [f"{LAYER}{kind}"] * 2
    # What has no media type becomes an archive without compression.
    kept = BOTTOM if compress is lzma.compress else compress(BOTTOM)
    assert home.blobs.required(blobs[0].digest).read_bytes() == kept


def test_layers_of_no_bytes_and_variables_without_values_are_taken(home: Home, tmp_path: Path) -> None:
    made = Made([BOTTOM, b"", TOP], {"Env": ["PLAIN"]})
    (image,) = load(home, packed(made.docker(), tmp_path / "image.tar")).images
    assert files_of(home, "made:1", tmp_path) == MERGED
    assert image.record.config.env == {"PLAIN": ""}


def test_a_link_to_a_layer_in_the_archive_is_followed_there(home: Home, tmp_path: Path) -> None:
    files = GOOD.docker()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, data in files.items():
            info = tarfile.TarInfo(path if path != "layer1/layer.tar" else "elsewhere.tar")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("layer1/layer.tar")
        info.type, info.linkname = tarfile.SYMTYPE, "../elsewhere.tar"
        archive.addfile(info)
    (tmp_path / "image.tar").write_bytes(out.getvalue())
    load(home, tmp_path / "image.tar")
    assert files_of(home, "made:1", tmp_path) == MERGED


@pytest.mark.parametrize("size", [1, 3_000, 200_000, (1 << 20) + 1])
def test_what_was_decompressed_is_there_to_its_last_byte(tmp_path: Path, size: int) -> None:
    member, content = tarfile.TarInfo("file"), os.urandom(size)
    member.size = size
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(gzip.compress(member.tobuf() + content + bytes(-size % tarfile.BLOCKSIZE)))
    with reading.opened(archive, tmp_path) as (files, _), files.open("file") as file:
        assert file.read() == content


def test_a_platform_is_chosen_from_indexes_in_the_layout(home: Home, tmp_path: Path) -> None:
    other = Made([layer({"no": "no"})], platform="linux/s390x")
    here = Made([BOTTOM], platform=str(Platform.host()))
    entries = []
    files = other.layout() | here.layout()
    for made in (other, here):
        manifest = json.dumps(made.manifest).encode()
        system, architecture = made.platform.split("/")
        platform = {"os": system, "architecture": architecture}
        entries.append(
            described(manifest, "application/vnd.oci.image.manifest.v1+json") | {"platform": platform}
        )
    nested = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    files[blob_path(nested)] = nested
    entry = described(nested, "application/vnd.oci.image.index.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "docker.io/acme/web:2"}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    (image,) = load(home, packed(files, tmp_path / "image.tar")).images
    assert str(image.tag) == "acme/web:2"
    assert home.bases.resolve(f"acme/web@{entry['digest']}").name == "acme/web:2"
    with pytest.raises(InputError, match="the image is for linux/s390x, and this machine is"):
        load(home, packed(other.layout(), tmp_path / "other.tar"))


def test_several_images_share_what_they_have_in_common(home: Home, tmp_path: Path) -> None:
    second = Made([BOTTOM], name="second:1")
    entries = [*json.loads(GOOD.docker()["manifest.json"]), *json.loads(second.docker()["manifest.json"])]
    entries[1]["Config"] = "second.json"
    files = GOOD.docker() | {"second.json": second.config_data, "manifest.json": json.dumps(entries).encode()}
    source = packed(files, tmp_path / "image.tar")
    loaded = load(home, source)
    assert [str(image.tag) for image in loaded.images] == ["made:1", "second:1"]
    assert len(home.layers.keys()) == 2
    with pytest.raises(InputError, match="has 2 images, and one name is given"):
        load(home, source, "name")


def test_an_image_needs_a_name(home: Home, tmp_path: Path) -> None:
    source = packed(GOOD.layout(**{"org.opencontainers.image.ref.name": "latest"}), tmp_path / "image.tar")
    with pytest.raises(InputError, match="an image without a name"):
        load(home, source)
    (image,) = load(home, source, "given:2").images
    assert str(image.tag) == "given:2"
    (again,) = load(home, source, "given:2").images
    assert again.directory == image.directory


def tagged(images: dict[str, Made]) -> dict[str, bytes]:
    """Return the files of a layout in which images have tags, but no names."""
    files, entries = dict[str, bytes](), []
    for tag, made in images.items():
        found = made.layout(**{"org.opencontainers.image.ref.name": tag})
        entries += json.loads(found["index.json"])["manifests"]
        files |= found
    return files | {"index.json": json.dumps({"schemaVersion": 2, "manifests": entries}).encode()}


def test_images_that_have_nothing_but_tags_are_told_with_these(home: Home, tmp_path: Path) -> None:
    source = packed(tagged({"v1": GOOD, "v2": ONE}), tmp_path / "image.tar")
    for name in ("", "given:1"):
        with pytest.raises(InputError, match=r"has 2 images, and .* no whole name: v1, v2") as caught:
            load(home, source, name)
        assert "skopeo copy oci:DIRECTORY:TAG" in str(caught.value.hint)
    assert kept(home) == set()


def test_one_image_of_a_layout_is_taken_whatever_else_is_there(home: Home, tmp_path: Path) -> None:
    files = tagged({"v1": ONE, "other": Made([layer({"no": "no"})], platform="linux/s390x")})
    index = json.loads(files["index.json"])
    index["manifests"][1]["platform"] = {"os": "linux", "architecture": "s390x"}
    source = packed(files | {"index.json": json.dumps(index).encode()}, tmp_path / "image.tar")
    digest = described(json.dumps(ONE.manifest).encode(), "")["digest"]
    for only in ("v1", digest):
        assert len(home.intake.load(source, home.root, only=only).images) == 1
    for only, said in (
        ("other", "other: there is no image for linux/"),
        ("", "other: there is no image for linux/"),
        ("none", "has 0 images called none"),
    ):
        with pytest.raises(InputError, match=said):
            home.intake.load(source, home.root, only=only)


def test_artifacts_beside_an_image_are_left_out_and_what_is_wrong_is_named(
    home: Home, tmp_path: Path
) -> None:
    files = GOOD.layout()
    (entry,) = json.loads(files["index.json"])["manifests"]
    sbom = entry | {"annotations": {}, "artifactType": "application/vnd.cyclonedx+json"}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry, sbom]}).encode()
    (image,) = load(home, packed(files, tmp_path / "image.tar")).images
    assert str(image.tag) == "made:1"
    entry["platform"] = {"os": "linux", "architecture": "s390x"}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with pytest.raises(InputError, match=r"/other\.tar: made:1: there is no image for linux/"):
        load(home, packed(files, tmp_path / "other.tar"))


def test_a_root_file_system_is_handed_on(home: Home, tmp_path: Path) -> None:
    found: list[tuple[bool, str]] = []
    sources = (
        packed({"bin/sh": b"", "manifest.json": b"[]"}, tmp_path / "root.tar"),
        written({"etc/passwd": b"", "oci-layout": b""}, tmp_path / "root"),
    )
    for source in sources:
        loaded = home.intake.load(
            source, home.root, root=lambda path, called: found.append((path.exists(), called))
        )
        assert loaded == Loaded("")
    assert found == [(True, str(source)) for source in sources]


def test_layers_that_a_power_failure_has_taken_are_unpacked_again(home: Home, tmp_path: Path) -> None:
    load(home, packed(GOOD.docker(), tmp_path / "image.tar"))
    home.close()
    for key in list(home.layers.keys()):
        home.layers.discard(key)
    home.bases.resolve("made:1")
    assert files_of(home, "made:1", tmp_path) == MERGED
    home.close()
    for key in list(home.layers.keys()):
        home.layers.discard(key)
    home.blobs.path(described(TOP, "")["digest"]).unlink()
    with pytest.raises(MachineError, match="the blob is not there"):
        home.bases.resolve("made:1")


def test_what_an_image_needs_stays_and_goes_with_it(home: Home, tmp_path: Path) -> None:
    load(home, packed(GOOD.layout(), tmp_path / "image.tar"))
    assert len(kept(home)) == 1 + 4 + 2  # its name, its blobs, its layers
    home.images.remove(Reference.parse("made:1"))
    assert kept(home) == set()


def broken(path: str, data: bytes | None, source: Made = GOOD) -> dict[str, bytes]:
    """Return the layout of `source` with one file changed, or without it."""
    files = source.layout()
    if data is None:
        del files[path]
    else:
        files[path] = data
    return files


BLOB = blob_path(GOOD.blobs[1])
HOSTILE = {
    "a layer with other bytes": (broken(BLOB, GOOD.blobs[1][:-1] + b"x"), "expected a blob with the digest"),
    "a layer that is too short": (broken(BLOB, GOOD.blobs[1][:-1]), "bytes, and .* were announced"),
    "a layer that is missing": (broken(BLOB, None), "is not a file in the archive"),
    "another configuration": (
        broken(blob_path(GOOD.config_data), b"{}"),
        "with the digest sha256:.*, found 2",
    ),
    "another manifest": (broken(blob_path(json.dumps(GOOD.manifest).encode()), b"{}"), "found 2 with"),
    "an index of 100 MB": (
        broken("index.json", b" " * (MAX_DOCUMENT + 1)),
        "index.json is larger than 4 MiB",
    ),
    "no version": (broken("oci-layout", b"{}"), "expected imageLayoutVersion 1.0.0"),
    "no JSON": (broken("oci-layout", b"["), "oci-layout is damaged"),
    "a manifest for an index": (broken("index.json", json.dumps(GOOD.manifest).encode()), "an index as well"),
    "no image": (broken("index.json", b'{"manifests": []}'), "there is no image in it"),
    "other diff ids": (
        Made([BOTTOM], document={"rootfs": {"diff_ids": [described(TOP, "")["digest"]]}}).layout(),
        "unpacks to an archive with the digest",
    ),
    "too few diff ids": (
        Made([BOTTOM], document={"rootfs": {"diff_ids": []}}).layout(),
        "has 1 layer, and its configuration 0",
    ),
    "a file outside": (Made([layer({"../../escaped": "x"})]).layout(), "can't be unpacked: .*leads out"),
    "a hard link outside": (
        Made([layer({}, links={"x": "../../../etc/passwd"})]).layout(),
        "can't be unpacked: .*leads out",
    ),
    "a layer that is no archive": (Made([b"text" * 200]).layout(), "can't be unpacked: .*is damaged"),
    "a bomb": (Made([bytes(3 << 20)]).layout(), "more than 0 MiB come out of"),
    "a docker path that leads out": (
        {"manifest.json": b'[{"Config": "../../etc/passwd", "Layers": []}]'},
        "expected the path of a file in the archive",
    ),
    "a docker archive of texts": ({"manifest.json": b'["x"]'}, "expected an object for each image"),
    "a directory of skopeo": (
        {"manifest.json": b'{"schemaVersion": 2}'},
        r"as skopeo and podman write it into a dir",
    ),
    "a docker archive of no list": ({"manifest.json": b"{}"}, "expected a list of at most 1024 images"),
    "layers that are no list": (
        ONE.docker() | {"manifest.json": b'[{"Config": "config.json", "Layers": {}}]'},
        "Layers: expected a list",
    ),
    "a name that is none": (
        ONE.docker() | {"manifest.json": b'[{"Config": "config.json", "RepoTags": ["A B"], "Layers": []}]'},
        "expected the name of an image",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_and_leaves_nothing(
    home: Home, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, said = HOSTILE[name]
    if name == "a bomb":
        monkeypatch.setattr(reading, "_FREE", 1000)
    with pytest.raises(InputError, match=f"(?s){said}"):
        load(home, packed(files, tmp_path / "image.tar"))
    assert kept(home) == set()
    assert not (tmp_path / "escaped").exists()


def test_names_that_come_twice_are_refused(home: Home, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, data in [*GOOD.layout().items(), ("index.json", b"{}")]:
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "image.tar").write_bytes(out.getvalue())
    with pytest.raises(InputError, match=r"index\.json is in the archive twice"):
        load(home, tmp_path / "image.tar")


def test_links_and_pipes_in_a_layout_are_not_followed(home: Home, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(GOOD.blobs[1])
    source = written(GOOD.layout(), tmp_path / "layout")
    (source / BLOB).unlink()
    (source / BLOB).symlink_to(secret)
    with pytest.raises(InputError, match="can't be read: Too many levels"):
        load(home, source)
    (source / BLOB).unlink()
    os.mkfifo(source / BLOB)
    with pytest.raises(InputError, match="is not a regular file"):
        load(home, source)
    source = written(GOOD.layout(), tmp_path / "linked")
    (source / "blobs").rename(tmp_path / "elsewhere")
    (source / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="can't be read"):
        load(home, source)


def test_an_image_of_too_many_layers_is_refused_at_once(home: Home, tmp_path: Path) -> None:
    empty = layer({})
    with pytest.raises(InputError, match="layers: expected a list of at most 1024"):
        load(home, packed(Made([empty] * 1025).layout(), tmp_path / "image.tar"))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["x"] * 1025, "expected a list of at most 1024 images"),
        ([{"Config": "config.json", "Layers": ["layer0/layer.tar"] * 1025}], "Layers: expected a list of"),
        ([{"Config": "config.json", "Layers": [], "RepoTags": ["a"] * 1025}], "RepoTags: expected a list of"),
    ],
)
def test_no_list_of_a_docker_archive_has_more_than_1024_members(
    home: Home, tmp_path: Path, entries: list[object], said: str
) -> None:
    files = ONE.docker() | {"manifest.json": json.dumps(entries).encode()}
    with pytest.raises(InputError, match=said):
        load(home, packed(files, tmp_path / "image.tar"))


def test_an_error_about_a_layer_names_no_file_of_the_store(home: Home, tmp_path: Path) -> None:
    archive = packed(Made([b"text" * 200]).layout(), tmp_path / "image.tar")
    with pytest.raises(InputError) as caught:
        load(home, archive)
    message = caught.value.message.removeprefix(f"{archive}: ")
    assert re.fullmatch(r"the layer sha256:\w+ can't be unpacked: the archive [^/]+", message)


def test_indexes_in_indexes_end_somewhere(home: Home, tmp_path: Path) -> None:
    files, inner = GOOD.layout(), json.dumps(GOOD.manifest).encode()
    kind = "application/vnd.oci.image.manifest.v1+json"
    for _ in range(4):
        index = json.dumps({"manifests": [described(inner, kind)]}).encode()
        files[blob_path(index)] = inner = index
        kind = "application/vnd.oci.image.index.v1+json"
    files["index.json"] = inner
    with pytest.raises(InputError, match="more than 3 indexes in indexes"):
        load(home, packed(files, tmp_path / "image.tar"))


def test_a_source_that_is_not_there_or_damaged_is_told(home: Home, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read: No such file"):
        load(home, tmp_path / "missing")
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(layer(GOOD.docker()))[:-100])
    with pytest.raises(FirebuildError, match="is damaged"):
        load(home, tmp_path / "cut.tar.gz")


def test_a_disk_without_room_for_what_is_decompressed_is_named(tmp_path: Path) -> None:
    (tmp_path / "layer.gz").write_bytes(gzip.compress(bytes(100_000)))
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(MachineError, match=r"^/store/new: an archive can't be unpacked: No space") as told,
    ):
        reading.decompress_bounded(tmp_path / "layer.gz", full, Path("/store/new"))
    assert told.value.hint == "free some space there"
