"""Servers of builds in a process of their own, so that their memory and descriptors are nobody else's.

As a program it takes requests on standard input, one pickle each, and answers each on standard output.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from firebuild_bootstrap import wire
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.events import Event, GuestConnected, PeerRefused
from firebuild_bootstrap.guest.client import Client
from firebuild_bootstrap.guest.executor import Executor
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.guest.stream import join
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.service import BootstrapServer, Limits
from firebuild_pki import TLSMaterial
from support import peak

BOUND = 256 * 1024 * 1024
"""Bytes above what the servers take before anybody calls, as docs/wire-protocol.md promises."""
LAYER = 16 * 1024 * 1024
"""Bytes of a layer that a server takes."""
FILE = bytes(range(256)) * 12_000
BIND = wire.BindMount(target="/m", resource="step-3-mount-1")
COPY = wire.CopyCommand(step=2, original="COPY f /to/", source="step-2", target="/to/")
RUN = wire.RunCommand(step=3, original="RUN x", argv=("x",), mounts=(BIND,))
WORKDIR = wire.WorkdirCommand(step=4, original="WORKDIR /w", workdir="/w")
COMMANDS: dict[str, list[wire.AnyCommand]] = {
    "session": [COPY, RUN, WORKDIR],
    "calls": [COPY, wire.RunCommand(step=3, original="RUN x", argv=("x",)), WORKDIR],
    "files": [COPY, WORKDIR],
}


@dataclass(frozen=True)
class Seen:
    """What became of a build so far.

    Args:
        kind: of the error, empty for success; None before the end.
        message: of the error.
        refused: peers that were turned away.
        named: of them: address and reason.
        welcomed: how often a guest was.
    """

    kind: str | None
    message: str
    refused: int
    named: list[tuple[str, str]]
    welcomed: int


class Host:
    """That process, and how many bytes it takes before anybody calls.

    Args:
        directory: for all that it writes.
        at_once: how many hostile guests call at the same time, each of a build of its own.
    """

    def __init__(self, directory: Path, at_once: int = 1) -> None:
        directory.mkdir()
        self.directory = directory
        self._at_once = at_once
        self._errors = open(directory / "errors", "w+b")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "assurance.hosts", str(directory.resolve())],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._lock = threading.Lock()
        self.resident = self._most()
        self.descriptors = self._ask("descriptors")

    def begin(self, name: str, kind: str, materials: tuple[TLSMaterial, TLSMaterial], limits: Limits) -> str:
        """Start the server of a build; return its address."""
        return str(self._ask("begin", name, kind, materials, limits))

    def seen(self, name: str) -> Seen:
        """Return what is known of a build now."""
        found = self._ask("seen", name)
        assert isinstance(found, Seen)
        return found

    def end(self, name: str, seconds: float = 60) -> Seen:
        """Wait for the end of a build; return what is known of it then."""
        end = time.monotonic() + seconds
        while (seen := self.seen(name)).kind is None:
            assert time.monotonic() < end, f"the build {name} did not end in {seconds} seconds"
            time.sleep(0.02)
        return seen

    def stop(self, name: str) -> None:
        """Stop the server of a build."""
        self._ask("stop", name)

    def check(self) -> None:
        """See that memory and descriptors are bounded, and that nothing was said that is not in words."""
        assert self._most() - self.resident < BOUND * self._at_once, self._most()
        end = time.monotonic() + 30
        while (now := self._ask("descriptors")) > self.descriptors + 30:  # those of builds that go on
            assert time.monotonic() < end, f"{now} descriptors, {self.descriptors} at first"
            time.sleep(0.1)
        there = [path.name for path in self.directory.iterdir()]
        assert [name for name in there if not name.startswith(("errors", "layer.", "firebuild-"))] == []
        said = (self.directory / "errors").read_text(errors="replace")
        assert "Traceback" not in said, said[-3000:]
        assert "never retrieved" not in said, said[-3000:]

    def close(self) -> None:
        """End it; it ends well, and nothing is left."""
        self.check()
        assert list(self.directory.glob("firebuild-*")) == []
        left = self._ask("resident") - self.resident
        assert left < BOUND, f"{left} bytes are left of builds that have ended"
        self._process.communicate(timeout=60)
        self._errors.close()
        assert self._process.returncode == 0, self._process.returncode

    def _ask(self, what: str, *arguments: Any) -> Any:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump((what, arguments), self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)

    def _most(self) -> int:
        """The most bytes of the process that were ever in memory."""
        if not hasattr(self, "resident"):
            self._ask("descriptors")
        most = peak(self._process.pid)
        assert most is not None, "the server has ended"
        return most


class _Counting(Client):
    """A client that knows how often it has connected: in a crowd it may be turned away, and comes again."""

    attempts = 0

    def _open(self, timeout: float, silence: float) -> grpc.Channel:
        self.attempts += 1
        return super()._open(timeout, silence)


def good_guest(address: str, material: TLSMaterial, directory: Path) -> int:
    """Work through the steps of a build of files as the guest of ours does, and look at what it made.

    Returns:
        how many of its connections came to nothing before.
    """
    block = wire.BootstrapBlock(
        host_port=address,
        ca_chain=material.trust_pem.decode(),
        cert=material.certificate_chain_pem.decode(),
        key=material.private_key_pem.decode(),
        server_name=material.server_name,
    )
    directory.mkdir()
    stop = Stop()
    client = _Counting(block, stop)
    try:
        with Root(str(directory)) as root, join(client, stop, 5.0) as host:
            Executor(root, host, stop).execute()
            host.success()
    finally:
        client.close()
        stop.close()
    assert (directory / "to/f").read_bytes() == FILE
    assert (directory / "w").is_dir()
    return client.attempts - 1


@contextlib.contextmanager
def meanwhile(work: Any) -> Iterator[None]:
    """Do something again and again on a thread of its own while the block runs, at least once."""
    over = threading.Event()

    def run() -> None:
        while True:
            work()
            if over.wait(0.05):
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# --- in the process ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    def entries(self) -> Iterator[Entry]:
        yield Entry(
            source="f",
            path="f",
            kind=tar.FILE,
            mode=0o644,
            mtime_ns=0,
            size=len(FILE),
            open=lambda: io.BytesIO(FILE),
        )


@dataclass
class _Sink:
    """Wants the layer of the RUN, and has it in a file."""

    path: Path
    size: int = 0

    def wanted(self, step: int, /) -> bool:
        return step == RUN.step

    def write(self, step: int, data: bytes, /) -> None:
        assert step == RUN.step
        self.size += len(data)
        if self.size > LAYER:
            raise InputError("the layer has too many bytes")
        with open(self.path, "ab") as file:
            file.write(data)

    def finished(self, step: int, /) -> None:
        pass


@dataclass
class _Build:
    server: BootstrapServer
    refused: list[tuple[str, str]] = field(default_factory=list)
    welcomed: int = 0

    def take(self, event: Event) -> None:
        if isinstance(event, PeerRefused):
            self.refused.append((event.peer, event.reason))
        elif isinstance(event, GuestConnected):
            self.welcomed += 1

    def seen(self) -> Seen:
        outcome = self.server.wait(0)
        error = outcome and outcome.error
        kind = None if outcome is None else "" if error is None else type(error).__name__
        count = self.server.refused_peers
        return Seen(kind, outcome.message if outcome else "", count, list(self.refused), self.welcomed)


class _Builds:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._builds: dict[str, _Build] = {}

    def begin(self, name: str, kind: str, materials: tuple[TLSMaterial, TLSMaterial], limits: Limits) -> str:
        commands = COMMANDS[kind]
        names = {COPY.source} | ({BIND.resource} if kind == "session" else set())
        build: _Build
        server = BootstrapServer(
            commands=commands,
            resources=dict.fromkeys(names, _File()),
            server_material=materials[0],
            guest_material=materials[1],
            events=lambda event: build.take(event),  # noqa: PLW0108 - it is made below
            limits=limits,
            layers=_Sink(self._directory / f"layer.{name}") if kind == "session" else None,
            runtime_directory=self._directory,
        )
        build = self._builds[name] = _Build(server)
        return server.start()

    def seen(self, name: str) -> Seen:
        return self._builds[name].seen()

    def stop(self, name: str) -> None:
        self._builds.pop(name).server.stop(0.2)

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def resident(self) -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]  # proc_pid_statm(5)
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Answer requests until there are no more."""
    builds = _Builds(Path(sys.argv[1]))
    with contextlib.suppress(EOFError):
        while True:
            what, arguments = pickle.load(sys.stdin.buffer)
            pickle.dump(getattr(builds, what)(*arguments), sys.stdout.buffer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    from assurance import hosts  # what is pickled has the names of the module, as whoever asks has it

    hosts.main()
