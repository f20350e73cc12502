"""What `firebuild ca` shows: installed providers, the report of a preflight, certificates."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from firebuild_bootstrap.cli.screen import beside_head, print_checked, styled
from firebuild_bootstrap.errors import InputError
from firebuild_pki import Authority, CAError, Capability, CASettings, TLSMaterial, open_authority
from firebuild_pki.display import counted, one_line
from firebuild_pki.preflighting import (
    CertificateFacts,
    Content,
    InspectedItem,
    Inspection,
    KeyFacts,
    ListedProvider,
    RequestFacts,
    certificate_facts,
    inspect_files,
    read_bytes,
    read_file,
)
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_pki.preflighting import PreflightReport, PreflightRow


_HEAD_WIDTH = 13
_MOST_INPUT: Final = 2 << 20  # what is larger than any such file is refused, not cut


_WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ok": ("ok", {"fg": "green"}),
    "warning": ("warn", {"fg": "yellow"}),
    "fatal": ("FAIL", {"fg": "red", "bold": True}),
    "skipped": ("skip", {"dim": True}),
}
_VERDICTS = {
    "ready": "ready: a build gets what it needs",
    "settings": "not ready: the configuration is wrong",
    "authority": "not ready: a build would get no usable certificates",
}
_SLOW_SECONDS = 0.5
_ABOUT_WIDTH = 15


@dataclass(frozen=True)
class IssuedPair:
    """The certificates of both ends, from the leaves to the anchors."""

    provider: str
    server: CertificateFacts
    guest: CertificateFacts
    issuers: tuple[CertificateFacts, ...]
    anchors: tuple[CertificateFacts, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {
            "provider": self.provider,
            "server": self.server.to_json(),
            "guest": self.guest.to_json(),
            "issuers": [one.to_json() for one in self.issuers],
            "anchors": [one.to_json() for one in self.anchors],
            "warnings": list(self.warnings),
        }


def report_wait(text: str) -> None:
    """Say on standard error what a provider waits for, such as a Vault that gives no answer."""
    click.echo(one_line(text, 1000), err=True)


def issue_pair(settings: CASettings, ttl: timedelta, check: Callable[[], None]) -> IssuedPair:
    """Issue a pair for a build that does not exist, and take it back where the provider can.

    Raises:
        firebuild_pki.CAError: nothing usable was issued.
    """
    build_id = f"show-{secrets.token_hex(4)}"
    with open_authority(settings, build_id=build_id, check=check, report=report_wait) as authority:
        materials = [authority.issue_server(ttl=ttl), authority.issue_guest(ttl=ttl)]
        failures = _take_back(authority, materials)
    (server, *above), (guest, *others) = (certificate_facts(one.certificate_chain_pem) for one in materials)
    return IssuedPair(
        provider=settings.provider,
        server=server,
        guest=guest,
        issuers=tuple(dict.fromkeys([*above, *others])),
        anchors=certificate_facts(authority.trust_pem),
        warnings=(*authority.warnings, *failures),
    )


def print_certificates(issued: IssuedPair) -> None:
    """Print a block for each certificate."""
    for warning in issued.warnings:
        click.echo(f"warning: {one_line(warning)}", err=True)
    blocks = [("server", issued.server), ("guest", issued.guest)]
    blocks += [("issuer", one) for one in issued.issuers]
    blocks += [("trust anchor", one) for one in issued.anchors]
    for number, (title, facts) in enumerate(blocks):
        click.echo(("\n" if number else "") + styled(title, bold=True))
        for head, text in _lines(facts):
            click.echo("\n".join(beside_head(f"  {head}", _HEAD_WIDTH, text)))


def _lines(facts: CertificateFacts) -> list[tuple[str, str]]:
    return [
        ("subject", facts.subject or "none"),
        *([("names", ", ".join(facts.names))] if facts.names else []),
        ("signed by", "itself" if facts.subject == facts.issuer else facts.issuer),
        ("valid", f"{facts.not_before:%Y-%m-%d %H:%M:%SZ} to {facts.not_after:%Y-%m-%d %H:%M:%SZ}"),
        ("key", facts.key),
        ("usage", ", ".join(facts.usages) or "any"),
        ("serial", facts.serial),
        ("sha256", facts.fingerprint_sha256),
    ]


def inspect_paths(files: Sequence[Path], trust: Path | None, passphrase_file: Path | None) -> Inspection:
    """Look into files; `-` is standard input.

    Raises:
        InputError: one cannot be read, or holds nothing to look at.
    """
    try:
        return inspect_files(
            [read_named(path) for path in files],
            now=datetime.now(UTC),
            anchors_pem=None if trust is None else read_named(trust).data,
            passphrase=None if passphrase_file is None else read_named(passphrase_file).data.rstrip(b"\r\n"),
        )
    except CAError as error:
        raise InputError(error.message, hint=error.hint) from error


def read_named(path: Path) -> Content:
    """Read a file, or standard input for `-`.

    Raises:
        firebuild_pki.CAError: it cannot be read, is empty or too large.
    """
    if str(path) != "-":
        return read_file(str(path))
    return read_bytes("standard input", sys.stdin.buffer.read(_MOST_INPUT))


def print_inspection(found: Inspection) -> None:
    """Print a block for everything that was found, then a row for everything that was looked at."""
    for item in found.items:
        click.echo(styled(f"{item.kind} {item.number} of {one_line(item.file)}", bold=True))
        for head, text in _item_lines(item):
            click.echo("\n".join(beside_head(f"  {head}", _HEAD_WIDTH, text)))
        click.echo()
    for row in found.rows:
        print_row(row)


def _item_lines(item: InspectedItem) -> list[tuple[str, str]]:
    facts = item.facts
    if isinstance(facts, CertificateFacts):
        return _lines(facts)
    if isinstance(facts, KeyFacts):
        protected = "with a passphrase" if facts.encrypted else "no"
        return [("key", facts.key or "unknown while it is encrypted"), ("encrypted", protected)]
    if isinstance(facts, RequestFacts):
        return [
            ("subject", facts.subject or "none"),
            ("names", ", ".join(facts.names) or "none"),
            ("key", facts.key),
        ]
    due = facts.next_update
    return [
        ("issuer", facts.issuer),
        ("revoked", counted(facts.revoked, "certificate")),
        ("made", f"{facts.last_update:%Y-%m-%d %H:%M:%SZ}"),
        ("next", f"{due:%Y-%m-%d %H:%M:%SZ}" if due else "does not tell"),
    ]


def _take_back(authority: Authority, materials: list[TLSMaterial]) -> list[str]:
    failures = []
    for material in materials if Capability.REVOKE in authority.capabilities else ():
        try:
            authority.revoke(material)
        except CAError as error:
            failures.append(f"the certificate of {material.identity} was not revoked: {error.message}")
    return failures


def print_row(row: PreflightRow) -> None:
    """Print a row, and its hint below it."""
    slow = row.seconds is not None and row.seconds >= _SLOW_SECONDS
    message = f"{row.message} ({row.seconds:.1f} s)" if slow else row.message
    print_checked(_WORDS[row.level.value], row.about, _ABOUT_WIDTH, message, row.hint)


def print_verdict(report: PreflightReport) -> None:
    """Print what all rows come to."""
    warnings = sum(row.level.value == "warning" for row in report.rows)
    more = f"{counted(warnings, 'warning')}, " if warnings else ""
    style = {"bold": True, "fg": "green" if report.ready else "red"}
    click.echo(f"\n{styled(_VERDICTS[report.verdict.value], **style)} ({more}{report.seconds:.1f} s)")


def print_providers(listed: Sequence[ListedProvider]) -> None:
    """Print a block for each provider; a broken one shows why it is."""
    head_width = max((len(one_line(one.name)) for one in listed), default=0) + 2
    for one in listed:
        name = styled(one_line(one.name), bold=True, **({} if one.problem is None else {"fg": "red"}))
        can = ", ".join(one.capabilities or (one.kind,)) if one.problem is None else "cannot be used"
        _print(name, head_width, f"{one.distribution} {one.version}".strip() + f" ({can})")
        _print("", head_width, one.summary if one.problem is None else one.problem)
        if one.hint:
            _print("", head_width, f"hint: {one.hint}")
        _print("", head_width, one.location)


def _print(head: str, head_width: int, text: str) -> None:
    lines = [line for line in beside_head(head, head_width, text) if line]
    click.echo("\n".join(lines))
