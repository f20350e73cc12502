"""`firebuild ca show`: the certificates of a build that does not exist."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import click

from firebuild_bootstrap.cli.screen import beside_head, styled
from firebuild_pki import Authority, CAError, Capability, CASettings, TLSMaterial, open_authority
from firebuild_pki.display import one_line
from firebuild_pki.preflighting import CertificateFacts, certificate_facts

_HEAD_WIDTH = 13


@dataclass(frozen=True)
class Seen:
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


def look(settings: CASettings, ttl: timedelta, check: Callable[[], None]) -> Seen:
    """Issue a pair for a build that does not exist, and take it back where the provider can.

    Raises:
        firebuild_pki.CAError: nothing usable was issued.
    """
    build_id = f"show-{secrets.token_hex(4)}"
    with open_authority(settings, build_id=build_id, check=check) as authority:
        materials = [authority.issue_server(ttl=ttl), authority.issue_guest(ttl=ttl)]
        failures = _take_back(authority, materials)
    (server, *above), (guest, *others) = (certificate_facts(one.certificate_chain_pem) for one in materials)
    return Seen(
        provider=settings.provider,
        server=server,
        guest=guest,
        issuers=tuple(dict.fromkeys([*above, *others])),
        anchors=certificate_facts(authority.trust_pem),
        warnings=(*authority.warnings, *failures),
    )


def print_certificates(seen: Seen) -> None:
    """Print a block for each certificate."""
    for warning in seen.warnings:
        click.echo(f"warning: {one_line(warning)}", err=True)
    blocks = [("server", seen.server), ("guest", seen.guest)]
    blocks += [("issuer", one) for one in seen.issuers]
    blocks += [("trust anchor", one) for one in seen.anchors]
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


def _take_back(authority: Authority, materials: list[TLSMaterial]) -> list[str]:
    failures = []
    for material in materials if Capability.REVOKE in authority.capabilities else ():
        try:
            authority.revoke(material)
        except CAError as error:
            failures.append(f"the certificate of {material.identity} was not revoked: {error.message}")
    return failures
