"""What it costs to write an image of a Debian system as ext4, as EROFS and as an OCI archive.

    .venv/bin/python benchmarks/exports.py [--runs 3] [--root DIRECTORY]

Beside each what people use for it: `mke2fs -d` and `mkfs.erofs` of the unpacked tree, and `buildah push`.
They take turns, so that a busy machine slows all; the ratios are what counts. The system is one of mmdebstrap
unless a directory with one is given. As root, with buildah, erofs-utils and mmdebstrap.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

ENV = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "MKE2FS_CONFIG": "/nonexistent"}
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
FIREBUILD = str(Path(sys.executable).with_name("firebuild"))
DOCKERFILE = "FROM scratch\nADD root.tar /\n"


def debian(target: Path) -> None:
    """Unpack a small Debian system."""
    command = ["mmdebstrap", "--quiet", "--variant=standard", "--mode=root", "bookworm", str(target)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ways(work: Path, tree: Path, size: int) -> Mapping[str, Mapping[str, list[str]]]:
    """Return the commands by what they write: ours, and last that of others. Each writes `out`."""
    out = str(work / "out")
    ours = [FIREBUILD, "images", "export", "bench:1", "--output"]
    buildah = ["buildah", "--root", f"{work}/buildah", "--runroot", f"{work}/run", "--storage-driver", "vfs"]
    return {
        "ext4": {
            "firebuild": [*ours, f"ext4,dest={out}"],
            "mke2fs -d": ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), out, f"{size * 2 + 200}M"],
        },
        "EROFS": {
            "firebuild": [*ours, f"erofs,dest={out}"],
            "mkfs.erofs": ["mkfs.erofs", "--quiet", out, str(tree)],
        },
        "OCI": {
            "firebuild": [*ours, f"oci,dest={out}"],
            "firebuild, zstd": [*ours, f"oci,dest={out},compression=zstd"],
            "buildah push": [*buildah, "push", "--quiet", "bench:1", f"oci-archive:{out}"],
        },
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command and return seconds on the clock, and of the processors for it and all that it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    with suppress(ChildProcessError):  # what it has left behind is ours by now
        while True:
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def forget(home: Path) -> None:
    """Make the store forget what an export would find there."""
    for image in (home / "images/content").iterdir():
        for form in image.glob("rootfs.*"):
            form.unlink()
    shutil.rmtree(home / "blobs", ignore_errors=True)


def main() -> None:
    """Write the image with each, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--root", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        work = Path(name)
        os.environ["FIREBUILD_HOME"] = str(work / "home")
        tree = asked.root or work / "root"
        if asked.root is None:
            debian(tree)
        (context := work / "context").mkdir()
        (context / "Dockerfile").write_text(DOCKERFILE)
        tar = [
            "tar",
            "--exclude=./dev/*",
            "--one-file-system",
            "-C",
            str(tree),
            "-cf",
            str(context / "root.tar"),
            ".",
        ]
        subprocess.run(tar, check=True)
        size = sum(each.lstat().st_blocks for each in tree.rglob("*")) >> 11
        files = sum(1 for _ in tree.rglob("*"))
        subprocess.run(
            [FIREBUILD, "build", "-q", "-t", "bench:1", context], check=True, stdout=subprocess.DEVNULL
        )
        commands = ways(work, tree, size)
        buildah = commands["OCI"]["buildah push"][:7]
        subprocess.run(
            [*buildah, "build", "--quiet", "--isolation", "chroot", "-t", "bench:1", context],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found: dict[str, dict[str, list[tuple[float, float, int]]]] = {
            form: {way: [] for way in each} for form, each in commands.items()
        }
        for _ in range(asked.runs):
            for form, each in commands.items():
                for way, command in each.items():
                    forget(work / "home")
                    found[form][way].append((*timed(command), (work / "out").stat().st_blocks >> 11))
                    (work / "out").unlink()
    print(f"A Debian system of {files} files and {size} MiB, in one layer\n")
    print("| | by | seconds | CPU seconds | MiB written | ratio |\n|---|---|---|---|---|---|")
    for form, measured in found.items():
        other = statistics.median(run[0] for run in list(measured.values())[-1])
        for way, runs in measured.items():
            seconds, cpu, written = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"| {form} | {way} | {seconds:.1f} | {cpu:.1f} | {written:.0f} | {seconds / other:.2f} |")


if __name__ == "__main__":
    os.environ |= ENV
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    main()
