"""What each way to log in sends, and what to do when it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from firebuild_pki.providers.vault.auth_settings import (
    AppRoleAuth,
    AuthSettings,
    JWTAuth,
    KubernetesAuth,
    TokenAuth,
    TokenFileAuth,
)
from firebuild_pki.settings import SecretRef

HINTS = {
    "approle": "the role id or the secret id is wrong, used up or expired, or not for this address: "
    "make a new one with bao write -f auth/{mount}/role/<role>/secret-id",
    "kubernetes": "look at bound_service_account_names and bound_service_account_namespaces of the role: "
    "bao read auth/{mount}/role/<role>",
    "jwt": "look at bound_audiences, bound_subject and bound_claims of the role, and at the token's claims: "
    "bao read auth/{mount}/role/<role>; tokens of CI jobs expire within minutes",
    "cert": "the certificate in tls.cert_file must be accepted by an entry of auth/{mount}/certs",
}
"""For each method that logs in; `{mount}` is where it is mounted."""


@dataclass(frozen=True, slots=True)
class Login:
    """A request for a token.

    Args:
        method: name of the auth method.
        mount: where it is mounted.
        body: what it wants to know.
    """

    method: str
    mount: str
    body: Mapping[str, str] = field(repr=False)

    @property
    def path(self) -> str:
        """Path of the request."""
        return f"auth/{self.mount}/login"

    @property
    def hint(self) -> str:
        """What to look at when the server says no."""
        return HINTS[self.method].format(mount=self.mount)


def credentials(auth: AuthSettings, environ: Mapping[str, str]) -> Login | str:
    """Fetch the secrets now.

    Returns:
        What to log in with; or the token where the operator provides one.

    Raises:
        SecretError: a secret is not there.
    """
    match auth:
        case TokenAuth():
            return auth.token.resolve(environ).strip()
        case TokenFileAuth():
            return SecretRef(file=auth.path).resolve(environ).strip()
        case AppRoleAuth():
            return Login("approle", auth.mount, _approle(auth, environ))
        case KubernetesAuth():
            jwt = auth.jwt.resolve(environ).strip()
            return Login("kubernetes", auth.mount, {"role": auth.role, "jwt": jwt})
        case JWTAuth():
            role = {"role": auth.role} if auth.role else {}
            return Login("jwt", auth.mount, {**role, "jwt": auth.jwt.resolve(environ).strip()})
    return Login("cert", auth.mount, {"name": auth.name} if auth.name else {})


def _approle(auth: AppRoleAuth, environ: Mapping[str, str]) -> Mapping[str, str]:
    body = {"role_id": auth.role_id.resolve(environ).strip()}
    if auth.secret_id is not None:
        body["secret_id"] = auth.secret_id.resolve(environ).strip()
    return body
