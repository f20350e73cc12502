"""The provider ``vault``: certificates from the PKI secrets engine of Vault or OpenBao."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from firebuild_pki.errors import AuthorityClosed
from firebuild_pki.provider import (
    CAProvider,
    Note,
    ProviderContext,
    SignedCertificate,
    SignRequest,
    TrustBundle,
)
from firebuild_pki.providers.vault.settings import VaultSettings, settings_notes

if TYPE_CHECKING:  # they bring hvac and requests, which only an open provider needs
    from firebuild_pki.providers.vault.mount import Mount
    from firebuild_pki.providers.vault.nodes import Timing
    from firebuild_pki.providers.vault.session import Session


class VaultProvider(CAProvider):
    """Signs through one role for each end.

    Args:
        settings: of the block ``ca.vault``.
        context: clock and environment.
        timing: replaces the limits in the settings, and time itself, in tests.
    """

    def __init__(
        self, settings: VaultSettings, context: ProviderContext, timing: Timing | None = None
    ) -> None:
        self._settings = settings
        self._context = context
        self._timing = timing
        self._session: Session | None = None
        self._mount: Mount | None = None

    def validate(self) -> Sequence[Note]:
        """Look for roles that are missing, and certificates without keys."""
        return tuple(settings_notes(self._settings))

    def open(self) -> None:
        """Log in."""
        from firebuild_pki.providers.vault.mount import Mount
        from firebuild_pki.providers.vault.nodes import Timing
        from firebuild_pki.providers.vault.session import Session

        settings, context = self._settings, self._context
        retry_for = settings.retry_for.total_seconds() if context.patient else 0.0
        timing = self._timing or Timing(settings.timeout.total_seconds(), retry_for)
        self._session = Session(settings, context.environ, timing, context.report)
        self._mount = Mount(settings, self._session)
        self._session.open()

    def close(self) -> None:
        """Revoke the token that `open` made, and close the connections."""
        session, self._session, self._mount = self._session, None, None
        if session is not None:
            session.close()

    def check(self) -> Sequence[Note]:
        """Look at nodes, credentials, roles, CA and clock, without issuing anything."""
        from firebuild_pki.providers.vault.checks import check

        return check(self._settings, *self._opened(), self._context)

    def trust_bundle(self) -> TrustBundle:
        """Return the topmost CA certificates that the mount knows, or those of the setting trust."""
        return self._opened()[1].trust_bundle()

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Have the role of the profile sign the request."""
        return self._opened()[1].sign(request)

    def revoke(self, certificate_pem: bytes) -> None:
        """Revoke a certificate by its serial number."""
        self._opened()[1].revoke(certificate_pem)

    def _opened(self) -> tuple[Session, Mount]:
        if self._session is None or self._mount is None:
            raise AuthorityClosed("the connection to Vault is closed: the provider is not open")
        return self._session, self._mount
