"""Logging in, logging in again, and leaving nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from baoserver import Api, JwtIssuer, create_token, enable_cert_auth, enable_jwt
from firebuild_pki import Authority, CAError, ProviderError, SettingsError
from pki_vault.tools import APPROLE, ENVIRON, Backend, ClientCertificate, approle, raises
from support import serving

pytestmark = pytest.mark.needs("bao")


def accessors(api: Api) -> set[str]:
    return set(api.call("LIST", "auth/token/accessors")["data"]["keys"])


def own_tokens(api: Api, mount: str) -> list[str]:
    """Accessors of the tokens that were made by logging in at a mount."""
    found = []
    for accessor in accessors(api):
        answer = api.request("POST", "auth/token/lookup-accessor", {"accessor": accessor})
        if answer.ok and answer.json()["data"]["path"] == f"auth/{mount}/login":
            found.append(accessor)
    return found


def revoke_all(api: Api, mount: str) -> None:
    for accessor in own_tokens(api, mount):
        api.write("auth/token/revoke-accessor", accessor=accessor)


def issue(authority: Authority) -> None:
    assert authority.issue_server()
    assert authority.issue_guest()


def test_a_token_made_by_logging_in_is_revoked_at_the_end(backend: Backend, unique: str) -> None:
    auth, environ = approle(backend, unique)
    with backend.open(auth=auth, environ=environ) as authority:
        issue(authority)
        assert len(own_tokens(backend.api, unique)) == 1
    assert own_tokens(backend.api, unique) == []
    assert authority.warnings == ()


def test_the_operators_token_is_left_alone(backend: Backend) -> None:
    with backend.open() as authority:
        issue(authority)
    assert backend.api.with_token(backend.token).read("auth/token/lookup-self")


def test_a_batch_token_cannot_be_revoked_and_nobody_tries(backend: Backend, unique: str) -> None:
    auth, environ = approle(backend, unique, token_type="batch")
    with backend.open(auth=auth, environ=environ) as authority:
        issue(authority)
    assert authority.warnings == ()


def test_a_token_that_ends_during_the_build_is_replaced(backend: Backend, unique: str) -> None:
    auth, environ = approle(backend, unique)
    with backend.open(auth=auth, environ=environ) as authority:
        assert authority.issue_server()
        revoke_all(backend.api, unique)
        assert authority.issue_guest()
    assert own_tokens(backend.api, unique) == []
    assert authority.warnings == ()


def test_a_token_with_few_uses_is_replaced(backend: Backend, unique: str) -> None:
    auth, environ = approle(backend, unique, token_num_uses=3)
    with backend.open(auth=auth, environ=environ) as authority:
        for _ in range(3):
            issue(authority)
    assert own_tokens(backend.api, unique) == []


def test_a_missing_policy_stays_missing_after_logging_in_again(backend: Backend, unique: str) -> None:
    auth, environ = approle(backend, unique, token_policies=["default"])
    with (
        raises(
            ProviderError,
            "signing the server certificate was refused by ",
            "permission denied for pki/sign/server",
            "the policies of the token do not allow it",
            'the policy needs: path "pki/sign/server" { capabilities = ["update"] }',
        ),
        backend.open(auth=auth, environ=environ) as authority,
    ):
        authority.issue_server()
    assert own_tokens(backend.api, unique) == []


def test_an_expired_token_of_the_operator_is_named(backend: Backend) -> None:
    token = create_token(backend.api, backend.policy)
    with (
        raises(ProviderError, "the token was valid before, and is not any more: used up (num_uses), expired"),
        backend.with_token(token).open() as authority,
    ):
        backend.api.with_token(token).call("POST", "auth/token/revoke-self")
        authority.issue_server()


def test_a_token_file_is_read_again(backend: Backend, tmp_path: Path) -> None:
    file = tmp_path / "token"
    old, new = (create_token(backend.api, backend.policy) for _ in range(2))
    file.write_text(f"{old}\n")
    with backend.open(auth={"method": "token_file", "path": str(file)}) as authority:
        assert authority.issue_server()
        backend.api.with_token(old).call("POST", "auth/token/revoke-self")
        file.write_text(f"{new}\n")
        assert authority.issue_guest()
    assert backend.api.with_token(new).read("auth/token/lookup-self")


WRONG_SECRETS = [
    ("SECRET_ID", "invalid role or secret ID", "the role id or the secret id is wrong, used up or expired"),
    ("ROLE_ID", "invalid role or secret ID", "bao write -f auth/MOUNT/role/<role>/secret-id"),
]


@pytest.mark.parametrize(("name", "words", "hint"), WRONG_SECRETS)
def test_a_refused_approle_is_explained(
    name: str, words: str, hint: str, backend: Backend, unique: str
) -> None:
    auth, environ = approle(backend, unique)
    wrong = {**environ, name: "wrong-and-secret"}
    message = f"the login with approle at auth/{unique}/login was refused: {words}"
    with raises(ProviderError, message, hint.replace("MOUNT", unique)) as caught:
        backend.open(auth=auth, environ=wrong)
    assert "wrong-and-secret" not in str(caught.value)


def test_an_approle_may_do_without_a_secret_id(backend: Backend, unique: str) -> None:
    auth, environ = approle(backend, unique, bind_secret_id=True)
    bound = {"bind_secret_id": False, "token_bound_cidrs": ["127.0.0.0/8"]}
    backend.api.write(f"auth/{unique}/role/builds", **bound)
    without = {name: value for name, value in auth.items() if name != "secret_id"}
    with backend.open(auth=without, environ=environ) as authority:
        issue(authority)


def test_an_auth_method_that_is_not_there_is_named(backend: Backend) -> None:
    auth = {**APPROLE, "mount": "nowhere"}
    with raises(ProviderError, "is approle mounted at auth/nowhere?"):
        backend.open(auth=auth, environ={"ROLE_ID": "r", "SECRET_ID": "s"})


def test_a_missing_secret_is_named(backend: Backend) -> None:
    with raises(CAError, "ca-provider(vault): expected a secret in the environment variable ROLE_ID"):
        backend.open(auth=APPROLE, environ={})


JWT = {"method": "jwt", "role": "builds", "jwt": {"env": "JOB_TOKEN"}}


@pytest.mark.parametrize("role", ["builds", None])
def test_the_token_of_a_ci_job_logs_in(role: str | None, backend: Backend, unique: str) -> None:
    issuer = JwtIssuer()
    enable_jwt(backend.api, issuer, backend.policy, mount=unique)
    keys = [issuer.public_key_pem]
    backend.api.write(f"auth/{unique}/config", default_role="builds", jwt_validation_pubkeys=keys)
    environ = {"JOB_TOKEN": issuer.token(aud="https://vault.example", sub="project")}
    auth = {**JWT, "mount": unique, "role": role}
    if role is None:
        del auth["role"]
    with backend.open(auth=auth, environ=environ) as authority:
        issue(authority)
    assert own_tokens(backend.api, unique) == []


BAD_CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"lifetime": -500}, "token is expired"),
    "audience": ({"aud": "https://other.example"}, "invalid audience"),
    "key": ({}, "no known key successfully validated"),
}


@pytest.mark.parametrize("case", BAD_CLAIMS)
def test_a_refused_token_of_a_ci_job_is_explained(case: str, backend: Backend, unique: str) -> None:
    claims, words = BAD_CLAIMS[case]
    issuer = JwtIssuer()
    enable_jwt(backend.api, issuer, backend.policy, mount=unique)
    signer = JwtIssuer() if case == "key" else issuer
    usual: dict[str, Any] = {"aud": "https://vault.example", "sub": "project"}
    environ = {"JOB_TOKEN": signer.token(**{**usual, **claims})}
    with raises(ProviderError, words, "look at bound_audiences", "expire within minutes") as caught:
        backend.open(auth={**JWT, "mount": unique}, environ=environ)
    assert environ["JOB_TOKEN"] not in str(caught.value)


def test_a_client_certificate_logs_in(tls_backend: Backend, tmp_path: Path, unique: str) -> None:
    own = ClientCertificate.written(tmp_path)
    enable_cert_auth(tls_backend.api, own.ca_pem, tls_backend.policy, mount=unique, role="builders")
    for auth in (
        {"method": "cert", "mount": unique},
        {"method": "cert", "mount": unique, "name": "builders"},
    ):
        with tls_backend.open(auth=auth, tls=own.block(tls_backend)) as authority:
            issue(authority)
    with raises(ProviderError, "the login with cert", f"an entry of auth/{unique}/certs"):
        tls_backend.open(auth={**auth, "name": "others"}, tls=own.block(tls_backend))


def test_logging_in_with_a_certificate_needs_one(tls_backend: Backend) -> None:
    with raises(SettingsError, "ca.vault.tls.cert_file: this setting is required to log in with a cert"):
        tls_backend.open(auth={"method": "cert"})


class TokenReview(BaseHTTPRequestHandler):
    """The one call of Kubernetes that the real auth method of OpenBao makes."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = review["spec"]["token"] == self.server.known  # type: ignore[attr-defined]
        user = {
            "username": "system:serviceaccount:ci:builder",
            "uid": "1",
            "groups": ["system:serviceaccounts"],
        }
        status = {"authenticated": known, "user": user if known else {}}
        body = json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status})
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def service_account() -> Iterator[tuple[str, str]]:
    """Address of a Kubernetes that knows one service account, and its token."""
    claims: dict[str, Any] = {
        "kubernetes.io": {"namespace": "ci", "serviceaccount": {"name": "builder", "uid": "1"}},
        "sub": "system:serviceaccount:ci:builder",
    }
    token = JwtIssuer("kubernetes/serviceaccount").token(**claims)
    server = ThreadingHTTPServer(("127.0.0.1", 0), TokenReview)
    server.known = token  # type: ignore[attr-defined]
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", token


