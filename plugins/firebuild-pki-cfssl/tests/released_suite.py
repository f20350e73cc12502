"""The kit for the plugin of the wheel; `test_cfssl_released.py` runs it with the wheel on the path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from firebuild_pki import PluginCatalog
from firebuild_pki.conformance import Feature, ProviderConformance

import firebuild_pki_cfssl
from cfssl_servers import KEY, make_pki, section, serving


def test_the_plugin_is_that_of_the_wheel() -> None:
    assert Path(str(firebuild_pki_cfssl.__file__)).is_relative_to(os.environ["RELEASED"])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(make_pki(tmp_path_factory.mktemp("cfssl"))) as address:
        yield address


class TestReleased(ProviderConformance):
    unsupported = frozenset({Feature.REVOKE, Feature.LIFETIME})

    @pytest.fixture
    def ca_catalog(self) -> PluginCatalog:
        entry = EntryPoint("cfssl", "firebuild_pki_cfssl", "firebuild_pki.providers")
        return PluginCatalog(providers=[entry])

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
