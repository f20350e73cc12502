"""The program of a detached run: `firebuild` with arguments that no other user of this host can read.

They come to standard input, as a JSON list; standard output is where it says that its command has begun
(`runs.start_in_background`). Neither of the two goes to anything that is started here.
"""

from __future__ import annotations

import json
import os
import sys

from firebuild_bootstrap.cli import program


def main() -> None:
    """Take the place of the command line that has started this one, and exit."""
    sys.argv[:] = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.close(null)
    program(answer)


if __name__ == "__main__":
    main()
