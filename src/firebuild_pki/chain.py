"""Putting the certificates that a provider returned into the order that TLS wants."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import SignatureAlgorithmOID

from firebuild_pki.errors import MaterialError
from firebuild_pki.keys import CURVES, LEAF_CURVES, MLDSAPublicKey, kind_of_key
from firebuild_pki.values import dataclass
from firebuild_pki.wrapping import one_text
from firebuild_pki.x509 import fingerprint, to_pem

ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)

MIN_RSA_BITS: Final = 2048
"""The least that path validation accepts."""

_SIGNATURES: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.RSASSA_PSS,
    }
)
_WITHOUT_HASH: Final = frozenset(  # RFC 9881
    {SignatureAlgorithmOID.ML_DSA_44, SignatureAlgorithmOID.ML_DSA_65, SignatureAlgorithmOID.ML_DSA_87}
)
_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})
_EC_PARAMETERS: Final = bytes.fromhex(
    "06072a8648ce3d0201"
)  # id-ecPublicKey, before its parameters (RFC 5480)
_PSS: Final = {  # RFC 4055 section 3.1; with other parameters TLS does not know it (RFC 8446 section 4.2.3)
    name: bytes.fromhex(
        f"304106092a864886f70d01010a3034a00f300d060960864801650304020{number}0500a11c301a06092a864886f70d010108"
        f"300d060960864801650304020{number}0500a2030201{size:02x}"
    )
    for name, number, size in (("sha256", 1, 32), ("sha384", 2, 48), ("sha512", 3, 64))
}
_MAX_EXPONENT_BITS: Final = 33
"""BoringSSL reads no RSA key with a larger public exponent."""
_MAX_PATHS: Final = 64
_MAX_LINKS: Final = 1_000
_quiet = threading.RLock()
_is_quiet = False


@dataclass(frozen=True, slots=True)
class Chain:
    """A leaf, its issuers from the bottom up without the root, and the anchor they lead to."""

    leaf: x509.Certificate
    issuers: tuple[x509.Certificate, ...]
    anchor: x509.Certificate

    @property
    def issuer(self) -> x509.Certificate:
        """The certificate that signed the leaf."""
        return self.authorities[0]

    @property
    def authorities(self) -> tuple[x509.Certificate, ...]:
        """The CAs, from the one that signed the leaf up to the anchor."""
        return (*self.issuers, self.anchor)

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """What a TLS server or client sends: leaf first, no root (RFC 8446 section 4.4.2)."""
        return (self.leaf, *self.issuers)


@contextmanager
def quiet_parsing() -> Iterator[None]:
    """Keep cryptography's remarks about odd certificates off stderr: serial numbers of zero, NULL parameters.

    They are for programmers, come with lines of source, and name no certificate. Within such a block, another
    one costs nothing.
    """
    global _is_quiet  # noqa: PLW0603 - the filters are the whole process's, hence the lock
    with _quiet:
        if _is_quiet:  # whoever has the lock made it so
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _is_quiet = True
            try:
                yield
            finally:
                _is_quiet = False


def read_certificate(data: bytes) -> x509.Certificate:
    """Read one certificate, PEM or DER; each kind of damage raises a different exception."""
    is_pem = data.lstrip().startswith(b"-")
    with quiet_parsing():
        certificate = (x509.load_pem_x509_certificate if is_pem else x509.load_der_x509_certificate)(data)
        _parse_extensions([certificate])
    return certificate


def _parse_extensions(certificates: Iterable[x509.Certificate]) -> None:
    """Have extensions parsed, which certificates keep then: later nothing is remarked about them."""
    for certificate in certificates:
        with suppress(Exception):  # what is broken is told to whoever asks for it
            _ = certificate.extensions


def unreadable_part(certificate: x509.Certificate) -> tuple[str, Exception] | None:
    """Tell which part of a certificate cannot be read, and why. Each is parsed on its first use.

    Returns:
        The part and what its parser says; None if all can be read.
    """
    parts: dict[str, Callable[[], object]] = {
        "subject": lambda: certificate.subject,
        "issuer": lambda: certificate.issuer,
        "validity": lambda: (certificate.not_valid_before_utc, certificate.not_valid_after_utc),
        "public key": certificate.public_key,
        "extensions": lambda: certificate.extensions,
    }
    for part, parse in parts.items():
        try:
            with quiet_parsing():
                parse()
        except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
            return part, error
    return None


def serial_of(certificate: x509.Certificate) -> int:
    """Return the serial number; zero and less are not remarked on stderr."""
    with quiet_parsing():
        return certificate.serial_number


def extension_of(certificate: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    """Return the value of an extension, None if there is none."""
    for extension in certificate.extensions:
        value: x509.ExtensionType = extension.value
        if type(value) is kind:
            return value
    return None


def error_message(error: BaseException) -> str:
    """Say why something could not be read or is refused, without the dumps that crypto libraries write."""
    text = str(error).strip()
    if "ParseError" in text or "asn1" in text.lower():
        return "it is not valid DER"
    if "PEM" in text:
        return "its PEM is damaged"
    if isinstance(error, UnsupportedAlgorithm):
        return f"it uses something that is not supported: {one_text(text, 100)}"
    text = text.partition(" (encountered processing <")[0]
    # "forbidden public key algorithm: AlgorithmIdentifier { oid: …"
    short = re.sub(r":?\s*\b[A-Z]\w+\s*[{(\[].*", "", text, flags=re.DOTALL)
    return one_text(short, 300).rstrip(".") or "it is malformed"


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what cryptography raises about odd certificates into an error of ours, in words of ours.

    Reading a certificate takes place piece by piece: a field that is damaged raises when it is asked for.

    Args:
        what: is looked at, as messages call it.

    Raises:
        MaterialError: it cannot be read.
    """
    try:
        with quiet_parsing():
            yield
    except MaterialError:
        raise
    except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
        failure = MaterialError(f"{what} cannot be read: {error_message(error)}")
        failure.__cause__ = error
    else:
        return
    raise failure


