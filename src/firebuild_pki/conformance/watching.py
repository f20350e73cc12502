"""Noticing what a provider does to its process and to the machine: the usual ways of Python code are watched.

An audit hook (`sys.addaudithook`) would see more, but it can never be removed, and it runs within
everything that the rest of the process does. What other threads do meanwhile does not count: a backend of the
author's tests may run in one of them.
"""

from __future__ import annotations

import builtins
import fcntl
import gc
import io
import locale
import logging
import os
import resource
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Any, TextIO
from unittest import mock
from weakref import WeakSet

from firebuild_pki.values import dataclass

_FILES = ("stat", "lstat", "access", "open", "listdir", "scandir", "readlink", "mkdir", "rmdir", "unlink")
_CHANGES = ("remove", "rename", "replace", "link", "symlink", "chmod", "chown", "utime", "truncate", "system")

_PLACES: tuple[tuple[Any, str, str], ...] = (
    *((os, name, f"os.{name}") for name in (*_FILES, *_CHANGES)),
    (builtins, "open", "open"),
    (io, "open", "open"),
    (socket, "getaddrinfo", "socket.getaddrinfo"),
    (socket.socket, "__init__", "socket.socket"),
    (subprocess.Popen, "__init__", "subprocess.Popen"),
)


class _Watch(threading.local):
    """What the thread did since it is watched; None while it is not."""

    seen: list[str] | None = None


