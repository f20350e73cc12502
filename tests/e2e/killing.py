"""Commands of all kinds that are killed at any moment; whatever comes next finds a sound store."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from assurance.commands import Started
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.names import Reference
from registry.servers import CA, PASSWORD, USER, debian_registry
from support import Firebuild, await_end_of_processes, unmeasured

FORMS = {"ext4": "mke2fs", "tar": "", "erofs": "mkfs.erofs", "squashfs": "sqfstar", "dir": "", "oci": "",
         "docker": ""}  # fmt: skip
APP = Reference("app", "1")
STAGES = """\
FROM scratch AS tools
COPY sh /bin/sh
COPY sh /bin/mkdir
FROM tools AS one
RUN --mount=type=bind,source=data,target=/in mkdir -p /one && echo 1 > /one/f
RUN --mount=type=tmpfs,target=/t echo 2 > /t/f && echo 2 > /one/g
FROM tools AS two
RUN --mount=type=cache,target=/c,sharing=locked mkdir -p /two /c/d && echo 1 > /two/f
RUN --network=none echo 2 > /two/g
FROM tools
COPY --from=one /one /one
COPY --from=two /two /two
RUN --mount=type=bind,from=one,target=/o echo done > /done
"""
"""Stages that run side by side, with mounts of all kinds."""


@dataclass(frozen=True)
class Work:
    """A command, and what has to be there, or not there, so that it has something to do."""

    words: tuple[str, ...]
    app: bool = False
    fresh: bool = False
    dest: Path | None = None
    slow: bool = False


class Harness:
    """One store, and the files that commands write beside it.

    Args:
        directory: for all of it.
        registry: host of a registry that takes pushes; none, if it is empty.
        environ: more variables of the commands.
        kernel: what QEMU boots; without it there is no work with QEMU.
    """

    def __init__(
        self,
        directory: Path,
        registry: str = "",
        environ: dict[str, str] | None = None,
        kernel: Path | None = None,
    ) -> None:
        self.home = directory / "home"
        self._environ = {**unmeasured(), "FIREBUILD_HOME": str(self.home), "SOURCE_DATE_EPOCH": "0"}
        self._environ |= {"FIREBUILD_PULL": "missing" if registry else "never", **(environ or {})}
        self._context = directory / "context"
        self._out = directory / "out"
        self._saved = directory / "saved.tar"
        self._shared = directory / "shared-cache"
        self._kernel = kernel
        self._registry = registry
        self._pushed = Reference.parse(f"{registry or 'none'}/app:1")
        self._digests: dict[str, str] = {}
        self._seconds: dict[tuple[str, ...], float] = {}
        self.killed = Counter[str]()
        self.ended = Counter[str]()
        for folder in (self._context, self._out):
            folder.mkdir(parents=True)
        shutil.copy("/bin/busybox", self._context / "sh")
        (self._context / "data").write_bytes(random.Random(1).randbytes(4_000_000))
        (self._context / "Dockerfile").write_text(
            "FROM scratch AS tools\nCOPY sh /bin/sh\nCOPY sh /bin/mkdir\n"
            "FROM tools\nRUN for i in 1 2 3 4 5 6 7 8 9; do mkdir -p /d/$i/$i; echo $i > /d/$i/f; done\n"
            "COPY data /data\nRUN --mount=type=cache,target=/c echo 1 >> /c/x; echo done > /done\n"
        )
        (self._context / "Stages").write_text(STAGES)
        self.run("build", "-q", "-t", str(APP), str(self._context))
        self.run("images", "tag", str(APP), "app:saved")
        self.run("images", "save", "app:saved", "-o", str(self._saved))
        if registry:
            self.run("images", "tag", str(APP), f"{registry}/app:1")
            self.run("images", "push", f"{registry}/app:1")

    def run(self, *words: str, status: int = 0) -> str:
        """Run a command to its end, which has to be this one."""
        done = self._ended(words)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _ended(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [Firebuild(self.home).program, *words],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def works(self) -> dict[str, Work]:
        """Return all commands by their names."""
        works = {
            "build": Work(("build", "--no-cache", "-q", "-t", str(APP), str(self._context))),
            "build again": Work(("build", "-q", "-t", str(APP), str(self._context)), fresh=True),
            "load": Work(("images", "load", str(self._saved)), fresh=True),
            "save": Work(
                ("images", "save", str(APP), "-o", str(self._out / "saved.tar")),
                app=True,
                dest=self._out / "saved.tar",
            ),
            "base": Work(("base", "import", "tree", str(self._context))),
            "tag": Work(("images", "tag", str(APP), "app:2"), app=True),
            "rm": Work(("images", "rm", str(APP)), app=True),
            "cache prune": Work(("cache", "prune", "--all"), app=True),
            "images prune": Work(("images", "prune"), app=True),
        }
        for form, program in FORMS.items():
            if not program or shutil.which(program):
                dest = self._out / f"app.{form}"
                words = ("images", "export", str(APP), "-o", f"{form},dest={dest}")
                works[f"export {form}"] = Work(words, app=True, dest=dest)
        if self._registry:
            works["pull"] = Work(("images", "pull", f"{self._registry}/app:1"), fresh=True)
            works["push"] = Work(("images", "push", f"{self._registry}/app:1"))
        return works | self._machines()

    def _machines(self) -> dict[str, Work]:
        """Return what starts several machines, or keeps one, or shares what it made."""
        context = str(self._context)
        stages = ("build", "-q", "--no-cache", "-t", "app:stages", "-f", f"{context}/Stages", context)
        shared = str(self._shared)
        words = ("/bin/sh", "-c", "for i in 1 2 3; do echo $i > /f; done; echo over")
        run = ("run", "--machine", "local")
        works = {
            "build of stages": Work(stages),
            "build --cache-to": Work((*stages, "--cache-to", f"type=local,dest={shared},mode=max")),
            "build --cache-from": Work(
                (
                    "build",
                    "-q",
                    "-f",
                    f"{context}/Stages",
                    "--cache-from",
                    f"type=local,src={shared}",
                    context,
                ),
                fresh=True,
            ),
            "run": Work((*run, str(APP), *words), app=True),
            "run --detach": Work((*run, "--detach", "--rm", str(APP), *words), app=True),
        }
        if self._kernel:
            works["run in QEMU"] = Work(("run", "--machine", "qemu", str(APP), *words), app=True, slow=True)
            works["build in QEMU"] = Work((*stages, "--machine", "qemu"), slow=True)
        return works

    def kill(self, name: str, chance: random.Random) -> None:
        """Run a command, kill it at some moment, and see that the store is sound."""
        work = self.works()[name]
        self._prepare(work)
        limit = self._seconds.get(work.words, 20 if work.slow else 0.8)
        moment = chance.random() * limit
        started = time.monotonic()
        process = subprocess.Popen(
            [Firebuild(self.home).program, *work.words],
            env=self._environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if process.poll() is None:
            process.kill()
            process.communicate()
            self._seconds[work.words] = limit * 1.1  # it may take longer
            while chance.random() < 0.5 and (pids := self._processes()):  # none cleans up then
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self.killed[name] += 1
        else:
            assert process.returncode == 0, (name, process.communicate()[1])
            process.communicate()
            self.ended[name] += 1
            self._seconds[work.words] = time.monotonic() - started
        self._check(name, work)

    def _prepare(self, work: Work) -> None:
        with closing(Home(self.home)) as home:
            if work.fresh:
                for tag in home.images.names():
                    with suppress(InputError):
                        home.images.remove(tag)
                home.cache.prune(everything=True)
                home.blobs.sweep()
            there = home.images.find(APP) is not None
            pulled = not self._registry or home.images.find(self._pushed) is not None
        if work.dest is not None:
            shutil.rmtree(work.dest) if work.dest.is_dir() else work.dest.unlink(missing_ok=True)
            if there:
                self.run("images", "rm", str(APP))
                there = False
        if work.words[1] == "push" and not pulled:
            self.run("build", "-q", "-t", str(self._pushed), str(self._context))
        if work.app and not there:
            self.run("build", "-q", "-t", str(APP), str(self._context))

    def prepare(self, name: str) -> None:
        """Make what a command needs, and remove what it makes."""
        self._prepare(self.works()[name])

    def start(self, name: str) -> Started:
        """Start a command, and leave its end to the caller."""
        return Started(self.works()[name].words, self._environ)

    def check(self, name: str) -> None:
        """See that the store is sound, and what a command wrote whole or not there."""
        self._check(name, self.works()[name])

    def repair(self) -> None:
        """Do what `store check` says: after a power failure an image may have lost layers, and says so."""
        found = self._ended(("store", "check", "--repair"))
        for lost in set(re.findall(r"is missing: `firebuild images rm (\S+)`, and build,", found.stdout)):
            self.run("images", "rm", lost)
        self.run("store", "check", "--repair")

    def build(self) -> None:
        """Build, which has to succeed."""
        self.run("build", "-q", "-t", str(APP), str(self._context))

    def _processes(self) -> list[int]:
        """All that name the store, but for zombies."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if os.fsencode(self.home) in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def _check(self, name: str, work: Work) -> None:
        found = self.run("store", "check")
        assert found.startswith("sound"), (name, found)
        if work.dest is not None and work.dest.exists():
            digest = _digest(work.dest)
            assert self._digests.setdefault(name, digest) == digest, f"{name} left a part of {work.dest}"

    def measure(self) -> None:
        """Run every command once, so that its time and what it writes are known."""
        for name, work in self.works().items():
            self._prepare(work)
            started = time.monotonic()
            self.run(*work.words)
            self._seconds[work.words] = time.monotonic() - started
            self._check(name, work)

    def nothing_is_left(self) -> None:
        """Remove everything that has a name; then nothing else may be there."""
        if runs := self.run("ps", "--all", "-q").split():
            self.run("rm", "--force", *runs)
        self.run("build", "-q", "-t", str(APP), str(self._context))  # its cleanup ends what waits forever
        await_end_of_processes(self.home)
        tags = {line.split()[0] for line in self.run("images", "list").splitlines()[1:]}
        self.run("images", "rm", *tags)
        if "tree" in self.run("base", "list"):
            self.run("base", "rm", "tree")
        self.run("cache", "prune", "--all")
        self.run("images", "prune")
        assert self.run("ps", "--all", "-q") == ""
        for pattern in ("*/staging/*", "*/content/*", "layers/*/*/*-*", "blobs/sha256/*", "builds/*-*"):
            left = list(self.home.glob(pattern))
            assert left == [], left
        # What a killed export has left beside its destination is removed by the next.
        self.run("build", "-q", "-t", str(APP), "-o", f"tar,dest={self._out / 'app.tar'}", str(self._context))
        beside = {path.name for path in self._out.iterdir()}
        assert beside <= {work.dest.name for work in self.works().values() if work.dest}, beside


def _digest(path: Path) -> str:
    if path.is_dir():
        return str(sorted((str(each.relative_to(path)), each.lstat().st_size) for each in path.rglob("*")))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def registry_of(directory: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Start Debian's registry; yield its host, and the environment of a command that may use it."""
    ca = CA.made(directory)
    with debian_registry(directory, ca) as host:
        config = directory / "firebuild.yaml"
        login = f"username: {USER}, password: {{env: REGISTRY_PASSWORD}}"
        config.write_text(f"registries: {{hosts: {{'{host}': {{ca_file: {ca.certificate}, {login}}}}}}}\n")
        yield host, {"REGISTRY_PASSWORD": PASSWORD, "FIREBUILD_CONFIG": str(config)}
