"""The driver `qemu`: the initramfs's guest under QEMU, in a network namespace of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.layertrees import Layer
from firebuild_bootstrap.initramfs import (
    EMULATED,
    GuestReport,
    StaticAddress,
)
from firebuild_bootstrap.machine.base import (
    GuestOptions,
    Listening,
    MachineExit,
    PublishedPort,
)
from firebuild_bootstrap.machine.console import BoundedLog, check_copy, copied, open_copy
from firebuild_bootstrap.machine.drives import VM_CACHES, Drives, VirtualMachine, no_instruction
from firebuild_bootstrap.machine.kvm import KVM
from firebuild_bootstrap.machine.qemu.accelerator import Trial, choose
from firebuild_bootstrap.machine.qemu.command import (
    GUEST,
    HOST,
    Accelerator,
    Hardware,
    Program,
    find_program,
    machine_command,
)
from firebuild_bootstrap.machine.qemu.kernel import Kernel, find_kernel
from firebuild_bootstrap.machine.qemu.namespace import HandedFile, MachineNamespace, path_of
from firebuild_bootstrap.machine.qemu.publishing import SOCKETS, Publisher
from firebuild_bootstrap.machine.qemu.settings import QemuSettings
from firebuild_bootstrap.machine.qemu.uplink import Uplink, name_servers
from firebuild_bootstrap.machine.settings import MachineSettings
from firebuild_bootstrap.machine.usernet import TUN, check_tun
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.mmds.emulator import MetadataEmulator
from firebuild_bootstrap.mmds.store import DataStore
from firebuild_bootstrap.wire import CacheMount

_MMDS_PORT: Final = 80
_LOG_SECONDS: Final = 2.0
# The words of the guest's kernel for a write that the host refused.
_WRITE_ERROR: Final = "I/O error, dev vd"
_SERIAL_LOG: Final = "machine.qemu.serial_log"
_KILLED: Final = 128 + signal.SIGKILL


def qemu_machine(
    settings: MachineSettings,
    workspace: BuildDirectory,
    *,
    store: Path,
    notice: Callable[[str], None],
) -> QemuMachine:
    """Make the machine of the settings; see `machine.drivers.make_machine`.

    Raises:
        InputError: there is no QEMU, no kernel, or the serial log can't be written.
    """
    block = settings.qemu
    kernel = find_kernel(
        None if block.kernel is None else Path(block.kernel), [Path(path) for path in block.kernel_modules]
    )
    check_copy(block.serial_log, _SERIAL_LOG)
    servers: tuple[str, ...] = ()
    if block.network == "user":
        check_tun("machine.qemu.network: user", "or leave machine.qemu.network at none")
        servers = name_servers(block.name_servers)
    caches = store / VM_CACHES
    drives = Drives(workspace, caches=caches, size=settings.disk_size, notice=notice)
    program = find_program(block.program)
    return QemuMachine(
        workspace,
        drives,
        block,
        store=store,
        program=program,
        kernel=kernel,
        name_servers=servers,
        notice=notice,
    )


class QemuMachine(VirtualMachine):
    """A `Machine` under QEMU, without root.

    QEMU runs in a sandbox that has no network but its own loopback interface, where this process serves
    metadata and the bootstrap server. The guest sees that interface at the address of the metadata service,
    and nothing else. See `VirtualMachine` for the other arguments.

    Args:
        settings: the block `machine.qemu`.
        program: QEMU.
        kernel: what to boot.
        name_servers: of RUN steps that have a network.
    """

    def __init__(
        self,
        workspace: BuildDirectory,
        drives: Drives,
        settings: QemuSettings,
        *,
        store: Path,
        program: Program,
        kernel: Kernel,
        name_servers: tuple[str, ...] = (),
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(
            workspace,
            drives,
            store=store,
            compression=settings.initrd_compression,
            kernel_args=settings.kernel_args,
            kernel_modules=kernel.modules,
            notice=notice,
        )
        self._settings = settings
        self._program = program
        self._kernel = kernel
        self._name_servers = name_servers
        self.metadata: DataStore = DataStore()
        self._accelerator = Accelerator.TCG
        self._namespace: MachineNamespace | None = None
        self._emulator: MetadataEmulator | None = None
        self._uplink: Uplink | None = None
        self._log: BoundedLog | None = None
        self._report = GuestReport("none")
        self._publisher: Publisher | None = None

    def publish(self, ports: Sequence[PublishedPort]) -> None:
        """Listen on this host; see `Machine.publish`."""
        if ports:
            self._publisher = Publisher(ports)

    def listen(self) -> Listening:
        """Make the machine's network and open the port in it; see `Machine.listen`."""
        sandbox, runtime = self._workspace.sandbox, self._workspace.runtime
        tun = HandedFile(TUN, writable=True) if self._settings.network == "user" else None
        self._namespace = MachineNamespace(
            sandbox,
            runtime,
            (_MMDS_PORT, 0),
            self._program.binds,
            tun=tun,
            sockets=SOCKETS if self._publisher is not None else 0,
        )
        if self._namespace.uplink is not None:
            self._uplink = Uplink(sandbox, runtime, self._program, self._namespace.uplink)
        metadata, bootstrap = self._namespace.listeners
        self._emulator = MetadataEmulator(self.metadata, metadata)
        self._emulator.start()
        return Listening(bootstrap, f"{HOST}:{bootstrap.getsockname()[1]}")

    def prepare(self, layers: Sequence[Layer], caches: Sequence[CacheMount] = ()) -> tuple[str, ...]:
        """Make the drives and the guest's initramfs, and choose who executes its code."""
        notes = super().prepare(layers, caches)
        self._accelerator, why = self.choose_accelerator()
        slow = f"the machine runs in software and is slow: {why} (docs/qemu.md)"
        return (*notes, *([slow] if why else []))

    def start(self, options: GuestOptions = GuestOptions()) -> None:  # noqa: B008 - frozen
        """Start QEMU; see `Machine.start`."""
        if self._namespace is None:
            raise MachineError("the machine has no network yet")
        emulated = EMULATED if self._accelerator is Accelerator.TCG else ()
        command = machine_command(
            self._program,
            Hardware(self._accelerator, self._settings.memory, self._settings.vcpus),
            kernel=path_of(0),
            initrd=path_of(1),
            snapshot=path_of(2),
            drives=[path_of(3 + number) for number in range(len(self._drives.paths))],
            append=self._arguments(options, self._network(), HOST, "pci=off", *emulated),
            forwards=() if self._publisher is None else self._publisher.forwards,
        )
        files = [HandedFile(path) for path in (self._kernel.image, self._initramfs, self._drives.snapshot)]
        self._log = BoundedLog(
            copied(self._namespace.output, open_copy(self._settings.serial_log, _SERIAL_LOG))
        )
        self._namespace.run(
            command,
            [*files, *(HandedFile(path, writable=True) for path in self._drives.paths)],
            [KVM] if self._accelerator is Accelerator.KVM else [],
        )
        if self._publisher is not None:
            self._publisher.start(self._namespace.sockets)

    def wait(self, timeout: float | None = None) -> MachineExit | None:
        """Wait up to `timeout` seconds for the end; see `Machine.wait`."""
        if self._namespace is None or self._log is None:
            return None
        if self._has_write_errors():
            # Its kernel may try forever, while vminit goes on to say that it lives.
            self._namespace.process.kill()
            self._report = GuestReport("none", message=self._write_error_text())
            return MachineExit(_KILLED, self._report.message, explained=True)
        status = self._namespace.process.wait(timeout)
        if status is None:
            return None
        self._log.finish(_LOG_SECONDS)
        self._report = GuestReport.parse(self._log.text())
        code = status if self._report.status == "none" and status else self._report.exit_code
        return MachineExit(code, self._report.message, explained=True)

    def stop(self, grace: float = 5.0) -> MachineExit | None:
        """End the machine; a guest that is about to end by itself has `grace` seconds for that."""
        if self._namespace is None or self._log is None:
            return None
        self._namespace.process.wait(grace)
        self._namespace.process.kill()
        return self.wait()

    def silence(self) -> str:
        """Explain an empty console; see `Machine.silence`."""
        if self._log is None or self._log.text().strip() or self._has_own_console():
            return ""
        if self._accelerator is Accelerator.KVM:
            return no_instruction("set machine.qemu.accelerator to tcg, or to auto, which tries KVM before")
        return (
            "its console is empty: is machine.qemu.kernel a kernel that QEMU's microvm boots (docs/qemu.md)?"
        )

    def no_network(self) -> str:
        """Say which setting gives a network; see `Machine.no_network`."""
        if self._settings.network == "none":
            return "the machine has no network: machine.qemu.network: user gives it one"
        return "machine.qemu.name_servers names other DNS servers than this host's; IPv6 is not passed on"

    def close(self) -> None:
        """Stop and remove everything; see `Machine.close`."""
        try:
            if self._publisher is not None:
                self._publisher.close()
            if self._namespace is not None:
                self._namespace.close()
            if self._has_write_errors():
                self._notice(self._write_error_text())
            if self._uplink is not None:
                self._uplink.close()
            if self._emulator is not None:
                self._emulator.stop()
        finally:
            self._drives.close()
            self._workspace.close()

    def _console(self) -> str:
        return self._log.text() if self._log is not None else ""

    def choose_accelerator(self) -> tuple[Accelerator, str]:
        """Return what the machine runs under, and why if that is not KVM.

        Raises:
            MachineError: QEMU could not be started at all.
        """
        if self._settings.accelerator != "auto":
            return Accelerator(self._settings.accelerator), ""
        workspace = self._workspace
        trial = Trial(workspace.sandbox, workspace.runtime, self._program, self._kernel.image)
        return choose(trial, self._home / "qemu-kvm.json")

    def _has_write_errors(self) -> bool:
        return _WRITE_ERROR in self._console()

    def _write_error_text(self) -> str:
        """Name the cause that the guest can't know: to it, a full disk of this host is a broken drive."""
        return f"this host failed to write to a drive of the machine: is the disk of {self._home} full?"

    def _network(self) -> StaticAddress:
        if self._uplink is None:
            return StaticAddress(GUEST)
        self._uplink.check()
        return StaticAddress(GUEST, gateway=HOST, name_servers=self._name_servers)
