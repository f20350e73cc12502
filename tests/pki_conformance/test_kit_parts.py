"""Parts of the kit on their own: what no provider of the suites makes them do."""

from __future__ import annotations

import os
import threading

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
