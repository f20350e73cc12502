"""All checks together: the class that the author of a provider derives from."""

from __future__ import annotations

from firebuild_pki.conformance.certificates import CertificateChecks
from firebuild_pki.conformance.chains import ChainChecks
from firebuild_pki.conformance.framework import FrameworkChecks
from firebuild_pki.conformance.handshakes import HandshakeChecks
from firebuild_pki.conformance.life import LifeChecks
from firebuild_pki.conformance.refusals import RefusalChecks
from firebuild_pki.conformance.secrecy import SecrecyChecks
from firebuild_pki.conformance.settings import SettingsChecks

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
