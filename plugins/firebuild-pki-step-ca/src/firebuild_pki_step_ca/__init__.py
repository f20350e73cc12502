"""The provider ``step-ca``: certificates from Smallstep's step-ca, by one-time tokens."""

from firebuild_pki import Capability, ProviderSpec, hookimpl

from firebuild_pki_step_ca.provider import StepCAProvider
from firebuild_pki_step_ca.settings import StepCASettings

__all__ = ["StepCAProvider", "StepCASettings", "register_ca_providers"]


@hookimpl
def register_ca_providers() -> ProviderSpec:
    """Register the provider."""
    return ProviderSpec(
        name="step-ca",
        settings_model=StepCASettings,
        factory=StepCAProvider,
        summary="step-ca, with one-time tokens of a JWK or X5C provisioner",
        capabilities=frozenset({Capability.SIGN, Capability.REVOKE, Capability.URI_NAMES, Capability.PEER}),
    )
