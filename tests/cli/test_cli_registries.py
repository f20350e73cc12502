"""Builds FROM images of a registry: when it is asked, how often, and what is said when it can't be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli
from firebuild_bootstrap.home import Home
from registry.servers import CA, Image, Small, always, digest, once, small_registry

pytestmark = pytest.mark.needs("userns")


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CA:
    return CA.made(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def small(ca: CA, cli: Cli) -> Iterator[Small]:
    with small_registry(ca.server_context()) as server:
        hosts = {server.host: {"ca_file": str(ca.certificate)}}
        Path("config.yml").write_text(json.dumps({"registries": {"hosts": hosts}}))
        cli.setenv("FIREBUILD_CONFIG", Path("config.yml").absolute())
        cli.monkeypatch.delenv("FIREBUILD_PULL")
        yield server


@pytest.fixture(scope="session")
def runnable(host_home: Path) -> Image:
    """An image with a shell."""
    base = Home(host_home).bases.resolve("host")
    return Image((base.archive.read_bytes(),))


def test_an_image_is_pulled_once_and_always_asks_for_nothing_but_its_digest(
    small: Small, cli: Cli, runnable: Image
) -> None:
    named = small.add(runnable, "1")
    Path("Dockerfile").write_text(
        f"FROM {small.host}/team/base:1\nRUN echo made here > /made\n"
        f"COPY --from={small.host}/team/other:1 /bin/sh /copied\n"
    )
    cli("build", "-t", "t/1", ".")
    layer = digest(runnable.layers[0])
    assert [path for path in small.asked() if layer in path] == [f"/v2/team/base/blobs/{layer}"]
    small.requests.clear()
    cli("build", "-t", "t/1", ".")
    cli("build", "-t", "t/1", "--pull=never", ".")
    assert not small.requests
    cli("build", "-t", "t/1", "--pull", ".")
    assert [(method, path) for method, path, _ in small.requests] == [
        ("HEAD", f"/v2/team/{name}/manifests/1") for name in ("base", "other")
    ]
    small.requests.clear()
    Path("Dockerfile").write_text(f"FROM {small.host}/team/base@{named}\n")
    cli("build", "-t", "t/2", "--build-context", f"x=docker-image://{small.host}/team/base:1", ".")
    assert not small.requests


def test_a_base_that_can_t_be_pulled_says_why_and_what_else_there_is(small: Small, cli: Cli) -> None:
    Path("Dockerfile").write_text(f"FROM scratch\nCOPY --from={small.host}/none:1 / /\n")
    done = cli("build", ".", status=2)
    assert done.first == (
        f"error: Dockerfile:2: {small.host}/none:1 is not in the store, and can't be pulled: {small.host}: "
        "the manifest of none:1: it answered 404 Not Found: MANIFEST_UNKNOWN: not here"
    )
    assert f"`firebuild base import {small.host}/none:1 DIRECTORY-OR-TAR` makes a base of files" in done.err
    Path("Dockerfile").write_text("FROM base\n")
    context = f"base=docker-image://{small.host}/none:2"
    assert (
        "the manifest of none:2: it answered 404"
        in cli("build", "--build-context", context, ".", status=2).first
    )
    Path("Dockerfile").write_text(f"FROM {small.host}/none:1\n")
    small.requests.clear()
    assert "unknown base" in cli("build", "--pull=never", ".", status=2).first
    assert not small.requests
    assert "--pull: expected missing, always or never" in cli("build", "--pull=x", ".", status=2).first
    cli.setenv("FIREBUILD_PULL", "never")
    assert "unknown base" in cli("build", ".", status=2).first


def test_a_policy_is_refused_where_it_was_given(small: Small, cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    said = "expected missing, always or never, found 'sometimes'"
    assert cli("build", "--pull=sometimes", ".", status=2).first == f"error: --pull: {said}"
    cli.setenv("FIREBUILD_PULL", "sometimes")
    assert cli("build", ".", status=2).first == f"error: FIREBUILD_PULL: {said}"


def test_images_pull_keeps_what_is_newest(small: Small, cli: Cli, runnable: Image) -> None:
    small.add(runnable, "1")
    done = cli("pull", f"{small.host}/team/base:1")
    assert done.out.startswith(f"pulled {small.host}/team/base:1  sha256:")
    small.requests.clear()
    assert cli("images", "pull", f"{small.host}/team/base:1").out == done.out
    assert small.asked() == ["/v2/team/base/manifests/1"]
    assert f"{small.host}/team/base:1" in cli("images", "list").out
    small.add(Image((*runnable.layers, bytes(10240))), "1")
    small.behaviours.append(once("/manifests/", lambda handler: handler.answer(503)))
    cli.monkeypatch.setattr("firebuild_bootstrap.registry.transport._FIRST_PAUSE", 0.001)
    newer = cli("images", "pull", f"{small.host}/team/base:1").out
    assert newer != done.out
    assert "404 Not Found" in cli("images", "pull", f"{small.host}/none", status=2).first
    small.add(runnable, "2")
    several = [f"{small.host}/team/base:{tag}" for tag in (2, 1, 2)]
    pulled = [line.split()[1] for line in cli("pull", *several).out.splitlines()]
    assert pulled == several


def test_the_digest_that_a_pull_prints_pins_the_image_in_every_store(
    small: Small, cli: Cli, runnable: Image, tmp_path: Path
) -> None:
    small.add(runnable, "1")
    name = f"{small.host}/team/base"
    digest = cli("pull", f"{name}:1").out.split()[-1]
    small.add(Image((*runnable.layers, bytes(10240))), "1")
    Path("Dockerfile").write_text(f"FROM {name}@{digest}\nLABEL pinned=yes\n")
    cli("build", ".")
    cli.setenv("FIREBUILD_HOME", str(tmp_path / "another"))
    cli("build", ".")
    cli("build", "--tag", f"{small.host}/team/web:1", "--push", ".")
    assert cli("push", f"{small.host}/team/web:1").out == cli("pull", f"{small.host}/team/web:1").out.replace(
        "pulled", "pushed"
    )


def test_an_image_that_was_built_here_or_pulled_keeps_that_whatever_comes_later(
    small: Small, cli: Cli, tmp_path: Path
) -> None:
    def record() -> Any:
        found = json.loads(cli("images", "inspect", tag).out)
        return found["build_id"], found.get("source", {})

    tag = f"{small.host}/team/web:1"
    Path("Dockerfile").write_text("FROM scratch\nLABEL a=b\nCOPY Dockerfile /\n")
    cli("build", "-t", tag, "--push", "--output", f"type=oci,dest={tmp_path / 'web.tar'}", ".")
    build_id, source = record()
    assert build_id
    assert not source
    plain = cli("pull", tag).out.split()[-1]
    pulled = record()[1]
    assert pulled["pulled"]
    # The same image in an index with what is said about it, and as it was: the registry has the last word.
    attested = cli("push", "--provenance=true", tag).out.split()[-1]
    assert attested != plain
    for named in (attested, plain, attested):
        small.manifests["1"] = small.manifests[named]
        assert cli("pull", tag).out.split()[-1] == named
    for _ in range(2):
        cli("images", "load", "-t", tag, tmp_path / "web.tar")
        kept, source = record()
        assert kept == build_id
        assert source["pulled"]
        assert source["origin"] == pulled["origin"]
    small.requests.clear()
    for named in (attested, plain):
        Path("Dockerfile").write_text(f"FROM {tag.removesuffix(':1')}@{named}\n")
        cli("build", ".")
    assert not small.requests
    assert cli("pull", tag).out.split()[-1] == attested


def test_what_is_built_is_pushed_with_the_layers_of_its_base(small: Small, cli: Cli, runnable: Image) -> None:
    small.add(runnable, "1")
    base, tag = f"{small.host}/team/base:1", f"{small.host}/team/web:2"
    Path("Dockerfile").write_text(f"FROM {base}\nRUN echo made here > /made\nCMD /bin/true\n")
    done = cli("build", "-t", tag, "--push", "--output", "type=registry", ".")
    named = digest(small.manifests["2"][1])
    assert f"pushed {tag} as {named}" in done.out
    first = json.loads(small.manifests["2"][1])["layers"][0]
    assert first["digest"] == digest(runnable.layers[0])
    assert not [path for path in small.asked("PUT") if digest(runnable.layers[0])[7:] in path]
    small.requests.clear()
    assert cli("push", tag).out == f"pushed {tag}  {named}\n"
    assert small.asked("PUT") == ["/v2/team/web/manifests/2"]
    with_statements(small, cli, tag, named)
    cli("rmi", tag)
    Path("Dockerfile").write_text(f"FROM {tag}\nRUN grep here /made\n")
    cli("build", ".")


def with_statements(small: Small, cli: Cli, tag: str, named: str) -> None:
    """Push what is there once more, with statements about it: its own digest stays."""
    done = cli("images", "push", "--attest", "type=provenance,mode=max", "--sbom", tag)
    assert done.out == f"pushed {tag}  {digest(small.manifests['2'][1])}\n"
    image, attestation = json.loads(small.manifests["2"][1])["manifests"]
    assert image["digest"] == named
    layers = json.loads(small.manifests[attestation["digest"]][1])["layers"]
    provenance, sbom = (json.loads(small.blobs[layer["digest"]]) for layer in layers)
    assert provenance["subject"] == sbom["subject"]
    assert provenance["subject"][0]["digest"] == {"sha256": named[7:]}
    host = small.host.replace(":", "%3A")
    assert provenance["subject"][0]["name"].startswith(f"pkg:docker/{host}/team/web@2?platform=linux")
    assert sbom["predicate"]["bomFormat"] == "CycloneDX"
    (_, base) = provenance["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert base["uri"].startswith(f"pkg:docker/{host}/team/base@1?platform=linux")
    assert base["digest"] == {"sha256": digest(small.manifests["1"][1])[7:]}


def test_what_can_t_be_pushed_is_refused(small: Small, cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nLABEL a=b\n")
    done = cli("build", "--push", ".", status=2)
    assert done.err == (
        "error: an image without a tag can't be pushed\n  hint: add --tag REGISTRY/NAME:TAG\n"
    )
    small.behaviours.append(
        always("/uploads/", lambda handler: handler.answer(403, b'{"details": "read only"}'))
    )
    done = cli("build", "-t", f"{small.host}/web:1", "--push", ".", status=2)
    assert "it answered 403 Forbidden: read only" in done.first
    assert f"{small.host}/web:1" in cli("images", "list").out


def test_a_login_is_seen_nowhere(small: Small, cli: Cli, ca: CA) -> None:
    login = {"username": "me", "password": {"env": "REGISTRY_PASSWORD"}, "ca_file": str(ca.certificate)}
    Path("config.yml").write_text(json.dumps({"registries": {"hosts": {small.host: login}}}))
    cli.setenv("REGISTRY_PASSWORD", "the-password")
    cli.setenv("FIREBUILD_DEBUG", "1")
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    small.behaviours.append(always("/", lambda handler: handler.answer(401, b"", **challenge)))
    Path("Dockerfile").write_text(f"FROM {small.host}/web:1\n")
    for command in (
        ("build", "--progress", "rawjson", "."),
        ("pull", f"{small.host}/web:1"),
        ("config", "show"),
    ):
        done = cli(*command, status=0 if command[0] == "config" else 2)
        assert "the-password" not in done.out + done.err
        assert "bWU6dGhlLXBhc3N3b3Jk" not in done.out + done.err
    sent = {headers.get("Authorization") for _, _, headers in small.requests}
    assert sent == {None, "Basic bWU6dGhlLXBhc3N3b3Jk"}
