"""What the tests of the driver share: programs that act like Firecracker's, and a host for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firebuild_bootstrap.initramfs import StaticAddress
from firebuild_bootstrap.machine.firecracker.api import FirecrackerApi
from firebuild_bootstrap.machine.firecracker.network import Link, Network
from support import REPO

SECONDS = 30.0


def install(path: Path, module: str) -> Path:
    """Make a program out of a module of this folder, which coverage does not measure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    search = f"{REPO / 'tests'}:{REPO / 'src'}"
    path.write_text(
        "#!/bin/sh\nunset COVERAGE_PROCESS_CONFIG\n"
        f'PYTHONPATH={search} exec {sys.executable} -m machine_firecracker.{module} "$@"\n'
    )
    path.chmod(0o755)
    return path


def kernel_file(path: Path) -> Path:
    """Write what looks like a kernel on every architecture that the tests run on."""
    head = bytearray(b"\x7fELF".ljust(1024, b"\0"))
    head[0x38:0x3C] = b"ARM\x64"
    path.write_bytes(bytes(head))
    return path


LOOPBACK = Link("fctest0", "127.0.0.1", StaticAddress("172.16.0.2/30", "172.16.0.1"), "06:00:ac:10:00:02")


@dataclass
class FakeNetwork(Network):
    """A network without devices: the emulated guest shares this host's loopback."""

    link: Link = LOOPBACK
    connected: bool = False

    def check(self) -> None:
        """Nothing can be missing."""

    def connect(self) -> Link:
        self.connected = True
        return self.link

    def close(self) -> None:
        self.connected = False


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End a process with the block, however that ends."""
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving(command: Sequence[str | Path], directory: Path) -> Iterator[FirecrackerApi]:
    """Run a Firecracker whose API socket is `api.sock` for the time of a block, as soon as it answers."""
    api = FirecrackerApi(directory / "api.sock")
    devnull = subprocess.DEVNULL
    with ended(subprocess.Popen(command, cwd=directory, stdin=devnull, stdout=devnull)) as process:

        def check() -> None:
            assert process.poll() is None, f"it has ended with status {process.returncode}"

        api.await_ready(SECONDS, check)
        yield api


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {SECONDS:g} seconds"
        time.sleep(0.05)


@dataclass(frozen=True)
class NetworkNamespace:
    """A network namespace with a name, where tests make interfaces."""

    name: str

    def ip(self, *arguments: str) -> str:
        return subprocess.run(
            ["ip", "-n", self.name, *arguments], check=True, capture_output=True, text=True
        ).stdout

    def interfaces(self) -> list[str]:
        return sorted(entry["ifname"] for entry in json.loads(self.ip("-json", "link")))

    def command(self, *argv: str | Path) -> list[str | Path]:
        return ["ip", "netns", "exec", self.name, *argv]


@dataclass(frozen=True)
class FirecrackerCli:
    """The `firebuild` command in a network namespace, on a host whose KVM is not asked for."""

    home: Path
    namespace: NetworkNamespace
    environ: Mapping[str, str]

    def popen(self, *arguments: str | Path) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "machine_firecracker.fc_cli"]
        return subprocess.Popen(
            self.namespace.command(*program, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": f"{REPO / 'tests'}:{REPO / 'src'}",
                "FIREBUILD_HOME": str(self.home),
                **self.environ,
            },
        )

    def __call__(self, *arguments: str | Path, status: int = 0) -> tuple[str, str]:
        with self.popen(*arguments) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == status, f"{out}\n{err}"
        assert "Traceback" not in err, err
        return out, err


def requests(log: Path) -> list[tuple[int, str, str, Any]]:
    """Return what the emulated Firecracker was asked: status, method, path, body."""
    found = []
    for line in log.read_text().splitlines():
        status, method, path, *body = line.split(" ", 3)
        found.append((int(status), method, path, json.loads(body[0]) if body and body[0] else None))
    return found
