"""The facade: what callers get, and what they are told when something is wrong."""

from __future__ import annotations

import gc
import logging
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from firebuild_pki import (
    AuthorityClosed,
    CAError,
    CASettings,
    IdentityError,
    MaterialError,
    ProviderContext,
    SettingsError,
    TLSMaterial,
    UnsupportedOperation,
    open_authority,
)
from firebuild_pki.providers.embedded import EmbeddedProvider, EmbeddedSettings
from pki import characters
from pki.tools import NOW, Clock, ca_settings, catalog_of, certificates, handshake, leaf_of, opened, pem


def test_without_settings_the_embedded_ca_opens() -> None:
    with open_authority() as authority:
        assert authority.provider_name == "embedded"
        server, guest = authority.issue_server(), authority.issue_guest()
        assert authority.check() == ()
        assert authority.trust_pem == server.trust_pem == guest.trust_pem
    assert handshake(server.ssl_context(server_side=True), guest.ssl_context(), server.server_name)


def test_made_up_build_ids_differ() -> None:
    with open_authority() as one, open_authority() as other:
        assert one.build_id != other.build_id


def test_both_ends_know_the_name_of_the_server_and_their_own() -> None:
    with open_authority({"name_suffix": "ci.example"}, build_id="b7") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    assert (server.server_name, server.identity) == ("b7.ci.example", "b7.ci.example")
    assert (guest.server_name, guest.identity) == ("b7.ci.example", "guest.b7.ci.example")


def test_material_tells_the_fingerprint_and_validity_of_its_leaf() -> None:
    with open_authority(build_id="b", clock=Clock()) as authority:
        material = authority.issue_guest()
        leaf = leaf_of(material)
        issuer = certificates(material.certificate_chain_pem)[1]
        assert authority.issuer_fingerprint == issuer.fingerprint(hashes.SHA256()).hex()
    assert material.fingerprint_sha256 == leaf.fingerprint(hashes.SHA256()).hex()
    assert material.not_before == leaf.not_valid_before_utc
    assert material.not_after == leaf.not_valid_after_utc == NOW + timedelta(hours=1)


@pytest.mark.parametrize("intermediate", [True, False])
def test_the_issuer_is_known_before_anything_is_issued(intermediate: bool) -> None:
    with open_authority({"embedded": {"intermediate": intermediate}}) as authority:
        before = authority.issuer_fingerprint
        authority.issue_server()
        assert authority.issuer_fingerprint == before


def test_certificates_of_another_authority_are_strangers() -> None:
    with open_authority(build_id="b") as one, open_authority(build_id="b") as other:
        server, guest = one.issue_server(), other.issue_guest()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server.ssl_context(server_side=True), guest.ssl_context(), server.server_name)


def test_neither_end_can_play_the_other() -> None:
    with open_authority(build_id="b") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(guest.ssl_context(server_side=True), guest.ssl_context(), guest.identity)
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(server.ssl_context(server_side=True), server.ssl_context(), server.server_name)


def test_another_server_name_is_refused() -> None:
    with open_authority(build_id="b") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server.ssl_context(server_side=True), guest.ssl_context(), "c.firebuild.internal")


def test_trusting_the_intermediate_alone_is_enough_for_the_standard_library() -> None:
    with open_authority(build_id="b") as authority:
        ends = authority.issue_server(), authority.issue_guest()
    server, guest = (replace(end, trust_pem=pem(certificates(end.certificate_chain_pem)[1])) for end in ends)
    handshake(server.ssl_context(server_side=True), guest.ssl_context(), server.server_name)


def test_by_default_the_certificate_outlives_the_deadline() -> None:
    deadline = NOW + timedelta(hours=3)
    with open_authority(clock=Clock()) as authority:
        material = authority.issue_server(build_deadline=deadline)
        assert authority.warnings == ()
    assert material.not_after == deadline + timedelta(minutes=5)


def test_a_capped_lifetime_is_a_warning_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"embedded": {"leaf_lifetime": "30m"}}
    with open_authority(settings, clock=Clock()) as authority:
        for _ in range(2):
            authority.issue_server(build_deadline=NOW + timedelta(minutes=20))
        text = (
            "the CA capped the lifetime of the server certificate: "
            "asked until 2030-05-17 13:00:00Z, got 2030-05-17 12:30:00Z"
        )
        assert authority.warnings == (text,)
    assert [record.getMessage() for record in caplog.records] == [f"ca-provider(embedded): {text}"]


