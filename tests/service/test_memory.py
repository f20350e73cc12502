"""What a guest can make its server keep in memory, whatever it calls: a bounded amount."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.handshake import client_context, first_contact
from firebuild_bootstrap.guest.stop import Stop
from support import eventually, peak

pytestmark = pytest.mark.long

BOUND = 256 * 1024 * 1024
"""Bytes above what the server takes before its guest calls, as docs/wire-protocol.md promises."""
OUTPUT = pb.LogMessage(line=["x" * (4 * 1024 * 1024 - 64)])
LINES = pb.LogMessage(line=[""] * (2 * 1024 * 1024 - 16))


@dataclass
class Served:
    """A server's process, and as many connections to it as one cares to have."""

    process: subprocess.Popen[str]
    greeting: dict[str, Any]
    _channels: list[grpc.Channel]

    def connections(self, count: int = 16) -> list[grpc.Channel]:
        pem = {name: value.encode() for name, value in self.greeting.items() if name.endswith("_pem")}
        credentials = grpc.ssl_channel_credentials(
            pem["trust_pem"], pem["private_key_pem"], pem["certificate_chain_pem"]
        )
        options = [
            ("grpc.ssl_target_name_override", self.greeting["name"]),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.max_metadata_size", 1 << 20),
        ]
        # Every other one is passed through the proxy, as those of current guests.
        connect = [
            ("grpc.http_connect_server", self.greeting["address"]),
            ("grpc.http_connect_headers", f"Proxy-Authorization:Bearer {self._token()}"),
        ]
        opened = [
            grpc.secure_channel(self.greeting["address"], credentials, [*options, *connect[: number % 2 * 2]])
            for number in range(count)
        ]
        self._channels += opened
        return opened

    def _token(self) -> str:
        greeting, stop = self.greeting, Stop()
        block = wire.BootstrapBlock(
            host_port=greeting["address"],
            ca_chain=greeting["trust_pem"],
            cert=greeting["certificate_chain_pem"],
            key=greeting["private_key_pem"],
            server_name=greeting["name"],
        )
        token = first_contact(block, client_context(block), stop, 10).token
        stop.close()
        assert token
        return token

    def most(self) -> int:
        """The most bytes of the process that were ever in memory."""
        most = peak(self.process.pid)
        assert most is not None, "the server has ended"
        return most

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.process.communicate(timeout=30)


