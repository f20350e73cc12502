"""What each way to log in sends, and what to do when it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from firebuild_pki.errors import SecretError
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


_TOKENS = ("hvs.", "hvb.", "s.", "b.")
"""How tokens of Vault and OpenBao begin; secret ids that the server makes are UUIDs."""


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
        """What to look at when the server says no; the likeliest cause first."""
        usual = HINTS[self.method].format(mount=self.mount)
        if self.body.get("secret_id", "").startswith(_TOKENS):
            unwrap = "the secret id has the form of a token: unwrap it first, bao unwrap -field=secret_id"
            return f"{unwrap}; or {usual}"
        return usual


def credentials(auth: AuthSettings, environ: Mapping[str, str]) -> Login | str:
    """Fetch the secrets now.

    Returns:
        What to log in with; or the token where the operator provides one.

    Raises:
        SecretError: a secret is not there.
    """
    match auth:
        case TokenAuth():
            return _token(auth.token, environ)
        case TokenFileAuth():
            return _token(SecretRef(file=auth.path), environ)
        case AppRoleAuth():
            return Login("approle", auth.mount, _approle(auth, environ))
        case KubernetesAuth():
            jwt = auth.jwt.resolve(environ).strip()
            return Login("kubernetes", auth.mount, {"role": auth.role, "jwt": jwt})
        case JWTAuth():
            role = {"role": auth.role} if auth.role else {}
            return Login("jwt", auth.mount, {**role, "jwt": auth.jwt.resolve(environ).strip()})
    return Login("cert", auth.mount, {"name": auth.name} if auth.name else {})


def _token(reference: SecretRef, environ: Mapping[str, str]) -> str:
    """Fetch a token; what comes along with it is told by its form, never shown."""
    token = reference.resolve(environ).strip()
    where = f"the environment variable {reference.env}" if reference.env else f"the file {reference.file}"
    if not token:
        raise SecretError(f"expected a token in {where}, but there are only blanks")
    if any(one.isspace() or not one.isprintable() for one in token):
        raise SecretError(
            f"expected a token in {where} and nothing else, but it holds blanks or control characters",
            hint="write the token alone: bao token create -field=token",
        )
    if not token.isascii():
        raise SecretError(f"expected a token in {where}, but it holds characters beyond ASCII")
    return token


def _approle(auth: AppRoleAuth, environ: Mapping[str, str]) -> Mapping[str, str]:
    body = {"role_id": auth.role_id.resolve(environ).strip()}
    if auth.secret_id is not None:
        body["secret_id"] = auth.secret_id.resolve(environ).strip()
    return body
