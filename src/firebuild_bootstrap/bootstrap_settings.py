"""The section `bootstrap` of the settings, and the types of sizes and addresses in all sections."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv4Address, ip_address
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from firebuild_bootstrap.sizes import parse_size
from firebuild_bootstrap.wire import MAX_INTERVAL
from firebuild_pki.config import PositiveDuration, Settings

_CERTIFICATE_MARGIN = timedelta(minutes=10)


def _bytes(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


ByteSize = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(ge=1024)]
"""A number of bytes, or a text such as `64MiB`."""


def ipv4(value: str) -> str:
    """Return an IPv4 address in its usual form.

    Raises:
        ValueError: it is not one.
    """
    try:
        return str(IPv4Address(value))
    except ValueError:
        raise ValueError(f'expected an IPv4 address such as 192.0.2.53, found "{value}"') from None


Address = Annotated[str, AfterValidator(ipv4)]
"""An IPv4 address."""


def _loopback(value: str) -> str:
    try:
        address = ip_address(value)
    except ValueError:
        raise ValueError(f'expected an IP address such as 127.0.0.1, found "{value}"') from None
    if not address.is_loopback:
        raise ValueError(
            f'expected a loopback address, found "{value}": the driver local runs the guest on this host'
        )
    return value


def _of_a_day(value: timedelta) -> timedelta:
    if value > timedelta(seconds=MAX_INTERVAL):
        raise ValueError("expected a duration of 24h at most, which is the longest that guests take")
    return value


class BootstrapSettings(Settings):
    """The section `bootstrap`: the server that the guest calls back, and its limits."""

    bind: Annotated[str, AfterValidator(_loopback)] = "127.0.0.1"
    """Address that the server listens on; the system chooses the port."""
    initial_timeout: PositiveDuration = timedelta(seconds=60)
    """How long to wait for the guest's first call."""
    build_timeout: PositiveDuration = timedelta(minutes=30)
    """How long all steps of the Dockerfile may take together."""
    ping_interval: Annotated[PositiveDuration, AfterValidator(_of_a_day)] = timedelta(seconds=5)
    """How often the guest shows that it lives."""
    missed_pings: Annotated[int, Field(ge=1, le=1000)] = 6
    """After how many missing pings the guest counts as lost."""
    max_connections: Annotated[int, Field(ge=1, le=1024)] = 16
    """Connections of the guest at a time; more are refused. Those of others don't count."""
    log_limit: ByteSize = 64 << 20
    """How much output of each step is shown as it comes; of what comes after it, the end is shown."""

    @property
    def build_time(self) -> timedelta:
        """How long a build may take in all, from the start of its machine."""
        return self.initial_timeout + self.build_timeout

    @property
    def certificate_lifetime(self) -> timedelta:
        """How long certificates should be valid: unpacking and storing take time, and clocks differ."""
        return self.build_time + _CERTIFICATE_MARGIN
