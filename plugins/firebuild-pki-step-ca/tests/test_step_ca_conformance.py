"""The contract of a provider, checked against a real step-ca."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from firebuild_pki.conformance import ProviderConformance

from step_ca_servers import PASSWORD, Pki, section, x5c


@pytest.mark.needs("step-ca")
class TestJWK(ProviderConformance):
    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return {"root": 5, "timeout": "-1s", "attempts": "many"}

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        return {"PASSWORD": PASSWORD}

    @pytest.fixture
    def ca_settings(self, server: str, pki: Pki) -> Mapping[str, object]:
        return section(server, pki)

    @pytest.fixture
    def ca_refusing_settings(self, server: str, pki: Pki) -> Mapping[str, object]:
        return section(server, pki, {"provisioner": "brief"})

    @pytest.fixture
    def ca_broken_settings(self, pki: Pki) -> Mapping[str, object]:
        return section("https://127.0.0.1:1", pki)


@pytest.mark.needs("step-ca")
class TestX5C(ProviderConformance):
    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return {"address": "http://ca.example", "auth": "certificate"}

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        return {"PASSPHRASE": PASSWORD}

    @pytest.fixture
    def ca_settings(self, server: str, pki: Pki) -> Mapping[str, object]:
        return _with(section(server, pki), x5c(pki, "locked-client", key_passphrase={"env": "PASSPHRASE"}))

    @pytest.fixture
    def ca_refusing_settings(self, server: str, pki: Pki) -> Mapping[str, object]:
        return _with(section(server, pki), x5c(pki, "strange-client"))

    @pytest.fixture
    def ca_broken_settings(self, pki: Pki) -> Mapping[str, object]:
        return _with(section("https://127.0.0.1:1", pki), x5c(pki))


def _with(written: Mapping[str, Any], auth: Mapping[str, Any]) -> Mapping[str, object]:
    return {**written, "step-ca": {**written["step-ca"], "auth": auth}}
