"""How long whole builds take against buildah and BuildKit, what memory they need, whom a file meets, and how
fast the session stream is.

    tests/oracle/buildkit/build
    .venv/bin/python benchmarks/build_speed.py [--runs 5] [--only NAME] [--write]

Needs root, buildah, runc, busybox-static, and some 5 GB of disk. Every figure is a median over runs in which
the builders take turns, so that a busy machine slows all of them; the ratios are what counts. All build from
the same contexts, on a base of one busybox: firebuild stores an image of layers; buildah commits each
layer, with overlayfs; BuildKit, whose daemon runs already, writes an OCI layout without compression. Before a
build with nothing cached, what earlier ones left is removed, but for what firebuild knows of the digests of
files by their inodes. With --write, all of it goes into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import compileall
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from benchmarks import proxy_throughput
from benchmarks.way_of_a_file import way_of_a_file

from oracle.daemon import BuildKit, Order, version

FIREBUILD: Final = Path(sys.executable).with_name("firebuild")
RESULTS: Final = Path(__file__).with_name("RESULTS.md")
HEADING: Final = "## Whole builds"


Work = Callable[[Path], str]  # fills a context, and returns its Dockerfile; its docstring says what it is


# --- what is built -------------------------------------------------------------------------------


def small(_: Path) -> str:
    """RUN and COPY."""
    return "FROM bench\nRUN echo hello >/hello\nCOPY Dockerfile /\n"


def runs(_: Path) -> str:
    """11 RUN."""
    return "FROM bench\n" + "".join(f"RUN echo {number} >/{number}\n" for number in range(11))


def large(context: Path) -> str:
    """COPY of one file of 512 MiB."""
    block = random.Random(0).randbytes(1 << 20)
    with (context / "large").open("wb") as file:
        for number in range(512):
            file.write(number.to_bytes(8) + block[8:])
    return "FROM bench\nCOPY large /\n"


def many(context: Path) -> str:
    """COPY of 20,000 files of 700 bytes in 100 directories."""
    fill(context / "many", folders=100, files=200, size=700)
    return "FROM bench\nCOPY many /many/\n"


def fill(directory: Path, *, folders: int, files: int, size: int) -> None:
    """Make files that all differ."""
    numbers = random.Random(size)
    for folder in range(folders):
        place = directory / f"folder-{folder:03}"
        place.mkdir(parents=True)
        for file in range(files):
            (place / f"file-{file:04}").write_bytes(numbers.randbytes(size))


WORK: Final[tuple[Work, ...]] = (small, runs, large, many)
# What each is meant to reach: a share of the time of the faster peer, or of the one that is named.
GOALS: Final[dict[Work, tuple[float, str]]] = {
    small: (1.0, "buildah"),
    runs: (0.8, "BuildKit"),
    large: (0.6, ""),
    many: (0.35, ""),
}
CACHED_GOAL: Final = 0.35  # seconds


# --- who builds it -------------------------------------------------------------------------------


class Builders:
    """firebuild and its peers, each with a store of its own that holds the bases."""

    def __init__(self, directory: Path, buildkit: BuildKit) -> None:
        self._directory = directory
        self._environ = {**os.environ, "FIREBUILD_HOME": str(directory / "home")}
        self._storage = ["buildah", "--storage-driver", "overlay", "--root", str(directory / "root")]
        self._storage += ["--runroot", str(directory / "run")]
        self._buildkit = buildkit
        self._bench = directory / "bench"
        (self._bench / "bin").mkdir(parents=True)
        (self._bench / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
        (self._bench / "bin/busybox").chmod(0o755)
        (self._bench / "bin/sh").symlink_to("busybox")
        self.keep_base("bench", self._bench)
        (directory / "Dockerfile.base").write_text("FROM scratch\nCOPY . /\n")
        base = ["bud", "--quiet", "--tag", "localhost/bench", "--file", str(directory / "Dockerfile.base")]
        self._run([*self._storage, *base, str(self._bench)])
        self.caches = "--no-cache" in self._run([str(FIREBUILD), "build", "--help"])

    def keep_base(self, name: str, tree: Path) -> None:
        """Make a base for firebuild."""
        self._run([str(FIREBUILD), "base", "import", name, str(tree)])

    def context(self, name: str, work: Work) -> Path:
        """Make a context and return its Dockerfile."""
        context = self._directory / name
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(work(context))
        return context / "Dockerfile"

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self._environ, check=False)
        if done.returncode:
            raise SystemExit(f"{command}: {done.stderr[-2000:]}")
        return done.stdout

    def command(self, dockerfile: Path, *, cached: bool) -> list[str]:
        """Return the command of firebuild for a build."""
        name = dockerfile.parent.name
        words = [str(FIREBUILD), "build", "--tag", f"bench/{name}:1"]
        words += ["--no-cache"] if self.caches and not cached else []
        return [*words, str(dockerfile.parent)]

    def ours(self, dockerfile: Path, *, cached: bool) -> None:
        """Build with firebuild."""
        self._run(self.command(dockerfile, cached=cached))

    def buildah(self, dockerfile: Path, *, cached: bool) -> None:
        """Build with buildah."""
        words = [
            "bud",
            "--isolation",
            "chroot",
            "--quiet",
            "--layers",
            "--pull-never",
            "--tag",
            "localhost/out",
        ]
        self._run([*self._storage, *words, *([] if cached else ["--no-cache"]), str(dockerfile.parent)])

    def buildkit(self, dockerfile: Path, *, cached: bool) -> None:
        """Build with BuildKit."""
        archive = self._directory / "out.tar"
        self._buildkit.build(
            Order(
                context=dockerfile.parent,
                contexts={"bench": self._bench},
                output=f"type=oci,dest={archive},compression=uncompressed",
                cached=cached,
            )
        )

    def forget(self) -> None:
        """Remove what earlier builds left, but for the bases."""
        self._run([*self._storage, "rmi", "--prune", "--force"])
        self._buildkit.prune()
        # The base is there before the clock starts, as it is for the others.
        dockerfile = self.context("warm", lambda _: "FROM bench\nRUN true\n")
        self.buildkit(dockerfile, cached=True)

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which firebuild runs."""
        return self._environ


