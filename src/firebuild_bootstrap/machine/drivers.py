"""From the setting `machine.driver` to a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError, hint_before
from firebuild_bootstrap.image.layertrees import Layer
from firebuild_bootstrap.machine.base import Machine

if TYPE_CHECKING:
    from firebuild_bootstrap.machine.settings import MachineSettings
    from firebuild_bootstrap.machine.workspace import BuildDirectory


DOCTOR: Final = "`firebuild doctor` says what this machine can do and what is missing"
"""The hint where this host refuses what a machine needs."""


@contextmanager
def pointing_to_doctor(
    settings: MachineSettings, kinds: tuple[type[FirebuildError], ...] = (MachineError,)
) -> Iterator[None]:
    """Have errors of the block point to `firebuild doctor`, after the hint that they have already.

    Those of the driver `external` don't: what starts that machine is not firebuild's, and may be elsewhere.

    Args:
        settings: which driver.
        kinds: of errors that are about this host; others are about what the user gave.
    """
    try:
        yield
    except kinds as error:
        if settings.driver != "external" and DOCTOR not in (error.hint or ""):
            error.hint = f"{hint_before(error.hint)}{DOCTOR}"
        raise


def make_machine(
    settings: MachineSettings,
    workspace: BuildDirectory,
    *,
    bind: str,
    store: Path,
    notice: Callable[[str], None],
    info: Callable[[str], None] = lambda _: None,
) -> Machine:
    """Make the machine of one build and check all that it needs; nothing is started yet.

    Args:
        settings: which driver, and the settings of each.
        workspace: the build's directory.
        bind: address of this host to listen on, for a guest that shares this host's network.
        store: the directory of bases and images (`Home.root`).
        notice: told what the user should know besides.
        info: told what the user has to do now.

    Raises:
        FirebuildError: something that the driver needs is missing on this host or in the settings.
    """
    match settings.driver:
        case "local":
            from firebuild_bootstrap.machine.local import LocalMachine

            network = None
            if settings.local.network == "user":
                from firebuild_bootstrap.machine.usernet import UserNetwork, find_program

                network = UserNetwork(find_program())
            return LocalMachine(workspace, bind=bind, caches=store / "cache-mounts", network=network)
        case "qemu":
            from firebuild_bootstrap.machine.qemu.driver import qemu_machine

            return qemu_machine(settings, workspace, store=store, notice=notice)
        case "firecracker":
            from firebuild_bootstrap.machine.firecracker.driver import firecracker_machine

            return firecracker_machine(settings, workspace, store=store, notice=notice)
        case "external":
            from firebuild_bootstrap.machine.external.driver import ExternalMachine

            return ExternalMachine(
                workspace,
                settings.external,
                disk_size=settings.disk_size,
                notice=notice,
                info=info,
                check=workspace.check,
            )


def start_ahead(machine: Machine, layers: Sequence[Layer], settings: MachineSettings) -> None:
    """Have the guest of a new machine wait for its metadata already, if the machine can do that.

    Raises:
        MachineError: it can't be started.
    """
    from firebuild_bootstrap.machine.local import LocalMachine

    if isinstance(machine, LocalMachine):
        with pointing_to_doctor(settings):
            machine.start_ahead(layers)


def most_at_once(settings: MachineSettings) -> int:
    """Return how many machines of one build may run side by side; some have what only one can use."""
    alone = settings.driver == "external"
    if settings.driver == "firecracker":
        block = settings.firecracker
        alone = block.running.socket is not None or block.network.tap is not None
    return 1 if alone else settings.at_once


def check_several(settings: MachineSettings) -> None:
    """Make sure that a build can have one machine after the other.

    Raises:
        InputError: the machine is started once, by the operator.
    """
    if settings.driver == "external" or (
        settings.driver == "firecracker" and settings.firecracker.running.socket is not None
    ):
        raise InputError(
            "this Dockerfile needs a machine for each of its stages, and the configured one is there once",
            hint="build it on local, qemu, or a firecracker that firebuild starts",
        )


def puts_layers_between(settings: MachineSettings, overlay_problem: Callable[[], str]) -> bool:
    """Tell whether a machine can put a layer that is there on those that its steps have made by then.

    Args:
        settings: of the machine.
        overlay_problem: says why this host can mount no overlays, empty where it can.
    """
    if settings.driver == "local":
        return not overlay_problem()
    return settings.driver != "external"  # the scratch drive of another one is its operator's


def keeps_caches(settings: MachineSettings) -> bool:
    """Tell whether cache mounts of RUN outlive a build: in a machine of somebody else they can't."""
    return settings.driver != "external"


def metadata_on_stdout(settings: MachineSettings) -> bool:
    """Whether standard output is for the guest's metadata alone."""
    return settings.driver == "external" and settings.external.to_stdout
