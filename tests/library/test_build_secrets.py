"""Private keys are nowhere but in memory, and the metadata give them away only until the guest has called."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cli.library import Library
from cli.watching import Watch
from firebuild_bootstrap.dockerfile.graph import Download, GitTree
from firebuild_bootstrap.errors import StepFailed
from firebuild_bootstrap.events import Event, StepStarted
from firebuild_bootstrap.mmds import MetadataDocument
from firebuild_bootstrap.mmds.protocol import Request, Response
from firebuild_bootstrap.registry.credentials import Credentials
from firebuild_bootstrap.registry.settings import RegistriesSettings
from firebuild_bootstrap.registry.transport import Surroundings
from firebuild_bootstrap.request import Secret
from firebuild_bootstrap.running import RunRequest
from firebuild_pki import Authority, TLSMaterial

pytestmark = pytest.mark.needs("userns")


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The private keys that real authorities issue while the test runs."""
    issued: list[bytes] = []

    def spy(issue: Any) -> Any:
        def issue_and_note(*arguments: Any, **options: Any) -> TLSMaterial:
            material: TLSMaterial = issue(*arguments, **options)
            issued.append(material.private_key_pem)
            return material

        return issue_and_note

    for name in ("issue_server", "issue_guest"):
        monkeypatch.setattr(Authority, name, spy(getattr(Authority, name)))
    return issued


def body(pem: bytes) -> bytes:
    """The longest line of a PEM document: however it is quoted, this is in it."""
    return max(pem.splitlines(), key=len)


@pytest.mark.parametrize(
    "value",
    [
        Secret(b"s3cret"),
        RunRequest(image="a", env={"PASSWORD": "s3cret"}),
        MetadataDocument(env={"PASSWORD": "s3cret"}),
        Response(200, "s3cret"),
        Request("GET", "/", headers={"x-metadata-token": "s3cret"}),
        Download("https://me:s3cret@h/f"),
        GitTree("https://me:s3cret@h/f.git"),
        Surroundings(settings=RegistriesSettings(), environ={"PASSWORD": "s3cret"}, anchors=str),
        Credentials("the configuration", "me", "s3cret", "s3cret", "s3cret"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_hold_a_secret_does_not_show_it_in_its_repr(value: object) -> None:
    assert "s3cret" not in repr(value)


def test_no_private_key_is_ever_seen_outside_memory(
    library: Library,
    keys: list[bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    monkeypatch.setenv("FIREBUILD_DEBUG", "1")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    watch = Watch([library.home.root, temporary])
    watch.expect("canary", b"canary-8472")
    with caplog.at_level(logging.DEBUG), watch.running():
        library.build(
            "FROM host\nENV CANARY=canary-8472\n"
            "RUN echo $CANARY > /file; cat /file; sleep 0.5 || canary-8472\n",
            tag="t/canary-8472:1",
        )
    # It looks where it should: what the Dockerfile says is found in all three places.
    assert watch.places("canary") == {"file", "cmdline", "environ"}
    assert len(keys) == 2
    streams = capfd.readouterr()
    told = "".join(
        [
            *(json.dumps(event.as_json()) + repr(event) for event in library.events),
            caplog.text,
            *(repr(record.__dict__) for record in caplog.records),
            streams.out,
            streams.err,
        ]
    )
    assert "canary-8472" in told
    for number, key in enumerate(keys):
        watch.expect(f"key {number}", body(key))
        assert watch.places(f"key {number}") == set()
        assert body(key).decode() not in told
    assert "PRIVATE KEY" not in told


def test_what_is_kept_of_a_failed_build_holds_no_key(
    library: Library, keys: list[bytes], tmp_path: Path
) -> None:
    run = "cat /proc/*/environ /proc/*/cmdline > /seen 2>&1; echo canary-8472 >> /seen; exit 1"
    with pytest.raises(StepFailed):
        library.build(f"FROM host\nRUN {run}\n", keep_failed=tmp_path / "kept")
    [folder] = (tmp_path / "kept").iterdir()
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(kept) - {"console.log"} == {"failure.json", "rootfs.tar"}  # it may have said nothing
    assert b"canary-8472" in kept["rootfs.tar"]
    assert len(keys) == 2
    for content in kept.values():
        assert not any(body(key) in content for key in keys)


def fetch(directory: Path) -> dict[str, Any]:
    """Read all metadata as the guest does (MMDS V2: a session token, then GET)."""
    folder = os.open(directory, os.O_RDONLY)
    try:
        connection = http.client.HTTPConnection("mmds", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        connection.sock.connect(f"/proc/self/fd/{folder}/mmds.sock")
        connection.request("PUT", "/latest/api/token", headers={"X-metadata-token-ttl-seconds": "60"})
        token = connection.getresponse().read().decode()
        connection.request("GET", "/", headers={"X-metadata-token": token, "Accept": "application/json"})
        document: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
    finally:
        os.close(folder)
    return document


def test_the_metadata_hold_no_credentials_once_steps_run(library: Library, keys: list[bytes]) -> None:
    seen: list[str] = []

    def look(event: Event) -> None:
        if isinstance(event, StepStarted) and event.step == 2:
            [mmds] = (library.home.root / "builds").glob("*/*/mmds")
            seen.append(json.dumps(fetch(mmds)))

    library.watch = look
    library.build("FROM host\nRUN true\n", tag="t/wiped:1")
    [document] = seen
    assert "t/wiped:1" in document
    assert "ootstrap" not in document.replace("firebuild_bootstrap", "")
    for key in keys:
        assert body(key).decode() not in document
    assert "PRIVATE KEY" not in document


def test_without_a_receiver_nothing_is_printed(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    library.build("FROM host\nRUN echo hello; echo there >&2\n", build_args={"UNKNOWN": "1"})
    streams = capfd.readouterr()
    assert (streams.out, streams.err) == ("", "")
