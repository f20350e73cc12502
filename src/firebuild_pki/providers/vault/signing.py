"""One certificate: what is sent, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cryptography import x509
from cryptography.x509.oid import NameOID

from firebuild_pki.chain import order_chain, parse_certificates
from firebuild_pki.errors import MaterialError, ProviderError
from firebuild_pki.leaf_checks import BOTH
from firebuild_pki.provider import Profile, SignedCertificate, SignRequest
from firebuild_pki.providers.vault.refusals import Place, worth_a_word
from firebuild_pki.providers.vault.transport import Answer
from firebuild_pki.providers.vault.trust import pem_of
from firebuild_pki.x509 import USAGE

FLAGS = {Profile.SERVER: "server_flag", Profile.GUEST: "client_flag"}
"""What gives the certificates of a role the extended key usage of each end."""


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
        "ttl": f"{math.ceil(request.ttl.total_seconds())}s",
        "format": "pem",
    }
    return {**body, "common_name": str(names[0].value)} if names else body


def signed_certificate(answer: Answer, profile: Profile, place: Place) -> SignedCertificate:
    """Read the answer.

    Raises:
        ProviderError: it holds no certificate; the mount is not a PKI secrets engine.
        MaterialError: the certificate is for other uses than that of the profile.
    """
    leaf_pem = pem_of(answer.data, "certificate")
    if not leaf_pem:
        raise ProviderError(
            f"the mount {place.mount} answered, but without a certificate",
            hint="set mount to the path of a PKI secrets engine: bao secrets list",
        )
    _must_have_usage(leaf_pem, profile, place)
    chain_pem = order_chain(leaf_pem, pem_of(answer.data, "issuing_ca", "ca_chain"))
    remarks = [worth_a_word(str(text), place) for text in answer.content.get("warnings") or ()]
    return SignedCertificate(leaf_pem + b"\n", chain_pem, tuple(text for text in remarks if text))


def _must_have_usage(leaf_pem: bytes, profile: Profile, place: Place) -> None:
    leaf = parse_certificates(leaf_pem, "certificate")[0]
    try:
        found = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        found = set()
    if USAGE[profile] in found <= BOTH:
        return
    names = ", ".join(sorted(_name(usage) for usage in found)) or "none"
    raise MaterialError(
        f"expected the extended key usage {_name(USAGE[profile])} in the {profile} certificate, and none but "
        f"serverAuth and clientAuth, but the role {place.role} gave: {names}",
        hint=f"set {FLAGS[profile]}=true and no ext_key_usage on the role {place.role}",
    )


def _name(usage: x509.ObjectIdentifier) -> str:
    return usage._name if usage._name != "Unknown OID" else usage.dotted_string
