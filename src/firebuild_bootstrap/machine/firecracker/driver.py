"""The machine of the driver `firecracker`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.machine.settings import MachineSettings
from firebuild_bootstrap.machine.workspace import Workspace


def firecracker_machine(
    settings: MachineSettings, workspace: Workspace, *, store: Path, notice: Callable[[str], None]
) -> Machine:
    """Make the machine of one build; see `machine.drivers.make_machine`."""
    raise MachineError("the driver firecracker is not there yet")
