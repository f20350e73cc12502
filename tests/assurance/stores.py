"""Commands with hostile input: they do what they should, or say in words why not."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from assurance.commands import Ended
from support import BIN, await_end_of_processes, family, highest_peak, leftovers, unmeasured

PATIENCE: Final = 150.0
"""Seconds of a command, on a machine with other work."""
MEMORY: Final = 700 << 20
"""Bytes that a command and each of its processes take at most."""
REFUSALS: Final = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Store:
    """A store that is there for one attempt."""

    home: Path
    environ: Mapping[str, str]

    def run(self, *words: str | Path) -> Ended:
        """Run a command; it ends in time and in bounded memory, with success or in words."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            process = subprocess.Popen(
                [BIN / "firebuild", *map(str, words)],
                env={
                    **unmeasured(),
                    "SOURCE_DATE_EPOCH": "0",
                    **self.environ,
                    "FIREBUILD_HOME": str(self.home),
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=error,
                start_new_session=True,
            )
            status, most = _ended(process)
            out.seek(0)
            error.seek(0)
            said = [each.read().decode(errors="replace") for each in (out, error)]
        ended = Ended(tuple(map(str, words)), status, *said).in_words()
        assert status in (0, *REFUSALS), str(ended)
        assert all(one.isprintable() or one in "\n\t" for one in ended.out + ended.err), str(ended)
        assert most < MEMORY, f"{most} bytes of memory: {ended}"
        return ended

    def check(self) -> None:
        """See that the store is sound, and that no build has left anything."""
        found = self.run("store", "check")
        assert found.status == 0, found
        assert found.out.startswith("sound"), found
        assert leftovers(self.home) == []


def _ended(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process; return its status, and the most bytes that it or one below it had in memory."""
    most, end = 0, time.monotonic() + PATIENCE
    while process.poll() is None:
        most = max(most, highest_peak(family({process.pid})))
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"{process.args!r} did not end in {PATIENCE} seconds")
        time.sleep(0.02)
    return process.returncode, most


@contextmanager
def fresh_store(directory: Path, environ: Mapping[str, str]) -> Iterator[Store]:
    """Have a store of one's own, that is sound at the end and then removed."""
    home = Path(tempfile.mkdtemp(prefix="home-", dir=directory))
    store = Store(home, environ)
    try:
        yield store
        store.check()
    finally:
        await_end_of_processes(home)
        shutil.rmtree(home, ignore_errors=True)
