"""One build for a test: the server, the metadata service, an image and vminit in its sandbox."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firebuild_bootstrap import wire
from firebuild_bootstrap.mmds import DataStore, MetadataEmulator
from firebuild_bootstrap.sandbox import Bind, IdMap, Runtime, Sandbox, SandboxProcess
from guest.pki import SERVER_NAME, Pki
from guest.server import BuildServer

BUSYBOX = Path("/bin/busybox")
# Of what is made in a directory: u::rwx, u:1:rwx, g::r-x, m::rwx, o::--- (linux/posix_acl_xattr.h).
DEFAULT_ACL = struct.pack(
    "<I" + 5 * "HHI",
    2,
    *(1, 7, 2**32 - 1),
    *(2, 7, 1),
    *(4, 5, 2**32 - 1),
    *(16, 7, 2**32 - 1),
    *(32, 0, 2**32 - 1),
)


def run_command(shell: str, step: int = 2, **fields: Any) -> wire.RunCommand:
    fields = {"argv": ("/bin/sh", "-c", shell), "original": f"RUN {shell}", **fields}
    return wire.RunCommand(step=step, **fields)


def copy_command(target: str, source: str = "files", step: int = 2, **fields: Any) -> wire.CopyCommand:
    fields = {"original": f"COPY {source} {target}", **fields}
    return wire.CopyCommand(step=step, source=source, target=target, **fields)


def workdir_command(workdir: str, step: int = 2, **fields: Any) -> wire.WorkdirCommand:
    return wire.WorkdirCommand(step=step, original=f"WORKDIR {workdir}", workdir=workdir, **fields)


def make_image(path: Path, *, busybox: bool = True) -> Path:
    """Create a root with a shell and a few users, and nothing else."""
    path.mkdir()
    path.chmod(0o755)
    if busybox:
        (path / "bin").mkdir()
        shutil.copy2(BUSYBOX, path / "bin/busybox")
        for applet in ("sh", "cat", "echo", "ls", "id", "rm", "sleep", "touch", "head", "dd", "ps", "env"):
            (path / "bin" / applet).symlink_to("busybox")
    (path / "etc").mkdir()
    (path / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\nbare:x:1002:1002::\nbroken\n"
    )
    (path / "etc/group").write_text("root:x:0:\nwheel:x:10:root,app\napp:x:1001:\nstaff:x:50:app\n")
    return path


def make_block(pki: Pki, server: BuildServer, ping_interval: float = 5.0) -> wire.BootstrapBlock:
    return wire.BootstrapBlock(
        host_port=server.host_port,
        ca_chain=pki.ca.decode(),
        cert=pki.guest.cert.decode(),
        key=pki.guest.key.decode(),
        server_name=SERVER_NAME,
        ping_interval=ping_interval,
    )


@dataclass
class Outcome:
    status: int
    stderr: str


@dataclass
class Build:
    """Everything around one vminit; `image` may be changed before `run`."""

    pki: Pki
    server: BuildServer
    image: Path
    directory: Path
    runtime: Runtime
    idmap: IdMap
    outside: Path
    extra_binds: list[Bind] = field(default_factory=list)
    ping_interval: float = 5.0
    key_override: str | None = None
    block_changes: dict[str, str | None] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    read_only: bool = False

    def start(self, *commands: wire.AnyCommand | str, python: Sequence[str] = ()) -> Running:
        self.server.commands = list(commands)
        self.server.old = self.server.old or any(isinstance(command, str) for command in commands)
        document = {**make_block(self.pki, self.server, self.ping_interval).as_json(), **self.block_changes}
        bootstrap = {name: value for name, value in document.items() if value is not None}
        socket = self.directory / "mmds" / "mmds.sock"
        store = DataStore()
        store.put({"latest": {"meta-data": {"Bootstrap": bootstrap}}})
        emulator = MetadataEmulator(store, socket)
        emulator.start()
        binds = [
            *self.runtime.binds,
            *self.extra_binds,
            Bind(socket.parent, "/run/firebuild"),
            Bind(self.image, "/image", read_only=self.read_only),
        ]
        measured = Measured.current(self.directory)
        argv = self.runtime.module("firebuild_bootstrap.guest.main")
        if measured is not None:
            argv, binds = measured.command(self.runtime), [*binds, *measured.binds]
        argv += ["bootstrap", "--root", "/image", "--mmds", "unix:/run/firebuild/mmds.sock", *self.arguments]
        process = Sandbox(self.idmap).popen(
            argv, binds=binds, env=self.runtime.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        return Running(process, emulator, measured)

    def run(self, *commands: wire.AnyCommand | str, timeout: float = 60) -> Outcome:
        with self.start(*commands) as running:
            return running.finish(timeout)

    def succeed(self, *commands: wire.AnyCommand | str) -> Outcome:
        outcome = self.run(*commands)
        assert (outcome.status, self.server.successes, self.server.aborts) == (0, 1, []), outcome.stderr
        return outcome

    def fail(self, *commands: wire.AnyCommand | str) -> Any:
        """Run a build that has to end in one Abort, and return that."""
        outcome = self.run(*commands)
        assert (outcome.status, self.server.successes, len(self.server.aborts)) == (1, 0, 1), outcome.stderr
        return self.server.aborts[0]

    def mode(self, path: str) -> int:
        return stat.S_IMODE((self.image / path).lstat().st_mode)

    def owner(self, path: str) -> tuple[int, int]:
        found = os.lstat(self.image / path)
        return found.st_uid, found.st_gid


class Measured:
    """Measures the coverage of what runs in the sandbox, where the suite itself is measured."""

    def __init__(self, directory: Path, data_file: str) -> None:
        self._directory = Path(tempfile.mkdtemp(dir=directory))
        self._directory.chmod(0o1777)
        self._data_file = data_file
        self._tests = Path(__file__).parents[1]
        self.binds = [Bind(self._tests), Bind(self._directory, "/coverage", read_only=False)]

    @classmethod
    def current(cls, directory: Path) -> Measured | None:
        measuring = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
        return cls(directory, measuring.config.data_file) if measuring else None

    def command(self, runtime: Runtime) -> list[str]:
        return [*runtime.python, str(self._tests / "guest/covered.py")]

    def collect(self) -> None:
        for part in self._directory.glob("part.*"):
            data = sys.modules["coverage"].CoverageData(f"{self._data_file}.{part.name}")
            data.loads(part.read_bytes())
            data.write()


class Running:
    """A vminit that has been started."""

    def __init__(
        self, process: SandboxProcess, emulator: MetadataEmulator, measured: Measured | None
    ) -> None:
        self.sandbox = process
        self._measured = measured
        self._emulator = emulator

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.sandbox.kill()
        self._emulator.stop()
        if self._measured is not None:
            self._measured.collect()
        for stream in (self.sandbox.process.stdout, self.sandbox.process.stderr):
            if stream is not None:
                stream.close()

    def finish(self, timeout: float = 60) -> Outcome:
        status = self.sandbox.wait(timeout)
        assert status is not None, "vminit did not end in time"
        assert self.sandbox.stderr is not None
        return Outcome(status, self.sandbox.stderr.read().decode())
