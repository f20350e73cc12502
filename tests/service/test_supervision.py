"""A guest that dies, hangs or never comes ends the build in time, with words that help."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.errors import BuildTimeout, GuestLost
from firebuild_bootstrap.service import Limits
from firebuild_bootstrap.service.limits import Watch
from service.conftest import file_entry
from support import ending_of


def watch(now: float = 100.0, **limits: Any) -> Watch:
    values = {
        "initial_timeout": 60.0,
        "ping_interval": 5.0,
        "missed_pings": 3,
        "reconnect_grace": 4.0,
        "build_timeout": 1000.0,
    }
    return Watch(Limits(**{**values, **limits}), now, lambda: "nobody else called")


def test_before_the_first_call_the_initial_timeout_counts() -> None:
    due, error = watch().deadline()
    assert due == 160.0
    assert isinstance(error(), GuestLost)
    assert "did not call within 60 seconds; nobody else called" in str(error())


def test_the_initial_time_can_be_given_again() -> None:
    watched = watch()
    watched.restart(150.0)
    assert watched.deadline()[0] == 210.0


def test_a_build_can_be_given_more_time() -> None:
    watched = watch(build_timeout=10.0)
    watched.extend(5.0)
    assert watched.deadline()[0] == 115.0
    watched.extend(-5.0)
    assert watched.deadline()[0] == 110.0
    assert isinstance(watched.deadline()[1](), BuildTimeout)


def test_each_call_gives_the_guest_new_patience() -> None:
    watched = watch()
    watched.opened()
    watched.seen(110.0)
    assert watched.deadline()[0] == 125.0
    watched.seen(120.0)
    watched.step_started(3)
    due, error = watched.deadline()
    assert due == 135.0
    assert str(error()) == (
        "the guest fell silent during step 3: no call for 3 ping intervals of 5 seconds\n"
        "  hint: look at the machine's console; raise bootstrap.ping_interval for slow machines"
    )


def test_no_guest_is_silent_while_nobody_listens() -> None:
    watched = watch()
    watched.opened()
    watched.seen(110.0)
    assert watched.hold(112.0)
    assert not watched.hold(113.0)
    assert isinstance(watched.deadline()[1](), BuildTimeout)
    watched.release(142.0)
    assert watched.deadline()[0] == 155.0


def test_without_connection_the_grace_counts_and_a_new_connection_ends_it() -> None:
    watched = watch()
    watched.opened()
    watched.seen(110.0)
    watched.opened()
    watched.closed(111.0)
    assert watched.deadline()[0] == 125.0
    watched.closed(112.0)
    due, error = watched.deadline()
    assert due == 116.0
    assert "closed its connection before it reported a result" in str(error())
    assert "look at the machine's console" in str(error())
    watched.opened()
    assert watched.deadline()[0] == 125.0


def test_the_build_timeout_is_not_moved_by_anything() -> None:
    watched = watch(build_timeout=50.0)
    watched.opened()
    watched.seen(149.0)
    watched.restart(149.0)
    due, error = watched.deadline()
    assert due == 150.0
    assert isinstance(error(), BuildTimeout)


def test_a_guest_that_never_calls_is_lost(serve: Any) -> None:
    running = serve(limits=Limits(initial_timeout=0.2))
    outcome = running.outcome()
    assert ending_of(outcome) == "lost"
    assert "no other peer called either" in outcome.message
    with pytest.raises(GuestLost):
        outcome.raise_for_failure()


@pytest.mark.parametrize(("calls", "text"), [(1, "1 peer was refused"), (2, "2 peers were refused")])
def test_the_message_tells_who_was_refused_meanwhile(
    serve: Any, workshop: Any, calls: int, text: str
) -> None:
    running = serve(limits=Limits(initial_timeout=1.0))
    stranger = workshop.issue("guest.b2.firebuild.internal")
    for _ in range(calls):
        with pytest.raises(grpc.RpcError):
            running.caller(stranger, inner=True).ping()
    message = running.outcome().message
    assert f"{text}, the last one because its certificate is not the one" in message


def test_a_connection_without_a_call_is_not_a_guest(serve: Any) -> None:
    running = serve(limits=Limits(initial_timeout=0.4))
    host, _, port = running.address.rpartition(":")
    context = running.materials[1].ssl_context()
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=running.materials[1].server_name),
    ):
        assert "did not call" in running.outcome().message


def test_the_initial_time_starts_when_the_machine_does(serve: Any) -> None:
    running = serve(limits=Limits(initial_timeout=0.6))
    time.sleep(0.4)
    running.server.await_guest()
    assert running.server.wait(0.4) is None
    assert ending_of(running.outcome()) == "lost"


def test_a_guest_that_stops_pinging_is_lost(serve: Any) -> None:
    running = serve(limits=Limits(ping_interval=0.1, missed_pings=3))
    guest = running.caller()
    for _ in range(6):
        guest.ping()
        time.sleep(0.1)
    outcome = running.outcome()
    assert ending_of(outcome) == "lost"
    assert "fell silent: no call for 3 ping intervals" in outcome.message


def test_a_guest_whose_connection_ends_is_lost_after_a_short_grace(serve: Any) -> None:
    running = serve(limits=Limits(reconnect_grace=0.3))
    guest = running.caller()
    guest.ping()
    begun = time.monotonic()
    guest.close()
    outcome = running.outcome()
    assert ending_of(outcome) == "lost"
    assert "closed its connection" in outcome.message
    assert 0.25 < time.monotonic() - begun < 5


def test_a_guest_may_reconnect_within_the_grace(serve: Any) -> None:
    running = serve(limits=Limits(reconnect_grace=1.0))
    first = running.caller()
    first.ping()
    first.close()
    again = running.caller()
    again.ping()
    assert running.server.wait(1.2) is None
    assert len(running.welcomed) == 1
    again.success()
    assert ending_of(running.outcome()) == "success"


def test_a_build_that_takes_too_long_is_ended_while_the_guest_pings(serve: Any) -> None:
    running = serve(limits=Limits(build_timeout=0.5))
    guest = running.caller()
    ended = threading.Event()

    def ping() -> None:
        try:
            while True:
                guest.ping()
                time.sleep(0.02)
        except grpc.RpcError:
            ended.set()

    pinging = threading.Thread(target=ping)
    pinging.start()
    outcome = running.outcome()
    pinging.join()
    assert ending_of(outcome) == "timeout"
    assert isinstance(outcome.error, BuildTimeout)
    assert ended.is_set()


def test_a_long_transfer_is_a_sign_of_life(serve: Any) -> None:
    class Slow:
        def entries(self) -> Any:
            for number in range(10):
                time.sleep(0.1)
                content = os.urandom(wire.CHUNK_BYTES)
                yield file_entry(str(number), content)

    running = serve(parcels={"step-2": Slow()}, limits=Limits(ping_interval=0.1, missed_pings=4))
    guest = running.guest()
    guest.hear("apply")
    assert len(guest.files()) > 10 * wire.CHUNK_BYTES
