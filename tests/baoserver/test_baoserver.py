"""The servers that other tests build on do what they say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import baoserver.process
import baoserver.server
from baoserver import (
    Api,
    ApiError,
    DevServer,
    JwtIssuer,
    RaftCluster,
    ServerFailed,
    StoredServer,
    add_role,
    create_token,
    enable_approle,
    enable_cert_auth,
    enable_jwt,
    mount_pki,
    sign_policy,
    write_policy,
)
from baoserver.fixtures import pytest_runtest_teardown
from baoserver.process import free_port

pytestmark = pytest.mark.needs("bao")

USES: tuple[Literal["server", "client", "both"], ...] = ("server", "client", "both")
SERVER_AUTH, CLIENT_AUTH = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"


def request_for(name: str) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    signed = builder.add_extension(names, critical=True).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def usages(certificate: str) -> set[str]:
    loaded = x509.load_pem_x509_certificate(certificate.encode())
    usage = loaded.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return {one.dotted_string for one in usage}


def test_a_role_per_use_gives_exact_usages_and_a_shared_one_both(dev_server: DevServer, unique: str) -> None:
    pki = mount_pki(dev_server.api, unique)
    found = {}
    for use in USES:
        role = add_role(dev_server.api, f"r-{use}", mount=unique, use=use)
        signed = dev_server.api.write(f"{unique}/sign/{role}", csr=request_for("b.firebuild.internal"))
        found[use] = usages(signed["certificate"])
        issuer = x509.load_pem_x509_certificate(pki.issuing_pem.encode())
        x509.load_pem_x509_certificate(signed["certificate"].encode()).verify_directly_issued_by(issuer)
    assert found == {"server": {SERVER_AUTH}, "client": {CLIENT_AUTH}, "both": {SERVER_AUTH, CLIENT_AUTH}}
    root = x509.load_pem_x509_certificate(pki.root_pem.encode())
    x509.load_pem_x509_certificate(pki.issuing_pem.encode()).verify_directly_issued_by(root)


def test_a_root_can_sign_leaves_itself(dev_server: DevServer, unique: str) -> None:
    pki = mount_pki(dev_server.api, unique, intermediate=False)
    assert pki.root_pem == pki.issuing_pem


def test_a_policy_signs_with_its_roles_and_does_nothing_else(dev_server: DevServer, unique: str) -> None:
    mount_pki(dev_server.api, unique)
    for role in ("mine", "other"):
        add_role(dev_server.api, role, mount=unique)
    policy = write_policy(dev_server.api, unique, sign_policy("mine", mount=unique, revoke=True))
    builds = dev_server.api.with_token(create_token(dev_server.api, policy))
    csr = request_for("b.firebuild.internal")
    serial = builds.write(f"{unique}/sign/mine", csr=csr)["serial_number"]
    builds.write(f"{unique}/revoke", serial_number=serial)
    with pytest.raises(ApiError, match="permission denied") as refused:
        builds.write(f"{unique}/sign/other", csr=csr)
    assert refused.value.status == 403


def test_every_way_to_log_in_gives_a_token_with_the_policy(dev_tls_server: DevServer, unique: str) -> None:
    api, anonymous = dev_tls_server.api, dev_tls_server.anonymous
    policy = write_policy(api, unique, 'path "sys/mounts" { capabilities = ["read"] }')
    approle = enable_approle(api, policy, mount=f"{unique}-approle")
    issuer = JwtIssuer()
    enable_jwt(api, issuer, policy, mount=f"{unique}-jwt", bound_claims={"project": "p"})
    logins = {
        "approle": {"role_id": approle.role_id, "secret_id": approle.secret_id},
        "jwt": {"role": "builds", "jwt": issuer.token(sub="me", aud="https://vault.example", project="p")},
    }
    for method, body in logins.items():
        found = anonymous.call("POST", f"auth/{unique}-{method}/login", body)["auth"]
        assert policy in found["policies"]
        assert api.with_token(found["client_token"]).read("sys/mounts")
    other = issuer.token(sub="me", aud="https://vault.example", project="q")
    with pytest.raises(ApiError, match="claim"):
        anonymous.call("POST", f"auth/{unique}-jwt/login", {"role": "builds", "jwt": other})


def test_a_client_certificate_logs_in(dev_tls_server: DevServer, unique: str, tmp_path: Path) -> None:
    api = dev_tls_server.api
    pki = mount_pki(api, unique)
    role = add_role(api, mount=unique, use="client")
    made = api.write(f"{unique}/issue/{role}", common_name="ci.firebuild.internal", key_type="ec")
    (tmp_path / "cert").write_text("\n".join([made["certificate"], made["issuing_ca"]]))
    (tmp_path / "key").write_text(made["private_key"])
    enable_cert_auth(api, pki.root_pem, "default", mount=f"{unique}-cert")
    pair = (tmp_path / "cert", tmp_path / "key")
    client = Api(dev_tls_server.address, ca_file=dev_tls_server.ca_file, client_certificate=pair)
    found = client.call("POST", f"auth/{unique}-cert/login", {"name": "builds"})["auth"]
    assert found["client_token"]
    with pytest.raises(ApiError):
        dev_tls_server.anonymous.call("POST", f"auth/{unique}-cert/login", {"name": "builds"})


def test_a_namespace_has_mounts_of_its_own(dev_server: DevServer, unique: str) -> None:
    outer = dev_server.api.make_namespace(unique)
    inner = outer.make_namespace("inner")
    mount_pki(inner, unique)
    assert f"{unique}/" in inner.read("sys/mounts")
    assert f"{unique}/" not in outer.read("sys/mounts")


def test_a_stored_server_keeps_data_and_port(tmp_path: Path) -> None:
    with StoredServer(tmp_path) as server:
        address = server.address
        mount_pki(server.api)
        server.seal()
        assert server.is_sealed
        with pytest.raises(ApiError, match="sealed"):
            server.api.read("sys/mounts")
        server.unseal()
        server.stop()
        with pytest.raises(requests.ConnectionError):
            server.api.read("sys/mounts")
        server.start()
        assert server.address == address
        assert "pki/" in server.api.read("sys/mounts")
    assert not list(tmp_path.iterdir())


def test_a_server_in_memory_can_stay_sealed(tmp_path: Path) -> None:
    with StoredServer(tmp_path, storage="inmem", unseal=False) as server:
        assert server.is_sealed


def test_a_suspended_server_says_nothing_until_it_is_resumed(stored_server: StoredServer) -> None:
    stored_server.process.suspend()
    stored_server.process.suspend()
    impatient = Api(stored_server.address, timeout=0.5)
    with pytest.raises(requests.Timeout):
        impatient.call("GET", "sys/health")
    stored_server.process.resume()
    assert stored_server.anonymous.call("GET", "sys/health")["sealed"] is False


def test_a_shared_server_runs_only_for_tests_that_use_it(dev_server: DevServer) -> None:
    def stopped_before_a_test_with(*fixtures: str) -> bool:
        following = Mock(fixturenames=fixtures, get_closest_marker=lambda _: None)
        assert list(pytest_runtest_teardown(following)) == [None]
        return "State:\tT" in Path(f"/proc/{dev_server.process.pid}/status").read_text()

    used = [("tmp_path",), ("tmp_path", "dev_server"), (), (), ("dev_server",)]
    assert [stopped_before_a_test_with(*names) for names in used] == [True, False, True, True, False]
    assert dev_server.anonymous.request("GET", "sys/health").ok


def test_a_taken_port_is_left_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        ports = iter([owner.getsockname()[1], free_port()])
        monkeypatch.setattr(baoserver.server, "free_port", lambda: next(ports))
        with DevServer(tmp_path) as server:
            assert server.port != owner.getsockname()[1]


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredServer, "configuration", lambda self: {"storage": {"none-such": {}}})
    with pytest.raises(ServerFailed, match="none-such"), StoredServer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_never_gets_ready_is_an_error_with_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baoserver.server, "READY_WITHIN", 0.2)
    with pytest.raises(ServerFailed, match=r"the moon: not within 0\.2 s\nits log"):
        baoserver.server.wait_until(lambda: False, "the moon", lambda: "its log")


def test_nobodys_home_is_written_to(dev_server: DevServer) -> None:
    assert (dev_server.directory / ".vault-token").exists()
    assert "root-of-tests" not in repr(dev_server.api)


def test_a_failure_shows_the_log_of_the_servers_in_use(tmp_path: Path) -> None:
    imports = "from baoserver.fixtures import dev_server, pytest_runtest_makereport"
    (tmp_path / "conftest.py").write_text(imports)
    (tmp_path / "test_it.py").write_text("def test_it(dev_server): assert 0")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert "- log of http://127.0.0.1:" in done.stdout
    assert "post-unseal setup complete" in done.stdout


def test_a_server_ends_with_the_thread_that_started_it(tmp_path: Path) -> None:
    server = DevServer(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    baoserver.server.wait_until(lambda: not server.process.is_alive, "its end")
    server.close()


@pytest.mark.xdist_group("raft")
def test_a_cluster_elects_another_leader_and_takes_a_node_back(cluster: RaftCluster) -> None:
    first = cluster.leader()
    pki = mount_pki(cluster.api)
    first.kill()
    assert len(cluster.running) == 2
    assert cluster.leader() is not first
    add_role(cluster.api)
    cluster.heal()
    assert len(cluster.standbys()) == 2
    for node in cluster.nodes:
        assert node.api.call("GET", "pki/cert/ca")["data"]["certificate"].strip() == pki.issuing_pem.strip()
