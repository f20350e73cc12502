"""The provider ``vault``: HashiCorp Vault and OpenBao. See docs/providers/vault.md."""

from __future__ import annotations

from firebuild_pki.hookspecs import hookimpl
from firebuild_pki.provider import Capability, ProviderSpec
from firebuild_pki.providers.vault.provider import VaultProvider
from firebuild_pki.providers.vault.settings import VaultSettings


@hookimpl
def register_ca_providers() -> ProviderSpec:
    """Register the provider."""
    return ProviderSpec(
        name="vault",
        settings_model=VaultSettings,
        factory=VaultProvider,
        summary="the PKI secrets engine of HashiCorp Vault or OpenBao",
        capabilities=frozenset({Capability.SIGN, Capability.REVOKE, Capability.URI_NAMES, Capability.PEER}),
    )
