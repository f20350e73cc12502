"""The command as the trials call it, and what holds of it however it ends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import ExitStatus
from support import BIN, catches, eventually, unmeasured

STATUSES: Final = frozenset(ExitStatus) - {ExitStatus.INTERNAL} | {125}
"""How a command may end that nothing has killed; 125 is a failure of `run`."""
HANG: Final = 300.0
"""Seconds after which a command counts as one that does not end."""


@dataclass(frozen=True)
class Ended:
    """What a command did."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"{' '.join(self.words)}: status {self.status}\n{self.out[-4000:]}\n{self.err[-4000:]}"

    def in_words(self) -> Ended:
        """Fail unless it succeeded, or says in words why not."""
        assert "Traceback" not in self.out + self.err, str(self)
        assert self.status in STATUSES, str(self)
        assert self.status == 0 or "error:" in self.err, str(self)
        return self


class Started:
    """A command that runs."""

    def __init__(self, words: tuple[str, ...], environ: Mapping[str, str], cwd: Path | None = None) -> None:
        self.words = words
        self.process = subprocess.Popen(
            [BIN / "firebuild", *words],
            env=environ,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def interrupt(self, number: int) -> None:
        """Send a signal, if it has not ended; one that it can handle only when it does.

        Before its first line it is a Python like any other, which SIGTERM kills, and which says in a
        traceback where in its own start it was interrupted.
        """
        if number == signal.SIGKILL or eventually(self._has_begun, 20):
            self.process.send_signal(number)

    def _has_begun(self) -> bool:
        """Whether it handles signals, as each command does first, or has ended already."""
        return self.process.poll() is not None or catches(self.process.pid, signal.SIGTERM)

    def end(self) -> Ended:
        """Wait for its end; one that does not come is a fault."""
        try:
            out, err = self.process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"{self.words} hangs:\n{out}\n{err}") from None
        return Ended(self.words, self.process.returncode, out, err)


class Place:
    """A store, and a build context with busybox.

    Args:
        directory: for both.
        environ: more variables of the commands.
    """

    def __init__(self, directory: Path, environ: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.home = directory / "home"
        self.context = directory / "context"
        self.environ = {**unmeasured(), "FIREBUILD_HOME": str(self.home), "FIREBUILD_PULL": "never"}
        self.environ |= {"SOURCE_DATE_EPOCH": "0", **(environ or {})}
        self.context.mkdir(parents=True)
        shutil.copy("/bin/busybox", self.context / "sh")

    def dockerfile(self, name: str, *lines: str) -> str:
        """Write a Dockerfile that begins with a shell; return its path."""
        path = self.context / name
        tools = "".join(f"COPY sh /bin/{tool}\n" for tool in ("sh", "cat", "sleep"))
        path.write_text(f"FROM scratch\n{tools}" + "".join(f"{line}\n" for line in lines))
        return str(path)

    def start(self, *words: str, environ: Mapping[str, str] | None = None) -> Started:
        """Start a command."""
        return Started(words, {**self.environ, **(environ or {})})

    def run(self, *words: str, environ: Mapping[str, str] | None = None) -> str:
        """Run a command that has to succeed; return its output."""
        ended = self.start(*words, environ=environ).end().in_words()
        assert ended.status == 0, str(ended)
        return ended.out

    def sound(self) -> None:
        """Fail unless the store is sound."""
        found = self.run("store", "check")
        assert re.search(r"^sound", found, re.MULTILINE), found
