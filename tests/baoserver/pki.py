"""A PKI as an operator would mount it: a root, an intermediate below it, a role for each use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from baoserver.api import Api

SUFFIX = "firebuild.internal"
"""Default of the setting ``ca.name_suffix``."""


@dataclass(frozen=True)
class PKI:
    """A mounted CA.

    Args:
        mount: path of the secrets engine that signs leaves.
        root_pem: the self-signed root.
        issuing_pem: the CA that signs leaves; the root itself where there is no intermediate.
    """

    mount: str
    root_pem: str
    issuing_pem: str


def mount_pki(
    api: Api,
    mount: str = "pki",
    *,
    intermediate: bool = True,
    ttl: str = "720h",
    key_type: str = "ec",
    key_bits: int = 256,
) -> PKI:
    """Mount a CA.

    Args:
        api: with a token that may mount.
        mount: path of the engine that signs leaves; the root's is ``<mount>-root``.
        intermediate: whether the root signs leaves itself (False) or through an intermediate.
        ttl: how long the CA certificates live.
        key_type: ``ec`` or ``rsa``.
        key_bits: size of the keys.
    """
    key = {"key_type": key_type, "key_bits": key_bits}
    root_mount = f"{mount}-root" if intermediate else mount
    root_pem = _mount_root(api, root_mount, ttl, key)
    if not intermediate:
        return PKI(mount, root_pem, root_pem)
    _mount_engine(api, mount, ttl)
    name = f"Intermediate of {mount}"
    request = api.write(f"{mount}/intermediate/generate/internal", common_name=name, **key)["csr"]
    signed = api.write(
        f"{root_mount}/root/sign-intermediate", csr=request, common_name=name, ttl=ttl, max_path_length=0
    )
    # As the root's mount answers: the intermediate, then the root.
    api.write(f"{mount}/intermediate/set-signed", certificate="\n".join([signed["certificate"], root_pem]))
    return PKI(mount, root_pem, signed["certificate"].strip() + "\n")


def add_role(
    api: Api,
    name: str = "firebuild",
    *,
    mount: str = "pki",
    use: Literal["server", "client", "both"] = "both",
    suffix: str = SUFFIX,
    **overrides: Any,
) -> str:
    """Write a role that allows any name below a suffix, and nothing else.

    A role decides the extended key usages of all it signs, so exact ones need a role per use:
    ``both`` puts both into every certificate.

    Args:
        api: with a token that may write roles.
        name: of the role.
        mount: of the CA.
        use: what the certificates are for.
        suffix: what the names end with.
        overrides: further parameters of the role, or others for those above.

    Returns:
        The name.
    """
    parameters = {
        "allowed_domains": [suffix],
        "allow_subdomains": True,
        "allow_bare_domains": False,
        "allow_localhost": False,
        "allow_ip_sans": False,
        "cn_validations": ["disabled"],
        "require_cn": False,
        "key_type": "any",
        "key_usage": ["DigitalSignature"],
        "server_flag": use != "client",
        "client_flag": use != "server",
        "max_ttl": "24h",
        "no_store": False,
    }
    api.write(f"{mount}/roles/{name}", **{**parameters, **overrides})
    return name


def sign_policy(*roles: str, mount: str = "pki", revoke: bool = False) -> str:
    """Return a policy that signs with some roles, reads the CA, and nothing else.

    Args:
        roles: names of the roles.
        mount: of the CA.
        revoke: whether it may also revoke.
    """
    rules = {f"{mount}/sign/{role}": ["create", "update"] for role in roles}
    rules |= {f"{mount}/issuer/+/sign/{role}": ["create", "update"] for role in roles}
    rules |= {f"{mount}/roles/{role}": ["read"] for role in roles}
    if revoke:
        rules[f"{mount}/revoke"] = ["create", "update"]
    return "\n".join(_rule(path, capabilities) for path, capabilities in rules.items())


def _rule(path: str, capabilities: list[str]) -> str:
    wanted = ", ".join(f'"{capability}"' for capability in capabilities)
    return f'path "{path}" {{ capabilities = [{wanted}] }}'


def _mount_engine(api: Api, mount: str, ttl: str) -> None:
    config = {"max_lease_ttl": ttl, "default_lease_ttl": ttl}
    api.call("POST", f"sys/mounts/{mount}", {"type": "pki", "config": config})


def _mount_root(api: Api, mount: str, ttl: str, key: dict[str, Any]) -> str:
    _mount_engine(api, mount, ttl)
    made = api.write(f"{mount}/root/generate/internal", common_name=f"Root of {mount}", ttl=ttl, **key)
    return str(made["certificate"]).strip() + "\n"
