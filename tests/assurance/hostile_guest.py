"""Guests that have the right certificate and bad intentions."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import pytest

from assurance.hosts import Host, Seen, good_guest, meanwhile
from assurance.trials import Effort, damaged, trial
from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.service import Limits
from firebuild_pki import TLSMaterial
from service.conftest import GUEST, SERVER, SERVER_AUTH, Caller, Guest, OldGuest, Workshop

LIMITS: Final = Limits(
    initial_timeout=20,
    ping_interval=0.4,
    missed_pings=5,
    reconnect_grace=0.5,
    build_timeout=4,
    max_log_bytes=1 << 20,
)
PATIENCE: Final = 60.0
AT_ONCE: Final = 4
"""Hostile guests."""
FOREIGN: Final = ("../../../etc/shadow", "/etc/passwd", "step-2/../step-3-mount-1", "step-4", "", "..", "\0",
                  "stage://step-2", "step-2\x1b[2J", "x" * 200_000, "~root", "step-9-mount-1")  # fmt: skip
ESCAPES: Final = (
    b"\x1b[2J\x1b]0;title\x07",
    b"\x1bP$q\x1b\\",
    b"\x9b31m",
    b"\r\x08" * 50,
    b"\x00\xff\xfe\xc0",
)
NUMBERS: Final = (-(2**31), -1, 0, 1, 2, 3, 4, 5, 255, 256, 2**31 - 1)


def text(chance: random.Random) -> str:
    """Some text that a guest may think of."""
    return chance.choice((*FOREIGN, "command", "file", ESCAPES[0].decode("latin-1"), "ok", "ü\u202e"))


def data(chance: random.Random) -> bytes:
    """Some bytes."""
    return chance.choice((b"", b"x", *ESCAPES, chance.randbytes(chance.randrange(1, 70_000))))


def a_message(chance: random.Random) -> pb.FromGuest:
    """Something that a guest can say, with anything in it."""
    number = chance.choice(NUMBERS)
    failure = pb.Failure(error=text(chance), exit_code=chance.choice(NUMBERS), reason=text(chance))
    done = pb.Done(
        step=number,
        duration_ms=chance.choice((0, 5, -1, 2**63 - 1)),
        failure=failure if chance.random() < 0.3 else None,
        exit_code=chance.choice(NUMBERS),
    )
    return chance.choice(
        (
            pb.FromGuest(hello=pb.Hello(version=number)),
            pb.FromGuest(alive=pb.Alive()),
            pb.FromGuest(output=pb.Output(data=data(chance), stderr=chance.random() < 0.5)),
            pb.FromGuest(want=pb.Want(resource=text(chance))),
            pb.FromGuest(done=done),
            pb.FromGuest(layer=pb.Layer(data=data(chance), last=chance.random() < 0.2)),
            pb.FromGuest(agent_request=pb.AgentRequest(number=number, id=text(chance), message=data(chance))),
            pb.FromGuest(input_taken=pb.InputTaken(bytes=number)),
            pb.FromGuest(begun=pb.Begun()),
            pb.FromGuest(identity=pb.IdentityState(number=number, csr=data(chance), error=text(chance))),
            pb.FromGuest(probed=pb.Probed(exit_code=number, output=data(chance))),
            pb.FromGuest(failing=done),
            pb.FromGuest(),
        )
    )


@dataclass
class Enemy:
    """A hostile guest of one build, with its connections."""

    address: str
    material: TLSMaterial
    chance: random.Random
    callers: list[Caller] = field(default_factory=list)

    def caller(self) -> Caller:
        self.callers.append(Caller(self.address, self.material))
        return self.callers[-1]

    def guest(self, *, hello: bool = True) -> Guest:
        return Guest(self.caller().channel, hello=hello)

    def at_step(self, number: int) -> Guest:
        """A session that goes well up to some step: 2, 3 or 4."""
        guest = self.guest()
        guest.hear("apply")
        if number > 2:
            guest.files()
            guest.done(2)
            guest.hear("run")
        if number > 3:
            guest.done(3)
            guest.hear("checkpoint")
            guest.say(layer=pb.Layer(data=b"x" * 1000, last=True))
            guest.hear("workdir")
        return guest

    def close(self) -> None:
        for caller in self.callers:
            caller.close()


# --- in a session ------------------------------------------------------------------------------------


def at_chance(enemy: Enemy) -> Guest:
    return enemy.at_step(enemy.chance.choice((2, 3, 4)))


def messages_by_chance(enemy: Enemy) -> None:
    guest = at_chance(enemy) if enemy.chance.random() < 0.7 else enemy.guest(hello=False)
    for _ in range(enemy.chance.randint(1, 40)):
        guest.say_bytes(a_message(enemy.chance).SerializeToString())
    guest.leave()
    guest.end()


def damaged_messages(enemy: Enemy) -> None:
    guest = at_chance(enemy)
    for _ in range(enemy.chance.randint(1, 20)):
        guest.say_bytes(damaged(enemy.chance, a_message(enemy.chance).SerializeToString()))
    guest.leave()
    guest.end()


def huge_messages(enemy: Enemy) -> None:
    guest = at_chance(enemy)
    size = enemy.chance.randrange(1_200_000, 6_000_000)
    guest.say_all(itertools.repeat(pb.FromGuest(output=pb.Output(data=bytes(size))).SerializeToString(), 40))
    guest.end()


def for_a_while(seconds: float, message: bytes) -> Iterator[bytes]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield message


def endless_output(enemy: Enemy) -> None:
    guest = at_chance(enemy)
    output = pb.FromGuest(output=pb.Output(data=enemy.chance.choice(ESCAPES) * 20_000))
    guest.say_all(for_a_while(10, output.SerializeToString()))
    guest.end()


def tiny_outputs(enemy: Enemy) -> None:
    guest = at_chance(enemy)
    output = pb.FromGuest(output=pb.Output(data=b"x" * enemy.chance.randint(0, 2)))
    guest.say_all(for_a_while(10, output.SerializeToString()))
    guest.end()


def foreign_files(enemy: Enemy) -> None:
    guest = enemy.at_step(3)
    guest.say(want=pb.Want(resource=enemy.chance.choice((*FOREIGN[:3], "step-2", *FOREIGN[4:]))[:100_000]))
    guest.end()


def files_again_and_again(enemy: Enemy) -> None:
    guest = enemy.at_step(3)
    for _ in range(11):
        guest.say(want=pb.Want(resource="step-3-mount-1"))
        with contextlib.suppress(grpc.RpcError):
            guest.files()
    guest.end()


def claims(enemy: Enemy) -> None:
    """Say that something is done which was not asked for."""
    step = enemy.chance.choice((2, 3, 4))
    guest = enemy.at_step(step)
    if step == 2:
        guest.files()
    guest.done(enemy.chance.choice([number for number in NUMBERS if number != step]))
    guest.end()


def two_answers(enemy: Enemy) -> None:
    guest = enemy.at_step(3)
    for number in enemy.chance.choices((3, 4, 0), k=6):
        guest.done(number)
    guest.leave()
    guest.end()


def layers_without_end(enemy: Enemy) -> None:
    guest = enemy.at_step(3)
    guest.done(3)
    guest.hear("checkpoint")
    piece = pb.FromGuest(layer=pb.Layer(data=enemy.chance.randbytes(enemy.chance.choice((1, 1000, 1 << 20)))))
    guest.say_all(for_a_while(10, piece.SerializeToString()))
    guest.end()


def unasked_layers(enemy: Enemy) -> None:
    guest = at_chance(enemy)
    guest.say(layer=pb.Layer(data=data(enemy.chance), last=enemy.chance.random() < 0.5))
    guest.end()


def silence(enemy: Enemy) -> None:
    guest = at_chance(enemy)
    guest.end()


def half_open(enemy: Enemy) -> None:
    """Begin, and leave in one of the ways that there are."""
    guest = at_chance(enemy)
    match enemy.chance.choice(("leave", "cancel", "close")):
        case "leave":
            guest.leave()
        case "cancel":
            guest.call.cancel()
        case _:
            enemy.close()


def many_sessions(enemy: Enemy) -> None:
    first = at_chance(enemy)
    others = [enemy.guest() for _ in range(enemy.chance.randint(1, 40))]
    for other in others:
        other.leave()
        other.end()
    first.end()


def unread_files(enemy: Enemy) -> None:
    """Read nothing of what is sent, and say what can be said."""
    guest = enemy.guest()
    guest.say_all(for_a_while(10, pb.FromGuest(alive=pb.Alive()).SerializeToString()))
    time.sleep(enemy.chance.random())
    enemy.close()


# --- in the calls of old -----------------------------------------------------------------------------


def begun(enemy: Enemy) -> OldGuest:
    return OldGuest(enemy.caller())


def foreign_resources(enemy: Enemy) -> None:
    caller = begun(enemy).calls
    list(caller.resource(text(enemy.chance)[:100_000], enemy.chance.choice(("", "base", "../..", "\0"))))
    caller.success()


def a_mark(old: OldGuest, chance: random.Random) -> str:
    """Something that a script can say, with anything in it, and perhaps not all of it."""
    value = chance.choice(("", "0", "0", "7", "256", "YWJj", text(chance)[:1000]))
    mark = old.mark(chance.choice("PBDEXZ"), chance.choice((2, 3, 4, *NUMBERS)), value)
    return mark if chance.random() < 0.8 else mark[: chance.randrange(len(mark))]


def calls_by_chance(enemy: Enemy) -> None:
    old, chance = begun(enemy), enemy.chance
    caller = old.calls
    for _ in range(chance.randint(1, 30)):
        said = [chance.choice((a_mark(old, chance), text(chance)[:1000])) for _ in range(chance.randrange(4))]
        match chance.choice(("StdOut", "StdErr", "Ping", "Resource", "Abort", "Commands", "Nothing")):
            case "StdOut" | "StdErr" as method:
                caller.say(*said, method=method)
            case "Ping":
                caller.ping(text(chance)[:100_000])
            case "Resource":
                next(iter(caller.resource(chance.choice(("step-2/1", text(chance)[:1000])))))
            case "Abort":
                caller.abort(text(chance))
            case "Commands":
                caller.commands()
            case _:
                caller.unary(text(chance)[:50].encode("ascii", "replace").decode(), pb.Empty())
    caller.success()


def bytes_by_chance(enemy: Enemy) -> None:
    caller, chance = begun(enemy).calls, enemy.chance
    for _ in range(chance.randint(1, 10)):
        method = chance.choice(("Commands", "StdOut", "StdErr", "Resource", "Ping", "Abort", "Success"))
        raw: Any = caller.channel.unary_stream(wire.method(method))
        list(raw(damaged(chance, data(chance)[:1000]), timeout=10))


def false_success(enemy: Enemy) -> None:
    old = begun(enemy)
    for step in enemy.chance.sample((2, 3, 4), enemy.chance.randint(0, 2)):
        old.report("B", step)
        old.report("E", step, enemy.chance.choice(("0", "0", "7")))
    old.calls.success()


def floods_of_calls(enemy: Enemy) -> None:
    """Calls of which no answer is read, over several connections."""
    chance, open_calls = enemy.chance, []
    begun(enemy)
    requests = (
        ("StdOut", pb.LogMessage(line=["x" * chance.randrange(4_000_000)])),
        ("StdOut", pb.LogMessage(line=[""] * chance.randrange(500_000))),
        ("Commands", pb.Empty()),
        ("Ping", pb.PingRequest(id="x" * chance.randrange(200_000))),
        ("Resource", pb.ResourceRequest(path="step-2/1")),
        ("Abort", pb.AbortRequest(error="\x1b" * chance.randrange(4_000_000))),
    )
    for _ in range(chance.randint(1, 12)):
        channel = enemy.caller().channel
        for method, request in chance.choices(requests[: chance.choice((2, 5, 6))], k=20):
            stream: Any = channel.unary_stream(wire.method(method))
            open_calls.append(stream(request.SerializeToString(), timeout=20))
    time.sleep(chance.random())
    for call in open_calls[::2]:
        call.cancel()
    enemy.close()


def both_ways(enemy: Enemy) -> None:
    caller = begun(enemy).calls
    enemy.guest().end()
    caller.success()


def after_the_end(enemy: Enemy) -> None:
    """Give up, and go on calling."""
    caller = enemy.caller()
    caller.abort(text(enemy.chance)[:1000])
    for call in (caller.commands, caller.ping, caller.success, lambda: list(caller.resource("step-2"))):
        with pytest.raises(grpc.RpcError, match="the build has ended"):
            call()
    code, _ = enemy.guest().end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION, code


SESSION: Final[dict[str, Callable[[Enemy], None]]] = {
    "sessions of messages by chance": messages_by_chance,
    "sessions of damaged messages": damaged_messages,
    "huge messages": huge_messages,
    "endless outputs": endless_output,
    "floods of tiny outputs": tiny_outputs,
    "foreign files wanted": foreign_files,
    "files wanted without end": files_again_and_again,
    "steps done that nobody asked for": claims,
    "steps done twice": two_answers,
    "layers without end": layers_without_end,
    "layers that nobody asked for": unasked_layers,
    "silent guests": silence,
    "sessions left open": half_open,
    "sessions beside a session": many_sessions,
    "files that nobody reads": unread_files,
}
CALLS: Final[dict[str, Callable[[Enemy], None]]] = {
    "foreign resources": foreign_resources,
    "calls by chance": calls_by_chance,
    "calls of bytes by chance": bytes_by_chance,
    "false successes": false_success,
    "floods of calls": floods_of_calls,
    "sessions beside calls": both_ways,
    "calls after the end": after_the_end,
}


def in_words(seen: Seen) -> None:
    """See that a build has failed, and says so."""
    assert seen.kind, "a hostile guest was believed"
    assert seen.message
    assert "the bootstrap server failed" not in seen.message, seen.message
    assert all(one.isprintable() or one == "\n" for one in seen.message), seen.message
    assert len(seen.message) < 70_000, len(seen.message)


@trial(
    "hostile-guests",
    "guests with the right certificate that say what they must not, beside good ones",
    seconds=240,
    needs=("root",),  # files are given to their owners in this process
)
def guests(effort: Effort) -> None:
    """One hostile build after the other beside good ones: each fails in words, and takes nobody's room."""
    workshop = Workshop()
    materials = workshop.issue(SERVER, SERVER_AUTH), workshop.issue(GUEST)
    host = Host(effort.directory / "host", AT_ONCE)
    numbers = itertools.count(1)

    def good() -> None:
        name = f"good-{next(numbers)}"
        address = host.begin(name, "files", materials, Limits())
        try:
            good_guest(address, materials[1], effort.directory / name)
            assert host.end(name).kind == ""
        finally:
            host.stop(name)

    def hostile(kind: str, attack: Callable[[Enemy], None], protocol: str, seed: int) -> None:
        name = f"hostile-{next(numbers)}"
        enemy = Enemy(host.begin(name, protocol, materials, LIMITS), materials[1], random.Random(seed))
        try:
            with contextlib.suppress(grpc.RpcError, StopIteration):
                attack(enemy)
            if kind != "sessions left open":
                enemy.close()
            in_words(host.end(name, PATIENCE))
        finally:
            enemy.close()
            host.stop(name)
        host.check()

    attacks = [(*item, "session") for item in SESSION.items()] + [(*item, "calls") for item in CALLS.items()]
    with (
        meanwhile(lambda: effort.attempt("good guests meanwhile", good)),
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        while effort.goes_on():
            some = effort.chance.sample(attacks, len(attacks) if effort.seconds > 30 else AT_ONCE)
            begun = {each[0]: pool.submit(hostile, *each, effort.chance.getrandbits(64)) for each in some}
            for kind, done in begun.items():
                effort.attempt(kind, done.result)
    host.close()
