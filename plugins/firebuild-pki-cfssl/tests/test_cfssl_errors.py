"""Every refusal and every fault, in words that say what to do."""

from __future__ import annotations

import logging
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from firebuild_pki import AuthorityClosed, CAError, Profile, SignRequest, open_authority
from firebuild_pki.keys import generate_key
from firebuild_pki.x509 import Validity, make_root, to_pem

import firebuild_pki_cfssl.client
from cfssl_servers import KEY, LABEL, Pki, bare, free_port, now, opened, section
from stub_server import Stub, refusal, success

needs_cfssl = pytest.mark.needs("cfssl")


def error_of(address: str, *, key: str = KEY, **block: Any) -> CAError:
    """Open, issue for the server, and return what went wrong; the key must not be in it."""
    with pytest.raises(CAError) as caught, opened(address, key=key, **block) as authority:
        authority.issue_server()
    cause: BaseException | None = caught.value
    while cause is not None:
        assert key not in str(cause)
        assert key not in repr(cause)
        cause = cause.__cause__
    return caught.value


@needs_cfssl
def test_a_wrong_key(server: str) -> None:
    error = error_of(server, key="00" * 16)
    assert str(error) == (
        "ca-provider(cfssl): the server does not accept the authentication key (cfssl: "
        '"invalid token") (hint: auth_key has to be the key that profile "firebuild-server" '
        "names in the server's auth_keys)"
    )


@needs_cfssl
def test_a_wrong_key_for_a_multirootca(multiroot_server: str) -> None:
    error = error_of(multiroot_server, key="00" * 16, label=LABEL)
    assert "does not accept the authentication key" in error.message


@pytest.mark.parametrize("key", ["the secret", "abc", "\t"])
def test_a_key_that_is_none(key: str) -> None:
    error = error_of("127.0.0.1:1", key=key)
    assert "auth_key is not hexadecimal" in str(error)


@needs_cfssl
@pytest.mark.parametrize("label", ["", LABEL])
def test_a_profile_without_authentication(server: str, multiroot_server: str, label: str) -> None:
    error = error_of(multiroot_server if label else server, label=label, server_profile="open")
    assert 'profile "open" signs without authentication' in error.message
    assert error.hint == 'give profile "open" an auth_key in the server\'s configuration'


@needs_cfssl
def test_a_profile_that_a_multirootca_does_not_have(multiroot_server: str) -> None:
    error = error_of(multiroot_server, label=LABEL, server_profile="typo")
    assert 'the server has no profile "typo"' in error.message
    assert "server_profile" in str(error.hint)


@needs_cfssl
def test_a_label_that_a_multirootca_does_not_have(multiroot_server: str) -> None:
    error = error_of(multiroot_server, label="typo")
    assert 'the server has no CA with the label "typo"' in error.message
    assert "-roots" in str(error.hint)


@needs_cfssl
def test_a_multirootca_that_serves_other_networks(multiroot_server: str) -> None:
    error = error_of(multiroot_server, label="elsewhere")
    assert "does not serve the address of this machine" in error.message
    assert 'nets of the section "elsewhere"' in str(error.hint)


@needs_cfssl
def test_a_name_that_the_policy_forbids(server: str) -> None:
    error = error_of(server, server_profile="elsewhere")
    assert 'the name_whitelist of profile "elsewhere"' in error.message
    assert "<build-id>.<name_suffix>" in str(error.hint)


@needs_cfssl
def test_a_multirootca_does_not_say_why(multiroot_server: str) -> None:
    error = error_of(multiroot_server, label=LABEL, server_profile="elsewhere")
    assert "does not say why" in error.message
    assert 'name_whitelist of profile "elsewhere"' in str(error.hint)


def test_nobody_listens() -> None:
    port = free_port()
    error = error_of(f"127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port}: connection refused" in error.message
    assert error.hint == "is cfssl running, and listening on that address? one with TLS wants https"
    assert error.retryable


def test_a_host_that_does_not_exist() -> None:
    assert "https://cfssl.invalid: its name can't be" in error_of("https://cfssl.invalid").message


def test_no_answer(stub: Stub) -> None:
    stub.answers = [None]
    error = error_of(stub.address, timeout="100ms")
    assert f"{stub.address}: no answer in time" in error.message
    assert error.retryable


def test_who_waits_for_a_verdict_has_it_after_one_attempt(stub: Stub) -> None:
    stub.answers = [(503, b"busy")]
    with pytest.raises(CAError, match="HTTP status 503"):
        open_authority(section(stub.address, attempts=3), environ={"CFSSL_KEY": KEY}, patient=False)
    assert len(stub.paths) == 1


def test_something_that_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        error = error_of(address, attempts=1)
        thread.join()
    assert f"http://{address}: it does not answer in HTTP" in error.message


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((200, b"<html>hello</html>"), "200"),
        ((404, b"404 page not found"), "404"),
        ((200, b'["success"]'), "200"),
        ((200, b"{}"), "200"),
        ((500, b"\xff\xfe"), "500"),
    ],
)
def test_something_else_than_cfssl(stub: Stub, answer: tuple[int, bytes], found: str) -> None:
    stub.answers = [answer]
    error = error_of(stub.address, attempts=3)
    expected = f"expected an answer of cfssl from {stub.address}, found HTTP status {found}"
    assert error.message == expected
    assert error.hint == "address has to lead to cfssl serve or multirootca"
    assert len(stub.paths) == 1


