"""Peers that are not the guest, alone and in crowds, while it works."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Final

from assurance.hosts import Host, good_guest
from assurance.trials import Effort, trial
from firebuild_bootstrap import wire
from firebuild_bootstrap.service import Limits
from firebuild_pki import TLSMaterial
from service.conftest import GUEST, SERVER, SERVER_AUTH, Workshop

LIMITS: Final = Limits(handshake_timeout=3.0)
HOUR: Final = timedelta(hours=1)
OTHER: Final = "guest.b2.firebuild.internal"
HTTP2: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)
CROWD: Final = 400
NAMED: Final = 50
LATE: Final = ("took longer than", "gave way to newer ones")
"""What may be said of any peer that does not hurry."""


class Street:
    """Where the strangers come from: what they have, and the port that they call."""

    def __init__(self, chance: random.Random, workshop: Workshop) -> None:
        self.chance = chance
        far = Workshop("Other CA")
        same = Workshop()
        trust = workshop.pem
        self.certificates: dict[str, tuple[TLSMaterial, str]] = {
            "of another CA": (far.issue(OTHER, trust=trust), "issued by a CA that is not trusted"),
            "of a CA of the same name": (same.issue(GUEST, trust=trust), "certificate"),
            "of the same CA": (workshop.issue(OTHER), "not the one that was issued for this build"),
            "with the guest's name": (workshop.issue(GUEST), "not the one that was issued for this build"),
            "that have ended": (workshop.issue(GUEST, start=-2 * HOUR, lifetime=HOUR), "has expired"),
            "that have not begun": (workshop.issue(GUEST, start=HOUR), "is not valid yet"),
            "for servers": (workshop.issue(GUEST, SERVER_AUTH), "not meant for TLS clients"),
        }
        self.target = ("", 0)
        self._opened: list[socket.socket] = []
        self.called = Counter[str]()
        """How often from each address: a port that was reset is soon another's."""
        self.reasons: dict[str, tuple[str, ...]] = {}
        """What has to be said of who called from there: one of these."""
        self._lock = threading.Lock()

    def moves_to(self, address: str) -> None:
        """Call this port from now on."""
        host, _, port = address.rpartition(":")
        self.target = host, int(port)
        self.called, self.reasons = Counter(), {}

    def call(self, *reasons: str) -> socket.socket:
        """Open a connection, of which one of these reasons has to be told."""
        connection = socket.create_connection(self.target, timeout=60)
        host, port = connection.getsockname()
        with self._lock:
            self.called[f"{host}:{port}"] += 1
            self.reasons[f"{host}:{port}"] = (*self.reasons.get(f"{host}:{port}", ()), *reasons)
        self._opened.append(connection)
        return connection

    def leave(self) -> None:
        """Close what is still open."""
        for connection in self._opened:
            connection.close()
        self._opened.clear()


def heard(connection: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    told = b""
    with contextlib.suppress(OSError):
        while more := connection.recv(65536):
            told += more
    return told


def speak(connection: socket.socket, data: bytes, *, last: bool = False) -> None:
    """Say something; whoever is told may have hung up at any of its bytes.

    Args:
        last: there is nothing more to say.
    """
    with contextlib.suppress(OSError):
        connection.sendall(data)
        if last:
            connection.shutdown(socket.SHUT_WR)


def context_of(material: TLSMaterial | None) -> ssl.SSLContext:
    if material is not None:
        return material.ssl_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def hello(context: ssl.SSLContext) -> bytes:
    """The first words of a TLS client."""
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=SERVER)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def knocks(street: Street, material: TLSMaterial | None, *reasons: str) -> None:
    """Shake hands with what one has, and see that nothing is told."""
    context = context_of(material)
    context.set_alpn_protocols([street.chance.choice(("h2", wire.CONTACT_PROTOCOL))])
    if street.chance.random() < 0.3:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    plain = street.call(*reasons)
    with contextlib.suppress(OSError):
        secure = context.wrap_socket(plain, server_hostname=SERVER)
        with contextlib.closing(secure):
            secure.sendall(HTTP2)
            told = secure.recv(65536)
            assert told == b"", told


