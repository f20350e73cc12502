"""The provider ``cfssl``: certificates from a cfssl server, by authenticated signing."""

from firebuild_pki import Capability, ProviderSpec, hookimpl

from firebuild_pki_cfssl.provider import CfsslProvider
from firebuild_pki_cfssl.settings import CfsslSettings

__all__ = ["CfsslProvider", "CfsslSettings", "register_ca_providers"]


@hookimpl
def register_ca_providers() -> ProviderSpec:
    """Register the provider."""
    return ProviderSpec(
        name="cfssl",
        settings_model=CfsslSettings,
        factory=CfsslProvider,
        summary="a cfssl server (cfssl serve, multirootca), by authenticated signing",
        capabilities=frozenset({Capability.SIGN, Capability.URI_NAMES, Capability.PEER}),
    )
