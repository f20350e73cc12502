"""The mode with finished certificates for both ends; nothing is signed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.x509.oid import NameOID

from firebuild_pki.errors import CAError, MaterialError
from firebuild_pki.keys import LEAF_CURVES, private_key_pem
from firebuild_pki.leaf_checks import is_ca
from firebuild_pki.pem_files import Source
from firebuild_pki.provider import Profile, ProviderContext, ReadyPair, TrustBundle
from firebuild_pki.providers.file.certificates import (
    Found,
    LoadedKey,
    Path,
    certificates_of,
    find_paths,
    for_key,
    load_certificates,
    load_key,
    load_pool,
    must_be_ca,
    must_be_valid,
)
from firebuild_pki.providers.file.settings import FileSettings
from firebuild_pki.values import dataclass
from firebuild_pki.verify import Expectation, Trust, verify_certificate
from firebuild_pki.x509 import USAGE, to_pem

_OTHER_KINDS: dict[type[x509.GeneralName], str] = {
    x509.RFC822Name: "the e-mail address",
    x509.UniformResourceIdentifier: "the URI",
    x509.IPAddress: "the IP address",
}


def client_name(found: Found) -> str:
    """Take the first full DNS name. It is for records only: the guest is known by its fingerprint.

    Raises:
        CAError: there is none.
    """
    return _full_names(found)[0]


def server_name(found: Found, chosen: str | None) -> str:
    """Pick the DNS name that guests check.

    Args:
        found: the server's certificate.
        chosen: the setting ``server_name``.

    Raises:
        CAError: there is none, there are several and none is chosen, or it lacks the chosen one.
    """
    names = _full_names(found)
    if chosen is None:
        if len(names) == 1:
            return names[0]
        hint = f"set server_name to one of them, for example server_name: {names[0]}"
        raise found.source.wrong(f"{found.name} has several DNS names: {', '.join(names)}", hint)
    for name in names:
        if name.lower() == chosen.lower():
            return name
    raise found.source.wrong(
        f"{found.name} has no DNS name {chosen}, which server_name chooses; it has {', '.join(names)}",
        "correct server_name; a name that only a wildcard covers does not count",
    )


def _full_names(found: Found) -> list[str]:
    dns, others = _names_in(found.certificate)
    # a name that is there twice is one name (RFC 4343: whatever its case)
    full = list({name.lower(): name for name in reversed(dns) if "*" not in name}.values())[::-1]
    if full:
        return full
    shown = " and ".join([*dns, *others]) or "no name at all"
    why = "a wildcard cannot be an identity, " if dns else ""
    raise found.source.wrong(
        f"expected a full DNS name in {found.name}, found {shown}",
        f"{why}have it issued with one, for example subjectAltName=DNS:builds.firebuild.internal",
    )


def _names_in(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    try:
        alternative = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        alternative = []
    dns = [one.value for one in alternative if isinstance(one, x509.DNSName)]
    others = [
        f"{_OTHER_KINDS.get(type(one), 'a name')} {one.value}"
        for one in alternative
        if not isinstance(one, x509.DNSName)
    ]
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return dns, others + [f"the common name {one.value!s}" for one in common]


@dataclass(frozen=True, slots=True)
class Pair:
    """A finished certificate with its key.

    Args:
        leaf: the certificate.
        key: its key.
        name: the DNS name that it is known by.
        path: how it is anchored.
    """

    leaf: Found
    key: LoadedKey
    name: str
    path: Path

    @property
    def chain_pem(self) -> bytes:
        """The leaf and its issuers."""
        return to_pem(certificates_of((self.leaf, *self.path.issuers)))


@dataclass(frozen=True, slots=True)
class ReadyPairs:
    """The pairs of both ends."""

    server: Pair
    client: Pair

    @property
    def anchors(self) -> tuple[Found, ...]:
        """What both ends trust."""
        return tuple(dict.fromkeys((*self.server.path.anchors, *self.client.path.anchors)))

    @property
    def trust_bundle(self) -> TrustBundle:
        """The anchors; the issuers below them come with the pairs."""
        return TrustBundle(to_pem(certificates_of(self.anchors)))

    def of(self, profile: Profile) -> Pair:
        """The pair of one end."""
        return self.server if profile is Profile.SERVER else self.client

    def ready_pair(self, profile: Profile) -> ReadyPair:
        """The pair of one end, as the framework takes it."""
        pair = self.of(profile)
        return ReadyPair(pair.chain_pem, private_key_pem(pair.key.key), pair.name)


@dataclass(frozen=True, slots=True)
class _End:
    """What the two files of one end hold."""

    certificates: list[Found]
    key: LoadedKey


def load_ready_pairs(settings: FileSettings, context: ProviderContext) -> ReadyPairs:
    """Read both pairs and the CA certificates, and check that they belong together.

    Raises:
        CAError: they do not, or one of them cannot be used.
    """
    now = context.clock()
    held = load_certificates(Source("ca_cert", str(settings.ca_cert)))
    for one in held:
        must_be_ca(one)
    pool = load_pool(settings, held)
    server_end, client_end = _load(settings, context, "server"), _load(settings, context, "client")
    server = _leaf(server_end, client_end, Profile.SERVER, now)
    client = _leaf(client_end, server_end, Profile.GUEST, now)
    _must_not_be_swapped(server, client)
    own_name = server_name(server, settings.server_name)
    server_paths = find_paths(server, pool, now, beside=server_end.certificates)
    their_name = client_name(client)
    client_paths = find_paths(client, pool, now, beside=client_end.certificates)
    return ReadyPairs(
        _that_holds(
            [Pair(server, server_end.key, own_name, path) for path in server_paths], Profile.SERVER, now
        ),
        _that_holds(
            [Pair(client, client_end.key, their_name, path) for path in client_paths], Profile.GUEST, now
        ),
    )


def _load(settings: FileSettings, context: ProviderContext, end: str) -> _End:
    certificates = load_certificates(Source(f"{end}_cert", getattr(settings, f"{end}_cert")))
    source = Source(f"{end}_key", getattr(settings, f"{end}_key"))
    passphrase = getattr(settings, f"{end}_key_passphrase")
    return _End(certificates, load_key(source, passphrase, context.environ, curves=LEAF_CURVES))


def _leaf(end: _End, other: _End, profile: Profile, now: datetime) -> Found:
    fitting = for_key(end.key, end.certificates, other.certificates, now)
    # one file may hold the certificates of both ends, for one key
    found = next((one for one in fitting if not _only_for_other(one, profile)), fitting[0])
    if is_ca(found.certificate):
        hint = "name a certificate that the CA issued for this end"
        raise found.source.wrong(f"expected the certificate of one end, but {found.name} is a CA", hint)
    must_be_valid(found, now)
    return found


def _must_not_be_swapped(server: Found, client: Found) -> None:
    if _only_for_other(server, Profile.SERVER) and _only_for_other(client, Profile.GUEST):
        raise server.source.wrong(
            f"{server.name} is for clients, and {client.name} in {client.source} for servers",
            "swap the certificates, and their keys",
        )


def _only_for_other(found: Found, profile: Profile) -> bool:
    """Tell whether a certificate is for the other end than that of a profile, and not for this one."""
    try:
        usage = {*found.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value}
    except x509.ExtensionNotFound:
        return False
    return USAGE[profile] not in usage and not usage.isdisjoint(USAGE.values())


def _that_holds(pairs: Sequence[Pair], profile: Profile, now: datetime) -> Pair:
    """Take the first of the same pair with different ways to an anchor that path validation accepts."""
    reasons = []
    for pair in pairs:
        try:
            _must_hold(pair, profile, now)
        except CAError as error:
            reasons.append(error)
        else:
            return pair
    raise reasons[0]


def _must_hold(pair: Pair, profile: Profile, now: datetime) -> None:
    # the framework checks this again for each build; here the file can be named
    trust = Trust(tuple(certificates_of(pair.path.anchors)), ())
    key = pair.leaf.certificate.public_key()
    expected = Expectation(profile, (pair.name,), key, now, deadline=now, exact=False)
    try:
        verify_certificate(pair.chain_pem, b"", trust, expected)
    except MaterialError as error:
        hint = f"look at it: openssl x509 -in {pair.leaf.source.quoted} -noout -text"
        raise pair.leaf.source.wrong(error.message, error.hint or hint) from error
