"""`build --ready` and `build --debug-shell` in real virtual machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import Firebuild

pytestmark = [
    pytest.mark.needs("userns", "busybox", "qemu"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.timeout(400),
]

SERVER = """\
FROM busybox
HEALTHCHECK --timeout=60s CMD busybox wget -q -O - http://127.0.0.1:8080/etc/passwd | busybox grep -q root
CMD ["busybox", "httpd", "-f", "-p", "8080", "-h", "/"]
"""


def test_a_server_answers_in_its_machine_before_the_image_is_stored(
    firebuild: Firebuild, configure: Any, context: Path
) -> None:
    (context / "Dockerfile").write_text(SERVER)
    config = configure(accelerator="tcg")
    done = firebuild("build", "--config", config, "--progress=plain", "-t", "server", "--ready", context)
    assert "the image answers, " in done.stdout
    assert firebuild.leftovers() == []
