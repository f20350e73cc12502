"""The second way: finished certificates for both ends; nothing is signed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from firebuild_pki.errors import MaterialError
from firebuild_pki.keys import private_key_pem
from firebuild_pki.leaf_checks import is_ca
from firebuild_pki.provider import Profile, ProviderContext, ReadyPair, TrustBundle
from firebuild_pki.providers.file.anchors import choose_anchors, load_pool
from firebuild_pki.providers.file.certificates import (
    Found,
    certificates_of,
    for_key,
    load_certificates,
    must_be_ca,
    must_be_valid,
)
from firebuild_pki.providers.file.keys import LoadedKey, load_key
from firebuild_pki.providers.file.names import client_name, server_name
from firebuild_pki.providers.file.reading import Source
from firebuild_pki.providers.file.settings import FileSettings
from firebuild_pki.verify import Expectation, Trust, verify_certificate
from firebuild_pki.x509 import USAGE, to_pem


@dataclass(frozen=True, slots=True)
class Pair:
    """A finished certificate with its key.

    Args:
        leaf: the certificate.
        key: its key.
        name: the DNS name that it is known by.
        above: the other certificates in its file.
    """

    leaf: Found
    key: LoadedKey
    name: str
    above: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class ReadyPairs:
    """The pairs of both ends, and what each trusts.

    Args:
        server: the server's.
        client: the guest's.
        issuers: CA certificates that may be between them and an anchor.
        anchors: what both ends trust.
    """

    server: Pair
    client: Pair
    issuers: tuple[Found, ...]
    anchors: tuple[Found, ...]

    def of(self, profile: Profile) -> Pair:
        """The pair of one end."""
        return self.server if profile is Profile.SERVER else self.client

    def ready_pair(self, profile: Profile) -> ReadyPair:
        """The pair of one end, as the framework takes it."""
        pair = self.of(profile)
        chain = dict.fromkeys(certificates_of((pair.leaf, *pair.above, *self.issuers)))
        return ReadyPair(to_pem(list(chain)), private_key_pem(pair.key.key), pair.name)

    @property
    def trust_bundle(self) -> TrustBundle:
        """The anchors. The issuers come with the pairs: a stray one there does no harm."""
        return TrustBundle(to_pem(certificates_of(self.anchors)))


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
    ends = _load_end(settings, context, "server"), _load_end(settings, context, "client")
    pairs = ReadyPairs(
        *_both(settings, ends, now), issuers=pool.known, anchors=choose_anchors(pool, held, now)
    )
    for profile in Profile:
        _must_hold(pairs, profile, now)
    return pairs


End = tuple[list[Found], LoadedKey]


def _load_end(settings: FileSettings, context: ProviderContext, end: str) -> End:
    certificates = load_certificates(Source(f"{end}_cert", getattr(settings, f"{end}_cert")))
    key = Source(f"{end}_key", getattr(settings, f"{end}_key"))
    return certificates, load_key(key, getattr(settings, f"{end}_key_passphrase"), context.environ)


def _both(settings: FileSettings, ends: tuple[End, End], now: datetime) -> tuple[Pair, Pair]:
    (server_held, server_key), (client_held, client_key) = ends
    server = _leaf(for_key(server_key, server_held, client_held, now), now)
    client = _leaf(for_key(client_key, client_held, server_held, now), now)
    if _only_for(server, Profile.GUEST) and _only_for(client, Profile.SERVER):
        raise server.source.wrong(
            f"{server.name} is for clients, and {client.name} in {client.source} for servers",
            "swap the certificates, and their keys",
        )
    return (
        Pair(server, server_key, server_name(server, settings.server_name), tuple(server_held)),
        Pair(client, client_key, client_name(client), tuple(client_held)),
    )


def _leaf(found: Found, now: datetime) -> Found:
    if is_ca(found.certificate):
        hint = "name a certificate that the CA issued, with serverAuth or clientAuth"
        raise found.source.wrong(f"{found.name} is a CA", hint)
    must_be_valid(found, now)
    return found


def _only_for(found: Found, profile: Profile) -> bool:
    try:
        usage = found.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    other = {*USAGE.values()} - {USAGE[profile]}
    return USAGE[profile] in usage and not other & {*usage}


def _must_hold(pairs: ReadyPairs, profile: Profile, now: datetime) -> None:
    # the framework checks this again for each build; here the file can be named
    pair = pairs.of(profile)
    trust = Trust(tuple(certificates_of(pairs.anchors)), ())
    expected = Expectation(profile, (pair.name,), pair.key.key.public_key(), now, deadline=now, exact=False)
    try:
        verify_certificate(pairs.ready_pair(profile).certificate_chain_pem, b"", trust, expected)
    except MaterialError as error:
        raise pair.leaf.source.wrong(error.message, error.hint) from error
    except ValueError as error:
        raise pair.leaf.source.wrong(f"{pair.name} in {pair.leaf.name} is not a DNS name") from error
