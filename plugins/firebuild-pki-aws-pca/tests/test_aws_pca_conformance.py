"""The contract of a provider, checked against a server that answers as AWS does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
from firebuild_pki.conformance import ProviderConformance

from firebuild_pki_aws_pca import provider
from pca_server import TEMPORARY
from pca_servers import ENVIRON, KEYS, MISSING, TEMPLATE, Server


class TestRoot(ProviderConformance):
    """A root CA with an EC key signs."""

    keys: ClassVar[Mapping[str, object]] = KEYS

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return {
            "certificate_authority_arn": "arn:aws:acm:eu-central-1:123456789012:certificate/1",
            "endpoint_url": "http://pca.example",
            "access_key.secret": "in the clear",
            "server_template": "RootCACertificate/V1",
            "attempts": "many",
        }

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        return ENVIRON

    @pytest.fixture
    def ca_settings(self, server: Server, root: str) -> Mapping[str, object]:
        return server.section(root)

    @pytest.fixture
    def ca_refusing_settings(self, server: Server, root: str) -> Mapping[str, object]:
        allowed = [
            f"{TEMPLATE}EndEntityServerAuthCertificate/V1",
            f"{TEMPLATE}EndEntityClientAuthCertificate/V1",
        ]
        server.behave(templates=allowed)
        both = "EndEntityCertificate/V1"
        return server.section(root, access_key=self.keys, server_template=both, guest_template=both)

    @pytest.fixture
    def ca_broken_settings(self, server: Server) -> Mapping[str, object]:
        return server.section(MISSING, endpoint_url="http://127.0.0.1:1")


class TestSubordinate(TestRoot):
    """A CA with an RSA key below a root, with temporary credentials; certificates take a while."""

    keys: ClassVar[Mapping[str, object]] = {**KEYS, "session_token": {"env": "PCA_TOKEN"}}

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        return dict(zip(("PCA_KEY_ID", "PCA_SECRET", "PCA_TOKEN"), TEMPORARY, strict=True))

    @pytest.fixture
    def ca_settings(
        self, server: Server, subordinate: str, monkeypatch: pytest.MonkeyPatch
    ) -> Mapping[str, object]:
        server.behave(in_progress=1)
        monkeypatch.setattr(provider, "PAUSE", 0.01)
        return server.section(subordinate, access_key=self.keys)
