"""Mutual TLS for one build or one test: a pluggable certificate authority behind one facade.

Names are imported on first use (PEP 562), so ``import firebuild_pki`` itself costs next to nothing.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firebuild_pki.authority import Authority, open_authority
    from firebuild_pki.chain import order_chain, parse_certificates, read_certificate, signed_with
    from firebuild_pki.config import CASettings, ca_json_schema, redacted
    from firebuild_pki.documents import Document, load_document, parse_document
    from firebuild_pki.errors import (
        AuthorityClosed,
        CAError,
        IdentityError,
        KeyStoreError,
        MaterialError,
        Problem,
        ProviderConflict,
        ProviderError,
        ProviderLoadError,
        ProviderNotFound,
        SecretError,
        SettingsError,
        UnsupportedOperation,
    )
    from firebuild_pki.grpc_credentials import GUEST_CHAIN_HINT, guest_chain_problem
    from firebuild_pki.guarded import check_settings
    from firebuild_pki.hookspecs import hookimpl
    from firebuild_pki.keys import KeyType
    from firebuild_pki.keystores import (
        KeyStoreContext,
        KeyStoreSpec,
        SignatureAlgorithm,
        StoredKey,
        check_key_uri,
        ecdsa_der,
        open_key,
    )
    from firebuild_pki.material import IssuedCertificate, TLSMaterial
    from firebuild_pki.names import audit_labels
    from firebuild_pki.plugins import (
        InstalledPlugin,
        PluginCatalog,
        installed_providers,
        load_provider,
    )
    from firebuild_pki.provider import (
        API_VERSION,
        CAEvent,
        Capability,
        CAProvider,
        EventKind,
        Note,
        NoteLevel,
        Profile,
        ProviderContext,
        ProviderSpec,
        ReadyPair,
        RetryAfter,
        SignedCertificate,
        SignRequest,
        TrustBundle,
    )
    from firebuild_pki.providers.vault.setup import vault_setup, vault_setup_settings
    from firebuild_pki.scaffold import new_plugin
    from firebuild_pki.settings import Duration, SecretRef, Settings
    from firebuild_pki.validation import validate

_HOMES = {
    "authority": ("Authority", "open_authority"),
    "chain": ("order_chain", "parse_certificates", "read_certificate", "signed_with"),
    "config": ("CASettings", "ca_json_schema", "redacted"),
    "documents": ("Document", "load_document", "parse_document"),
    "errors": (
        "AuthorityClosed",
        "CAError",
        "IdentityError",
        "KeyStoreError",
        "MaterialError",
        "Problem",
        "ProviderConflict",
        "ProviderError",
        "ProviderLoadError",
        "ProviderNotFound",
        "SecretError",
        "SettingsError",
        "UnsupportedOperation",
    ),
    "grpc_credentials": ("GUEST_CHAIN_HINT", "guest_chain_problem"),
    "guarded": ("check_settings",),
    "hookspecs": ("hookimpl",),
    "keys": ("KeyType",),
    "keystores": (
        "KeyStoreContext",
        "KeyStoreSpec",
        "SignatureAlgorithm",
        "StoredKey",
        "check_key_uri",
        "ecdsa_der",
        "open_key",
    ),
    "material": ("IssuedCertificate", "TLSMaterial"),
    "plugins": ("InstalledPlugin", "PluginCatalog", "installed_providers", "load_provider"),
    "provider": (
        "API_VERSION",
        "CAEvent",
        "CAProvider",
        "Capability",
        "EventKind",
        "Note",
        "NoteLevel",
        "Profile",
        "ProviderContext",
        "ProviderSpec",
        "ReadyPair",
        "RetryAfter",
        "SignRequest",
        "SignedCertificate",
        "TrustBundle",
    ),
    "names": ("audit_labels",),
    "providers.vault.setup": ("vault_setup", "vault_setup_settings"),
    "scaffold": ("new_plugin",),
    "settings": ("Duration", "SecretRef", "Settings"),
    "validation": ("validate",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "API_VERSION",
    "GUEST_CHAIN_HINT",
    "Authority",
    "AuthorityClosed",
    "CAError",
    "CAEvent",
    "CAProvider",
    "CASettings",
    "Capability",
    "Document",
    "Duration",
    "EventKind",
    "IdentityError",
    "InstalledPlugin",
    "IssuedCertificate",
    "KeyStoreContext",
    "KeyStoreError",
    "KeyStoreSpec",
    "KeyType",
    "MaterialError",
    "Note",
    "NoteLevel",
    "PluginCatalog",
    "Problem",
    "Profile",
    "ProviderConflict",
    "ProviderContext",
    "ProviderError",
    "ProviderLoadError",
    "ProviderNotFound",
    "ProviderSpec",
    "ReadyPair",
    "RetryAfter",
    "SecretError",
    "SecretRef",
    "Settings",
    "SettingsError",
    "SignRequest",
    "SignatureAlgorithm",
    "SignedCertificate",
    "StoredKey",
    "TLSMaterial",
    "TrustBundle",
    "UnsupportedOperation",
    "audit_labels",
    "ca_json_schema",
    "check_key_uri",
    "check_settings",
    "ecdsa_der",
    "guest_chain_problem",
    "hookimpl",
    "installed_providers",
    "load_document",
    "load_provider",
    "new_plugin",
    "open_authority",
    "open_key",
    "order_chain",
    "parse_certificates",
    "parse_document",
    "read_certificate",
    "redacted",
    "signed_with",
    "validate",
    "vault_setup",
    "vault_setup_settings",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # all of it stays: to look for what does not is a tenth of the time
    try:
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
