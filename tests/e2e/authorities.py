"""A CA of each kind, real and ready, and one configuration file that knows them all."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from cryptography import x509
from joserfc.jwk import ECKey

from baoserver import DevServer, add_role, create_token, mount_pki, sign_policy, write_policy
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import Issuer, Validity, fingerprint, make_intermediate, make_root, to_pem
from support import REPO, step_ca_program

PROVIDERS = ("embedded", "file", "vault", "cfssl", "step-ca", "aws-pca")
CFSSL_KEY = "0123456789abcdef0123456789abcdef"
STEP_JWK = ECKey.generate_key("P-256")
STEP_KEY = json.dumps(STEP_JWK.as_dict(private=True))


@dataclass(frozen=True)
class Backends:
    """What a configuration needs to know of the CAs.

    Args:
        blocks: the blocks of the section `ca`, by provider.
        environ: the secrets.
        issuers: fingerprint of the certificate that signs, by provider; the embedded one has none yet.
    """

    blocks: Mapping[str, Mapping[str, Any]]
    environ: Mapping[str, str]
    issuers: Mapping[str, str]

    def write(self, file: Path, provider: str, **ca: Any) -> Path:
        """Write a configuration file with all blocks; only the line with the provider differs."""
        file.write_text(yaml.safe_dump({"ca": {"provider": provider, **ca, **self.blocks}}, sort_keys=False))
        return file


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backends]:
    """All of them, for all tests of this process."""
    directory = tmp_path_factory.mktemp("authorities")
    with (
        DevServer(directory) as bao,
        cfssl_server(directory) as (cfssl, cfssl_issuer),
        _step_ca(directory) as (step_ca, step_ca_issuer),
        _aws_pca() as aws,
    ):
        file, file_issuer = _file(directory)
        vault, vault_issuer, token = _vault(bao)
        yield Backends(
            blocks={
                "embedded": {},
                "file": file,
                "vault": vault,
                "cfssl": cfssl,
                "step-ca": step_ca,
                "aws-pca": aws["block"],
            },
            environ={
                "BAO_TOKEN_FOR_BUILDS": token,
                "CFSSL_KEY": CFSSL_KEY,
                "STEP_KEY": STEP_KEY,
                **aws["environ"],
            },
            issuers={
                name: fingerprint(x509.load_pem_x509_certificate(pem))
                for name, pem in {
                    "file": file_issuer,
                    "vault": vault_issuer,
                    "cfssl": cfssl_issuer,
                    "step-ca": step_ca_issuer,
                    "aws-pca": aws["issuer"].encode(),
                }.items()
            },
        )


@contextmanager
def _aws_pca() -> Iterator[dict[str, Any]]:
    """Serve a private CA as AWS does: the block of settings, the environ, the certificate that signs."""
    program = REPO / "plugins/firebuild-pki-aws-pca/tests/pca_servers.py"
    command = [sys.executable, str(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


def _file(directory: Path) -> tuple[dict[str, Any], bytes]:
    validity = Validity.starting(datetime.now(UTC), timedelta(days=365), backdate=timedelta(minutes=5))
    root = make_root(generate_key(), validity, with_intermediate=True)
    issuer = make_intermediate(generate_key(), root, validity)
    certificate, key = directory / "ca.pem", directory / "ca-key.pem"
    certificate.write_bytes(to_pem([issuer.certificate, root.certificate]))
    key.touch(mode=0o600)
    key.write_bytes(private_key_pem(issuer.key))
    return {"ca_cert": str(certificate), "ca_key": str(key)}, to_pem([issuer.certificate])


def _vault(bao: DevServer) -> tuple[dict[str, Any], bytes, str]:
    pki = mount_pki(bao.api)
    add_role(bao.api, "server", use="server")
    add_role(bao.api, "guest", use="client")
    policy = write_policy(bao.api, "builds", sign_policy("server", "guest", revoke=True))
    block = {
        "address": bao.address,
        "server_role": "server",
        "guest_role": "guest",
        "auth": {"method": "token", "token": {"env": "BAO_TOKEN_FOR_BUILDS"}},
    }
    return block, pki.issuing_pem.encode(), create_token(bao.api, policy)


@contextmanager
def cfssl_server(directory: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Run a cfssl: its block of settings, and the certificate that signs."""
    home = directory / "cfssl"
    home.mkdir()
    signing = {
        name: {"usages": ["digital signature", usage], "expiry": "2h", "auth_key": "builds"}
        for name, usage in (("server", "server auth"), ("guest", "client auth"))
    }
    default = {"usages": ["digital signature"], "expiry": "2h", "auth_key": "builds"}
    keys = {"builds": {"type": "standard", "key": CFSSL_KEY}}
    config = {"signing": {"default": default, "profiles": signing}, "auth_keys": keys}
    (home / "config.json").write_text(json.dumps(config))
    request = json.dumps({"CN": "Builds CA", "key": {"algo": "ecdsa", "size": 256}})
    command = ["cfssl", "gencert", "-loglevel=5", "-initca", "-"]
    made = json.loads(
        subprocess.run(command, input=request, capture_output=True, text=True, check=True).stdout
    )
    (home / "ca.pem").write_text(made["cert"])
    (home / "ca-key.pem").write_text(made["key"])
    with _serving(home) as port:
        block = {
            "address": f"http://127.0.0.1:{port}",
            "auth_key": {"env": "CFSSL_KEY"},
            "server_profile": "server",
            "guest_profile": "guest",
        }
        yield block, made["cert"].encode()


