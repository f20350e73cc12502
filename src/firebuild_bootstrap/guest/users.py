"""USER, --chown and --chmod: users looked up in the image's own passwd and group files, ids, modes.

The rules are those of the Dockerfile reference (USER, COPY --chown) and of what container engines do
with an OCI `User`: an explicit group replaces the supplementary groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.wire import MAX_ID
from firebuild_pki.values import dataclass

from .errors import StepError

_MAX_FILE = 16 * 1024 * 1024


@dataclass(frozen=True)
class Identity:
    """Whom a command runs as: ids, all groups (the primary one first) and the home directory."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True)
class _Passwd:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


class Users:
    """The users of an image; reads the files again for each question, because a RUN may change them."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def identity(self, text: str) -> Identity:
        """Resolve a USER value: `name`, `uid`, either with `:group` or `:gid`; empty is root.

        Raises:
            StepError: a name is unknown, a number is out of range, or the form is wrong.
        """
        user, colon, group = text.partition(":")
        user = user or "0"
        entry = self._passwd(user)
        uid = entry.uid if entry else self._number("USER", text, user, "/etc/passwd")
        gid = self._gid("USER", text, group) if colon and group else (entry.gid if entry else 0)
        extra: tuple[int, ...] = ()
        if not (colon and group) and entry:
            extra = tuple(item.gid for item in self._groups() if entry.name in item.members)
        home = (entry.home if entry else "") or "/"
        return Identity(uid, gid, (gid, *sorted(set(extra) - {gid})), home)

    def owner(self, text: str, option: str = "--chown") -> tuple[int, int]:
        """Resolve the value of --chown, or of another option, to uid and gid.

        A bare number is both uid and gid; a name without group brings its primary group.

        Raises:
            StepError: a name is unknown, a number is out of range, or the form is wrong.
        """
        user, _, group = text.partition(":")
        if not user:
            raise StepError(f"{option}={text}: expected user, user:group, uid or uid:gid")
        entry = None if _is_number(user) else self._passwd(user)
        uid = entry.uid if entry else self._number(option, text, user, "/etc/passwd")
        if group:
            return uid, self._gid(option, text, group)
        return uid, entry.gid if entry else uid

    def workdir_owner(self, text: str) -> tuple[int, int]:
        """Return whose the directory is that WORKDIR makes: a number is uid and gid, as of --chown.

        Raises:
            StepError: as `identity`.
        """
        identity = self.identity(text)
        return identity.uid, identity.uid if _is_number(text) else identity.gid

    def home(self, name: str) -> Identity | None:
        """Return the identity of a user by exact name, None where the image has no such user."""
        entry = next((item for item in self._passwd_entries() if item.name == name), None)
        return Identity(entry.uid, entry.gid, (entry.gid,), entry.home or "/") if entry else None

    def _passwd(self, user: str) -> _Passwd | None:
        # A number is an id, even where a user has it for a name: otherwise an image could make root of it.
        if _is_number(user):
            wanted = _id(user)
            return next((item for item in self._passwd_entries() if item.uid == wanted), None)
        return next((item for item in self._passwd_entries() if item.name == user), None)

    def _gid(self, what: str, text: str, group: str) -> int:
        named = () if _is_number(group) else self._groups()
        entry = next((item for item in named if item.name == group), None)
        return entry.gid if entry else self._number(what, text, group, "/etc/group")

    def _number(self, what: str, text: str, value: str, file: str) -> int:
        if value == "root":  # wherever there is no such file, or it has no root: as in BuildKit's --chown
            return 0
        if not _is_number(value):
            problem = f"has no {value!r}" if self._root.status(file) else "does not exist"
            raise StepError(f"{what} {text}: {file} of the image {problem}; create it first or use a number")
        number = _id(value)
        if number is None:
            raise StepError(f"{what} {text:.80}: ids go from 0 to {MAX_ID}, found {value:.80}")
        return number

    def _passwd_entries(self) -> Iterator[_Passwd]:
        for fields in self._lines("/etc/passwd", 6):
            uid, gid = _id(fields[2]), _id(fields[3])
            if uid is not None and gid is not None:
                yield _Passwd(fields[0], uid, gid, fields[5])

    def _groups(self) -> Iterator[_Group]:
        for fields in self._lines("/etc/group", 4):
            if (gid := _id(fields[2])) is not None:
                yield _Group(fields[0], gid, tuple(fields[3].split(",")))

    def _lines(self, path: str, count: int) -> Iterator[list[str]]:
        try:
            text = self._root.read(path, _MAX_FILE).decode("utf-8", "surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StepError(f"{path} of the image can't be read: {error.strerror}") from error
        for line in text.split("\n"):
            fields = line.split(":")
            if len(fields) >= count and fields[0]:
                yield fields


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _id(text: str) -> int | None:
    """Read an id; None for anything else. Python refuses to read numbers of thousands of digits."""
    digits = text.lstrip("0") or "0"
    if not _is_number(text) or len(digits) > 10 or int(digits) > MAX_ID:
        return None
    return int(digits)


# --- ids of this machine --------------------------------------------------------------------------

# In a user namespace with one mapped uid, files and processes can have no other (user_namespaces(7)).
_UID_MAP = "/proc/self/uid_map"
_GID_MAP = "/proc/self/gid_map"


def mapped(number: int, lines: Iterable[str]) -> bool:
    """Say whether an id is in a map in the form of user_namespaces(7): inside, outside, length."""
    for line in lines:
        inside, _, length = (int(field) for field in line.split())
        if inside <= number < inside + length:
            return True
    return False


def check_mapped(
    what: str,
    uid: int,
    gid: int,
    groups: Iterable[int] = (),
    *,
    uid_map: str = _UID_MAP,
    gid_map: str = _GID_MAP,
) -> None:
    """Make sure that a user and its groups can exist in this machine.

    Args:
        what: the instruction to name in the message.
        uid: the user's id.
        gid: the primary group's id.
        groups: supplementary groups; of uid 0 they don't matter.
        uid_map: the map to look into.
        gid_map: the map to look into.

    Raises:
        StepError: an id is not mapped; the message says what to do.
    """
    wanted = [("uid", uid_map, uid), ("gid", gid_map, gid)]
    if uid != 0:
        wanted += [("gid", gid_map, group) for group in groups]
    for kind, path, number in wanted:
        with open(path, encoding="ascii") as file:
            if not mapped(number, file):
                raise StepError(
                    f"{what}: {kind} {number} does not exist in this sandbox, which maps too few ids; "
                    "build as root, or give your user subordinate ids in /etc/subuid and /etc/subgid"
                )


# --- --chmod --------------------------------------------------------------------------------------

# Octal or symbolic (Dockerfile reference, COPY --chmod; chmod(1) in POSIX).
_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=](?:[ugo]|[rwxXst]*))+)")
_ACTION = re.compile(r"([-+=])([ugo]|[rwxXst]*)")
_SHIFT = {"u": 6, "g": 3, "o": 0}
_BITS = {"r": 4, "w": 2, "x": 1}


def parse_mode(text: str) -> Callable[[int, bool], int]:
    """Read a mode such as `0755`, `4755` or `u=rwX,go-w`.

    What a symbolic one means is as in BuildKit, not chmod(1): `=` takes setuid and setgid from directories,
    too, but no sticky bit; `t` of `o` alone says nothing; and X asks for the mode that the file had at first.

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
        mode = old
        for who, actions in parsed:
            for operator, permissions in actions:
                mode = _apply(mode, who, operator, permissions, can_search=directory or bool(old & 0o111))
        return mode

    return change


def _apply(old: int, who: str, operator: str, permissions: str, *, can_search: bool) -> int:
    classes = "ugo" if not who or "a" in who else who
    wanted = _wanted(old, classes, permissions, can_search=can_search)
    if operator == "+":
        return old | wanted
    if operator == "-":
        return old & ~wanted
    cleared = sum(7 << _SHIFT[name] for name in set(classes))
    if permissions not in _SHIFT:
        cleared |= (0o4000 if "u" in classes else 0) | (0o2000 if "g" in classes else 0)
    return (old & ~cleared) | wanted


def _wanted(old: int, classes: str, permissions: str, *, can_search: bool) -> int:
    if permissions in _SHIFT:
        triple = (old >> _SHIFT[permissions]) & 7
    else:
        triple = sum(_BITS[letter] for letter in set(permissions) if letter in _BITS)
        if "X" in permissions and can_search:
            triple |= 1
    wanted = 0
    for name in classes:
        wanted |= triple << _SHIFT[name]
    if "s" in permissions:
        wanted |= (0o4000 if "u" in classes else 0) | (0o2000 if "g" in classes else 0)
    if "t" in permissions and classes != "o":
        wanted |= 0o1000
    return wanted
