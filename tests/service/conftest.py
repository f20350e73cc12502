"""Servers, guests and strangers: real certificates, real TLS, real gRPC, all on loopback."""

from __future__ import annotations

import dataclasses
import io
import json
import queue
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry, Resource
from firebuild_bootstrap.events import Event, PeerRefused
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.service import BootstrapServer, Limits, Outcome
from firebuild_pki import TLSMaterial
from firebuild_pki.grpc_credentials import channel_credentials, channel_options

SERVER = "b1.firebuild.internal"
GUEST = "guest.b1.firebuild.internal"
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH


def file_entry(path: str = "f", data: bytes = b"abc", **changes: Any) -> Entry:
    entry = Entry(
        source=path,
        path=path,
        kind=tar.FILE,
        mode=0o644,
        mtime_ns=1,
        size=len(data),
        open=lambda: io.BytesIO(data),
    )
    return dataclasses.replace(entry, **changes)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Workshop:
    """A CA that also makes what no proper CA would: expired, misused, half-finished certificates."""

    def __init__(self, label: str = "Workshop CA", parent: Workshop | None = None, days: int = 1) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._parent = parent
        issuer = parent or self
        now = datetime.now(UTC)
        self.certificate: x509.Certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(label))
            .issuer_name(issuer.certificate.subject if parent else _name(label))
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer._key.public_key()), critical=False
            )
            .sign(issuer._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        name: str,
        usage: x509.ObjectIdentifier = CLIENT_AUTH,
        *,
        start: timedelta = timedelta(minutes=-5),
        lifetime: timedelta = timedelta(hours=1),
        subject: str | None = None,
        trust: bytes | None = None,
    ) -> TLSMaterial:
        key = ec.generate_private_key(ec.SECP256R1())
        begin = datetime.now(UTC) + start
        leaf = (
            x509.CertificateBuilder()
            .subject_name(_name(name if subject is None else subject) if subject != "" else x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + lifetime)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=subject == "")
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        chain = leaf.public_bytes(serialization.Encoding.PEM)
        return TLSMaterial(
            certificate_chain_pem=chain + (self.pem if self._parent else b""),
            private_key_pem=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            trust_pem=trust or (self._parent.pem if self._parent else self.pem),
            server_name=SERVER,
            identity=name,
            not_before=begin,
            not_after=begin + lifetime,
            fingerprint_sha256=leaf.fingerprint(hashes.SHA256()).hex(),
        )


