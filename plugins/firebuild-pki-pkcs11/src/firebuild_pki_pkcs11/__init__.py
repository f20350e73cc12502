"""A key store for firebuild: keys in PKCS#11 tokens, named by ``pkcs11:`` URIs (RFC 7512)."""

from __future__ import annotations

from firebuild_pki import KeyStoreContext, KeyStoreSpec, StoredKey, hookimpl

from firebuild_pki_pkcs11.uri import parse


def _open(uri: str, context: KeyStoreContext) -> StoredKey:
    from firebuild_pki_pkcs11.tokens import open_token_key  # the library for tokens is loaded with it

    return open_token_key(uri, context)


@hookimpl
def register_key_stores() -> KeyStoreSpec:
    """Register the scheme ``pkcs11``."""
    return KeyStoreSpec(
        "pkcs11", _open, "keys in PKCS#11 tokens: HSMs, smart cards, SoftHSM", check_uri=parse
    )
