"""The agents of `--ssh`: which keys they take, what they sign, and what a RUN may not ask them."""

from __future__ import annotations

import queue
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from firebuild_bootstrap import wire
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.agents import AgentSockets, Reply
from firebuild_bootstrap.sshagent import KeyAgent, SocketAgent, SshAgent, reachable, read_agents
from support import no_descriptors

LIST = b"\x0b"
FAILURE = b"\x05"
NEVER = threading.Event()
MOUNT = wire.SshMount(target="/a", id="default")


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def sign(public: bytes, data: bytes = b"data", flags: int = 0) -> bytes:
    return b"\x0d" + string(public) + string(data) + struct.pack(">I", flags)


def strings(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = int.from_bytes(data[:4])
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found


def write(path: Path, key: Any, form: PrivateFormat = PrivateFormat.OpenSSH) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
    return path


def read(*options: str, **environment: str) -> dict[str, SshAgent]:
    return read_agents(options, environment)


@pytest.fixture
def ed25519_key(tmp_path: Path) -> Path:
    return write(tmp_path / "id", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Callable[..., SocketAgent]]:
    """Makes an agent that says the same to everything, and keeps what it was asked."""
    listener = socket.socket(socket.AF_UNIX)
    path = tmp_path / "socket"
    listener.bind(str(path))
    listener.listen()
    threads = []

    def start(says: bytes, asked: list[bytes] | None = None) -> SocketAgent:
        def serve() -> None:
            with suppress(OSError):
                while True:
                    with closing(listener.accept()[0]) as client:
                        request = client.recv(1 << 20)
                        if asked is not None:
                            asked.append(request)
                        client.sendall(says)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        (agent,) = read(f"a={path}").values()
        assert isinstance(agent, SocketAgent)
        return agent

    yield start
    listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    listener.close()


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.needs("ssh-agent")
def test_openssh_s_own_client_is_content_with_the_signatures_of_each_type_of_key(tmp_path: Path) -> None:
    kinds = (("ed25519", "256"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521"), ("rsa", "2048"))
    files = [tmp_path / f"{kind}{bits}" for kind, bits in kinds]
    for (kind, bits), file in zip(kinds, files, strict=True):
        form = ("-m", "PEM") if bits in ("384", "2048") else ()
        words = ["ssh-keygen", "-q", "-t", kind, "-b", bits, "-N", "", *form, "-f", file]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    (agent,) = read(f"work={','.join(map(str, files))}").values()
    with reachable(agent) as environment:
        keys = subprocess.run(["ssh-add", "-L"], env=environment, check=True, capture_output=True, text=True)
        subprocess.run(["ssh-add", "-T", *(f"{file}.pub" for file in files)], env=environment, check=True)
        folder = Path(environment["SSH_AUTH_SOCK"]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert [line.split() for line in keys.stdout.splitlines()] == [
        Path(f"{file}.pub").read_text().split()[:2] for file in files
    ]
    assert not folder.exists()
    text = files[0].read_text().splitlines()[2]
    assert text not in repr(agent)
    assert "object" not in repr(agent)


@pytest.mark.parametrize(
    ("flags", "name", "algorithm"),
    [
        (0, b"ssh-rsa", hashes.SHA1()),
        (2, b"rsa-sha2-256", hashes.SHA256()),
        (4, b"rsa-sha2-512", hashes.SHA512()),
    ],
)
def test_the_flags_of_a_request_choose_the_digest_of_rsa(
    tmp_path: Path, flags: int, name: bytes, algorithm: hashes.HashAlgorithm
) -> None:
    key = rsa.generate_private_key(65537, 2048)
    (agent,) = read(f"={write(tmp_path / 'id', key, PrivateFormat.TraditionalOpenSSL)}").values()
    public, comment = strings(agent.answer(LIST, NEVER)[5:])
    assert comment == b""
    reply = agent.answer(sign(public, flags=flags), NEVER)
    (signature,) = strings(reply[1:])
    assert (reply[0], strings(signature)[0]) == (14, name)
    key.public_key().verify(strings(signature)[1], b"data", padding.PKCS1v15(), algorithm)


@pytest.mark.parametrize("kind", ["keys", "socket"])
@pytest.mark.parametrize(
    "request_",
    [
        b"\x11" + bytes(40),  # add a key
        b"\x12" + bytes(40),  # remove one
        b"\x13",  # remove all
        b"\x16" + string(b"x"),  # lock
        b"\x17" + string(b"x"),  # unlock
        b"\x1b" + string(b"session-bind@openssh.com"),
        LIST + b"\0",
        sign(b"x") + b"\0",
        sign(b"x")[:-1],
        b"\x0d\xff\xff\xff\xff",
        b"\x0d",
        sign(b"an unknown key"),
    ],
)
def test_a_run_may_list_and_sign_and_nothing_else(
    kind: str, request_: bytes, ed25519_key: Path, listening: Callable[..., SocketAgent]
) -> None:
    asked: list[bytes] = []
    if kind == "keys":
        (agent,) = read(f"a={ed25519_key}").values()
        assert isinstance(agent, KeyAgent)
        assert agent.answer(request_, NEVER) == FAILURE
        return
    agent = listening(string(b"\x0e" + string(b"s")), asked)
    allowed = request_ == sign(b"an unknown key")
    assert (agent.answer(request_, NEVER) == FAILURE) is not allowed
    assert asked == ([string(request_)] if allowed else [])


# --- the user's agent -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "heard"),
    [
        (string(b"\x0c" + bytes(4)), b"\x0c" + bytes(4)),
        (string(FAILURE), FAILURE),
        (string(b"\x06"), FAILURE),  # a success of what nobody has asked for
        (string(b""), FAILURE),
        (struct.pack(">I", 2**32 - 1), FAILURE),
        (struct.pack(">I", wire.MAX_AGENT_MESSAGE + 1), FAILURE),
    ],
)
def test_of_the_user_s_agent_only_what_was_asked_comes_back(
    listening: Callable[..., SocketAgent], says: bytes, heard: bytes
) -> None:
    assert listening(says).answer(LIST, NEVER) == heard


@pytest.mark.parametrize("says", [b"", b"\0\0", string(b"\x0c123")[:-1]])
def test_an_agent_that_ends_in_the_middle_is_an_error(
    listening: Callable[..., SocketAgent], says: bytes
) -> None:
    with pytest.raises(ConnectionError):
        listening(says).answer(LIST, NEVER)


@pytest.mark.root
def test_nobody_waits_for_an_agent_when_the_run_is_over(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 100) / "socket"  # longer than the address of a socket may be
    path.parent.mkdir()
    over = threading.Event()
    with closing(AgentSockets(lambda _id, _request, _reply: over.set())) as silent:
        silent.add(str(path), MOUNT)
        (agent,) = read("default", SSH_AUTH_SOCK=str(path)).values()
        with pytest.raises(TimeoutError):
            agent.answer(LIST, over)
    assert over.is_set()


# --- options --------------------------------------------------------------------------------------


def test_ids_have_the_agent_of_the_environment_unless_they_name_one(
    listening: Callable[..., SocketAgent], ed25519_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = listening(b"").path
    monkeypatch.chdir(ed25519_key.parent)
    monkeypatch.setenv("HOME", str(ed25519_key.parent))
    agents = read("", "b", f"c={path}", "d=id", "e=~/id,id", SSH_AUTH_SOCK=path)
    assert list(agents) == ["default", "b", "c", "d", "e"]
    assert [agents[name] for name in ("default", "b", "c")] == [SocketAgent(path)] * 3
    assert len(agents["e"].keys) == 1  # type: ignore[attr-defined]


def test_what_is_no_agent_is_an_error_that_shows_no_content(
    tmp_path: Path, ed25519_key: Path, listening: Callable[..., SocketAgent]
) -> None:
    path = listening(b"").path
    (tmp_path / "text").write_text("hunter2")
    (tmp_path / "large").write_bytes(ed25519_key.read_bytes() + b"\n" * 200_000)
    broken = ed25519_key.read_text().splitlines()
    broken[2] = broken[2].swapcase()
    (tmp_path / "broken").write_text("\n".join(broken))
    write(tmp_path / "koblitz", ec.generate_private_key(ec.SECP256K1()), PrivateFormat.PKCS8)
    write(tmp_path / "dsa", dsa.generate_private_key(2048), PrivateFormat.PKCS8)
    for options, words in {
        ("default",): "--ssh default: there is no agent: SSH_AUTH_SOCK is not set",
        ("a=none",): f"--ssh a: {Path.cwd()}/none: No such file or directory",
        ("a=\0",): "--ssh a: ",
        (f"\x1b={tmp_path}",): f"--ssh \\x1b: {tmp_path}: Is a directory",
        (f"a={tmp_path}/text",): "expected a socket, or a private key in OpenSSH's form or as PEM",
        (f"a={tmp_path}/broken",): "expected a socket, or a private key in OpenSSH's form or as PEM",
        (f"a={tmp_path}/koblitz",): "SSH has no keys of this type",
        (f"a={tmp_path}/dsa",): "SSH has no keys of this type",
        (f"a={path},{ed25519_key}",): f"{path} is a socket, and has to be the only path",
        (f"a={ed25519_key}", "a=b"): "--ssh a is given twice",
    }.items():
        with pytest.raises(InputError) as caught:
            read(*options)
        assert words in caught.value.message
        assert "hunter2" not in str(caught.value)
        assert broken[2] not in str(caught.value)


@pytest.mark.needs("ssh-agent")
@pytest.mark.parametrize("form", ["RFC4716", "PKCS8", "PEM"])
def test_an_encrypted_key_is_refused(tmp_path: Path, form: str) -> None:
    words = ["ssh-keygen", "-q", "-t", "ecdsa", "-m", form, "-N", "hunter2", "-f", f"{tmp_path}/id"]
    subprocess.run(words, check=True)
    with pytest.raises(InputError) as caught:
        read(f"a={tmp_path}/id")
    assert caught.value.message == f"--ssh a: {tmp_path}/id: the key is encrypted"
    assert "ssh-add FILE" in str(caught.value)


# --- the guest's sockets --------------------------------------------------------------------------


def connected(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return client


def receive(client: socket.socket, size: int) -> bytes:
    return client.recv(size, socket.MSG_WAITALL)


@pytest.mark.root
def test_the_guest_passes_on_whole_messages_and_one_of_a_client_at_a_time(tmp_path: Path) -> None:
    asked: list[tuple[str, bytes]] = []

    def echo(identifier: str, request: bytes, reply: Reply) -> None:
        asked.append((identifier, request))
        reply(request[::-1])

    largest = bytes(wire.MAX_AGENT_MESSAGE - 1) + b"x"
    with closing(AgentSockets(echo)) as sockets:
        for name in "ab":
            sockets.add(f"{tmp_path}/{name}", wire.SshMount(target="/a", id=name, mode=0o640))
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
        with closing(connected(tmp_path / "a")) as client, closing(connected(tmp_path / "b")) as other:
            other.sendall(b"\0\0")
            client.sendall(string(b"12") + string(b"34"))  # before the first is answered
            assert receive(client, 12) == string(b"21") + string(b"43")
            sender = threading.Thread(target=client.sendall, args=(string(largest),))
            sender.start()
            assert receive(client, len(largest) + 4) == string(largest[::-1])
            sender.join()
            other.sendall(b"\0\2ab")
            assert receive(other, 6) == string(b"ba")
            for refused in (bytes(4), struct.pack(">I", wire.MAX_AGENT_MESSAGE + 1)):
                with closing(connected(tmp_path / "a")) as third:
                    third.sendall(refused)
                    assert third.recv(1) == b""
    assert asked == [("a", b"12"), ("a", b"34"), ("a", largest), ("b", b"ab")]


@pytest.mark.root
def test_a_client_that_comes_while_there_is_no_descriptor_is_answered_later(tmp_path: Path) -> None:
    with closing(AgentSockets(lambda _id, request, reply: reply(request))) as sockets:
        sockets.add(f"{tmp_path}/a", MOUNT)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as client:
            with no_descriptors():
                first.connect(f"{tmp_path}/a")  # accept(2) takes a descriptor before it waits
                client.connect(f"{tmp_path}/a")
                time.sleep(0.3)
            client.sendall(string(LIST))
            assert receive(client, 5) == string(LIST)


@pytest.mark.root
def test_more_clients_wait_until_others_have_gone_and_all_go_with_the_run(tmp_path: Path) -> None:
    waiting: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    with closing(AgentSockets(lambda _identifier, _request, reply: waiting.put(reply))) as sockets:
        sockets.add(f"{tmp_path}/a", MOUNT)
        clients = [connected(tmp_path / "a") for _ in range(wire.MAX_AGENT_REQUESTS + 3)]
        for client in clients:
            client.sendall(string(LIST))
            client.shutdown(socket.SHUT_WR)  # each goes when it is answered
        replies = [waiting.get(timeout=30) for _ in range(wire.MAX_AGENT_REQUESTS)]
        assert waiting.empty()
        for reply in replies[:3]:
            reply(b"gone")
        for _ in range(3):
            waiting.get(timeout=30)
    heard = []
    for client in clients:
        with closing(client), closing(client.makefile("rb")) as file:
            heard.append(file.read())
    assert sorted(heard) == [b""] * wire.MAX_AGENT_REQUESTS + [string(b"gone")] * 3
