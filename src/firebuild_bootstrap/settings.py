"""The settings of a build: the sections of the configuration file besides `ca`.

Precedence, lowest first: defaults, the file, `FIREBUILD_<SECTION>__<KEY>` in the environment, options
of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from firebuild_pki.config import (
    CASettings,
    Document,
    Duration,
    Settings,
    load_document,
    validate,
)
from pydantic import AfterValidator, ByteSize, Field

# Environment variables that start like a setting and are none.
RESERVED_ENVIRONMENT = frozenset({"FIREBUILD_HOME", "FIREBUILD_CONFIG"})


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("expected a duration above zero")
    return value


def _loopback(value: str) -> str:
    try:
        address = ip_address(value)
    except ValueError:
        raise ValueError("expected an IP address such as 127.0.0.1") from None
    if not address.is_loopback:
        raise ValueError("the driver `local` runs the guest on this host: expected a loopback address")
    return value


PositiveDuration = Annotated[Duration, AfterValidator(_positive)]


class BootstrapSettings(Settings):
    """The bootstrap server and its limits."""

    bind: Annotated[str, AfterValidator(_loopback)] = Field(
        "127.0.0.1", description="Address that the server listens on; the port is chosen by the system."
    )
    initial_timeout: PositiveDuration = Field(
        timedelta(seconds=60), description="How long to wait for the guest's first call."
    )
    build_timeout: PositiveDuration = Field(
        timedelta(minutes=30), description="How long all steps of the Dockerfile may take together."
    )
    ping_interval: PositiveDuration = Field(
        timedelta(seconds=5), description="How often the guest shows that it lives."
    )
    missed_pings: int = Field(
        6, ge=1, le=1000, description="After how many missing pings the guest counts as lost."
    )
    max_connections: int = Field(
        16, ge=1, le=1024, description="Connections at a time; more are refused."
    )
    log_limit: ByteSize = Field(
        ByteSize(64 * 1024 * 1024),
        ge=1024,
        description="How much output of a build is shown; the rest is counted and dropped.",
    )


class MachineSettings(Settings):
    """Where the build runs."""

    driver: Literal["local"] = Field(
        "local", description="`local`: a sandbox of user namespaces on this host."
    )
    ids: Literal["auto", "full", "subids", "single"] = Field(
        "auto",
        description="Which user ids exist in the sandbox: all (needs root), the subordinate ids of"
        " /etc/subuid, a single one, or the best of these that works.",
    )


class StoreSettings(Settings):
    """Where bases and images are kept."""

    path: Path | None = Field(
        None,
        description="Directory of bases and images; by default $FIREBUILD_HOME or the user's data directory.",
    )


class _Sections(Settings):
    bootstrap: BootstrapSettings = BootstrapSettings()
    machine: MachineSettings = MachineSettings()
    store: StoreSettings = StoreSettings()


@dataclass(frozen=True)
class BuildSettings:
    """All sections, validated."""

    ca: CASettings
    bootstrap: BootstrapSettings
    machine: MachineSettings
    store: StoreSettings
