"""What a server says and does besides certificates: redirects, refusals to let go, secrets quoted back."""

from __future__ import annotations

from datetime import timedelta

import pytest

from firebuild_pki import Profile, ProviderError, SignRequest
from firebuild_pki.keys import generate_key
from firebuild_pki.providers.vault.nodes import HintContext, hint_for, relevant_warning
from firebuild_pki.x509 import make_csr
from pki.tools import OperatorCA
from pki_vault.providing import AGAIN, LOGIN, logging_in
from pki_vault.scripted import FakeTime, Reply, scripted
from pki_vault.tools import raises


def test_a_redirect_to_the_leader_takes_the_token_along() -> None:
    with scripted(Reply(204)) as leader:
        to_leader = Reply(307, {}, {"Location": f"{leader.address}/v1/auth/token/revoke-self"})
        with scripted(LOGIN, to_leader) as standby, logging_in(standby.address, time=FakeTime()) as provider:
            provider.open()
            provider.close()
    (seen,) = leader.seen
    assert (seen.method, seen.headers["X-Vault-Token"]) == ("POST", "s.made")


def test_redirects_in_a_circle_end() -> None:
    with scripted(Reply(307, {}, {"Location": "/v1/elsewhere"})) as server:
        with (
            logging_in(server.address, time=FakeTime(), retry_for=0) as provider,
            raises(ProviderError, "it redirects more than 3 times"),
        ):
            provider.open()
        assert [seen.path for seen in server.seen][1:] == ["/v1/elsewhere"] * 3


def test_a_token_that_cannot_be_revoked_is_an_error_of_closing() -> None:
    with (
        scripted(LOGIN, Reply(400, {"errors": ["no"]})) as server,
        logging_in(server.address, time=FakeTime()) as provider,
    ):
        provider.open()
        with raises(ProviderError, "the token could not be revoked: no"):
            provider.close()


def test_a_token_that_cannot_be_revoked_for_want_of_an_answer() -> None:
    with (
        scripted(LOGIN, Reply(501)) as server,
        logging_in(server.address, time=FakeTime()) as provider,
    ):
        provider.open()
        with raises(
            ProviderError, "the token could not be revoked: no usable answer from ", "not initialised"
        ):
            provider.close()


def test_an_old_token_that_cannot_be_revoked_is_no_obstacle() -> None:
    with scripted(LOGIN, Reply(403), Reply(400), AGAIN, (200, {"data": {}}), Reply(204)) as server:
        with logging_in(server.address, time=FakeTime()) as provider:
            provider.open()
            provider.revoke(OperatorCA().pem)
        assert [seen.path.rpartition("/")[2] for seen in server.seen] == [
            "login",
            "revoke",
            "revoke-self",
            "login",
            "revoke",
            "revoke-self",
        ]


def test_a_mount_of_which_nothing_is_known_is_named_all_the_same() -> None:
    with (
        scripted(LOGIN, Reply(403), Reply(403), Reply(403), Reply(501), Reply(204)) as server,
        logging_in(server.address, time=FakeTime()) as provider,
        raises(ProviderError, f"{server.address} has no PKI secrets engine at pki", "bao secrets list"),
    ):
        provider.open()
        provider.trust_bundle()


def test_an_engine_that_takes_anything_is_found_out() -> None:
    request = SignRequest(
        make_csr(generate_key(), ("b.x",)), Profile.SERVER, ("b.x",), timedelta(hours=1), "b"
    )
    with (
        scripted(LOGIN, Reply(204)) as server,
        logging_in(server.address, time=FakeTime()) as provider,
        raises(ProviderError, "the mount pki answered, but without a certificate", "bao secrets list"),
    ):
        provider.open()
        provider.sign(request)


def test_other_words_of_the_server_are_passed_on() -> None:
    about = HintContext("pki", "builds")
    assert relevant_warning(" mind\nthe gap ", about) == "the server remarked: mind the gap"
    assert hint_for("something else", about) is None


def test_secrets_that_a_server_quotes_are_not_repeated() -> None:
    quoting = {"errors": ["bad request: r0123456789 s0123456789"]}
    for reply in (Reply(400, quoting), Reply(500, quoting)):
        with (
            scripted(reply) as server,
            logging_in(server.address, time=FakeTime(), retry_for=0) as provider,
            pytest.raises(ProviderError) as caught,
        ):
            provider.open()
        assert "bad request: … …" in str(caught.value)
