"""From the setting `machine.driver` to a machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.settings import BuildSettings


def make_machine(
    settings: BuildSettings, workspace: Workspace, *, store: Path, notice: Callable[[str], None]
) -> Machine:
    """Make the machine of one build and check all that it needs; nothing is started yet.

    Args:
        settings: the whole configuration.
        workspace: the build's directory.
        store: the directory of bases and images (`Home.root`).
        notice: told what the user should know besides.

    Raises:
        FirebuildError: something that the driver needs is missing on this host or in the settings.
    """
    match settings.machine.driver:
        case "local":
            from firebuild_bootstrap.machine.local import LocalMachine

            return LocalMachine(workspace, bind=settings.bootstrap.bind)
        case "qemu":
            from firebuild_bootstrap.machine.qemu.driver import qemu_machine

            return qemu_machine(settings.machine, workspace, store=store, notice=notice)
        case "firecracker":
            from firebuild_bootstrap.machine.firecracker.driver import firecracker_machine

            return firecracker_machine(settings.machine, workspace, store=store, notice=notice)
