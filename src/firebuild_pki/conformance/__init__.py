"""The contract of a provider as a test suite, for the authors of plugins; needs pytest.

```python
import pytest
from firebuild_pki.conformance import Feature, ProviderConformance

class TestStep(ProviderConformance):
    unsupported = frozenset({Feature.REVOKE, Feature.CHECK})

    @pytest.fixture
    def ca_settings(self):
        return {"provider": "step", "step": {"lifetime": "8h"}}
```

`KeyStoreConformance` is the same for key stores. docs/conformance.md lists the checks.
"""

from __future__ import annotations

from firebuild_pki.conformance.certificates import CertificateChecks, ChainChecks
from firebuild_pki.conformance.contract import Feature
from firebuild_pki.conformance.handshakes import FrameworkChecks, HandshakeChecks, RollOverChecks
from firebuild_pki.conformance.keystores import KeyStoreConformance
from firebuild_pki.conformance.life import LifeChecks, PendingChecks, RefusalChecks
from firebuild_pki.conformance.secrecy import SecrecyChecks, SettingsChecks

__all__ = ["Feature", "KeyStoreConformance", "ProviderConformance"]


GROUPS = (
    SettingsChecks,
    CertificateChecks,
    ChainChecks,
    FrameworkChecks,
    HandshakeChecks,
    RollOverChecks,
    LifeChecks,
    PendingChecks,
    RefusalChecks,
    SecrecyChecks,
)
"""The groups of checks, in the order in which the documentation lists them."""


class ProviderConformance(
    SettingsChecks,
    CertificateChecks,
    ChainChecks,
    FrameworkChecks,
    HandshakeChecks,
    RollOverChecks,
    LifeChecks,
    PendingChecks,
    RefusalChecks,
    SecrecyChecks,
):
    """The contract of a provider, check by check.

    Derive a class from it, override the fixture ``ca_settings`` and, where they apply, the others
    of `Checks`; name in ``unsupported`` what the provider lacks.
    """
