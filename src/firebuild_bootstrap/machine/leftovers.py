"""What a machine has outside of its workspace, written down before it is made, so that nothing of it stays.

The list is a file in the workspace. The machine clears it when it ends; after a kill the
cleanup process does, and after a power cut the next build.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.image.layertrees import boot_id
from firebuild_bootstrap.polling import readable
from firebuild_bootstrap.programs import LimitExceeded, NotStarted, run_program
from firebuild_bootstrap.removal import remove_tree
from firebuild_pki.display import one_line

_FILE: Final = "leftovers"
_PROCESS_SECONDS: Final = 10.0
_COMMAND_SECONDS: Final = 30.0
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"


class Leftovers:
    """The list of one workspace.

    Args:
        directory: the workspace.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add_command(
        self,
        argv: Sequence[str],
        *,
        text: str = "",
        env: Mapping[str, str] | None = None,
        quiet: bool = False,
        needs: Path | None = None,
    ) -> None:
        """Note a command that removes something, or saves it.

        Args:
            text: its standard input.
            env: its environment, besides PATH.
            quiet: it may find nothing to remove.
            needs: it is not run where this file is gone.
        """
        entry = {"argv": list(argv), "text": text, "env": dict(env or {}), "quiet": quiet}
        self._add(kind="command", **entry, needs=str(needs or ""))

    def add_directory(self, path: Path) -> None:
        """Note a directory outside of the workspace."""
        self._add(kind="directory", path=str(path))

    def add_process(self, stat_file: Path) -> None:
        """Note a process that writes its `/proc/self/stat` to `stat_file` before it does anything else."""
        self._add(kind="process", path=str(stat_file), boot=boot_id())

    def clear(self) -> list[str]:
        """Remove everything, the last first, and return errors as text. Idempotent."""
        return clear(self._directory)

    def forget(self) -> None:
        """Drop the list, and let everything on it stay."""
        (self._directory / _FILE).unlink(missing_ok=True)

    def _add(self, **entry: Any) -> None:
        with open(self._directory / _FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def clear(directory: Path) -> list[str]:
    """Clear the list of the workspace `directory`, if it has one; see `Leftovers.clear`."""
    file = directory / _FILE
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    problems = [problem for line in reversed(lines) if (problem := _clear(line))]
    file.unlink(missing_ok=True)
    return problems


def _clear(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:  # the power went while it was written
        return ""
    match entry["kind"]:
        case "command":
            return _run(entry)
        case "directory":
            return _remove(Path(entry["path"]))
        case _:
            return end_process(Path(entry["path"]), entry["boot"])


def _run(entry: Mapping[str, Any]) -> str:
    argv = entry["argv"]
    if (needs := entry.get("needs")) and not os.path.exists(needs):
        return ""
    try:
        done = run_program(
            argv, data=entry["text"].encode(), env={"PATH": _PATH, **entry["env"]}, seconds=_COMMAND_SECONDS
        )
    except NotStarted as error:
        return error.message
    except LimitExceeded as error:
        return f"{' '.join(argv)}: {error}"
    if done.returncode == 0 or entry["quiet"]:
        return ""
    words = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
    return f"{' '.join(argv)} failed: {one_line(words) or done.returncode}"


def _remove(path: Path) -> str:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        return f"{path} could not be removed: {os.strerror(errno.ENOTDIR)}"  # it is not what was noted
    try:
        remove_tree(path)
    except OSError as error:
        return f"{error.filename} could not be removed: {error.strerror}"
    return ""


def end_process(stat_file: Path, boot: str) -> str:
    """End the process that wrote `stat_file`, unless its number belongs to another one by now."""
    try:
        pid, start = _identity(stat_file.read_bytes())
    except (OSError, ValueError, IndexError):
        return ""  # it never came into being
    if boot != boot_id():
        return ""
    try:
        held = os.pidfd_open(pid)
    except ProcessLookupError:
        return ""
    try:
        if _identity(Path(f"/proc/{pid}/stat").read_bytes()) != (pid, start):
            return ""
        signal.pidfd_send_signal(held, signal.SIGKILL)
        return "" if readable(held, seconds=_PROCESS_SECONDS) else f"the process {pid} did not end"
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return ""
    finally:
        os.close(held)


def _identity(stat: bytes) -> tuple[int, int]:
    # proc(5): the name in parentheses may hold anything; the start time is field 22.
    return int(stat.split(b" ", 1)[0]), int(stat.rpartition(b")")[2].split()[19])