def without_certificate(street: Street) -> None:
    knocks(street, None, "it presented no certificate")


def with_certificate(kind: str) -> Callable[[Street], None]:
    def stranger(street: Street) -> None:
        material, reason = street.certificates[kind]
        knocks(street, material, reason)

    return stranger


def plain_http(street: Street) -> None:
    connection = street.call("it does not speak TLS")
    words = (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /x HTTP/1.0\r\n\r\n",
        HTTP2,
        b"OPTIONS * HTTP/1.1\r\n\r\n",
    )
    speak(connection, street.chance.choice(words))
    assert wire.SERVICE.encode() not in heard(connection)


def old_tls(street: Street) -> None:
    context = context_of(None)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.options &= ~(ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1)
    old = street.chance.choice((0x0301, 0x0302))
    first = bytearray(hello(context))
    # The version of the hello, and the extension with those that are supported (RFC 8446, section 4.2.1).
    first[9:11] = old.to_bytes(2)
    if (place := first.find(b"\x00\x2b\x00")) > 0:
        first[place : place + 2] = b"\xfa\xfa"
    connection = street.call("it offers no TLS version from 1.2 on")
    speak(connection, bytes(first))
    heard(connection)


def garbage(street: Street) -> None:
    connection = street.call("", *LATE)
    speak(connection, street.chance.randbytes(street.chance.randrange(1, 40_000)), last=True)
    heard(connection)


def damaged_hello(street: Street) -> None:
    first = bytearray(hello(context_of(None)))
    for _ in range(street.chance.randint(1, 5)):
        first[street.chance.randrange(len(first))] = street.chance.randrange(256)
    connection = street.call("", *LATE)
    speak(connection, bytes(first), last=True)
    heard(connection)


def half_handshake(street: Street) -> None:
    first = hello(context_of(None))
    connection = street.call("closed the connection", "", *LATE)
    speak(connection, first[: street.chance.randrange(1, len(first))])
    hang_up(street, connection)


def hang_up(street: Street, connection: socket.socket) -> None:
    """Close a connection: in order, with a reset, or not at all for now."""
    match street.chance.choice(("close", "reset", "stay")):
        case "close":
            connection.close()
        case "reset":
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()


def scanner(street: Street) -> None:
    hang_up(street, street.call("without a TLS handshake", *LATE))


def slow_words(street: Street) -> None:
    connection = street.call(*LATE)
    with contextlib.suppress(OSError):
        for byte in hello(context_of(None))[:100]:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)
    heard(connection)


def asks_to_pass(street: Street) -> None:
    """Ask for the way through without the guest's token, or without an end."""
    tokens = (b"", street.chance.randbytes(32).hex().encode(), b"x" * 4000, b"\xff\x00")
    head = b"CONNECT x:1 HTTP/1.1\r\nProxy-Authorization: Bearer %s\r\n" % street.chance.choice(tokens)
    connection = street.call("without the token", "it does not speak TLS", "closed the connection", *LATE)
    speak(connection, head + street.chance.choice((b"\r\n", b"\r\n" + HTTP2, b"", b"x" * 5000)))
    hang_up(street, connection)
    if connection.fileno() >= 0:
        assert heard(connection) == b""


STRANGERS: Final[dict[str, Callable[[Street], None]]] = {
    "without a certificate": without_certificate,
    **{
        f"with certificates {kind}": with_certificate(kind)
        for kind in (
            "of another CA",
            "of a CA of the same name",
            "of the same CA",
            "with the guest's name",
            "that have ended",
            "that have not begun",
            "for servers",
        )
    },
    "of plain HTTP": plain_http,
    "of TLS 1.0 and 1.1": old_tls,
    "of garbage": garbage,
    "of damaged hellos": damaged_hello,
    "of half a handshake": half_handshake,
    "that scan ports": scanner,
    "of slow words": slow_words,
    "that ask to pass without a token": asks_to_pass,
}


