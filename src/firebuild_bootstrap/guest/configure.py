"""Applies the metadata to a machine that is started and not built: names, variables, keys, entrypoint."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import posixpath
import re
import shlex
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from firebuild_bootstrap.layers.root import Metadata, Root
from firebuild_pki.values import dataclass

from .errors import GuestExit, InputError, StepError
from .users import Identity, Users

_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_BEGIN, _END = "# begin of what vminit manages", "# end of what vminit manages"
_MAX_FILE = 16 * 1024 * 1024


@dataclass(frozen=True)
class Paths:
    """Where the files go, as the image sees them."""

    environment_file: str = "/etc/profile.d/firebuild.sh"
    hostname_file: str = "/etc/hostname"
    hosts_file: str = "/etc/hosts"
    runner_file: str = "/usr/bin/firebuild-entrypoint"


def configure(
    document: Mapping[str, Any],
    root_path: str,
    paths: Paths,
    *,
    running: bool = False,
    set_hostname: Callable[[str], None] = socket.sethostname,
) -> list[str]:
    """Write what the metadata ask for; a second time it changes nothing.

    Everything is checked before the first file is written. The name of the running machine is set only
    where `root_path` is `/`, or on request.

    Args:
        document: `latest/meta-data`.
        root_path: directory of the image.
        paths: the files to write; one without a path is left out.
        running: give the running machine its name, whatever `root_path` is.
        set_hostname: gives the running machine its name.

    Returns:
        What the user should know, as sentences.

    Raises:
        InputError: a value is not what it has to be, or a file can't be written.
    """
    hostname = _hostname(_text(document, "LocalHostname"))
    variables = exports(_object(document, "Env"))
    addresses = list(_addresses(document))
    users = {name: parse_keys(name, _text(user, "SSHKeys")) for name, user in _users(document)}
    entrypoint = Entrypoint.from_json(_text(document, "EntrypointJSON"))
    script = entrypoint.script(paths.environment_file) if entrypoint.argv else None
    notes = []
    try:
        with Root(root_path) as root:
            files = []
            if paths.environment_file:
                files.append((paths.environment_file, "".join(f"{line}\n" for line in variables), 0o644))
            if hostname:
                hosts = _hosts(root, paths.hosts_file, hostname, addresses)
                files += [(paths.hostname_file, f"{hostname}\n", 0o644), (paths.hosts_file, hosts, 0o644)]
            if script is not None:
                files.append((paths.runner_file, script, 0o755))
            contents = [(path, _encoded(text), mode) for path, text, mode in files]
            owners = {name: _owner_of_keys(root, name) for name in users}
            for path, content, mode in contents:
                _write(root, path, content, mode)
            for name, keys in users.items():
                authorize(root, owners[name], keys)
    except OSError as error:
        raise InputError(f"{error.filename or root_path}: {error.strerror}") from error
    except StepError as error:
        raise InputError(error.message, exit_status=int(GuestExit.BAD_INPUT)) from error
    if hostname and (running or root_path == "/"):
        try:
            set_hostname(hostname)
        except OSError as error:
            notes.append(f"the running machine keeps its name: {error.strerror}")
    return notes


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape
        raise InputError("the metadata hold a text that is not Unicode") from error


def _write(root: Root, path: str, content: bytes, mode: int) -> None:
    with root.locate(path, parents=(0, 0)):
        pass  # the parents exist now
    root.write(path, [content], Metadata((0, 0), mode), follow=True)


def _hosts(root: Root, path: str, hostname: str, addresses: list[str]) -> str:
    """Return the hosts file with the managed block replaced and everything else kept."""
    old = ""
    if root.status(path) is not None:
        old = root.read(path, _MAX_FILE).decode("utf-8", "surrogateescape")
    kept = _without_block(old.removesuffix("\n").split("\n") if old else [])
    known = {line.split(maxsplit=1)[0] for line in kept if line.strip()}
    block = [_BEGIN]
    if "127.0.0.1" not in known:
        block.append("127.0.0.1 localhost")
    if "::1" not in known:
        block.append("::1 localhost ip6-localhost ip6-loopback")
    short = hostname.partition(".")[0]
    names = hostname if short == hostname else f"{hostname} {short}"
    block += [f"{address} {names}" for address in addresses or ["127.0.1.1"]]
    return "\n".join([*kept, *block, _END]) + "\n"


def _without_block(lines: list[str]) -> list[str]:
    # Line by line: the file is the image's, and an expression for the block takes quadratic time where
    # the file begins it again and again.
    kept: list[str] = []
    block: list[str] = []
    for line in lines:
        (block if block or line == _BEGIN else kept).append(line)
        if line == _END:
            block.clear()
    return kept + block


def is_hostname(text: str) -> bool:
    """Whether a machine can be called so."""
    # 64 bytes is what the kernel takes (gethostname(2)); the rest is RFC 1123, section 2.1.
    return len(text) <= 64 and all(_LABEL.fullmatch(label) for label in text.split("."))


def _hostname(text: str) -> str:
    if text and not is_hostname(text):
        raise InputError(f"LocalHostname of the metadata: {text!r:.80} is not a host name")
    return text


def _addresses(document: Mapping[str, Any]) -> Iterator[str]:
    interfaces = _object(_object(document, "Network"), "Interfaces")
    for mac in sorted(interfaces):
        text = _text(_object(interfaces, mac), "IP").partition("/")[0]
        if not text:
            continue
        try:
            yield str(ipaddress.ip_address(text))
        except ValueError as error:
            raise InputError(
                f"IP of interface {mac!r} in the metadata: {text!r:.60} is not an address"
            ) from error


def _users(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    users = _object(document, "Users")
    for name in sorted(users):
        yield name, _object(users, name)


def _object(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{name} of the metadata: expected an object, found {type(value).__name__}")
    return value


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name) or ""
    if not isinstance(value, str):
        raise InputError(f"{name} of the metadata: expected text, found {type(value).__name__}")
    return value


# --- entrypoint -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entrypoint:
    """What to start: arguments, environment, directory and user; all of it may be empty."""

    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = ""

    @classmethod
    def from_json(cls, text: str) -> Entrypoint:
        """Read `EntrypointJSON`.

        Members (any case): `EntryPoint` and `Cmd`, lists of strings or objects with `Values`; `Env`, an
        object; `User` and `Workdir`, strings or objects with `Value`.

        Raises:
            InputError: it is not a JSON object or a member has another form.
        """
        try:
            document = json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"EntrypointJSON of the metadata is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise InputError("EntrypointJSON of the metadata is not a JSON object")
        members = {str(name).lower(): value for name, value in document.items()}
        env = members.get("env") or {}
        if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
            raise InputError("Env in EntrypointJSON: expected an object of strings")
        return cls(
            argv=(*_strings(members, "EntryPoint"), *_strings(members, "Cmd")),
            env=env,
            workdir=_string(members, "Workdir") or "/",
            user=_string(members, "User"),
        )

    def script(self, environment_file: str) -> str:
        """Return a POSIX shell script that becomes the program; its arguments are added to the program's.

        Args:
            environment_file: a file to read variables from first.

        Raises:
            InputError: a value can't be in a script.
        """
        lines = ["#!/bin/sh", "set -e"]
        quoted = _quote(environment_file)
        lines.append(f"if [ -r {quoted} ]; then . {quoted}; fi")
        lines += exports(self.env)
        lines.append(f"cd {_quote(self.workdir)}")
        program = " ".join(_quote(argument) for argument in self.argv)
        lines.append(f'exec {self._become()}{program} "$@"')
        return "\n".join(lines) + "\n"

    def _become(self) -> str:
        user, _, group = self.user.partition(":")
        if user in ("", "0", "root") and group in ("", "0", "root"):
            return ""
        groups = "--clear-groups" if group or user.isdecimal() else "--init-groups"
        return f"setpriv --reuid={_identity(user)} --regid={_identity(group or user)} {groups} -- "


def _identity(text: str) -> str:
    """Write a user or group for setpriv, which takes even a number for a name unless a plus precedes it."""
    return f"+{text}" if text.isdecimal() and text.isascii() else _quote(text)


def _quote(text: str) -> str:
    if "\0" in text:
        raise InputError(f"the metadata has a NUL in {text!r:.60}")
    return shlex.quote(text)


def _strings(members: Mapping[str, Any], name: str) -> Sequence[str]:
    value = members.get(name.lower())
    if isinstance(value, dict):
        value = next((inner for key, inner in value.items() if key.lower() == "values"), None)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{name} in EntrypointJSON: expected a list of strings")
    return value


def _string(members: Mapping[str, Any], name: str) -> str:
    value = members.get(name.lower())
    if isinstance(value, dict):
        value = next((inner for key, inner in value.items() if key.lower() == "value"), None)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{name} in EntrypointJSON: expected a string")
    return value


# --- variables ------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # POSIX, Base Definitions 3.231


def exports(env: Mapping[str, str]) -> list[str]:
    """Return one `export` per variable, sorted by name.

    Raises:
        InputError: a name is malformed, or a value contains NUL.
    """
    lines = []
    for name, value in sorted(env.items()):
        if not _NAME.fullmatch(name):
            raise InputError(f"Env of the metadata: {name!r} is not the name of a variable")
        if not isinstance(value, str) or "\0" in value:
            raise InputError(f"Env of the metadata: {name} is not text without NUL")
        lines.append(f"export {name}={shlex.quote(value)}")
    return lines


# --- SSH keys -------------------------------------------------------------------------------------

_KINDS = ("ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-sha2-")
_MAX_KEYS_FILE = 1024 * 1024


def parse_keys(user: str, text: str) -> list[str]:
    """Return the keys in `text`, one a line; empty lines and comments are left out.

    Raises:
        InputError: a line is not a public key (`type base64 [comment]`); the message gives user and line.
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


