"""What is tried again, for how long, and what is not."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from baoserver import StoredServer
from baoserver.process import free_port
from firebuild_pki import Profile, ProviderContext, ProviderError, open_authority
from firebuild_pki.preflighting import preflight
from firebuild_pki.providers.vault.nodes import Timing
from firebuild_pki.providers.vault.provider import VaultProvider
from pki_vault.providing import LOGIN, logging_in, patiently
from pki_vault.scripted import NO_LEADER, SEALED, FakeTime, Reply, Slow, scripted
from pki_vault.tools import ENVIRON, Backend, raises

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
    "closed": Reply(-1),
    "nothing at all": Reply(200, ""),
    "truncated": Reply(200, {"auth": {}}, missing=10),
    "half a document": Reply(200, '{"auth": {', {"Content-Type": "application/json"}),
}


@pytest.mark.parametrize("case", HEALING)
def test_what_can_heal_is_tried_again(case: str) -> None:
    fake = FakeTime()
    with scripted(HEALING[case], HEALING[case], LOGIN, Reply(204)) as server:
        with logging_in(server.address, time=fake) as provider:
            provider.open()
        assert [seen.path for seen in server.seen] == [
            *["/v1/auth/approle/login"] * 3,
            "/v1/auth/token/revoke-self",
        ]
    assert len(fake.naps) == 2


WORDS = {
    "sealed": ("sealed", "bao operator unseal"),
    "no leader": ("status 500: local node not active but active cluster node not found", ""),
    "dr secondary": ("a standby that answers nothing (status 472)", ""),
    "rate limit": ("too many requests: request path: rate limit quota exceeded", "rate limit quota"),
    "bad gateway": ("status 502", ""),
    "reset": ("connection reset by peer", ""),
    "closed": ("the connection was closed without an answer", ""),
    "nothing at all": ("the answer was cut off", ""),
    "truncated": ("the answer was cut off", ""),
}


@pytest.mark.parametrize("case", WORDS)
def test_what_does_not_heal_is_given_up_in_time_and_in_words(case: str) -> None:
    words, hint = WORDS[case]
    fake = FakeTime()
    with (
        scripted(HEALING[case]) as server,
        logging_in(server.address, time=fake, retry_for=20) as provider,
        raises(ProviderError, f"{server.address}: {words} (given up after 20 s)", hint) as caught,
    ):
        provider.open()
    assert caught.value.retryable  # type: ignore[attr-defined]
    assert sum(fake.naps) == pytest.approx(20)
    assert max(fake.naps) <= 5


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
    "no host": (Reply(307, {}, {"Location": "https://a..b/v1"}), "not a usable address", ""),
    "nowhere": (Reply(307, {}, {"Location": "https:///v1"}), "to https://", "api_addr"),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_cannot_heal_is_not_tried_again(case: str) -> None:
    reply, words, hint = LASTING[case]
    fake = FakeTime()
    with (
        scripted(reply) as server,
        logging_in(server.address, time=fake) as provider,
        raises(ProviderError, words, hint),
    ):
        provider.open()
    assert len(server.seen) == 1
    assert fake.naps == []


def test_an_answer_without_end_is_given_up() -> None:
    with (
        scripted(Reply(200, "x" * (5 << 20))) as server,
        logging_in(server.address, time=FakeTime(), retry_for=0) as provider,
        raises(ProviderError, "the answer is longer than"),
    ):
        provider.open()


@pytest.mark.parametrize("slow", ["head", "headers", "body"])
def test_an_answer_that_trickles_is_given_up_as_a_whole(slow: Slow) -> None:
    trickle = Reply(200, {"auth": {"client_token": "s.late"}}, pause=0.05, slow=slow)
    start = time.monotonic()
    with (
        scripted(trickle) as server,
        patiently(server.address, timeout=0.3) as provider,
        raises(ProviderError, "no answer in time (given up after "),
    ):
        provider.open()
    assert time.monotonic() - start < 3


def test_the_wait_that_a_server_asks_for_is_kept() -> None:
    fake = FakeTime()
    with (
        scripted(Reply(429, {}, {"Retry-After": "7"}), LOGIN, Reply(204)) as server,
        logging_in(server.address, time=fake) as provider,
    ):
        provider.open()
    assert 7 <= sum(fake.naps) < 8


def test_a_wait_that_is_too_long_is_not_begun() -> None:
    fake = FakeTime()
    with (
        scripted(Reply(429, {}, {"Retry-After": "3600"})) as server,
        logging_in(server.address, time=fake) as provider,
        raises(ProviderError, "it asked to wait for 3600 s, more than retry_for has left"),
    ):
        provider.open()
    assert fake.naps == []


def test_nothing_is_repeated_where_retry_for_is_zero() -> None:
    fake = FakeTime()
    with (
        scripted(Reply(*SEALED)) as server,
        logging_in(server.address, time=fake, retry_for=0) as provider,
        raises(ProviderError, "sealed (given up after 0 s)"),
    ):
        provider.open()
    assert len(server.seen) == 1


def test_the_next_node_is_asked_at_once_and_the_one_that_answers_first_from_then_on() -> None:
    fake = FakeTime()
    closed = f"http://127.0.0.1:{free_port()}"
    with (
        scripted(Reply(*SEALED)) as sealed,
        scripted(LOGIN, Reply(204)) as good,
        logging_in(closed, sealed.address, good.address, time=fake) as provider,
    ):
        provider.open()
    assert (len(sealed.seen), len(good.seen), fake.naps) == (1, 2, [])


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

    fake = Unsealing()
    provider = VaultProvider(settings, context, Timing(10, 30, fake.monotonic, fake.sleep))  # type: ignore[arg-type]
    provider.open()
    stored_server.seal()
    try:
        assert provider.trust_bundle().anchors_pem.decode() == backend.pki.root_pem
    finally:
        provider.close()
    assert fake.naps
    assert settings.role_for(Profile.SERVER) == "server"  # type: ignore[attr-defined]


@pytest.mark.needs("bao")
def test_waiting_for_a_vault_that_is_away_is_told_at_once(stored_server: StoredServer) -> None:
    backend = Backend.prepared(stored_server.api, "pki")
    stored_server.seal()
    told: list[str] = []
    with raises(ProviderError, "sealed", "given up after"):
        open_authority(
            backend.settings(retry_for="3s"), build_id="b1", environ=backend.environ, report=told.append
        )
    assert told == [
        f"ca-provider(vault): no usable answer from {backend.api.address}: sealed; trying for 3 s",
    ]


@pytest.mark.needs("bao")
def test_whoever_asks_for_a_verdict_does_not_wait(stored_server: StoredServer) -> None:
    backend = Backend.prepared(stored_server.api, "pki")
    stored_server.seal()
    began = time.monotonic()
    settings = backend.settings(retry_for="30s")
    report = preflight(settings, build_time=timedelta(minutes=1), environ=backend.environ)
    assert time.monotonic() - began < 10
    assert any("sealed" in row.message for row in report.rows if row.about == "open")
