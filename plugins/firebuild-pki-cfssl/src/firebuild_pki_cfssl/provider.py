"""The provider: cfssl's side of the contract, in the order in which the framework calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from firebuild_pki import (
    AuthorityClosed,
    CAError,
    CAProvider,
    Note,
    NoteLevel,
    Profile,
    ProviderContext,
    SignedCertificate,
    SignRequest,
    TrustBundle,
    order_chain,
)
from firebuild_pki.http import audit_headers, read_anchors

from firebuild_pki_cfssl.client import Answer, Client
from firebuild_pki_cfssl.refusals import Refused
from firebuild_pki_cfssl.settings import CfsslSettings, look_at

USAGES = {Profile.SERVER: "server auth", Profile.GUEST: "client auth"}
"""cfssl's words for the extended key usage of each end."""

CLOCK_TOLERANCE = timedelta(minutes=1)
"""Difference between two clocks that is worth a word."""


class CfsslProvider(CAProvider):
    """Signs at a cfssl server. What a certificate may do and how long it lives is up to the server."""

    def __init__(self, settings: CfsslSettings, context: ProviderContext) -> None:
        self._settings = settings
        self._context = context
        self._client: Client | None = None
        self._trust = TrustBundle(b"")

    def validate(self) -> Sequence[Note]:
        """Look at the settings."""
        return tuple(look_at(self._settings))

    def open(self) -> None:
        """Read the key, ask the server for its CA certificate."""
        settings = self._settings
        key = _decoded(settings.auth_key.resolve(self._context.environ))
        client = Client(settings, key, self._context)
        issuer = client.info(settings.server_profile).certificate()
        self._trust = _trust(issuer, settings.anchors)
        self._client = client

    def close(self) -> None:
        """Forget the key. There is no session at the server to end."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def trust_bundle(self) -> TrustBundle:
        """Return the operator's anchors and the CA that signs, or that CA alone."""
        return self._trust

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Have the request signed. cfssl takes the lifetime from its profile, and names from hosts."""
        profile = self._settings.profile_for(request.profile)
        if not profile:
            raise CAError("no profile signs for peers", hint="set peer_profile to one with both usages")
        hosts = [*request.dns_names, *request.uri_names]
        asked = {"certificate_request": request.csr_pem.decode(), "hosts": hosts}
        answer = self._opened().sign(profile, asked, audit_headers(request.build_id, request.labels))
        leaf = answer.certificate()
        _must_have_uris(leaf, request.uri_names)
        return SignedCertificate(leaf, order_chain(leaf, self._trust.intermediates_pem), answer.messages)

    def check(self) -> Sequence[Note]:
        """Look at the CA certificate, the clock, both profiles and the key; issue nothing."""
        return tuple(self._findings(self._opened()))

    def _findings(self, client: Client) -> Iterator[Note]:
        try:
            yield from self._look_at(client)
        except CAError as error:
            yield Note(error.message, hint=error.hint, level=NoteLevel.FATAL, about="reachable")

    def _look_at(self, client: Client) -> Iterator[Note]:
        answer = client.info(self._settings.server_profile)
        yield Note(f"cfssl answers at {self._settings.address}", level=NoteLevel.OK, about="reachable")
        yield _about_ca(answer)
        yield from self._about_clock(answer)
        for end in Profile:
            profile = self._settings.profile_for(end)
            yield _about_profile(end, profile, client.info(profile))
            yield _about_key(client, end, profile)

    def _about_clock(self, answer: Answer) -> Iterator[Note]:
        if answer.time is not None:
            ahead = (answer.time - self._context.clock()).total_seconds()
            side = "ahead of" if ahead > 0 else "behind"
            level = NoteLevel.WARNING if abs(ahead) > CLOCK_TOLERANCE.total_seconds() else NoteLevel.OK
            yield Note(f"the server's clock is {abs(ahead):.0f} s {side} ours", level=level, about="clock")

    def _opened(self) -> Client:
        if self._client is None:
            raise AuthorityClosed("there is no connection to cfssl: the provider is not open")
        return self._client


def _about_ca(answer: Answer) -> Note:
    ca = x509.load_pem_x509_certificate(answer.certificate())
    end = f"{ca.not_valid_after_utc:%Y-%m-%d %H:%M:%SZ}"
    return Note(f'"{ca.subject.rfc4514_string()}", valid until {end}', level=NoteLevel.OK, about="ca")


def _about_profile(end: Profile, profile: str, answer: Answer) -> Note:
    path, about = f"{end}_profile", f"{end} profile"
    usages = {str(usage) for usage in answer.result.get("usages") or ()}
    (other,) = set(USAGES.values()) - {USAGES[end]}
    usable = USAGES[end] in usages and {"digital signature", "signing"} & usages
    if usable and other not in usages:
        expiry = answer.result.get("expiry") or "the server's default time"
        return Note(f'profile "{profile}" signs for {expiry}', path, level=NoteLevel.OK, about=about)
    found = ", ".join(sorted(usages)) or "none"
    # With both, as in cfssl's own default, names and the guest's fingerprint still keep the ends apart.
    return Note(
        f'expected the usages "digital signature" and "{USAGES[end]}" and not "{other}" '
        f'in profile "{profile}", found {found}',
        path,
        "a server without a profile of that name answers for its default profile",
        NoteLevel.WARNING if usable else NoteLevel.FATAL,
        about,
    )


def _about_key(client: Client, end: Profile, profile: str) -> Note:
    # The key is checked before the request is looked at, so one that cannot be read tells without
    # a certificate being made. multirootca calls every unreadable request a bad one.
    about = f"{end} key"
    try:
        client.sign(profile, {"certificate_request": "none: this only tries the key"})
    except Refused as error:
        if "csr decode failed" not in error.said and "bad request" not in error.said:
            return Note(error.message, "auth_key", error.hint, NoteLevel.FATAL, about)
    return Note(f'auth_key is accepted for profile "{profile}"', "auth_key", None, NoteLevel.OK, about)


def _decoded(secret: str) -> bytes:
    try:
        key = bytes.fromhex(secret)
    except ValueError:  # it could quote the key
        key = b""
    if not key:
        raise CAError("auth_key is not hexadecimal", hint="write it as in the server's auth_keys")
    return key


def _must_have_uris(leaf_pem: bytes, uris: Sequence[str]) -> None:
    # cfssl 1.2 takes every host that is no address for a DNS name, and signs it as one
    if not uris:
        return
    leaf = x509.load_pem_x509_certificate(leaf_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    written = names.get_values_for_type(x509.DNSName)
    if not {*uris}.isdisjoint(written):
        raise CAError(
            f"the server wrote the URI {uris[0]} into the certificate as a DNS name",
            hint="this version of cfssl knows no URIs; take a newer one (1.6 does) or names without URIs",
        )


def _trust(issuer_pem: bytes, anchors_file: Path | None) -> TrustBundle:
    if anchors_file is None:
        return TrustBundle(issuer_pem)
    anchors_pem = read_anchors(anchors_file, "ca.cfssl.anchors").encode()
    try:
        trusted = x509.load_pem_x509_certificate(issuer_pem) in x509.load_pem_x509_certificates(anchors_pem)
    except ValueError:  # OpenSSL takes more than cryptography
        raise CAError(f"expected PEM certificates in {anchors_file}", hint="it is ca.cfssl.anchors") from None
    return TrustBundle(anchors_pem, b"" if trusted else issuer_pem)
