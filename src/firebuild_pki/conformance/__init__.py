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

from firebuild_pki.conformance.contract import Feature
from firebuild_pki.conformance.keystores import KeyStoreConformance
from firebuild_pki.conformance.suite import ProviderConformance

__all__ = ["Feature", "KeyStoreConformance", "ProviderConformance"]
