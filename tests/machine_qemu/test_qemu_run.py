"""`firebuild run` in a real virtual machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.machine.usernet import TUN
from machine_qemu import lonely_host
from machine_qemu.kernels import require
from machine_qemu.processes import is_running, machines_of
from support import BIN, Firebuild, await_end_of_processes, eventually

pytestmark = [
    pytest.mark.needs("userns", "busybox", "qemu"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.timeout(400),
]

SCRIPT = """
b() { busybox "$@"; }
ulimit -n; ulimit -n 524288; ulimit -n
b hostname; b cat /etc/hostname; b grep -c processor /proc/cpuinfo
b awk '/MemTotal/ { print $2 < 400000 }' /proc/meminfo
echo $LEVEL; b touch /file 2>&1 | b grep -o Read-only; b df -k / | b awk 'END { print $2 < 60000 }' >&2
b nc -ll -p 80 -e /bin/busybox cat &
trap 'echo heard; exit 9' TERM; echo up; while :; do b sleep 0.2; done
"""


def echoed(port: int, data: bytes) -> bytes:
    """What the machine sends back, up to its end; it may not listen yet."""

    def ask() -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as link, suppress(OSError):
            sender = threading.Thread(target=link.sendall, args=(data,))
            sender.start()
            answer = link.makefile("rb").read(len(data))
            sender.join()
            return answer
        return b""

    answers: list[bytes] = []
    assert eventually(lambda: answers.append(ask()) or answers[-1])  # type: ignore[func-returns-value]
    return answers[-1]


def test_the_command_has_the_machine_that_was_asked_for(firebuild: Firebuild, configure: Any) -> None:
    given = ("--hostname", "web", "-e", "LEVEL=debug", "--read-only", "--user", "1000:1000")
    hardware = ("--memory", "320MiB", "--cpus", "1", "--disk", "48MiB")
    config = configure(accelerator="tcg")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        publish = ("--publish", f"{port}:80")
        refused = firebuild("run", "--config", config, *publish, "busybox", "/bin/sh", status=125)
        assert f"127.0.0.1:{port} can't be listened on: Address already in use" in refused.stderr
    process = firebuild.popen(
        "run", "--config", config, *given, *hardware, *publish, "busybox", "/bin/sh", "-c", SCRIPT
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().rstrip() for _ in range(9)]
    expected = [b"1024", b"524288", b"web", b"web", b"1", b"1", b"debug", b"Read-only", b"up"]
    assert lines == expected, process.communicate(timeout=60)
    assert echoed(port, b"hello") == b"hello"
    sent = [os.urandom(1 << 20) for _ in range(4)]
    with ThreadPoolExecutor(len(sent)) as clients:
        assert list(clients.map(echoed, [port] * len(sent), sent)) == sent
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    # The kernel's console is in neither stream.
    assert (out, error, process.returncode) == (b"heard\n", b"1\n", 9)
    assert firebuild.leftovers() == []


@pytest.mark.release
def test_a_crash_of_the_machine_is_said_and_nothing_stays_of_one_that_is_killed(
    firebuild: Firebuild, configure: Any
) -> None:
    config = configure(accelerator="tcg", kernel_args=["panic=-1"])
    run = ("run", "--config", config, "busybox", "/bin/sh", "-c", "echo up; exec busybox sleep 1000")
    process = firebuild.popen(*run)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    (machine,) = machines_of(process.pid)
    os.kill(machine, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 125, error
    assert error.startswith(b"error: "), error

    process = firebuild.popen(*run)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    machines = machines_of(process.pid)
    process.kill()
    process.communicate(timeout=60)
    await_end_of_processes(firebuild.home)
    assert firebuild.leftovers() == []
    assert eventually(lambda: not any(map(is_running, machines)))


DOWNLOAD = """
b() { busybox "$@"; }
for address in 203.0.113.1 127.0.0.1 169.254.1.1; do b nc -w 5 $address 8080 </dev/null; echo " $?"; done
b dd if=/dev/urandom of=/large bs=64k count=16 2>/dev/null
b nc 203.0.113.1 8081 </large | b md5sum; b md5sum </large
"""


@pytest.mark.needs("root")
def test_a_command_with_a_network_reaches_what_is_elsewhere_only(
    firebuild: Firebuild, configure: Any
) -> None:
    require(os.access(TUN, os.R_OK | os.W_OK), f"needs {TUN}: modprobe tun")
    config = configure(accelerator="tcg", name_servers=["203.0.113.1"])
    run = ("run", "--config", config, "--network", "user", "busybox", "/bin/sh", "-c", DOWNLOAD)
    command = ("env", f"FIREBUILD_HOME={firebuild.home}", str(BIN / "firebuild"))
    status, out, error = json.loads(lonely_host.run("build", *command, *map(str, run)))
    assert status == 0, error
    *answers, came, went = out.splitlines()
    assert answers == ["the host 0", " 1", " 1"]
    assert came == went
    assert firebuild.leftovers() == []


INITTAB = """\
::sysinit:/bin/busybox sh /start
::shutdown:/bin/busybox echo down
"""
START = """\
echo $container; b() { busybox "$@"; }
b cat /proc/1/comm; b awk '/CapEff/ { print $2 }' /proc/self/status
b grep -c ' / / rw,nodev' /proc/self/mountinfo
b mkdir /sys/fs/cgroup/of-mine && b touch /run/file /etc/file && echo writable
b poweroff
"""


def test_an_image_with_an_init_of_its_own_boots_that_as_process_1(
    firebuild: Firebuild, configure: Any, context: Path
) -> None:
    (context / "inittab").write_text(INITTAB)
    (context / "start").write_text(START)
    (context / "Dockerfile").write_text(
        "FROM busybox\nCOPY inittab /etc/inittab\nCOPY start /start\n"
        "RUN busybox mkdir -p /sbin && busybox ln -s /bin/busybox /sbin/init\n"
    )
    firebuild("build", "-q", "-t", "system", context)
    config = configure(accelerator="tcg")
    done = firebuild("run", "--config", config, "--init", "-i", "system")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["firebuild", "init"]
    assert int(lines[2], 16) & (1 << 21)  # CAP_SYS_ADMIN
    assert lines[3:] == ["1", "writable", "down"]
    assert firebuild.leftovers() == []


def test_a_configuration_without_a_kernel_is_refused(firebuild: Firebuild, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"machine: {{driver: qemu, qemu: {{kernel: {tmp_path}/none}}}}\n")
    done = firebuild("run", "--config", config, "busybox", "/bin/sh", status=125)
    assert "none" in done.stderr
