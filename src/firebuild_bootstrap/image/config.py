"""The configuration that an image carries, as in the OCI image specification (config.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Healthcheck:
    """A HEALTHCHECK; `test` is `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", command]`, times in nanoseconds."""

    test: tuple[str, ...]
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


@dataclass(frozen=True)
class ImageConfig:
    """How a program in the image is meant to run; inherited by images built on it.

    `shell` is the SHELL in force at the end, None for the default `/bin/sh -c`. `onbuild` holds the
    instructions (as written) that a child image executes right after its FROM.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    workdir: str = "/"
    user: str = ""
    shell: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    healthcheck: Healthcheck | None = None
    author: str = ""
    onbuild: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the `config` object with OCI's key names; empty members are left out."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ImageConfig:
        """Read what `as_json` wrote, or the `config` object of an OCI or Docker image.

        Raises:
            InputError: a member has the wrong type; the message names it.
        """
        raise NotImplementedError
