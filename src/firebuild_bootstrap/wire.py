"""The bootstrap protocol's constants and conversions, shared by the service and the guest.

Imports grpcio, protobuf and the standard library only, because the guest has nothing else.

Commands travel as JSON objects whose keys old peers already know. What is new is in extra keys, which
an old peer ignores: `Step`, `Argv`, `Script`, `Chmod`, `TargetIsDirectory`, `Mounts`, `Network`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

SERVICE: Final = "proto.RootfsServer"
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
# Old peers refuse chunks above 0.9 of a message; 1 MiB measured fastest with checksums.
MAX_CHUNK_BYTES: Final = MAX_MESSAGE_BYTES * 9 // 10
CHUNK_BYTES: Final = 1024 * 1024
# A guest that sends this metadata understands the extensions.
GUEST_HELLO: Final = ("firebuild-guest", "1")
# One that sends this as well takes files packed, and knows the mounts and the network of a RUN. Servers that
# don't know it go by the other.
GUEST_PACKED: Final = ("firebuild-guest", "2")
GUEST: Final = (GUEST_HELLO, GUEST_PACKED)
MOUNTS_SINCE: Final = 2
PACKED_SINCE: Final = 2
# ALPN of a first contact, in which a server tells the guest whose certificate it has seen the token for
# CONNECT: with that its next connections reach the gRPC server's own TLS, which is not ended on the way.
CONTACT_PROTOCOL: Final = "firebuild/2"
TOKEN_BYTES: Final = 16
DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class WireError(ValueError):
    """A peer sent something that the protocol does not allow; the message says what."""


def method(name: str) -> str:
    """Return the full gRPC method path of `name`, for example `/proto.RootfsServer/Ping`."""
    return f"/{SERVICE}/{name}"


def announced(metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """Return the version that a guest announces in the metadata of its calls; 0 for one that does not."""
    known = {hello: number for number, hello in enumerate(GUEST, 1)}
    return max((known.get((name, str(value)), 0) for name, value in metadata), default=0)


def checksum(chunk: bytes) -> bytes:
    """Return the SHA-256 digest that travels with a chunk."""
    return hashlib.sha256(chunk).digest()


# A ResourceChunk whose payload is a piece, as every protobuf library writes it: its tag and length, the
# checksum's tag and four bytes, the tag and length of the data, and the data. Handled here because a library
# copies each megabyte twice more.
_PIECE_TAG: Final = b"\x2a"
_CHECKSUM_TAG: Final = b"\x0d"
_DATA_TAG: Final = b"\x12"


def encode_piece(*parts: bytes | bytearray | memoryview) -> bytes:
    """Write a message that carries a piece of a packed stream, given in parts, with its checksum."""
    size = crc = 0
    for part in parts:
        size += len(part)
        crc = zlib.crc32(part, crc)
    head = _CHECKSUM_TAG + crc.to_bytes(4, "little") + _DATA_TAG + _varint(size)
    return b"".join((_PIECE_TAG, _varint(len(head) + size), head, *parts))


def decode_piece(message: bytes) -> memoryview | None:
    """Return the data of a piece; None for a message that carries something else, or is written otherwise.

    Raises:
        WireError: its checksum is wrong.
    """
    if not message.startswith(_PIECE_TAG):
        return None
    length, begin = _read_varint(message, 1)
    size, start = _read_varint(message, begin + 6)
    data = memoryview(message)[start:]
    tags = message[begin : begin + 1] + message[begin + 5 : begin + 6]
    if tags != _CHECKSUM_TAG + _DATA_TAG or length != len(message) - begin or size != len(data):
        return None
    check_piece(data, int.from_bytes(message[begin + 1 : begin + 5], "little"))
    return data


def check_piece(data: bytes | memoryview, checksum: int) -> None:
    """Compare the data of a piece with its checksum.

    Raises:
        WireError: it is another one.
    """
    if zlib.crc32(data) != checksum:
        raise WireError("the checksum of a piece is wrong")


def _varint(number: int) -> bytes:
    """Write a number as protobuf does, seven bits to a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at`, and where what follows it begins."""
    number = 0
    for shift in range(0, 35, 7):
        byte = data[at] if at < len(data) else 0
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return number, at


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
        WireError: the text is no duration, or one of more than 292 years, which Go can't hold either.
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
        resource: what a new one begins as; empty for nothing.
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


Mount = BindMount | CacheMount | TmpfsMount | SecretMount
SHARING: Final = ("shared", "private", "locked")
NETWORKS: Final = ("default", "none", "host")
MAX_SECRET_BYTES: Final = 500 * 1024  # as in BuildKit
_MAX_ID: Final = 2**32 - 2  # the kernel's last uid; 2^32 - 1 means "leave it" (chown(2))


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command carries: its step number (0 from an old server), text, directory and user."""

    step: int
    original: str
    workdir: str = "/"
    user: str = "0:0"


@dataclass(frozen=True, kw_only=True)
class RunCommand(Command):
    """A RUN. `argv` is executed as it stands; `script` is a file to execute instead (heredoc with `#!`).

    `env` holds ENV, `args` the ARG values in scope; where both name a variable, `env` wins. `network` is
    `default`, `none` (no network but a loopback of its own) or `host` (that of the machine around).
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, str] = field(default_factory=dict)
    script: str | None = None
    mounts: tuple[Mount, ...] = ()
    network: str = "default"


