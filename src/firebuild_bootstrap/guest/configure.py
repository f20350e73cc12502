"""Applies the metadata to a machine that is started and not built: names, variables, keys, entrypoint."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from firebuild_bootstrap.layers.root import Metadata, Root

from .entrypoint import Entrypoint
from .environment import exports
from .errors import GuestExit, InputError, StepError
from .sshkeys import authorize, parse_keys

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
    set_hostname: Callable[[str], None] = socket.sethostname,
) -> list[str]:
    """Write what the metadata ask for; a second time it changes nothing.

    Everything is checked before the first file is written. The name of the running machine is set only
    where `root_path` is `/`.

    Args:
        document: `latest/meta-data`.
        root_path: directory of the image.
        paths: the files to write.
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
            _write(root, paths.environment_file, "".join(f"{line}\n" for line in variables), 0o644)
            if hostname:
                _write(root, paths.hostname_file, f"{hostname}\n", 0o644)
                _write(root, paths.hosts_file, _hosts(root, paths.hosts_file, hostname, addresses), 0o644)
            for name, keys in users.items():
                authorize(root, name, keys)
            if script is not None:
                _write(root, paths.runner_file, script, 0o755)
    except OSError as error:
        raise InputError(f"{error.filename or root_path}: {error.strerror}") from error
    except StepError as error:
        raise InputError(error.message, exit_status=int(GuestExit.BAD_INPUT)) from error
    if hostname and root_path == "/":
        try:
            set_hostname(hostname)
        except OSError as error:
            notes.append(f"the running machine keeps its name: {error.strerror}")
    return notes


def _write(root: Root, path: str, text: str, mode: int) -> None:
    content = text.encode("utf-8", "surrogateescape")
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


def _hostname(text: str) -> str:
    labels = text.split(".")
    if text and (len(text) > 64 or not all(_LABEL.fullmatch(label) for label in labels)):
        # 64 bytes is what the kernel takes (gethostname(2)); the rest is RFC 1123, section 2.1.
        raise InputError(f"LocalHostname of the metadata: {text!r:.80} is no host name")
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
                f"IP of interface {mac!r} in the metadata: {text!r:.60} is no address"
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
