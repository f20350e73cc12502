"""The conformance kit, for both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from firebuild_pki import PluginCatalog
from firebuild_pki.conformance import Feature, ProviderConformance
from pki_file.operator_files import CA, CATALOG, Shop

pytestmark = pytest.mark.needs("openssl")

Section = Mapping[str, Any]
BAD = {
    "ca_cert": 5,
    "ca_key_passphrase": "a secret in the file",
    "anchors": "root.pem",
    "leaf_lifetime": "0s",
}


def section(**block: object) -> Section:
    return {"provider": "file", "file": {key: str(value) for key, value in block.items()}}


class TestSigning(ProviderConformance):
    unsupported = frozenset({Feature.REVOKE})

    @pytest.fixture
    def ca_catalog(self) -> PluginCatalog:
        return CATALOG

    @pytest.fixture
    def ca_settings(self, usual: Shop, shop: Shop) -> Section:
        encrypted = shop.openssl(
            "pkcs8", "-topk8", "-passout", "pass:swordfish", given=usual.read("builds.key")
        )
        chain = shop.write("chain.pem", usual.read("root.pem", "policy.pem"))
        block = section(ca_cert=usual.path("builds.pem"), ca_key=shop.write("ca.key", encrypted), chain=chain)
        return {**block, "file": {**block["file"], "ca_key_passphrase": {"env": "CA_PASSPHRASE"}}}

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        return {"CA_PASSPHRASE": "swordfish"}

    @pytest.fixture
    def ca_secrets(self, shop: Shop) -> list[str]:
        return shop.read("ca.key").decode().splitlines()[1:-1]

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return BAD

    @pytest.fixture
    def ca_broken_settings(self, usual: Shop, shop: Shop) -> Section:
        return section(ca_cert=usual.path("root.pem"), ca_key=shop.path("gone.key"))

    @pytest.fixture
    def ca_refusing_settings(self, shop: Shop) -> Section:
        extensions = f"{CA}\nnameConstraints=critical,permitted;DNS:example.org"
        return section(ca_cert=shop.root("narrow", extensions=extensions), ca_key=shop.path("narrow.key"))


class TestFinishedCertificates(ProviderConformance):
    unsupported = frozenset({Feature.REVOKE, Feature.SIGN, Feature.POLICY})

    @pytest.fixture
    def ca_catalog(self) -> PluginCatalog:
        return CATALOG

    @pytest.fixture
    def ca_settings(self, usual: Shop) -> Section:
        return section(
            ca_cert=usual.path("builds.pem"),
            server_cert=usual.path("server.pem"),
            server_key=usual.path("server.key"),
            client_cert=usual.path("client.pem"),
            client_key=usual.path("client.key"),
        )

    @pytest.fixture
    def ca_secrets(self, usual: Shop) -> list[str]:
        return usual.read("server.key", "client.key").decode().splitlines()[1:3]

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return BAD

    @pytest.fixture
    def ca_broken_settings(self, ca_settings: Section, shop: Shop) -> Section:
        return {**ca_settings, "file": {**ca_settings["file"], "client_key": str(shop.path("gone.key"))}}
