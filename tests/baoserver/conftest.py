from __future__ import annotations

from baoserver.fixtures import (  # noqa: F401
    _cluster,
    cluster,
    dev_server,
    dev_tls_server,
    pytest_runtest_makereport,
    stored_server,
    unique,
)