@contextmanager
def served(directory: Path, seconds_per_event: float = 0) -> Iterator[Served]:
    program = Path(__file__).with_name("memory_server.py")
    process = subprocess.Popen(
        [sys.executable, str(program), str(directory), str(seconds_per_event)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    running = Served(process, json.loads(process.stdout.readline()), [])
    try:
        yield running
    finally:
        running.close()


def call(channel: grpc.Channel, method: str, request: Any, *, extra: Any = ()) -> Any:
    """Begin a call and take nothing of its answer."""
    stream: Any = channel.unary_stream(
        wire.method(method), request_serializer=lambda message: message.SerializeToString()
    )
    return stream(request, metadata=extra)


def commands(channel: grpc.Channel) -> str:
    """Ask for the commands, and read them."""
    unary: Any = channel.unary_unary(
        wire.method("Commands"),
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=pb.CommandsResponse.FromString,
    )
    return "".join(unary(pb.Empty()).command)


def session(channel: grpc.Channel, says: Iterable[pb.FromGuest] = ()) -> Any:
    """Begin a session, say all that, and take nothing of what comes back."""
    method: Any = channel.stream_stream(
        wire.method("Session"), request_serializer=lambda message: message.SerializeToString()
    )
    return method(itertools.chain([pb.FromGuest(hello=pb.Hello(version=3))], says))


def unread_sessions_and_outputs(channels: list[grpc.Channel]) -> Iterator[Any]:
    """One session reads nothing, and what else is open sends what it can."""
    largest = pb.FromGuest(output=pb.Output(data=bytes(4 * 1024 * 1024 - 64)))
    for channel in channels:
        for _ in range(16):
            yield session(channel)
    for channel in channels:
        for _ in range(30):
            yield session(channel, itertools.repeat(largest))


def output_that_nobody_takes(channels: list[grpc.Channel]) -> Iterator[Any]:
    """The one session sends output of the size that is allowed, and never ends."""
    yield session(channels[0], itertools.repeat(pb.FromGuest(output=pb.Output(data=bytes(1024 * 1024)))))


def very_many_small_messages(channels: list[grpc.Channel]) -> Iterator[Any]:
    yield session(channels[0], itertools.repeat(pb.FromGuest(alive=pb.Alive())))


def unread_resources_and_outputs(channels: list[grpc.Channel]) -> Iterator[Any]:
    commands(channels[0])
    for portion in range(1, 5):
        yield call(channels[portion], "Resource", pb.ResourceRequest(path=f"step-2/{portion}"))
    for channel in channels:
        for _ in range(30):
            yield call(channel, "StdOut", OUTPUT)


def outputs(channels: list[grpc.Channel]) -> Iterator[Any]:
    for channel in channels:
        for method in ("StdOut", "StdErr") * 8:
            yield call(channel, method, OUTPUT)


def outputs_of_very_many_lines(channels: list[grpc.Channel]) -> Iterator[Any]:
    for channel in channels[:8]:
        for _ in range(8):
            yield call(channel, "StdOut", LINES)


def unread_commands(channels: list[grpc.Channel]) -> Iterator[Any]:
    for channel in channels:
        for _ in range(30):
            yield call(channel, "Commands", pb.Empty())


def unread_answers_to_huge_pings(channels: list[grpc.Channel]) -> Iterator[Any]:
    for channel in channels:
        for _ in range(30):
            yield call(channel, "Ping", pb.PingRequest(id="x" * (4 * 1024 * 1024 - 64)))


def huge_reasons(channels: list[grpc.Channel]) -> Iterator[Any]:
    for channel in channels:
        for _ in range(16):
            yield call(channel, "Abort", pb.AbortRequest(error="\x1b" * (4 * 1024 * 1024 - 64)))


def metadata(channels: list[grpc.Channel]) -> Iterator[Any]:
    extra = [(f"x-{number}", "x" * 1000) for number in range(14)]
    for channel in channels:
        for _ in range(100):
            yield call(channel, "Commands", pb.Empty(), extra=extra)


def calls_given_up(channels: list[grpc.Channel]) -> Iterator[Any]:
    for channel in channels:
        for _ in range(16):
            yield call(channel, "Commands", pb.Empty())
    for channel in itertools.islice(itertools.cycle(channels), 1500):
        one = call(channel, "StdOut", pb.LogMessage(line=["x" * 60_000]))
        time.sleep(0.002)
        one.cancel()


def marks_without_an_end(channels: list[grpc.Channel]) -> Iterator[Any]:
    nonce = commands(channels[0]).partition("/.firebuild-")[2][:16]
    begin = pb.LogMessage(line=[f"\x01{nonce}:D:2:"])
    rest = pb.LogMessage(line=["A" * (4 * 1024 * 1024 - 64)])
    for request in (begin, *(rest for _ in range(100))):
        yield from call(channels[0], "StdOut", request)


def flooded(flood: Callable[[list[grpc.Channel]], Iterator[Any]], seconds_per_event: float = 0) -> Any:
    """A flood that another one is much like."""
    return pytest.param(flood, seconds_per_event, marks=pytest.mark.release)


@pytest.mark.parametrize(
    ("flood", "seconds_per_event"),
    [
        (unread_sessions_and_outputs, 0),
        (output_that_nobody_takes, 0),
        flooded(output_that_nobody_takes, 0.5),
        (very_many_small_messages, 0),
        flooded(unread_resources_and_outputs),
        (outputs, 0),
        flooded(outputs, 0.5),
        flooded(outputs_of_very_many_lines),
        flooded(unread_commands),
        (unread_answers_to_huge_pings, 0),
        flooded(huge_reasons),
        (metadata, 0),
        (calls_given_up, 0),
        flooded(marks_without_an_end),
    ],
)
def test_a_guest_can_not_make_its_server_keep_more_than_a_bounded_amount(
    tmp_path: Path, flood: Callable[[list[grpc.Channel]], Iterator[Any]], seconds_per_event: float
) -> None:
    with served(tmp_path, seconds_per_event) as server:
        before = server.most()
        begun = list(flood(server.connections()))
        time.sleep(1.5)
        assert server.most() - before < BOUND
        del begun


def test_a_guest_has_128_calls_open_at_most(tmp_path: Path) -> None:
    with served(tmp_path, seconds_per_event=3) as server:
        request = pb.LogMessage(line=["of which each is an event"])
        calls = [call(one, "StdOut", request) for one in server.connections(10) for _ in range(16)]
        assert eventually(lambda: sum(not one.is_active() for one in calls) == 160 - 128)
        codes = {one.code() for one in calls if not one.is_active()}
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
