"""Debian's registry with TLS and a login, and skopeo: what it pushes we pull, and the other way round."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.events import TaskFinished, TaskStarted
from firebuild_bootstrap.image.attestations import PROVENANCE, SBOM, attested, statement
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import DOCKER_MANIFEST, MANIFEST, Manifest, parse_manifest
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.client import Repository
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.registry.push import Upload, push
from registry.conftest import LOGIN, Client
from registry.servers import CA, PASSWORD, USER, Image, debian_registry, digest

Skopeo = Callable[..., str]
pytestmark = [pytest.mark.needs("docker-registry"), pytest.mark.xdist_group("docker-registry")]

EMPTY_TAR = bytes(10240)
IMAGE = Image((b"first layer " * 400_000, b"second layer"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, ca: CA) -> Iterator[str]:
    with debian_registry(tmp_path_factory.mktemp("registry"), ca) as host:
        yield host


@pytest.fixture
def registries(client: Client, host: str) -> Registries:
    client.environ["REGISTRY_PASSWORD"] = PASSWORD
    return client.registries(special={host: LOGIN})


def kept(image: Image, blobs: BlobStore) -> Manifest:
    for data in (image.config, *image.layers):
        blobs.add(data)
    found = parse_manifest(image.manifest)
    assert isinstance(found, Manifest)
    return found


@pytest.fixture
def skopeo(tmp_path: Path, ca: CA) -> Skopeo:
    """Run skopeo with our CA and login: its words in order, those of a registry with `docker://`."""
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    (certificates / "ca.crt").write_bytes(ca.certificate.read_bytes())
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def run(command: str, *words: str) -> str:
        kinds = ("src-", "dest-") if command == "copy" else ("",)
        access = [
            option
            for kind, word in zip(kinds, words, strict=False)
            if word.startswith("docker:")
            for option in (f"--{kind}cert-dir={certificates}", f"--{kind}creds={USER}:{PASSWORD}")
        ]
        done = subprocess.run(
            ["skopeo", "--policy", str(policy), command, *access, *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_what_we_push_we_pull_and_what_is_there_is_not_sent(
    registries: Registries, client: Client, host: str, tmp_path: Path
) -> None:
    manifest = kept(IMAGE, client.blobs)
    named = push(registries, Reference.parse(f"{host}/team/base:1"), manifest, client.blobs)
    sent = [event for event in client.events if isinstance(event, TaskFinished) and event.bytes]
    assert {event.bytes for event in sent} == {len(IMAGE.config), *map(len, IMAGE.layers)}
    client.events.clear()
    other = Reference.parse(f"{host}/team/web:1")
    push(registries, other, manifest, client.blobs, related=(Reference.parse(f"{host}/team/base:1"),))
    push(registries, Reference.parse(f"{host}/team/web:2"), manifest, client.blobs)
    started = [event.name for event in client.events if isinstance(event, TaskStarted)]
    assert started == [f"pushing the manifest of {host}/team/web:{tag}" for tag in (1, 2)]
    empty = BlobStore(tmp_path / "empty")
    found = registries.pull(other, empty, Platform.host())
    assert (found.digest, registries.digest(other)) == (named, named)
    assert empty.required(digest(IMAGE.layers[0])).read_bytes() == IMAGE.layers[0]
    empty.close()


def test_what_the_registry_says_to_a_wrong_login_is_told(client: Client, host: str) -> None:
    client.environ["REGISTRY_PASSWORD"] = "wrong"
    registries = client.registries(special={host: LOGIN})
    with pytest.raises(RegistryError) as caught:
        registries.pull(Reference.parse(f"{host}/web:1"), client.blobs, Platform.host())
    assert caught.value.message == (
        f"{host}: the manifest of web:1: it refuses the login: UNAUTHORIZED: authentication required"
    )


def test_what_is_not_there_is_said_in_the_words_of_the_registry(
    registries: Registries, client: Client, host: str
) -> None:
    with pytest.raises(RegistryError) as caught:
        registries.pull(Reference.parse(f"{host}/none:1"), client.blobs, Platform.host())
    assert caught.value.message == (
        f"{host}: the manifest of none:1: it answered 404 Not Found: MANIFEST_UNKNOWN: manifest unknown"
    )
    assert not Repository(registries.registry(host), "none").has(kept(IMAGE, client.blobs).config)


@pytest.mark.parametrize(
    ("chunk_size", "place", "goes_on"),
    [("1MiB", 2 << 20, {2 << 20}), ("1MiB", 2_200_000, {0, 2 << 20}), (None, 2_200_000, {0})],
)
def test_a_layer_that_is_cut_on_its_way_there_arrives(
    client: Client, host: str, chunk_size: str | None, place: int, goes_on: set[int]
) -> None:
    """This registry goes on after whole chunks.

    Once it has seen that an upload was cut in a chunk, it knows nothing of the whole ones before either.
    """
    client.environ["REGISTRY_PASSWORD"] = PASSWORD
    registries = client.registries(special={host: {**LOGIN, "chunk_size": chunk_size}})
    large = bytes(range(256)) * (3 << 12) + f"{chunk_size} {place}".encode()
    layer = kept(Image((large,)), client.blobs).layers[0]
    sent, after = [0, 0], list[int]()

    def check() -> None:
        if sent[-2] >= place and not after:  # the end of a chunk is read twice
            after.append(len(sent))
            raise RegistryError("the connection was cut off", passing=True)

    repository = Repository(registries.registry(host), "cut", push=True)
    Upload(repository, layer, client.blobs.required(layer.digest), sent.append, check).send()
    assert repository.has(layer)
    first = sent[after[0]]
    assert any(known < first <= known + (1 << 16) for known in goes_on)


@pytest.mark.needs("skopeo")
def test_skopeo_pulls_what_we_push_and_we_pull_what_it_pushes(
    registries: Registries, client: Client, host: str, tmp_path: Path, skopeo: Skopeo
) -> None:
    ours, layout = f"docker://{host}/skopeo:ours", f"oci:{tmp_path / 'layout'}:it"
    manifest = kept(IMAGE, client.blobs)
    named = push(registries, Reference.parse(f"{host}/skopeo:ours"), manifest, client.blobs)
    assert json.loads(skopeo("inspect", ours))["Digest"] == named
    skopeo("copy", ours, layout)
    for form, media_type in (("oci", MANIFEST), ("v2s2", DOCKER_MANIFEST)):
        skopeo("copy", layout, f"docker://{host}/theirs:{form}", f"--format={form}")
        empty = BlobStore(tmp_path / form)
        found = registries.pull(Reference.parse(f"{host}/theirs:{form}"), empty, Platform.host())
        assert (found.manifest.media_type, found.document.config.cmd) == (media_type, ("/bin/true",))
        assert found.document.diff_ids == tuple(map(digest, IMAGE.layers))
        empty.close()


def test_a_mirror_is_asked_first_with_a_login_of_its_own(
    client: Client, host: str, tmp_path: Path, ca: CA
) -> None:
    client.environ["REGISTRY_PASSWORD"] = PASSWORD
    (tmp_path / "mirror").mkdir()
    with debian_registry(tmp_path / "mirror", ca) as mirror:
        own = client.registries(special={mirror: LOGIN})
        push(own, Reference.parse(f"{mirror}/mirrored:1"), kept(IMAGE, client.blobs), client.blobs)
        # Nobody logs in at the registry itself, which has no such image anyway.
        mirrored = client.registries(special={host: {"mirrors": [mirror]}, mirror: LOGIN})
        empty = BlobStore(tmp_path / "empty")
        found = mirrored.pull(Reference.parse(f"{host}/mirrored:1"), empty, Platform.host())
        assert found.manifest.data == IMAGE.manifest
        assert empty.required(digest(IMAGE.layers[0])).read_bytes() == IMAGE.layers[0]
        assert client.said == []
        with pytest.raises(RegistryError, match="it does not exist, or needs a login"):
            mirrored.pull(Reference.parse(f"{host}/none:1"), empty, Platform.host())
        (told,) = client.said
        assert told.startswith(f"{mirror} failed, {host} is asked instead: {mirror}: the manifest of none:1")
        empty.close()


@pytest.mark.needs("buildah", "root")
def test_buildah_pulls_what_we_push(
    registries: Registries, client: Client, host: str, tmp_path: Path, ca: CA
) -> None:
    push(
        registries,
        Reference.parse(f"{host}/buildah:1"),
        kept(Image((EMPTY_TAR,)), client.blobs),
        client.blobs,
    )
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    (certificates / "ca.crt").write_bytes(ca.certificate.read_bytes())
    (tmp_path / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    store = ("--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs")
    access = (f"--cert-dir={certificates}", f"--creds={USER}:{PASSWORD}")
    policy = f"--signature-policy={tmp_path / 'policy.json'}"
    command = ["buildah", *store, "pull", *access, policy, f"docker://{host}/buildah:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(Image((EMPTY_TAR,)).config).removeprefix("sha256:")


@pytest.mark.needs("skopeo")
def test_statements_go_with_an_image_whose_own_digest_stays(
    registries: Registries, client: Client, host: str, skopeo: Skopeo, tmp_path: Path
) -> None:
    manifest = kept(IMAGE, client.blobs)
    said = [
        statement(["pkg:docker/web@1"], manifest.digest, kind, {"kind": kind}) for kind in (PROVENANCE, SBOM)
    ]
    about = attested(manifest, Platform.host(), said, client.blobs)
    reference = Reference.parse(f"{host}/team/attested:1")
    named = push(registries, reference, manifest, client.blobs, attested=about)
    assert named == about.index.digest == registries.digest(reference)
    index = json.loads(skopeo("inspect", f"docker://{reference}", "--raw"))
    image, attestation = index["manifests"]
    assert image["digest"] == manifest.digest
    assert attestation["platform"] == {"os": "unknown", "architecture": "unknown"}
    assert attestation["annotations"] == {
        "vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": manifest.digest,
    }
    raw = skopeo("inspect", f"docker://{host}/team/attested@{attestation['digest']}", "--raw")
    layers = json.loads(raw)["layers"]
    assert [layer["annotations"]["in-toto.io/predicate-type"] for layer in layers] == [PROVENANCE, SBOM]
    assert {layer["mediaType"] for layer in layers} == {"application/vnd.in-toto+json"}
    # Who knows nothing of it gets the image.
    skopeo("copy", f"docker://{reference}", f"dir:{tmp_path / 'copied'}")
    assert digest((tmp_path / "copied/manifest.json").read_bytes()) == manifest.digest
    empty = BlobStore(tmp_path / "empty")
    pulled = registries.pull(reference, empty, Platform.host())
    assert (pulled.digest, pulled.manifest.digest) == (named, manifest.digest)
    empty.close()
