"""The commands that an operator runs once: mount, CA, roles, policy, auth method.

Everything is a shell script for the command line tool of Vault or OpenBao. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from shlex import quote
from string import Template

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
    if all(vault.role_for(profile) for profile in Profile):
        return "\n".join(parts)
    return "\n".join([*parts, _part("advice", server=roles[Profile.SERVER], guest=roles[Profile.GUEST])])


def role_names(vault: VaultSettings) -> dict[Profile, str]:
    """Name the role of each end: that of the settings, else one of its own."""
    return {profile: vault.role_for(profile) or f"{POLICY}-{profile}" for profile in Profile}


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
    ends = [profile for profile in Profile if roles[profile] == name]
    return {
        "path": quote(f"{vault.mount}/roles/{name}"),
        "ends": " and the ".join(ends),
        "domain": quote(settings.name_suffix),
        "flags": " ".join(f"{flag}={str(end in ends).lower()}" for end, flag in FLAGS.items()),
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
