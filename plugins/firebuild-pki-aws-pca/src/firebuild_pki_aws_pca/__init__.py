"""The provider ``aws-pca``: certificates from AWS Private CA."""

from firebuild_pki import Capability, ProviderSpec, hookimpl

from firebuild_pki_aws_pca.provider import AwsPcaProvider
from firebuild_pki_aws_pca.settings import AwsPcaSettings

__all__ = ["AwsPcaProvider", "AwsPcaSettings", "register_ca_providers"]


@hookimpl
def register_ca_providers() -> ProviderSpec:
    """Register the provider."""
    return ProviderSpec(
        name="aws-pca",
        settings_model=AwsPcaSettings,
        factory=AwsPcaProvider,
        summary="AWS Private CA, by IssueCertificate and GetCertificate",
        capabilities=frozenset({Capability.SIGN, Capability.REVOKE, Capability.URI_NAMES, Capability.PEER}),
    )