def test_the_service_account_of_a_pod_logs_in(
    service_account: tuple[str, str], backend: Backend, tmp_path: Path, unique: str
) -> None:
    kubernetes, token = service_account
    api = backend.api
    api.call("POST", f"sys/auth/{unique}", {"type": "kubernetes"})
    api.write(f"auth/{unique}/config", kubernetes_host=kubernetes, kubernetes_ca_cert=backend.pki.root_pem)
    bound = {"bound_service_account_names": ["builder"], "bound_service_account_namespaces": ["ci"]}
    api.write(f"auth/{unique}/role/builds", token_policies=[backend.policy], **bound)
    file = tmp_path / "token"
    auth = {"method": "kubernetes", "mount": unique, "role": "builds", "jwt": {"file": str(file)}}
    file.write_text(token)
    with backend.open(auth=auth) as authority:
        issue(authority)
    file.write_text(JwtIssuer().token(sub="somebody"))
    with raises(ProviderError, "the login with kubernetes", "look at bound_service_account_names"):
        backend.open(auth=auth)


def test_the_environment_is_asked_for_nothing_else(backend: Backend) -> None:
    environ = {"VAULT_TOKEN": backend.token, "BAO_TOKEN": backend.token}
    with raises(CAError, f"environment variable {ENVIRON}, but it is not set"):
        backend.open(environ=environ)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("s.first\nsecond", "it holds blanks or control characters"),
        ("token s.first", "it holds blanks"),
        ("s.first\x1b[0m", "control characters"),
        ("s.fürst", "but it holds characters beyond ASCII"),
        ("  ", "there are only blanks"),
        ('"s.first"', "it is in quotation marks"),
    ],
)
def test_what_is_no_token_is_not_sent_and_not_shown(backend: Backend, token: str, words: str) -> None:
    with raises(CAError, "expected a token in the environment variable", words) as caught:
        backend.open(environ={ENVIRON: token})
    assert "first" not in str(caught.value)


