"""The PKI mount: trust bundle, signing, revoking, and an error for each refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from firebuild_pki.chain import extension_of, is_self_signed, order_chain, parse_certificates
from firebuild_pki.errors import CAError, MaterialError, ProviderError
from firebuild_pki.http import audit_headers
from firebuild_pki.leaf_checks import BOTH
from firebuild_pki.pem_files import CERTIFICATE_LABELS, Source, blocks_in, read
from firebuild_pki.provider import Profile, SignedCertificate, SignRequest, TrustBundle
from firebuild_pki.providers.vault.nodes import Budget, HintContext, hint_for, relevant_warning
from firebuild_pki.providers.vault.session import Session
from firebuild_pki.providers.vault.settings import VaultSettings
from firebuild_pki.providers.vault.transport import Answer
from firebuild_pki.values import dataclass
from firebuild_pki.x509 import to_pem, usages_of

FLAGS = {
    Profile.SERVER: ("server_flag",),
    Profile.GUEST: ("client_flag",),
    Profile.PEER: ("server_flag", "client_flag"),
}
"""What gives the certificates of a role the extended key usages of each profile."""


DEFAULT_ISSUER = "default"

_CHAINS = 8  # one for each issuer, usually


@dataclass(frozen=True, slots=True)
class IssuerChain:
    """A certificate of the mount that signs leaves, and what is known above it.

    Args:
        issuers: from the one that signs leaves upwards, without root.
        root: the root, if the mount knows it.
    """

    issuers: tuple[x509.Certificate, ...]
    root: x509.Certificate | None

    @property
    def anchor(self) -> x509.Certificate:
        """The topmost certificate that is known."""
        return self.root or self.issuers[-1]

    @property
    def below(self) -> tuple[x509.Certificate, ...]:
        """The certificates below the anchor."""
        return self.issuers if self.root else self.issuers[:-1]

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """All of them, from the bottom up."""
        return (*self.issuers, *([self.root] if self.root else []))


def issuer_chain(data: Mapping[str, Any]) -> IssuerChain:
    """Read the answer of ``<mount>/issuer/<ref>/json``.

    Raises:
        MaterialError: it holds no readable certificate.
    """
    pem = pem_of(data, "certificate", "ca_chain")
    if not pem:
        raise MaterialError("the mount has no CA certificate", hint="make or import a CA in the mount")
    pool = parse_certificates(pem, "CA certificates of the mount")
    issuer = pool[0]
    if is_self_signed(issuer):
        return IssuerChain((), issuer)
    above = order_chain(to_pem([issuer]), to_pem(pool[1:]))
    issuers = (issuer, *(parse_certificates(above, "chain") if above else ()))
    roots = [one for one in pool if is_self_signed(one)]
    return IssuerChain(issuers, next((root for root in roots if _signed(issuers[-1], root)), None))


def bundle(chains: Sequence[IssuerChain], override: bytes | None) -> TrustBundle:
    """Make the trust bundle of all issuers that sign leaves.

    Args:
        chains: one for each issuer, the server's first.
        override: PEM of the anchors that the operator named.
    """
    if override is None:
        anchors = dict.fromkeys(chain.anchor for chain in chains)
        below = dict.fromkeys(one for chain in chains for one in chain.below)
        return TrustBundle(to_pem(list(anchors)), to_pem(list(below)))
    chosen = parse_certificates(override, "trust anchors in the file of the setting trust")
    known = dict.fromkeys(one for chain in chains for one in chain.issuers)
    return TrustBundle(to_pem(chosen), to_pem([one for one in known if one not in chosen]))


def pem_of(data: Mapping[str, Any], *keys: str) -> bytes:
    """Join the certificates in an answer; each key holds a PEM text or a list of them, or is absent."""
    texts: list[str] = []
    for key in keys:
        value = data.get(key)
        texts += value if isinstance(value, list) else [value] if value else []
    return "\n".join(str(text).strip() for text in texts).encode()


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:
        return False
    return True


def sign_body(request: SignRequest) -> Mapping[str, object]:
    """Write the body of ``sign/<role>``.

    Names are sent as well as being in the CSR: roles with use_csr_common_name=false and
    use_csr_sans=false look at these. The lifetime is always ``ttl``, which roles may cap.
    """
    csr = x509.load_pem_x509_csr(request.csr_pem)
    names = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    body: dict[str, object] = {
        "csr": request.csr_pem.decode("ascii"),
        "alt_names": ",".join(request.dns_names),
        "uri_sans": list(request.uri_names),
        "ttl": f"{math.ceil(request.ttl.total_seconds())}s",
        "format": "pem",
    }
    return {**body, "common_name": str(names[0].value)} if names else body


def signed_certificate(
    answer: Answer, profile: Profile, about: HintContext, ordered: dict[bytes, bytes]
) -> SignedCertificate:
    """Read the answer.

    Args:
        answer: of ``sign/<role>``.
        profile: what the certificate is for.
        about: for hints.
        ordered: chains that came with other certificates, and their order; what is new is added. The order is
            found by verifying signatures, and a mount sends the same chain each time.

    Raises:
        ProviderError: it holds no certificate; the mount is not a PKI secrets engine.
        MaterialError: the certificate is for other uses than that of the profile.
    """
    leaf_pem = pem_of(answer.data, "certificate")
    if not leaf_pem:
        raise ProviderError(
            f"the mount {about.mount} answered, but without a certificate",
            hint="set mount to the path of a PKI secrets engine: bao secrets list",
        )
    _must_have_usage(leaf_pem, profile, about)
    above = pem_of(answer.data, "issuing_ca", "ca_chain")
    if above not in ordered or leaf_pem.count(b"-----BEGIN") > 1:  # what comes with the leaf counts, too
        if len(ordered) >= _CHAINS:
            ordered.clear()
        ordered[above] = order_chain(leaf_pem, above)
    remarks = [relevant_warning(str(text), about) for text in answer.content.get("warnings") or ()]
    return SignedCertificate(leaf_pem + b"\n", ordered[above], tuple(text for text in remarks if text))


def _must_have_usage(leaf_pem: bytes, profile: Profile, about: HintContext) -> None:
    leaf = parse_certificates(leaf_pem, "certificate")[0]
    found = set(extension_of(leaf, x509.ExtendedKeyUsage) or ())
    wanted = usages_of(profile)
    if {*wanted} <= found <= BOTH:
        return
    expected = " and ".join(map(_name, wanted))
    names = ", ".join(sorted(_name(usage) for usage in found)) or "none"
    flags = " and ".join(f"{flag}=true" for flag in FLAGS[profile])
    raise MaterialError(
        f"expected the extended key usage {expected} in the {profile} certificate"
        + (", and none but serverAuth and clientAuth" if found - BOTH else "")
        + f", but the role {about.role} gave: {names}",
        hint=f"set {flags} and no ext_key_usage on the role {about.role}",
    )


def _name(usage: x509.ObjectIdentifier) -> str:
    return usage._name if usage._name != "Unknown OID" else usage.dotted_string


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
        self._ordered: dict[bytes, bytes] = {}

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Have a request signed.

        Raises:
            CAError: the server refused, or signed something else than what was asked for.
        """
        role = self._settings.role_for(request.profile)
        if not role:
            raise ProviderError(
                f"no role signs the certificate of a {request.profile}", hint="set role or peer_role"
            )
        about = HintContext(self._settings.mount, role)
        path = self._settings.sign_path(request.profile)
        budget = self._session.budget()
        headers = audit_headers(request.build_id, request.labels)
        answer = self._session.call("POST", path, budget, sign_body(request), headers)
        if answer.status not in {200, 204}:
            self._roles, self._chains = {}, None  # an operator may be about to put it right
            raise self._refused(f"signing the {request.profile} certificate", answer, path, about, budget)
        known = len(self._ordered)
        signed = signed_certificate(answer, request.profile, about, self._ordered)
        if (
            len(self._ordered) != known
        ):  # another chain than before: whoever asks for the anchors gets new ones
            self._chains = None
        return signed

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
            about = HintContext(self._settings.mount, ", ".join(self._settings.roles))
            raise self._refused("revoking the certificate", answer, path, about, budget)

    def trust_bundle(self) -> TrustBundle:
        """Return the anchors of all issuers that sign leaves.

        Raises:
            CAError: the mount has no CA, or the file of the setting trust cannot be read.
        """
        return bundle(self.chains(), _named_anchors(self._settings.trust))

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
                about = HintContext(self._settings.mount, role)
                raise self._refused("reading the CA certificate", answer, path, about, budget)
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

    def _refused(self, doing: str, answer: Answer, path: str, about: HintContext, budget: Budget) -> CAError:
        said = self._session.words_of(answer)
        hint = self._about_mount(budget) or hint_for(said, about)
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
            or "set mount to the path of a PKI secrets engine: bao secrets list"
            f"{self._settings.in_namespace}; or namespace to the one that it is in: bao namespace list",
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


def _named_anchors(path: str | None) -> bytes | None:
    if not path:
        return None
    source = Source("trust", path)
    found = blocks_in(source, read(source).data, CERTIFICATE_LABELS, "a certificate")
    return b"\n".join(block.pem for block in found)


def serial(certificate: x509.Certificate) -> str:
    """Write a serial number the way Vault does: pairs of hexadecimal digits with colons."""
    digits = f"{certificate.serial_number:x}"
    digits = digits.zfill(len(digits) + len(digits) % 2)
    return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))


def data_of(answer: Answer) -> Mapping[str, Any]:
    """The data of an answer that says yes; empty for any other."""
    return answer.data if answer.status == 200 else {}
