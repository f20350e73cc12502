"""The commands that an operator runs once: mount, CA, roles, policy, auth method.

Everything is a shell script for the command line tool of Vault or OpenBao. Nothing is run here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from shlex import quote
from string import Template
from typing import Any

from firebuild_pki.config import CASettings
from firebuild_pki.errors import CAError
from firebuild_pki.keys import KeyType
from firebuild_pki.provider import Profile
from firebuild_pki.providers.vault.mount import FLAGS
from firebuild_pki.providers.vault.settings import AuthSettings, JWTAuth, KubernetesAuth, VaultSettings

POLICY = "firebuild"
"""Name of the policy, and of the auth method's role where the settings name none."""

_KEYS = {
    KeyType.P256: "key_type=ec key_bits=256",
    KeyType.P384: "key_type=ec key_bits=384",
    KeyType.RSA2048: "key_type=rsa key_bits=2048",
    KeyType.RSA3072: "key_type=rsa key_bits=3072",
    KeyType.RSA4096: "key_type=rsa key_bits=4096",
}


_LOGINS: Mapping[str, Mapping[str, Any]] = {
    "approle": {"role_id": {"env": "VAULT_ROLE_ID"}, "secret_id": {"env": "VAULT_SECRET_ID"}},
    "jwt": {"role": POLICY, "jwt": {"env": "VAULT_ID_TOKEN"}},
    "kubernetes": {"role": POLICY},
    "cert": {},
    "token": {"token": {"env": "VAULT_TOKEN"}},
    "token_file": {"path": "/run/vault/token"},
}


def vault_setup_settings(
    environ: Mapping[str, str],
    *,
    fresh: bool,
    address: str | None = None,
    mount: str | None = None,
    auth: str | None = None,
) -> dict[str, Any]:
    """Say which settings to lay over the configuration, for `vault_setup`.

    Args:
        environ: where the command line tools of Vault and OpenBao, and the settings, look.
        fresh: whether there is no configuration, so that what it would have to say gets a value.
        address: URL of Vault.
        mount: path of the PKI engine.
        auth: how builds log in.

    Returns:
        Dotted path to value.
    """
    written = {name.casefold() for name in environ}
    prefix = "firebuild_ca__vault"
    if fresh and not any(name.startswith(f"{prefix}__auth") for name in written):
        auth = auth or "approle"
    if fresh and f"{prefix}__address" not in written:
        # the last one is where the tools look by themselves
        address = address or environ.get("VAULT_ADDR") or environ.get("BAO_ADDR") or "https://127.0.0.1:8200"
    chosen: dict[str, Any] = {"ca.vault.address": address, "ca.vault.mount": mount}
    if auth is not None:
        chosen["ca.vault.auth"] = {"method": auth, **_LOGINS[auth]}
    return {path: value for path, value in chosen.items() if value is not None}


def vault_setup(settings: CASettings) -> str:
    """Write the shell script that prepares Vault or OpenBao for these settings.

    Args:
        settings: the section ``ca``, with the provider ``vault``.

    Returns:
        A POSIX shell script. It makes what is missing and leaves a CA that is there alone.

    Raises:
        CAError: the settings select another provider.
    """
    vault = settings.provider_settings
    if not isinstance(vault, VaultSettings):
        raise CAError(
            f"expected settings of the provider vault, found those of {settings.provider}",
            hint="choose it with ca.provider or --ca vault",
        )
    roles = role_names(vault)
    parts = [
        _part("head", address=quote(vault.address[0]), namespace=quote(vault.namespace or "")),
        _part("mount", mount=quote(vault.mount)),
        *(_part("role", **_role(settings, vault, name, roles)) for name in dict.fromkeys(roles.values())),
        _part("policy", policy=POLICY, rules=policy(settings, vault)),
        *_auth(vault.auth),
    ]
    if not all(vault.role_for(profile) for profile in Profile):
        parts.append(_part("advice", settings=_settings(vault, roles)))
    return "\n".join(parts)


def _settings(vault: VaultSettings, roles: Mapping[Profile, str]) -> str:
    """Write the settings of firebuild that belong to the script, as YAML."""
    (address, *more) = vault.address
    lines = [
        "ca:",
        "  provider: vault",
        "  vault:",
        f"    address: {json.dumps([address, *more] if more else address)}",
        *([f"    namespace: {vault.namespace}"] if vault.namespace else []),
        f"    mount: {vault.mount}",
        f"    server_role: {roles[Profile.SERVER]}",
        f"    guest_role: {roles[Profile.GUEST]}",
        # JSON is YAML; secrets are references here
        f"    auth: {json.dumps(vault.auth.model_dump(mode='json', exclude_defaults=True))}",
    ]
    return "\n".join(lines)


def role_names(vault: VaultSettings) -> dict[Profile, str]:
    """Name the role of each end, that of the settings or one of its own, and of peers where they have one."""
    return {profile: vault.role_for(profile) or f"{POLICY}-{profile}" for profile in vault.profiles}


def policy(settings: CASettings, vault: VaultSettings) -> str:
    """Write the smallest policy (HCL) that a build and its preflight need."""
    where = f"{vault.mount}/issuer/{vault.issuer}" if vault.issuer else vault.mount
    rules: dict[str, str] = {}
    for role in role_names(vault).values():
        rules[f"{where}/sign/{role}"] = "update"
        rules[f"{vault.mount}/roles/{role}"] = "read"
    if settings.revoke_at_end:
        rules[f"{vault.mount}/revoke"] = "update"
    rules |= {"auth/token/lookup-self": "read", "auth/token/revoke-self": "update"}
    return "\n".join(f'path "{path}" {{ capabilities = ["{one}"] }}' for path, one in rules.items())


def _role(
    settings: CASettings, vault: VaultSettings, name: str, roles: Mapping[Profile, str]
) -> dict[str, str]:
    ends = [profile for profile, role in roles.items() if role == name]
    flags = {flag for end in ends for flag in FLAGS[end]}
    uris = f" allowed_uri_sans={quote(f'spiffe://{settings.name_suffix}/*')}"
    return {
        "path": quote(f"{vault.mount}/roles/{name}"),
        "ends": " and the ".join(ends),
        "domain": quote(settings.name_suffix),
        "flags": " ".join(f"{flag}={str(flag in flags).lower()}" for flag in FLAGS[Profile.PEER]),
        "uris": uris if Profile.PEER in ends else "",
        "key": _KEYS[settings.key_type],
        "issuer": quote(vault.issuer or "default"),
    }


def _auth(auth: AuthSettings) -> Iterator[str]:
    mount = quote(getattr(auth, "mount", auth.method))
    role = quote(auth.role or POLICY) if isinstance(auth, JWTAuth | KubernetesAuth) else POLICY
    name = quote(getattr(auth, "name", None) or POLICY)
    yield _part(f"auth-{auth.method}", mount=mount, role=role, name=name, policy=POLICY)


def _part(template: str, /, **values: str) -> str:
    text = (files(__package__) / "templates" / f"{template}.sh").read_text(encoding="utf-8")
    return Template(text).substitute(values)
