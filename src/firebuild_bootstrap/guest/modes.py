"""`--chmod` values, octal or symbolic (Dockerfile reference, COPY --chmod; chmod(1) in POSIX)."""

from __future__ import annotations

import re
from collections.abc import Callable

_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=](?:[ugo]|[rwxXst]*))+)")
_ACTION = re.compile(r"([-+=])([ugo]|[rwxXst]*)")
_UMASK = 0o022  # of every build step; applies where a clause names nobody
_SHIFT = {"u": 6, "g": 3, "o": 0}
_BITS = {"r": 4, "w": 2, "x": 1}


def parse_mode(text: str) -> Callable[[int, bool], int]:
    """Read a mode such as `0755`, `4755` or `u=rwX,go-w`.

    Args:
        text: the value of `--chmod`.

    Returns:
        A function that turns a mode (and whether it is a directory's) into the new mode.

    Raises:
        ValueError: the text is neither; the message says so.
    """
    if re.fullmatch(r"[0-7]{1,5}", text) and int(text, 8) <= 0o7777:
        mode = int(text, 8)
        return lambda _old, _directory: mode
    clauses = [_CLAUSE.fullmatch(part) for part in text.split(",")]
    if not all(clauses):
        raise ValueError(f"--chmod={text}: expected a mode such as 755 or u=rwX,go=rX")
    parsed = [(clause[1], _ACTION.findall(clause[2])) for clause in clauses if clause]

    def change(old: int, directory: bool) -> int:
        for who, actions in parsed:
            for operator, permissions in actions:
                old = _apply(old, directory, who, operator, permissions)
        return old

    return change


def _apply(old: int, directory: bool, who: str, operator: str, permissions: str) -> int:
    classes = "ugo" if not who or "a" in who else who
    mask = _UMASK if not who else 0
    wanted = _wanted(old, directory, classes, permissions) & ~mask
    if operator == "+":
        return old | wanted
    if operator == "-":
        return old & ~wanted
    cleared = sum(7 << _SHIFT[name] for name in set(classes))
    cleared |= 0o4000 if "u" in classes else 0
    cleared |= 0o2000 if "g" in classes else 0
    cleared |= 0o1000 if "o" in classes else 0
    if directory:
        # As chmod(1) of GNU: a directory keeps setuid and setgid unless they are named.
        cleared &= ~0o6000
    return (old & ~cleared) | wanted


def _wanted(old: int, directory: bool, classes: str, permissions: str) -> int:
    if permissions in _SHIFT:
        triple = (old >> _SHIFT[permissions]) & 7
    else:
        triple = sum(_BITS[letter] for letter in set(permissions) if letter in _BITS)
        if "X" in permissions and (directory or old & 0o111):
            triple |= 1
    wanted = 0
    for name in classes:
        wanted |= triple << _SHIFT[name]
    if "s" in permissions:
        wanted |= (0o4000 if "u" in classes else 0) | (0o2000 if "g" in classes else 0)
    if "t" in permissions and "o" in classes:
        wanted |= 0o1000
    return wanted
