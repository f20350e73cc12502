"""`TLSMaterial`: all that one end of a mutual TLS connection needs; `IssuedCertificate`: without the key."""

from __future__ import annotations

import os
from dataclasses import field, fields
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from firebuild_pki.errors import MaterialError
from firebuild_pki.provider import Profile
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    import ssl

_RENEW_AT: Final = 2 / 3
_JITTER: Final = 1 / 12


class _Renewable:
    """When the successor of a certificate is due."""

    __slots__ = ()
    not_before: datetime
    not_after: datetime
    fingerprint_sha256: str
    ttl: timedelta | None

    @property
    def renew_at(self) -> datetime:
        """When to renew: at two thirds of the life, or up to a twelfth of the life earlier.

        The fingerprint decides how much earlier: certificates that were issued together are not renewed
        together, and whoever asks about one gets the same moment.
        """
        return self.renewal_after(self.not_before if self.ttl is None else self.not_after - self.ttl)

    def renewal_after(self, issued: datetime) -> datetime:
        """Tell the same for whoever knows when it was issued.

        Certificates begin in the past, for machines whose clock is slow, and that is not part of their life:
        of a minute that begins five minutes ago, two thirds would be over at once.

        Args:
            issued: timezone-aware.
        """
        begin = max(issued, self.not_before)
        earlier = int(self.fingerprint_sha256[:8], 16) / 0xFFFFFFFF
        return begin + (self.not_after - begin) * (_RENEW_AT - _JITTER * earlier)

    def renewal_due(self, now: datetime | None = None) -> bool:
        """Tell whether it is time to renew; see `renew_at`.

        Args:
            now: the current time, timezone-aware; by default that of this machine.
        """
        return (datetime.now(UTC) if now is None else now) >= self.renew_at


@dataclass(frozen=True, slots=True)
class IssuedCertificate(_Renewable):
    """A certificate for a key that somebody else holds; see `Authority.sign_csr`.

    Args:
        certificate_chain_pem: leaf first, then its issuers, no root.
        trust_pem: the anchors to check the peer against.
        server_name: as of `TLSMaterial`.
        identity: its first name.
        not_before: start of the leaf's validity, UTC.
        not_after: end of the leaf's validity, UTC.
        fingerprint_sha256: of the leaf, in hexadecimal.
        names: all its names: DNS names, then URIs.
        profile: what it is for.
        ttl: the lifetime that was asked for.
    """

    certificate_chain_pem: bytes = field(repr=False)
    trust_pem: bytes = field(repr=False)
    server_name: str
    identity: str
    not_before: datetime
    not_after: datetime
    fingerprint_sha256: str
    names: tuple[str, ...]
    profile: Profile
    ttl: timedelta

    def with_key(self, private_key_pem: bytes) -> TLSMaterial:
        """Add the key, which the caller holds.

        Args:
            private_key_pem: PKCS#8 PEM, unencrypted; that it fits is not checked.
        """
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return TLSMaterial(private_key_pem=private_key_pem, **own)


@dataclass(frozen=True, slots=True)
class TLSMaterial(_Renewable):
    """Certificate, key and trust of one end of a connection. The key never shows in a repr.

    Args:
        certificate_chain_pem: leaf first, then its issuers, no root.
        private_key_pem: PKCS#8 PEM, unencrypted.
        trust_pem: the anchors to check the peer against.
        server_name: the server's DNS name, for both ends: the client must check it. Empty for a client or
            peer that was issued without one.
        identity: this end's own name, the first one.
        not_before: start of the leaf's validity, UTC.
        not_after: end of the leaf's validity, UTC.
        fingerprint_sha256: of the leaf, in hexadecimal.
        names: all names that were asked for: DNS names, then URIs.
        profile: what it is for; None in material that no authority made.
        ttl: the lifetime that was asked for.
    """

    certificate_chain_pem: bytes = field(repr=False)
    private_key_pem: bytes = field(repr=False)
    trust_pem: bytes = field(repr=False)
    server_name: str
    identity: str
    not_before: datetime
    not_after: datetime
    fingerprint_sha256: str
    names: tuple[str, ...] = ()
    profile: Profile | None = None
    ttl: timedelta | None = None

    def ssl_context(self, server_side: bool = False) -> ssl.SSLContext:
        """Make a context for the standard library's ssl: TLS 1.2 or later, peer required.

        A client has to pass ``server_hostname=material.server_name`` to ``wrap_socket``.

        Args:
            server_side: whether the context is for the server.

        Raises:
            MaterialError: this process has no ``/proc``.
        """
        import ssl  # gRPC does without

        protocol = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        # an anchor may be an intermediate whose root is kept elsewhere
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=self.trust_pem.decode())
        self._load_pair(context)
        return context

    def _load_pair(self, context: ssl.SSLContext) -> None:
        # ssl reads keys from paths only; a memfd has one and never touches a disk
        descriptor = os.memfd_create("tls-material")
        try:
            with os.fdopen(os.dup(descriptor), "wb") as memory:
                memory.write(self.private_key_pem + self.certificate_chain_pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError as error:
            raise MaterialError(
                "/proc is not mounted, and Python's ssl reads a key that is in memory by its path there",
                hint="mount it: `mount -t proc proc /proc`",
            ) from error
        finally:
            os.close(descriptor)