@dataclass(frozen=True, kw_only=True)
class CopyCommand(Command):
    """A COPY or ADD; the guest asks for the resource `source`.

    `target` is as written (relative ones are below `workdir`); `target_is_directory` says that a single
    file goes into it even if it does not exist yet. `chown` and `chmod` are the flags' values.
    """

    source: str
    target: str
    target_is_directory: bool = False
    chown: str | None = None
    chmod: str | None = None
    stage: str = ""
    keyword: str = "COPY"


@dataclass(frozen=True, kw_only=True)
class WorkdirCommand(Command):
    """A WORKDIR: `workdir` has to exist afterwards. Old guests skip it, as everything they don't know."""


AnyCommand = RunCommand | CopyCommand | WorkdirCommand


class Checkpoint(NamedTuple):
    """Asks for the layer of a step that is done."""

    step: int


def needs_mounts(command: AnyCommand) -> bool:
    """Say whether a guest that announces less than `MOUNTS_SINCE` would do something else."""
    return isinstance(command, RunCommand) and bool(command.mounts or command.network != "default")


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


_EXTENSIONS: Final = ("Step", "Argv", "Script", "Chmod", "TargetIsDirectory", "Mounts", "Network")


def encode_command(command: AnyCommand, *, extended: bool = True) -> str:
    """Write a command as the JSON object that travels in `CommandsResponse`.

    Args:
        command: the command.
        extended: with the keys that old guests ignore.

    Raises:
        ValueError: the command would be another one without them.
    """
    if not extended and needs_mounts(command):
        raise ValueError("an old guest would run the command without its mounts")
    document: dict[str, Any] = {
        "OriginalCommand": command.original,
        "Step": command.step,
        "Workdir": _attribute(command.workdir),
        "User": _attribute(command.user),
    }
    match command:
        case RunCommand():
            document |= {
                "Command": command.argv[-1],
                "Shell": {"OriginalCommand": "", "Commands": list(command.argv[:-1])},
                "Env": dict(command.env),
                "Args": dict(command.args),
                "Argv": list(command.argv),
            }
            if command.script is not None:
                document["Script"] = command.script
            if command.mounts:
                document["Mounts"] = [_encode_mount(mount) for mount in command.mounts]
            if command.network != "default":
                document["Network"] = command.network
        case CopyCommand():
            document |= {
                "OriginalSource": command.source,
                "Source": command.source,
                "Target": command.target,
                "TargetIsDirectory": command.target_is_directory,
                "UserFromLocalChown": None if command.chown is None else _attribute(command.chown),
                "Chmod": command.chmod,
            }
            if command.keyword == "COPY":
                document["Stage"] = command.stage
        case WorkdirCommand():
            pass
    if not extended:
        document = {key: value for key, value in document.items() if key not in _EXTENSIONS}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def decode_command(text: str) -> AnyCommand | None:
    """Read one command; None for an instruction that this protocol version does not know.

    Raises:
        WireError: the text is no JSON object or a member is missing or of the wrong type.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a command is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise WireError("a command is not a JSON object")
    members = _Members({str(key).lower(): value for key, value in parsed.items()})
    original = members.get("OriginalCommand", str)
    common = {
        "step": _step(members.get("Step", int, 0)),
        "original": original,
        "workdir": members.attribute("Workdir") or "/",
        "user": members.attribute("User") or "0:0",
    }
    keyword = _keyword(original, bare=bool(members.get("Command", str, "")))
    if keyword == "RUN":
        return _decode_run(members, common)
    if keyword in ("COPY", "ADD"):
        return _decode_copy(members, common, keyword)
    return WorkdirCommand(**common) if keyword else None


def _keyword(original: str, *, bare: bool) -> str:
    """Return what kind of command a text is; old servers send it as it is written.

    What they add by themselves, a pre-build command or the directory of a VOLUME, is a RUN without a text.
    """
    begin = original[:7].upper()
    keyword = next((word for word in ("RUN", "COPY", "ADD", "WORKDIR") if begin.startswith(word)), "")
    return keyword or ("RUN" if bare and not original else "")


def _decode_run(members: _Members, common: dict[str, Any]) -> RunCommand:
    argv = members.strings("Argv")
    if not argv:
        shell = _Members({key.lower(): value for key, value in members.get("Shell", dict).items()})
        argv = (*shell.strings("Commands"), members.get("Command", str))
    return RunCommand(
        argv=argv,
        env=members.mapping("Env"),
        args=members.mapping("Args"),
        script=members.get("Script", str, "") or None,
        mounts=tuple(_decode_mount(mount, common["workdir"]) for mount in members.objects("Mounts")),
        network=members.choice("Network", NETWORKS),
        **common,
    )


def _encode_mount(mount: Mount) -> dict[str, Any]:
    members = {each.name: getattr(mount, each.name) for each in fields(mount)}
    kind = next(name for name, known in _MOUNTS.items() if isinstance(mount, known))
    return {"Type": kind, **{name.title().replace("_", ""): value for name, value in members.items()}}


_MOUNTS: Final[dict[str, type[Mount]]] = {
    "bind": BindMount,
    "cache": CacheMount,
    "tmpfs": TmpfsMount,
    "secret": SecretMount,
}


def _decode_mount(members: _Members, workdir: str) -> Mount:
    """Read one mount; an unknown kind is an error, because the command would run without it."""
    kind = members.get("Type", str)
    target = members.path("Target") if kind != "secret" else members.optional_path("Target")
    if target:
        mount_target(workdir, target)
    elif kind != "secret":
        raise WireError("Target of a mount is empty")
    resource = members.optional_path("Resource")
    if kind in ("bind", "secret") and not resource:
        raise WireError(f"Resource of a {kind} mount is empty")
    match kind:
        case "bind":
            return BindMount(target=target, resource=resource, writable=members.get("Writable", bool, False))
        case "tmpfs":
            return TmpfsMount(target=target, size=members.number("Size", 2**63 - 1, 0))
        case "cache":
            return CacheMount(
                target=target,
                id=members.path("Id"),
                sharing=members.choice("Sharing", SHARING),
                resource=resource,
                read_only=members.get("ReadOnly", bool, False),
                **members.owned(0o755),
            )
        case "secret":
            env = members.optional_path("Env")
            if "=" in env or not (env or target):
                raise WireError(f"Env of a secret mount: expected the name of a variable, found {env!r:.80}")
            return SecretMount(resource=resource, target=target, env=env, **members.owned(0o400))
        case _:
            raise WireError(f"Type of a mount: {kind!r:.80} is not known")


def _decode_copy(members: _Members, common: dict[str, Any], keyword: str) -> CopyCommand:
    return CopyCommand(
        source=members.path("Source"),
        target=members.path("Target"),
        target_is_directory=members.get("TargetIsDirectory", bool, False),
        chown=members.attribute("UserFromLocalChown"),
        chmod=members.get("Chmod", str, "") or None,
        stage=members.get("Stage", str, ""),
        keyword=keyword,
        **common,
    )


def _step(number: int) -> int:
    if not 0 <= number < 2**31:  # it travels back as an int32
        raise WireError(f"Step of a command: expected a number from 0 to 2147483647, found {number!r:.80}")
    return number


def _attribute(value: str) -> dict[str, str]:
    return {"OriginalCommand": "", "Value": value}


class _Members:
    """The members of a JSON object by lower-case name, with their types checked."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members = members

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._members.get(name.lower())
        if value is None:
            if default is None:
                raise WireError(f"a command lacks {name}")
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise WireError(f"{name} of a command: expected {kind.__name__}, found {value!r:.80}")
        return value

    def attribute(self, name: str) -> str | None:
        value = self._members.get(name.lower())
        if value is None:
            return None
        if not isinstance(value, dict):
            raise WireError(f"{name} of a command: expected an object, found {value!r:.80}")
        inner = _Members({str(key).lower(): member for key, member in value.items()})
        return inner.path("Value")

    def path(self, name: str) -> str:
        """Return a member that a system call will take, or that is compared with names of files."""
        value = str(self.get(name, str))
        # JSON can write both; neither can be in a path, nor in a name of a user.
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise WireError(f"{name} of a command: {value!r:.80} contains a NUL or a broken character")
        return value

    def optional_path(self, name: str) -> str:
        """Return what `path` does; an empty text where there is none."""
        return self.path(name) if self._members.get(name.lower()) is not None else ""

    def number(self, name: str, most: int, default: int) -> int:
        value = int(self.get(name, int, default))
        if not 0 <= value <= most:
            raise WireError(f"{name} of a command: expected a number from 0 to {most}, found {value!r:.80}")
        return value

    def owned(self, mode: int) -> dict[str, int]:
        """Return mode, uid and gid of a mount, by the names of its members."""
        return {
            "mode": self.number("Mode", 0o7777, mode),
            "uid": self.number("Uid", _MAX_ID, 0),
            "gid": self.number("Gid", _MAX_ID, 0),
        }

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        """Return one of the known words, the first where there is none."""
        value = str(self.get(name, str, known[0]))
        if value not in known:
            raise WireError(f"{name} of a command: expected {', '.join(known)}, found {value!r:.80}")
        return value

    def objects(self, name: str) -> list[_Members]:
        value = self.get(name, list, [])
        if not all(isinstance(item, dict) for item in value):
            raise WireError(f"{name} of a command: expected objects, found {value!r:.80}")
        return [_Members({str(key).lower(): member for key, member in item.items()}) for item in value]

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.get(name, list, [])
        if not all(isinstance(item, str) for item in value):
            raise WireError(f"{name} of a command: expected strings, found {value!r:.80}")
        return tuple(value)

    def mapping(self, name: str) -> dict[str, str]:
        value = self.get(name, dict, {})
        if not all(isinstance(item, str) for item in value.values()):
            raise WireError(f"{name} of a command: expected string values")
        return dict(value)


# --- the Bootstrap block of the metadata --------------------------------------------------------


_MAX_TIME: Final = 253402300800.0  # the year 10000, in seconds since 1970
_MAX_INTERVAL: Final = 86400.0


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
            raise WireError(f"HostTime of the metadata: {host_time!r:.80} is no number") from error
        if seconds is not None and not 0 <= seconds < _MAX_TIME:
            raise WireError(f"HostTime of the metadata: {host_time!r:.80} is no time")
        interval = document.get("PingInterval") or "5s"
        ping_interval = parse_duration(interval if isinstance(interval, str) else "")
        if ping_interval > _MAX_INTERVAL:
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
