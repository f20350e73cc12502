"""What travels before the first step between peers of which one knows no `Session`: commands as JSON.

Its keys are those that old peers know, and match case-insensitively. What came later is in keys that they
ignore: `Step`, `Argv`, `Script`, `Chmod`, `TargetIsDirectory`. Both sides import this,
so nothing but the protocol and the standard library is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from firebuild_bootstrap.wire import AnyCommand, CopyCommand, RunCommand, WireError, WorkdirCommand

# A guest that sends this metadata understands the extensions.
GUEST: Final = ("firebuild-guest", "1")


def announced(metadata: Iterable[tuple[str, str | bytes]]) -> bool:
    """Say whether a guest understands the extensions, by the metadata of one of its calls."""
    return GUEST in metadata


def needs_mounts(command: AnyCommand) -> bool:
    """Say whether a guest that knows no `Session` would do something else."""
    return isinstance(command, RunCommand) and bool(command.mounts or command.network != "default")


_EXTENSIONS: Final = ("Step", "Argv", "Script", "Chmod", "TargetIsDirectory")


def encode_command(command: AnyCommand, *, extended: bool = True) -> str:
    """Write a command as the JSON object that travels in `CommandsResponse`.

    Args:
        command: the command.
        extended: with the keys that old guests ignore.

    Raises:
        ValueError: the command would be another one without them.
    """
    if needs_mounts(command):
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
        **common,
    )


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
