"""The options of `firebuild run` that give what runs an identity (docs/identity.md)."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from firebuild_bootstrap.cli.options import read_duration, stacked
from firebuild_bootstrap.errors import InputError
from firebuild_pki.display import one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.identities import IdentityRequest
    from firebuild_pki import CASettings

_MODE: Final = re.compile(r"0?[0-7]{3}")
_DETAILS: Final = {
    "identity_owner": "--identity-owner",
    "identity_mode": "--identity-mode",
    "identity_ttl": "--identity-ttl",
    "identity_key": "--identity-key",
    "identity_signal": "--identity-signal",
    "identity_command": "--identity-command",
}


identity_options = stacked(
    click.option(
        "--identity",
        "identities",
        multiple=True,
        metavar="NAME",
        help="Give the machine a certificate for this DNS name or spiffe:// URI, "
        "in /run/firebuild/tls; repeatable.",
    ),
    click.option(
        "--identity-owner",
        metavar="USER[:GROUP]",
        help="Owner of the identity's files; by default the user of the command.",
    ),
    click.option("--identity-mode", metavar="MODE", help="Mode of the key's file; 0400 by default."),
    click.option("--identity-ttl", metavar="DURATION", help="Lifetime of each certificate; 1h by default."),
    click.option(
        "--identity-key",
        type=click.Choice(["host", "machine"]),
        help="Where to make the keys; by default on this host. A key made in the machine never leaves it.",
    ),
    click.option(
        "--identity-signal",
        metavar="SIGNAL",
        help="Signal to send to the command when its files were replaced, for example HUP.",
    ),
    click.option(
        "--identity-command",
        metavar="COMMAND",
        help="Command to execute, without a shell, when its files were replaced.",
    ),
)


def identity_from(options: Mapping[str, Any], suffix: str) -> IdentityRequest | None:
    """Read the options; None where no identity is wanted.

    Args:
        options: as click has parsed them.
        suffix: domain of the names of a run's own two ends.

    Raises:
        InputError: a value is impossible.
    """
    given = options["identities"]
    if not given:
        for name, option in _DETAILS.items():
            if options[name] is not None:
                raise InputError(f"{option}: the machine has no identity", hint="name one with --identity")
        return None
    from datetime import timedelta

    from firebuild_bootstrap.identities import IdentityRequest
    from firebuild_bootstrap.wire import IdentityFiles
    from firebuild_pki.errors import IdentityError
    from firebuild_pki.names import Names

    try:
        names = Names.of(given)
    except IdentityError as error:
        raise InputError(f"--identity: {error.message}", hint=error.hint) from error
    for name in names.dns:
        if f".{name}".endswith(f".{suffix}"):
            raise InputError(
                f"--identity {name}: the names below {suffix} are those of firebuild's own sessions",
                hint="choose another name, or another ca.name_suffix",
            )
    ttl = options["identity_ttl"]
    files = IdentityFiles(
        names=names.all,
        owner=options["identity_owner"] or "",
        mode=_mode(options["identity_mode"]),
        csr=options["identity_key"] == "machine",
    )
    return IdentityRequest(
        files=files,
        ttl=timedelta(hours=1) if ttl is None else read_duration(ttl, "--identity-ttl"),
        signal=_signal(options["identity_signal"]),
        command=_command(options["identity_command"]),
    )


def laptop_ca(settings: CASettings, home: Path) -> dict[str, str]:
    """Return the setting with which machines of this store trust each other, where none has a CA of its own.

    The embedded CA is otherwise gone with its run, and no other machine would know it.
    """
    if settings.provider != "embedded" or getattr(settings.provider_settings, "directory", None):
        return {}
    return {"ca.embedded.directory": str(home / "identities")}


def _mode(text: str | None) -> int:
    if text is None:
        return 0o400
    if not _MODE.fullmatch(text):
        raise InputError(
            f"--identity-mode: expected three octal digits, found {one_line(text, 80)!r}", hint="such as 0440"
        )
    return int(text, 8)


def _signal(text: str | None) -> int:
    if text is None:
        return 0
    number = _number_of(text)
    if number in (signal.SIGKILL, signal.SIGSTOP):
        raise InputError(
            f"--identity-signal: no command can have a handler for {signal.Signals(number).name}",
            hint="for example HUP or USR1",
        )
    return number


def _number_of(text: str) -> int:
    name = text.upper().removeprefix("SIG")
    if name.isascii() and name.isdecimal() and 0 < int(name[:4]) < signal.NSIG:
        return int(name)
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        raise InputError(
            f"--identity-signal: {one_line(text, 80)!r} is not a signal", hint="for example HUP or USR1"
        ) from None


def _command(text: str | None) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text or ""))
    except ValueError as error:
        raise InputError(f"--identity-command: {error}") from error
    if text is not None and not words:
        raise InputError("--identity-command: it is empty")
    return words
