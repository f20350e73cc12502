"""What is tried again, for how long, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest

from baoserver import StoredServer
from baoserver.process import free_port
from firebuild_pki import Profile, ProviderContext, ProviderError
from firebuild_pki.providers.vault.nodes import Timing
from firebuild_pki.providers.vault.provider import VaultProvider
from pki_vault.scripted import NO_LEADER, SEALED, FakeTime, Reply, scripted
from pki_vault.tools import ENVIRON, Backend, ca_settings, raises

LOGIN = Reply(200, {"auth": {"client_token": "s.made", "token_type": "service"}})
APPROLE = {"method": "approle", "role_id": {"env": "R"}, "secret_id": {"env": "S"}}


@contextmanager
def logging_in(
    *addresses: str, time: FakeTime, retry_for: float = 30, timeout: float = 5
) -> Iterator[VaultProvider]:
    """A provider that is not open yet, with a time of its own."""
    settings = ca_settings(
        {"address": list(addresses), "server_role": "s", "guest_role": "g", "auth": APPROLE}
    )
    context = ProviderContext(lambda: datetime.now(UTC), {"R": "r0123456789", "S": "s0123456789"})
    timing = Timing(timeout, retry_for, time.monotonic, time.sleep)
    provider = VaultProvider(settings.provider_settings, context, timing)  # type: ignore[arg-type]
    try:
        yield provider
    finally:
        provider.close()


HEALING = {
    "sealed": Reply(*SEALED),
    "no leader": Reply(*NO_LEADER),
    "dr secondary": Reply(472),
    "performance standby": Reply(473),
    "behind": Reply(412),
    "rate limit": Reply(429, {"errors": ["request path: rate limit quota exceeded"]}),
    "bad gateway": Reply(502, "<html>bad gateway</html>"),
    "unavailable": Reply(503, "<html>starting</html>"),
    "gateway timeout": Reply(504),
    "reset": Reply(0),
    "truncated": Reply(200, {"auth": {}}, missing=10),
    "half a document": Reply(200, '{"auth": {', {"Content-Type": "application/json"}),
}


@pytest.mark.parametrize("case", HEALING)
def test_what_can_heal_is_tried_again(case: str) -> None:
    time = FakeTime()
    with scripted(HEALING[case], HEALING[case], LOGIN, Reply(204)) as server:
        with logging_in(server.address, time=time) as provider:
            provider.open()
        assert [seen.path for seen in server.seen] == [
            *["/v1/auth/approle/login"] * 3,
            "/v1/auth/token/revoke-self",
        ]
    assert len(time.naps) == 2


WORDS = {
    "sealed": ("sealed", "bao operator unseal"),
    "no leader": ("status 500: local node not active but active cluster node not found", ""),
    "dr secondary": ("a standby that answers nothing (status 472)", ""),
    "rate limit": ("too many requests: request path: rate limit quota exceeded", "rate limit quota"),
    "bad gateway": ("status 502", ""),
    "reset": ("connection reset by peer", ""),
    "truncated": ("the answer was cut off", ""),
}


@pytest.mark.parametrize("case", WORDS)
def test_what_does_not_heal_is_given_up_in_time_and_in_words(case: str) -> None:
    words, hint = WORDS[case]
    time = FakeTime()
    with (
        scripted(HEALING[case]) as server,
        logging_in(server.address, time=time, retry_for=20) as provider,
        raises(ProviderError, f"{server.address}: {words} (given up after 20 s)", hint) as caught,
    ):
        provider.open()
    assert caught.value.retryable  # type: ignore[attr-defined]
    assert sum(time.naps) == pytest.approx(20)
    assert max(time.naps) <= 5


LASTING = {
    "not initialised": (Reply(501), "not initialised", "bao operator init"),
    "another service": (Reply(200, "<html>hello</html>"), "the answer is not from Vault", "address"),
    "a list": (Reply(200, "[]"), "the answer is not from Vault", "address"),
    "refused": (
        Reply(400, {"errors": ["invalid role or secret ID"]}),
        "invalid role or secret ID",
        "role id",
    ),
    "forbidden": (Reply(403, {"errors": ["permission denied"]}), "permission denied", "mounted at"),
    "not found": (Reply(404, {"errors": []}), "status 404", "mounted at"),
    "second factor": (Reply(200, {"auth": {"client_token": ""}}), "gave no token", "second factor"),
    "no login": (Reply(200, {"data": {}}), "gave no token", "second factor"),
    "elsewhere": (
        Reply(307, {}, {"Location": "http://vault.example/v1/x"}),
        "redirects to http://vault",
        "api_addr",
    ),
    "nowhere": (Reply(307, {}, {"Location": "https:///v1"}), "to https://", "api_addr"),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_cannot_heal_is_not_tried_again(case: str) -> None:
    reply, words, hint = LASTING[case]
    time = FakeTime()
    with (
        scripted(reply) as server,
        logging_in(server.address, time=time) as provider,
        raises(ProviderError, words, hint),
    ):
        provider.open()
    assert len(server.seen) == 1
    assert time.naps == []


def test_an_answer_without_end_is_given_up() -> None:
    with (
        scripted(Reply(200, "x" * (5 << 20))) as server,
        logging_in(server.address, time=FakeTime(), retry_for=0) as provider,
        raises(ProviderError, "the answer is longer than"),
    ):
        provider.open()


def test_the_wait_that_a_server_asks_for_is_kept() -> None:
    time = FakeTime()
    with (
        scripted(Reply(429, {}, {"Retry-After": "7"}), LOGIN, Reply(204)) as server,
        logging_in(server.address, time=time) as provider,
    ):
        provider.open()
    assert 7 <= sum(time.naps) < 8


def test_a_wait_that_is_too_long_is_not_begun() -> None:
    time = FakeTime()
    with (
        scripted(Reply(429, {}, {"Retry-After": "3600"})) as server,
        logging_in(server.address, time=time) as provider,
        raises(ProviderError, "it asked to wait for 3600 s, more than retry_for has left"),
    ):
        provider.open()
    assert time.naps == []


def test_nothing_is_repeated_where_retry_for_is_zero() -> None:
    time = FakeTime()
    with (
        scripted(Reply(*SEALED)) as server,
        logging_in(server.address, time=time, retry_for=0) as provider,
        raises(ProviderError, "sealed (given up after 0 s)"),
    ):
        provider.open()
    assert len(server.seen) == 1


def test_the_next_node_is_asked_at_once_and_the_one_that_answers_first_from_then_on() -> None:
    time = FakeTime()
    closed = f"http://127.0.0.1:{free_port()}"
    with (
        scripted(Reply(*SEALED)) as sealed,
        scripted(LOGIN, Reply(204)) as good,
        logging_in(closed, sealed.address, good.address, time=time) as provider,
    ):
        provider.open()
    assert (len(sealed.seen), len(good.seen), time.naps) == (1, 2, [])


def test_all_nodes_are_named_when_all_fail() -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    with (
        scripted(Reply(*SEALED)) as sealed,
        scripted(Reply(501)) as fresh,
        logging_in(closed, sealed.address, fresh.address, time=FakeTime()) as provider,
        raises(
            ProviderError,
            f"{closed}: connection refused; {sealed.address}: sealed; {fresh.address}: not initialised "
            "(given up after 30 s)",
        ),
    ):
        provider.open()
    assert len(sealed.seen) > 3
    assert len(fresh.seen) == 1


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


@pytest.mark.needs("bao")
def test_a_sealed_server_is_named(stored_server: StoredServer) -> None:
    backend = Backend.prepared(stored_server.api, "pki")
    with backend.open(retry_for="300ms") as authority:
        assert authority.issue_server()
        stored_server.seal()
        with raises(ProviderError, f"{stored_server.address}: sealed (given up after ", "unseal it"):
            authority.issue_guest()
        stored_server.unseal()
        assert authority.issue_guest()


@pytest.mark.needs("bao")
def test_a_server_that_is_unsealed_meanwhile_signs(stored_server: StoredServer) -> None:
    backend = Backend.prepared(stored_server.api, "pki")
    settings = backend.settings().provider_settings
    context = ProviderContext(lambda: datetime.now(UTC), {ENVIRON: backend.token})

    class Unsealing(FakeTime):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if stored_server.is_sealed:
                stored_server.unseal()

    time = Unsealing()
    provider = VaultProvider(settings, context, Timing(10, 30, time.monotonic, time.sleep))  # type: ignore[arg-type]
    provider.open()
    stored_server.seal()
    try:
        assert provider.trust_bundle().anchors_pem.decode() == backend.pki.root_pem
    finally:
        provider.close()
    assert time.naps
    assert settings.role_for(Profile.SERVER) == "server"  # type: ignore[attr-defined]
