"""The contract of a provider, checked against real servers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from firebuild_pki.conformance import Feature, ProviderConformance

from cfssl_servers import KEY, LABEL, Pki, section


@pytest.mark.needs("cfssl")
class TestCfsslServe(ProviderConformance):
    # the lifetime is up to the profile
    unsupported = frozenset({Feature.REVOKE, Feature.LIFETIME})

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return {"auth_key": "in the clear", "timeout": "-1s", "attempts": "many"}

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        return {"CFSSL_KEY": KEY}

    @pytest.fixture
    def ca_settings(self, server: str) -> Mapping[str, object]:
        return section(server)

    @pytest.fixture
    def ca_refusing_settings(self, server: str) -> Mapping[str, object]:
        return section(server, server_profile="elsewhere", guest_profile="elsewhere-guest")

    @pytest.fixture
    def ca_broken_settings(self) -> Mapping[str, object]:
        return section("127.0.0.1:1")


class TestMultirootca(TestCfsslServe):
    @pytest.fixture
    def ca_settings(self, multiroot_server: str, pki: Pki) -> Mapping[str, object]:
        return section(multiroot_server, label=LABEL, anchors=pki.root)