def test_redirects_lead_nowhere(stub: Stub) -> None:
    stub.answers = [(302, b"")]
    assert "found HTTP status 302" in error_of(stub.address).message


@needs_cfssl
def test_a_server_that_does_not_offer_authentication(stub: Stub, pki: Pki) -> None:
    stub.answers = [success(certificate=pki.ca.read_text()), (404, b"404 page not found")]
    error = error_of(stub.address)
    assert error.hint == "cfssl offers authsign only if one of its profiles has an auth_key"


def test_an_overloaded_server_is_asked_again(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firebuild_pki_cfssl.client, "PAUSE", 0.01)
    stub.answers = [(503, b"busy")]
    error = error_of(stub.address, attempts=3)
    assert "found HTTP status 503" in error.message
    assert error.retryable
    assert len(stub.paths) == 3


@needs_cfssl
def test_a_server_that_comes_back_is_enough(stub: Stub, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firebuild_pki_cfssl.client, "PAUSE", 0.01)
    stub.answers = [(502, b"oops"), success(certificate=pki.ca.read_text())]
    opened(stub.address, attempts=2).close()
    assert len(stub.paths) == 2


def test_an_unknown_refusal_is_quoted_on_one_line_and_not_at_length(stub: Stub) -> None:
    stub.answers = [refusal("no\nsuch luck" + "!" * 1000)]
    message = error_of(stub.address).message
    assert message.startswith('cfssl refused the request: "no such luck!!')
    assert len(message) < 300


def test_a_refusal_without_words(stub: Stub) -> None:
    stub.answers = [(400, b'{"success": false, "errors": null}')]
    assert '"HTTP status 400"' in error_of(stub.address).message


def test_an_answer_without_a_certificate(stub: Stub) -> None:
    stub.answers = [success()]
    assert "expected a certificate in the answer of cfssl, found none" in error_of(stub.address).message
    stub.answers = [(200, b'{"success": true, "result": null}')]
    assert "expected a certificate" in error_of(stub.address).message


def test_a_proxy_in_front_can_log_what_a_certificate_is_for(stub: Stub) -> None:
    hour = Validity.starting(now(), timedelta(hours=1), backdate=timedelta(minutes=1))
    ca = to_pem([make_root(generate_key(), hour, with_intermediate=False).certificate]).decode()
    stub.answers = [success(certificate=ca), refusal("not today")]
    error_of(stub.address)
    (headers,) = [one for one, path in zip(stub.headers, stub.paths, strict=True) if path.endswith("sign")]
    assert headers["X-Firebuild-Build"] == "b1"


def test_a_certificate_that_is_none(stub: Stub) -> None:
    stub.answers = [success(certificate="junk")]
    assert "expected a certificate in the answer of cfssl, found none" in error_of(stub.address).message


@needs_cfssl
def test_anchors_that_cannot_be_read(server: str, tmp_path: Path) -> None:
    error = error_of(server, anchors=tmp_path / "missing.pem")
    assert f"cannot read ca.cfssl.anchors {tmp_path}/missing.pem: No such file or directory" in error.message
    (tmp_path / "missing.pem").write_text("not PEM")
    error = error_of(server, anchors=tmp_path / "missing.pem")
    assert f"expected PEM certificates in ca.cfssl.anchors {tmp_path}/missing.pem" in error.message
    assert "it has more than" in error_of(server, anchors=Path("/dev/zero")).message


@needs_cfssl
def test_anchors_of_another_ca(server: str, pki: Pki) -> None:
    assert "missing link" in error_of(server, anchors=pki.stranger).message


@needs_cfssl
def test_the_key_is_in_no_log_and_no_repr(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with opened(server) as authority:
        authority.check()
        authority.issue_server()
        shown = "".join(map(repr, (authority, *vars(authority).values())))
    assert KEY not in caplog.text + shown
    assert bytes.fromhex(KEY).hex() not in shown
    assert repr(bytes.fromhex(KEY)) not in shown


@needs_cfssl
def test_a_path_in_the_address_is_kept(stub: Stub, pki: Pki) -> None:
    stub.answers = [success(certificate=pki.ca.read_text())]
    opened(f"{stub.address}/pki/").close()
    assert stub.paths == ["/pki/api/v1/cfssl/info"]


@needs_cfssl
def test_after_closing_nothing_is_signed(server: str) -> None:
    provider = bare(server)
    provider.open()
    provider.close()
    provider.close()
    with pytest.raises(AuthorityClosed, match="not open"):
        provider.sign(SignRequest(b"", Profile.SERVER, (), timedelta(hours=1), "b1"))
