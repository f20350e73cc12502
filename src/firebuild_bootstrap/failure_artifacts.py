"""What a failed build leaves behind for those who ask for it (docs/machines.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from firebuild_bootstrap.errors import FirebuildError, Interrupted, StageCancelled
from firebuild_bootstrap.explain import failure_event
from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.removal import remove_tree


class FailureArtifacts:
    """Keeps what is left of a machine when its block ends with an error; an interrupted build leaves nothing,
    and so does a stage that was cancelled because another one has failed.

    Args:
        directory: where; it is made, and open to this user only.
        machine: what is left of it.
        notice: told what could not be kept.
        info: told where everything is.
    """

    def __init__(
        self,
        directory: Path,
        machine: Machine,
        *,
        notice: Callable[[str], None],
        info: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._machine = machine
        self._notice = notice
        self._info = info

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Interrupted | StageCancelled):
            return
        try:
            self._keep(error)
        except BaseException as problem:
            remove_tree(self._directory, ignore_errors=True)
            if not isinstance(problem, FirebuildError | OSError):
                raise
            # It must not hide why the build failed.
            self._notice(f"what is left of the failed build could not be kept: {problem}")

    def _keep(self, error: BaseException) -> None:
        self._machine.stop()
        self._directory.mkdir(mode=0o700, parents=True)
        for note in self._machine.keep(self._directory):
            self._notice(note)
        document = json.dumps(failure_event(error).as_json(), indent=2)
        (self._directory / "failure.json").write_text(f"{document}\n", "utf-8")
        names = ", ".join(sorted(path.name for path in self._directory.iterdir()))
        self._info(f"what is left of the failed build is kept in {self._directory}: {names}")
