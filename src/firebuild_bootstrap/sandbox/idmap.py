"""Which user and group ids exist inside a sandbox, and which ids of the host they are.

The rules are those of user_namespaces(7), subuid(5) and newuidmap(1).
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MachineError
from firebuild_pki.values import dataclass

# Of one map; user_namespaces(7): it is written at once, in fewer bytes than a page has.
_MAX_RANGES: Final = 340
_MAX_BYTES: Final = 4095
_MAX_ID: Final = 2**32 - 1
# SUB_UID_MIN and SUB_UID_COUNT of login.defs(5): what useradd gives to a user.
_FIRST: Final = 100000
_COUNT: Final = 65536


class IdMode(StrEnum):
    """How many owners a sandbox knows: all of the host's, a subordinate range, or one."""

    FULL = "full"
    SUBIDS = "subids"
    SINGLE = "single"


@dataclass(frozen=True)
class IdRange:
    """`count` ids that start at `inside` in the sandbox and at `outside` on the host."""

    inside: int
    outside: int
    count: int

    @property
    def line(self) -> str:
        """The range as the kernel reads and prints it."""
        return f"{self.inside} {self.outside} {self.count}\n"

    def __contains__(self, inside_id: int) -> bool:
        return self.inside <= inside_id < self.inside + self.count


@dataclass(frozen=True)
class IdMap:
    """The owners that a sandbox can give to files.

    Args:
        mode: what kind of map it is.
        uids: ranges of user ids.
        gids: ranges of group ids.
        note: what the user misses with this map and how to get it; empty when nothing is missing.
    """

    mode: IdMode
    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]
    note: str = ""

    @property
    def key(self) -> str:
        """A name of the map for directories whose files have its owners."""
        ranges = json.dumps([[astuple(entry) for entry in kind] for kind in (self.uids, self.gids)])
        return f"{self.mode.value}-{hashlib.sha256(ranges.encode()).hexdigest()[:16]}"

    def as_json(self) -> dict[str, Any]:
        """Return the map for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> IdMap:
        """Read what `as_json` wrote."""
        uids, gids = (tuple(IdRange(**entry) for entry in document[kind]) for kind in ("uids", "gids"))
        return cls(IdMode(document["mode"]), uids, gids, document["note"])


@dataclass(frozen=True)
class Host:
    """What the choice of a map depends on; tests make up their own.

    `path` is a search path for programs, the others are files as the kernel and shadow-utils name them.
    """

    uid: int
    gid: int
    user: str
    path: str
    subuid: Path = Path("/etc/subuid")
    subgid: Path = Path("/etc/subgid")
    uid_map: Path = Path("/proc/self/uid_map")
    gid_map: Path = Path("/proc/self/gid_map")
    status: Path = Path("/proc/self/status")
    sysctl: Path = Path("/proc/sys")
    container_marks: tuple[Path, ...] = (Path("/.dockerenv"), Path("/run/.containerenv"))

    @classmethod
    def current(cls) -> Host:
        """Describe the host as this process sees it."""
        uid = os.geteuid()
        try:
            user = pwd.getpwuid(uid).pw_name
        except KeyError:
            user = str(uid)
        return cls(uid=uid, gid=os.getegid(), user=user, path=os.environ.get("PATH", os.defpath))

    def program(self, name: str) -> str | None:
        """Find a program, also where administrators' programs are."""
        return shutil.which(name, path=os.pathsep.join([self.path, "/usr/bin", "/usr/sbin", "/sbin"]))


def candidates(host: Host) -> list[IdMap]:
    """Return the maps worth trying on this host, the most capable first; never empty."""
    if host.uid == 0:
        full = _own_ids(host)
        if sum(entry.count for entry in full.uids) > 1:
            return [full]
        return [single(host, "this container maps one user id only: run it with a range of ids")]
    missing = _missing(host)
    if missing:
        return [single(host, missing)]
    return [_subordinate(host), single(host, refused(host))]


def refused(host: Host, words: str = "") -> str:
    """Say that a user's subordinate ids can't be used, with the words of what refused them."""
    found = (
        "NoNewPrivileges= of its service, --no-new-privileges of docker or the like keeps it from being root"
        if _keeps_privileges_down(host)
        else "is it setuid root, and the range in no other's use?"
    )
    return f"newuidmap refused the range of {host.user} in {host.subuid}: {words and f'{words}: '}{found}"


def single(host: Host, missing: str) -> IdMap:
    """Return the map that knows one owner; `missing` says what a better one would need."""
    note = (
        "files can be given to root only: chown to other users needs subordinate ids "
        f"({missing}), or run as root"
    )
    return IdMap(IdMode.SINGLE, (IdRange(0, host.uid, 1),), (IdRange(0, host.gid, 1),), note)


def _keeps_privileges_down(host: Host) -> bool:
    """Tell whether no program that this process starts can be setuid (PR_SET_NO_NEW_PRIVS of prctl(2))."""
    try:
        return b"\nNoNewPrivs:\t1\n" in host.status.read_bytes()
    except OSError:
        return False


def _own_ids(host: Host) -> IdMap:
    return IdMap(IdMode.FULL, _identity(host.uid_map), _identity(host.gid_map))


def _identity(own_map: Path) -> tuple[IdRange, ...]:
    ranges = []
    for line in own_map.read_text("ascii").splitlines():
        inside, _outside, count = (int(word) for word in line.split())
        ranges.append(IdRange(inside, inside, count))
    return tuple(ranges)


def _missing(host: Host) -> str:
    empty = [path for path in (host.subuid, host.subgid) if not _entries(path, host.user, host.uid)]
    line = (
        f"add the line {host.user}:{_free(empty)}:{_COUNT} to {' and '.join(map(str, empty))}"
        if empty
        else ""
    )
    if not (host.program("newuidmap") and host.program("newgidmap")):
        return f"install uidmap and {line}" if line else "install uidmap"
    return line


def _free(files: Iterable[Path]) -> int:
    """Return where a range begins that no user of `files` has: who shares one has the other's files."""
    begin = _FIRST
    for first, count in sorted((first, count) for path in files for _, first, count in _ranges(path)):
        if first < begin + _COUNT and begin < first + count:
            begin = first + count
    return begin


def _subordinate(host: Host) -> IdMap:
    return IdMap(
        IdMode.SUBIDS,
        (IdRange(0, host.uid, 1), *_entries(host.subuid, host.user, host.uid)),
        (IdRange(0, host.gid, 1), *_entries(host.subgid, host.user, host.uid)),
    )


def _entries(path: Path, user: str, uid: int) -> tuple[IdRange, ...]:
    ranges: list[IdRange] = []
    inside, size = 1, len(IdRange(0, _MAX_ID, 1).line)
    for owner, first, count in _ranges(path):
        if owner not in (user, str(uid)):
            continue
        ranges.append(IdRange(inside, first, count))
        inside += count
        size += len(ranges[-1].line)
        if size > _MAX_BYTES or len(ranges) == _MAX_RANGES:  # no room beside the user's own id
            return tuple(ranges[:-1])
    return tuple(ranges)


def _ranges(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield owner, first id and number of ids of each line; others are passed over, as by newuidmap."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}", hint="the file has to be readable") from error
    for line in lines:
        words = line.strip().split(":")
        if len(words) == 3 and words[1].isdecimal() and words[2].isdecimal() and int(words[2]) > 0:
            yield words[0], int(words[1]), int(words[2])
