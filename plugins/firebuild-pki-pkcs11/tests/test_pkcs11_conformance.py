"""The contract of a key store, checked with SoftHSM."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from firebuild_pki import SecretRef
from firebuild_pki.conformance import KeyStoreConformance

from softhsm import PIN, uri


@pytest.mark.needs("softhsm2")
@pytest.mark.xdist_group("softhsm")
class TestP256(KeyStoreConformance):
    name = "p256"

    @pytest.fixture
    def key_uri(self, tokens: None) -> str:
        return uri("ca", self.name)

    @pytest.fixture
    def other_uri(self) -> str:
        return uri("spare", "p256")

    @pytest.fixture
    def missing_uri(self) -> str:
        return uri("ca", "nothing")

    @pytest.fixture
    def key_environ(self) -> Mapping[str, str]:
        return {"TOKEN_PIN": PIN}

    @pytest.fixture
    def key_secret(self) -> SecretRef:
        return SecretRef(env="TOKEN_PIN")

    @pytest.fixture
    def wrong_secret(self) -> str:
        return "not-the-pin-4711"


class TestP384(TestP256):
    name = "p384"

    @pytest.fixture
    def other_uri(self) -> str:
        return uri("ca", "p256")  # of the same token


class TestRSA(TestP256):
    name = "rsa2048"
