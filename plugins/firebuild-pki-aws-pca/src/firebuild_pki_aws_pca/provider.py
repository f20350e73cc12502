"""The provider: AWS Private CA's side of the contract, in the order in which the framework calls it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from firebuild_pki import (
    AuthorityClosed,
    CAError,
    CAProvider,
    Note,
    NoteLevel,
    Profile,
    ProviderContext,
    RetryAfter,
    SignedCertificate,
    SignRequest,
    TrustBundle,
    order_chain,
    parse_certificates,
    read_certificate,
)
from firebuild_pki.x509 import to_pem

from firebuild_pki_aws_pca.client import Client
from firebuild_pki_aws_pca.refusals import Refused, in_state
from firebuild_pki_aws_pca.settings import AwsPcaSettings, look_at, passes_usages

BACKDATE = timedelta(minutes=5)
"""How much a peer's clock may be behind: as much as AWS's signatures allow. AWS's default is an hour."""

SHORT_LIVED = timedelta(days=7)
"""How long certificates of a CA in short-lived mode live at most."""

CLOCK_TOLERANCE = timedelta(minutes=1)
"""Difference between two clocks that is worth a word."""

SOON = timedelta(days=30)
"""How long before its end a CA is worth a word."""

PAUSE = 0.5
"""Seconds between two questions whether a certificate is there: AWS needs a second or two."""

_USAGES = {
    Profile.SERVER: ("SERVER_AUTH",),
    Profile.GUEST: ("CLIENT_AUTH",),
    Profile.PEER: ("SERVER_AUTH", "CLIENT_AUTH"),
}
_CURVES = {"secp256r1": "SHA256WITHECDSA", "secp384r1": "SHA384WITHECDSA", "secp521r1": "SHA512WITHECDSA"}
_NO_REQUEST = b"-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n"
"""An invalid signing request, for a question that AWS can only refuse."""


