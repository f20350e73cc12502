"""What `make demo` runs: the commands of a first build, each shown before it is executed.

Needs no root, no download and no container engine: the base is made of this machine's own shell and
core tools. Everything it makes is below `demo-out/`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-out"
FIREBUILD = Path(sys.executable).with_name("firebuild")
TAG = "demo/hello:1.0"


def show(*arguments: str) -> None:
    """Run `firebuild` with the arguments and end the demo where it fails."""
    print(f"\n$ firebuild {shlex.join(arguments)}", flush=True)
    environ = {**os.environ, "FIREBUILD_HOME": str(OUT)}
    status = subprocess.run([FIREBUILD, *arguments], cwd=ROOT, env=environ, check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Make a base, build the example, and look at what came out."""
    show("base", "from-host", "host")
    example = ["--dockerfile", "examples/hello/Dockerfile", "--context", "examples/hello"]
    show(
        "rootfs",
        *example,
        "--tag",
        TAG,
        "--build-arg",
        "GREETING=Welcome",
        "--output",
        "tar",
        "--output",
        "ext4",
    )
    show("images", "list")
    show("images", "inspect", TAG)
    print(f"\nThe image is below {OUT}. `firebuild rootfs --help` says what else there is.")


if __name__ == "__main__":
    main()