_watch = _Watch()


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect the input and output of this thread; what other threads do meanwhile does not count."""
    seen: list[str] = []
    with ExitStack() as patches:
        for owner, name, words in _PLACES:
            watching = _noted(getattr(owner, name), words)
            patches.enter_context(mock.patch.object(owner, name, watching))
        _watch.seen = seen
        patches.callback(setattr, _watch, "seen", None)
        yield seen


def _noted(function: Callable[..., Any], words: str) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        if _watch.seen is not None:
            what = [repr(one) for one in arguments[:1] if isinstance(one, str | bytes | os.PathLike)]
            _watch.seen.append(" ".join([words, *what]))
        return function(*arguments, **more)

    return call


MAX_READ = 1 << 20
"""Bytes that are looked at of a file or a stream."""

LEFT_SECONDS = 1.0
"""How long child processes and threads may take to end after close()."""

_PUBLIC = (0o011, 0o044)
"""Modes with which others get through a directory, and read a file."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that was opened for writing.

    Args:
        path: where it was then.
        exposed: other users could read it.
        removed: it was gone in the end.
        text: what was in it in the end, also if it was removed.
    """

    path: str
    exposed: bool
    removed: bool
    text: str = field(repr=False)


@dataclass(frozen=False, slots=True)
class Traces:
    """What was done while it was traced; complete when that is over.

    Args:
        printed: name of the stream -> what was written to it, also by child processes.
        commands: child processes with their arguments.
        variables: environment variables that were set, however briefly, with their values.
        files: files that were written.
        changes: what of the process was different after a call than in the beginning.
        left: files in the directory for temporary files, child processes, threads and open descriptors that
            were there in the end.
    """

    printed: Mapping[str, str] = field(default_factory=dict, repr=False)
    commands: list[str] = field(default_factory=list, repr=False)
    variables: list[tuple[str, str]] = field(default_factory=list, repr=False)
    files: list[WrittenFile] = field(default_factory=list)
    changes: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    before: Mapping[str, object] = field(default_factory=dict, repr=False)

    def look(self, when: str) -> None:
        """Compare the state of the process with that in the beginning."""
        now = _state()
        for what in self.before.keys() | now.keys():
            if self.before.get(what) != now.get(what):
                self.changes.setdefault(what, when)


@contextmanager
def traced() -> Iterator[Traces]:
    """Trace what this thread does, and the threads that it starts, and undo what is undone easily.

    Temporary files get a directory of their own, and the standard streams lead into memory.
    """
    with ExitStack() as stack:
        place = tempfile.mkdtemp(prefix="firebuild-kit-")
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        os.chmod(place, 0o755)  # noqa: S103 - as open to others as /tmp, which it stands for
        stack.enter_context(restored())
        stack.enter_context(mock.patch.object(tempfile, "tempdir", place))
        os.environ["TMPDIR"] = place
        tracer = _Tracer(Traces(before=_state()), place)
        stack.callback(tracer.finish)
        traces = tracer.traces
        traces.printed = stack.enter_context(_streams(tracer.counts))
        for owner, name, watching in tracer.patches():
            stack.enter_context(mock.patch.object(owner, name, watching))
        yield traces


def _state() -> dict[str, object]:
    """Describe what belongs to the whole process, so that a change hits every build in it."""
    variables = {f"the environment variable {name}": value for name, value in os.environ.items()}
    # asking umask(2) means to change it for a moment; Python can ask for handlers of its own only
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    log = logging.getLogger()
    return {
        **variables,
        "the working directory": os.readlink("/proc/self/cwd"),
        "the umask": status["Umask"],
        "what signals do": (status["SigIgn"], status["SigCgt"]),
        "the set-up of logging": (log.level, tuple(log.handlers), logging.root.manager.disable),
        "the default context of ssl": ssl._create_default_https_context,
        "the limit of open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "the hook for uncaught exceptions": sys.excepthook,
        "the priority": os.getpriority(os.PRIO_PROCESS, 0),
        "the default timeout of sockets": socket.getdefaulttimeout(),
        "the locale": locale.setlocale(locale.LC_ALL),
    }


@contextmanager
def restored() -> Iterator[None]:
    """Put back what belongs to the whole process: what one check leaves would be normal for the next."""
    variables = dict(os.environ)
    timeout, language = socket.getdefaulttimeout(), locale.setlocale(locale.LC_ALL)
    directory, mask = os.open(".", os.O_PATH | os.O_DIRECTORY), os.umask(0o077)
    os.umask(mask)
    log, context, hook = logging.getLogger(), ssl._create_default_https_context, sys.excepthook
    level, handlers, disabled = log.level, log.handlers[:], log.manager.disable
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield
    finally:
        os.fchdir(directory)
        os.close(directory)
        os.umask(mask)
        socket.setdefaulttimeout(timeout)
        locale.setlocale(locale.LC_ALL, language)
        log.level, log.handlers[:], log.manager.disable = level, handlers, disabled
        log.manager._clear_cache()  # type: ignore[attr-defined]
        ssl._create_default_https_context, sys.excepthook = context, hook
        with suppress(ValueError):  # a hard limit goes down for good
            resource.setrlimit(resource.RLIMIT_NOFILE, files)
        # one by one, since a backend of the tests may be looking at the others
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in variables.items() if os.environ.get(name) != value})


class _Tracer:
    """Stands in for the functions that are watched, for the threads that count."""

    def __init__(self, traces: Traces, place: str) -> None:
        self.traces = traces
        self._place = place
        self._threads: WeakSet[threading.Thread] = WeakSet([threading.current_thread()])
        self._not_counted: set[str] = set()
        self._children: dict[int, str] = {}
        self._spawning: set[int] = set()
        self._written: dict[tuple[int, int], tuple[int, str, bool]] = {}
        self._descriptors: dict[int, tuple[int, int]] = {}
        self._open = os.open

    def counts(self) -> bool:
        """Tell whether what this thread does counts."""
        return threading.current_thread() in self._threads

    def patches(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """List what to replace: owner, name, replacement."""
        yield threading.Thread, "start", self._before(threading.Thread.start, self._starting)
        yield os, "putenv", self._before(os.putenv, self._setting)
        yield os, "system", self._before(os.system, self._running)
        yield subprocess.Popen, "__init__", self._spawned(subprocess.Popen.__init__, 1)
        for name in ("posix_spawn", "posix_spawnp"):
            yield os, name, self._spawned(getattr(os, name), 1)
        yield os, "fork", self._spawned(os.fork, None)
        for owner in (builtins, io, os):
            yield owner, "open", self._opened(owner.open)
        yield os, "mkdir", self._opened(os.mkdir)
        yield socket.socket, "__init__", self._connecting(socket.socket.__init__)
        for name in ("spawnv", "spawnve", "spawnvp", "spawnvpe"):
            yield os, name, self._before(getattr(os, name), lambda *found: self._running(found[2]))

    def finish(self) -> None:
        """Look at what there is in the end."""
        for handle, path, reachable in self._written.values():
            self.traces.files.append(_written(handle, path, reachable))
        roots = {os.path.dirname(self._place), "/tmp", "/var/tmp", "/dev/shm"}  # noqa: S108 - looked at only
        elsewhere = {one.path for one in self.traces.files if not one.removed}
        left = {str(one) for one in Path(self._place).iterdir()} - self._not_counted
        left |= {path for path in elsewhere if os.path.dirname(path) in roots}
        self.traces.left += [f"the file {path}" for path in sorted(left)]
        end = time.monotonic() + LEFT_SECONDS
        for pid, name in self._children.items():
            while _is_running(pid) and time.monotonic() < end:
                time.sleep(0.02)
            if _is_running(pid):
                self.traces.left.append(f"the process {name}")
        for thread in set(self._threads) - {threading.current_thread()}:
            thread.join(max(0, end - time.monotonic()))
            if thread.is_alive():
                self.traces.left.append(f"the thread {thread.name}")
        if self._still_open():
            gc.collect()  # what lies around in a circle is closed some time
        self.traces.left += self._still_open()

    def _still_open(self) -> list[str]:
        return [
            f"the open descriptor of {os.readlink(f'/proc/self/fd/{descriptor}')}"
            for descriptor, inode in self._descriptors.items()
            if _inode(descriptor) == inode
        ]

    def _connecting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self_: socket.socket, *arguments: Any, **more: Any) -> None:
            function(self_, *arguments, **more)
            self._hold(self_.fileno())

        return call

    def _hold(self, descriptor: int) -> None:
        inode = _inode(descriptor)
        if self.counts() and inode is not None:
            self._descriptors[descriptor] = inode

    def _before(self, function: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if self.counts():
                note(*arguments)
            return function(*arguments, **more)

        return call

    def _starting(self, thread: threading.Thread) -> None:
        self._threads.add(thread)

    def _setting(self, name: bytes, value: bytes) -> None:
        pair = os.fsdecode(name), os.fsdecode(value)
        if os.environ.get(pair[0]) != pair[1]:
            self.traces.variables.append(pair)

    def _running(self, command: Any) -> None:
        self.traces.commands.append(" ".join(_words(command)))

    def _spawned(self, function: Callable[..., Any], at: int | None) -> Callable[..., Any]:
        """Watch a function that starts a process with the arguments that are its argument `at`."""

        def call(*arguments: Any, **more: Any) -> Any:
            # Newer Pythons make a Popen out of os.posix_spawn, which is one child and not two.
            thread = threading.get_ident()
            if thread in self._spawning:
                return function(*arguments, **more)
            counts = self.counts()
            command = [""] if at is None else _words(more["args"] if "args" in more else arguments[at])
            if counts and any(command):
                self.traces.commands.append(" ".join(command))
            self._spawning.add(thread)
            try:
                made = function(*arguments, **more)
            finally:
                self._spawning.discard(thread)
            pid = arguments[0].pid if made is None else made
            if counts and pid:
                self._children[pid] = f"{os.path.basename(command[0])} ({pid})".lstrip()
            return made

        return call

    def _opened(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            made = function(*arguments, **more)
            if not self.counts():
                with suppress(TypeError):  # a descriptor
                    path = os.fsdecode(arguments[0])
                    self._not_counted.update({path} if path.startswith(self._place) else ())
            elif made is not None:
                descriptor = made if isinstance(made, int) else made.fileno()
                self._hold(descriptor)
                self._keep(descriptor)
            return made

        return call

    def _keep(self, descriptor: int) -> None:
        # the inode can be looked at later, whatever became of its name; O_PATH touches no locks
        link = f"/proc/self/fd/{descriptor}"
        handle = self._open(link, os.O_PATH)
        found = os.fstat(handle)
        key = found.st_dev, found.st_ino
        if not stat.S_ISREG(found.st_mode) or not _is_writable(descriptor) or key in self._written:
            os.close(handle)
            return
        path = os.readlink(link)
        self._written[key] = handle, path, _is_reachable(Path(path), Path(self._place))


def _inode(descriptor: int) -> tuple[int, int] | None:
    with suppress(OSError):
        found = os.fstat(descriptor)
        return found.st_dev, found.st_ino
    return None


def _is_writable(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _is_reachable(path: Path, place: Path) -> bool:
    """Tell whether others get through the directories above a file; the place of ours is like /tmp."""
    above = path.parents
    if place in above:
        above = above[: list(above).index(place)]
    with suppress(OSError):
        return all(one.stat().st_mode & _PUBLIC[0] for one in above)
    return False  # its directory is gone already


def _written(handle: int, path: str, reachable: bool) -> WrittenFile:
    found = os.fstat(handle)
    try:
        with open(f"/proc/self/fd/{handle}", "rb") as file:
            text = file.read(MAX_READ).decode(errors="replace")
    except OSError:  # its mode keeps even its owner from reading it
        text = ""
    finally:
        os.close(handle)
    return WrittenFile(path, reachable and bool(found.st_mode & _PUBLIC[1]), not found.st_nlink, text)


def _words(command: Any) -> list[str]:
    if isinstance(command, str | bytes | os.PathLike):
        return [os.fsdecode(command)]
    words: Sequence[Any] = list(command)
    return [os.fsdecode(one) for one in words]


def _is_running(pid: int) -> bool:
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    # one that is no longer waited for does nothing more
    return state not in "ZX" and int(parent) == os.getpid()


class _Sink(io.RawIOBase):
    """Takes what threads that count print; what others print goes where it went before."""

    def __init__(self, stream: TextIO, number: int, memory: int, counts: Callable[[], bool]) -> None:
        self._stream, self._number, self._memory, self._counts = stream, number, memory, counts
        self.ended = False  # later writes go to the stream before

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def write(self, data: Any) -> int:
        if self._counts() and not self.ended:
            return os.write(self._memory, data)
        self._stream.write(bytes(data).decode(errors="replace"))
        return len(data)


@contextmanager
def _streams(counts: Callable[[], bool]) -> Iterator[Mapping[str, str]]:
    """Take what is printed: by Python, by libraries and child processes on the descriptors."""
    printed: dict[str, str] = {}
    with ExitStack() as stack:
        for number, name in ((1, "stdout"), (2, "stderr")):
            stack.enter_context(_stream(number, name, counts, printed))
        yield printed


@contextmanager
def _stream(number: int, name: str, counts: Callable[[], bool], printed: dict[str, str]) -> Iterator[None]:
    stream: TextIO = getattr(sys, name)
    stream.flush()
    memory, before = os.memfd_create(name), os.dup(number)
    os.dup2(memory, number)
    sink = _Sink(stream, number, memory, counts)
    text = io.TextIOWrapper(sink, "utf-8", "backslashreplace", write_through=True)  # type: ignore[type-var]
    try:
        with mock.patch.object(sys, name, text):
            yield
    finally:
        sink.ended = True
        os.dup2(before, number)
        os.close(before)
        printed[f"standard {'output' if number == 1 else 'error'}"] = os.pread(memory, MAX_READ, 0).decode(
            errors="replace"
        )
        os.close(memory)