def test_a_wrong_token_is_not_blamed_on_its_policy(backend: Backend) -> None:
    with (
        raises(CAError, "permission denied for pki/sign/server: the token is not valid: wrong, expired"),
        backend.open(environ={ENVIRON: "s.nonsense"}) as authority,
    ):
        notes = [note for note in authority.examine() if note.about in {"credentials", "role"}]
        assert "the token is not valid" in notes[0].message
        firsts = ["make a new token", "if the token is right", "if the token is right"]
        assert [str(note.hint).startswith(first) for note, first in zip(notes, firsts, strict=True)] == [
            True
        ] * 3
        authority.issue_server()


def test_a_token_of_another_namespace_names_both(namespaced_backend: Backend) -> None:
    with (
        raises(CAError, 'the token is of the namespace "org/team", and the settings name ""'),
        namespaced_backend.open(namespace=None) as authority,
    ):
        authority.issue_server()


@pytest.mark.parametrize(
    ("changes", "said", "first"),
    [
        ({"namespace": "nope"}, "namespace not found", "look at the setting namespace"),
        ({"auth": {"mount": "elsewhere"}}, "permission denied", "is approle mounted at auth/elsewhere?"),
        (
            {"auth": {"mount": "auth/approle"}},
            "permission denied",
            "write auth.mount without auth/: approle;",
        ),
        (
            {"secret": "hvs.CAESIJ"},
            "invalid role or secret ID",
            "the secret id has the form of a token",
        ),
        ({"secret": "0b6c…wrong"}, "invalid role or secret ID", "the role id or the secret id is wrong"),
    ],
)
def test_a_refused_login_names_the_likeliest_cause_first(
    backend: Backend, unique: str, changes: dict[str, Any], said: str, first: str
) -> None:
    auth, environ = approle(backend, unique)
    auth = {**auth, **changes.get("auth", {})}
    environ["SECRET_ID"] = changes.get("secret", environ["SECRET_ID"])
    others = {"namespace": changes["namespace"]} if "namespace" in changes else {}
    with raises(CAError, f"was refused: {said}") as caught:
        backend.open(auth=auth, environ=environ, **others)
    hint = getattr(caught.value, "hint", None) or ""
    assert hint.startswith(first), hint