def test_a_lifetime_that_does_not_cover_the_build_is_an_error() -> None:
    settings = {"embedded": {"leaf_lifetime": "30m"}}
    with (
        open_authority(settings, build_id="b", clock=Clock()) as authority,
        pytest.raises(MaterialError) as caught,
    ):
        authority.issue_guest(build_deadline=NOW + timedelta(minutes=31))
    text = str(caught.value)
    assert text.startswith('ca-provider(embedded): "CN=guest.b.firebuild.internal" (sha256 ')
    assert "is valid until 2030-05-17 12:30:00Z, but the build may need it until" in text
    assert "2030-05-17 12:31:00Z (hint: shorten the build's timeout" in text


def test_a_ca_that_ends_before_the_build_is_an_error() -> None:
    settings = {"embedded": {"ca_lifetime": "30m"}}
    with (
        open_authority(settings, clock=Clock()) as authority,
        pytest.raises(MaterialError, match="may need it until"),
    ):
        authority.issue_server(build_deadline=NOW + timedelta(minutes=31))


def test_a_deadline_without_timezone_is_refused() -> None:
    with open_authority() as authority, pytest.raises(CAError, match="timezone-aware"):
        authority.issue_server(build_deadline=datetime(2030, 1, 1))


def test_a_lifetime_of_nothing_is_refused() -> None:
    with (
        open_authority() as authority,
        pytest.raises(CAError, match="expected a lifetime above zero, found 0 s"),
    ):
        authority.issue_server(ttl=timedelta(0))


@pytest.mark.parametrize("build_id", ["", "A", "-a", "a-", "a.b", "a_b", "a b", "ü", "a" * 64, "a\n"])
def test_build_ids_must_be_dns_labels(build_id: str) -> None:
    with pytest.raises(IdentityError, match="expected a build id that is a DNS label"):
        open_authority(build_id=build_id)


@pytest.mark.parametrize("suffix", ["", "Upper.example", "a..b", ".a", "a b.c"])
def test_name_suffixes_must_be_domains(suffix: str) -> None:
    with pytest.raises(IdentityError, match="expected a lower-case domain as name suffix"):
        open_authority({"name_suffix": suffix}, build_id="b")


def test_names_longer_than_dns_allows_are_refused() -> None:
    suffix = ".".join(["x" * 60] * 4)
    with pytest.raises(IdentityError, match="longer than 253 characters"):
        open_authority({"name_suffix": suffix}, build_id="b" * 10)


def test_after_close_nothing_is_issued_and_closing_again_is_fine() -> None:
    authority = open_authority(build_id="b")
    assert repr(authority) == "<Authority embedded for build b, open>"
    authority.close()
    authority.close()
    assert repr(authority) == "<Authority embedded for build b, closed>"
    with pytest.raises(AuthorityClosed, match=r"^ca-provider\(embedded\): the authority is closed$"):
        authority.issue_server()
    with pytest.raises(AuthorityClosed):
        authority.check()


def test_the_embedded_ca_cannot_revoke_and_says_so() -> None:
    with open_authority() as authority:
        material = authority.issue_guest()
        with pytest.raises(UnsupportedOperation, match="cannot revoke"):
            authority.revoke(material)


def test_many_threads_may_issue_at_once() -> None:
    barrier = threading.Barrier(8)
    with open_authority(build_id="b") as authority, ThreadPoolExecutor(8) as pool:

        def issue(number: int) -> str:
            barrier.wait()
            make = authority.issue_server if number % 2 else authority.issue_guest
            return make().fingerprint_sha256

        assert len(set(pool.map(issue, range(16)))) == 16


def test_the_private_key_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with open_authority({"embedded": {"leaf_lifetime": "1m"}}) as authority:
        material = authority.issue_server()
        shown = [repr(material), str(material), repr(authority), caplog.text, *authority.warnings]
    secret = material.private_key_pem.decode().splitlines()[1]
    assert len(secret) == 64
    assert not any(secret in text or "PRIVATE" in text for text in shown)