class Caller:
    """A gRPC client with the given material; what it calls is what an old guest would call."""

    def __init__(self, address: str, material: TLSMaterial, *, token: str = "") -> None:
        connect = [
            ("grpc.http_connect_server", address),
            ("grpc.http_connect_headers", f"Proxy-Authorization:Bearer {token}"),
        ]
        options: list[tuple[str, Any]] = [
            *(connect if token else ()),
            *channel_options(material),
            ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),  # each caller has a connection of its own
        ]
        self.channel = grpc.secure_channel(address, channel_credentials(material), options)

    def unary(self, name: str, request: Any, response: Any = pb.Empty, timeout: float = 10.0) -> Any:
        method: Any = self.channel.unary_unary(
            wire.method(name),
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return method(request, timeout=timeout)

    def ping(self, text: str = "p") -> str:
        answer: str = self.unary("Ping", pb.PingRequest(id=text), pb.PingResponse).id
        return answer

    def commands(self) -> list[str]:
        return list(self.unary("Commands", pb.Empty(), pb.CommandsResponse).command)

    def say(self, *texts: str, method: str = "StdOut") -> None:
        self.unary(method, pb.LogMessage(line=texts))

    def abort(self, text: str) -> None:
        self.unary("Abort", pb.AbortRequest(error=text))

    def success(self) -> None:
        self.unary("Success", pb.Empty())

    def resource(self, path: str, stage: str = "") -> Any:
        method: Any = self.channel.unary_stream(
            wire.method("Resource"),
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=pb.ResourceChunk.FromString,
        )
        return method(pb.ResourceRequest(path=path, stage=stage), timeout=30)

    def close(self) -> None:
        self.channel.close()


class OldGuest:
    """Speaks for an old guest, in the words of the scripts that it was told to execute."""

    def __init__(self, calls: Caller) -> None:
        self.calls = calls
        self.commands = [json.loads(text) for text in calls.commands()]
        found = re.search(r"\\001([0-9a-f]{16}):", self.commands[0]["Shell"]["Commands"][2])
        assert found is not None
        self.nonce = found[1]

    def mark(self, kind: str, step: int, value: str = "") -> str:
        return f"\x01{self.nonce}:{kind}:{step}:{value}\x02\n"

    def report(self, kind: str, step: int, value: str = "") -> None:
        self.calls.say(self.mark(kind, step, value))


class Guest:
    """One that speaks in a session, as it likes; what it says is sent at once."""

    def __init__(self, channel: grpc.Channel, *, hello: bool = True) -> None:
        self._says: queue.Queue[bytes | None] = queue.Queue()
        self._more: Iterator[bytes] = iter(())
        method: Any = channel.stream_stream(wire.method("Session"))
        self.call = method(self._messages(), timeout=30)
        if hello:
            self.say(hello=pb.Hello(version=messages.VERSION))

    def say(self, **message: Any) -> None:
        self._says.put(pb.FromGuest(**message).SerializeToString())

    def say_bytes(self, message: bytes) -> None:
        self._says.put(message)

    def say_all(self, many: Iterator[bytes]) -> None:
        """Say these next, each when the one before has left."""
        self._more = many
        self._says.put(None)

    def leave(self) -> None:
        self._says.put(None)

    def _messages(self) -> Iterator[bytes]:
        yield from iter(self._says.get, None)
        yield from self._more

    def done(self, step: int, **failure: Any) -> None:
        self.say(
            done=pb.Done(step=step, duration_ms=1500, failure=pb.Failure(**failure) if failure else None)
        )

    def hear(self, kind: str) -> Any:
        """The next message of the host, which is of this kind."""
        message = messages.decode_to_guest(next(self.call))
        if isinstance(message, memoryview):
            assert kind == "piece"
            return bytes(message)
        assert message.WhichOneof("message") == kind
        return getattr(message, kind)

    def files(self) -> bytes:
        """What comes up to the end of the files: the tar stream."""
        data = b""
        while not isinstance(message := messages.decode_to_guest(next(self.call)), pb.ToGuest) or (
            message.WhichOneof("message") == "group"
        ):
            data += b"" if isinstance(message, pb.ToGuest) else bytes(message)
        assert message.HasField("files_end")
        return data

    def end(self) -> tuple[grpc.StatusCode, str]:
        """How the host ended the stream; what it sent until then is dropped."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError:
            pass
        return self.call.code(), self.call.details()


@dataclass
class Running:
    """A started server with all that a test looks at."""

    server: BootstrapServer
    address: str
    backend: str
    events: list[Event]
    materials: tuple[TLSMaterial, TLSMaterial]
    welcomed: list[float]
    _callers: list[Caller] = field(default_factory=list)

    def caller(
        self,
        material: TLSMaterial | None = None,
        *,
        inner: bool = False,
        token: str = "",
    ) -> Caller:
        address = self.backend if inner else self.address
        self._callers.append(Caller(address, material or self.materials[1], token=token))
        return self._callers[-1]

    def guest(self, *, hello: bool = True) -> Guest:
        return Guest(self.caller().channel, hello=hello)

    def old_guest(self) -> OldGuest:
        return OldGuest(self.caller())

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in list(self.events) if isinstance(event, kind)]

    def outcome(self, timeout: float = 10.0) -> Outcome:
        outcome = self.server.wait(timeout)
        assert outcome is not None
        return outcome

    def refusal(self) -> PeerRefused:
        """The one refusal, when it has come; no handler may have run."""
        deadline = time.monotonic() + 10
        while not self.of(PeerRefused) and time.monotonic() < deadline:
            time.sleep(0.01)
        (refused,) = self.of(PeerRefused)
        assert isinstance(refused, PeerRefused)
        assert self.server.refused_peers == 1
        assert self.server.wait(0) is None
        assert self.events == [refused]
        assert self.welcomed == []
        return refused

    def close_callers(self) -> None:
        for caller in self._callers:
            caller.close()

    def close(self) -> None:
        self.close_callers()
        self.server.stop(0.5)


Serve = Callable[..., Running]


@pytest.fixture(scope="session")
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture(scope="session")
def new_workshop() -> type[Workshop]:
    return Workshop


@pytest.fixture(scope="session")
def materials(workshop: Workshop) -> tuple[TLSMaterial, TLSMaterial]:
    return workshop.issue(SERVER, SERVER_AUTH), workshop.issue(GUEST)


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fb") as path:
        yield Path(path)


@pytest.fixture
def serve(materials: tuple[TLSMaterial, TLSMaterial], short_path: Path) -> Iterator[Serve]:
    running: list[Running] = []

    def start(
        *,
        parcels: Mapping[str, Resource] | None = None,
        commands: list[wire.AnyCommand] | None = None,
        materials: tuple[TLSMaterial, TLSMaterial] = materials,
        limits: Limits | None = None,
        listener: socket.socket | None = None,
        **options: Any,
    ) -> Running:
        copies = [
            wire.CopyCommand(step=2, original="COPY . /to/", source=source, target="/to/")
            for source in parcels or {}
        ]
        told = copies if commands is None else commands
        events: list[Event] = []
        welcomed: list[float] = []
        server = BootstrapServer(
            commands=told,
            resources=parcels or {},
            server_material=materials[0],
            guest_material=materials[1],
            limits=limits,
            **{
                "runtime_directory": short_path,
                "events": events.append,
                "on_guest_connected": lambda: welcomed.append(time.monotonic()),
                **options,
            },
        )
        address = server.start(listener)
        backend = max(short_path.glob("firebuild-*/grpc"), key=lambda path: path.stat().st_ctime_ns)
        running.append(Running(server, address, f"unix:{backend}", events, materials, welcomed))
        return running[-1]

    yield start
    for each in running:
        each.close()
