"""The flags that instructions know; all others are errors.

https://docs.docker.com/reference/dockerfile/
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from enum import Enum
from typing import Final

from firebuild_bootstrap.dockerfile.syntax import Instruction, short


class _Kind(Enum):
    VALUE = "value"
    # Known to Docker, and refused here.
    LATER = "later"
    LATER_SWITCH = "later-switch"


_COPYING: Final = {
    "chown": _Kind.VALUE,
    "chmod": _Kind.VALUE,
    "link": _Kind.LATER_SWITCH,
    "exclude": _Kind.LATER,
}
_FLAGS: Final[dict[str, dict[str, _Kind]]] = {
    "FROM": {"platform": _Kind.VALUE},
    "RUN": dict.fromkeys(("mount", "network", "security", "device"), _Kind.LATER),
    "COPY": _COPYING | {"from": _Kind.LATER, "parents": _Kind.LATER_SWITCH},
    "ADD": _COPYING
    | {"checksum": _Kind.VALUE, "keep-git-dir": _Kind.LATER_SWITCH, "unpack": _Kind.LATER_SWITCH},
    "HEALTHCHECK": dict.fromkeys(
        ("interval", "timeout", "start-period", "start-interval", "retries"), _Kind.VALUE
    ),
}
_HINTS: Final = {
    "link": "remove --link: the copy is the same unless the destination leads through a symlink",
    "from": "build the files in this stage, or copy them from the build context",
    "mount": "copy what the command needs, and remove it in the same RUN",
    "network": "RUN has the network of the machine",
}


def read_flags(instruction: Instruction, expand: Callable[[str], str]) -> dict[str, str]:
    """Return the values of an instruction's flags, with variables expanded.

    Raises:
        InputError: a flag is unknown, given twice, lacks its value, or is not supported yet.
    """
    known = _FLAGS.get(instruction.keyword, {})
    values: dict[str, str] = {}
    for flag in instruction.flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        kind = known.get(name)
        if kind is None:
            raise _unknown(instruction, name, known)
        if kind is _Kind.LATER_SWITCH and value.lower() == "false":
            continue
        if kind is not _Kind.VALUE:
            raise instruction.error(
                f"{instruction.keyword} --{name} is not supported yet", hint=_HINTS.get(name)
            )
        if name in values:
            raise instruction.error(f"{instruction.keyword} --{name} is given twice")
        if not equals:
            raise instruction.error(f"{instruction.keyword} --{name}: expected a value: --{name}=…")
        values[name] = expand(value)
    return values


def _unknown(instruction: Instruction, name: str, known: dict[str, _Kind]) -> Exception:
    close = difflib.get_close_matches(name[:80], known, n=1)
    if close:
        hint = f"did you mean --{close[0]}?"
    elif known:
        hint = f"{instruction.keyword} knows " + ", ".join(f"--{each}" for each in known)
    else:
        hint = f"{instruction.keyword} has no flags"
    return instruction.error(f"unknown flag --{short(name)} of {instruction.keyword}", hint=hint)
