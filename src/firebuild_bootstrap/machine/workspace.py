"""The private directory of one build, gone when the build is, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.machine import leftovers
from firebuild_bootstrap.machine.janitor import LEAVING
from firebuild_bootstrap.sandbox import IdMap, Runtime, Sandbox, find_runtime

_BUILD_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_JANITOR: Final = "firebuild_bootstrap.machine.janitor"
_JANITOR_SECONDS: Final = 120.0
_NOT_FOR_THE_JANITOR: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Workspace:
    """The directory `home`/builds/`build_id` (mode 0700) and the sandbox to use for all work in it.

    A janitor process of its own session outlives this one, even after SIGKILL. It waits until this
    process and every sandbox are gone, and removes the directory in the id mapping that filled it.
    Leftovers of a machine that lost its power are removed by the next build.

    Use it as a context manager, or call `close`.

    Args:
        home: the directory of the store.
        idmap: owners inside the build.
        check: called again and again while a sandboxed program works for the build; may raise.

    Raises:
        InputError: `build_id` can't be a file name.
        MachineError: the directory exists already or can't be made.
    """

    def __init__(
        self,
        home: Path,
        build_id: str,
        idmap: IdMap,
        *,
        runtime: Runtime | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if _BUILD_ID.fullmatch(build_id) is None:
            raise InputError(f"expected a build id of letters, digits and . _ -, found {build_id!r}")
        self.path = home / "builds" / build_id
        self._idmap = idmap
        self.check = check
        self.runtime = runtime or find_runtime()
        lifeline, self._lifeline = os.pipe()
        self.sandbox = Sandbox(idmap, lifeline=self._lifeline, check=check)
        try:
            lock = self._make()
            try:
                self._janitor = self._start_janitor(lifeline, lock)
            finally:
                os.close(lock)
        except BaseException:
            self._cut()
            raise
        finally:
            os.close(lifeline)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def trees(self) -> Trees:
        """Return the tools for file trees, in the build's id mapping."""
        return Trees(self.sandbox, self.runtime)

    def close(self) -> None:
        """Remove the directory; all sandboxes must have ended. Idempotent.

        Raises:
            MachineError: something of it could not be removed.
        """
        if self._lifeline < 0:
            return
        self._cut()
        with suppress(subprocess.TimeoutExpired):
            self._janitor.wait(_JANITOR_SECONDS)
        if self.path.exists():  # somebody ended the janitor
            leftovers.clear(self.path)
            Trees(Sandbox(self._idmap), self.runtime).remove(self.path)

    def _cut(self) -> None:
        with suppress(BrokenPipeError):  # the janitor is gone already
            os.write(self._lifeline, LEAVING)
        os.close(self._lifeline)
        self._lifeline = -1

    def _make(self) -> int:
        """Make the directory and return a descriptor that holds its lock."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent / "lock"):
                self._sweep()
                self.path.mkdir(mode=0o700)
                return _own(self.path)
        except OSError as error:
            raise MachineError(
                f"{self.path}: the build's directory can't be made: {error.strerror}",
                hint="free some space or rights there, or set FIREBUILD_HOME to another directory",
            ) from error

    def _sweep(self) -> None:
        for entry in self.path.parent.iterdir():
            if entry.is_dir():
                with suppress(OSError, MachineError):  # a running build, or another user's
                    lock = _own(entry)
                    try:
                        leftovers.clear(entry)
                        Trees(Sandbox(self._idmap), self.runtime).remove(entry)
                    finally:
                        os.close(lock)

    def _start_janitor(self, lifeline: int, lock: int) -> subprocess.Popen[bytes]:
        # The janitor inherits the mask: it ends when the build does, not with a terminal or a service.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THE_JANITOR)
        document = json.dumps(self._idmap.as_json())
        try:
            return subprocess.Popen(
                [sys.executable, "-sP", "-m", _JANITOR, str(self.path), document, str(os.getpid())],
                stdin=lifeline,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.environ.get("PATH", os.defpath), **self.runtime.env},
                cwd="/",
                pass_fds=(lock,),  # the lock lives as long as the janitor
                start_new_session=True,
            )
        except OSError as error:
            raise MachineError(f"{sys.executable}: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _own(directory: Path) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