def parse_certificates(pem: bytes | str, what: str) -> list[x509.Certificate]:
    """Read PEM certificates; a missing newline between or after them is tolerated.

    Args:
        pem: any number of certificates, at least one.
        what: how messages call it.

    Raises:
        MaterialError: nothing in it is a certificate, or one is broken.
    """
    if not isinstance(pem, bytes | str):
        raise MaterialError(f"expected PEM text as {what}, found {type(pem).__name__}")
    data = pem.encode() if isinstance(pem, str) else pem
    data = data.replace(b"----------", b"-----\n-----")
    try:
        with quiet_parsing():
            certificates = x509.load_pem_x509_certificates(data)
            _parse_extensions(certificates)
            return certificates
    except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
        message = f"expected PEM certificates as {what}, but they cannot be read: {error_message(error)}"
        raise MaterialError(message) from error


class Links:
    """Which certificate issued which. Answers about CAs are kept, as they are asked for each leaf again."""

    def __init__(self) -> None:
        self._known: dict[tuple[x509.Certificate, x509.Certificate], str | None] = {}
        self._roots: dict[x509.Certificate, bool] = {}
        self._read: tuple[bytes | str, list[x509.Certificate]] = (b"", [])

    def read(self, pem: bytes | str, what: str = "chain") -> list[x509.Certificate]:
        """Read PEM certificates, also none; those that came the last time are not parsed again.

        Raises:
            MaterialError: as for `parse_certificates`.
        """
        if pem != self._read[0]:
            blank = isinstance(pem, bytes | str) and not pem.strip()
            self._read = (pem, [] if blank else parse_certificates(pem, what))
        return self._read[1]

    def is_root(self, certificate: x509.Certificate) -> bool:
        """Tell a root; see `is_self_signed`."""
        if certificate not in self._roots:
            if len(self._roots) > _MAX_LINKS:
                self._roots.clear()
            self._roots[certificate] = is_self_signed(certificate)
        return self._roots[certificate]

    def problem(self, below: x509.Certificate, above: x509.Certificate) -> str | None:
        """Tell why a certificate cannot be taken for one that another issued; None if it can.

        Args:
            below: the certificate.
            above: whose subject is its issuer.
        """
        pair = (below, above)
        if pair not in self._known:
            if len(self._known) > _MAX_LINKS:
                self._known.clear()
            self._known[pair] = _link_problem(below, above)
        return self._known[pair]

    def paths(
        self,
        leaf: x509.Certificate,
        pool: Iterable[x509.Certificate],
        anchors: Sequence[x509.Certificate],
    ) -> Iterator[Chain]:
        """Find all ways from a leaf to an anchor, the shortest first; at least one.

        There are several where a CA was renewed with its old key, or is cross-signed. Order and repetition do
        not matter; roots and unrelated certificates are left out.

        Raises:
            MaterialError: there is none; the message names the missing link, or the one that does not hold.
        """
        others = [one for one in dict.fromkeys(pool) if one != leaf and not self.is_root(one)]
        paths: list[tuple[x509.Certificate, ...]] = [(leaf,)]
        found = 0
        for path in paths:
            for anchor in anchors:
                if anchor not in path and self._holds(path[-1], anchor):
                    found += 1
                    yield Chain(leaf, path[1:], anchor)
            # a heap of certificates that all sign each other must not keep us for ever
            issuers = [one for one in others if one not in path and self._holds(path[-1], one)]
            paths += [(*path, issuer) for issuer in issuers][: max(0, _MAX_PATHS - len(paths))]
        if not found:
            raise self._missing([path[-1] for path in reversed(paths)], others, anchors)

    def _holds(self, below: x509.Certificate, above: x509.Certificate) -> bool:
        return below.issuer == above.subject and self.problem(below, above) is None

    def _missing(
        self,
        ends: Sequence[x509.Certificate],
        pool: Sequence[x509.Certificate],
        anchors: Sequence[x509.Certificate],
    ) -> MaterialError:
        for end in dict.fromkeys(ends):
            problem = signature_problem(end)
            if problem is not None:
                hint = "let the CA sign with SHA-256; a CA certificate can also be a trust anchor itself"
                return MaterialError(f"{describe(end)} {problem}", hint=hint)
            for one in (*anchors, *pool):
                problem = self.problem(end, one) if one.subject == end.issuer and one != end else None
                if problem not in {None, OTHER_KEY}:  # another key under the same name is another CA
                    return MaterialError(f"{describe(end)} does not lead to {describe(one)}: {problem}")
                if spelling := spelling_problem(end, one):
                    return spelling
        current = ends[0]
        wanted = one_text(current.issuer.rfc4514_string(), 300) or "no name"
        known = ", ".join(describe(anchor) for anchor in anchors[:10])
        return MaterialError(
            f'the chain has a missing link: {describe(current)} was issued by "{wanted}", '
            "which is neither in the chain nor among the trust anchors",
            hint=f"the trust anchors are {known}; add the missing CA certificate to the chain",
        )


