"""One Dockerfile, six certificate authorities: only the configuration says which."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest

from e2e import authorities
from e2e.authorities import PROVIDERS, Backends
from support import Firebuild

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs("userns", "bao", "cfssl", "step-ca"),
    pytest.mark.xdist_group("swap"),
]

backends = authorities.backends
DOCKERFILE = """\
FROM host
COPY greeting /srv/
RUN tr a-z A-Z < /srv/greeting > /srv/loud && ln -s loud /srv/link && chmod 751 /srv/loud
ENV NAME=value
ENTRYPOINT ["/bin/cat", "/srv/loud"]
"""


class Swapper:
    """Builds the same context again and again."""

    def __init__(self, firebuild: Firebuild, context: Path, backends: Backends) -> None:
        self.firebuild, self.context, self.backends = firebuild, context, backends
        (context / "Dockerfile").write_text(DOCKERFILE)
        (context / "greeting").write_text("hello\n")

    def build(self, tag: str, config: Path, **environ: str) -> dict[str, Any]:
        self.firebuild(
            "rootfs",
            *("--context", self.context, "--no-cache", "--tag", tag, "--output", "tar", "--config", config),
            environ={**self.backends.environ, **environ},
        )
        image: dict[str, Any] = json.loads(self.firebuild("images", "inspect", tag).stdout)
        return image

    def written_as(self, provider: str) -> Path:
        return self.backends.write(self.context.parent / f"{provider}.yaml", provider)


@pytest.fixture
def swapper(firebuild: Firebuild, context: Path, backends: Backends) -> Swapper:
    return Swapper(firebuild, context, backends)


def files_of(image: dict[str, Any]) -> dict[str, tuple[object, ...]]:
    """What a build decides of each file; times it takes from the clock."""
    [output] = image["outputs"]
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(output["path"]) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isreg() else None
            content = hashlib.sha256(stream.read()).hexdigest() if stream else ""
            owner = (member.uid, member.gid)
            found[member.name] = (member.type, member.mode, owner, member.linkname, content)
    return found


def check_issuer(image: dict[str, Any], provider: str, backends: Backends) -> None:
    assert image["ca"]["provider"] == provider
    issuer = image["ca"]["issuer_fingerprint_sha256"]
    if provider == "embedded":  # gone by now, and nobody else's
        assert len(issuer) == 64
        assert issuer not in backends.issuers.values()
    else:
        assert issuer == backends.issuers[provider]


def test_another_line_in_the_file_is_another_ca_and_the_same_image(swapper: Swapper) -> None:
    images = {name: swapper.build(f"swap/{name}:1", swapper.written_as(name)) for name in PROVIDERS}
    for name, image in images.items():
        check_issuer(image, name, swapper.backends)
    lines = {name: swapper.written_as(name).read_text().splitlines() for name in PROVIDERS}
    differing = {name: set(lines[name]) ^ set(lines["embedded"]) for name in PROVIDERS if name != "embedded"}
    assert differing == {
        name: {"  provider: embedded", f"  provider: {name}"} for name in PROVIDERS if name != "embedded"
    }
    files = {name: files_of(image) for name, image in images.items()}
    assert files["embedded"]["srv/loud"][4] == hashlib.sha256(b"HELLO\n").hexdigest()
    for name in PROVIDERS:
        assert files[name] == files["embedded"], name
        assert images[name]["config"] == images["embedded"]["config"]
    assert swapper.firebuild.leftovers() == []


def test_a_variable_is_another_ca_and_the_same_image(swapper: Swapper) -> None:
    config = swapper.written_as("embedded")
    before = config.read_bytes()
    images = {
        name: swapper.build(f"swap/by-variable-{name}:1", config, FIREBUILD_CA__PROVIDER=name)
        for name in PROVIDERS
    }
    for name, image in images.items():
        check_issuer(image, name, swapper.backends)
        assert files_of(image) == files_of(images["embedded"]), name
    assert config.read_bytes() == before


def test_two_embedded_cas_are_two(swapper: Swapper) -> None:
    config = swapper.written_as("embedded")
    issuers = {swapper.build(f"swap/twice:{n}", config)["ca"]["issuer_fingerprint_sha256"] for n in range(2)}
    assert len(issuers) == 2


def test_each_certificate_of_a_build_is_labelled_with_its_image_and_who_asked(swapper: Swapper) -> None:
    log = swapper.context.parent / "audit.jsonl"
    environ = {"FIREBUILD_CA__OBSERVERS": "[audit-log]", "FIREBUILD_CA__AUDIT_LOG__PATH": str(log)}
    swapper.build("swap/labelled:1", swapper.written_as("embedded"), **environ)
    labels = [line["labels"] for line in map(json.loads, log.read_text().splitlines()) if line["names"]]
    me = f"{pwd.getpwuid(os.geteuid()).pw_name}@{socket.gethostname()}"
    assert labels == [{"requester": me, "tag": "swap/labelled:1"}] * 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_builds_is_what_passes_the_preflight(swapper: Swapper, provider: str) -> None:
    config = swapper.written_as(provider)
    done = swapper.firebuild("ca", "check", "--json", "--config", config, environ=swapper.backends.environ)
    report = json.loads(done.stdout)
    assert (report["verdict"], report["provider"]) == ("ready", provider)
    remarks = {row["message"] for row in report["rows"] if row["level"] not in {"ok", "skipped"}}
    # cfssl signs for as long as its profile says, whatever was asked for
    assert all(" extended the lifetime " in remark for remark in remarks)
    assert bool(remarks) == (provider == "cfssl")
