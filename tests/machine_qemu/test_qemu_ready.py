"""`build --ready` and `build --debug-shell` in real virtual machines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cli.terminals import on_terminal
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


@pytest.mark.release
def test_a_shell_in_the_machine_of_a_failed_step_ends_with_the_build(
    firebuild: Firebuild, configure: Any, context: Path
) -> None:
    (context / "Dockerfile").write_text(
        "FROM busybox\nUSER 1234\nWORKDIR /tmp\nRUN --mount=type=secret,id=word echo begun > half; exit 42\n"
    )
    (context / "word").write_text("a secret")
    words = ("build", "--debug-shell", "--config", configure(accelerator="tcg"), "--secret")
    given = (*words, f"id=word,src={context}/word", str(context))
    with on_terminal(firebuild.program, *given, environ=firebuild.environ) as user:
        said = user.read("This is a shell in its place: the build ends when the shell does.\r\n")
        assert "failed: the command exited with status 42" in said
        user.read("$ ")
        user.type("id -u; pwd; cat half; busybox tty; busybox hostname\n")
        assert re.search(r"1234\r\n/tmp\r\nbegun\r\n/dev/pts/0\r\n\S+\r\n", user.read("$ "))
        user.type("echo ready; busybox sleep 1000\n")
        user.read("ready\r\n")
        user.type("\x03")  # ends what runs in the shell, and not the build
        user.read("$ ")
        user.type("exit\n")
        assert "failed with exit code 42" in user.read()
        assert user.status() == 1
    assert firebuild.leftovers() == []