Times = dict[tuple[str, bool], float]


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that the action takes."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def measure(builders: Builders, dockerfile: Path, count: int) -> Times:
    """Return the median seconds of each builder, with nothing and with everything cached."""
    names = {"firebuild": builders.ours, "buildah": builders.buildah, "BuildKit": builders.buildkit}
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(count):
        builders.forget()
        for cached in (False, True):
            for name, build in names.items():
                if not cached or name != "firebuild" or builders.caches:
                    seconds = timed(lambda build=build, cached=cached: build(dockerfile, cached=cached))  # type: ignore[misc]
                    found.setdefault((name, cached), []).append(seconds)
    return {key: statistics.median(values) for key, values in found.items()}


# --- memory --------------------------------------------------------------------------------------


def peaks(command: list[str], environ: dict[str, str]) -> dict[str, float]:
    """Run a build and return the most memory of the host's process, the guest's and any other, in MB."""
    found: dict[str, int] = {}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for pid in descendants(process.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            if peak := re.search(r"VmHWM:\s+(\d+)", status):
                role = "host" if pid == process.pid else "guest" if is_guest(words) else "others"
                found[role] = max(found.get(role, 0), int(peak[1]))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command}: status {process.returncode}")
    return {role: size * 1024 / 1e6 for role, size in found.items()}


def is_guest(words: list[str]) -> bool:
    """Tell vminit from the sandbox that it is started by."""
    return "python" in os.path.basename(words[0]) and any("guest.main" in word for word in words)


def descendants(pid: int) -> Iterator[int]:
    """Yield a process and all that come from it."""
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = " ".join((task / "children").read_text() for task in tasks).split()
    except OSError:
        return
    for child in children:
        yield from descendants(int(child))


# --- the report ----------------------------------------------------------------------------------


def row(title: str, work: Work, times: Times, *, cached: bool) -> str:
    """Return one line of the table."""
    ours, buildah, buildkit = (times.get((name, cached)) for name in ("firebuild", "buildah", "BuildKit"))
    assert buildah is not None
    assert buildkit is not None
    share, against = GOALS[work]
    peer = {"buildah": buildah, "BuildKit": buildkit}.get(against, min(buildah, buildkit))
    goal = f"{CACHED_GOAL} s" if cached else f"{share} x {against or 'the faster'}"
    told = ("no cache", "") if ours is None else (f"{ours:.2f}", f"{ours / peer:.2f}")
    title += ", all cached" if cached else ""
    return f"| {title} | {told[0]} | {buildah:.2f} | {buildkit:.2f} | {told[1]} | {goal} |"


