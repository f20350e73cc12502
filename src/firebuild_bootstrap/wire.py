"""The bootstrap protocol's constants and conversions, shared by the service and the guest.

Imports grpcio, protobuf and the standard library only, because the guest has nothing else.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final

from firebuild_pki.values import dataclass

SERVICE: Final = "proto.RootfsServer"
MAX_ID: Final = 2**32 - 2
"""The last user or group id: one more is -1, which means "leave it" (chown(2))."""
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
# Old peers refuse chunks above 0.9 of a message; 1 MiB measured fastest with checksums.
MAX_CHUNK_BYTES: Final = MAX_MESSAGE_BYTES * 9 // 10
CHUNK_BYTES: Final = 1024 * 1024
# ALPN of a first contact, in which a server tells the guest whose certificate it has seen the token for
# CONNECT: with that its next connections reach the gRPC server's own TLS, which is not ended on the way.
CONTACT_PROTOCOL: Final = "firebuild/2"
TOKEN_BYTES: Final = 16
HOST_NAME: Final = "firebuild"  # of a machine that builds
DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class WireError(ValueError):
    """A peer sent something that the protocol does not allow; the message says what."""


def method(name: str) -> str:
    """Return the full gRPC method path of `name`, for example `/proto.RootfsServer/Ping`."""
    return f"/{SERVICE}/{name}"


def checksum(chunk: bytes) -> bytes:
    """Return the SHA-256 digest that travels with a chunk."""
    return hashlib.sha256(chunk).digest()


def absolute(workdir: str, path: str) -> str:
    """Return where `path` is in an image, below `workdir` if it is relative, without `.`, `..` and `//`.

    A path of a Dockerfile is cleaned as text, before a link is followed, as Docker and BuildKit do it (Go's
    path.Join): with a link /a to x/y, `/a/../g` is /g, where the kernel would go to /x/g.
    """
    return "/" + posixpath.normpath(posixpath.join("/", workdir, path)).lstrip("/")


# --- durations, as Go writes them ---------------------------------------------------------------

_MAX_DURATION: Final = 2**63 / 1e9  # Go counts nanoseconds in 64 bits
_UNITS: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_PART: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")

_MAX_DURATION_TEXT: Final = 100


def format_duration(seconds: float) -> str:
    """Write a duration as Go reads it, with millisecond resolution: `5s`, `1500ms`."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def parse_duration(text: str) -> float:
    """Read a Go duration such as `1m30s` and return seconds.

    Raises:
        WireError: the text is not a duration, or one of more than 292 years, which Go can't hold either.
    """
    if text == "0":
        return 0.0
    # The length has a limit because many digits without a unit take quadratic time.
    parts = _PART.findall(text) if len(text) <= _MAX_DURATION_TEXT else []
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise WireError(f"expected a duration such as 5s or 1m30s, found {text!r:.80}")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds > _MAX_DURATION:
        raise WireError(f"expected a duration of at most 292 years, found {text!r:.80}")
    return seconds


# --- commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BindMount:
    """Files that a RUN sees at `target`: the guest asks for the resource `resource`, as a COPY does.

    A directory is merged into the mount, a single file becomes the mount. What is written to it, if it is
    `writable`, is thrown away.
    """

    target: str
    resource: str
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class CacheMount:
    """A directory that outlives the RUN, and the build where the machine can keep it.

    Args:
        target: where it is.
        id: which one: the same id is the same directory, in every build.
        sharing: `shared`, `private` (a second one while the first is in use) or `locked` (wait for it).
        resource: what a new one begins as; empty for none.
        read_only: the RUN can't write to it.
        mode: permission bits of a new one without a resource.
        uid: its owner.
        gid: its group.
    """

    target: str
    id: str
    sharing: str = "shared"
    resource: str = ""
    read_only: bool = False
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, kw_only=True)
class TmpfsMount:
    """An empty directory in memory; `size` in bytes, 0 for what the kernel allows."""

    target: str
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class SecretMount:
    """A secret: a file at `target`, the variable `env`, or both. It comes as the only file of `resource`."""

    resource: str
    target: str = ""
    env: str = ""
    mode: int = 0o400
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, kw_only=True)
class SshMount:
    """A socket at `target` that leads to the user's SSH agent `id`."""

    target: str
    id: str
    mode: int = 0o600
    uid: int = 0
    gid: int = 0