@contextmanager
def _step_ca(directory: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    with step_ca_server(directory) as (block, issuer, _):
        yield block, to_pem([issuer.certificate])


@contextmanager
def step_ca_server(directory: Path) -> Iterator[tuple[dict[str, Any], Issuer, Program]]:
    """Run a step-ca: its block of settings, what signs, and the process; it can revoke."""
    home = directory / "step-ca"
    home.mkdir()
    validity = Validity.starting(datetime.now(UTC), timedelta(days=365), backdate=timedelta(minutes=5))
    root = make_root(generate_key(), validity, with_intermediate=True)
    issuer = make_intermediate(generate_key(), root, validity)
    for name, content in {
        "root.pem": to_pem([root.certificate]),
        "ca.pem": to_pem([issuer.certificate]),
        "ca-key.pem": private_key_pem(issuer.key),
    }.items():
        (home / name).write_bytes(content)
    public = {**STEP_JWK.as_dict(private=False), "kid": "builds", "use": "sig", "alg": "ES256"}
    template = (
        '{"sans": {{ toJson .SANs }}, "keyUsage": ["digitalSignature"], '
        '"extKeyUsage": {{ toJson .Token.firebuild.usages }}}'
    )
    provisioner = {
        "type": "JWK",
        "name": "builds",
        "key": public,
        "options": {"x509": {"template": template}},
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    config = {
        "root": str(home / "root.pem"),
        "crt": str(home / "ca.pem"),
        "key": str(home / "ca-key.pem"),
        "address": f"127.0.0.1:{port}",
        "dnsNames": ["127.0.0.1", "localhost"],
        "db": {"type": "badgerv2", "dataSource": str(home / "db")},
        "authority": {"provisioners": [provisioner]},
    }
    (home / "ca.json").write_text(json.dumps(config))
    with Program([str(step_ca_program()), str(home / "ca.json")], home, port) as program:
        auth = {"method": "jwk", "provisioner": "builds", "key": {"env": "STEP_KEY"}}
        block = {"address": f"https://127.0.0.1:{port}", "root": str(home / "root.pem"), "auth": auth}
        yield block, issuer, program


@contextmanager
def _serving(home: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    files = ["-ca", home / "ca.pem", "-ca-key", home / "ca-key.pem", "-config", home / "config.json"]
    with Program(["cfssl", "serve", "-address=127.0.0.1", f"-port={port}", *map(str, files)], home, port):
        yield port


class Program:
    """A server that can be killed and started again; use it in a ``with`` block.

    Args:
        command: of the server.
        home: gets its log.
        port: where it listens.
    """

    def __init__(self, command: Sequence[str], home: Path, port: int) -> None:
        self._command = command
        self._log = home / "log"
        self.port = port

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 45
        while not _listens(self.port):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        """Let it do nothing until `resume`."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
