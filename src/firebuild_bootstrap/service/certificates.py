"""Naming and recognising the certificates of peers."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from firebuild_pki import read_certificate
from firebuild_pki.display import one_line

WRONG_GUEST: Final = "its certificate is not the one that was issued for this build"
_MAX_SUBJECT: Final = 256


@dataclass(frozen=True)
class PeerCertificate:
    """What a log says about a certificate: its subject, and the SHA-256 of it in lower-case hexadecimal."""

    subject: str
    fingerprint: str

    @classmethod
    def of(cls, der: bytes) -> PeerCertificate:
        """Describe an untrusted certificate; never raises."""
        return cls(_subject(der), hashlib.sha256(der).hexdigest())


NO_CERTIFICATE: Final = PeerCertificate("", "")


class Pin:
    """Recognises exactly one certificate.

    Args:
        fingerprint: its SHA-256 in hexadecimal, in any case, with or without colons.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint.replace(":", "").lower()

    def matches(self, certificate: PeerCertificate) -> bool:
        """Tell whether it is the one."""
        return hmac.compare_digest(self._fingerprint, certificate.fingerprint)


def _subject(der: bytes) -> str:
    try:
        certificate = read_certificate(der)
        text = certificate.subject.rfc4514_string() or _alternative_names(certificate)
    except Exception:  # untrusted input, and each parser fails with exceptions of its own
        return "(no readable name)"
    return one_line(text, _MAX_SUBJECT)


def _alternative_names(certificate: x509.Certificate) -> str:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return ",".join(f"DNS={name}" for name in extension.value.get_values_for_type(x509.DNSName))
