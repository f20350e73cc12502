"""What travels before the first step between peers of which one knows no `Session`: commands as JSON.

Its keys are those that old peers know, and match case-insensitively. What came later is in keys that they
ignore: `Step`, `Argv`, `Script`, `Chmod`, `TargetIsDirectory`, `Mounts`, `Network`. Both sides import this,
so nothing but the protocol and the standard library is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Final

from firebuild_bootstrap.wire import (
    NETWORKS,
    SHARING,
    AnyCommand,
    BindMount,
    CacheMount,
    CopyCommand,
    Mount,
    RunCommand,
    SecretMount,
    TmpfsMount,
    WireError,
    WorkdirCommand,
    mount_target,
)

# A guest that sends this metadata understands the extensions.
GUEST_HELLO: Final = ("firebuild-guest", "1")
# One that sends this as well takes files packed, and knows the mounts and the network of a RUN. Servers that
# don't know it go by the other.
GUEST_PACKED: Final = ("firebuild-guest", "2")
GUEST: Final = (GUEST_HELLO, GUEST_PACKED)
MOUNTS_SINCE: Final = 2
PACKED_SINCE: Final = 2
_MAX_ID: Final = 2**32 - 2  # the kernel's last uid; 2^32 - 1 means "leave it" (chown(2))


def announced(metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """Return the version that a guest announces in the metadata of its calls; 0 for one that does not."""
    known = {hello: number for number, hello in enumerate(GUEST, 1)}
    return max((known.get((name, str(value)), 0) for name, value in metadata), default=0)


def needs_mounts(command: AnyCommand) -> bool:
    """Say whether a guest that announces less than `MOUNTS_SINCE` would do something else."""
    return isinstance(command, RunCommand) and bool(command.mounts or command.network != "default")


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