class AwsPcaProvider(CAProvider):
    """Signs with a private CA of AWS: submits the request, then fetches the certificate."""

    def __init__(self, settings: AwsPcaSettings, context: ProviderContext) -> None:
        self._settings = settings
        self._context = context
        self._client: Client | None = None
        self._authorities: list[x509.Certificate] = []

    def validate(self) -> Sequence[Note]:
        """Look at the settings."""
        return tuple(look_at(self._settings))

    def open(self) -> None:
        """Find the credentials, ask for the certificates of the CA and of those above it."""
        context = self._context
        self._client = Client(
            self._settings,
            context.environ,
            context.clock,
            patient=context.patient,
            build_id=context.domain.partition(".")[0],
        )
        found = self._ask("get_certificate_authority_certificate")
        pem = "\n".join(str(found.get(name, "")) for name in ("Certificate", "CertificateChain"))
        self._authorities = parse_certificates(pem, "certificates of the CA")

    def close(self) -> None:
        """Forget the credentials. There is no session at AWS to end."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def trust_bundle(self) -> TrustBundle:
        """Return the root above the CA, or the CA itself, and what is between root and leaf."""
        # The CA's own certificate comes first, and each is signed by the next, up to the root.
        return TrustBundle(to_pem(self._authorities[-1:]), to_pem(self._authorities[:-1]))

    def sign(self, request: SignRequest) -> SignedCertificate | RetryAfter:
        """Submit the request; AWS needs a second or two for the certificate."""
        template = self._settings.template_for(request.profile)
        now = self._context.clock()
        end, note = self._end(now, request.ttl)
        usages = [{"ExtendedKeyUsageType": usage} for usage in _USAGES[request.profile]]
        passed = {"Extensions": {"KeyUsage": {"DigitalSignature": True}, "ExtendedKeyUsage": usages}}
        answer = self._ask(
            "issue_certificate",
            template,
            Csr=request.csr_pem,
            SigningAlgorithm=self._algorithm(),
            TemplateArn=template,
            Validity=_absolute(end),
            ValidityNotBefore=_absolute(now - BACKDATE),
            # Where an answer got lost, asking again within five minutes makes no second certificate.
            IdempotencyToken=hashlib.sha256(template.encode() + request.csr_pem).hexdigest()[:32],
            **({"ApiPassthrough": passed} if passes_usages(template) else {}),
        )
        return self.poll(request, f"{answer['CertificateArn']} {note}")

    def poll(self, request: SignRequest, handle: str) -> SignedCertificate | RetryAfter:  # noqa: ARG002
        """Fetch the certificate, or say that AWS is not done."""
        arn, _, note = handle.partition(" ")
        try:
            found = self._ask("get_certificate", CertificateArn=arn)
        except Refused as error:
            if error.code == "RequestInProgressException":
                return RetryAfter(PAUSE, handle, "AWS is issuing the certificate")
            raise
        leaf = str(found["Certificate"]).encode()
        above = f"{found.get('CertificateChain', '')}\n".encode() + self.trust_bundle().intermediates_pem
        return SignedCertificate(leaf, order_chain(leaf, above), (note,) if note else ())

    def revoke(self, certificate_pem: bytes) -> None:
        """Take back a certificate; one that is taken back already is fine."""
        serial = f"{read_certificate(certificate_pem).serial_number:x}"
        pairs = serial.zfill(len(serial) + len(serial) % 2)
        number = ":".join(pairs[at : at + 2] for at in range(0, len(pairs), 2))
        try:
            self._ask(
                "revoke_certificate", CertificateSerial=number, RevocationReason="CESSATION_OF_OPERATION"
            )
        except Refused as error:
            if error.code != "RequestAlreadyProcessedException":
                raise

    def check(self) -> Sequence[Note]:
        """Look at the credentials, the CA, its certificate and mode, and the permissions; issue nothing."""
        return tuple(self._findings())

    def _end(self, now: datetime, ttl: timedelta) -> tuple[datetime, str]:
        """Say when a certificate ends, and why not later: AWS refuses what outlives the CA or its mode."""
        limits = [(now + ttl, ""), (self._authorities[0].not_valid_after_utc, "as that of the CA does")]
        if ttl > SHORT_LIVED - BACKDATE and self._describe()["UsageMode"] == "SHORT_LIVED_CERTIFICATE":
            limits.append(
                (now + SHORT_LIVED - BACKDATE, "as the CA is in short-lived mode, seven days at most")
            )
        end, why = min(limits)
        return end, f"the certificate ends at {end:%Y-%m-%d %H:%M:%SZ}, {why}" if why else ""

    def _algorithm(self) -> str:
        if self._settings.signing_algorithm is not None:
            return self._settings.signing_algorithm
        match self._authorities[0].public_key():
            case rsa.RSAPublicKey():
                return "SHA256WITHRSA"
            case ec.EllipticCurvePublicKey() as key if key.curve.name in _CURVES:
                return _CURVES[key.curve.name]
        # Keys of other kinds have one algorithm, and its name: ML_DSA_44.
        return str(self._describe()["CertificateAuthorityConfiguration"]["KeyAlgorithm"])

    def _opened(self) -> Client:
        if self._client is None:
            raise AuthorityClosed("there are no credentials for AWS: the provider is not open")
        return self._client

    def _describe(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("describe_certificate_authority")["CertificateAuthority"]
        return found

    def _ask(self, operation: str, template: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Ask AWS; where the state of the CA is in the way, say which it is."""
        try:
            return self._opened().ask(operation, template, **parameters)
        except Refused as error:
            if error.code != "InvalidStateException":
                raise
            status = "ACTIVE"
            with suppress(CAError):  # to look may not be allowed
                status = str(self._describe()["Status"])
            raise (error if status == "ACTIVE" else in_state(status)) from None

    def _findings(self) -> Iterator[Note]:
        yield self._about_identity()
        try:
            answer = self._ask("describe_certificate_authority")
        except Refused as error:
            hint = f"a build does without; {error.hint}"
            yield Note(error.message, "certificate_authority_arn", hint, about="reachable")
        else:
            yield from self._about_ca(answer["CertificateAuthority"])
            yield from self._about_clock(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
        yield self._about_certificate()
        yield from self._about_permissions()

    def _about_identity(self) -> Note:
        try:
            who = self._opened().identity()
        except CAError as error:
            return Note(f"AWS STS does not say who we are: {error.message}", "", error.hint, about="identity")
        return Note(f"signed in as {who}", level=NoteLevel.OK, about="identity")

    def _about_ca(self, ca: dict[str, Any]) -> Iterator[Note]:
        status, mode = str(ca["Status"]), str(ca.get("UsageMode", "GENERAL_PURPOSE"))
        if status == "ACTIVE":
            words = f"AWS Private CA answers in {self._settings.region}; the CA is active"
            yield Note(words, level=NoteLevel.OK, about="reachable")
        else:
            error = in_state(status)
            yield Note(error.message, "certificate_authority_arn", error.hint, NoteLevel.FATAL, "reachable")
        words = "a general-purpose CA: a certificate costs more than with one in short-lived mode"
        if mode == "SHORT_LIVED_CERTIFICATE":
            words = "a CA in short-lived mode: certificates of seven days at most"
        yield Note(words, level=NoteLevel.OK, about="mode")

    def _about_clock(self, date: str) -> Iterator[Note]:
        with suppress(TypeError, ValueError):
            ahead = (parsedate_to_datetime(date) - self._context.clock()).total_seconds()
            side = "ahead of" if ahead > 0 else "behind"
            level = NoteLevel.WARNING if abs(ahead) > CLOCK_TOLERANCE.total_seconds() else NoteLevel.OK
            yield Note(f"AWS's clock is {abs(ahead):.0f} s {side} ours", level=level, about="clock")

    def _about_certificate(self) -> Note:
        ca = min(self._authorities, key=lambda one: one.not_valid_after_utc)
        left = ca.not_valid_after_utc - self._context.clock()
        words = f'"{ca.subject.rfc4514_string()}", valid until {ca.not_valid_after_utc:%Y-%m-%d %H:%M:%SZ}'
        level = NoteLevel.FATAL if left < timedelta(0) else NoteLevel.WARNING if left < SOON else NoteLevel.OK
        hint = (
            None if level is NoteLevel.OK else "renew it; with a CA above it, that one has to sign it again"
        )
        signs = f"; signs with {self._algorithm()}"
        return Note(words + signs, "certificate_authority_arn" if hint else "", hint, level, "ca")

    def _about_permissions(self) -> Iterator[Note]:
        # IAM is asked before a request is looked at: one that AWS can only refuse tells what is allowed.
        for end in Profile:
            template = self._settings.template_for(end)
            question = {
                "Csr": _NO_REQUEST,
                "SigningAlgorithm": self._algorithm(),
                "TemplateArn": template,
                "Validity": _absolute(self._context.clock() + BACKDATE),
            }
            allowed = Note(
                f"{template} may be used", f"{end}_template", None, NoteLevel.OK, f"{end} template"
            )
            yield self._tried("MalformedCSRException", allowed, "issue_certificate", template, **question)
        arn = f"{self._settings.certificate_authority_arn}/certificate/{'0' * 32}"
        allowed = Note("certificates may be fetched", level=NoteLevel.OK, about="fetching")
        yield self._tried("ResourceNotFoundException", allowed, "get_certificate", CertificateArn=arn)

    def _tried(self, expected: str, allowed: Note, *asked: str, **parameters: Any) -> Note:
        try:
            self._ask(*asked, **parameters)
        except CAError as error:
            code = error.code if isinstance(error, Refused) else ""
            if code == expected:
                return allowed
            # Another way of saying that the question makes no sense is no proof of a missing permission.
            unclear = code in {"InvalidArgsException", "InvalidArnException", "ValidationException"}
            level = NoteLevel.WARNING if unclear else NoteLevel.FATAL
            return replace(allowed, message=error.message, hint=error.hint, level=level)
        return replace(allowed, message="AWS answered a question without sense", level=NoteLevel.WARNING)


def _absolute(when: datetime) -> dict[str, Any]:
    return {"Type": "ABSOLUTE", "Value": int(when.timestamp())}
