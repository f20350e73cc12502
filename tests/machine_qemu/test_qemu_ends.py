"""A virtual machine of `firebuild run` that ends otherwise than it should: words say so, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.runs import Runs
from machine_qemu.images import busybox_base
from machine_qemu.processes import machines_of
from support import Firebuild, await_end_of_processes

pytestmark = [
    pytest.mark.needs("userns", "busybox", "qemu"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.timeout(400),
]

ENDED = (
    "error: the machine ended while the command ran: the guest ended before it reported success or failure: "
)


def nothing_left(firebuild: Firebuild) -> bool:
    """Wait for the end of all processes, and say whether neither a directory nor a socket is left."""
    await_end_of_processes(firebuild.home)
    sockets = [path for path in firebuild.home.rglob("*") if path.is_socket()]
    return not sockets and not firebuild.leftovers()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        pytest.param("c", "the machine's kernel gave up: sysrq triggered crash", id="panic"),
        pytest.param("i", "vminit was ended by SIGKILL", id="vminit-killed", marks=pytest.mark.release),
    ],
)
def test_a_machine_whose_kernel_or_guest_dies_is_told(
    firebuild: Firebuild, configure: Any, key: str, words: str
) -> None:
    # The root of a machine that boots its own init may do such things (Documentation/admin-guide/sysrq.rst).
    script = f"echo {key} > /proc/sysrq-trigger; while :; do busybox sleep 1; done"
    init = ("--init", "--entrypoint", "/bin/sh", "busybox", "-c", script)
    done = firebuild("run", "--config", configure(accelerator="tcg"), *init, status=125, timeout=300)
    assert done.stderr == f"{ENDED}{words}\n"
    assert nothing_left(firebuild)


@pytest.mark.release
def test_a_full_drive_is_its_commands_affair_and_a_killed_machine_is_kept_as_a_failure(
    firebuild: Firebuild, configure: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    fill = (
        "busybox dd if=/dev/zero of=/large bs=64k 2>&1 | busybox tr '\\n' ' '; echo; exec busybox sleep 10000"
    )
    config = configure(accelerator="tcg")
    given = ("--detach", "--publish", f"{port}:80", "--disk", "48MiB", "busybox", "/bin/sh", "-c", fill)
    run = firebuild("run", "--config", config, *given, timeout=300).stdout.strip()
    (known,) = json.loads(firebuild("ps", "--json").stdout)
    assert known["ports"] == [f"127.0.0.1:{port}->80/tcp"]
    assert firebuild("ps").stdout.splitlines()[1].endswith(f"  127.0.0.1:{port}->80/tcp")

    logs = firebuild.popen("logs", "--follow", run)
    assert logs.stdout is not None
    assert b"No space left on device" in logs.stdout.readline()
    (machine,) = machines_of(Runs(firebuild.home).find(run).record.pid)
    os.kill(machine, signal.SIGKILL)
    _, said = logs.communicate(timeout=120)
    assert said.decode().startswith("error: the machine ended while the command ran: "), said
    assert firebuild("wait", run).stdout == "125\n"
    assert firebuild("ps", "--all").stdout.splitlines()[1].endswith(" ago  -")
    socket.create_server(("127.0.0.1", port)).close()  # given free
    firebuild("rm", run)
    assert nothing_left(firebuild)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 150 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(directory)]
    subprocess.run(mount, check=True)
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.release
@pytest.mark.needs("root")
def test_a_full_disk_of_this_host_is_told(small_disk: Path, configure: Any, tmp_path: Path) -> None:
    firebuild = Firebuild(small_disk / "home")
    firebuild("base", "import", "busybox", busybox_base(tmp_path))
    fill = "busybox dd if=/dev/urandom of=/large bs=1M count=300 && busybox sync && busybox sleep 10000"
    run = ("run", "--config", configure(accelerator="tcg"), "busybox", "/bin/sh", "-c", fill)
    done = firebuild(*run, status=125, timeout=300)
    words = f"this host failed to write to a drive of the machine: is the disk of {firebuild.home} full?\n"
    assert done.stderr.endswith(f"{ENDED}{words}")
    assert nothing_left(firebuild)
