"""What the end-to-end tests share: the installed command, as a user would call it."""

from __future__ import annotations

import mmap
import os
import platform
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer
from typing import TYPE_CHECKING

from firebuild_bootstrap.errors import BuildTimeout, GuestLost, StepFailed
from firebuild_bootstrap.guest import kernel
from firebuild_bootstrap.sandbox import SandboxError, detect

if TYPE_CHECKING:
    from firebuild_bootstrap.service import Outcome

BIN = Path(sys.executable).parent
REPO = Path(__file__).resolve().parents[1]
# Of `tests/oracle/buildkit/build` and `tests/initramfs/fetch openrc`; the variables name other places.
BUILDKIT = Path(os.environ.get("TESTS_BUILDKIT", "/var/cache/firebuild-tests/buildkit"))
OPENRC = Path(os.environ.get("TESTS_OPENRC", "/var/cache/firebuild-tests/openrc"))
# Where `fetch` of the plugin for step-ca puts one.
_STEP_CA = "/var/cache/firebuild-tests/step-ca"


def step_ca_program() -> str | None:
    """Find step-ca."""
    return shutil.which("step-ca") or shutil.which("step-ca", path=_STEP_CA)


def ending_of(outcome: Outcome) -> str:
    """Name the kind of end that an outcome is."""
    match outcome.error:
        case None:
            return "success"
        case StepFailed():
            return "aborted"
        case GuestLost():
            return "lost"
        case BuildTimeout():
            return "timeout"
        case _:
            return "server-error"


def unmeasured() -> dict[str, str]:
    """The environment of a process that runs without coverage, though the tests are measured.

    Coverage takes a lock in each new file, and waits for the lock for ever if a signal that comes then ends
    the process: whoever interrupts a process at any moment needs one without. It also doubles the time of
    short ones.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def this_machine() -> str:
    """Say in a line where this runs, for figures that depend on it."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    cores = f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), {memory} GiB"
    return f"{cores}, {release}, Linux {platform.release()}, Python {platform.python_version()}"


def unique_seconds() -> str:
    """A number of seconds by which to find one's own `sleep` among those of other tests."""
    return str(10**6 + secrets.randbelow(10**6))


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc_pid_status(5), SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) & 1 << (number - 1))


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Wait until the condition holds, and say whether it did within the limit."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(holds)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as another user than root, who may read what everybody may."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@contextmanager
def serving(server: BaseServer) -> Iterator[None]:
    """Serve from a thread, and close the server, whatever happens meanwhile.

    A server that is closed while its thread still serves takes a processor until the process ends: the number
    of its descriptor is another file's by then.
    """
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class FilesHandler(SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_files(directory: Path, handler: type[FilesHandler] = FilesHandler) -> Iterator[str]:
    """Serve the files of a directory by HTTP; yields `ADDRESS:PORT`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(directory)))
    with serving(server):
        yield f"127.0.0.1:{server.server_port}"


def said_without_home(imports: str, code: str) -> str:
    """Run Python code as a user who has no entry and no HOME; return what it wrote to standard error.

    The imports are done before, because another user need not be able to read this checkout.
    """
    program = f"import os\n{imports}\nos.setgroups([])\nos.setgid(54321)\nos.setuid(54321)\n{code}\n"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={}, capture_output=True, text=True, check=False).stderr


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Take all descriptors that this process may still open, until the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 20, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def leftovers(home: Path, seconds: float = 10.0) -> list[str]:
    """Name what builds left in a store: in `builds` now, and in `removing` after a while."""
    builds = _entries(home / "builds")
    eventually(lambda: not _entries(home / "removing"), seconds)
    return sorted(str(path) for path in (*builds, *_entries(home / "removing")) if path.is_dir())


def writable_memory(pid: int) -> Iterator[bytes]:
    """Yield what a process of ours may write to, in pieces without holes.

    Of the stack of a thread a page may be none that can be read (EIO): glibc 2.42 makes guards with
    MADV_GUARD_INSTALL, which are part of the mapping.
    """
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in maps:
            span, mode, *_ = line.split()
            start, end = (int(one, 16) for one in span.split("-"))
            while mode.startswith("rw") and "[v" not in line and start < end:
                file.seek(start)
                piece = b""
                with suppress(OSError):
                    piece = file.read(end - start)
                yield piece
                start += len(piece) or mmap.PAGESIZE


@cache
def note_of_ids() -> str:
    """Return what each build and run tells a user who has no subordinate ids; empty to others."""
    with suppress(SandboxError):
        return detect().note
    return ""


def unwarned(said: str) -> str:
    """Leave out the warning of each build and run of a user who has no subordinate ids."""
    return said.replace(f"warning: {note}\n", "") if (note := note_of_ids()) else said


def await_end_of_processes(home: Path, seconds: float = 30.0) -> None:
    """Wait until no process names a store: the cleanup process of a build outlives it, and writes there."""
    named = os.fsencode(home)
    assert eventually(lambda: not _naming(named), seconds), _naming(named)


def _naming(text: bytes) -> list[bytes]:
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            lines.append(entry.read_bytes())
    return [line for line in lines if text in line]


def family(pids: set[int]) -> set[int]:
    """Return some processes and all that descend from them, as far as their parents live."""
    children = dict[int, list[int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            text = path.read_text(errors="replace")
            parent = int(text.rpartition(")")[2].split()[1])  # proc_pid_stat(5)
            children.setdefault(parent, []).append(int(path.parent.name))
    found, rest = set[int](), list(pids)
    while rest:
        pid = rest.pop()
        if pid not in found:
            found.add(pid)
            rest += children.get(pid, [])
    return found


def peak(pid: int) -> int | None:
    """Return the most bytes of a process that were ever in memory; None after its end (proc_pid_status(5)).

    What wait4(2) says counts its parent's too, whose memory it has until it executes its program.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)  # what waits for its parent has none
    return int(found[1]) * 1024 if found else None


def highest_peak(pids: Iterable[int]) -> int:
    """Return the highest peak of the processes that have not ended; 0 where all have."""
    return max((peak(pid) or 0 for pid in pids), default=0)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def privately(function: Callable[[], None]) -> None:
    """Call it in a mount namespace of its own: that of a thread, which its children share."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
            function()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


@dataclass(frozen=True)
class Firebuild:
    """The `firebuild` command with a store of its own."""

    home: Path
    program: Path = BIN / "firebuild"

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "FIREBUILD_HOME": str(self.home)}

    def __call__(
        self,
        *arguments: str | Path,
        status: int = 0,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        timeout: float = 150,
    ) -> subprocess.CompletedProcess[str]:
        """Run it and expect an exit status; stdout and stderr are text."""
        done = subprocess.run(
            [self.program, *map(str, arguments)],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            cwd=cwd,
            env={**self.environ, **(environ or {})},
            timeout=timeout,
            check=False,
        )
        report = f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == status, report
        assert "Traceback" not in done.stderr, report
        return done

    def popen(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start it with pipes, in a process group of its own."""
        return subprocess.Popen(
            [self.program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=self.environ,
            start_new_session=True,
        )

    def leftovers(self) -> list[str]:
        """Name what a build left in the store besides bases and images."""
        return leftovers(self.home)
