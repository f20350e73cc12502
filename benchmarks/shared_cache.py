"""What a second machine saves: the same build in an empty store, with the cache that the first one wrote.

    .venv/bin/python benchmarks/shared_cache.py [--runs 3]

The cache is in Debian's registry on loopback, with TLS and a login. The build has two stages: one writes 64
MB that cannot be compressed and works for seconds, one copies 2,000 files. Needs docker-registry.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from registry.servers import CA, PASSWORD, USER, debian_registry

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
FIREBUILD = Path(sys.executable).with_name("firebuild")


def build(home: Path, work: Path, *options: str) -> float:
    """Return the seconds that one build takes."""
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FIREBUILD_")},
        "FIREBUILD_HOME": str(home),
        "FIREBUILD_CONFIG": str(work / "config.yml"),
        "REGISTRY_PASSWORD": PASSWORD,
    }
    if not home.exists():
        subprocess.run([FIREBUILD, "base", "from-host", "host"], env=environ, check=True, capture_output=True)
    began = time.perf_counter()
    command = [str(FIREBUILD), "build", "--quiet", "--tag", "app:1", *options, str(work / "context")]
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    rows: dict[str, list[float]] = {}
    for _ in range(parser.parse_args().runs):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            (work / "registry").mkdir()
            files = work / "context" / "files"
            files.mkdir(parents=True)
            (work / "context" / "Dockerfile").write_text(DOCKERFILE)
            for number in range(FILES):
                (files / str(number)).write_bytes(os.urandom(700))
            ca = CA.made(work)
            with debian_registry(work / "registry", ca) as host:
                login = {"username": USER, "password": {"env": "REGISTRY_PASSWORD"}}
                hosts = {host: {**login, "ca_file": str(ca.certificate)}}
                (work / "config.yml").write_text(json.dumps({"registries": {"hosts": hosts}}))
                ref = f"type=registry,ref={host}/cache:main"
                for what, store, options in (
                    ("first machine", "a", ()),
                    ("first machine, nothing changed, cache written", "a", ("--cache-to", f"{ref},mode=max")),
                    ("second machine, empty store", "b", ("--cache-from", ref)),
                    ("second machine, nothing changed", "b", ("--cache-from", ref)),
                ):
                    rows.setdefault(what, []).append(build(work / store, work, *options))
            for store in ("a", "b"):
                shutil.rmtree(work / store)
    first = statistics.median(rows["first machine"])
    print("| | seconds | ratio |\n|---|---|---|")
    for what, seconds in rows.items():
        print(f"| {what} | {statistics.median(seconds):.2f} | {statistics.median(seconds) / first:.2f} |")


if __name__ == "__main__":
    main()
