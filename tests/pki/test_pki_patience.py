"""A provider that does not answer is not waited for for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from firebuild_pki import ProviderError, open_authority
from pki import characters
from pki.tools import ca_settings, catalog_of, opened

SHORT = {"call_timeout": "2s"}


@pytest.fixture(autouse=True)
def night() -> Iterator[None]:
    characters.MORNING.clear()
    characters.CLOSED.clear()
    yield
    characters.MORNING.set()
    end = time.monotonic() + 20
    while any(thread.name == "ca-provider(sloth)" for thread in threading.enumerate()):
        assert time.monotonic() < end, "a provider's thread outlives its last call"
        time.sleep(0.02)


def test_a_provider_that_does_not_answer_is_an_error_that_may_heal() -> None:
    with opened("sloth", ca=SHORT, mode="sign") as authority:
        with pytest.raises(ProviderError) as caught:
            authority.issue_server()
        assert str(caught.value) == (
            "ca-provider(sloth): issuing the server certificate did not end within 2 s "
            "(hint: look at the backend, or raise ca.call_timeout)"
        )
        assert caught.value.retryable
        again = "issuing the guest certificate is not possible: issuing the server certificate has not ended"
        with pytest.raises(ProviderError, match=again):
            authority.issue_guest()
    (warning,) = authority.warnings
    assert "issuing the server certificate did not end within 2 s" in warning


def test_a_provider_that_does_not_open_is_left_behind() -> None:
    with pytest.raises(ProviderError, match=r"opening the provider did not end within 2 s"):
        opened("sloth", ca=SHORT, mode="open")


def test_a_provider_that_does_not_close_is_a_warning() -> None:
    with opened("sloth", ca=SHORT, mode="close") as authority:
        authority.issue_guest()
    assert authority.warnings == ("closing the provider failed: the last call did not end within 2 s",)


def test_a_provider_that_wakes_up_in_time_is_still_closed() -> None:
    with opened("sloth", ca={"call_timeout": "5s"}, mode="sign") as authority:
        threading.Timer(0.3, characters.MORNING.set).start()
        assert authority.issue_server()
    assert characters.CLOSED == ["sign"]
    assert authority.warnings == ()


def test_the_caller_can_end_the_wait() -> None:
    class Enough(BaseException):
        pass

    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.3:
            raise Enough

    settings = ca_settings({"provider": "sloth", "sloth": {"mode": "open"}}, catalog_of("sloth"))
    threading.Timer(1, characters.MORNING.set).start()
    with pytest.raises(Enough):
        open_authority(settings, build_id="b", check=check)
    assert time.monotonic() - began < 20
    assert characters.CLOSED == ["open"]


@pytest.mark.parametrize("where", ["open", "sign"])
def test_a_provider_cannot_end_the_process(where: str) -> None:
    message = f"failed: SystemExit: leaving at {where}"
    with pytest.raises(ProviderError, match=message), opened("sloth", mode=f"exit {where}") as authority:
        authority.issue_server()


def test_a_provider_cannot_end_the_process_while_closing() -> None:
    with opened("sloth", mode="exit close") as authority:
        pass
    assert authority.warnings == ("closing the provider failed: SystemExit: leaving at close",)


def test_a_time_limit_of_the_provider_itself_is_told_from_ours() -> None:
    with opened("sloth", mode="timeout sign") as authority:
        message = "issuing the server certificate failed: TimeoutError: the backend's own"
        with pytest.raises(ProviderError, match=message) as caught:
            authority.issue_server()
        assert caught.value.retryable
        with pytest.raises(ProviderError, match="the backend's own"):
            authority.issue_server()


def test_all_calls_come_from_one_thread_of_the_providers_own() -> None:
    with opened("sloth") as authority:
        authority.issue_server()
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("ca-provider(sloth)") == 1
    assert "ca-provider(sloth)" not in [thread.name for thread in threading.enumerate()]
