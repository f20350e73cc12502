"""The one way in which the guest is asked to end early: by a signal, a lost server or a failed relay."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import GuestError

_BATCH = 64 * 1024  # bytes; what a pipe holds


class Waker:
    """Wakes who waits for its descriptor, from any thread or signal handler, until it is closed."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may run while its own thread holds it.
        self._lock = threading.RLock()
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)

    def fileno(self) -> int:
        """Return the descriptor, which is readable once somebody was woken."""
        return self._read

    def wake(self) -> None:
        """Make it readable."""
        with self._lock, suppress(BlockingIOError):  # it is full, then it is readable
            if self._write >= 0:  # once it is closed, the number is another file's
                os.write(self._write, b"x")

    def drain(self) -> None:
        """Make it unreadable until the next time."""
        with suppress(BlockingIOError):
            os.read(self._read, _BATCH)

    def close(self) -> None:
        """Release the descriptors. Idempotent."""
        with self._lock:
            ends = self._read, self._write
            self._read = self._write = -1
            for end in ends:
                if end >= 0:
                    os.close(end)


class Stop:
    """Holds the first reason to end; wakes those who wait for descriptors and calls those who registered."""

    def __init__(self) -> None:
        self._reason: GuestError | None = None
        # Reentrant: a signal handler may run while its own thread holds it.
        self._lock = threading.RLock()
        self._actions: list[Callable[[], object]] = []
        self._event = threading.Event()
        self._waker = Waker()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the end is asked for."""
        return self._waker.fileno()

    def set(self, reason: GuestError) -> None:
        """Ask for the end; only the first reason counts."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            actions = list(self._actions)
        self._waker.wake()
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
        self._waker.close()
