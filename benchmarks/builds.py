"""How long whole builds take against buildah and BuildKit, and what memory they need.

All build from the same contexts, on a base of one busybox: firebuild stores an image of layers; buildah
commits each layer, with overlayfs; BuildKit, whose daemon runs already, writes an OCI layout without
compression. Before a build with nothing cached, what earlier ones left is removed, but for what firebuild
knows of the digests of files by their inodes.

The disk of this machine is an ext4 without a journal, which passes over every inode that was freed in the
last minutes to make a file, and before each build what the last ones made is removed. firebuild has each
build's directory put into another part of the disk, so it rarely meets freed inodes: before, the row of
20,000 files was 9.26 s, 2.12 x BuildKit. The benchmark spreads its own directories as well: beside what it
had just removed, the guest of 20,000 files needed 14.9 s of a processor, and 2.0 s since.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.shape import FIREBUILD, Benchmark, Row, Run, command, firebuild_environ, timed
from firebuild_bootstrap.machine.workspace import spread
from oracle.daemon import BuildKit, Order
from support import peak

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


# What each is meant to reach, as a share of the peer's time.
WORK: Final[dict[Work, dict[str, float]]] = {
    small: {"buildah": 1.0},
    runs: {"BuildKit": 0.8},
    large: {"buildah": 0.6, "BuildKit": 0.6},
    many: {"buildah": 0.35, "BuildKit": 0.35},
}
PEERS: Final = {"buildah": ("buildah",), "BuildKit": ("BuildKit",)}
CACHED: Final = 0.35
"""Seconds that a build may take of which all is cached."""
BASE: Final = 0.1
"""Seconds that a base of the size of Debian's may add to a build, from the second one on."""


def title(work: Work, *, cached: bool) -> str:
    """Say what is built."""
    return str(work.__doc__).rstrip(".") + (", all cached" if cached else "")


def rows() -> Iterator[Row]:
    """Yield what is compared."""
    for work, goals in WORK.items():
        for peer, needs in PEERS.items():
            yield Row(title(work, cached=False), peer, "s", goals.get(peer), needs)
        yield Row(title(work, cached=True), LIMIT, "s", 1.0)
        for peer, needs in PEERS.items():
            yield Row(title(work, cached=True), peer, "s", None, needs)


LIMIT: Final = "limit that was set"
BASE_ROW: Final = Row("what a base of 8,000 files and 128 MB adds, used before, to one RUN", LIMIT, "s", 1.0)
ROWS: Final = {(row.what, row.against): row for row in [*rows(), BASE_ROW]}


# --- who builds it -------------------------------------------------------------------------------


class Builders:
    """firebuild and its peers, each with a store of its own that holds the bases."""

    def __init__(self, directory: Path, buildkit: BuildKit | None, *, buildah: bool) -> None:
        self._directory = directory
        self.environ = firebuild_environ(directory / "home")
        self._storage = ["buildah", "--storage-driver", "overlay", "--root", str(directory / "root")]
        self._storage += ["--runroot", str(directory / "run")]
        self._buildkit = buildkit
        self._bench = directory / "bench"
        busybox(self._bench, "busybox")
        (self._bench / "bin/sh").symlink_to("busybox")
        self.keep_base("bench", self._bench)
        self.peers: dict[str, Callable[[Path, bool], None]] = {}
        if buildkit:
            self.peers["BuildKit"] = self.buildkit
        if buildah:
            self.peers["buildah"] = self.buildah
            (directory / "Dockerfile.base").write_text("FROM scratch\nCOPY . /\n")
            base = [
                "bud",
                "--quiet",
                "--tag",
                "localhost/bench",
                "--file",
                str(directory / "Dockerfile.base"),
            ]
            command([*self._storage, *base, str(self._bench)])

    def keep_base(self, name: str, tree: Path) -> None:
        """Make a base for firebuild."""
        command([FIREBUILD, "base", "import", name, str(tree)], self.environ)

    def context(self, name: str, work: Work) -> Path:
        """Make a context and return it."""
        context = self._directory / name
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(work(context))
        return context

    def words(self, context: Path, *, cached: bool) -> list[str]:
        """Return the command of firebuild for a build."""
        words = [FIREBUILD, "build", "--tag", f"bench/{context.name}:1"]
        return [*words, *([] if cached else ["--no-cache"]), str(context)]

    def ours(self, context: Path, cached: bool) -> None:
        """Build with firebuild."""
        command(self.words(context, cached=cached), self.environ)

    def buildah(self, context: Path, cached: bool) -> None:
        """Build with buildah."""
        words = ["bud", "--isolation", "chroot", "--quiet", "--layers", "--pull-never"]
        words += ["--tag", "localhost/out"]
        command([*self._storage, *words, *([] if cached else ["--no-cache"]), str(context)])

    def buildkit(self, context: Path, cached: bool) -> None:
        """Build with BuildKit."""
        assert self._buildkit is not None
        output = f"type=oci,dest={self._directory / 'out.tar'},compression=uncompressed"
        contexts = {"bench": self._bench}
        self._buildkit.build(Order(context=context, contexts=contexts, output=output, cached=cached))

    def forget(self) -> None:
        """Remove what earlier builds left, but for the bases."""
        if "buildah" in self.peers:
            command([*self._storage, "rmi", "--prune", "--force"])
        if self._buildkit is not None:
            self._buildkit.prune()
            # The base is there before the clock starts, as it is for the others.
            self.buildkit(self.context("warm", lambda _: "FROM bench\nRUN true\n"), cached=True)


