"""The PKI mount: trust bundle, signing, revoking, and the words for each refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cryptography import x509

from firebuild_pki.errors import CAError, ProviderError
from firebuild_pki.provider import SignedCertificate, SignRequest, TrustBundle
from firebuild_pki.providers.vault.nodes import Budget
from firebuild_pki.providers.vault.refusals import Place, hint_for
from firebuild_pki.providers.vault.session import Session
from firebuild_pki.providers.vault.settings import VaultSettings
from firebuild_pki.providers.vault.signing import sign_body, signed_certificate
from firebuild_pki.providers.vault.tls import read_text
from firebuild_pki.providers.vault.transport import Answer
from firebuild_pki.providers.vault.trust import IssuerChain, bundle, issuer_chain

DEFAULT_ISSUER = "default"


class Mount:
    """What the provider wants of the PKI secrets engine.

    Args:
        settings: of the block ``ca.vault``.
        session: logged in.
    """

    def __init__(self, settings: VaultSettings, session: Session) -> None:
        self._settings = settings
        self._session = session
        # Tokens may be good for a few requests only (num_uses): nothing is read twice.
        self._roles: dict[str, Answer] = {}
        self._chains: list[IssuerChain] | None = None

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Have a request signed.

        Raises:
            CAError: the server refused, or signed something else than what was asked for.
        """
        place = Place(self._settings.mount, self._settings.role_for(request.profile))
        path = self._settings.sign_path(request.profile)
        budget = self._session.budget()
        answer = self._session.call("POST", path, budget, sign_body(request))
        if answer.status not in {200, 204}:
            self._roles, self._chains = {}, None  # an operator may be about to put it right
            raise self._refused(f"signing the {request.profile} certificate", answer, path, place, budget)
        return signed_certificate(answer, request.profile, place)

    def revoke(self, certificate_pem: bytes) -> None:
        """Revoke a certificate by its serial number; where it was not stored, by showing it.

        Raises:
            CAError: the server refused.
        """
        leaf = x509.load_pem_x509_certificate(certificate_pem)
        path, budget = f"{self._settings.mount}/revoke", self._session.budget()
        answer = self._session.call("POST", path, budget, {"serial_number": serial(leaf)})
        if answer.status == 400 and "not found" in answer.errors:  # roles with no_store=true
            shown = {"certificate": certificate_pem.decode("ascii")}
            answer = self._session.call("POST", path, budget, shown)
        if answer.status != 200:
            place = Place(self._settings.mount, ", ".join(self._settings.roles))
            raise self._refused("revoking the certificate", answer, path, place, budget)

    def trust_bundle(self) -> TrustBundle:
        """Return the anchors of all issuers that sign leaves.

        Raises:
            CAError: the mount has no CA, or the file of the setting trust cannot be read.
        """
        path = self._settings.trust
        override = read_text(path, "trust").encode() if path else None
        return bundle(self.chains(), override)

    def chains(self) -> list[IssuerChain]:
        """Read the CA certificates; no token is needed for that."""
        if self._chains is None:
            self._chains = list(self._read_chains(self._session.budget()))
        return self._chains

    def _read_chains(self, budget: Budget) -> Iterator[IssuerChain]:
        for issuer, role in self._issuers(budget).items():
            path = f"{self._settings.mount}/issuer/{issuer}/json"
            answer = self._session.ask("GET", path, budget)
            if answer.status == 403:  # everybody may read it, where it is
                raise self._no_mount(answer, budget)
            if answer.status != 200:
                place = Place(self._settings.mount, role)
                raise self._refused("reading the CA certificate", answer, path, place, budget)
            yield issuer_chain(answer.data)

    def role(self, name: str, budget: Budget) -> Answer:
        """Read a role; the policy need not allow it."""
        if name not in self._roles:
            self._roles[name] = self._session.look(f"{self._settings.mount}/roles/{name}", budget)
        return self._roles[name]

    def _issuers(self, budget: Budget) -> Mapping[str, str]:
        if self._settings.issuer:
            return {self._settings.issuer: self._settings.roles[0]}
        found: dict[str, str] = {}
        for role in self._settings.roles:
            reference = self.role(role, budget).data.get("issuer_ref") or DEFAULT_ISSUER
            found.setdefault(str(reference), role)
        return found

    def _refused(self, doing: str, answer: Answer, path: str, place: Place, budget: Budget) -> CAError:
        said = self._session.words_of(answer)
        hint = self._about_mount(budget) or hint_for(said, place)
        if answer.status == 403:
            why, remedy = self._session.why_denied(path, budget)
            return ProviderError(
                f"{doing} was refused by {answer.address}: permission denied for {path}: {why}",
                hint=hint or remedy,
            )
        return ProviderError(f"{doing} was refused by {answer.address}: {said}", hint=hint)

    def _no_mount(self, answer: Answer, budget: Budget) -> CAError:
        where = f" in the namespace {self._settings.namespace}" if self._settings.namespace else ""
        return ProviderError(
            f"{answer.address} has no PKI secrets engine at {self._settings.mount}{where}",
            hint=self._about_mount(budget)
            or "set mount to the path of a PKI secrets engine: bao secrets list",
        )

    def _about_mount(self, budget: Budget) -> str | None:
        # every token that may do anything below a mount may ask what it is
        mount = self._settings.mount
        try:
            found = self._session.look(f"sys/internal/ui/mounts/{mount}", budget)
        except CAError:
            return None
        kind = found.data.get("type")
        if found.status == 200 and isinstance(kind, str) and kind != "pki":
            return f"{mount} is a secrets engine of type {kind}; set mount to the path of one of type pki"
        return None


def serial(certificate: x509.Certificate) -> str:
    """Write a serial number the way Vault does: pairs of hexadecimal digits with colons."""
    digits = f"{certificate.serial_number:x}"
    digits = digits.zfill(len(digits) + len(digits) % 2)
    return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))


def data_of(answer: Answer) -> Mapping[str, Any]:
    """The data of an answer that says yes; empty for any other."""
    return answer.data if answer.status == 200 else {}
