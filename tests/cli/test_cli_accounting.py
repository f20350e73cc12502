"""How an image was built and what is in it, as the commands tell it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1.statement import Statement

from cli.conftest import Cli
from support import serving_files

pytestmark = pytest.mark.needs("userns", "git")

SECRET = "s3cr3t-0f-the-build"
PASSWORD = "pa55-in-a-url"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server with a file and a git repository."""
    served = tmp_path / "served"
    work = served / "work"
    work.mkdir(parents=True)
    (served / "file").write_text("downloaded\n")
    (work / "inside").write_text("from git\n")
    for words in (
        ("init", "--quiet", "--initial-branch=main"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first"),
        ("clone", "--quiet", "--bare", ".", "../main.git"),
        ("-C", "../main.git", "update-server-info"),
    ):
        subprocess.run(["git", *words], cwd=work, check=True)
    with serving_files(served) as address:
        yield address


def provenance(cli: Cli, tag: str, *options: str) -> dict[str, Any]:
    """Return a statement that the parsers of in-toto and of SLSA's provenance accept."""
    statement: dict[str, Any] = json.loads(cli("images", "provenance", tag, *options).out)
    parsed = Statement.copy_from_pb(json_format.ParseDict(statement, Statement("", "", {}).pb))
    parsed.validate()
    predicate: dict[str, Any] = statement["predicate"]
    # Extensions are allowed, and named after who made them (slsa.dev/spec/v1.0/provenance#extension-fields).
    read = json_format.ParseDict(predicate, provenance_pb2.Provenance(), ignore_unknown_fields=True)
    assert read.run_details.metadata.started_on.seconds <= read.run_details.metadata.finished_on.seconds
    return statement


def test_a_build_tells_of_all_that_went_in_and_of_no_secret(
    host_cli: Cli, server: str, tmp_path: Path
) -> None:
    cli = host_cli
    login = f"http://me:{PASSWORD}@{server}"
    Path("named").mkdir()
    Path("named/n").write_text("named\n")
    Path("a").write_text("of the context\n")
    Path("secret").write_text(f"{SECRET}\n")
    dockerfile = (
        "FROM host\nARG WHERE\nARG TOKEN\nCOPY a /a\nCOPY --from=more n /n\nCOPY --from=repo inside /r\n"
        f"ADD {login}/file?token={PASSWORD} /file\nADD {login}/main.git#main /git\n"
        "RUN --mount=type=secret,id=key test -s /run/secrets/key\n"
    )
    Path("Dockerfile").write_text(dockerfile)
    options = (
        *("--build-arg", f"WHERE=https://u:{PASSWORD}@host/x?t={PASSWORD}", "--build-arg", f"TOKEN={SECRET}"),
        *("--secret", "id=key,src=secret", "--label", "team=a", "--build-context", "more=named"),
        *("--build-context", f"repo={login}/main.git#main"),
    )
    cli("build", "-t", "told/1", *options, "--metadata-file", "meta", ".")
    text = cli("images", "provenance", "told/1").out
    kept = [path.read_text() for path in (cli.home / "images").rglob("provenance.json")]
    assert len(kept) >= 1
    for each in (text, *kept):
        assert SECRET not in each
        assert PASSWORD not in each
    metadata = json.loads(Path("meta").read_text())
    assert metadata["attestations"] == {"provenance": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}

    statement = provenance(cli, "told/1")
    assert statement["subject"] == [{"name": "told/1:latest", "digest": {"sha256": metadata["id"][7:]}}]
    definition = statement["predicate"]["buildDefinition"]
    given = definition["externalParameters"]
    assert given["args"] == {"TOKEN": "[secret key]", "WHERE": "https://host/x"}
    assert given["secrets"] == [{"id": "key"}]
    assert (given["labels"], given["contexts"]) == ({"team": "a"}, ["more", "repo"])

    materials = {each.get("name") or each["uri"]: each for each in definition["resolvedDependencies"]}
    commit = subprocess.run(
        ["git", "rev-parse", "main"],
        cwd=tmp_path / "served/main.git",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert materials["Dockerfile"]["digest"] == {"sha256": hashlib.sha256(dockerfile.encode()).hexdigest()}
    downloaded = hashlib.sha256(b"downloaded\n").hexdigest()
    assert materials[f"http://{server}/file"]["digest"] == {"sha256": downloaded}
    assert materials[f"git+http://{server}/main.git@main"]["digest"] == {"gitCommit": commit}
    assert materials["context repo"]["uri"] == f"git+http://{server}/main.git@main"
    assert materials["context repo"]["digest"]["gitCommit"] == commit
    assert materials["host:latest"]["mediaType"] == "application/x-tar"
    before = materials["context"]["digest"], materials["context more"]["digest"]

    metadata_of = statement["predicate"]["runDetails"]["metadata"]
    assert metadata_of["firebuild_ca"]["issued"] is True
    assert metadata_of["firebuild_cache"]["executed"] == 6
    assert metadata_of["firebuild_completeness"] == {"parameters": True, "resolvedDependencies": False}

    least = json.loads(cli("images", "provenance", "told/1", "--mode", "min").out)["predicate"]
    assert sorted(least["buildDefinition"]["externalParameters"]) == ["contexts", "dockerfile", "platform"]
    assert "steps" not in least["runDetails"]["metadata"]["firebuild_cache"]

    # Cached whole under another name: nobody needed a certificate. The same again keeps what it has.
    cli("build", "-t", "told/2", *options, ".")
    again = provenance(cli, "told/2")["predicate"]
    assert again["runDetails"]["metadata"]["firebuild_ca"] == {"provider": "embedded", "issued": False}
    assert again["runDetails"]["metadata"]["firebuild_cache"]["cached"] == 6
    cli("build", "-t", "told/1", *options, ".")
    assert provenance(cli, "told/1") == statement

    # Another file is another digest of its context, and of no other.
    Path("a").write_text("changed\n")
    Path("Dockerfile").write_text("FROM told/1\nCOPY a /a\nCOPY --from=more n /n\n")
    cli("build", "-t", "told/3", "--build-context", "more=named", "--no-cache", ".")
    found = provenance(cli, "told/3")["predicate"]["buildDefinition"]["resolvedDependencies"]
    others = {each["name"]: each for each in found}
    assert others["context"]["digest"] != before[0]
    assert others["context more"]["digest"] == before[1]
    invocation = statement["predicate"]["runDetails"]["metadata"]["invocationId"]
    assert others["told/1:latest"]["annotations"] == {"invocationId": invocation}


def test_an_image_can_be_built_without_and_packages_are_found_later(cli: Cli) -> None:
    Path("status").write_text(
        "Package: dash\nStatus: install ok installed\nVersion: 0.5\nArchitecture: amd64\n"
    )
    Path("Dockerfile").write_text("FROM scratch\nCOPY status /var/lib/dpkg/status\n")
    cli("build", "-t", "t/1", "--provenance=false", "--sbom", "--metadata-file", "meta", ".")
    done = cli("images", "provenance", "t/1", status=2)
    assert done.first == (
        "error: the image t/1:latest has no provenance: it was built without it, or by an earlier version"
    )
    text = cli("images", "sbom", "t/1").out
    assert [each["name"] for each in json.loads(text)["components"]] == ["dash"]
    assert text == cli("images", "sbom", "t/1").out
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert json.loads(Path("meta").read_text())["attestations"] == {"sbom": digest}
    cli("build", "-t", "t/1", "--provenance", ".")
    assert provenance(cli, "t/1")["subject"][0]["name"] == "t/1:latest"
    assert cli("build", "--attest", "type=vex", ".", status=2).first.startswith("error: --attest type=vex:")