Mount = BindMount | CacheMount | TmpfsMount | SecretMount | SshMount
SHARING: Final = ("shared", "private", "locked")
NETWORKS: Final = ("default", "none", "host")
MAX_SECRET_BYTES: Final = 500 * 1024  # as in BuildKit
INPUT_BYTES: Final = 64 * 1024
"""Of standard input on the way to a command: sent, and not taken by it yet."""
PROBE_BYTES: Final = 4096
"""Of what a probe writes, that are kept; as many as Docker keeps of a HEALTHCHECK."""
MAX_AGENT_MESSAGE: Final = 256 * 1024  # as in OpenSSH (AGENT_MAX_LEN), in either direction
MAX_AGENT_REQUESTS: Final = 32  # that wait for a reply, and connections of a RUN to its agents


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command carries: its step number (0 from an old server), text, directory and user."""

    step: int
    original: str
    workdir: str = "/"
    user: str = "0:0"


@dataclass(frozen=True, kw_only=True)
class IdentityFiles:
    """Where a command finds who its machine is: certificate, key and trust in files (docs/identity.md).

    Args:
        names: DNS names and URIs of the certificate.
        owner: of the files, USER[:GROUP] of the image; empty for the command's own user.
        mode: of the file of the key.
        csr: the key is made in the machine, and does not leave it.
    """

    names: tuple[str, ...]
    owner: str = ""
    mode: int = 0o400
    csr: bool = False


@dataclass(frozen=True, kw_only=True)
class Attach:
    """Makes a RUN the command that its machine is there for: signals reach it, and its exit status is told.

    Args:
        input: standard input is passed on; else it is empty.
        terminal: all three streams are one terminal.
        rows: of the terminal, 0 where nobody knows.
        columns: of the terminal.
        read_only: the command can't write to the image.
        init: it is process 1, with all rights that the root of the machine has.
        identity: the files that say who its machine is.
        probed: other commands are executed beside it, to see how it is.
        volumes: directories that are made for it where there is nothing.
    """

    input: bool = False
    terminal: bool = False
    rows: int = 0
    columns: int = 0
    read_only: bool = False
    init: bool = False
    identity: IdentityFiles | None = None
    probed: bool = False
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunCommand(Command):
    """A RUN. `argv` is executed as it stands; `script` is a file to execute instead (heredoc with `#!`).

    `env` holds ENV, `args` the ARG values in scope; where both name a variable, `env` wins. `network` is
    `default`, `none` (no network but a loopback of its own) or `host` (that of the machine around). With
    `attach` it is no step of a build. With `pauses` the host is asked, where it fails, for one that is
    executed in its place before its failure counts.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, str] = field(default_factory=dict)
    script: str | None = None
    mounts: tuple[Mount, ...] = ()
    network: str = "default"
    attach: Attach | None = None
    pauses: bool = False


@dataclass(frozen=True, kw_only=True)
class CopyCommand(Command):
    """A COPY or ADD; the guest asks for the resource `source`.

    `target` is as written (relative ones are below `workdir`); `target_is_directory` says that a single
    file goes into it even if it does not exist yet. `chown` and `chmod` are the flags' values. With `link`
    the image is not looked at: what is copied is made on an empty root, and then lies on what is there.
    """

    source: str
    target: str
    target_is_directory: bool = False
    chown: str | None = None
    chmod: str | None = None
    link: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkdirCommand(Command):
    """A WORKDIR: `workdir` has to exist afterwards."""


AnyCommand = RunCommand | CopyCommand | WorkdirCommand


def mount_resources(command: AnyCommand) -> tuple[str, ...]:
    """Return the names of the resources that a guest may ask for because of the mounts of a command."""
    mounts = command.mounts if isinstance(command, RunCommand) else ()
    return tuple(name for mount in mounts if (name := getattr(mount, "resource", "")))


