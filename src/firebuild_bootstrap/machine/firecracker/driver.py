"""The driver `firecracker`: the initramfs's guest in a microVM."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerSink
from firebuild_bootstrap.initramfs import Compression, GuestReport, initramfs_image, kernel_arguments
from firebuild_bootstrap.listening import format_address, listen
from firebuild_bootstrap.machine.base import (
    GuestOptions,
    Listening,
    MachineExit,
    StepLayer,
    Taken,
    no_instruction,
)
from firebuild_bootstrap.machine.console import keep_console
from firebuild_bootstrap.machine.drives import CacheDrive, Drives
from firebuild_bootstrap.machine.firecracker.api import ApiError, FirecrackerApi, FirecrackerMetadata
from firebuild_bootstrap.machine.firecracker.configuration import Configuration, ask_to_end, configure, start
from firebuild_bootstrap.machine.firecracker.network import Link, Network
from firebuild_bootstrap.machine.firecracker.process import Process
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.machine.firecracker.source import Source
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.mmds.store import MetadataWriter
from firebuild_bootstrap.wire import CacheMount

_READY_SECONDS: Final = 10.0
_LOG_LINE: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+ \[[^\]]*\] ")
# Faster boots: no probing for hardware that Firecracker has not, as its own default command line.
_KERNEL_ARGUMENTS: Final = ("i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
# The first release that can have PCI, and says pci=off by itself where it has none.
_PCI: Final = (1, 13)


class FirecrackerMachine:
    """A `Machine` in a microVM.

    Args:
        workspace: the build's directory; it is closed with the machine.
        settings: the block `machine.firecracker`.
        drives: all its drives.
        source: where the Firecracker comes from.
        network: where its network comes from.
        kernel: what it boots.
        store: the directory of bases and images, where they are kept.
        leftovers: all that is outside of the workspace.
        notice: told what could not be cleaned up.
    """

    def __init__(
        self,
        workspace: BuildDirectory,
        settings: FirecrackerSettings,
        *,
        drives: Drives,
        source: Source,
        network: Network,
        kernel: Path,
        store: Path,
        leftovers: Leftovers,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._workspace = workspace
        self._settings = settings
        self._drives = drives
        self._source = source
        self._network = network
        self._kernel = kernel
        self._store = store
        self._leftovers = leftovers
        self._notice = notice
        self._metadata = FirecrackerMetadata()
        self._link: Link | None = None
        self._initramfs: Path | None = None
        self._api: FirecrackerApi | None = None
        self._process: Process | None = None
        self._ended: MachineExit | None = None

    @property
    def metadata(self) -> MetadataWriter:
        """The metadata of this machine, in Firecracker's own store."""
        return self._metadata

    def listen(self) -> Listening:
        """Make the network and open the port on its host side; see `Machine.listen`."""
        self._link = self._network.connect()
        listener = listen(self._link.host)
        return Listening(listener, format_address(listener.getsockname()))

    def prepare(self, layers: Sequence[Layer], caches: Sequence[CacheMount] = ()) -> tuple[str, ...]:
        """Make the drives and the guest's initramfs; see `Machine.prepare`."""
        notes = self._drives.prepare(layers, caches)
        self._initramfs = initramfs_image(
            self._store,
            compression=Compression(self._settings.initrd_compression),
            kernel_modules=[Path(path) for path in self._settings.kernel_modules],
        )
        return notes

    def start(self, options: GuestOptions = GuestOptions()) -> None:  # noqa: B008 - frozen
        """Start Firecracker, tell it everything, and let it boot; see `Machine.start`."""
        if self._link is None or self._initramfs is None:
            raise MachineError("the machine has no network or no drive yet")
        configuration = self._configuration(self._link, self._initramfs, options)
        self._process, self._api = self._source.launch(self._link.namespace)
        try:
            self._api.await_ready(_READY_SECONDS, self._check_alive)
            configure(self._api, configuration)
            self._metadata.connect(self._api)
            start(self._api)
        except ApiError as error:
            self._check_alive()  # its last words say more than that it does not answer
            raise MachineError(f"{error.message}{self._words()}", hint=error.hint) from error

    def poll(self) -> MachineExit | None:
        """Return how the machine ended, or None while it runs (or was never started)."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> MachineExit | None:
        """Wait up to `timeout` seconds for the end; see `Machine.wait`."""
        if self._ended is None and self._process is not None and self._process.wait(timeout):
            self._ended = _exit_of(self._process)
        return self._ended

    def stop(self, grace: float = 5.0) -> MachineExit | None:
        """Press Ctrl-Alt-Del, on which the guest ends by itself; end Firecracker after `grace` seconds."""
        if self._process is None or self._api is None:
            return self._ended
        if grace > 0 and self.poll() is None:
            with suppress(ApiError):  # it is about to end, or of an architecture without that key
                ask_to_end(self._api)
            self.wait(grace)
        if self._ended is None:
            self._process.kill()
        return self.wait()

    def receiver(self, taken: Taken) -> LayerSink:
        """Return what takes the layers; see `Machine.receiver`."""
        return self._drives.receiver(taken)

    def layers(self) -> tuple[StepLayer, ...]:
        """Return the layers that nobody has taken; see `Machine.layers`."""
        return self._drives.layers()

    def tree(self) -> ArchiveLayer | None:
        """Fail: its guest has to send layers; see `Machine.tree`."""
        self._drives.no_layers()

    def keep(self, into: Path) -> tuple[str, ...]:
        """Keep what finished steps have made, and the end of the console; see `Machine.keep`."""
        if self._process is not None:
            keep_console(self._process.serial(), into)
        self._drives.keep(into)
        return ()

    def silence(self) -> str:
        """Explain an empty console; see `Machine.silence`."""
        taken = any(argument.startswith("console=") for argument in self._settings.kernel_args)
        if self._process is None or self._source.is_silent or taken:
            return ""
        # Firecracker's own log comes on the same stream.
        if any(line.strip() and not _LOG_LINE.match(line) for line in self._process.serial().splitlines()):
            return ""
        return no_instruction("use `--machine qemu` with machine.qemu.accelerator: tcg, or another host")

    def close(self) -> None:
        """Stop and remove everything; see `Machine.close`."""
        try:
            self._stop_for_good()
        finally:
            try:
                for problem in self._leftovers.clear():
                    self._notice(problem)
                self._network.close()
            finally:
                self._drives.close()
                self._workspace.close()

    def _stop_for_good(self) -> None:
        try:
            self.stop(grace=0)
        finally:
            if self._process is not None:
                self._process.close()
                self._process = None
                for cache in self._drives.caches:
                    self._take_back(cache)
            self._source.clear()

    def _take_back(self, cache: CacheDrive) -> None:
        try:
            self._source.place.take_back(cache.path, cache.name)
        except MachineError as error:
            self._notice(f"a cache mount is lost: {error.message}")

    def _configuration(self, link: Link, initramfs: Path, options: GuestOptions) -> Configuration:
        arguments = kernel_arguments(
            reboot="k",
            network=link.guest,
            scratch="/dev/vdb",
            caches=[cache.name for cache in self._drives.caches],
            mmds=f"http://{self._settings.mmds_address}",
            mmds_timeout=options.mmds_timeout,
            connect_timeout=options.connect_timeout,
            extra=(*_platform_arguments(self._source.version), *self._settings.kernel_args),
        )
        place = self._source.prepare_place()
        return Configuration(
            settings=self._settings,
            kernel=place.show(self._kernel, "vmlinux"),
            initrd=place.show(initramfs, "initrd"),
            boot_args=arguments,
            snapshot=place.share(self._drives.snapshot, "snapshot"),
            drives=[
                place.expose(self._drives.scratch, "scratch"),
                *(place.expose(cache.path, cache.name) for cache in self._drives.caches),
            ],
            tap=link.tap,
            mac=link.mac,
        )

    def _check_alive(self) -> None:
        self._workspace.check()
        if self._process is not None and self._process.wait(0):
            trouble = self._process.trouble() or "firecracker ended"
            raise MachineError(f"{trouble} before its guest could boot{self._words()}")

    def _words(self) -> str:
        words = self._process.serial().strip() if self._process is not None else ""
        return f"; it said: {words[-1000:]}" if words else ""


def _platform_arguments(version: tuple[int, int]) -> tuple[str, ...]:
    if os.uname().machine != "x86_64":
        return ()
    return _KERNEL_ARGUMENTS if version >= _PCI else ("pci=off", *_KERNEL_ARGUMENTS)


def _exit_of(process: Process) -> MachineExit:
    report = GuestReport.parse(process.serial())
    trouble = process.trouble()
    if not trouble:
        return MachineExit(report.exit_code, report.message, explained=True)
    said = "" if report.status == "none" else f"; {report.message}"
    return MachineExit(report.exit_code, f"{trouble}{said or _last_line(process)}", explained=True)


def _last_line(process: Process) -> str:
    lines = process.serial().strip().splitlines()
    return f": {lines[-1]}" if lines else ""
