"""What a guest asks SSH agents over its session: only of the RUN at work, and only so much."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.events import Notice
from firebuild_bootstrap.sshagent import SocketAgent
from support import ending_of

PLAIN = wire.RunCommand(step=3, original="RUN x", argv=("x",))
MOUNTING = replace(
    PLAIN,
    step=2,
    mounts=(wire.SshMount(target="/a", id="one"), wire.SshMount(target="/b", id="one", mode=0o666)),
)
FAILURE = b"\x05"


@dataclass
class Echo:
    """Says everything back, as soon as it may."""

    may: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: bytes, over: threading.Event) -> bytes:
        while not self.may.wait(0.02) and not over.is_set():
            pass
        return request[::-1]


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    echo.may.set()
    yield echo
    echo.may.set()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "firebuild-agent"]


def ask(guest: Any, number: int, message: bytes = b"xy", name: str = "one") -> None:
    guest.say(agent_request=pb.AgentRequest(number=number, id=name, message=message))


def test_requests_are_answered_by_the_agent_that_the_run_mounts(serve: Any, echo: Echo) -> None:
    running = serve(commands=[MOUNTING, PLAIN], agents={"one": echo, "two": Echo()})
    guest = running.guest()
    guest.hear("run")
    for number in range(2 * wire.MAX_AGENT_REQUESTS):  # each reply makes room for another one
        ask(guest, number, b"%d!" % number)
        reply = guest.hear("agent_reply")
        assert (reply.number, reply.message[::-1]) == (number, b"%d!" % number)
    largest = bytes(wire.MAX_AGENT_MESSAGE - 1) + b"x"
    for number in range(wire.MAX_AGENT_REQUESTS):
        ask(guest, -number, largest)
    replies = [guest.hear("agent_reply") for _ in range(wire.MAX_AGENT_REQUESTS)]
    assert sorted(reply.number for reply in replies) == sorted(-n for n in range(wire.MAX_AGENT_REQUESTS))
    assert {reply.message for reply in replies} == {largest[::-1]}
    guest.done(2)
    guest.hear("run")
    guest.done(3)
    guest.hear("finish")
    guest.done(0)
    assert guest.end() == (grpc.StatusCode.OK, "")
    assert ending_of(running.outcome()) == "success"


def test_a_run_that_ends_does_not_wait_for_replies(serve: Any, echo: Echo) -> None:
    echo.may.clear()
    running = serve(commands=[MOUNTING, replace(MOUNTING, step=3)], agents={"one": echo})
    guest = running.guest()
    guest.hear("run")
    for number in range(wire.MAX_AGENT_REQUESTS):
        ask(guest, number)
    guest.done(2)
    assert guest.hear("run").step.number == 3
    for thread in threads():
        thread.join(10)  # what was asked by the first is given up
    assert threads() == []
    for number in range(wire.MAX_AGENT_REQUESTS):  # and does not count for the second
        ask(guest, 100 + number)
    echo.may.set()
    replies = {guest.hear("agent_reply").number for _ in range(wire.MAX_AGENT_REQUESTS)}
    assert replies == set(range(100, 100 + wire.MAX_AGENT_REQUESTS))
    guest.done(3)
    guest.hear("finish")


def test_a_build_that_ends_gives_up_what_was_asked(serve: Any, echo: Echo) -> None:
    echo.may.clear()
    running = serve(commands=[MOUNTING], agents={"one": echo})
    guest = running.guest()
    guest.hear("run")
    ask(guest, 1)
    running.server.stop(0.5)
    assert guest.end()[0] is not grpc.StatusCode.OK
    for thread in threads():
        thread.join(10)
    assert threads() == []


@pytest.mark.parametrize(
    ("when", "asks", "words"),
    [
        ("at work", [{"name": "two"}], "asks the SSH agent 'two', which no RUN at work mounts"),
        ("at work", [{"name": "\x1b" * 1000}], "asks the SSH agent '\\x1b"),
        ("at work", [{"message": b""}], "asks an SSH agent 0 bytes; from 1 to 262144 are allowed"),
        ("at work", [{"message": bytes(wire.MAX_AGENT_MESSAGE + 1)}], "asks an SSH agent 262145 bytes"),
        ("at work", [{"message": bytes(2_000_000)}], "a message of 2000"),
        ("at work", [{}] * (wire.MAX_AGENT_REQUESTS + 1), "asks SSH agents more than 32 things at once"),
        ("before", [{}], "asks the SSH agent 'one', which no RUN at work mounts"),
        ("after", [{}], "asks the SSH agent 'one', which no RUN at work mounts"),
        ("before hello", [{}], "asks the SSH agent 'one', which no RUN at work mounts"),
    ],
)
def test_what_a_guest_may_not_ask_ends_the_build(
    serve: Any, echo: Echo, when: str, asks: list[dict[str, Any]], words: str
) -> None:
    echo.may.clear()
    first = [replace(PLAIN, step=1)] if when == "before" else []
    running = serve(commands=[*first, MOUNTING, PLAIN], agents={"one": echo, "two": echo})
    guest = running.guest(hello=when != "before hello")
    if when != "before hello":
        guest.hear("run")
    if when == "after":
        guest.done(2)
    for number, options in enumerate(asks):
        ask(guest, number, **options)
    code, details = guest.end()
    assert code is grpc.StatusCode.ABORTED
    assert words in details
    assert ending_of(running.outcome()) == "server-error"


def test_a_guest_that_takes_no_replies_is_sent_no_more_than_it_may_ask(serve: Any, echo: Echo) -> None:
    running = serve(commands=[MOUNTING], agents={"one": echo})
    guest = running.guest()
    guest.hear("run")
    largest = bytes(wire.MAX_AGENT_MESSAGE)
    message = pb.FromGuest(agent_request=pb.AgentRequest(number=1, id="one", message=largest))
    guest.say_all(iter([message.SerializeToString()] * 1000))
    assert "asks SSH agents more than 32 things at once" in running.outcome().message


def test_of_an_agent_that_has_gone_the_user_is_told_once(serve: Any, short_path: Path) -> None:
    path = short_path / "gone"
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
    running = serve(commands=[MOUNTING], agents={"one": SocketAgent(str(path))})
    guest = running.guest()
    guest.hear("run")
    for number in range(3):
        ask(guest, number, b"\x0b")
        assert guest.hear("agent_reply").message == FAILURE
    (notice,) = running.of(Notice)
    assert notice.message == "--ssh one: the agent does not answer: Connection refused"
