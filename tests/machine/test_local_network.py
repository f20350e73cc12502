"""RUN steps of the machine `local` with a network of their own, which slirp4netns connects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.enter import CONNECTED
from firebuild_bootstrap.machine import usernet
from firebuild_bootstrap.machine.usernet import UserNetwork, find_program, resolv_conf
from machine_qemu import lonely_host
from machine_qemu.images import busybox_base
from machine_qemu.processes import name_of, pids, status_of
from support import Firebuild, eventually

pytestmark = pytest.mark.needs("bwrap", "busybox")
SETTING = {"FIREBUILD_MACHINE__LOCAL__NETWORK": "user"}


@pytest.fixture(scope="module")
def firebuild(tmp_path_factory: pytest.TempPathFactory) -> Firebuild:
    directory = tmp_path_factory.mktemp("local-network")
    made = Firebuild(directory / "store")
    made("base", "import", "busybox", busybox_base(directory))
    return made


def context_of(directory: Path, *lines: str) -> Path:
    (directory / "context").mkdir()
    (directory / "context/Dockerfile").write_text("FROM busybox\n" + "".join(f"{line}\n" for line in lines))
    return directory / "context"


@pytest.mark.needs("slirp4netns", "root")
def test_a_run_reaches_what_is_elsewhere_and_has_ports_of_its_own(
    firebuild: Firebuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, *closed = lonely_host.ADDRESSES[0], "169.254.169.254", "127.0.0.1", "10.0.2.2", "240.0.0.1"
    ask = "; ".join(
        f"echo {one} $(echo hi | nc -w 9 {one} {lonely_host.PORT} 2>&1)" for one in (elsewhere, *closed)
    )
    used = lonely_host.PORT  # on the host's network a RUN could not have it
    listen = "nc -l -p $port >/dev/null & sleep 0.3; echo | nc 127.0.0.1 $port && echo port $port"
    context = context_of(
        tmp_path,
        f"RUN cat /etc/resolv.conf; {ask}",
        f"RUN for port in 80 {used}; do {listen}; done",
        "RUN grep CapBnd /proc/self/status",
        "RUN --network=none tail -n +3 /proc/net/dev",
        "RUN --network=host tail -n +3 /proc/net/dev",
    )
    monkeypatch.setenv("FIREBUILD_HOME", str(firebuild.home))
    monkeypatch.setenv(*next(iter(SETTING.items())))
    words = ("build", "--no-cache", "--progress", "plain", "-t", "t/own:1", str(context))
    status, output, errors = json.loads(lonely_host.run("build", str(firebuild.program), *words))
    assert status == 0, output + errors
    said = output + errors
    assert "nameserver 10.0.2.3\n" in said
    assert f"\n{elsewhere} the host\n" in said
    assert all(f"\n{one} nc: can't connect to remote host ({one}): " in said for one in closed)
    assert f"\nport 80\nport {used}\n" in said
    capabilities = int(said.partition("\nCapBnd:\t")[2].split()[0], 16)
    assert capabilities & 1 << 10  # CAP_NET_BIND_SERVICE
    assert not capabilities & 1 << 13  # CAP_NET_RAW: packets that no route rejects
    alone, connected = (
        said.partition(f"RUN --network={name}")[2].partition("done")[0] for name in ("none", "host")
    )
    assert "lo:" in alone
    assert "uplink:" not in alone
    assert "uplink:" in connected  # that of the machine


@pytest.mark.needs("slirp4netns")
@pytest.mark.parametrize(("network", "device"), [("user", True), ("none", False), ("host", False)])
def test_a_machine_that_runs_an_image_has_the_network_that_is_asked_for(
    firebuild: Firebuild, network: str, device: bool
) -> None:
    words = (
        "run",
        "--machine",
        "local",
        "--network",
        network,
        "busybox",
        "/bin/sh",
        "-c",
        "cat /proc/net/dev",
    )
    assert ("uplink:" in firebuild(*words, environ=SETTING).stdout) == device


@pytest.mark.needs("slirp4netns")
def test_a_program_that_fails_says_why_where_a_step_needs_it(firebuild: Firebuild, tmp_path: Path) -> None:
    program = tmp_path / "slirp4netns"
    program.write_text("#!/bin/sh\necho starting\necho 'no tap today' >&2\nexit 1\n")
    program.chmod(0o755)
    context = context_of(tmp_path, "RUN --network=none true", "RUN true")
    environ = {**SETTING, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = firebuild("build", "--no-cache", "-t", "t/own:1", context, environ=environ, status=1)
    assert "Dockerfile:3: step 3/3 failed" in done.stderr
    assert "there is no network for RUN steps: slirp4netns: no tap today" in done.stderr


def test_a_program_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usernet, "_BEGIN_SECONDS", 0.2)
    program = tmp_path / "slirp4netns"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with closing(UserNetwork(program)) as network, asking(network) as answer:
        assert answer == f"{program} made no network within 0.2 seconds"


@pytest.mark.needs("slirp4netns")
def test_a_port_can_not_be_published_into_a_network_of_its_own(
    firebuild: Firebuild,
) -> None:
    done = firebuild(
        "run", "--machine", "local", "--network", "user", "-p", "8080:80", "busybox", "true", status=125
    )
    assert done.stderr == (
        "error: --publish: nothing leads into the network of the command (machine.local.network: user)\n"
        "  hint: without that a command of local listens on this host itself; qemu publishes ports\n"
    )


def test_a_host_without_the_program_or_the_device_is_told(
    firebuild: Firebuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slirp4netns").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"machine\.local\.network: user needs .*/tun, and this user can't open it"
    ) as error:
        find_program(tmp_path / "tun")
    assert "modprobe tun" in (error.value.hint or "")
    (tmp_path / "tun").touch()
    assert find_program(tmp_path / "tun") == tmp_path / "slirp4netns"
    (tmp_path / "slirp4netns").unlink()
    context = context_of(tmp_path, "RUN true")
    done = firebuild("build", "--no-cache", "-t", "t/own:1", context, environ=SETTING, status=2)
    assert "machine.local.network: user: slirp4netns was not found" in done.stderr
    assert "install the package slirp4netns, or leave machine.local.network at host" in done.stderr


_GUEST = """
import ctypes, os, socket, sys, time
assert ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) == 0  # CLONE_NEWUSER | CLONE_NEWNET
control = socket.socket(fileno=int(sys.argv[1]))
control.send(b"connect")
print(control.recv(4096).decode(), flush=True)
time.sleep(100)
"""


@contextmanager
def asking(network: UserNetwork) -> Iterator[str]:
    """A guest with a network of its own, and the answer that it gets."""
    command = [sys.executable, "-c", _GUEST, str(network.guest_end)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, pass_fds=[network.guest_end]
    ) as process:
        try:
            network.begun()
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def slirps(parent: int) -> list[int]:
    """The processes of slirp4netns that this process started."""
    return [pid for pid in pids() if name_of(pid) == "slirp4netns\n" and status_of(pid)[1:2] == [str(parent)]]


@pytest.mark.needs("slirp4netns")
def test_it_ends_when_it_is_closed_and_says_why_it_has_ended_before() -> None:
    others = set(slirps(os.getpid()))
    with closing(UserNetwork(find_program())) as network, asking(network) as answer:
        assert answer.encode() == CONNECTED
        assert network.problem() == ""
        (one,) = set(slirps(os.getpid())) - others
        os.kill(one, signal.SIGKILL)
        eventually(lambda: network.problem() != "")
        assert network.problem().startswith("the network for RUN steps has ended: slirp4netns: ")
    assert set(slirps(os.getpid())) == others
    closing_early = UserNetwork(find_program())
    closing_early.close()
    closing_early.close()


@pytest.mark.needs("slirp4netns")
def test_it_ends_with_a_build_that_is_killed(firebuild: Firebuild, tmp_path: Path) -> None:
    context = context_of(tmp_path, "RUN echo begun; sleep 100")
    build = subprocess.Popen(
        [firebuild.program, "build", "--no-cache", "--progress", "plain", "-t", "t/own:1", str(context)],
        env={**firebuild.environ, **SETTING},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with build:
        assert build.stdout is not None
        assert any(line == "begun\n" for line in build.stdout)
        (one,) = slirps(build.pid)
        build.kill()
    eventually(lambda: not Path("/proc", str(one)).exists())


def test_name_servers_are_asked_through_the_one_that_is_there_for_steps() -> None:
    assert resolv_conf("") == "nameserver 10.0.2.3\n"
    host = "# made\nsearch example\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\n"
    assert resolv_conf(host) == "nameserver 10.0.2.3\n# made\nsearch example\noptions edns0\n"
