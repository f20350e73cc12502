"""Signs of life to the server, and noticing that it has gone."""

from __future__ import annotations

import threading

from .client import Client
from .errors import ServerLost
from .stop import Stop

_FAILURES = 3
_SHORTEST = 0.05


class Pings:
    """Pings in the background between entry and exit; three failures in a row end the guest.

    Args:
        client: whom to ping.
        stop: is set when the server has gone.
        interval: seconds between pings, also how long one may take (at least five seconds).
    """

    def __init__(self, client: Client, stop: Stop, interval: float) -> None:
        self._client = client
        self._stop = stop
        self._interval = max(interval, _SHORTEST)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pings", daemon=True)

    def __enter__(self) -> Pings:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _run(self) -> None:
        failures = number = 0
        timeout = max(self._interval, 5.0)
        while not self._done.wait(self._interval):
            number += 1
            failures = 0 if self._client.ping(str(number), timeout) else failures + 1
            if failures == _FAILURES and not self._done.is_set():
                self._stop.set(ServerLost(f"the server did not answer {_FAILURES} pings in a row"))
                return
