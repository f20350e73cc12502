"""The driver `external`: the machine is started by somebody else's tool (docs/external.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firebuild_bootstrap.machine.external.driver import ExternalMachine

__all__ = ["ExternalMachine"]


def __getattr__(name: str) -> Any:
    """Import the driver when it is asked for: reading settings does without it."""
    if name == "ExternalMachine":
        from firebuild_bootstrap.machine.external.driver import ExternalMachine

        return ExternalMachine
    raise AttributeError(name)