def build_chain(
    leaf: x509.Certificate,
    pool: Iterable[x509.Certificate],
    anchors: Sequence[x509.Certificate],
) -> Chain:
    """Take the shortest way from a leaf to an anchor; see `Links.paths`.

    Raises:
        MaterialError: there is none.
    """
    return next(Links().paths(leaf, pool, anchors))


def signature_problem(certificate: x509.Certificate) -> str | None:
    """Tell why a certificate's signature is not accepted, whoever made it; None if it is."""
    oid = certificate.signature_algorithm_oid
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return f"is signed with an algorithm that is not supported ({oid.dotted_string})"
    if algorithm is not None and algorithm.name in {"sha1", "md5"}:
        name = {"sha1": "SHA-1", "md5": "MD5"}[algorithm.name]
        return f"is signed with {name}, which is not accepted any more (RFC 9155)"
    if oid in _WITHOUT_HASH:
        return None
    if oid not in _SIGNATURES or algorithm is None or algorithm.name not in _HASHES:
        accepted = "ECDSA and RSA with SHA-256, SHA-384 or SHA-512, and ML-DSA"
        return f"is signed with {oid._name}; accepted are {accepted}"
    if (
        oid == SignatureAlgorithmOID.RSASSA_PSS
        and _PSS[algorithm.name] not in certificate.tbs_certificate_bytes
    ):
        size = algorithm.digest_size
        return (
            f"is signed with RSA-PSS whose parameters TLS does not accept: a salt of {size} bytes, as long "
            "as the hash, and MGF1 with that hash (-sigopt rsa_pss_saltlen:digest of openssl)"
        )
    return None


def signed_with(certificate: x509.Certificate) -> str:
    """Name the algorithm of a certificate's signature: ``ECDSA with SHA-256``, ``ML-DSA-65``."""
    name = certificate.signature_algorithm_oid._name
    return _NAMES.get(name, name)


_NAMES: Final = {
    "ecdsa-with-SHA256": "ECDSA with SHA-256",
    "ecdsa-with-SHA384": "ECDSA with SHA-384",
    "ecdsa-with-SHA512": "ECDSA with SHA-512",
    "sha256WithRSAEncryption": "RSA with SHA-256",
    "sha384WithRSAEncryption": "RSA with SHA-384",
    "sha512WithRSAEncryption": "RSA with SHA-512",
    "RSASSA-PSS": "RSA-PSS",
}


