"""Noticing input and output: what Python's audit hooks tell, and questions about files."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

_EVENTS = ("open", "os.", "socket.", "subprocess.", "shutil.", "tempfile.", "http.", "urllib.")
_HARMLESS = ("os.putenv", "os.unsetenv")
_QUESTIONS = ("stat", "lstat", "access")


class _Watch(threading.local):
    """What the thread did since it is watched; None while it is not."""

    seen: list[str] | None = None


_watch = _Watch()


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect the input and output of this thread, as far as Python tells (`sys.addaudithook`)."""
    _install()
    seen: list[str] = []
    with ExitStack() as patches:
        for name in _QUESTIONS:  # Python audits no questions about files
            patches.enter_context(mock.patch.object(os, name, _noted(getattr(os, name))))
        _watch.seen = seen
        patches.callback(setattr, _watch, "seen", None)
        yield seen


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch.seen is not None and event.startswith(_EVENTS) and event not in _HARMLESS:
        _watch.seen.append(f"{event} {arguments[0] if arguments else ''!r}")


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    def ask(*arguments: Any, **more: Any) -> Any:
        if _watch.seen is not None:
            _watch.seen.append(f"os.{function.__name__} {arguments[0]!r}")
        return function(*arguments, **more)

    return ask


_hook.__cantrace__ = True  # type: ignore[attr-defined]  # debuggers and coverage may look into it
_installed = threading.Lock()


def _install() -> None:
    # a hook cannot be removed, so there is one for the life of the process
    if _installed.acquire(blocking=False):
        sys.addaudithook(_hook)
