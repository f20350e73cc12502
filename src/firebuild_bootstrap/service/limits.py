"""The limits of one build's server, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from firebuild_bootstrap.wire import MAX_MESSAGE_BYTES

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
