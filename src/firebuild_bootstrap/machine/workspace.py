"""The private directory of one build, gone when the build is, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.content_store import ROOM, lock_file
from firebuild_bootstrap.image.layertrees import LayerTrees, store_name
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.machine.cleanup import LOCK, abandoned, own, retire
from firebuild_bootstrap.programs import start_hint, start_problem
from firebuild_bootstrap.sandbox import IdMap, Runtime, Sandbox, find_runtime

if TYPE_CHECKING:
    from firebuild_bootstrap.image.drives import SnapshotDrives

_BUILD_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_CLEANUP: Final = "firebuild_bootstrap.machine.cleanup"
_NOT_FOR_CLEANUP: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# ioctl_iflags(2), of <linux/fs.h>; the kernel reads and writes an int, whatever the size in the number.
_GET_FLAGS: Final = 0x80086601
_SET_FLAGS: Final = 0x40086602
_TOP_DIRECTORY: Final = 0x00020000


class BuildDirectory:
    """A directory where one machine keeps its files, and the sandbox for all work on them.

    Args:
        path: the directory.
        sandbox: in the id mapping of the build.
        runtime: how to run Python in it.
        check: called again and again while a sandboxed program works for the build; may raise.
        tasks: told of all that may take a while.
        home: the directory of the store.
    """

    def __init__(
        self,
        path: Path,
        sandbox: Sandbox,
        runtime: Runtime,
        *,
        check: Callable[[], None],
        tasks: Tasks,
        home: Path,
    ) -> None:
        self.path = path
        self._home = home
        self.sandbox = sandbox
        self.runtime = runtime
        self.check = check
        self.tasks = tasks

    def trees(self) -> Trees:
        """Return the tools for file trees, in the build's id mapping."""
        return Trees(self.sandbox, self.runtime, self.tasks)

    def layer_trees(self) -> LayerTrees:
        """Return the store of unpacked layers for the build's id mapping; the caller closes it."""
        return LayerTrees(self._home, self.trees(), check=self.check)

    def snapshot_drives(self, stored: LayerTrees) -> SnapshotDrives:
        """Return the store of snapshot drives of the layers `stored`; the caller closes it."""
        # Here, because most builds have no virtual machine.
        from firebuild_bootstrap.image.drives import SnapshotDrives

        return SnapshotDrives(self._home, self.trees(), stored, check=self.check)

    def part(self, name: str) -> BuildDirectory:
        """Make a directory in this one for one of several machines; it goes when this one goes.

        Its own name begins with that of this one, because it identifies its machine on this host.

        Raises:
            MachineError: it can't be made.
        """
        path = self.path / f"{self.path.name}-{name}"
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise MachineError(
                f"{path}: the machine's directory can't be made: {error.strerror}", hint=ROOM
            ) from error
        return BuildDirectory(
            path, self.sandbox, self.runtime, check=self.check, tasks=self.tasks, home=self._home
        )

    def close(self) -> None:
        """Nothing to do: what is in it goes with the directory of the build."""


