"""How long a build takes, against buildah, and how fast files travel, against the disk and SHA-256.

    .venv/bin/python benchmarks/build_speed.py [--runs 5]

Needs root, buildah and busybox-static. Every figure is a median over runs that alternate between the
competitors, so that a busy machine slows all of them; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FIREBUILD = Path(sys.executable).with_name("firebuild")
SIZE = 256 << 20
SMALL = "FROM bench\nRUN echo hello > /hello\nCOPY Dockerfile /\n"
LARGE = "FROM bench\nCOPY big /big\n"


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that the action takes."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def medians(actions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Run the actions in turns and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(runs):
        for name, action in actions.items():
            times[name].append(timed(action))
    return {name: statistics.median(values) for name, values in times.items()}


class Bench:
    """The competitors, each with a store that holds the same base."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._environ = {**os.environ, "FIREBUILD_HOME": str(directory / "home")}
        self._storage = ["--storage-driver", "vfs", "--root", str(directory / "root")]
        self._storage += ["--runroot", str(directory / "run")]
        base = self.context("base", "FROM scratch\nCOPY root/ /\n")
        (base / "root/bin").mkdir(parents=True)
        (base / "root/bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
        (base / "root/bin/busybox").chmod(0o755)
        (base / "root/bin/sh").symlink_to("busybox")
        self._run("firebuild", "base", "import", "bench", base / "root")
        self.buildah(base, "localhost/bench")

    def context(self, name: str, dockerfile: str) -> Path:
        """Make a build context with a Dockerfile."""
        context = self._directory / name
        context.mkdir()
        (context / "Dockerfile").write_text(dockerfile)
        return context

    def firebuild(self, context: Path, output: str = "tar") -> None:
        """Build with firebuild."""
        what = ("--dockerfile", context / "Dockerfile", "--context", context)
        self._run("firebuild", "rootfs", *what, "--tag", f"bench/{context.name}:1", "--output", output)

    def buildah(self, context: Path, tag: str = "localhost/out") -> None:
        """Build with buildah, one layer, no cache."""
        options = ("--isolation", "chroot", "--quiet", "--no-cache", "--layers=false", "--pull-never")
        self._run("buildah", *self._storage, "bud", *options, "--tag", tag, context)

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [str(FIREBUILD) if program == "firebuild" else program, *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, env=self._environ)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        small = bench.context("small", SMALL)
        large = bench.context("large", LARGE)
        (large / "big").write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
        empty = bench.context("empty", "FROM bench\n")

        print("| what | firebuild | peer or limit | ratio |\n|---|---|---|---|")
        times = medians(
            {"ours": lambda: bench.firebuild(small), "buildah": lambda: bench.buildah(small)}, runs
        )
        report("small build (RUN, COPY), peer: buildah", times["ours"], times["buildah"])

        content = (large / "big").read_bytes()
        times = medians(
            {
                "ours": lambda: bench.firebuild(large),
                "empty": lambda: bench.firebuild(empty),
                "buildah": lambda: bench.buildah(large),
                "sha256": lambda: hashlib.sha256(content).digest(),
                "copy": lambda: (Path(directory) / "copy").write_bytes(content),
            },
            runs,
        )
        report("COPY of 256 MiB, whole build, peer: buildah", times["ours"], times["buildah"])
        limit = 3 * times["sha256"] + 2 * times["copy"]
        label = "the same less an empty build, limit: 3 x SHA-256 + 2 x write"
        report(label, times["ours"] - times["empty"], limit)


def report(what: str, ours: float, other: float) -> None:
    """Print one line of the table, in seconds."""
    print(f"| {what} | {ours:.2f} s | {other:.2f} s | {ours / other:.2f} |")


if __name__ == "__main__":
    main()
