"""One Dockerfile, built by two guests: ours and an old one, each with our server and an image of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.events import Event, StepFinished, StepOutput, StepStarted
from firebuild_bootstrap.lowering import WireStep, lower
from firebuild_bootstrap.mmds import DataStore, MetadataDocument, MetadataEmulator, bootstrap_block
from firebuild_bootstrap.mmds.protocol import MmdsVersion
from firebuild_bootstrap.sandbox import Bind, IdMap, Runtime, Sandbox
from firebuild_bootstrap.service import BootstrapServer, Limits, Outcome, StepInfo
from firebuild_pki import TLSMaterial

BUSYBOX = Path("/bin/busybox")
TESTS = Path(__file__).parents[1]
TOOLS = ["cat", "chmod", "chown", "env", "ln", "mkdir", "mv", "readlink", "rm", "sha256sum", "stat", "touch"]
_APPLETS = (
    *("cat", "chmod", "chown", "echo", "env", "id", "ln", "ls", "mkdir", "mv", "printf", "pwd", "readlink"),
    *("rm", "sh", "sha256sum", "sleep", "stat", "su", "touch", "true", "head", "tr", "dd", "awk", "kill"),
)
_PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\nbare:x:1002:1002::\nbroken\n"
_GROUP = "root:x:0:\nwheel:x:10:root,app\napp:x:1001:\nstaff:x:50:app\n"


def make_image(path: Path) -> Path:
    """Create a root with a shell, the tools that scripts need, and a few users."""
    for name in ("", "bin", "dev", "proc", "etc", "home/app"):
        (path / name).mkdir(parents=True, exist_ok=True)
        (path / name).chmod(0o755)
    shutil.copy2(BUSYBOX, path / "bin/busybox")
    for applet in _APPLETS:
        (path / "bin" / applet).symlink_to("busybox")
    (path / "etc/passwd").write_text(_PASSWD)
    (path / "etc/group").write_text(_GROUP)
    return path


def install(name: str, image: Path) -> None:
    """Put a program of the host into the image, with the libraries that it needs."""
    found = shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin")
    assert found is not None
    (image / "bin" / name).unlink(missing_ok=True)
    listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    libraries = [word for word in listed.split() if word.startswith("/")]
    for path in (found, *libraries):
        target = image / "bin" / name if path == found else image / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def gnu(image: Path) -> None:
    """dash and the tools of GNU in place of busybox."""
    (image / "bin/busybox").unlink()
    for path in (image / "bin").iterdir():
        path.unlink()
    for name in (*TOOLS, "env", "dash"):
        install(name, image)
    (image / "bin/sh").symlink_to("dash")


@dataclass
class Result:
    """How one build went."""

    image: Path
    outcome: Outcome
    events: list[Event]
    report: dict[str, Any]
    words: str

    def output(self, step: int, stream: str = "stdout") -> bytes:
        return b"".join(
            event.data
            for event in self.events
            if isinstance(event, StepOutput) and (event.step, event.stream) == (step, stream)
        )

    @property
    def steps(self) -> list[tuple[str, int, int]]:
        told = []
        for event in self.events:
            if isinstance(event, StepStarted):
                told.append(("started", event.step, event.line))
            if isinstance(event, StepFinished):
                told.append(("finished", event.step, event.exit_code))
        return told

    def tree(self, *, times: bool = True) -> dict[str, tuple[Any, ...]]:
        """Describe the image: kind, mode, owner, content, time, and which names are one file."""
        found: dict[str, tuple[Any, ...]] = {}
        first: dict[int, str] = {}
        for path in sorted(self.image.rglob("*")):
            name = str(path.relative_to(self.image))
            if name.split("/", maxsplit=1)[0] in ("dev", "proc", "bin") and name not in ("dev", "proc"):
                continue
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            content = ""
            if stat.S_ISLNK(kind):
                content = os.readlink(path)
            elif stat.S_ISREG(kind):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            same = first.setdefault(status.st_ino, name)
            # What a build writes by itself gets the time of the build; sources are older.
            time = int(status.st_mtime) if times and status.st_mtime < 1_700_000_000 else None
            found[name] = (kind, oct(status.st_mode), status.st_uid, status.st_gid, content, time, same)
        return found


@dataclass
class House:
    """Builds a Dockerfile with either guest."""

    directory: Path
    materials: tuple[TLSMaterial, TLSMaterial]
    runtime: Runtime
    idmap: IdMap
    limits: Limits = field(default_factory=Limits)
    ping_interval: float = 5.0
    change_image: Callable[[Path], object] = lambda image: None
    on_output: Callable[[], object] = lambda: None
    on_server: Callable[[BootstrapServer], object] = lambda server: None
    _count: int = 0

    @property
    def context(self) -> Path:
        path = self.directory / "context"
        path.mkdir(exist_ok=True)
        return path

    def file(self, name: str, content: str | bytes = "", *, mode: int = 0o644, time: float = 1.6e9) -> Path:
        """Write a file of the build context."""
        path = self.context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        os.utime(path, (time, time))
        return path

    @contextmanager
    def plan(self, dockerfile: str) -> Iterator[tuple[WireStep, ...]]:
        for directory, _, _ in os.walk(self.context):
            os.utime(directory, (1.5e9, 1.5e9))
        with BuildContext(self.context) as context:
            source = DockerfileSource("Dockerfile", f"FROM scratch\n{dockerfile}")
            graph = read_graph(source, images=_NoBases())
            yield lower(graph.target, lambda _: context)

    def new(self, dockerfile: str) -> Result:
        """Build with our own guest."""
        module = self.runtime.module("firebuild_bootstrap.guest.main", "bootstrap")
        return self._build(
            dockerfile,
            lambda address: [*module, "--root", "/image", "--mmds", address],
            MmdsVersion.V2,
        )

    def link(self, name: str, text: str) -> None:
        path = self.context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(text)
        os.utime(path, (1.4e9, 1.4e9), follow_symlinks=False)

    def old(self, dockerfile: str, **variations: Any) -> Result:
        """Build with an old guest; see old_guest.py for the variations."""
        program = str(TESTS / "legacy/old_guest.py")
        return self._build(
            dockerfile,
            lambda address: [*self.runtime.python, program, address, "/image", json.dumps(variations)],
            MmdsVersion.V1,
        )

    def both(self, dockerfile: str, **variations: Any) -> tuple[Result, Result]:
        """Build with both; they have to succeed and come to the same image."""
        new, old = self.new(dockerfile), self.old(dockerfile, **variations)
        for result in (new, old):
            assert result.outcome.message == "", (result.outcome, result.words, result.events)
        a, b = old.tree(), new.tree()
        assert a == b, [(k, a.get(k), b.get(k)) for k in {*a, *b} if a.get(k) != b.get(k)]
        assert old.steps == new.steps
        return new, old

    def _build(self, dockerfile: str, command: Callable[[str], list[str]], version: MmdsVersion) -> Result:
        self._count += 1
        image = make_image(self.directory / f"image-{self._count}")
        self.change_image(image)
        events: list[Event] = []
        store = DataStore()
        with self.plan(dockerfile) as steps, self._server(steps, events) as server:
            address = server.start()
            self.on_server(server)
            block = bootstrap_block(
                self.materials[1], host_port=address, ping_interval=self.ping_interval, host_time=0.0
            )
            store.put(MetadataDocument(bootstrap=block, vmm_id="b1", image_tag="t").to_json())
            emulator = MetadataEmulator(store, ("127.0.0.1", 0), version=version)
            binds = [*self.runtime.binds, Bind(TESTS), Bind(image, "/image", read_only=False)]
            try:
                process = Sandbox(self.idmap).popen(
                    command(emulator.start()),
                    binds=binds,
                    env={**self.runtime.env, "GRPC_VERBOSITY": "NONE"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                try:
                    stdout, stderr = process.process.communicate(timeout=60)
                    outcome = server.wait(10)
                finally:
                    process.kill()
            finally:
                emulator.stop()
        assert outcome is not None, stderr.decode()
        report = json.loads(stdout) if stdout else {}
        return Result(image, outcome, events, report, stderr.decode())

    def _server(self, steps: tuple[WireStep, ...], events: list[Event]) -> BootstrapServer:
        return BootstrapServer(
            commands=[step.command for step in steps],
            resources={name: resource for step in steps for name, resource in step.resources.items()},
            steps=[StepInfo(step.number, step.line, step.instruction) for step in steps],
            total_steps=1 + len(steps),
            server_material=self.materials[0],
            guest_material=self.materials[1],
            events=lambda event: self._happened(events, event),
            limits=self.limits,
        )

    def _happened(self, events: list[Event], event: Event) -> None:
        events.append(event)
        if isinstance(event, StepOutput):
            self.on_output()


class _NoBases:
    def resolve(self, reference: str) -> Any:
        raise AssertionError(reference)
