"""Names of files are UTF-8 in Dockerfiles, layers and the protocol, so in this process as well."""

from __future__ import annotations

import os
import sys


def ensure_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if the locale has names of files decoded otherwise.

    An environment decides that (LC_ALL=de_DE, or PYTHONUTF8=0 with LC_ALL=C), and a running process can't
    change it: `os.fsdecode` and everything that takes a path would give other names than the Dockerfile has.
    It has to come first, because nothing that the process has begun is carried over but its descriptors.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1" or not sys.executable:
        return  # with the variable set, it was told by -E or -X utf8=0 not to heed that
    again = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, again, {**os.environ, "PYTHONUTF8": "1"})  # noqa: S606 - the same program