def key_problem(certificate: x509.Certificate) -> str | None:
    """Tell why a certificate's key is not accepted in a path; None if it is."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        return f"has a public key that cannot be read: {error_message(error)}"
    if isinstance(key, MLDSAPublicKey):
        return None
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        return f"has a key of the kind {kind_of_key(key)}; accepted are EC, RSA and, for CAs, ML-DSA"
    kind = _rsa_problem(key) if isinstance(key, rsa.RSAPublicKey) else _ec_problem(key, certificate)
    if kind is None and all(form not in certificate.tbs_certificate_bytes for form in _forms_of_key(key)):
        return f"has a public key ({kind_of_key(key)}) in a form that TLS does not read"
    return kind


def _rsa_problem(key: rsa.RSAPublicKey) -> str | None:
    if key.key_size < MIN_RSA_BITS:
        return f"has an RSA key of {key.key_size} bits; {MIN_RSA_BITS} are the least that is accepted"
    if key.public_numbers().e.bit_length() > _MAX_EXPONENT_BITS:
        return f"has an RSA key whose public exponent has more than {_MAX_EXPONENT_BITS} bits; 65537 is usual"
    return None


def _ec_problem(key: ec.EllipticCurvePublicKey, certificate: x509.Certificate) -> str | None:
    if _EC_PARAMETERS + b"\x30" in certificate.tbs_certificate_bytes:
        return "spells out the parameters of its elliptic curve, where TLS accepts the curve's name only"
    if key.curve.name not in CURVES:
        return f"has a key on the curve {key.curve.name}; accepted are {', '.join(CURVES.values())}"
    return None


def _forms_of_key(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> Iterator[bytes]:
    yield key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    # Compressed (RFC 5480 section 2.2); nobody reads hybrid ones.
    if isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        yield bytes((0x03, len(point) + 1, 0)) + point


def leaf_key_problem(certificate: x509.Certificate) -> str | None:
    """Tell why the key of a server or guest is not accepted; None if it is. CAs may have more kinds."""
    problem = key_problem(certificate)
    if problem is not None:
        return problem
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name not in LEAF_CURVES:
        curves = " and ".join(LEAF_CURVES.values())
        found = CURVES[key.curve.name]
        return f"has a key on the curve {found}; gRPC accepts {curves} at the ends of a connection"
    if isinstance(key, MLDSAPublicKey):
        return f"has a key of the kind {kind_of_key(key)}, which only CAs may have; accepted are EC and RSA"
    return None


OTHER_KEY: Final = "the signature is of another key"


def _link_problem(below: x509.Certificate, above: x509.Certificate) -> str | None:
    problem = claim_problem(below, above)
    if problem is not None:
        return problem
    return identifier_problem(below, above) if _signed_by(below, above) else OTHER_KEY


def claim_problem(below: x509.Certificate, above: x509.Certificate) -> str | None:
    """Tell why a signature of one certificate's key on another could not be accepted; it is not verified."""
    if below.issuer != above.subject:
        return f'it was issued by "{one_text(below.issuer.rfc4514_string(), 300)}"'
    problem = signature_problem(below)
    if problem is not None:
        return f"{describe(below)} {problem}"
    problem = key_problem(above)
    return None if problem is None else f"{describe(above)} {problem}"


def identifier_problem(below: x509.Certificate, above: x509.Certificate) -> str | None:
    """Tell why a certificate's key identifiers mean another issuer than the one above; None if they fit."""
    # RFC 5280 section 4.2.1.1; OpenSSL and BoringSSL take an issuer that does not match for an unrelated one
    authority = extension_of(below, x509.AuthorityKeyIdentifier)
    own = extension_of(above, x509.SubjectKeyIdentifier)
    if authority is None:
        return None
    wanted = authority.key_identifier
    if wanted is not None and own is not None and wanted != own.digest:
        return (
            f"its authority key identifier is {_hex(wanted)}, "
            f"but the subject key identifier of the issuer is {_hex(own.digest)}"
        )
    serial = authority.authority_cert_serial_number
    if serial is not None and serial != serial_of(above):
        found = serial_of(above)
        return f"its authority key identifier names the issuer's serial number {serial:x}, not {found:x}"
    names = [
        one.value for one in authority.authority_cert_issuer or () if isinstance(one, x509.DirectoryName)
    ]
    if names and names[0] != above.issuer:
        shown = one_text(names[0].rfc4514_string(), 300)
        return f'its authority key identifier names an issuer that "{shown}" issued'
    return None