def test_an_ssl_context_leaves_no_key_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with open_authority() as authority:
        context = authority.issue_server().ssl_context(server_side=True)
    assert list(tmp_path.iterdir()) == []
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.root
@pytest.mark.needs("root")
def test_an_ssl_context_without_proc_is_an_error_that_says_so() -> None:
    script = """
from firebuild_pki import MaterialError, open_authority
with open_authority() as authority:
    try:
        authority.issue_server().ssl_context(server_side=True)
    except MaterialError as error:
        print(error)
"""
    command = ["unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("/proc is not mounted, and Python's ssl reads a key")


def test_wrong_settings_are_told_by_path() -> None:
    with pytest.raises(SettingsError) as caught:
        open_authority({"embedded": {"key_typ": "p256"}})
    assert str(caught.value) == (
        'settings: ca.embedded.key_typ: unknown setting (hint: did you mean "key_type"?)'
    )


def test_settings_objects_can_be_made_by_hand() -> None:
    settings = CASettings.model_validate({"name_suffix": "lab.example", "key_type": "p384"})
    with open_authority(settings, build_id="x") as authority:
        assert authority.issue_server().identity == "x.lab.example"


def test_the_embedded_ca_forgets_its_keys() -> None:
    provider = EmbeddedProvider(EmbeddedSettings(), ProviderContext(Clock(), {}))
    provider.open()
    assert provider.trust_bundle()
    provider.close()
    with pytest.raises(AuthorityClosed, match="the embedded CA has no keys"):
        provider.trust_bundle()


def test_names_keep_the_ends_apart_where_both_may_play_both() -> None:
    with opened("both-usages") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(guest.ssl_context(server_side=True), guest.ssl_context(), guest.server_name)
    # the other way round it is the pin of the guest's certificate: tests/service
    assert server.fingerprint_sha256 != guest.fingerprint_sha256


def reachable_from(start: object) -> Iterator[object]:
    """Walk over all objects that something keeps alive; modules, classes and code are everybody's."""
    seen, pending = {id(start)}, [start]
    while pending:
        one = pending.pop()
        yield one
        kept = one.__closure__ or () if isinstance(one, FunctionType) else gc.get_referents(one)
        for below in kept:
            if id(below) not in seen and not isinstance(below, ModuleType | type | CodeType):
                seen.add(id(below))
                pending.append(below)


def keys_in(start: object, materials: Iterable[TLSMaterial]) -> list[object]:
    secrets = [material.private_key_pem for material in materials]
    lines = [secret.splitlines()[1] for secret in secrets]
    return [
        one
        for one in reachable_from(start)
        if isinstance(one, ec.EllipticCurvePrivateKey)
        or (isinstance(one, bytes | bytearray) and any(line in one for line in lines))
        or (isinstance(one, str) and any(line.decode() in one for line in lines))
    ]


@pytest.mark.parametrize("name", ["embedded", "revoker", "pairs"])
@pytest.mark.parametrize("failing", [False, True])
def test_an_authority_keeps_no_key_that_it_handed_out(name: str, failing: bool) -> None:
    settings = ca_settings({"provider": name}, catalog_of("revoker", "pairs"))
    authority = open_authority(settings, build_id="b", clock=Clock())
    with authority:
        issued = [authority.issue_server(), authority.issue_guest(), authority.issue_guest()]
        assert keys_in(issued[0], issued)
        if failing:
            with pytest.raises(CAError):
                authority.issue_guest(build_deadline=NOW.replace(year=2099))
        # The provider has keys of its own as long as it is open, and this search finds them.
        assert name == "pairs" or keys_in(authority, issued)
        assert not [one for one in keys_in(authority, issued) if isinstance(one, bytes | str)]
    assert keys_in(authority, issued) == []
    assert all(material.private_key_pem not in repr(vars(authority)).encode() for material in issued)


def test_certificates_can_be_revoked_without_their_keys_being_kept() -> None:
    settings = ca_settings({"provider": "revoker", "revoke_at_end": True}, catalog_of("revoker"))
    characters.REVOKED.clear()
    with open_authority(settings, build_id="b", clock=Clock()) as authority:
        issued = [authority.issue_server(), authority.issue_guest()]
        assert not [one for one in keys_in(authority, issued) if isinstance(one, bytes | str)]
    assert [certificates(one)[0] for one in characters.REVOKED] == [leaf_of(one) for one in issued]


@pytest.mark.parametrize("settings", ["ca.yaml", ["provider"], 3, ""])
def test_settings_that_are_no_mapping_are_refused_in_words(settings: Any) -> None:
    with pytest.raises(SettingsError, match="ca: expected a mapping, found a"):
        open_authority(settings)