def _owner_of_keys(root: Root, name: str) -> Identity:
    """Look up whose keys are to be written.

    Raises:
        InputError: there is no such user, no home, or a link or another thing is where a file should be.
    """
    identity = Users(root).home(name)
    if identity is None:
        raise InputError(f"Users of the metadata: the image has no user {name!r}")
    if not root.is_directory(identity.home):
        raise InputError(f"Users of the metadata: the home {identity.home} of {name} does not exist")
    folder = _folder_of_keys(identity)
    _refuse_link(root, folder, stat.S_IFDIR)
    if root.is_directory(folder):
        _refuse_link(root, f"{folder}/authorized_keys", stat.S_IFREG)
    return identity


def _folder_of_keys(identity: Identity) -> str:
    return posixpath.join("/", identity.home, ".ssh")


def authorize(root: Root, identity: Identity, keys: list[str]) -> None:
    """Add keys to the user's `.ssh/authorized_keys`; those already there stay, none is added twice.

    Raises:
        InputError: a link or another thing is where a file should be.
    """
    owner = (identity.uid, identity.gid)
    folder = _folder_of_keys(identity)
    path = f"{folder}/authorized_keys"
    _refuse_link(root, folder, stat.S_IFDIR)
    root.make_directory(folder, Metadata(owner, 0o700))
    root.set_directory(folder, Metadata(owner, 0o700))
    _refuse_link(root, path, stat.S_IFREG)
    found = root.status(path, follow=False)
    old = root.read(path, _MAX_KEYS_FILE).decode("utf-8", "surrogateescape") if found else ""
    lines = old.removesuffix("\n").split("\n") if old else []
    lines += [key for key in dict.fromkeys(keys) if key not in lines]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    root.write(path, [content], Metadata(owner, 0o600))


def _refuse_link(root: Root, path: str, expected: int) -> None:
    found = root.status(path, follow=False)
    if found is not None and stat.S_IFMT(found.st_mode) != expected:
        wanted = "directory" if expected == stat.S_IFDIR else "file"
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "something else"
        raise InputError(f"{path}: expected a {wanted}, found {kind}; keys are not written there")
