"""Workloads with identities, among them the example, with this host's Python in the image."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support import REPO, Firebuild

pytestmark = pytest.mark.needs("userns")


def python_base(root: Path) -> Path:
    """Make a root file system that has this Python and nothing else."""
    program = Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]
    library = Path(sysconfig.get_path("stdlib")).resolve()
    unused = shutil.ignore_patterns(
        "test", "tests", "idlelib", "*-packages", "__pycache__", "config-*", "*.a"
    )
    shutil.copytree(library, root / str(library)[1:], ignore=unused)
    for folder in (root / "usr/bin", root / str(program.parent)[1:]):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(program, root / str(program)[1:])
    (root / "usr/bin/python3").symlink_to(program)
    for binary in (program, *library.glob("lib-dynload/*.so")):
        listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
        for path in re.findall(r"(/\S+) \(0x", listed):
            target = root / path[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    return root


def test_machines_of_one_ca_speak_to_each_other_and_no_others_do(tmp_path: Path) -> None:
    firebuild = Firebuild(tmp_path / "home")
    firebuild("base", "import", "python", python_base(tmp_path / "root"))
    done = subprocess.run(
        [sys.executable, REPO / "examples/identity/talk.py", "--base", "python"],
        env={**os.environ, **firebuild.environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    _, one, other, foreign = done.stdout.split("--- ")
    assert "ask: spiffe://example.org/db: you said: hello" in one
    assert "answer: spiffe://example.org/web: hello" in one
    assert "exit status 0 and 0" in one
    assert (
        "answer: refused: the peer is spiffe://example.org/other, expected spiffe://example.org/web" in other
    )
    assert "ask: refused: the peer has hung up" in other
    assert "answer: refused: " in foreign
    assert "CERTIFICATE_VERIFY_FAILED" in foreign
    assert foreign.rstrip().endswith("exit status 3 and 3")
    assert firebuild.leftovers() == []


# Reads its certificate again and again, and is server and client of a TLS connection with each that it reads.
WATCH = r"""
import json, os, socket, ssl, threading, time

TLS = "/run/firebuild/tls"

def connect(folder):
    cert, key, ca = (f"{folder}/{name}.pem" for name in ("cert", "key", "ca"))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=ca)
    for each in (server, client):
        each.load_cert_chain(cert, key)  # refuses a key of another certificate
    ours, theirs = socket.socketpair()
    accepted = []
    answer = threading.Thread(target=lambda: accepted.append(server.wrap_socket(theirs, server_side=True)))
    answer.start()
    caller = client.wrap_socket(ours, server_hostname="web.example")
    answer.join()
    return caller, accepted[0]

def works(caller, accepted):
    caller.sendall(b"hello")
    assert accepted.recv(5) == b"hello"
    accepted.sendall(b"hello")
    assert caller.recv(5) == b"hello"

first, seen = None, []
while len(seen) < 3:
    pair = connect(os.path.realpath(f"{TLS}/..data"))
    works(*pair)
    first = first or pair
    one, other = pair[0].getpeercert(), pair[1].getpeercert()
    assert one == other
    if one["serialNumber"] not in seen:
        seen.append(one["serialNumber"])
        print(json.dumps({**one, "now": time.time()}), flush=True)
    time.sleep(0.1)
works(*first)
"""


@pytest.mark.long
@pytest.mark.needs("ids")  # a warning is said without
@pytest.mark.timeout(400)
def test_a_workload_sees_its_certificate_replaced_twice_and_each_works_until_the_next(tmp_path: Path) -> None:
    firebuild = Firebuild(tmp_path / "home")
    firebuild("base", "import", "python", python_base(tmp_path / "root"))
    # Each is replaced at two thirds of its life: a busy machine has the last third for it.
    given = ("--identity", "web.example", "--identity-ttl", "40s")
    done = firebuild("run", *given, "python", "/usr/bin/python3", "-c", WATCH, timeout=300)
    assert done.stderr == ""
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({one["serialNumber"] for one in seen}) == len(seen) == 3
    for one in seen:
        begin, end = (ssl.cert_time_to_seconds(one[name]) for name in ("notBefore", "notAfter"))
        assert begin <= one["now"] < end
    ends = [ssl.cert_time_to_seconds(one["notAfter"]) for one in seen]
    assert ends == sorted(set(ends))
    # The second was there before the first had ended, and so on.
    assert all(one["now"] < end for one, end in zip(seen[1:], ends[:-1], strict=True))
    assert firebuild.leftovers() == []
