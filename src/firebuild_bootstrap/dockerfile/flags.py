"""The flags that instructions know; all others are errors.

https://docs.docker.com/reference/dockerfile/
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from firebuild_bootstrap.dockerfile.syntax import Instruction, guess, short


class _Kind(Enum):
    VALUE = "value"
    VALUES = "values"  # may be repeated
    SWITCH = "switch"


_COPYING: Final = {
    "chown": _Kind.VALUE,
    "chmod": _Kind.VALUE,
    "link": _Kind.SWITCH,
    "exclude": _Kind.VALUES,
}
_FLAGS: Final[dict[str, dict[str, _Kind]]] = {
    "FROM": {"platform": _Kind.VALUE},
    "RUN": {
        "mount": _Kind.VALUES,
        "network": _Kind.VALUE,
        "security": _Kind.VALUE,
        "device": _Kind.VALUES,
    },
    "COPY": _COPYING | {"from": _Kind.VALUE, "parents": _Kind.SWITCH},
    "ADD": _COPYING | {"checksum": _Kind.VALUE, "keep-git-dir": _Kind.SWITCH, "unpack": _Kind.SWITCH},
    "HEALTHCHECK": dict.fromkeys(
        ("interval", "timeout", "start-period", "start-interval", "retries"), _Kind.VALUE
    ),
}


@dataclass
class Flags:
    """The flags of one instruction, as they are written.

    Args:
        values: of flags that take one.
        lists: of flags that may be repeated, in their order.
        switches: those that are given, on or off.
    """

    values: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)


def read_flags(instruction: Instruction) -> Flags:
    """Return an instruction's flags; variables in them are not expanded.

    Raises:
        InputError: a flag is unknown, given twice, lacks its value, or has one that it can't have.
    """
    known = _FLAGS.get(instruction.keyword, {})
    flags = Flags()
    for flag in instruction.flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        kind = known.get(name)
        if kind is None:
            raise _unknown(instruction, name, known)
        title = f"{instruction.keyword} --{name}"
        if name in flags.values or name in flags.switches:
            raise instruction.error(f"{title} is given twice")
        if kind is _Kind.SWITCH:
            if equals and value.lower() not in ("true", "false"):
                raise instruction.error(f"{title}: expected true or false, found {short(value)!r}")
            flags.switches[name] = value.lower() != "false"
        elif not equals:
            raise instruction.error(f"{title}: expected a value: --{name}=…")
        elif kind is _Kind.VALUES:
            flags.lists.setdefault(name, []).append(value)
        else:
            flags.values[name] = value
    return flags


def _unknown(instruction: Instruction, name: str, known: dict[str, _Kind]) -> Exception:
    if hint := guess(f"--{name}", [f"--{each}" for each in known]):
        pass
    elif known:
        hint = f"{instruction.keyword} knows " + ", ".join(f"--{each}" for each in known)
    else:
        hint = f"{instruction.keyword} has no flags"
    return instruction.error(f"unknown flag --{short(name)} of {instruction.keyword}", hint=hint)
