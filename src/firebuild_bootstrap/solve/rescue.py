"""Steps that are finished when their build dies: their layers go from its directory into the cache.

A stage of a build has a plan, a file in the directory of its machine. Its first line says what is to become
of each step; a number alone in a line that the files of this step are those of its key.

Whoever removes that directory after a kill runs `python -m firebuild_bootstrap.solve.rescue PLAN` first
(`machine.leftovers`). Entries have the ids that the build itself would have used, so that it does not matter
how far that came, nor whether two do this at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import FirebuildError, MachineError
from firebuild_bootstrap.image.layertrees import LayerTrees, boot_id
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.machine.base import FINISHED
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.sandbox import IdMap, Sandbox
from firebuild_bootstrap.solve.cache import Cache, Entry
from firebuild_pki.values import dataclass

_FILE: Final = "plan"


@dataclass(frozen=True)
class PlannedStep:
    """What becomes of a step when it is finished; see `Cache.commit`.

    Args:
        number: of the step.
        sure: whether its files are those of its key in any case.
    """

    number: int
    key: str
    identity: str
    parent: str
    base: str
    text: str
    sources: tuple[tuple[str, str], ...] = ()
    sure: bool = True

    def commit(self, cache: Cache, directory: Path, *, replace: bool, key: str = "") -> Entry:
        """Put the layer of the step into the cache.

        Args:
            cache: of the store.
            directory: one of `Machine.layers`.
            replace: whatever others have made.
            key: to be used instead.

        Raises:
            MachineError, InputError: as `Cache.commit`.
        """
        return cache.commit(
            key or self.key,
            directory,
            parent=self.parent,
            text=self.text,
            sources=[(source, identity) for source, identity in self.sources],
            identity=self.identity,
            base=self.base,
            replace=replace,
        )


class Plan:
    """The plan of one stage, for as long as its machine runs.

    Args:
        workspace: the directory of the machine.
        home: the store.
        steps: in their order.
        replace: see `Cache.commit`.

    Raises:
        MachineError: it can't be written.
    """

    def __init__(
        self, workspace: BuildDirectory, home: Path, steps: Sequence[PlannedStep], *, replace: bool
    ) -> None:
        self._path = workspace.path.absolute() / _FILE
        document = {
            "boot": boot_id(),
            "home": str(home.absolute()),
            "idmap": workspace.sandbox.idmap.as_json(),
            "replace": replace,
            "steps": [asdict(step) for step in steps],
        }
        argv = [sys.executable, "-sP", "-m", "firebuild_bootstrap.solve.rescue", str(self._path)]
        try:
            self._path.write_text(json.dumps(document) + "\n", "utf-8")
            Leftovers(workspace.path).add_command(argv, env=workspace.runtime.env, needs=self._path)
        except OSError as error:
            raise MachineError(f"{self._path}: {error.strerror}") from error

    def sure(self, number: int) -> None:
        """Note that the files of a step are those of its key."""
        # A full disk ends the build elsewhere; without the note the step is executed again after a kill.
        with suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{number}\n")

    def close(self) -> None:
        """All is done that can be done."""
        self._path.unlink(missing_ok=True)


def rescue(path: Path) -> None:
    """Commit what is finished of the plan `path`, whose build is dead.

    Raises:
        FirebuildError: the store can't be written.
    """
    first, *more = path.read_text("utf-8").splitlines()
    plan = json.loads(first)
    if plan["boot"] != boot_id():
        return  # what was written before a power failure may not be on the disk
    sure = set(more)
    with closing(LayerTrees(Path(plan["home"]), Trees(Sandbox(IdMap.from_json(plan["idmap"]))))) as trees:
        cache = Cache(trees)
        for document in plan["steps"]:
            step = PlannedStep(**document)
            if not step.sure and str(step.number) not in sure:
                return
            step.commit(cache, path.parent / FINISHED / str(step.number), replace=plan["replace"])


if __name__ == "__main__":
    # The first step that is not finished has no layer, and ends it.
    with suppress(FirebuildError, OSError, ValueError):
        rescue(Path(sys.argv[1]))
