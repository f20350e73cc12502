"""The settings of a build: one section per subject, all optional.

Precedence, lowest first: defaults, the file, `FIREBUILD_<SECTION>__<KEY>` in the environment, options
of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from firebuild_pki.config import (
    CASettings,
    Document,
    PositiveDuration,
    Settings,
    load_document,
    validate,
)

# Environment variables that start like a setting and are none.
RESERVED_ENVIRONMENT = frozenset({"FIREBUILD_HOME", "FIREBUILD_CONFIG", "FIREBUILD_DEBUG"})

_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


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


def _size(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value)
    for unit, factor in sorted(_SIZE_UNITS.items(), key=lambda item: -len(item[0])):
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.isdecimal():
            return int(number) * factor
    raise ValueError(f'expected a size such as 64MiB (B, KiB, MiB, GiB), found "{text}"')


ByteSize = Annotated[int, BeforeValidator(_size, json_schema_input_type=int | str), Field(ge=1024)]


class BootstrapSettings(Settings):
    """The section `bootstrap`: the server that the guest calls back, and its limits."""

    bind: Annotated[str, AfterValidator(_loopback)] = "127.0.0.1"
    """Address that the server listens on; the system chooses the port."""
    initial_timeout: PositiveDuration = timedelta(seconds=60)
    """How long to wait for the guest's first call."""
    build_timeout: PositiveDuration = timedelta(minutes=30)
    """How long all steps of the Dockerfile may take together."""
    ping_interval: PositiveDuration = timedelta(seconds=5)
    """How often the guest shows that it lives."""
    missed_pings: Annotated[int, Field(ge=1, le=1000)] = 6
    """After how many missing pings the guest counts as lost."""
    max_connections: Annotated[int, Field(ge=1, le=1024)] = 16
    """Connections at a time; more are refused."""
    log_limit: ByteSize = 64 << 20
    """How much output of a build is shown; what comes after it is dropped, and the build goes on."""


class MachineSettings(Settings):
    """The section `machine`: where the build runs."""

    driver: Literal["local"] = "local"
    """local: a sandbox on this host."""
    ids: Literal["auto", "full", "subids", "single"] = "auto"
    """User ids in the sandbox: all (root only), those of /etc/subuid, one, or the best that works."""


class StoreSettings(Settings):
    """The section `store`: where bases and images are kept."""

    path: str | None = None
    """Directory; by default $FIREBUILD_HOME, or firebuild in the user's data directory."""


class BuildSettings(Settings):
    """The whole configuration file."""

    ca: CASettings = Field(default_factory=lambda: CASettings.model_validate({}))
    bootstrap: BootstrapSettings = BootstrapSettings()
    machine: MachineSettings = MachineSettings()
    store: StoreSettings = StoreSettings()


def load_settings(
    file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any] | None = None
) -> BuildSettings:
    """Read the settings from a file, the environment and options.

    Args:
        file: the configuration file, or None for defaults.
        environ: environment variables, usually `os.environ`.
        overrides: dotted path to value, from options of the command line.

    Raises:
        firebuild_pki.SettingsError: every problem found, with file, line and column.
    """
    document = Document({}) if file is None else load_document(file)
    document = document.merged(environ, reserved=RESERVED_ENVIRONMENT)
    return validate(BuildSettings, document.overridden(overrides or {}))