def _hex(identifier: bytes) -> str:
    return identifier[:20].hex(":").upper()


def order_issuers(leaf: x509.Certificate, pool: Iterable[x509.Certificate]) -> list[x509.Certificate]:
    """Pick all issuers of a leaf out of a heap, the nearest first, without roots; by signature."""
    return [path[-1] for path in _paths_up(leaf, pool)[1:]]


def _paths_up(leaf: x509.Certificate, pool: Iterable[x509.Certificate]) -> list[tuple[x509.Certificate, ...]]:
    # a cross-signed issuer has several ways up, so all are followed; the shortest come first
    unreached = [one for one in dict.fromkeys(pool) if one != leaf and not is_self_signed(one)]
    paths: list[tuple[x509.Certificate, ...]] = [(leaf,)]
    for path in paths:
        issuers = [one for one in unreached if _signed_by(path[-1], one)]
        unreached = [one for one in unreached if one not in issuers]
        paths += [(*path, issuer) for issuer in issuers]
    return paths


def order_chain(leaf_pem: bytes, others_pem: bytes) -> bytes:
    """Make a chain out of the certificates that a backend returned, for `SignedCertificate`.

    Args:
        leaf_pem: the certificate of the server or guest.
        others_pem: any certificates in any order, also none.

    Returns:
        The issuers of the leaf from the bottom up, as PEM; no leaf, no root, nothing twice, and
        nothing that is not above the leaf.

    Raises:
        MaterialError: something cannot be read.
    """
    with readable("the chain"):
        (leaf, *more) = parse_certificates(leaf_pem, "certificate")
        others = parse_certificates(others_pem, "chain") if others_pem.strip() else []
        return to_pem(order_issuers(leaf, [*more, *others]))


def chain_remarks(leaf: x509.Certificate, returned: Sequence[x509.Certificate]) -> list[str]:
    """Say what had to be repaired in a chain as a provider returned it."""
    remarks = []
    rest = list(dict.fromkeys(returned))
    if len(rest) < len(returned):
        remarks.append("holds a certificate twice, which was left out")
    if leaf in rest:
        remarks.append("holds the leaf, which was left out")
    if any(map(is_self_signed, rest)):
        remarks.append("holds a root, which was left out")
    issuers = order_issuers(leaf, rest)
    if [one for one in rest if one in issuers] != issuers:
        remarks.append("is out of order, and was sorted")
    return [f"the chain that the provider returned {remark}" for remark in remarks]


def canonical_name(name: x509.Name) -> list[frozenset[tuple[str, str]]]:
    """Return what two names have in common that mean the same (RFC 5280 section 7.1).

    Case, runs of blanks and the kind of string do not matter there. Some TLS libraries compare bytes.
    """
    return [
        frozenset((one.oid.dotted_string, " ".join(str(one.value).split()).casefold()) for one in rdn)
        for rdn in name.rdns
    ]


def spelling_problem(below: x509.Certificate, above: x509.Certificate) -> MaterialError | None:
    """Tell of a certificate whose issuer's name is that of another one, but written in another way."""
    if below.issuer == above.subject or canonical_name(below.issuer) != canonical_name(above.subject):
        return None
    return MaterialError(
        f"{describe(below)} does not lead to {describe(above)}: its issuer's name is written in another way "
        "there (case, blanks or the kind of string), which not all TLS libraries take for the same",
        hint="have it reissued with the very subject of its issuer; "
        "openssl x509 -noout -subject -issuer -nameopt multiline,show_type -in FILE shows the difference",
    )


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Tell a root: it carries its own signature.

    That of an old one (SHA-1, MD5) cannot be checked any more; it counts unless identifiers say otherwise.
    """
    if certificate.subject != certificate.issuer:
        return False
    if has_forgotten_signature(certificate):
        return identifier_problem(certificate, certificate) is None
    return _signed_by(certificate, certificate)


def has_forgotten_signature(certificate: x509.Certificate) -> bool:
    """Tell whether it was signed with SHA-1 or MD5, which must not be accepted any more (RFC 9155)."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return False
    return algorithm is not None and algorithm.name in {"sha1", "md5"}


def describe(certificate: x509.Certificate) -> str:
    """Name a certificate in a message: subject and the start of its fingerprint."""
    subject = one_text(certificate.subject.rfc4514_string(), 300) or "no subject"
    return f'"{subject}" (sha256 {fingerprint(certificate)[:16]}…)'


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