def crowd(street: Street) -> None:
    """Come all at once, hold the connections, and leave one after the other."""
    first = hello(context_of(None))
    for _ in range(CROWD):
        connection = street.call("")
        if street.chance.random() < 0.5:
            speak(connection, first[: street.chance.randrange(len(first))])
        if street.chance.random() < 0.3:
            hang_up(street, connection)


def at_once(street: Street, kinds: list[str]) -> None:
    """Have some strangers call side by side; raises what the first of them raises."""
    problems: list[BaseException] = []

    def run(kind: str) -> None:
        try:
            STRANGERS[kind](street)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


class Siege:
    """A build whose guest works while strangers call."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self._chance = effort.chance
        workshop = Workshop()
        self._materials = workshop.issue(SERVER, SERVER_AUTH), workshop.issue(GUEST)
        self.street = Street(effort.chance, workshop)
        self.host = Host(effort.directory / "host")
        self._numbers = itertools.count(1)

    def lay(self, strangers: Callable[[], None]) -> None:
        """Serve one build while they call: the guest gets what it wants, and each of them is counted."""
        name = f"build-{next(self._numbers)}"
        address = self.host.begin(name, "files", self._materials, LIMITS)
        self.street.moves_to(address)
        try:
            with self._working(name, address) as again:
                strangers()
                self._all_counted(name)
                count = self.street.called.total()
            seen = self.host.end(name)
        finally:
            self.street.leave()
            self.host.stop(name)
        assert seen.kind == "", seen
        assert seen.welcomed == 1
        assert count <= seen.refused <= count + sum(again), f"{seen.refused} were counted, {count} had called"
        self.host.check()

    @contextlib.contextmanager
    def _working(self, name: str, address: str) -> Iterator[list[int]]:
        """Have the guest work while the strangers are there; it begins before them or after.

        Yields:
            how many connections of the guest came to nothing, once it has ended.
        """
        problems: list[BaseException] = []
        again: list[int] = []
        begins, go = self._chance.random() * 0.5, threading.Event()

        def work() -> None:
            go.wait(begins)
            try:
                again.append(good_guest(address, self._materials[1], self._effort.directory / name))
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield again
        finally:
            thread.join()
        if problems:
            raise problems[0]

    def _all_counted(self, name: str) -> None:
        """Wait until each stranger was refused, and see what was said of those that are named."""
        expected, count = self.street.reasons, self.street.called.total()
        end = time.monotonic() + 60
        # One is counted before it is named.
        while (seen := self.host.seen(name)).refused < count or len(seen.named) < min(count, NAMED):
            told = f"{seen.refused} counted, {len(seen.named)} named"
            assert time.monotonic() < end, f"of {count} strangers {told}"
            time.sleep(0.05)
        named = Counter(peer for peer, _ in seen.named)
        assert not named - self.street.called, "peers were refused that are no strangers, or twice"
        assert len(seen.named) == min(count, NAMED), len(seen.named)
        for peer, reason in seen.named:
            assert reason, peer
            assert reason.isprintable(), reason
            assert any(words in reason for words in (*expected[peer], LATE[1])), (expected[peer], reason)


@trial(
    "strangers",
    "peers that are not the guest, one by one and in crowds, while the guest works",
    seconds=240,
    needs=("root",),  # files are given to their owners in this process
)
def strangers(effort: Effort) -> None:
    """Have strangers of all kinds call while builds go on; each is refused, and the guest is not."""
    siege = Siege(effort)

    def some() -> None:
        kinds = effort.chance.choices(list(STRANGERS), k=effort.chance.randint(10, 45))
        effort.counts.update(kinds)
        at_once(siege.street, kinds)

    def many() -> None:
        for _ in range(2):
            effort.counts["in a crowd"] += CROWD
            crowd(siege.street)

    while effort.goes_on():
        effort.attempt("builds under siege", lambda: siege.lay(some))
        if effort.chance.random() < 0.3:
            effort.attempt("builds under siege", lambda: siege.lay(many))
    siege.host.close()
