"""Types of settings: durations, and secrets that are references."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from firebuild_pki import ProviderContext, SecretError, SecretRef, parse_document, validate
from firebuild_pki.provider import utc_now
from pki.models import Server, problems


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Server(address="a").port = 1  # type: ignore[misc]


def test_durations_are_written_the_way_they_are_read() -> None:
    server = validate(Server, parse_document("{address: a, timeout: 1h30m}"))
    assert server.timeout == timedelta(minutes=90)
    assert server.model_dump(mode="json")["timeout"] == "1h30m"
    assert Server(address="a", timeout=timedelta(seconds=1)).timeout == timedelta(seconds=1)


@pytest.mark.parametrize("written", ["876001h", "99999999h", "101y"])
def test_a_duration_that_no_clock_reaches_is_refused(written: str) -> None:
    (problem,) = problems(f"server: {{address: a, timeout: {written}}}")
    assert problem == (
        f'fb.yaml:1:31: server.timeout: expected a duration of 876000h at most, found "{written}"'
    )


def test_secrets_are_fetched_from_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s.12345\n")
    assert SecretRef(file=str(tmp_path / "token")).resolve({}) == "s.12345"
    assert SecretRef(env="TOKEN").resolve({"TOKEN": "s.6789"}) == "s.6789"
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfs.12345\r\n")  # by an editor of Windows
    assert SecretRef(file=str(tmp_path / "token")).resolve({}) == "s.12345"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"env": "TOKEN"}, "expected a secret in the environment variable TOKEN, but it is not set"),
        (
            {"env": "hvs.CAESIJ-secret"},
            "expected a secret in an environment variable, but the name in {env: NAME} (not shown) is "
            "that of none",
        ),
        ({"env": "EMPTY"}, "expected a secret in the environment variable EMPTY, but it is empty"),
        ({"file": "empty"}, "expected a secret in the file empty, but it is empty"),
        ({"file": "./none"}, "cannot read a secret from the file ./none: No such file or directory"),
        (
            {"file": "hvs.CAESIJ"},
            "cannot read a secret from a file, because what {file: PATH} names (not shown) is not there",
        ),
        (
            {"file": "s" * 300},
            "cannot read a secret from a file, because what {file: PATH} names (not shown) is not there",
        ),
        ({"env": "BINARY"}, "expected a secret in the environment variable BINARY, but it is not UTF-8 text"),
        ({"file": "binary"}, "expected a secret in the file binary, but it is not UTF-8 text"),
        (
            {"file": "/dev/zero"},
            "expected a secret in the file /dev/zero, but it has more than 1048576 bytes",
        ),
        (
            {"file": "~nobody-here/token"},
            "cannot read a secret from the file ~nobody-here/token: No such file or directory",
        ),
    ],
)
def test_a_secret_that_is_not_there_is_named(
    reference: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SecretError) as caught:
        SecretRef(**reference).resolve({"EMPTY": "", "BINARY": "\udcff"})
    assert caught.value.message == message
    assert bool(caught.value.hint) == ("empty" not in message)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("s.SECRET", "a string (not shown)"),
        ("5551234", "a number (not shown)"),
        ("{value: s.SECRET}", "a mapping (not shown)"),
        ("[s.SECRET]", "a list (not shown)"),
        ("{env: A, file: s.SECRET}", "both"),
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated(written: str, found: str) -> None:
    (problem,) = problems(f"server: {{address: a, auth: {{method: token, token: {written}}}}}")
    assert problem == (
        f"fb.yaml:1:51: server.auth.token: expected a reference to a secret, found {found} "
        "(hint: write {env: NAME} or {file: PATH}; secrets do not belong in this file)"
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{env: ''}", "expected the name of an environment variable for a secret, found nothing"),
        ("{file: ''}", "expected a path for a secret, found nothing"),
        (
            "{env: TOKEN=s.SECRET}",
            "expected the name of an environment variable for a secret, found something else (not shown)",
        ),
        (
            "{env: $SECRET}",
            "expected the name of an environment variable for a secret, found something else (not shown)",
        ),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused(written: str, message: str) -> None:
    (problem,) = problems(f"server: {{address: a, auth: {{method: token, token: {written}}}}}")
    assert problem.startswith(f"fb.yaml:1:51: server.auth.token: {message} (hint: write ")
    assert "SECRET" not in problem


def test_an_unknown_key_of_a_reference_is_not_repeated_either() -> None:
    text = "server: {address: a, auth: {method: token, token: {env: A, value: s.SECRET}}}"
    (problem,) = problems(text)
    assert "token.value: unknown setting" in problem
    assert "SECRET" not in problem


def test_references_show_where_the_secret_is_and_no_more() -> None:
    assert repr(SecretRef(env="TOKEN")) == "SecretRef(env='TOKEN')"
    assert repr(SecretRef(file="/run/t")) == "SecretRef(file='/run/t')"


def test_secrets_are_resolved_with_the_given_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "from the process")
    with pytest.raises(SecretError):
        SecretRef(env="TOKEN").resolve({})
    assert SecretRef(env="TOKEN").resolve(os.environ) == "from the process"


def test_what_a_provider_may_use_does_not_show_the_environment() -> None:
    assert "s.SECRET" not in repr(ProviderContext(utc_now, {"TOKEN": "s.SECRET"}))
