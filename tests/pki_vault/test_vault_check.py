"""The preflight of the provider: one row for each thing looked at."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from baoserver import StoredServer, add_role, create_token, mount_pki, sign_policy, write_policy
from baoserver.pki import SUFFIX
from baoserver.process import free_port
from firebuild_pki import CAError, MaterialError, Note, NoteLevel, ProviderError, open_authority
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.provider import Profile, ProviderContext
from firebuild_pki.providers.vault.checks import _credentials, role_notes
from firebuild_pki.providers.vault.provider import VaultProvider
from firebuild_pki.providers.vault.transport import Answer
from pki.tools import leaf_of
from pki_vault.scripted import Reply, scripted
from pki_vault.tools import ENVIRON, Backend, raises

pytestmark = pytest.mark.needs("bao")


def checked(backend: Backend, *, ahead: timedelta = timedelta(0), **changes: Any) -> list[Note]:
    """The notes of a provider, fatal ones included."""
    settings = backend.settings(**changes).provider_settings
    context = ProviderContext(lambda: datetime.now(UTC) + ahead, backend.environ)
    provider = VaultProvider(settings, context)  # type: ignore[arg-type]
    provider.open()
    try:
        return list(provider.check())
    finally:
        provider.close()


def about(notes: list[Note], subject: str) -> list[Note]:
    return [note for note in notes if note.about == subject]


def test_a_good_backend_has_a_good_word_for_everything(backend: Backend) -> None:
    notes = checked(backend)
    assert {note.level for note in notes} == {NoteLevel.OK}
    (reachable,), (clock,) = about(notes, "reachable"), about(notes, "clock")
    assert reachable.message.startswith(f"{backend.api.address}: version ")
    assert reachable.message.endswith(", unsealed, active")
    assert "this machine" in clock.message
    (credentials,), (ca,) = about(notes, "credentials"), about(notes, "ca")
    assert "valid for " in credentials.message
    assert backend.policy in credentials.message
    assert "Intermediate of pki" in ca.message
    assert [note.message for note in about(notes, "role")] == [
        "role server: signs names below firebuild.internal for up to 24h",
        "role guest: signs names below firebuild.internal for up to 24h",
    ]


def test_the_root_token_is_too_mighty(backend: Backend) -> None:
    (note,) = about(checked(backend.with_token(backend.api.token)), "credentials")
    assert (note.level, note.path) == (NoteLevel.WARNING, "auth")
    assert "it may do anything" in note.message
    assert "without an end" in note.message


def test_what_the_policy_hides_is_a_warning(backend: Backend) -> None:
    rules = 'path "pki/sign/server" { capabilities = ["update"] }'
    policy = write_policy(backend.api, "server-only", rules)
    token = create_token(backend.api, policy, no_default_policy=True)
    notes = checked(backend.with_token(token))
    (credentials,) = about(notes, "credentials")
    assert credentials.level is NoteLevel.WARNING
    assert credentials.message == (
        "the token cannot be looked at: it is valid, but its policies do not allow that"
    )
    assert credentials.hint == 'allow it with: path "auth/token/lookup-self" { capabilities = ["read"] }'
    for note, role in zip(about(notes, "role"), ("server", "guest"), strict=True):
        assert note.level is NoteLevel.WARNING
        assert f"role {role}: cannot be looked at" in note.message
        assert f'path "pki/roles/{role}" {{ capabilities = ["read"] }}' in str(note.hint)


def test_a_policy_that_is_too_small_is_not_taken_for_a_bad_token(backend: Backend) -> None:
    # though it does not even allow the token to be looked at
    rules = 'path "pki/roles/*" { capabilities = ["read"] }'
    token = create_token(backend.api, write_policy(backend.api, "signs-not", rules), no_default_policy=True)
    with (
        backend.with_token(token).open() as authority,
        raises(
            ProviderError,
            "permission denied for pki/sign/server: the policies of the token do not allow it",
            'the policy needs: path "pki/sign/server" { capabilities = ["update"] }',
        ),
    ):
        authority.issue_server()


def test_a_token_that_cannot_be_looked_at_for_another_reason_has_the_servers_words() -> None:
    class Odd:
        def call(self, *_: object) -> Answer:
            return Answer("http://v", 404, {"errors": ["no such path"]})

        def words_of(self, answer: Answer) -> str:
            return answer.errors

    note, valid = _credentials(Odd(), None)  # type: ignore[arg-type]
    assert (note.message, valid) == ("the token cannot be looked at: no such path", False)
    assert str(note.hint).startswith("allow it with: path")


def test_a_role_that_is_not_there_is_fatal(backend: Backend) -> None:
    root = backend.with_token(backend.api.token)
    (_, note) = about(checked(root, guest_role="nobody"), "role")
    assert (note.fatal, note.path) == (True, "guest_role")
    assert "there is no role nobody in pki" in note.message


def test_a_role_that_does_not_fit_stops_the_preflight_in_words(backend: Backend, unique: str) -> None:
    add_role(backend.api, unique, use="client", suffix="example.com")
    root = backend.with_token(backend.api.token)
    words = (
        "set server_flag=true",
        unique,
        f"it allows example.com, but the names of builds are below {SUFFIX}",
    )
    with root.open(server_role=unique) as authority, raises(CAError, *words):
        authority.check()


@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [
        (timedelta(0), NoteLevel.OK, "this machine"),
        (timedelta(minutes=-5), NoteLevel.WARNING, "300 s ahead of this machine"),
        (timedelta(minutes=5), NoteLevel.WARNING, "s behind this machine"),
    ],
)
def test_clocks_are_compared(ahead: timedelta, level: NoteLevel, words: str, backend: Backend) -> None:
    (note,) = about(checked(backend, ahead=ahead), "clock")
    assert note.level is level
    assert words.removeprefix("300 ") in note.message


def test_a_node_that_is_away_is_a_warning_while_another_is_there(backend: Backend) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    away, there = about(checked(backend, address=[closed, backend.api.address]), "reachable")
    assert (away.level, there.level) == (NoteLevel.WARNING, NoteLevel.OK)
    assert away.message == f"{closed}: connection refused"


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        (429, NoteLevel.OK, "unsealed, standby"),
        (473, NoteLevel.OK, "unsealed, performance standby"),
        (472, NoteLevel.WARNING, "a secondary for disaster recovery"),
        (503, NoteLevel.WARNING, "sealed"),
        (501, NoteLevel.WARNING, "not initialised"),
        (418, NoteLevel.WARNING, "in an unknown state (418)"),
    ],
)
def test_states_of_nodes(status: int, level: NoteLevel, words: str, backend: Backend) -> None:
    answer = Reply(status, {"version": "1.20.1"}, {"Date": "long ago"})
    with scripted(answer) as node:
        notes = checked(backend, address=[backend.api.address, node.address])
    (_, note) = about(notes, "reachable")
    assert note.level is level
    assert f"version 1.20.1, {words}" in note.message


def test_a_server_sealed_after_opening_is_named(stored_server: StoredServer) -> None:
    backend = Backend.prepared(stored_server.api, "pki")
    with backend.open(retry_for="100ms") as authority:
        stored_server.seal()
        with raises(CAError, "sealed"):
            authority.check()


@pytest.mark.parametrize(
    ("ahead", "level"),
    [
        (timedelta(hours=-2), NoteLevel.OK),
        (timedelta(days=25), NoteLevel.WARNING),
        (timedelta(days=31), NoteLevel.FATAL),
    ],
)
def test_the_end_of_the_ca_is_looked_at(ahead: timedelta, level: NoteLevel, backend: Backend) -> None:
    (note,) = about(checked(backend, ahead=ahead), "ca")
    assert note.level is level
    assert "valid until" in note.message


CONTEXT = ProviderContext(lambda: datetime.now(UTC), {}, name_suffix=SUFFIX)
GOOD = {
    "server_flag": True,
    "client_flag": False,
    "allowed_domains": ["firebuild.internal"],
    "allow_subdomains": True,
    "key_type": "ec",
    "key_usage": ["DigitalSignature"],
    "max_ttl": 86400,
}

ROLES: list[tuple[dict[str, Any], NoteLevel, str]] = [
    ({}, NoteLevel.OK, "signs names below firebuild.internal for up to 24h"),
    ({"max_ttl": 0}, NoteLevel.OK, "for as long as the mount allows"),
    (
        {"allow_subdomains": False, "allow_glob_domains": True, "allowed_domains": ["*.firebuild.internal"]},
        *(NoteLevel.OK, "signs names"),
    ),
    ({"client_flag": True}, NoteLevel.OK, "signs names"),
    ({"server_flag": False}, NoteLevel.FATAL, "set server_flag=true"),
    ({"server_flag": False, "ext_key_usage": ["ServerAuth", "ClientAuth"]}, NoteLevel.OK, "signs names"),
    ({"server_flag": False, "ext_key_usage_oids": ["1.3.6.1.5.5.7.3.1"]}, NoteLevel.OK, "signs names"),
    ({"ext_key_usage": ["TimeStamping"]}, NoteLevel.FATAL, "adds the extended key usage TimeStamping"),
    ({"ext_key_usage_oids": ["1.2.3"]}, NoteLevel.FATAL, "adds the extended key usage 1.2.3"),
    ({"code_signing_flag": True}, NoteLevel.FATAL, "code_signing_flag"),
    ({"key_usage": ["KeyAgreement"]}, NoteLevel.FATAL, "lacks DigitalSignature"),
    ({"key_usage": ["DigitalSignature", "KeyEncipherment"]}, NoteLevel.WARNING, "not just DigitalSignature"),
    ({"key_usage": []}, NoteLevel.WARNING, "not just DigitalSignature"),
    ({"allowed_domains": []}, NoteLevel.FATAL, "it allows no domain"),
    ({"allowed_domains": [], "allow_any_name": True}, NoteLevel.WARNING, "it allows any name"),
    ({"allow_subdomains": False}, NoteLevel.FATAL, "it does not allow subdomains"),
    ({"require_cn": True}, NoteLevel.WARNING, "set require_cn=false"),
    ({"key_type": "ed25519"}, NoteLevel.FATAL, "which gRPC cannot use"),
    ({"key_type": "rsa", "key_bits": 2048}, NoteLevel.WARNING, "requires rsa keys of 2048 bits"),
    ({"not_after": "2030-01-01T00:00:00Z"}, NoteLevel.FATAL, "fixed not_after"),
    ({"max_ttl": 600}, NoteLevel.WARNING, "live for 10m at most, a build asks for 1h"),
]


@pytest.mark.parametrize(("changes", "level", "words"), ROLES)
def test_settings_of_a_role_are_judged(changes: dict[str, Any], level: NoteLevel, words: str) -> None:
    (note,) = role_notes("builds", {**GOOD, **changes}, [Profile.SERVER], CONTEXT, "server_role")
    assert (note.level, note.about) == (level, "role")
    assert words in str(note)


def test_the_longest_lifetime_of_a_role_is_compared_with_what_is_asked_for() -> None:
    two_days, minute = (replace(CONTEXT, lifetime=timedelta(minutes=count)) for count in (2880, 1))
    (note,) = role_notes("builds", GOOD, [Profile.SERVER], two_days, "server_role")
    assert "live for 24h at most, a build asks for 48h" in note.message
    (note,) = role_notes("builds", {**GOOD, "max_ttl": 60}, [Profile.SERVER], minute, "server_role")
    assert note.level is NoteLevel.OK


def test_the_guests_role_has_the_other_flag() -> None:
    (note,) = role_notes("builds", GOOD, [Profile.GUEST], CONTEXT, "guest_role")
    assert note.path == "guest_role"
    assert "it lacks client_flag, which the certificate of the guest needs" in str(note)


def test_one_role_for_both_ends_needs_both_flags() -> None:
    (note,) = role_notes("builds", {**GOOD, "server_flag": False}, list(Profile), CONTEXT, "role")
    assert "it lacks server_flag and client_flag" in note.message
    assert "the certificate of the server and the guest" in note.message


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"allowed_domains": ["example.com"]}, NoteLevel.OK, "signs names below example.com for up to 24h"),
        (
            {"allowed_domains": [], "allowed_uri_sans": ["spiffe://td/*"]},
            NoteLevel.OK,
            "signs spiffe://td/* for",
        ),
        ({"allowed_domains": []}, NoteLevel.FATAL, "it allows neither a domain nor a URI"),
        ({"client_flag": False}, NoteLevel.FATAL, "it lacks client_flag, which the certificate of the peer"),
    ],
)
def test_the_role_of_peers_may_allow_any_names_and_needs_both_flags(
    changes: dict[str, Any], level: NoteLevel, words: str
) -> None:
    role = {**GOOD, "client_flag": True, **changes}
    (note,) = role_notes("workloads", role, [Profile.PEER], CONTEXT, "peer_role")
    assert note.level == level
    assert words in note.message


def test_all_that_is_wrong_with_a_role_is_told_at_once() -> None:
    wrong = {"server_flag": False, "email_protection_flag": True, "allowed_domains": ["example.com"]}
    wrong |= {"key_type": "ed25519", "not_after": "2030-01-01T00:00:00Z", "require_cn": True, "key_usage": []}
    notes = role_notes("builds", {**GOOD, **wrong}, [Profile.SERVER], CONTEXT, "server_role")
    assert len(notes) == len(wrong)


@pytest.mark.parametrize(
    ("domains", "changes", "good"),
    [
        (["internal"], {}, True),
        (["Firebuild.Internal"], {}, False),
        (["example.com", "firebuild.internal"], {}, True),
        (["other.firebuild.internal"], {}, False),
        (["build.internal"], {}, False),
        (["firebuild.internal"], {"allow_subdomains": False, "allow_glob_domains": True}, False),
        (["*.internal"], {"allow_glob_domains": True}, True),
        (["*.internal"], {}, False),
        (["{{identity.entity.name}}.x"], {"allowed_domains_template": True}, True),
    ],
)
def test_the_names_of_builds_have_to_be_below_a_domain_of_the_role(
    domains: list[str], changes: dict[str, Any], good: bool
) -> None:
    role = {**GOOD, "allowed_domains": domains, **changes}
    (note,) = role_notes("builds", role, [Profile.SERVER], CONTEXT, "server_role")
    assert (note.level is NoteLevel.OK) == good
    assert good or f"but the names of builds are below {SUFFIX}" in note.message
    (unknown,) = role_notes("builds", role, [Profile.SERVER], replace(CONTEXT, name_suffix=""), "server_role")
    assert unknown.level is NoteLevel.OK


def test_a_role_with_both_usages_serves_both_ends(backend: Backend) -> None:
    add_role(backend.api, "both", mount="pki", use="both")
    rules = sign_policy("both", mount="pki")
    token = create_token(backend.api, write_policy(backend.api, "sign-both", rules))
    with backend.with_token(token).open(role="both", server_role=None, guest_role=None) as authority:
        assert [note for note in authority.check() if note.level is not NoteLevel.OK] == []
        server, guest = authority.issue_server(), authority.issue_guest()
        handshake(server, guest)
        assert len(authority.warnings) == 2
        assert all("serverAuth" in warning and "clientAuth" in warning for warning in authority.warnings)


def test_a_role_that_lists_usages_instead_of_flags_serves_both_ends(backend: Backend) -> None:
    listed: dict[str, Any] = {
        "server_flag": False,
        "client_flag": False,
        "ext_key_usage": ["ServerAuth", "clientauth"],
    }
    add_role(backend.api, "listed", **listed)
    token = create_token(
        backend.api, write_policy(backend.api, "sign-listed", sign_policy("listed", mount="pki"))
    )
    with backend.with_token(token).open(role="listed/", server_role=None, guest_role=None) as authority:
        assert {note.level for note in authority.check() if note.about == "role"} == {NoteLevel.OK}
        handshake(authority.issue_server(), authority.issue_guest())


def test_the_case_of_a_domain_counts_as_the_server_has_it(backend: Backend) -> None:
    add_role(backend.api, "upper", suffix="FIREBUILD.INTERNAL")
    root = backend.with_token(backend.api.token)
    with root.open(role="upper", server_role=None, guest_role=None) as authority:
        with raises(ProviderError, "it allows FIREBUILD.INTERNAL, but the names of builds are below"):
            authority.check()
        with raises(ProviderError, "not allowed by this role"):
            authority.issue_server()


def test_a_token_of_few_uses_is_enough(backend: Backend) -> None:
    token = create_token(backend.api, backend.policy, num_uses=5)
    with backend.with_token(token).open() as authority:
        assert [note for note in authority.check() if note.level is not NoteLevel.OK] == []
        assert authority.issue_server()
        assert authority.issue_guest()
        with raises(CAError, "permission denied for pki/sign/server: the token is used up (num_uses)"):
            authority.issue_server()


def test_a_token_of_too_few_uses_is_told_by_the_check(backend: Backend) -> None:
    token = create_token(backend.api, backend.policy, num_uses=4)
    with backend.with_token(token).open() as authority:
        (note,) = [note for note in authority.check() if note.level is not NoteLevel.OK]
        assert "good for 1 more requests (num_uses)" in note.message
    last = create_token(backend.api, backend.policy, num_uses=3)
    with backend.with_token(last).open() as authority:
        (note,) = [note for note in authority.check() if note.level is not NoteLevel.OK]
        assert "good for 0 more requests (num_uses)" in note.message


def test_revoked_is_revoked(backend: Backend) -> None:
    with backend.open() as authority:
        material = authority.issue_server()
        authority.revoke(material)
    revoked = backend.api.call("LIST", "pki/certs/revoked")["data"]["keys"]
    assert len(revoked) >= 1


def test_what_another_authority_issued_is_revoked(backend: Backend) -> None:
    with backend.open() as authority:
        material = authority.issue_guest()
    with backend.open() as authority:
        authority.revoke_certificate(material.certificate_chain_pem)
    serial = leaf_of(material).serial_number.to_bytes(20).hex("-").removeprefix("00-")
    assert backend.api.read(f"pki/cert/{serial}")["revocation_time"] > 0
    with open_authority() as other:
        foreign = other.issue_guest().certificate_chain_pem
    with backend.open() as authority, raises(MaterialError, "was not issued by a CA of this provider"):
        authority.revoke_certificate(foreign)


def test_revoking_without_the_right_is_explained(backend: Backend) -> None:
    rules = "\n".join(
        f'path "pki/sign/{role}" {{ capabilities = ["update"] }}' for role in ("server", "guest")
    )
    token = create_token(backend.api, write_policy(backend.api, "no-revoking", rules))
    with (
        raises(
            CAError, "permission denied for pki/revoke", 'path "pki/revoke" { capabilities = ["update"] }'
        ),
        backend.with_token(token).open() as authority,
    ):
        authority.revoke(authority.issue_server())


def test_a_build_longer_than_the_role_allows_is_refused(backend: Backend, unique: str) -> None:
    add_role(backend.api, unique, use="server", max_ttl="10m")
    settings = backend.with_token(backend.api.token).settings(server_role=unique)
    with open_authority(settings, build_id="b1", environ={ENVIRON: backend.api.token}) as authority:
        deadline = datetime.now(UTC) + timedelta(minutes=30)
        with raises(CAError, "is valid until", "but the build may need it until"):
            authority.issue_server(build_deadline=deadline)


def test_a_ca_that_ends_before_the_build_is_refused(backend: Backend, unique: str) -> None:
    mount_pki(backend.api, unique, ttl="30m")
    add_role(backend.api, "server", mount=unique, use="server")
    root = backend.with_token(backend.api.token)
    with (
        raises(CAError, "beyond the expiration of the CA certificate", "leaf_not_after_behavior=truncate"),
        root.open(mount=unique) as authority,
    ):
        authority.issue_server(ttl=timedelta(hours=2))