class Workspace(BuildDirectory):
    """The directory `home`/builds/`build_id` (mode 0700) and the sandbox to use for all work in it.

    A cleanup process of its own session outlives this one, even after SIGKILL. It waits until this
    process and every sandbox are gone, moves the directory to `home`/removing if `close` has not, and
    removes it there in the id mapping that filled it, which nobody waits for. What is left when the cleanup
    process dies too, or the machine loses its power, is removed by the next build or command (`sweep`).

    Use it as a context manager, or call `close`.

    Args:
        home: the directory of the store.
        idmap: owners inside the build.
        check: called again and again while a sandboxed program works for the build; may raise.
        tasks: told of all that may take a while.

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
        tasks: Tasks | None = None,
    ) -> None:
        if _BUILD_ID.fullmatch(build_id) is None:
            raise InputError(f"expected a build id of letters, digits and . _ -, found {build_id!r}")
        self._idmap = idmap
        lifeline, self._lifeline = os.pipe()
        self._lock = -1
        super().__init__(
            home / "builds" / build_id,
            Sandbox(idmap, lifeline=self._lifeline, check=check),
            runtime or find_runtime(),
            check=check,
            tasks=tasks or Tasks(),
            home=home,
        )
        try:
            # It is held here as well as by the cleanup process, so that nobody sweeps while either lives.
            self._lock = self._make()
            self._cleanup = self._start_cleanup(lifeline)
        except BaseException:
            self._cut()
            raise
        finally:
            os.close(lifeline)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Move the directory away and have it removed; all sandboxes must have ended. Idempotent.

        Raises:
            MachineError: something of it could not be removed.
        """
        if self._lifeline < 0:
            return
        try:
            retired = retire(self.path)
            try:
                os.write(self._lifeline, os.fsencode(retired))
            except BrokenPipeError:  # the cleanup process was killed
                left = True
            else:
                left = retired == self.path  # it could not be moved, and its name may be used again
            if left:
                Trees(Sandbox(self._idmap), self.runtime).remove(retired)
        finally:
            self._cut()
            _reap(self._cleanup)

    def _cut(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _make(self) -> int:
        """Make the directory and return a descriptor that holds its lock."""
        builds = self.path.parent
        try:
            builds.mkdir(parents=True, exist_ok=True)
            spread(builds)
            retire_dead(builds.parent)
            with lock_file(builds / LOCK):
                self.path.mkdir(mode=0o700)
                lock = own(self.path)
        except OSError as error:
            raise MachineError(
                f"{self.path}: the build's directory can't be made: {error.strerror}",
                hint=ROOM,
            ) from error
        sweep(builds.parent)
        return lock

    def _start_cleanup(self, lifeline: int) -> subprocess.Popen[bytes]:
        idmap = self._idmap
        arguments = [str(self.path), json.dumps(idmap.as_json()), store_name(idmap), str(os.getpid())]
        return _start(
            arguments,
            self.runtime.env,
            stdin=lifeline,
            pass_fds=(self._lock,),  # the lock lives as long as the cleanup process
        )


def spread(builds: Path) -> None:
    """Tell the file system that the directories in `builds` have nothing to do with each other.

    ext4 then puts each into another part of the disk (chattr(1), T). Otherwise all are in one part, and
    without a journal it passes over every inode that was freed there in the last minutes to make a file
    (`recently_deleted` in the kernel's fs/ext4/ialloc.c): after the removal of another build's 20,000 files,
    those of this one took 10 s instead of 0.4 s.
    """
    with suppress(OSError):  # a file system without such flags
        descriptor = os.open(builds, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            (flags,) = struct.unpack("i", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(4)))
            if not flags & _TOP_DIRECTORY:
                fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("i", flags | _TOP_DIRECTORY))
        finally:
            os.close(descriptor)


def retire_dead(home: Path) -> None:
    """Move the directories of dead builds in the store `home` away, once what they had finished is kept.

    Raises:
        OSError: the store can't be written.
    """
    builds = home / "builds"
    if any(True for _ in abandoned(builds)):
        with lock_file(builds / LOCK):
            for entry in abandoned(builds):
                retire(entry)


def sweep(home: Path) -> None:
    """Have what dead builds left in the store `home` removed in the background, if there is anything.

    Raises:
        MachineError: Python can't be started.
    """
    if any(True for folder in ("builds", "removing") for _ in abandoned(home / folder)):
        _reap(_start([str(home)], find_runtime().env, stdin=subprocess.DEVNULL))


def _start(arguments: Sequence[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
    # The cleanup process inherits the mask: it ends when the build does, not with a terminal or a service.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CLEANUP)
    try:
        return subprocess.Popen(
            [sys.executable, "-sSP", "-m", _CLEANUP, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", os.defpath), **env},
            cwd="/",
            start_new_session=True,
            **options,
        )
    except OSError as error:
        hint = start_hint(error, "is the Python that runs firebuild still there?")
        raise MachineError(start_problem(sys.executable, error), hint=hint) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Leave a process to itself, without a zombie."""
    thread = threading.Thread(target=process.wait, name="cleanup", daemon=True)
    _reaping[:] = [*(each for each in _reaping if each.is_alive()), thread]
    thread.start()


_reaping: list[threading.Thread] = []


def wait_for_removal() -> None:
    """Wait until all is gone that this process has had removed in the background."""
    for thread in tuple(_reaping):
        thread.join()
