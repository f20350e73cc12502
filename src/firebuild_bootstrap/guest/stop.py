"""The one way in which the guest is asked to end early: by a signal, a lost server or a failed relay."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import GuestError


class Stop:
    """Holds the first reason to end; wakes those who wait for descriptors and calls those who registered."""

    def __init__(self) -> None:
        self._reason: GuestError | None = None
        # Reentrant: a signal handler may run while its own thread holds it.
        self._lock = threading.RLock()
        self._actions: list[Callable[[], object]] = []
        self._event = threading.Event()
        self._wake_read, self._wake_write = os.pipe()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the end is asked for."""
        return self._wake_read

    def set(self, reason: GuestError) -> None:
        """Ask for the end; only the first reason counts."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            actions = list(self._actions)
            if self._wake_write >= 0:  # once it is closed, the number is another file's
                os.write(self._wake_write, b"x")
        self._event.set()
        for action in actions:
            action()

    @property
    def reason(self) -> GuestError | None:
        """The first reason given, None while the guest may go on."""
        return self._reason

    def check(self) -> None:
        """Raise the reason if the end was asked for.

        Raises:
            GuestError: whatever was set.
        """
        if self._reason is not None:
            raise self._reason

    def wait(self, seconds: float) -> bool:
        """Sleep until the end is asked for or `seconds` have passed; say whether it was."""
        return self._event.wait(seconds)

    @contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """Call `action` (from any thread, at once if it is too late) when the end is asked for."""
        with self._lock:
            self._actions.append(action)
            late = self._reason is not None
        if late:
            action()
        try:
            yield
        finally:
            with self._lock:
                self._actions.remove(action)

    def close(self) -> None:
        """Release the descriptors. Idempotent; the end may still be asked for."""
        with self._lock:
            descriptors = self._wake_read, self._wake_write
            self._wake_read = self._wake_write = -1
            for descriptor in descriptors:
                if descriptor >= 0:
                    os.close(descriptor)
