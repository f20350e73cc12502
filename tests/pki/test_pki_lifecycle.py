"""The life of a provider around signing: notes, open, check, revoke, close; and ready pairs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from firebuild_pki import (
    Capability,
    CASettings,
    MaterialError,
    NoteLevel,
    ProviderError,
    ReadyPair,
    SettingsError,
    check_settings,
    open_authority,
    parse_document,
    validate,
)
from pki import characters
from pki.tools import Clock, ca_settings, catalog_of, certificates, opened


@pytest.fixture
def closed() -> Iterator[list[str]]:
    characters.CLOSED.clear()
    yield characters.CLOSED
    characters.CLOSED.clear()


def test_fatal_notes_about_settings_stop_before_anything_is_opened(closed: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        opened("revoker", mode="refused")
    assert str(caught.value) == (
        "settings: ca.revoker.mode: modes are out (hint: use none)\nsettings: ca.revoker: and so is the rest"
    )
    assert closed == []


def test_fatal_notes_say_where_the_setting_is_written(closed: list[str]) -> None:
    text = "ca:\n  provider: revoker\n  revoker:\n    mode: refused\n"
    document = parse_document(text, source="fb.yaml")
    settings = validate(CASettings, document, at="ca", context={"catalog": catalog_of("revoker")})
    expected = (
        "fb.yaml:4:11: ca.revoker.mode: modes are out (hint: use none)\n"
        "fb.yaml:4:5: ca.revoker: and so is the rest"
    )
    for look in (check_settings, open_authority):
        with pytest.raises(SettingsError) as caught:
            look(settings)
        assert str(caught.value) == expected
    assert closed == []


def test_settings_can_be_checked_without_opening_anything(closed: list[str]) -> None:
    settings = ca_settings({"provider": "revoker", "revoker": {"mode": "odd"}}, catalog_of("revoker"))
    assert [note.message for note in check_settings(settings, {})] == ["modes are odd"]
    assert closed == []


def test_other_notes_about_settings_are_warnings() -> None:
    with opened("revoker", mode="odd") as authority:
        assert authority.warnings == ("ca.revoker: mode: modes are odd (hint: use none)",)


def test_returning_nothing_instead_of_no_notes_is_forgiven() -> None:
    with opened("revoker", mode="mute") as authority:
        assert authority.warnings == ()


def test_a_provider_that_fails_to_open_is_closed(closed: list[str]) -> None:
    with pytest.raises(ProviderError, match="opening the provider failed: PermissionError: sealed"):
        opened("revoker", mode="locked")
    assert closed == ["locked"]


def test_a_provider_is_closed_once(closed: list[str]) -> None:
    with opened("revoker") as authority:
        pass
    authority.close()
    assert closed == ["fine"]


def test_a_provider_that_fails_to_close_leaves_a_warning(closed: list[str]) -> None:
    with opened("revoker", mode="stuck") as authority:
        pass
    assert authority.warnings == (
        "closing the provider failed: TimeoutError: the token could not be revoked",
    )


def test_a_check_returns_remarks_and_raises_fatal_ones() -> None:
    with opened("revoker") as authority:
        assert [str(note) for note in authority.check()] == ["expires in a week"]
    fatal = pytest.raises(ProviderError, match=r"the role is missing \(hint: make it\)")
    with opened("revoker", mode="check") as authority, fatal:
        authority.check()
    odd = pytest.raises(ProviderError, match="expected notes of the check, found str")
    with opened("revoker", mode="wordy") as authority, odd:
        authority.check()
    with opened("revoker", mode="check") as authority:
        assert [note.level for note in authority.examine()] == [NoteLevel.FATAL]


def test_a_certificate_can_be_taken_back() -> None:
    characters.REVOKED.clear()
    with opened("revoker") as authority:
        material = authority.issue_guest()
        authority.revoke(material)
    assert certificates(characters.REVOKED[0]) == certificates(material.certificate_chain_pem)[:1]


def test_all_certificates_can_be_taken_back_at_the_end() -> None:
    characters.REVOKED.clear()
    with opened("revoker", ca={"revoke_at_end": True}) as authority:
        materials = [authority.issue_server(), authority.issue_guest(), authority.issue_guest()]
        authority.revoke(materials[1])
    leaves = [certificates(materials[index].certificate_chain_pem)[0] for index in (1, 0, 2)]
    assert [certificates(one)[0] for one in characters.REVOKED] == leaves


def test_what_cannot_be_taken_back_at_the_end_is_a_warning() -> None:
    with opened("revoker", ca={"revoke_at_end": True}, mode="immortal") as authority:
        authority.issue_guest()
    assert authority.warnings == (
        "the certificate of guest.b.firebuild.internal was not revoked: "
        "revoking a certificate failed: LookupError: unknown serial",
    )


def test_a_backend_that_is_away_is_asked_to_take_back_once() -> None:
    with opened("revoker", ca={"revoke_at_end": True}, mode="away") as authority:
        authority.issue_server()
        authority.issue_guest()
    assert authority.warnings == (
        "the certificate of b.firebuild.internal was not revoked: "
        "revoking a certificate failed: ConnectionError: nobody there",
    )


def test_an_interruption_while_taking_back_does_not_keep_the_provider_open(closed: list[str]) -> None:
    class Enough(BaseException):
        pass

    interrupted = False

    def check() -> None:
        if interrupted:
            raise Enough

    section = {"provider": "revoker", "revoke_at_end": True}
    settings = ca_settings(section, catalog_of("revoker"))
    authority = open_authority(settings, build_id="b", clock=Clock(), check=check)
    authority.issue_guest()
    interrupted = True
    with pytest.raises(Enough):
        authority.close()
    assert closed == ["fine"]


def test_a_provider_that_cannot_revoke_is_not_asked_at_the_end() -> None:
    with opened("good", ca={"revoke_at_end": True}) as authority:
        authority.issue_guest()
    assert authority.warnings == ()


@pytest.mark.parametrize(
    ("mode", "found"), [("both", "ready-pairs, sign"), ("none", "none"), ("extra", "revoke, sign")]
)
def test_a_provider_ends_up_with_one_way_to_certificates_and_no_more_than_it_promised(
    mode: str, found: str
) -> None:
    with pytest.raises(ProviderError, match=f"exactly one of the capabilities .* found: {found}"):
        opened("undecided", mode=mode)


def test_a_provider_may_decide_by_its_settings() -> None:
    with opened("undecided", mode="sign") as authority:
        assert authority.capabilities == {Capability.SIGN}
        authority.issue_server()


def test_a_failure_to_take_back_is_wrapped() -> None:
    with opened("revoker", mode="immortal") as authority:
        material = authority.issue_server()
        with pytest.raises(ProviderError, match="revoking a certificate failed: LookupError"):
            authority.revoke(material)


def test_ready_pairs_become_the_same_kind_of_material() -> None:
    with opened("pairs") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
        assert authority.warnings == ()
    assert server.server_name == guest.server_name == server.identity == "builds.example.com"
    assert guest.identity == "guest-1.example.com"
    server.ssl_context(server_side=True)


def test_a_ready_pair_for_both_purposes_is_a_warning() -> None:
    with opened("pairs", flaw="both usages") as authority:
        authority.issue_server()
        (warning,) = authority.warnings
    assert warning.endswith("found: clientAuth, serverAuth")


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("swapped", "expected the extended key usage serverAuth"),
        ("nothing", "expected a ReadyPair, found NoneType"),
        ("other key", "is for another public key than the one requested"),
        ("broken key", "the private key of builds.example.com is not an unencrypted PEM key"),
        (
            "odd key",
            "gRPC needs a P-256, P-384 or RSA key, which that of builds.example.com is not",
        ),
        ("odd curve", "gRPC needs a P-256, P-384 or RSA key, which that of builds.example.com is not"),
        ("name", "expected a certificate for elsewhere.example.com"),
    ],
)
def test_a_flawed_ready_pair_is_refused(flaw: str, message: str) -> None:
    with opened("pairs", flaw=flaw) as authority, pytest.raises(MaterialError, match=message) as caught:
        authority.issue_server()
    assert caught.value.__cause__ is None


def test_the_key_of_a_ready_pair_is_not_shown() -> None:
    pair = ReadyPair(b"cert", b"SECRET", "a.b")
    assert "SECRET" not in repr(pair)


def test_a_forked_process_is_told_at_once_that_the_authority_is_not_its_own() -> None:
    code = """if True:
        import os
        from firebuild_pki import CAError, open_authority

        with open_authority(build_id="b1") as authority:
            authority.issue_guest()
            if os.fork() == 0:
                try:
                    authority.issue_guest()
                except CAError as error:
                    print(error.hint)
                authority.close()
                with open_authority(build_id="b2") as own:
                    print(own.issue_guest().identity, flush=True)
                os._exit(0)
            os.wait()
            print(authority.issue_guest().identity)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True
    )
    guests = ["guest.b2.firebuild.internal", "guest.b1.firebuild.internal"]
    assert done.stdout.splitlines() == ["open an authority of its own there", *guests]
