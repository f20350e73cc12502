"""`build --ready` and `build --debug-shell` in real virtual machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cli.terminals import on_terminal
from support import BIN, Firebuild

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


def test_the_shell_is_in_the_machine_where_the_step_failed(
    firebuild: Firebuild, configure: Any, context: Path
) -> None:
    (context / "Dockerfile").write_text(
        "FROM busybox\nWORKDIR /work\n"
        "RUN --mount=type=cache,target=/kept busybox touch half /kept/file; exit 42\n"
    )
    environ = {**os.environ, "FIREBUILD_HOME": str(firebuild.home)}
    config = configure(accelerator="tcg")
    build = ("build", "--debug-shell", "--config", config, context)
    with on_terminal(BIN / "firebuild", *build, environ=environ) as user:
        user.read("# ")
        # This shell may write its prompt twice, once it knows where the cursor is.
        user.type(
            "busybox ls /kept $PWD; busybox grep -o console=ttyS0 /proc/cmdline; busybox tty; echo a''ll\n"
        )
        said = user.read("all")
        user.type("exit\n")
        end = user.read()
        assert user.status() == 1
    assert "/kept:\r\nfile\r\n\r\n/work:\r\nhalf\r\nconsole=ttyS0\r\n/dev/pts/0\r\nall" in said
    assert "step 3/3 failed with exit code 42" in end
    assert firebuild.leftovers() == []
