"""Which ids exist here: in a user namespace with one mapped uid, files and processes can have no other."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import StepError

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
