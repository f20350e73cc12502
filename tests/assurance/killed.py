"""Commands that are killed at any moment."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import ExitStack
from functools import partial

from assurance.trials import Effort, trial
from e2e.killing import Harness, registry_of


@trial(
    "killed-commands",
    "builds, pulls, pushes, exports and prunes, killed at random moments",
    seconds=900,
    needs=("busybox",),
)
def commands(effort: Effort) -> None:
    """Kill commands of all kinds in turn; each finds a sound store, and nothing is left at the end."""
    with ExitStack() as cleanup:
        host, environ = "", dict[str, str]()
        if shutil.which("docker-registry"):
            host, environ = cleanup.enter_context(registry_of(effort.directory))
        harness = Harness(effort.directory, host, environ)
        while effort.goes_on():
            works = list(harness.works())
            for work in effort.chance.sample(works, len(works)):
                if effort.goes_on():
                    effort.attempt(work, partial(harness.kill, work, effort.chance))
        harness.nothing_is_left()
        effort.counts = Counter({f"{name} killed": count for name, count in harness.killed.items()})
        effort.counts["ended before the kill"] = sum(harness.ended.values())
