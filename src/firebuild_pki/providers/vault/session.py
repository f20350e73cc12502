"""A login: its token, its renewal after a refusal, its end."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Any

from firebuild_pki.connections import tls_context
from firebuild_pki.errors import CAError, ProviderError, SecretError
from firebuild_pki.providers.vault.nodes import Budget, Nodes, Timing
from firebuild_pki.providers.vault.settings import (
    AppRoleAuth,
    AuthSettings,
    JWTAuth,
    KubernetesAuth,
    TLSSettings,
    TokenAuth,
    TokenFileAuth,
    VaultSettings,
)
from firebuild_pki.providers.vault.transport import Answer, Request, Transport
from firebuild_pki.settings import SecretRef
from firebuild_pki.values import dataclass

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


GOODBYE = 5.0
"""Seconds for revoking the token at the end; it expires by itself as well."""


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
        raise SecretError(
            f"expected a token in {where}, but there are only blanks",
            hint="write the token alone: bao token create -field=token",
        )
    if any(one.isspace() or not one.isprintable() for one in token):
        raise SecretError(
            f"expected a token in {where} and nothing else, but it holds blanks or control characters",
            hint="write the token alone: bao token create -field=token",
        )
    if token[0] in "\"'" and token[-1] == token[0]:
        raise SecretError(f"expected a token in {where}, but it is in quotation marks", hint="leave them out")
    if not token.isascii():
        raise SecretError(
            f"expected a token in {where}, but it holds characters beyond ASCII",
            hint="write the token alone: bao token create -field=token",
        )
    return token


def _approle(auth: AppRoleAuth, environ: Mapping[str, str]) -> Mapping[str, str]:
    body = {"role_id": auth.role_id.resolve(environ).strip()}
    if auth.secret_id is not None:
        body["secret_id"] = auth.secret_id.resolve(environ).strip()
    return body


def make_context(settings: TLSSettings, environ: Mapping[str, str]) -> ssl.SSLContext:
    """Read the files of the settings; verification is always on.

    Raises:
        CAError: a file is missing, unreadable, of the wrong kind, or readable by everybody.
    """
    passphrase = settings.key_passphrase.resolve(environ) if settings.key_passphrase else ""
    return tls_context(
        ca_file=settings.ca_file,
        cert_file=settings.cert_file,
        key_file=settings.key_file,
        passphrase=passphrase,
        settings=("tls.ca_file", "tls.cert_file", "tls.key_file", "tls.key_passphrase"),
    )


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    revocable: bool


_NONE = _Token("", revocable=False)


class Session:
    """Requests with a token; `open` logs in.

    Args:
        settings: addresses, TLS, namespace, auth.
        environ: where secrets and HTTPS_PROXY are.
        timing: time and its limits.
        report: told what is being waited for.
    """

    def __init__(
        self,
        settings: VaultSettings,
        environ: Mapping[str, str],
        timing: Timing,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._timing = timing
        self._secrets: set[str] = set()
        self._token = _NONE
        self._uses_left: int | None = None
        self._worked = ""
        # The CAs of the system take 20 ms to read, for which plain http has no use.
        speaks_tls = any(one.startswith("https:") for one in settings.address)
        context = make_context(settings.tls, environ) if speaks_tls or settings.tls != TLSSettings() else None
        self.transport = Transport(context, settings.tls.server_name, environ, timing.monotonic)
        self.nodes = Nodes(list(settings.address), self.transport, self.scrub, report)

    def open(self) -> None:
        """Log in.

        Raises:
            CAError: no node answered, or the login was refused.
        """
        self._token = self._obtain(self._timing.budget())

    def close(self) -> None:
        """Revoke the token if it was made by logging in, and close the connections.

        Raises:
            ProviderError: the token could not be revoked.
        """
        token, self._token = self._token, _NONE
        try:
            if token.revocable:
                self._revoke(token, self._timing.budget(GOODBYE))
        finally:
            self._secrets.clear()
            self.transport.close()

    @property
    def uses_left(self) -> int | None:
        """How many more requests the token is good for; None where there is no limit, or none is known."""
        return self._uses_left

    def learn_uses(self, about: Mapping[str, Any]) -> None:
        """Take ``num_uses`` from what the server says about the token; 0 is without limit there."""
        uses = about.get("num_uses")
        # Below zero: this was the last one.
        self._uses_left = max(uses, 0) if isinstance(uses, int) and uses else None

    def budget(self) -> Budget:
        """Begin an operation."""
        return self._timing.budget()

    def ask(self, method: str, path: str, budget: Budget) -> Answer:
        """Ask for something that needs no token."""
        return self.nodes.ask(Request(method, path, namespace=self._settings.namespace), budget)

    def call(
        self,
        method: str,
        path: str,
        budget: Budget,
        body: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask with the token; on 403 once more with a new one, if there is a way to get one."""
        request = Request(method, path, body, headers=headers or {})
        answer = self._with(self._token, request, budget)
        if answer.status == 403 and self._renew(budget):
            answer = self._with(self._token, request, budget)
        return answer

    def why_denied(self, path: str, budget: Budget) -> tuple[str, str]:
        """Find out what a 403 is about, which is the same for a bad token and for a small policy.

        Returns:
            what is wrong, and what to do; the likeliest cause first.
        """
        if self._uses_left == 0:
            return "the token is used up (num_uses)", "make one without num_uses, or with a larger one"
        answer = self._with(self._token, Request("GET", "auth/token/lookup-self"), budget)
        wanted = self._settings.namespace or ""
        if answer.status == 403 and not self.is_alive(budget):
            return self.why_invalid()
        home = str(answer.data.get("namespace_path") or "").strip("/")
        if answer.status != 403 and home != wanted:
            there = f"set namespace to {home}" if home else "leave namespace out"
            return (
                f'the token is of the namespace "{home}", and the settings name "{wanted}"',
                f"{there}, or make a token there",
            )
        return (
            "the policies of the token do not allow it",
            f'the policy needs: path "{path}" {{ capabilities = ["update"] }}',
        )

    def is_alive(self, budget: Budget) -> bool:
        """Tell whether a token that may not look at itself is valid nonetheless, as far as that can be told.

        A token that may do anything below a mount may ask what it is. Costs one use of the token.
        """
        return self.look(f"sys/internal/ui/mounts/{self._settings.mount}", budget).status == 200

    def why_invalid(self) -> tuple[str, str]:
        """Find out why a token may not even look at itself, which nearly all policies allow.

        Returns:
            as `why_denied`.
        """
        if self._worked == self._token.value:
            return (
                "the token was valid before, and is not any more: used up (num_uses), expired, or revoked",
                "make one that lasts for the build, without num_uses",
            )
        # A wrapping token is used up by the first request, whatever that is: it can't be told any more.
        return (
            f"the token is not valid{self._in_namespace()}: wrong, expired, revoked, used up, "
            "or of another namespace",
            "make a new token, look at the setting namespace, or unwrap it if it is a wrapping token: "
            "bao unwrap",
        )

    def _in_namespace(self) -> str:
        return f" in the namespace {self._settings.namespace}" if self._settings.namespace else ""

    def look(self, path: str, budget: Budget) -> Answer:
        """Ask for what the policy need not allow: a 403 is a fine answer."""
        return self._with(self._token, Request("GET", path), budget)

    def scrub(self, text: str) -> str:
        """Take secrets out of what a server said; nothing keeps a proxy from quoting a request."""
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    def _with(self, token: _Token, request: Request, budget: Budget) -> Answer:
        if self._uses_left is not None:
            self._uses_left = max(self._uses_left - 1, 0)
        request = replace(request, token=token.value, namespace=self._settings.namespace)
        answer = self.nodes.ask(request, budget)
        if answer.status in {200, 204}:
            self._worked = token.value
        return answer

    def _obtain(self, budget: Budget) -> _Token:
        found = credentials(self._settings.auth, self._environ)
        if isinstance(found, str):
            self._secrets.add(found)
            return _Token(found, revocable=False)
        self._secrets.update(value for name, value in found.body.items() if name not in {"role", "name"})
        answer = self.nodes.ask(
            Request("POST", found.path, found.body, namespace=self._settings.namespace), budget
        )
        auth = answer.content.get("auth") or {}
        token = auth.get("client_token")
        if answer.status != 200 or not isinstance(token, str) or not token:
            raise self._refused(found, answer)
        self._secrets.add(token)
        self.learn_uses(auth)
        return _Token(token, revocable=auth.get("token_type") != "batch")

    def _renew(self, budget: Budget) -> bool:
        old = self._token
        if old.revocable:
            self._revoke_quietly(old, budget)
        self._token = self._obtain(budget)
        return self._token.value != old.value

    def _revoke_quietly(self, token: _Token, budget: Budget) -> None:
        try:
            self._revoke(token, budget)
        except CAError:
            return  # it expires by itself

    def _revoke(self, token: _Token, budget: Budget) -> None:
        try:
            answer = self._with(token, Request("POST", "auth/token/revoke-self"), budget)
        except ProviderError as error:
            raise ProviderError(f"the token could not be revoked: {error.message}") from None
        if answer.status not in {200, 204, 403}:  # 403: it has expired
            raise ProviderError(f"the token could not be revoked: {self.words_of(answer)}")

    def _refused(self, login: Login, answer: Answer) -> ProviderError:
        if answer.status == 200:
            message = f"the login with {login.method} at {login.path} gave no token"
            return ProviderError(message, hint="does it ask for a second factor? a build has none")
        said = self.words_of(answer)
        hint = login.hint
        if "namespace not found" in answer.errors:
            hint = "look at the setting namespace: bao namespace list"
        elif "permission denied" in answer.errors or answer.status == 404:
            mounted = f"is {login.method} mounted at auth/{login.mount}{self._in_namespace()}?"
            hint = f"{mounted} look at auth.mount and at namespace; {hint}"
            if login.mount.startswith("auth/"):
                hint = f"write auth.mount without auth/: {login.mount.removeprefix('auth/')}; {hint}"
        return ProviderError(f"the login with {login.method} at {login.path} was refused: {said}", hint=hint)

    def words_of(self, answer: Answer) -> str:
        """Say what the server said, or at least its status."""
        return self.scrub(answer.errors) or f"status {answer.status}"
