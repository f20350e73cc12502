"""The provider: step-ca's side of the contract, in the order in which the framework calls it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from firebuild_pki import (
    AuthorityClosed,
    CAError,
    CAProvider,
    Duration,
    Note,
    NoteLevel,
    Profile,
    ProviderContext,
    SignedCertificate,
    SignRequest,
    TrustBundle,
    order_chain,
)
from pydantic import TypeAdapter

from firebuild_pki_step_ca.client import Client, Roots
from firebuild_pki_step_ca.settings import JWKAuth, StepCASettings, look_at
from firebuild_pki_step_ca.tokens import Signer, jwk_signer, sign_claims, x5c_signer

CLOCK_TOLERANCE: Final = timedelta(minutes=1)
"""What step-ca forgives a token."""

_DURATION: Final = TypeAdapter[timedelta](Duration)

USAGES: Final = {
    Profile.SERVER: ["serverAuth"],
    Profile.GUEST: ["clientAuth"],
    Profile.PEER: ["serverAuth", "clientAuth"],
}
"""For a template of the provisioner, which finds them in the token; see the page of this provider."""


class StepCAProvider(CAProvider):
    """Signs at a step-ca. What a certificate may do is up to the template of the provisioner."""

    def __init__(self, settings: StepCASettings, context: ProviderContext) -> None:
        self._settings = settings
        self._context = context
        self._client: Client | None = None
        self._signer: Signer | None = None
        self._roots = Roots(b"", b"")

    def validate(self) -> Sequence[Note]:
        """Look at the settings."""
        return tuple(look_at(self._settings))

    def open(self) -> None:
        """Ask the server for its CA certificates and the provisioner, and read the provisioner's key."""
        client = Client(self._settings, self._context)
        try:
            self._roots = client.roots()
            known = _of_name(self._settings, client.provisioners())
            auth, environ = self._settings.auth, self._context.environ
            self._signer = (
                jwk_signer(auth, known, environ) if isinstance(auth, JWKAuth) else x5c_signer(auth, environ)
            )
        except BaseException:
            client.close()
            raise
        self._client = client

    def close(self) -> None:
        """Forget the key, and close the connection."""
        client, self._client, self._signer = self._client, None, None
        if client is not None:
            client.close()

    def trust_bundle(self) -> TrustBundle:
        """Return the roots and intermediates of the server."""
        return TrustBundle(self._roots.anchors_pem, self._roots.intermediates_pem)

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Have the request signed, with a token for its names and for nothing else."""
        client, signer = self._opened()
        names = (*request.dns_names, *request.uri_names)
        claims = sign_claims(request.csr_pem, names, self._root_fingerprint())
        claims["firebuild"] = {
            "build": request.build_id,
            "profile": str(request.profile),
            "usages": USAGES[request.profile],
            "labels": dict(request.labels),
        }
        now = self._context.clock().timestamp()
        token = signer.token(client.audience("sign"), names[0], now, **claims)
        leaf, *others = client.sign(request.csr_pem, token, int(request.ttl.total_seconds()))
        pool = "\n".join([*others, self._roots.intermediates_pem.decode()])
        return SignedCertificate(leaf.encode(), order_chain(leaf.encode(), pool.encode()))

    def revoke(self, certificate_pem: bytes) -> None:
        """Revoke a certificate by its serial number: it goes into the CRL, where step-ca has one."""
        client, signer = self._opened()
        leaf = x509.load_pem_x509_certificate(certificate_pem)
        self._must_be_ours(leaf)  # the server takes note of any serial number
        serial = leaf.serial_number
        claims = {"sha": self._root_fingerprint()}
        now = self._context.clock().timestamp()
        client.revoke(serial, signer.token(client.audience("revoke"), str(serial), now, **claims))

    def check(self) -> Sequence[Note]:
        """Look at the CA certificates, the clock and the provisioner; issue nothing."""
        return tuple(self._findings(self._opened()[0]))

    def _findings(self, client: Client) -> Iterator[Note]:
        try:
            roots = client.roots()
            (provisioner, *_) = _of_name(self._settings, client.provisioners())
        except CAError as error:
            yield Note(error.message, hint=error.hint, level=NoteLevel.FATAL, about="reachable")
            return
        yield Note(f"step-ca answers at {self._settings.address}", level=NoteLevel.OK, about="reachable")
        for one in x509.load_pem_x509_certificates(roots.anchors_pem):
            end = f"{one.not_valid_after_utc:%Y-%m-%d %H:%M:%SZ}"
            text = f'root "{one.subject.rfc4514_string()}", valid until {end}'
            yield Note(text, level=NoteLevel.OK, about="ca")
        yield from self._about_clock(roots)
        yield self._about_provisioner(provisioner)

    def _about_provisioner(self, provisioner: Mapping[str, Any]) -> Note:
        claims = provisioner.get("claims")
        text = claims.get("maxTLSCertDuration") if isinstance(claims, Mapping) else None
        longest = _duration(text)
        auth, wanted = self._settings.auth, self._context.lifetime
        limit = "for as long as the authority's claims allow (24h by default)"
        if longest is not None:
            limit = f"for up to {_DURATION.dump_python(longest)}"
        message = f'{auth.method.upper()} provisioner "{auth.provisioner}" signs {limit}'
        level, hint = NoteLevel.OK, None
        if longest is not None and longest < wanted:
            message += f", and a build asks for {_DURATION.dump_python(wanted)}"
            hint = "raise maxTLSCertDuration among its claims, or shorten bootstrap.build_timeout"
            level = NoteLevel.WARNING
        return Note(message, "auth.provisioner", hint, level, "provisioner")

    def _about_clock(self, roots: Roots) -> Iterator[Note]:
        if roots.time is not None:
            ahead = (roots.time - self._context.clock()).total_seconds()
            side = "ahead of" if ahead > 0 else "behind"
            level = NoteLevel.WARNING if abs(ahead) > CLOCK_TOLERANCE.total_seconds() else NoteLevel.OK
            hint = (
                "set one of them: step-ca refuses tokens from another time" if level != NoteLevel.OK else None
            )
            yield Note(f"the server's clock is {abs(ahead):.0f} s {side} ours", "", hint, level, "clock")

    def _must_be_ours(self, leaf: x509.Certificate) -> None:
        known = self._roots.anchors_pem + b"\n" + self._roots.intermediates_pem
        for issuer in x509.load_pem_x509_certificates(known):
            with suppress(ValueError, TypeError, InvalidSignature):
                leaf.verify_directly_issued_by(issuer)
                return
        raise CAError("step-ca did not issue this certificate, or with a CA that it no longer has")

    def _root_fingerprint(self) -> str:
        (root, *_) = x509.load_pem_x509_certificates(self._roots.anchors_pem)
        return hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()

    def _opened(self) -> tuple[Client, Signer]:
        if self._client is None or self._signer is None:
            raise AuthorityClosed("there is no connection to step-ca: the provider is not open")
        return self._client, self._signer


def _duration(text: object) -> timedelta | None:
    """Read a duration as Go writes it, 24h0m0s, which `Duration` does as well."""
    with suppress(ValueError):
        return _DURATION.validate_python(text)
    return None


def _of_name(settings: StepCASettings, listed: Iterator[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Pick the provisioners of the wanted name and type: several while the key of one is replaced."""
    name, kind = settings.auth.provisioner, settings.auth.method.upper()
    names = []
    found = []
    for one in listed:
        if one.get("type") == kind:
            names.append(str(one.get("name")))
            if one.get("name") == name:
                found.append(one)
    if found:
        return found
    known = ", ".join(sorted(set(names))) or "none"
    raise CAError(f'step-ca has no {kind} provisioner "{name}"', hint=f"its {kind} provisioners are: {known}")
