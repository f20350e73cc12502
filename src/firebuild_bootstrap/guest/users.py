"""USER and --chown: names and numbers, looked up in the image's own passwd and group files.

The rules are those of the Dockerfile reference (USER, COPY --chown) and of what container engines do
with an OCI `User`: an explicit group replaces the supplementary groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from firebuild_bootstrap.layers.root import Root

from .errors import StepError

_MAX_FILE = 16 * 1024 * 1024
MAX_ID = 2**32 - 2  # -1 means "leave it" in chown(2)


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
    """The users of an image; reads the files anew on every question, because a RUN may change them."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def identity(self, text: str) -> Identity:
        """Resolve a USER value: `name`, `uid`, either with `:group` or `:gid`; empty is root.

        Raises:
            StepError: a name is unknown, a number is out of range, or the form is wrong.
        """
        user, colon, group = text.partition(":")
        entry = self._passwd(user or "0")
        uid = entry.uid if entry else self._number("USER", text, user, "/etc/passwd")
        gid = self._gid("USER", text, group) if colon and group else (entry.gid if entry else 0)
        extra: tuple[int, ...] = ()
        if not (colon and group) and entry:
            extra = tuple(item.gid for item in self._groups() if entry.name in item.members)
        home = (entry.home if entry else "") or ("/root" if uid == 0 else "/")
        return Identity(uid, gid, (gid, *sorted(set(extra) - {gid})), home)

    def owner(self, text: str) -> tuple[int, int]:
        """Resolve a --chown value to uid and gid.

        A bare number is both uid and gid; a name without group brings its primary group.

        Raises:
            StepError: a name is unknown, a number is out of range, or the form is wrong.
        """
        user, _, group = text.partition(":")
        if not user:
            raise StepError(f"--chown={text}: expected user, user:group, uid or uid:gid")
        entry = None if _is_number(user) else self._passwd(user)
        uid = entry.uid if entry else self._number("--chown", text, user, "/etc/passwd")
        if group:
            return uid, self._gid("--chown", text, group)
        return uid, entry.gid if entry else uid

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
    """Read an id; None for what is none. Python refuses to read numbers of thousands of digits."""
    digits = text.lstrip("0") or "0"
    if not _is_number(text) or len(digits) > 10 or int(digits) > MAX_ID:
        return None
    return int(digits)
