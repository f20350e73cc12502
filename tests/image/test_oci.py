"""Manifests, indexes and configurations: read strictly, and written in one form."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.blobs import BlobError, digest_of
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.oci import (
    CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    INDEX,
    LAYER,
    MANIFEST,
    MAX_DOCUMENT,
    Descriptor,
    ImageDocument,
    Index,
    Manifest,
    parse_config,
    parse_manifest,
)
from firebuild_bootstrap.image.platforms import Platform

AMD64 = Platform("linux", "amd64")


def blob(name: str, media_type: str = LAYER, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(name.encode()), "size": len(name), **more}


def manifest(**changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": blob("config", CONFIG),
        "layers": [blob("one"), blob("two", f"{LAYER}+gzip")],
    }
    return json.dumps(document | changes).encode()


def index(*platforms: str, **changes: Any) -> bytes:
    entries = []
    for text in platforms:
        names = ("os", "architecture", "variant")
        platform = dict(zip(names, text.split("/"), strict=False))
        entries.append(blob(text, MANIFEST, platform=platform))
    return json.dumps({"schemaVersion": 2, "manifests": entries} | changes).encode()


def test_what_is_written_is_read_again() -> None:
    config = ImageConfig(env={"A": "b"}, cmd=("run",), labels={"x": "y"}, author="me")
    document = ImageDocument.made_of(
        Platform("linux", "arm", "v7"),
        config,
        [digest_of(b"layer")],
        history=[{"created_by": "RUN x"}, {"created_by": "ENV A=b", "empty_layer": True}],
        created="2026-01-01T00:00:00Z",
    )
    assert parse_config(document.data) == document
    named = Descriptor(CONFIG, document.digest, len(document.data))
    assert named.check(document.data) == document.data
    written = Manifest.made_of(named, [Descriptor(LAYER, digest_of(b"x"), 1, annotations={"a": "b"})])
    assert parse_manifest(written.data) == written
    assert written.descriptor.digest == digest_of(written.data)
    assert [each.digest for each in written.blobs] == [document.digest, digest_of(b"x")]


def test_the_same_parts_give_the_same_bytes() -> None:
    one = ImageDocument.made_of(AMD64, ImageConfig(labels={"a": "1", "b": "2"}), [])
    other = ImageDocument.made_of(AMD64, ImageConfig(labels={"b": "2", "a": "1"}), [])
    assert one.data == other.data


def test_documents_of_docker_are_read() -> None:
    document = manifest(mediaType=DOCKER_MANIFEST)
    found = parse_manifest(document, DOCKER_MANIFEST)
    assert isinstance(found, Manifest)
    assert found.media_type == DOCKER_MANIFEST
    listed = parse_manifest(index("linux/amd64", mediaType=DOCKER_LIST))
    assert isinstance(listed, Index)
    assert listed.digest == digest_of(listed.data)
    assert isinstance(parse_manifest(manifest(mediaType=None)), Manifest)


@pytest.mark.parametrize(
    ("wanted", "there", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/386"], "linux/386"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], "linux/amd64/v2"),
        ("linux/x86_64", ["linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm64/v8"], "linux/arm/v6"),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], "linux/arm/v5"),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm64", ["linux/arm/v7", "linux/arm/v8"], "linux/arm/v8"),
        ("linux/arm64/v9", ["linux/arm64"], "linux/arm64"),
        ("linux/amd64", ["unknown/unknown", "linux/amd64"], "linux/amd64"),
    ],
)
def test_a_platform_is_chosen_as_containerd_does(wanted: str, there: list[str], chosen: str) -> None:
    found = parse_manifest(index(*there))
    assert isinstance(found, Index)
    assert found.choose(Platform.parse(wanted)).digest == digest_of(chosen.encode())


def test_the_only_image_without_a_platform_is_taken() -> None:
    found = parse_manifest(json.dumps({"manifests": [blob("it", MANIFEST)]}).encode())
    assert isinstance(found, Index)
    assert found.choose(AMD64).digest == digest_of(b"it")


def test_artifacts_and_empty_platforms_stand_in_no_way() -> None:
    empty = {"platform": {"os": "", "architecture": ""}, "artifactType": CONFIG}
    entries = [blob("sbom", MANIFEST) | {"artifactType": "text/sbom"}, blob("it", MANIFEST) | empty]
    found = parse_manifest(json.dumps({"manifests": entries}).encode())
    assert isinstance(found, Index)
    assert found.choose(AMD64).digest == digest_of(b"it")
    assert found.manifests[0].as_json() == entries[0]


def test_several_images_without_a_platform_are_told() -> None:
    found = parse_manifest(json.dumps({"manifests": [blob(one, MANIFEST) for one in "ab"]}).encode())
    assert isinstance(found, Index)
    with pytest.raises(InputError, match="there are 2 images under one name, none of which says its platf"):
        found.choose(AMD64)


def test_an_image_that_is_listed_twice_is_one() -> None:
    found = parse_manifest(json.dumps({"manifests": [blob("it", MANIFEST)] * 2}).encode())
    assert isinstance(found, Index)
    assert found.choose(AMD64).digest == digest_of(b"it")


def test_what_an_index_has_instead_of_images_is_told() -> None:
    old = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    found = parse_manifest(json.dumps({"manifests": [blob("it", old)]}).encode())
    assert isinstance(found, Index)
    with pytest.raises(InputError, match="no image for linux/amd64") as caught:
        found.choose(AMD64)
    assert caught.value.hint == f"it has none for any platform; not read is what is of the type {old}"


@pytest.mark.parametrize(
    ("there", "hint"),
    [(["linux/s390x", "windows/amd64"], "linux/s390x, windows/amd64"), (["unknown/unknown"], "none for any")],
)
def test_a_missing_platform_is_told_with_those_there_are(there: list[str], hint: str) -> None:
    found = parse_manifest(index(*there))
    assert isinstance(found, Index)
    with pytest.raises(InputError, match="no image for linux/amd64") as caught:
        found.choose(AMD64)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff{}", "is not JSON"),
        (b"[]", "expected an object"),
        (b" " * (MAX_DOCUMENT + 1), "larger than 4 MiB"),
        (b'{"schemaVersion":1,"fsLayers":[]}', "schema 1"),
        (manifest(manifests=[]), "an index as well"),
        (manifest(mediaType=INDEX, layers=None), "expected a list|expected an object|no image"),
        (manifest(config=None), "config: expected an object"),
        (
            manifest(config=blob("c", "application/vnd.cncf.helm.config.v1+json")),
            "is not an image but an artifact",
        ),
        (manifest(layers="x"), "layers: expected a list"),
        (manifest(layers=[blob("x")] * 1025), "a list of at most 1024"),
        (manifest(layers=[blob("x", "text/plain")]), "unknown type 'text/plain'"),
        (manifest(layers=[blob("x", digest="sha256:x")]), r"layers\[0\]: expected a sha256 or sha512"),
        (manifest(layers=[blob("x", size=-1)]), r"layers\[0\]: size: expected a number"),
        (manifest(layers=[blob("x", size=True)]), "size: expected a number"),
        (manifest(layers=[blob("x", annotations={"a": 1})]), "annotations: a: expected a text"),
        (index("linux"), "architecture: expected a text"),
    ],
)
def test_what_is_no_manifest_is_refused(document: bytes, said: str) -> None:
    if b"index.v1" in document:
        parsed = parse_manifest(document.replace(b'"config"', b'"other"'))
        assert isinstance(parsed, Index)
        assert parsed.manifests == ()
        return
    with pytest.raises(InputError, match=said):
        parse_manifest(document)


@pytest.mark.parametrize(
    ("count", "refused"), [(1024, nullcontext()), (1025, pytest.raises(InputError, match="at most 1024"))]
)
def test_no_list_has_more_than_1024_members(count: int, refused: AbstractContextManager[object]) -> None:
    digests = {"type": "layers", "diff_ids": [digest_of(b"x")] * count}
    config = {"os": "linux", "architecture": "amd64", "rootfs": digests}
    with refused:
        parse_manifest(manifest(layers=[blob("x")] * count))
    with refused:
        parse_manifest(index(*["linux/amd64"] * count))
    with refused:
        parse_config(json.dumps(config).encode())


def test_the_type_that_a_registry_says_has_to_fit() -> None:
    with pytest.raises(InputError, match="an index as well"):
        parse_manifest(manifest(), INDEX)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rootfs": None}, "rootfs: expected an object, found None"),
        ({"rootfs": {"diff_ids": "x"}}, "diff_ids: expected at most"),
        ({"rootfs": {"diff_ids": ["x"]}}, "rootfs.diff_ids: expected a sha256 digest, found 'x'"),
        ({"rootfs": {"diff_ids": [f"sha512:{'a' * 128}"]}}, "expected a sha256 digest, found 'sha512:"),
        ({"architecture": ""}, "architecture: expected a text, found an empty one"),
        ({"os": 5}, "os: expected a text"),
        ({"history": [1]}, r"history\[0\]: expected an object"),
        ({"config": {"Env": [1]}}, "Env of the image configuration"),
    ],
)
def test_what_is_no_configuration_is_refused(changes: dict[str, Any], said: str) -> None:
    document = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": None}}
    assert parse_config(json.dumps(document).encode()).diff_ids == ()
    with pytest.raises(InputError, match=said):
        parse_config(json.dumps(document | changes).encode())


def test_other_bytes_than_those_described_are_refused() -> None:
    described = Descriptor(LAYER, digest_of(b"right"), 5)
    for wrong in (b"wrong", b"right and more"):
        with pytest.raises(BlobError, match="expected 5 bytes with the digest"):
            described.check(wrong)


@pytest.mark.parametrize("text", ["linux", "linux/", "a/b/c/d"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a platform"):
        Platform.parse(text)


def test_the_host_is_a_platform() -> None:
    assert Platform.host("x86_64") == AMD64
    assert str(Platform.host("armv7l")) == "linux/arm/v7"
    assert Platform.host().os == "linux"


def test_a_size_that_is_no_number_is_refused() -> None:
    document = json.loads(manifest())
    document["config"]["size"] = "many"
    with pytest.raises(InputError, match="size: expected a number of bytes, found 'many'"):
        parse_manifest(json.dumps(document).encode())
