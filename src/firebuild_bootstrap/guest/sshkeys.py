"""Authorised SSH keys in a user's home, without following links out of it."""

from __future__ import annotations

import base64
import binascii
import posixpath
import stat

from firebuild_bootstrap.layers.root import Metadata, Root

from .errors import InputError
from .users import Users

_KINDS = ("ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-sha2-")
_MAX_FILE = 1024 * 1024


def parse_keys(user: str, text: str) -> list[str]:
    """Return the keys in `text`, one a line; empty lines and comments are left out.

    Raises:
        InputError: a line is no public key (`type base64 [comment]`); the message gives user and line.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        fields = key.split()
        if len(fields) < 2 or not fields[0].startswith(_KINDS) or not _is_base64(fields[1]):
            raise InputError(f"SSHKeys of {user}, line {number}: expected `type base64 comment`")
        if not key.isprintable():
            raise InputError(f"SSHKeys of {user}, line {number}: a control character")
        keys.append(key)
    return keys


def _is_base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return False


def authorize(root: Root, name: str, keys: list[str]) -> None:
    """Add keys to the user's `.ssh/authorized_keys`; those already there stay, none is added twice.

    Raises:
        InputError: there is no such user, no home, or a link or another thing is where a file should be.
    """
    identity = Users(root).home(name)
    if identity is None:
        raise InputError(f"Users of the metadata: the image has no user {name!r}")
    owner = (identity.uid, identity.gid)
    folder = posixpath.join("/", identity.home, ".ssh")
    path = f"{folder}/authorized_keys"
    if not root.is_directory(identity.home):
        raise InputError(f"Users of the metadata: the home {identity.home} of {name} does not exist")
    _refuse_link(root, folder, stat.S_IFDIR)
    root.make_directory(folder, Metadata(owner, 0o700))
    root.set_directory(folder, Metadata(owner, 0o700))
    _refuse_link(root, path, stat.S_IFREG)
    found = root.status(path, follow=False)
    old = root.read(path, _MAX_FILE).decode("utf-8", "surrogateescape") if found else ""
    lines = old.removesuffix("\n").split("\n") if old else []
    lines += [key for key in dict.fromkeys(keys) if key not in lines]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    root.write(path, [content], Metadata(owner, 0o600))


def _refuse_link(root: Root, path: str, expected: int) -> None:
    found = root.status(path, follow=False)
    if found is not None and stat.S_IFMT(found.st_mode) != expected:
        kind = "link" if stat.S_ISLNK(found.st_mode) else "thing of another kind"
        raise InputError(f"{path}: a {kind} is there; keys are not written through it")
