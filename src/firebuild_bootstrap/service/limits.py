"""The limits of one build's server, and when a guest counts as lost: pure time keeping, no threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from firebuild_bootstrap.errors import BuildTimeout, FirebuildError, GuestLost
from firebuild_bootstrap.wire import MAX_MESSAGE_BYTES
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.bootstrap_settings import BootstrapSettings


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Times in seconds, sizes in bytes.

    Args:
        max_message_bytes: largest message in either direction.
        max_connections: connections of the guest at once; more are refused.
        max_handshakes: connections at once that have not shown the guest's certificate yet; where one more
            comes, the oldest of them has to go.
        handshake_timeout: from accepting a connection to the end of its TLS handshake.
        initial_timeout: from the start to the guest's first authenticated call.
        ping_interval: how often the guest is told to ping.
        missed_pings: silent intervals after which the guest is lost.
        reconnect_grace: how long the guest may be without any connection.
        build_timeout: from the start to the guest's report of its end.
        max_log_bytes: output of one build that is passed on; what exceeds it is dropped.
    """

    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_connections: int = 16
    max_handshakes: int = 128
    handshake_timeout: float = 10.0
    initial_timeout: float = 60.0
    ping_interval: float = 5.0
    missed_pings: int = 6
    reconnect_grace: float = 5.0
    build_timeout: float = 1800.0
    max_log_bytes: int = 64 * 1024 * 1024

    @classmethod
    def of(cls, settings: BootstrapSettings) -> Limits:
        """Return the limits that the settings ask for; what they don't mention keeps its default."""
        return cls(
            max_connections=settings.max_connections,
            initial_timeout=settings.initial_timeout.total_seconds(),
            ping_interval=settings.ping_interval.total_seconds(),
            missed_pings=settings.missed_pings,
            build_timeout=settings.build_timeout.total_seconds(),
            max_log_bytes=settings.log_limit,
        )


class Watch:
    """Keeps the times of one build; every time is in seconds of one clock that only ever grows.

    Args:
        limits: how long each thing may take.
        now: the time of the start.
        refusals: says who else called, for the case that the guest never does.
    """

    def __init__(self, limits: Limits, now: float, refusals: Callable[[], str]) -> None:
        self._limits = limits
        self._ping_interval = limits.ping_interval
        self._refusals = refusals
        self._build_deadline = now + limits.build_timeout
        self._initial_deadline = now + limits.initial_timeout
        self._last_seen: float | None = None
        self._held: float | None = None
        self._connections = 0
        self._disconnected = now
        self._left = False
        self._step = 0

    @property
    def connected(self) -> bool:
        """Whether the guest has made an authenticated call."""
        return self._last_seen is not None

    def restart(self, now: float) -> None:
        """Give the guest the whole initial time again, from `now` on."""
        self._initial_deadline = now + self._limits.initial_timeout

    def seen(self, now: float) -> None:
        """The guest made an authenticated call or takes what it asked for."""
        self._last_seen = now

    def hold(self, now: float) -> bool:
        """Let the guest be silent from now on, as nobody listens; say whether that is new."""
        first = self._held is None
        if first:
            self._held = now
        return first

    def release(self, now: float) -> None:
        """Somebody listens again: the guest's patience goes on where it was."""
        # Not `seen`: there are events that others cause, who must not keep a dead guest alive.
        if self._held is not None and self._last_seen is not None:
            self._last_seen = min(now, self._last_seen + now - self._held)
        self._held = None

    def opened(self) -> None:
        """The guest has one more connection."""
        self._connections += 1

    def closed(self, now: float) -> None:
        """The guest has one connection less."""
        self._connections -= 1
        self._disconnected = now

    def left(self, now: float) -> None:
        """The guest has ended its session."""
        self._left = True
        self._disconnected = now

    def step_started(self, step: int) -> None:
        """The guest works on `step` from now on; messages name it."""
        self._step = step

    def pings_every(self, seconds: float) -> None:
        """The guest pings no more often than this, whatever it is told."""
        self._ping_interval = max(self._ping_interval, seconds)

    def extend(self, seconds: float) -> None:
        """Give the build so much more time."""
        self._build_deadline += seconds

    def deadline(self) -> tuple[float, Callable[[], FirebuildError]]:
        """Return when the build ends unless something happens, and the error that it ends with then."""
        deadlines: list[tuple[float, Callable[[], FirebuildError]]] = [
            (self._build_deadline, self._took_too_long)
        ]
        if self._last_seen is None:
            deadlines.append((self._initial_deadline, self._never_called))
        else:
            patience = self._ping_interval * self._limits.missed_pings
            if self._held is None:
                deadlines.append((self._last_seen + patience, self._fell_silent))
            if self._connections == 0 or self._left:
                deadlines.append((self._disconnected + self._limits.reconnect_grace, self._disconnected_))
        return min(deadlines, key=lambda entry: entry[0])

    def _where(self) -> str:
        return f" during step {self._step}" if self._step else ""

    def _took_too_long(self) -> FirebuildError:
        return BuildTimeout(
            f"the build took longer than {counted(self._limits.build_timeout, 'second')}{self._where()}",
            hint="raise bootstrap.build_timeout if the build really needs longer",
        )

    def _never_called(self) -> FirebuildError:
        return GuestLost(
            f"the guest did not call within {counted(self._limits.initial_timeout, 'second')}; "
            f"{self._refusals()}",
            hint="look at the machine's console; raise bootstrap.initial_timeout for slow machines",
        )

    def _fell_silent(self) -> FirebuildError:
        return GuestLost(
            f"the guest fell silent{self._where()}: no call for {self._limits.missed_pings} ping intervals "
            f"of {counted(self._ping_interval, 'second')}",
            hint="look at the machine's console; raise bootstrap.ping_interval for slow machines",
        )

    def _disconnected_(self) -> FirebuildError:
        return GuestLost(
            f"the guest closed its connection{self._where()} before it reported a result",
            hint="look at the machine's console",
        )
