"""The provider ``file``: the operator's own CA, or the operator's finished certificates, in files."""

from __future__ import annotations

from firebuild_pki.hookspecs import hookimpl
from firebuild_pki.provider import Capability, ProviderSpec
from firebuild_pki.providers.file.provider import FileProvider
from firebuild_pki.providers.file.settings import FileSettings


@hookimpl
def register_ca_providers() -> ProviderSpec:
    """Register the provider for files."""
    return ProviderSpec(
        name="file",
        settings_model=FileSettings,
        factory=FileProvider,
        summary="your own CA in files, or your own finished certificates",
        capabilities=frozenset(
            {Capability.SIGN, Capability.READY_PAIRS, Capability.URI_NAMES, Capability.PEER}
        ),
    )
