"""The SSH agents that `--ssh` gives to RUN --mount=type=ssh: the user's own, or one made of key files.

The agent's protocol is draft-ietf-sshm-ssh-agent; keys and signatures are in it as RFC 4253 (6.6), RFC 5656,
RFC 8332 and RFC 8709 have them. A RUN may list keys and sign with them, and nothing else, as in BuildKit: it
could else remove the user's keys, or lock the agent. No private key ever leaves this process or that agent.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import tempfile
import threading
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import field
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.agents import AgentSockets, Reply
from firebuild_bootstrap.wire import MAX_AGENT_MESSAGE, SshMount
from firebuild_pki.display import one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    _PrivateKey = RSAPrivateKey | Ed25519PrivateKey | EllipticCurvePrivateKey

_Result = TypeVar("_Result")
DEFAULT_ID: Final = "default"
_FORM: Final = "default or ID[=SOCKET|KEY[,KEY...]]"
# Numbers of the messages, and of the flags of a request to sign (section 6 of the draft).
_FAILURE: Final = b"\x05"
_LIST: Final = b"\x0b"
_KEYS: Final = 12
_SIGN: Final = 13
_SIGNATURE: Final = 14
_RSA_SHA2_256: Final = 2
_RSA_SHA2_512: Final = 4
_MAX_KEY_BYTES: Final = 100 * 1024  # as in BuildKit
_CURVES: Final = {"secp256r1": "nistp256", "secp384r1": "nistp384", "secp521r1": "nistp521"}
# A user may take long to confirm a signature; this is how often it is looked whether the RUN has ended.
_POLL_SECONDS: Final = 0.25


class SshAgent(Protocol):
    """Answers requests of a RUN."""

    def answer(self, request: bytes, over: threading.Event) -> bytes:
        """Return the reply to a request, both without their lengths; a failure for what a RUN may not ask.

        Args:
            request: what came from the guest.
            over: is set when nobody waits for the reply any more.

        Raises:
            OSError: the agent can't be reached.
        """
        ...


@dataclass(frozen=True)
class SocketAgent:
    """The agent that listens on the UNIX socket `path`, such as the user's ssh-agent."""

    path: str

    def answer(self, request: bytes, over: threading.Event) -> bytes:
        """Pass the request on; see `SshAgent.answer`."""
        if request != _LIST and _sign_request(request) is None:
            return _FAILURE
        # By descriptor: the address of a socket has 107 bytes at most (unix(7)).
        descriptor = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX) as agent:
                agent.settimeout(_POLL_SECONDS)
                agent.connect(f"/proc/self/fd/{descriptor}")
                _send(agent, _string(request), over)
                size = int.from_bytes(_receive(agent, 4, over))
                reply = _receive(agent, size, over) if 0 < size <= MAX_AGENT_MESSAGE else _FAILURE
        finally:
            os.close(descriptor)
        return reply if reply[0] in (_KEYS, _SIGNATURE) else _FAILURE


def _send(agent: socket.socket, data: bytes, over: threading.Event) -> None:
    sent = 0
    while sent < len(data):
        sent += _patiently(lambda: agent.send(data[sent:]), over)  # noqa: B023 - called at once


def _receive(agent: socket.socket, size: int, over: threading.Event) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := _patiently(lambda: agent.recv(size - len(data)), over)):  # noqa: B023 - called at once
            raise ConnectionError("it ended the connection")
        data += more
    return data


def _patiently(act: Callable[[], _Result], over: threading.Event) -> _Result:
    """Return what `act` returns, which is tried again while it takes too long, until `over` is set."""
    while True:
        try:
            return act()
        except TimeoutError:
            if over.is_set():
                raise


@dataclass(frozen=True)
class KeyAgent:
    """An agent in memory, with the keys of files; they show in no repr.

    Args:
        keys: by their public part as SSH writes it.
    """

    keys: Mapping[bytes, _PrivateKey] = field(repr=False)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def answer(self, request: bytes, over: threading.Event) -> bytes:  # noqa: ARG002 - it never waits
        """List the keys, or sign; see `SshAgent.answer`."""
        if request == _LIST:
            # Each with an empty comment: a file's name is nothing that a guest has to know.
            keys = b"".join(_string(public) + _string(b"") for public in self.keys)
            return struct.pack(">BI", _KEYS, len(self.keys)) + keys
        wanted = _sign_request(request)
        key = self.keys.get(wanted[0]) if wanted else None
        if wanted is None or key is None:
            return _FAILURE
        with self._one_at_a_time:  # or a guest could have all processors busy with it
            return bytes([_SIGNATURE]) + _string(_signature(key, wanted[1], wanted[2]))


def _sign_request(request: bytes) -> tuple[bytes, bytes, int] | None:
    """Return the public key, the data and the flags of a request to sign; None for any other."""
    try:
        (kind,) = struct.unpack_from(">B", request)
        public, at = _read_string(request, 1)
        data, at = _read_string(request, at)
        (flags,) = struct.unpack(">I", request[at:])
    except struct.error:
        return None
    return (public, data, flags) if kind == _SIGN else None


