"""Ways to log in, set up in one call each."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from baoserver.api import Api


def write_policy(api: Api, name: str, rules: str) -> str:
    """Write a policy and return its name.

    Args:
        api: with a token that may write policies.
        name: of the policy.
        rules: in the policy language (HCL).
    """
    api.call("PUT", f"sys/policies/acl/{name}", {"policy": rules})
    return name


def create_token(api: Api, *policies: str, ttl: str = "1h", **parameters: Any) -> str:
    """Create a token.

    Args:
        api: with a token that may create tokens.
        policies: what the token may do, besides looking itself up and revoking itself.
        ttl: its lifetime.
        parameters: further ones of ``auth/token/create``, for example ``num_uses``.
    """
    body = {"policies": list(policies), "ttl": ttl, **parameters}
    return str(api.call("POST", "auth/token/create", body)["auth"]["client_token"])


@dataclass(frozen=True)
class AppRole:
    """What a program logs in with."""

    mount: str
    role_id: str
    secret_id: str = field(repr=False)


def enable_approle(
    api: Api, *policies: str, role: str = "builds", mount: str = "approle", **parameters: Any
) -> AppRole:
    """Set up AppRole with one role, and draw one secret id.

    Args:
        api: with a token that may do all this.
        policies: what the tokens may do.
        role: name of the role.
        mount: path of the auth method; enabled if it is not there yet.
        parameters: further ones of the role, for example ``token_ttl``.
    """
    _enable(api, "approle", mount)
    path = f"auth/{mount}/role/{role}"
    api.write(path, **{"token_policies": list(policies), "token_ttl": "10m", **parameters})
    role_id = api.read(f"{path}/role-id")["role_id"]
    return AppRole(mount, role_id, api.write(f"{path}/secret-id")["secret_id"])


class JwtIssuer:
    """Signs JSON Web Tokens (RFC 7519) the way a CI system does, with RS256.

    Args:
        issuer: the claim ``iss``.
    """

    def __init__(self, issuer: str = "https://ci.example") -> None:
        self.issuer = issuer
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    @property
    def public_key_pem(self) -> str:
        """What the server checks the tokens with."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()

    def token(self, *, lifetime: float = 300, **claims: Any) -> str:
        """Sign a token.

        Args:
            lifetime: seconds from now.
            claims: beside ``iss``, ``iat``, ``nbf`` and ``exp``, or instead of them.
        """
        now = int(time.time())
        usual = {"iss": self.issuer, "iat": now, "nbf": now - 5, "exp": now + int(lifetime)}
        parts = [{"alg": "RS256", "typ": "JWT"}, {**usual, **claims}]
        signed = ".".join(_base64(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{_base64(self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def enable_jwt(
    api: Api,
    issuer: JwtIssuer,
    *policies: str,
    role: str = "builds",
    audience: str = "https://vault.example",
    mount: str = "jwt",
    **parameters: Any,
) -> str:
    """Set up JWT auth with a static public key, and one role.

    Args:
        api: with a token that may do all this.
        issuer: whose tokens are accepted.
        policies: what the tokens may do.
        role: name of the role.
        audience: the claim ``aud`` has to be this.
        mount: path of the auth method; enabled if it is not there yet.
        parameters: further ones of the role, for example ``bound_claims``.

    Returns:
        The name of the role.
    """
    _enable(api, "jwt", mount)
    keys = {"jwt_validation_pubkeys": [issuer.public_key_pem], "bound_issuer": issuer.issuer}
    api.write(f"auth/{mount}/config", **keys)
    usual = {
        "role_type": "jwt",
        "user_claim": "sub",
        "bound_audiences": [audience],
        "token_policies": list(policies),
        "token_ttl": "10m",
    }
    api.write(f"auth/{mount}/role/{role}", **{**usual, **parameters})
    return role


def enable_cert_auth(
    api: Api, ca_pem: str, *policies: str, role: str = "builds", mount: str = "cert", **parameters: Any
) -> str:
    """Set up auth by TLS client certificates; needs a server with TLS.

    Args:
        api: with a token that may do all this.
        ca_pem: client certificates of this CA are accepted; they need a common name.
        policies: what the tokens may do.
        role: name of the role.
        mount: path of the auth method; enabled if it is not there yet.
        parameters: further ones of the role, for example ``allowed_dns_sans``.

    Returns:
        The name of the role.
    """
    _enable(api, "cert", mount)
    usual = {"certificate": ca_pem, "token_policies": list(policies), "token_ttl": "10m"}
    api.write(f"auth/{mount}/certs/{role}", **{**usual, **parameters})
    return role


def _enable(api: Api, kind: str, mount: str) -> None:
    if f"{mount}/" not in api.read("sys/auth"):
        api.call("POST", f"sys/auth/{mount}", {"type": kind})


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