def mount_target(workdir: str, target: str) -> str:
    """Return the path of a mount point in the image.

    Raises:
        WireError: nothing can be mounted there: a RUN needs its root, /proc and /dev as they are. What is
            below /dev, such as /dev/shm, may be covered.
    """
    path = absolute(workdir, target)
    if path in ("/", "/dev", "/proc") or path.startswith("/proc/"):
        raise WireError(f"nothing can be mounted on {path!r:.200}")
    return path


# --- the blocks Bootstrap and Identity of the metadata ------------------------------------------


_MAX_TIME: Final = 253402300800.0  # the year 10000, in seconds since 1970
MAX_INTERVAL: Final = 86400.0
"""Seconds between signs of life, at most."""


@dataclass(frozen=True, kw_only=True)
class BootstrapBlock:
    """What the guest needs to call back: `latest/meta-data/Bootstrap`, every leaf a string.

    `host_time` is the host's clock in seconds since 1970, for guests that boot without one.
    """

    host_port: str
    ca_chain: str
    cert: str
    key: str = field(repr=False)
    server_name: str
    ping_interval: float = 5.0
    host_time: float | None = None

    def as_json(self) -> dict[str, str]:
        """Return the block with its wire names."""
        document = {
            "HostPort": self.host_port,
            "CAChain": self.ca_chain,
            "Cert": self.cert,
            "Key": self.key,
            "ServerName": self.server_name,
            "PingInterval": format_duration(self.ping_interval),
        }
        if self.host_time is not None:
            document["HostTime"] = f"{self.host_time:.3f}"
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> BootstrapBlock:
        """Read the block.

        Raises:
            WireError: a member is missing or no string; its value is never part of the message.
        """

        def leaf(name: str) -> str:
            value = document.get(name)
            if not isinstance(value, str) or not value:
                raise WireError(f"the Bootstrap metadata lacks {name}")
            return value

        host_time = document.get("HostTime")
        try:
            seconds = float(host_time) if isinstance(host_time, str) else None
        except ValueError as error:
            raise WireError(f"HostTime of the metadata: {host_time!r:.80} is not a number") from error
        if seconds is not None and not 0 <= seconds < _MAX_TIME:
            raise WireError(f"HostTime of the metadata: {host_time!r:.80} is not a time")
        interval = document.get("PingInterval") or "5s"
        try:
            ping_interval = parse_duration(interval if isinstance(interval, str) else repr(interval))
        except WireError as error:
            raise WireError(f"PingInterval of the metadata: {error}") from None
        if ping_interval > MAX_INTERVAL:
            raise WireError(f"PingInterval of the metadata: {interval!r:.80} is more than a day")
        return cls(
            host_port=leaf("HostPort"),
            ca_chain=leaf("CAChain"),
            cert=leaf("Cert"),
            key=leaf("Key"),
            server_name=leaf("ServerName"),
            ping_interval=ping_interval,
            host_time=seconds,
        )


IDENTITY_DIRECTORY: Final = "/run/firebuild/tls"
"""Where a command finds cert.pem, key.pem and ca.pem."""


@dataclass(frozen=True, kw_only=True)
class IdentityBlock:
    """Who a machine is: `latest/meta-data/Identity`, until the guest has taken it; every leaf a string.

    Args:
        number: which of the machine's certificates, from 1.
        cert: PEM: the certificate, then its issuers.
        key: PKCS#8 PEM.
        ca: PEM: the anchors to check peers with.
    """

    number: int
    cert: str
    key: str = field(repr=False)
    ca: str

    def as_json(self) -> dict[str, str]:
        """Return the block with its wire names."""
        return {"Number": str(self.number), "Cert": self.cert, "Key": self.key, "CA": self.ca}

    @classmethod
    def from_json(cls, document: object) -> IdentityBlock:
        """Read the block.

        Raises:
            WireError: it, or a member, is missing or no string; no value is part of the message.
        """
        block = document if isinstance(document, dict) else {}
        for name in ("Number", "Cert", "Key", "CA"):
            if not isinstance(block.get(name), str) or not block[name]:
                raise WireError(f"the Identity metadata lacks {name}")
        if not (block["Number"].isascii() and block["Number"].isdecimal()):
            raise WireError("Number of the Identity metadata is not a number")
        return cls(number=int(block["Number"][:18]), cert=block["Cert"], key=block["Key"], ca=block["CA"])
