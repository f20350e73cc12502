"""The server of the tests from outside: it is started, told how to behave, and CAs are set up on it.

As a program it serves one CA until its standard input ends: it prints the settings for it, the environment
that these refer to, and the certificate that signs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import boto3
from firebuild_pki import Authority, ProviderContext, open_authority

from firebuild_pki_aws_pca import AwsPcaProvider, AwsPcaSettings
from pca_server import ADMIN, BUILDS

REGION = "eu-central-1"
MISSING = f"arn:aws:acm-pca:{REGION}:123456789012:certificate-authority/11111111-2222-3333-4444-555555555555"
TEMPLATE = "arn:aws:acm-pca:::template/"
ENVIRON = {"PCA_KEY_ID": BUILDS[0], "PCA_SECRET": BUILDS[1]}
KEYS = {"id": {"env": "PCA_KEY_ID"}, "secret": {"env": "PCA_SECRET"}}


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Server:
    """A running server.

    Args:
        address: its URL.
    """

    address: str

    def behave(self, **behaviour: Any) -> None:
        """Behave as in `pca_server.Behaviour`, from now on; forget the calls."""
        urlopen(f"{self.address}/control", json.dumps(behaviour).encode()).close()

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Operations and parameters since the last `behave`."""
        with urlopen(f"{self.address}/control") as answer:
            return [(operation, parameters) for operation, parameters in json.load(answer)["calls"]]

    def agents(self) -> list[str]:
        """The header User-Agent of these calls."""
        with urlopen(f"{self.address}/control") as answer:
            return list(json.load(answer)["agents"])

    def operations(self) -> list[str]:
        return [operation for operation, _ in self.calls()]

    @cached_property
    def admin(self) -> Any:
        """The client of whoever sets up CAs."""
        keys = dict(zip(("aws_access_key_id", "aws_secret_access_key"), ADMIN, strict=True))
        return boto3.client("acm-pca", region_name=REGION, endpoint_url=self.address, **keys)

    def create(self, name: str, key: str, *, mode: str = "GENERAL_PURPOSE", below: str | None = None) -> str:
        """Ask for a CA, without a certificate as yet; return its ARN."""
        configuration = {
            "KeyAlgorithm": key,
            "SigningAlgorithm": algorithm(key),
            "Subject": {"CommonName": name},
        }
        arn: str = self.admin.create_certificate_authority(
            CertificateAuthorityConfiguration=configuration,
            CertificateAuthorityType="ROOT" if below is None else "SUBORDINATE",
            UsageMode=mode,
        )["CertificateAuthorityArn"]
        return arn

    def make(
        self, name: str, key: str, *, mode: str = "GENERAL_PURPOSE", below: str | None = None, days: int = 365
    ) -> str:
        """Set up a CA as its operator does, a root or one below another; return its ARN."""
        arn = self.create(name, key, mode=mode, below=below)
        signer = below or arn
        parent = self.admin.describe_certificate_authority(CertificateAuthorityArn=signer)[
            "CertificateAuthority"
        ]
        template = "RootCACertificate" if below is None else "SubordinateCACertificate_PathLen0"
        made = self.admin.issue_certificate(
            CertificateAuthorityArn=signer,
            Csr=self.admin.get_certificate_authority_csr(CertificateAuthorityArn=arn)["Csr"],
            SigningAlgorithm=algorithm(parent["CertificateAuthorityConfiguration"]["KeyAlgorithm"]),
            TemplateArn=f"{TEMPLATE}{template}/V1",
            Validity={"Type": "DAYS", "Value": days},
        )["CertificateArn"]
        found = self.admin.get_certificate(CertificateAuthorityArn=signer, CertificateArn=made)
        chain = {"CertificateChain": found["CertificateChain"]} if below else {}
        self.admin.import_certificate_authority_certificate(
            CertificateAuthorityArn=arn, Certificate=found["Certificate"], **chain
        )
        return arn

    def section(self, arn: str, **block: Any) -> dict[str, Any]:
        """Write the section ``ca`` for a CA of this server; None leaves a setting out."""
        block = {
            "certificate_authority_arn": arn,
            "endpoint_url": self.address,
            "sts_endpoint_url": self.address,
            "access_key": KEYS,
            "attempts": 1,
            **{name: str(value) if isinstance(value, Path) else value for name, value in block.items()},
        }
        return {
            "provider": "aws-pca",
            "aws-pca": {name: value for name, value in block.items() if value is not None},
        }

    def opened(
        self,
        arn: str,
        *,
        environ: Mapping[str, str] = ENVIRON,
        clock: Callable[[], datetime] = now,
        ca: Mapping[str, object] | None = None,
        **block: Any,
    ) -> Authority:
        """Open an authority with a CA of this server."""
        section = {**self.section(arn, **block), **(ca or {})}
        return open_authority(section, build_id="b1", clock=clock, environ=environ)

    def bare(self, arn: str, **block: Any) -> AwsPcaProvider:
        """Make the provider itself, without the framework around it."""
        settings = AwsPcaSettings.model_validate(self.section(arn, **block)["aws-pca"])
        return AwsPcaProvider(settings, ProviderContext(now, ENVIRON))


def algorithm(key: str) -> str:
    """The algorithm of a CA's signatures, for what sets it up."""
    known = {
        "RSA_2048": "SHA256WITHRSA",
        "EC_prime256v1": "SHA256WITHECDSA",
        "EC_secp384r1": "SHA384WITHECDSA",
    }
    return known.get(key, key)


@contextmanager
def serving(*tls: Path) -> Iterator[Server]:
    """Run the server; with TLS if a certificate and a key are given."""
    command = [sys.executable, str(Path(__file__).with_name("pca_server.py")), *map(str, tls)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, "the server does not start"
        yield Server(f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    with serving() as server:
        arn = server.make("Builds CA", "EC_prime256v1", mode="SHORT_LIVED_CERTIFICATE")
        found = server.admin.get_certificate_authority_certificate(CertificateAuthorityArn=arn)
        block = server.section(arn)["aws-pca"]
        print(json.dumps({"block": block, "environ": ENVIRON, "issuer": found["Certificate"]}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
