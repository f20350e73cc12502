"""Parts of the kit on their own: what no provider of the suites makes them do."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from firebuild_pki import SecretRef, Settings
from firebuild_pki.conformance.purity import watched
from firebuild_pki.conformance.spilling import secret_refs, with_secret


class Login(Settings):
    name: str = "builder"
    password: SecretRef = SecretRef(env="PASSWORD")


class Many(Settings):
    logins: tuple[Login, ...] = ()
    tokens: dict[str, SecretRef] = Field(default_factory=dict)
    login: Login | None = None


def test_references_to_secrets_are_found_wherever_they_are() -> None:
    settings = Many(logins=(Login(), Login()), tokens={"a": SecretRef(file="b")})
    assert [path for path, _ in secret_refs(settings)] == [
        ("logins", 0, "password"),
        ("logins", 1, "password"),
        ("tokens", "a"),
    ]


def test_references_can_be_replaced_wherever_they_are() -> None:
    raw = {"logins": [{"name": "x"}, {}], "other": 1}
    ref = {"env": "E"}
    assert with_secret(raw, ("logins", 1, "password"), ref) == {
        "logins": [{"name": "x"}, {"password": ref}],
        "other": 1,
    }
    assert with_secret(None, ("login", "password"), ref) == {"login": {"password": ref}}
    assert raw == {"logins": [{"name": "x"}, {}], "other": 1}


def test_only_the_thread_that_is_watched_counts() -> None:
    def look() -> None:
        os.stat("/")
        os.listdir("/")

    with watched() as seen:
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert seen == []
        look()
    assert seen == ["os.stat '/'", "os.listdir '/'"]
    look()
    assert len(seen) == 2


def test_every_usual_way_out_is_watched(tmp_path: Path) -> None:
    before = (os.open, open, socket.socket.__init__)
    with watched() as seen:
        (tmp_path / "file").write_text("x")
        os.path.exists("/")
        list(tmp_path.iterdir())
        tempfile.TemporaryFile().close()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", 1), timeout=5)
        subprocess.run(["true"], check=True)
    ways = [one.split(" ")[0] for one in seen]
    assert {"open", "os.stat", "os.open", "socket.getaddrinfo", "socket.socket", "subprocess.Popen"} <= set(
        ways
    )
    assert f"open {str(tmp_path / 'file')!r}" in seen or f"open {tmp_path / 'file'!r}" in seen
    assert (os.open, open, socket.socket.__init__) == before
