"""The identity of a real virtual machine: where its keys go, and that it is renewed."""

from __future__ import annotations

from typing import Any

import pytest

from support import Firebuild

pytestmark = [
    pytest.mark.needs("userns", "busybox", "qemu"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.timeout(400),
]

# It is renewed as soon as the command is there: the first certificate has ended by then.
SCRIPT = """
b() { busybox "$@"; }
ask() { b wget -qO- http://169.254.169.254/latest/meta-data/ | b grep -c -e Identity -e Bootstrap; }
cd /run/firebuild/tls && b stat -Lc '%a %u %F' key.pem cert.pem ca.pem; b grep -c CERT cert.pem; ask
b df . | b awk 'END { print $1 }'
while [ $(b readlink ..data) = ..1 ]; do b sleep 0.1; done
b grep -c PRIVATE key.pem
# Wiped as soon as the machine has said that it has taken it.
while [ $(ask) != 0 ]; do b sleep 0.1; done; exit 3
"""


def test_a_machine_has_its_certificate_and_gets_the_next_one(firebuild: Firebuild, configure: Any) -> None:
    given = ("--identity", "web.example", "--identity-ttl", "3s")
    config = configure(accelerator="tcg")
    run = ("run", "--config", config, *given, "busybox", "/bin/sh", "-c", SCRIPT)
    lines = firebuild(*run, status=3, timeout=120).stdout.splitlines()
    assert lines[:3] == ["400 0 regular file", "444 0 regular file", "444 0 regular file"]
    # A certificate, begin and end, and nothing in the metadata: neither this key nor that of the session.
    assert lines[3:6] == ["2", "0", "tmpfs"]
    assert lines[6:] == ["2"]
