"""Commands that are killed at any moment."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from contextlib import ExitStack
from functools import partial

from assurance.trials import Effort, trial
from e2e.killing import Harness, registry_of
from machine_qemu.kernels import kernel_of_tests


@trial(
    "killed-commands",
    "builds, runs, pulls, pushes, exports and prunes, killed at random moments",
    seconds=900,
    needs=("busybox",),
)
def commands(effort: Effort) -> None:
    """Kill commands of all kinds in turn; each finds a sound store, and nothing is left at the end."""
    with ExitStack() as cleanup:
        host, environ = "", dict[str, str]()
        if shutil.which("docker-registry"):
            host, environ = cleanup.enter_context(registry_of(effort.directory))
        kernel = kernel_of_tests()
        if kernel:
            environ |= {"FIREBUILD_MACHINE__QEMU__KERNEL": str(kernel)}
        harness = Harness(effort.directory, host, environ, kernel)
        for turn in itertools.count():
            works = [name for name, work in harness.works().items() if not work.slow or turn % 4 == 1]
            for work in effort.shuffled(works):
                effort.attempt(work, partial(harness.kill, work, effort.chance))
            if not effort.goes_on():
                break
        effort.attempt("look for what is left", harness.nothing_is_left)
        effort.counts = Counter({f"{name} killed": count for name, count in harness.killed.items()})
        effort.counts["ended before the kill"] = sum(harness.ended.values())
