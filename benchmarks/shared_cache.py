"""What a second machine saves: the same build in an empty store, with the cache that the first one wrote.

The cache is in Debian's registry on loopback, with TLS and a login. The build has two stages: one writes 64
MB that cannot be compressed and works for seconds, one copies 2,000 files. Two layers have 64 MB each that
can't be compressed: to write the cache is to run gzip over them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Final

from benchmarks.shape import FIREBUILD, Benchmark, Row, Run, command, firebuild_environ, timed
from registry.servers import CA, PASSWORD, USER, debian_registry

FIRST: Final = "the first machine's build"
WRITTEN: Final = Row("the first machine, nothing changed, cache written", FIRST)
EMPTY: Final = Row("a second machine, empty store", FIRST)
UNCHANGED: Final = Row("the second machine, nothing changed", FIRST)

FILES = 2000
DOCKERFILE = """\
FROM host AS build
COPY files /files
RUN head -c 67108864 /dev/urandom > /data
RUN i=0; while [ $i -lt 3000000 ]; do i=$((i+1)); done
FROM host
COPY --from=build /data /data
COPY files /files
RUN cat /files/* > /all
"""


def seconds(home: Path, work: Path, *options: str) -> float:
    """Return the seconds that one build takes."""
    settings = {"FIREBUILD_CONFIG": str(work / "config.yml"), "REGISTRY_PASSWORD": PASSWORD}
    environ = firebuild_environ(home) | settings
    if not home.exists():
        command([FIREBUILD, "base", "from-host", "host"], environ)
    words = [FIREBUILD, "build", "--quiet", "--tag", "app:1", *options, str(work / "context")]
    return timed(lambda: command(words, environ))


def one_round(run: Run, work: Path) -> None:
    """Build on two machines whose registry is empty."""
    files = work / "context" / "files"
    files.mkdir(parents=True)
    (work / "context" / "Dockerfile").write_text(DOCKERFILE)
    for number in range(FILES):
        (files / str(number)).write_bytes(os.urandom(700))
    (work / "registry").mkdir()
    ca = CA.made(work)
    with debian_registry(work / "registry", ca) as host:
        login = {"username": USER, "password": {"env": "REGISTRY_PASSWORD"}}
        hosts = {host: {**login, "ca_file": str(ca.certificate)}}
        (work / "config.yml").write_text(json.dumps({"registries": {"hosts": hosts}}))
        cache = f"type=registry,ref={host}/cache:main"
        first = seconds(work / "a", work)
        run.add(WRITTEN, seconds(work / "a", work, "--cache-to", f"{cache},mode=max"), first)
        run.add(EMPTY, seconds(work / "b", work, "--cache-from", cache), first)
        run.add(UNCHANGED, seconds(work / "b", work, "--cache-from", cache), first)


def measure(run: Run) -> None:
    """Build with a new registry in each round."""
    for number in range(run.rounds):
        work = run.directory / str(number)
        work.mkdir()
        one_round(run, work)
        shutil.rmtree(work)


BENCHMARK: Final = Benchmark(
    "shared-cache", __doc__, (WRITTEN, EMPTY, UNCHANGED), measure, rounds=2, needs=("docker-registry",)
)
