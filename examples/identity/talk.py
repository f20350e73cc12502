"""Two machines speak mutual TLS to each other, and two others are refused.

    python examples/identity/talk.py [--base IMAGE] [option of firebuild run, such as --machine qemu]

IMAGE has Python 3; by default it is one of a registry.

The wire between the machines is two pipes, because not every driver has a network between machines; what is
on it is TLS all the same, and this script sees nothing else. With a network it would be a socket.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
FIREBUILD = Path(sys.executable).with_name("firebuild")
IMAGE = "peer"
WEB, DB = "spiffe://example.org/web", "spiffe://example.org/db"


def machine(
    role: str,
    name: str,
    peer: str,
    options: Sequence[str],
    wire: tuple[int, int],
    *,
    environ: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    """Start a machine with an identity.

    Args:
        role: what it does, for peer.py.
        name: who it is.
        peer: whom it expects.
        options: of `firebuild run`.
        wire: descriptors that it reads from and writes to; they are closed here.
        environ: more settings of firebuild.
    """
    command = ["python3", "/peer.py", role, peer]
    started = subprocess.Popen(
        [FIREBUILD, "run", "-i", "--identity", name, *options, IMAGE, *command],
        stdin=wire[0],
        stdout=wire[1],
        stderr=subprocess.PIPE,
        env={**os.environ, **environ},
    )
    for descriptor in wire:
        os.close(descriptor)
    return started


def talk(title: str, caller: str, options: Sequence[str], **of_caller: str) -> None:
    """Have the machine of the database called by one that says that it is `caller`."""
    there, back = os.pipe(), os.pipe()
    db = machine("answer", DB, WEB, options, (there[0], back[1]), environ={})
    web = machine("ask", caller, DB, options, (back[0], there[1]), environ=of_caller)
    said = [each.communicate()[1].decode() for each in (web, db)]
    print(f"--- {title}\n{''.join(said)}exit status {web.returncode} and {db.returncode}\n", flush=True)


def main(options: Sequence[str], base: str | None) -> None:
    """Show all three."""
    argument = [] if base is None else ["--build-arg", f"BASE={base}"]
    subprocess.run([FIREBUILD, "build", "-q", "-t", IMAGE, *argument, HERE], check=True)
    talk("two machines of one CA", WEB, options)
    talk("another machine of the same CA", "spiffe://example.org/other", options)
    with tempfile.TemporaryDirectory() as folder:
        talk("the same name, from another CA", WEB, options, FIREBUILD_CA__EMBEDDED__DIRECTORY=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="image with Python 3")
    known, others = parser.parse_known_args()
    main(others, known.base)