def report(directory: Path, count: int, only: list[str]) -> Iterator[str]:
    """Yield the lines of the report, as they come."""
    with ExitStack() as stack:
        (directory / "buildkit").mkdir()
        builders = Builders(directory, stack.enter_context(BuildKit(directory / "buildkit")))
        chosen = [work for work in WORK if not only or work.__name__ in only]
        made = {work: builders.context(work.__name__, work) for work in chosen}
        yield f"Seconds, medians of {count}; BuildKit {version()}, with its daemon running."
        yield ""
        yield "| what | firebuild | buildah | BuildKit | ratio | to reach |"
        yield "|---|---|---|---|---|---|"
        for work in chosen:
            times = measure(builders, made[work], count)
            for cached in (False, True):
                yield row(str(work.__doc__).rstrip("."), work, times, cached=cached)
        yield ""
        yield from base_lines(builders, directory, count)
        yield ""
        yield "| most memory, MB | host | guest | others |"
        yield "|---|---|---|---|"
        for work in chosen:
            found = peaks(builders.command(made[work], cached=False), builders.environ)
            sizes = " | ".join(f"{found.get(role, 0):.0f}" for role in ("host", "guest", "others"))
            yield f"| {str(work.__doc__).rstrip('.')} | {sizes} |"
        yield ""
        (directory / "way").mkdir()
        way = way_of_a_file(directory / "way")
        yield f"A COPY source meets {way.modules} modules on the way to the disk (to reach: 16): {way.told}."
        if not only:
            yield ""
            yield "The session stream against a bare gRPC stream of the same bytes over mutual TLS; to reach"
            yield "for `guest`, which verifies and writes `one` file of 512 MiB: 0.8."
            yield "`benchmarks/proxy_throughput.py` says what the ways are."
            yield ""
            yield from proxy_throughput.table(["one", "many"], count)


def base_lines(builders: Builders, directory: Path, count: int) -> Iterator[str]:
    """Tell what a base of the size of Debian's costs when it is used for the second time."""
    fill(directory / "tree/usr", folders=100, files=80, size=16_000)
    (directory / "tree/bin").mkdir()
    (directory / "tree/bin/sh").write_bytes(Path("/bin/busybox").read_bytes())
    (directory / "tree/bin/sh").chmod(0o755)
    builders.keep_base("debian-sized", directory / "tree")
    sized = builders.context("sized", lambda _: "FROM debian-sized\nRUN true\n")
    tiny = builders.context("tiny", lambda _: "FROM bench\nRUN true\n")
    builders.ours(sized, cached=False)
    found: list[tuple[float, float]] = []
    for _ in range(count):
        pair = [timed(lambda file=file: builders.ours(file, cached=False)) for file in (sized, tiny)]  # type: ignore[misc]
        found.append((pair[0], pair[1]))
    large_base, small_base = (statistics.median(each) for each in zip(*found, strict=True))
    yield (
        f"FROM a base of 8,000 files and 128 MB, used before, and one RUN: {large_base:.2f} s; on busybox "
        f"{small_base:.2f} s; more: {large_base - small_base:.2f} s (to reach: 0.1)."
    )


def write(lines: list[str]) -> None:
    """Put the report into its section of the results."""
    text = RESULTS.read_text()
    section = "\n".join(
        [HEADING, "", "    .venv/bin/python benchmarks/build_speed.py --write", "", *lines, "", ""]
    )
    head, found, rest = text.partition(HEADING + "\n")
    if found:
        rest = rest[rest.index("\n## ") + 1 :] if "\n## " in rest else ""
    RESULTS.write_text((head.rstrip("\n") + "\n\n" + section + rest).rstrip("\n") + "\n")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], choices=[work.__name__ for work in WORK])
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    # As whoever installs firebuild has it; here nobody may have written it since the last change.
    compileall.compile_dir(Path(__file__).resolve().parents[1] / "src", quiet=1)
    lines = []
    # The last build's cleanup process may still be at work in it.
    with tempfile.TemporaryDirectory(prefix="build-speed-", ignore_cleanup_errors=True) as directory:
        for line in report(Path(directory), arguments.runs, arguments.only):
            print(line, flush=True)
            lines.append(line)
    if arguments.write:
        write(lines)


if __name__ == "__main__":
    main()