def _read_string(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from(">I", data, at)
    return data[at + 4 : at + 4 + size], at + 4 + size


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _signature(key: _PrivateKey, data: bytes, flags: int) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

    if isinstance(key, rsa.RSAPrivateKey):
        name: bytes
        algorithm: hashes.HashAlgorithm
        if flags & _RSA_SHA2_256:
            name, algorithm = b"rsa-sha2-256", hashes.SHA256()
        elif flags & _RSA_SHA2_512:
            name, algorithm = b"rsa-sha2-512", hashes.SHA512()
        else:
            name, algorithm = b"ssh-rsa", hashes.SHA1()  # noqa: S303 - what no flag means
        return _string(name) + _string(key.sign(data, padding.PKCS1v15(), algorithm))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        digest = {256: hashes.SHA256(), 384: hashes.SHA384()}.get(key.key_size, hashes.SHA512())
        numbers = utils.decode_dss_signature(key.sign(data, ec.ECDSA(digest)))
        curve = f"ecdsa-sha2-{_CURVES[key.curve.name]}".encode()
        return _string(curve) + _string(b"".join(_string(_mpint(number)) for number in numbers))
    return _string(b"ssh-ed25519") + _string(key.sign(data))


def _mpint(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1)  # a leading zero where it would be negative


@contextmanager
def reachable(agent: SshAgent | None) -> Iterator[dict[str, str]]:
    """Yield this process's environment, with `agent` in it if there is one, for programs such as git."""
    if agent is None:
        yield dict(os.environ)
        return
    if isinstance(agent, SocketAgent):
        yield {**os.environ, "SSH_AUTH_SOCK": agent.path}
        return

    def ask(_identifier: str, request: bytes, reply: Reply) -> None:
        reply(agent.answer(request, threading.Event()))

    with (
        tempfile.TemporaryDirectory(prefix="firebuild-") as directory,  # mode 0700
        closing(AgentSockets(ask)) as sockets,
    ):
        path = os.path.join(directory, "agent")
        sockets.add(path, SshMount(target=path, id="", uid=os.geteuid(), gid=os.getegid()))
        yield {**os.environ, "SSH_AUTH_SOCK": path}


# --- what the user gives --------------------------------------------------------------------------


def read_agents(options: Iterable[str], environment: Mapping[str, str]) -> dict[str, SshAgent]:
    """Read what `--ssh` options name.

    Args:
        options: `ID[=SOCKET|KEY[,KEY...]]`, with `default` for an empty ID; without a path, the agent of the
            environment.
        environment: variables.

    Raises:
        InputError: an id is given twice, there is no agent, or a file is neither a socket nor an
            unencrypted private key. What is in a file is never shown.
    """
    agents: dict[str, SshAgent] = {}
    for text in options:
        name, _, paths = text.partition("=")
        name = name or DEFAULT_ID
        what = f"--ssh {one_line(name, 80)}"
        if name in agents:
            raise InputError(f"{what} is given twice", hint="give all its keys at once: --ssh ID=KEY,KEY")
        agents[name] = _agent(what, paths or environment.get("SSH_AUTH_SOCK", ""))
    return agents


def _agent(what: str, paths: str) -> SshAgent:
    if not paths:
        raise InputError(
            f"{what}: there is no agent: SSH_AUTH_SOCK is not set",
            hint=f"start one (`eval $(ssh-agent)`, `ssh-add`), or name a key; expected {_FORM}",
        )
    keys: dict[bytes, _PrivateKey] = {}
    files = [os.path.abspath(os.path.expanduser(path)) for path in paths.split(",")]
    for path in files:
        shown = f"{what}: {one_line(path, 200)}"
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                if len(files) > 1:
                    raise InputError(f"{shown} is a socket, and has to be the only path")
                return SocketAgent(path)
            with open(path, "rb") as file:
                data = file.read(_MAX_KEY_BYTES + 1)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(f"{shown}: {why}") from error
        key = _private_key(shown, data)
        keys[_public(key)] = key
    return KeyAgent(keys)


def _private_key(shown: str, data: bytes) -> _PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    is_openssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    load = serialization.load_ssh_private_key if is_openssh else serialization.load_pem_private_key
    try:
        key = load(data, None)
    except TypeError:
        raise InputError(
            f"{shown}: the key is encrypted",
            hint=f"add it to an agent (ssh-add FILE) and give that: --ssh {DEFAULT_ID}",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        # Without the cause, which may quote what is in the file.
        raise InputError(
            f"{shown}: expected a socket, or a private key in OpenSSH's form or as PEM"
        ) from None
    if isinstance(key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES
    ):
        return key
    raise InputError(
        f"{shown}: SSH has no keys of this type", hint="expected Ed25519, RSA, or ECDSA on a NIST curve"
    )


def _public(key: _PrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return b64decode(text.split(b" ")[1])
