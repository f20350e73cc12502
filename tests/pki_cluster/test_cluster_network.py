"""Between the build and Vault the network fails: each failure either heals or ends in words, in time."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

import pytest

from firebuild_pki import NoteLevel
from pki_cluster.proxy import FORWARD, Fault, Kind, Proxy
from pki_cluster.scene import Scene, failing

pytestmark = pytest.mark.needs("bao")

RETRY_FOR, TIMEOUT = 2, 1
LIMITS = {"retry_for": f"{RETRY_FOR}s", "timeout": f"{TIMEOUT}s"}

# A request may be under way when retry_for ends, and the machine may be busy.
BOUND = RETRY_FOR + TIMEOUT + 4

FAULTS = {
    "late": (Fault(Kind.DELAY, seconds=TIMEOUT + 0.5), "no answer in time"),
    "silent": (Fault(Kind.SILENT), "no answer in time"),
    "closed": (Fault(Kind.CLOSE), "the connection was closed without an answer"),
    "reset": (Fault(Kind.RESET), "connection reset|connection was closed"),
    "cut in the head": (Fault(Kind.TRUNCATE, size=30), "cut off|connection|closed"),
    "cut in the body": (Fault(Kind.TRUNCATE, size=600), "the answer was cut off"),
    "refused": (Fault(Kind.REFUSE), "connection refused"),
    "trickling in the body": (Fault(Kind.TRICKLE, size=600, seconds=0.3), "no answer in time"),
    "trickling in the head": (Fault(Kind.TRICKLE, size=30, seconds=0.3), "no answer in time|cut off"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_lasts_ends_in_words_and_in_time(name: str, scene: Scene, proxy: Proxy) -> None:
    fault, words = FAULTS[name]
    with scene.open(proxy.address, **LIMITS) as authority:
        authority.issue_server()
        proxy.behave(fault)
        with failing() as failure:
            authority.issue_guest()
        proxy.behave(FORWARD)
        authority.issue_guest()
    assert failure.seconds < BOUND
    assert failure.error is not None
    assert failure.error.retryable
    assert failure.text.startswith("ca-provider(vault): ")
    assert proxy.address in failure.text
    assert re.search(words, failure.text), failure.text


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "refused"])
def test_a_fault_of_one_request_is_not_noticed(name: str, scene: Scene, proxy: Proxy) -> None:
    fault, _ = FAULTS[name]
    with scene.open(proxy.address, retry_for="20s", timeout=f"{TIMEOUT}s") as authority:
        proxy.behave(Fault(fault.kind, fault.seconds, fault.size, times=1))
        authority.issue_server()
        assert not authority.warnings


def test_an_answer_within_the_timeout_is_waited_for(scene: Scene, proxy: Proxy) -> None:
    with scene.open(proxy.address, retry_for="0s", timeout="10s") as authority:
        proxy.behave(Fault(Kind.DELAY, seconds=1.5))
        authority.issue_server()
        proxy.behave()


def test_a_vault_that_comes_up_late_is_waited_for(scene: Scene, proxy: Proxy) -> None:
    proxy.behave(Fault(Kind.SILENT, times=2))
    with scene.open(proxy.address, retry_for="20s", timeout=f"{TIMEOUT}s") as authority:
        authority.issue_guest()


def test_opening_ends_in_words_as_well(scene: Scene, proxy: Proxy) -> None:
    proxy.behave(Fault(Kind.REFUSE))
    with failing() as failure:
        scene.open(proxy.address, **LIMITS)
    assert "connection refused" in failure.text
    assert "hint" in failure.text
    assert failure.seconds < BOUND


def test_without_retries_the_first_fault_counts(scene: Scene, proxy: Proxy) -> None:
    with scene.open(proxy.address, retry_for="0s", timeout=f"{TIMEOUT}s") as authority:
        proxy.behave(Fault(Kind.RESET, times=1))
        with failing() as failure:
            authority.issue_server()
    assert failure.seconds < 3


def test_the_end_of_a_build_does_not_wait_for_a_silent_vault(scene: Scene, proxy: Proxy) -> None:
    authority = scene.open(proxy.address, retry_for="30s", timeout="10s")
    authority.issue_server()
    proxy.behave(Fault(Kind.SILENT))
    start = time.monotonic()
    authority.close()
    assert time.monotonic() - start < 9
    assert any("token" in warning for warning in authority.warnings), authority.warnings


def test_another_node_is_asked_when_one_says_nothing(scene: Scene, proxy: Proxy) -> None:
    both = [proxy.address, scene.api.address]
    with scene.open(both, retry_for="20s", timeout=f"{TIMEOUT}s") as authority:
        proxy.behave(Fault(Kind.SILENT))
        start = time.monotonic()
        for _ in range(5):
            authority.issue_server()
        assert time.monotonic() - start < 5 * TIMEOUT, "the silent node was asked every time"


def test_the_framework_ends_what_a_provider_does_not(scene: Scene, proxy: Proxy) -> None:
    framework = {"call_timeout": "1s"}
    with scene.open(proxy.address, framework=framework, retry_for="3s", timeout="3s") as authority:
        proxy.behave(Fault(Kind.SILENT))
        with failing() as failure:
            authority.issue_server()
        proxy.behave()
    assert failure.seconds < 5
    assert "did not end within 1 s" in failure.text


def test_the_rate_limit_of_a_server_is_waited_for(scene: Scene) -> None:
    quota = f"sys/quotas/rate-limit/{scene.mount}"
    hasty = scene.open(scene.api.address, retry_for="0s")
    patient = scene.open(scene.api.address, retry_for="40s")
    with hasty, patient:
        scene.api.call("POST", quota, {"path": f"{scene.mount}/", "rate": 1, "interval": "3s"})
        with failing() as failure:
            for _ in range(50):
                hasty.issue_server()
        assert "too many requests" in failure.text
        patient.issue_server()
        scene.api.delete(quota)


def test_a_clock_that_is_behind_is_named_not_the_certificate(scene: Scene) -> None:
    with failing() as failure:
        scene.open_with(scene.settings(scene.api.address), ahead=timedelta(minutes=-5))
    assert "is not valid before" in failure.text
    assert "clocks" in failure.text


def test_a_clock_that_is_ahead_is_no_obstacle_but_shown(scene: Scene) -> None:
    with scene.open_with(scene.settings(scene.api.address), ahead=timedelta(minutes=5)) as authority:
        material = authority.issue_server(ttl=timedelta(hours=1))
        assert material.not_after - datetime.now(UTC) < timedelta(minutes=61)
        (clock,) = (note for note in authority.check() if note.about == "clock")
    assert "behind this machine" in clock.message
    assert clock.level is NoteLevel.WARNING


def test_a_clock_that_is_ahead_does_not_hide_that_the_certificate_is_too_short(scene: Scene) -> None:
    # Vault grants 62 minutes of its own time, of which a clock that is ahead sees 57.
    with scene.open_with(scene.settings(scene.api.address), ahead=timedelta(minutes=5)) as authority:
        deadline = datetime.now(UTC) + timedelta(minutes=65)
        with failing() as failure:
            authority.issue_server(ttl=timedelta(minutes=62), build_deadline=deadline)
    assert "but the build may need it until" in failure.text