def busybox(tree: Path, name: str) -> None:
    """Put busybox into a tree, under a name."""
    (tree / "bin").mkdir(parents=True)
    shutil.copyfile("/bin/busybox", tree / "bin" / name)
    (tree / "bin" / name).chmod(0o755)


# --- measuring -----------------------------------------------------------------------------------


def compare(run: Run, builders: Builders, work: Work, context: Path) -> None:
    """Build by each, with nothing and with everything cached."""
    for _ in range(run.rounds):
        builders.forget()
        for cached in (False, True):
            what = title(work, cached=cached)
            ours = timed(partial(builders.ours, context, cached))
            if cached:
                run.add(ROWS[what, LIMIT], ours, CACHED)
            for peer, build in builders.peers.items():
                theirs = timed(partial(build, context, cached))
                run.add(ROWS[what, peer], ours, theirs)


def bases(run: Run, builders: Builders) -> None:
    """See what a base of the size of Debian's costs when it is used again."""
    tree = run.directory / "tree"
    fill(tree / "usr", folders=100, files=80, size=16_000)
    busybox(tree, "sh")
    builders.keep_base("debian-sized", tree)
    sized = builders.context("sized", lambda _: "FROM debian-sized\nRUN true\n")
    tiny = builders.context("tiny", lambda _: "FROM bench\nRUN true\n")
    builders.ours(sized, cached=False)
    for _ in range(run.rounds):
        large_base, small_base = (timed(partial(builders.ours, at, cached=False)) for at in (sized, tiny))
        run.add(BASE_ROW, large_base - small_base, BASE)


def measure(run: Run) -> None:
    """Build everything by everybody."""
    spread(run.directory)  # as those of builds: what the last run made is not in the way
    (run.directory / "buildkit").mkdir()
    with ExitStack() as stack:
        wanted = {peer for (_, peer), row in ROWS.items() if peer in PEERS and run.wants([row])}
        buildkit = stack.enter_context(BuildKit(run.directory / "buildkit")) if "BuildKit" in wanted else None
        builders = Builders(run.directory, buildkit, buildah="buildah" in wanted)
        contexts = {work: builders.context(work.__name__, work) for work in WORK}
        for work, context in contexts.items():
            compare(run, builders, work, context)
        bases(run, builders)
        memory = [
            f"{title(work, cached=False)} {peaks(builders.words(context, cached=False), builders.environ)}"
            for work, context in contexts.items()
        ]
        run.note(f"most memory in MB of the host's process, the guest's and any other: {', '.join(memory)}")


# --- memory --------------------------------------------------------------------------------------


def peaks(words: list[str], environ: dict[str, str]) -> str:
    """Run a build and tell the most memory of the host's process, the guest's and any other, in MB."""
    found: dict[str, int] = {}
    process = subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for pid in descendants(process.pid):
            try:
                program = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            role = "host" if pid == process.pid else "guest" if is_guest(program) else "others"
            found[role] = max(found.get(role, 0), peak(pid) or 0)
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{words}: status {process.returncode}")
    return "/".join(f"{found.get(role, 0) / 1e6:.0f}" for role in ("host", "guest", "others"))


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


BENCHMARK: Final = Benchmark("builds", __doc__, tuple(ROWS.values()), measure, rounds=3, needs=("busybox",))
