"""Certificates that are pending: asked for again, outside of the provider's limit, and not for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from firebuild_pki import (
    AuthorityClosed,
    CAProvider,
    Profile,
    ProviderError,
    RetryAfter,
    SignRequest,
    open_authority,
)
from firebuild_pki.issuing import Waiting, awaited
from pki import characters
from pki.tools import Clock, ca_settings, catalog_of, opened


@pytest.fixture(autouse=True)
def registrar() -> Iterator[None]:
    yield
    characters.ANSWERS.clear()
    characters.ASKED.clear()


def test_a_certificate_that_is_pending_is_asked_for_until_it_is_there() -> None:
    characters.ANSWERS[:] = [RetryAfter(0.01, "order-1"), RetryAfter(0, "order-1a")]
    with opened("registrar", ca={"call_timeout": "10s"}) as authority:
        assert authority.issue_server().identity == "b.firebuild.internal"
    expected = [(Profile.SERVER, handle) for handle in ("new", "order-1", "order-1a")]
    assert expected == characters.ASKED


def test_a_provider_without_poll_is_asked_to_sign_again() -> None:
    with opened("impatient") as authority:
        assert authority.issue_guest()


def test_another_certificate_is_issued_while_one_is_pending() -> None:
    characters.ANSWERS[:] = [RetryAfter(60, "slow")]
    with opened("registrar") as authority:
        ended = _in_thread(authority.issue_server)
        while not characters.ASKED:
            pass
        assert authority.issue_guest()
        authority.close()
        with pytest.raises(AuthorityClosed, match="closed while the certificate was pending"):
            ended()


def test_what_the_caller_checks_ends_the_wait() -> None:
    characters.ANSWERS[:] = [RetryAfter(60)]
    settings = ca_settings({"provider": "registrar"}, catalog_of("registrar"))

    def check() -> None:
        if characters.ASKED:
            raise KeyboardInterrupt

    with open_authority(settings, clock=Clock(), check=check) as authority, pytest.raises(KeyboardInterrupt):
        authority.issue_server()


WRONG: dict[str, tuple[Any, str]] = {
    "negative": (RetryAfter(-1), "from 0 to 86400, found -1"),
    "not a number": (RetryAfter(float("nan")), "from 0 to 86400, found nan"),
    "endless": (
        RetryAfter(float("inf")),
        "found inf; what will never be issued is a CAError with the reason",
    ),
    "never": (RetryAfter(None), "a number, found NoneType; what will never be issued is a CAError"),  # type: ignore[arg-type]
    "a week": (RetryAfter(7 * 86_400), "from 0 to 86400, found 604800"),
    "huge": (RetryAfter(10**400), "found a huge number"),
    "text": (RetryAfter("60"), "a number, found str"),  # type: ignore[arg-type]
    "truth": (RetryAfter(True), "a number, found bool"),
    "handle": (RetryAfter(1, b"arn"), "expected a string as the handle of RetryAfter, found bytes"),  # type: ignore[arg-type]
    "long handle": (RetryAfter(1, "x" * 5000), "4096 characters at most, found 5000"),
    "reason": (RetryAfter(1, "", 5), "expected a string as the reason of RetryAfter, found int"),  # type: ignore[arg-type]
    "beyond the limit": (RetryAfter(900), "is pending, and the CA wants to be asked again in 900 s"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wait_without_sense_is_refused_in_words(case: str) -> None:
    answer, words = WRONG[case]
    characters.ANSWERS[:] = [answer]
    with opened("registrar") as authority, pytest.raises(ProviderError) as caught:
        authority.issue_server()
    assert str(caught.value).startswith("ca-provider(registrar): ")
    assert words in str(caught.value)


def test_the_limit_of_the_whole_is_a_setting() -> None:
    characters.ANSWERS[:] = [
        RetryAfter(0.05, "order", "order 5 waits for \x1b[31mapproval") for _ in range(99)
    ]
    ca = {"issue_timeout": "150ms"}
    with opened("registrar", ca=ca) as authority, pytest.raises(ProviderError) as caught:
        authority.issue_server()
    assert str(caught.value) == (
        "ca-provider(registrar): the server certificate is still pending after 0.15 s: order 5 waits for "
        "\\x1b[31mapproval (hint: look at the backend, or raise ca.issue_timeout)"
    )
    assert caught.value.retryable


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def pause(self, seconds: float) -> None:
        self.now += seconds


class Slow(CAProvider):
    def __init__(self, answers: list[RetryAfter]) -> None:
        self.answers = answers

    def trust_bundle(self) -> Any:
        raise AssertionError

    def sign(self, request: SignRequest) -> Any:
        return self.answers.pop(0) if self.answers else "the certificate"


REQUEST = SignRequest(b"", Profile.SERVER, ("b.x",), timedelta(hours=1), "b")


def _waited(*answers: RetryAfter, limit: float = 300) -> tuple[Any, float, list[str]]:
    time, said = Time(), list[str]()
    waiting = Waiting(timedelta(seconds=limit), time.pause, said.append, lambda: time.now)
    return awaited(Slow(list(answers)), REQUEST, waiting), time.now, said


def test_a_long_wait_says_what_it_waits_for_once_for_each_reason() -> None:
    answers = [RetryAfter(20, "", "approval of order 5")] * 3 + [RetryAfter(20)]
    got, seconds, said = _waited(*answers)
    assert (got, round(seconds)) == ("the certificate", 80)
    assert said == [
        "waiting for the server certificate, for 300 s at most: approval of order 5",
        "waiting for the server certificate, for 300 s at most: the CA has not issued it yet",
    ]


def test_a_short_wait_says_nothing() -> None:
    _, seconds, said = _waited(RetryAfter(1), RetryAfter(1))
    assert round(seconds) == 2
    assert said == []


def test_a_last_question_is_asked_at_the_limit() -> None:
    got, seconds, _ = _waited(RetryAfter(50), RetryAfter(50), limit=60)
    assert (got, round(seconds)) == ("the certificate", 60)
    with pytest.raises(ProviderError, match="still pending after 60 s"):
        _waited(*[RetryAfter(50)] * 3, limit=60)


def test_no_pause_at_all_is_still_a_pause() -> None:
    assert _waited(*[RetryAfter(0)] * 10)[1] == pytest.approx(0.5)


def _in_thread(function: Callable[[], object]) -> Callable[[], None]:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def ended() -> None:
        thread.join(20)
        if failed:
            raise failed[0]

    return ended
