"""What the author of a provider says about it: class attributes and fixtures."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import pytest

from firebuild_pki.config import CASettings
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import PAGE, Feature, must_be_loadable
from firebuild_pki.conformance.spilling import Spill
from firebuild_pki.plugins import PluginCatalog
from firebuild_pki.provider import Clock, utc_now

CANARY = "FIREBUILD_CONFORMANCE_CANARY"
"""Environment variable that the kit sets; its value must turn up nowhere."""


class Checks:
    """Base class of all groups of checks; the fixtures are there to be overridden."""

    unsupported: ClassVar[frozenset[Feature]] = frozenset()
    """What the provider lacks. The checks that need it are skipped if they fail, and fail if they pass."""

    @pytest.fixture
    def ca_settings(self) -> Mapping[str, Any]:
        """The section ``ca`` with which the provider works; the one fixture that must be overridden."""
        name = type(self).__name__
        pytest.fail(f"{name} has no fixture ca_settings; {PAGE} shows an example", pytrace=False)

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        """Values that must be refused: dotted path below the provider's block -> value."""
        return {}

    @pytest.fixture
    def ca_refusing_settings(self) -> Mapping[str, Any] | None:
        """The section ``ca`` with which the backend can be opened, but refuses to sign."""
        return None

    @pytest.fixture
    def ca_broken_settings(self) -> Mapping[str, Any] | None:
        """The section ``ca`` with a backend that is away, or does not let us in; well written."""
        return None

    @pytest.fixture
    def ca_catalog(self) -> PluginCatalog | None:
        """Where plugins are found, for one that is not installed; None: the installed ones."""
        return None

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        """Environment variables for references to secrets."""
        return os.environ

    @pytest.fixture
    def ca_clock(self) -> Clock:
        """The current time. TLS looks at the real one, so this must not be far from it."""
        return utc_now

    @pytest.fixture
    def ca_roll_over(self) -> Callable[[], None] | None:
        """Makes the backend's CA roll over to a new one, as its operators do; None: that is not tried."""
        return None

    @pytest.fixture
    def ca_secrets(self) -> Iterable[str]:
        """Secrets besides those that the settings refer to: must turn up in no log, error or repr."""
        return ()

    @pytest.fixture
    def ca_bench(
        self,
        ca_settings: Mapping[str, Any],
        ca_catalog: PluginCatalog | None,
        ca_environ: Mapping[str, str],
        ca_clock: Clock,
    ) -> Bench:
        """The provider under test; not to be overridden."""
        name = str(ca_settings.get("provider", CASettings.model_fields["provider"].default))
        must_be_loadable(
            lambda: (ca_catalog or PluginCatalog()).load_provider(name), name, type(self), "ca_catalog"
        )
        environ = {**ca_environ, CANARY: f"canary-{secrets.token_hex(16)}"}
        return Bench(ca_settings, ca_catalog, environ, ca_clock)

    @pytest.fixture
    def ca_spill(self, ca_bench: Bench, ca_secrets: Iterable[str]) -> Spill:
        """Looks for secrets; not to be overridden."""
        return Spill.of(ca_bench, {CANARY: ca_bench.environ[CANARY]}, ca_secrets)
