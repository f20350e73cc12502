"""TLS between us and the server."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from firebuild_pki import CAError

from cfssl_servers import Pki, opened

pytestmark = pytest.mark.needs("cfssl")


def refusal(address: str, **block: Any) -> str:
    with pytest.raises(CAError) as caught:
        opened(address, **block)
    return str(caught.value)


def test_a_server_with_tls_is_checked_against_the_ca_file(tls_server: str, pki: Pki) -> None:
    with opened(f"https://{tls_server}", ca_file=pki.root) as authority:
        authority.issue_server()
        assert authority.warnings == ()


def test_paths_may_begin_with_the_home_directory(
    tls_server: str, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(pki.home))
    with opened(f"https://{tls_server}", ca_file="~/root.pem", anchors="~/root.pem") as authority:
        authority.issue_server()


def test_a_server_with_another_ca_is_not_believed(tls_server: str, pki: Pki) -> None:
    said = refusal(f"https://{tls_server}", ca_file=pki.stranger)
    assert f"https://{tls_server}: its TLS certificate is not accepted: unable to get" in said
    assert "hint: ca_file holds the CA" in said


def test_the_system_does_not_know_the_server(tls_server: str) -> None:
    assert "is not accepted" in refusal(f"https://{tls_server}")


def test_a_server_with_another_name_is_not_believed(tls_server: str, pki: Pki) -> None:
    address = f"https://localhost:{tls_server.split(':')[1]}"
    said = refusal(address, ca_file=pki.root)
    assert "hostname mismatch" in said
    assert "hint: address has to have a name" in said


def test_a_server_may_want_a_certificate_of_ours(mutual_tls_server: str, pki: Pki) -> None:
    client: dict[str, Any] = {"client_cert": pki.client, "client_key": pki.client_key}
    with opened(f"https://{mutual_tls_server}", ca_file=pki.root, **client) as authority:
        authority.issue_server()
        assert authority.warnings == ()


def test_without_a_certificate_such_a_server_refuses_us(mutual_tls_server: str, pki: Pki) -> None:
    said = refusal(f"https://{mutual_tls_server}", ca_file=pki.root)
    assert f"https://{mutual_tls_server}: " in said
    assert "wants client_cert and client_key" in said


def test_https_to_a_server_without_tls(server: str) -> None:
    said = refusal(f"https://{server}")
    assert "it does not speak TLS" in said
    assert "one without TLS wants http" in said


def test_http_to_a_server_with_tls(tls_server: str) -> None:
    # Go's server says 400 and hangs up, and the one may overtake the other
    said = refusal(tls_server)
    assert "this port speaks TLS, not plain http" in said or "wants https" in said


def test_an_unreadable_ca_file(pki: Pki, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    assert f"cannot read ca_file {missing}: No such file" in refusal("https://127.0.0.1:1", ca_file=missing)
    missing.write_text("not PEM")
    assert f"PEM certificates in ca_file {missing}" in refusal("https://127.0.0.1:1", ca_file=missing)


def test_a_key_of_another_certificate(pki: Pki) -> None:
    pair: dict[str, Any] = {"client_cert": pki.client, "client_key": pki.tls_key}
    said = refusal("https://127.0.0.1:1", ca_file=pki.root, **pair)
    assert "client_cert and client_key cannot be used: key values mismatch" in said


@pytest.mark.needs("openssl")
def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_passphrase(pki: Pki, tmp_path: Path) -> None:
    encrypted = tmp_path / "encrypted.pem"
    files = ["-in", str(pki.client_key), "-out", str(encrypted)]
    convert = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", *files]
    subprocess.run(convert, check=True, capture_output=True)
    said = refusal("https://127.0.0.1:1", client_cert=pki.client, client_key=encrypted)
    assert "client_key cannot be used: the key is encrypted" in said
