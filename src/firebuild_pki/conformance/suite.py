"""All checks together: the class that the author of a provider derives from."""

from __future__ import annotations

from firebuild_pki.conformance.certificates import CertificateChecks, ChainChecks
from firebuild_pki.conformance.handshakes import FrameworkChecks, HandshakeChecks
from firebuild_pki.conformance.life import LifeChecks, RefusalChecks
from firebuild_pki.conformance.secrecy import SecrecyChecks, SettingsChecks

GROUPS = (
    SettingsChecks,
    CertificateChecks,
    ChainChecks,
    FrameworkChecks,
    HandshakeChecks,
    LifeChecks,
    RefusalChecks,
    SecrecyChecks,
)
"""The groups of checks, in the order in which the documentation lists them."""


class ProviderConformance(
    SettingsChecks,
    CertificateChecks,
    ChainChecks,
    FrameworkChecks,
    HandshakeChecks,
    LifeChecks,
    RefusalChecks,
    SecrecyChecks,
):
    """The contract of a provider, check by check.

    Derive a class from it, override the fixture ``ca_settings`` and, where they apply, the others
    of `Checks`; name in ``unsupported`` what the provider lacks.
    """
