"""A machine that the operator starts: firebuild writes its metadata, serves it, and takes what it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerSink
from firebuild_bootstrap.listening import format_address, listen
from firebuild_bootstrap.machine.base import (
    GuestOptions,
    Listening,
    Machine,
    MachineExit,
    Taken,
)
from firebuild_bootstrap.machine.drives import SCRATCH_BYTES, SentLayers
from firebuild_bootstrap.machine.external.drive import Disk, ExternalDrive
from firebuild_bootstrap.machine.external.settings import ExternalSettings, split_host_port
from firebuild_bootstrap.machine.external.targets import make_target
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.mmds.store import HeldMetadata
from firebuild_bootstrap.wire import CacheMount
from firebuild_pki.homes import absolute

_ENDED: Final = MachineExit(0)


class ExternalMachine(Machine):
    """A `Machine` that firebuild neither starts nor ends.

    "Start" means that the metadata are written: whoever waits for them finds everything else ready. Nobody
    tells how the machine is while it runs, apart from its guest's calls. A guest that sends no layers,
    because it works on one plain tree, leaves a drive that is read when it is unmounted.

    Args:
        workspace: the build's directory; it is closed with the machine.
        settings: the block `machine.external`.
        disk_size: bytes of the drive, where firebuild makes it, and of a layer; None for the defaults.
        notice: told what could not be kept or done.
        info: told what the user has to do now.
        check: called again and again while something long goes on; may raise.

    Raises:
        FirebuildError: the metadata can't be written where they should, or the drive can't be used.
    """

    def __init__(
        self,
        workspace: BuildDirectory,
        settings: ExternalSettings,
        *,
        disk_size: int | None = None,
        notice: Callable[[str], None] = lambda _: None,
        info: Callable[[str], None] = lambda _: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(workspace)
        self._settings = settings
        self._notice = notice
        self._info = info
        self._limit = disk_size or SCRATCH_BYTES
        self._leftovers = Leftovers(workspace.path)
        self._target = make_target(settings.metadata, self._note)
        self.metadata: HeldMetadata = HeldMetadata()
        self._drive: ExternalDrive | None = None
        self._address = ""
        if settings.disk is not None:
            self._drive = ExternalDrive(
                absolute(settings.disk),
                fill=settings.fill_disk,
                disk=Disk(workspace, size=disk_size),
                check=check,
                note=self._note,
            )
            self._drive.check()
        self._target.check()

    def listen(self) -> Listening:
        """Open the configured port, on any address; mutual TLS keeps others out. See `Machine.listen`."""
        host, port = split_host_port(self._settings.bind)
        listener = listen(host, port or 0, setting="machine.external.bind")
        address = format_address(listener.getsockname())
        if self._settings.advertise is not None:
            host, port = split_host_port(self._settings.advertise)
            address = format_address((host, port or listener.getsockname()[1]))
        self._address = address
        return Listening(listener, address)

    def prepare(
        self,
        layers: Sequence[Layer],
        caches: Sequence[CacheMount] = (),  # noqa: ARG002 - they go with the machine
    ) -> tuple[str, ...]:
        """Make the drive from `layers`, if that is to be done; see `Machine.prepare`."""
        return self._drive.prepare(layers) if self._drive is not None else ()

    def start(self, options: GuestOptions = GuestOptions()) -> None:  # noqa: ARG002, B008 - frozen
        """Write the metadata; see `Machine.start`. The operator chooses the options."""
        self.metadata.connect(self._target)
        self._info(
            f"the metadata are in {self._target.description}; start the machine now, its guest calls "
            f"{self._address}"
        )

    def poll(self) -> MachineExit | None:
        """Return None: the server hears first when the guest is gone."""
        return None

    def wait(self, timeout: float | None = None) -> MachineExit | None:  # noqa: ARG002
        """Return at once: its drive tells when the machine has ended, and `tree` waits for that."""
        return _ENDED

    def stop(self, grace: float = 5.0) -> MachineExit | None:  # noqa: ARG002 - there is no process of ours
        """Take the credentials back; the operator ends the machine."""
        self._target.remove()
        return _ENDED if self._drive is not None and self._drive.released() else None

    def receiver(self, taken: Taken) -> LayerSink:
        """Return what takes the layers, if its guest has some; see `Machine.receiver`."""
        return SentLayers(self._workspace, self._limit, taken, self._notice)

    def tree(self) -> ArchiveLayer | None:
        """Read the drive; None without one. See `Machine.tree`."""
        if self._drive is None:
            return None
        return self._drive.read(end_timeout=self._settings.end_timeout.total_seconds())

    def keep(self, into: Path) -> tuple[str, ...]:  # noqa: ARG002 - a machine may still have the drive
        """Leave the drive where it is, which the machine may still use; see `Machine.keep`."""
        path = self._drive.keep() if self._drive is not None else None
        if path is None:
            return ()
        self._target.remove()
        self._leftovers.forget()
        return (f"the machine's drive stays where it is: {path}",)

    def close(self) -> None:
        """Remove the metadata, the drive if firebuild made it, and the build's directory."""
        try:
            self._target.remove()
            if self._drive is not None:
                self._drive.close()
        finally:
            self._workspace.close()

    def _note(self, command: Sequence[str]) -> None:
        self._leftovers.add_command(command, quiet=True)
