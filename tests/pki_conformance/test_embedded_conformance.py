"""The embedded provider keeps the contract, with and without an intermediate CA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from firebuild_pki.conformance import Feature, ProviderConformance


class TestEmbedded(ProviderConformance):
    unsupported = frozenset({Feature.REVOKE, Feature.CHECK, Feature.POLICY, Feature.FAULTS})

    @pytest.fixture
    def ca_settings(self) -> Mapping[str, Any]:
        return {"provider": "embedded"}

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return {"ca_lifetime": 5, "key_type": "dsa", "intermediate": "perhaps"}


class TestEmbeddedWithoutIntermediate(TestEmbedded):
    @pytest.fixture
    def ca_settings(self) -> Mapping[str, Any]:
        return {"provider": "embedded", "embedded": {"intermediate": False}}
