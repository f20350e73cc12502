"""Noticing input and output: the ways to it that Python code takes are watched for a while.

An audit hook (`sys.addaudithook`) would see more, but it can never be removed, and it runs within
everything that the rest of the process does.
"""

from __future__ import annotations

import builtins
import io
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

_FILES = ("stat", "lstat", "access", "open", "listdir", "scandir", "readlink", "mkdir", "rmdir", "unlink")
_CHANGES = ("remove", "rename", "replace", "link", "symlink", "chmod", "chown", "utime", "truncate", "system")

_PLACES: tuple[tuple[Any, str, str], ...] = (
    *((os, name, f"os.{name}") for name in (*_FILES, *_CHANGES)),
    (builtins, "open", "open"),
    (io, "open", "open"),
    (socket, "getaddrinfo", "socket.getaddrinfo"),
    (socket.socket, "__init__", "socket.socket"),
    (subprocess.Popen, "__init__", "subprocess.Popen"),
)


class _Watch(threading.local):
    """What the thread did since it is watched; None while it is not."""

    seen: list[str] | None = None


_watch = _Watch()


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect the input and output of this thread; what other threads do meanwhile does not count."""
    seen: list[str] = []
    with ExitStack() as patches:
        for owner, name, words in _PLACES:
            watching = _noted(getattr(owner, name), words)
            patches.enter_context(mock.patch.object(owner, name, watching))
        _watch.seen = seen
        patches.callback(setattr, _watch, "seen", None)
        yield seen


def _noted(function: Callable[..., Any], words: str) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        if _watch.seen is not None:
            what = [repr(one) for one in arguments[:1] if isinstance(one, str | bytes | os.PathLike)]
            _watch.seen.append(" ".join([words, *what]))
        return function(*arguments, **more)

    return call
