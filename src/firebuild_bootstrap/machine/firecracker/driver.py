"""The driver `firecracker`: the initramfs's guest in a microVM."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.initramfs import GuestReport, kernel_arguments
from firebuild_bootstrap.initramfs.modules import module_directories
from firebuild_bootstrap.listening import format_address, listen
from firebuild_bootstrap.machine import kvm
from firebuild_bootstrap.machine.base import (
    GuestOptions,
    Listening,
    MachineExit,
)
from firebuild_bootstrap.machine.console import check_copy
from firebuild_bootstrap.machine.drives import VM_CACHES, CacheDrive, Drives, VirtualMachine, no_instruction
from firebuild_bootstrap.machine.firecracker import checks
from firebuild_bootstrap.machine.firecracker.api import (
    ApiError,
    Configuration,
    FirecrackerApi,
    MmdsApi,
    ask_to_end,
    configure,
    start,
)
from firebuild_bootstrap.machine.firecracker.cni import CniNetwork
from firebuild_bootstrap.machine.firecracker.network import ExistingTap, Link, Network, OwnTap
from firebuild_bootstrap.machine.firecracker.process import Process
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.machine.firecracker.source import (
    SERIAL_LOG,
    JailedSource,
    PlainSource,
    Program,
    RunningSource,
    Source,
)
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.machine.settings import MachineSettings
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.mmds.store import HeldMetadata

_READY_SECONDS: Final = 10.0
_LOG_LINE: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+ \[[^\]]*\] ")
# Faster boots: no probing for hardware that Firecracker does not have, as its own default command line.
_KERNEL_ARGUMENTS: Final = ("i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
# The first release that can have PCI, and says pci=off by itself where it has none.
_PCI: Final = (1, 13)


class FirecrackerMachine(VirtualMachine):
    """A `Machine` in a microVM; see `VirtualMachine` for the other arguments.

    Args:
        settings: the block `machine.firecracker`.
        source: where the Firecracker comes from.
        network: where its network comes from.
        kernel: what it boots.
        modules: directories of its modules.
        leftovers: all that is outside of the workspace.
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
        modules: Sequence[Path],
        store: Path,
        leftovers: Leftovers,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(
            workspace,
            drives,
            store=store,
            compression=settings.initrd_compression,
            kernel_args=settings.kernel_args,
            kernel_modules=modules,
            notice=notice,
        )
        self._settings = settings
        self._source = source
        self._network = network
        self._kernel = kernel
        self._leftovers = leftovers
        self.metadata: HeldMetadata = HeldMetadata()
        self._link: Link | None = None
        self._api: FirecrackerApi | None = None
        self._process: Process | None = None
        self._ended: MachineExit | None = None

    def listen(self) -> Listening:
        """Make the network and open the port on its host side; see `Machine.listen`."""
        self._link = self._network.connect()
        listener = listen(self._link.host, setting="machine.firecracker.network.host")
        return Listening(listener, format_address(listener.getsockname()))

    def start(self, options: GuestOptions = GuestOptions()) -> None:  # noqa: B008 - frozen
        """Start Firecracker, tell it everything, and let it boot; see `Machine.start`."""
        if self._link is None or not self._initramfs.name:
            raise MachineError("the machine has no network or no drive yet")
        configuration = self._configuration(self._link, self._initramfs, options)
        self._process, self._api = self._source.launch(self._link.namespace)
        try:
            self._api.await_ready(_READY_SECONDS, self._check_alive)
            configure(self._api, configuration)
            self.metadata.connect(MmdsApi(self._api))
            start(self._api)
        except ApiError as error:
            self._check_alive()  # its last words say more than that it does not answer
            raise MachineError(f"{error.message}{self._words()}", hint=error.hint) from error

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

    def silence(self) -> str:
        """Explain an empty console; see `Machine.silence`."""
        if self._process is None or self._source.is_silent or self._has_own_console():
            return ""
        # Firecracker's own log comes on the same stream.
        if any(line.strip() and not _LOG_LINE.match(line) for line in self._process.serial().splitlines()):
            return ""
        return no_instruction("use `--machine qemu` with machine.qemu.accelerator: tcg, or another host")

    def no_network(self) -> str:
        """Say which settings are the network's; see `Machine.no_network`."""
        return (
            "machine.firecracker.network has the guest's gateway and name_servers; "
            "this host has to pass its packets on (docs/firecracker.md)"
        )

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
        platform = _platform_arguments(self._source.version)
        arguments = self._arguments(options, link.guest, self._settings.mmds_address, *platform, reboot="k")
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

    def _console(self) -> str:
        return self._process.serial() if self._process is not None else ""

    def _words(self) -> str:
        words = self._console().strip()
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


_WHERE: Final = "machine.firecracker"
# The jailer's rule for ids.
_NOT_IN_IDS: Final = re.compile(r"[^A-Za-z0-9-]")
_ID_LENGTH: Final = 64


def firecracker_machine(
    settings: MachineSettings,
    workspace: BuildDirectory,
    *,
    store: Path,
    notice: Callable[[str], None],
) -> FirecrackerMachine:
    """Make the machine of one build; see `machine.drivers.make_machine`.

    Raises:
        FirebuildError: what is missing or wrong, and what to do about it.
    """
    block = settings.firecracker
    leftovers = Leftovers(workspace.path)
    machine_id = _NOT_IN_IDS.sub("-", workspace.path.name)[:_ID_LENGTH]
    kernel = checks.check_kernel(block.kernel)
    kernel_arguments(extra=block.kernel_args)  # an impossible one is better known now
    modules = module_directories(block.kernel_modules, f"{_WHERE}.kernel_modules")
    source = _source(block, machine_id, workspace.path, leftovers)
    network = _network(block, machine_id, leftovers)
    network.check()
    return FirecrackerMachine(
        workspace,
        block,
        drives=Drives(workspace, caches=store / VM_CACHES, size=settings.disk_size, notice=notice),
        source=source,
        network=network,
        kernel=kernel,
        modules=modules,
        store=store,
        leftovers=leftovers,
        notice=notice,
    )


def _source(block: FirecrackerSettings, machine_id: str, directory: Path, leftovers: Leftovers) -> Source:
    if block.running.socket is not None:
        return _running(block)
    path = checks.find_program(block.program, f"{_WHERE}.program")
    program = Program(
        settings=block,
        path=path,
        version=checks.program_version(path),
        machine_id=machine_id,
        directory=directory,
        leftovers=leftovers,
    )
    check_copy(block.serial_log, SERIAL_LOG)
    if not block.jailer.enabled:
        kvm.check_kvm()
        return PlainSource(program)
    jailed = JailedSource(program, _jailer(block, path))
    checks.check_socket_path(jailed.socket, f"{_WHERE}.jailer.chroot_base")
    kvm.check_kvm()
    return jailed


def _jailer(block: FirecrackerSettings, program: Path) -> Path:
    if os.geteuid() != 0:
        raise InputError(
            f"{_WHERE}.jailer: the jailer needs root", hint="run firebuild as root, or do without"
        )
    if "firecracker" not in program.name:
        raise InputError(
            f"{_WHERE}.program: the jailer starts what has firecracker in its name only, found {program}",
            hint="rename it",
        )
    jailer = checks.find_program(block.jailer.program, f"{_WHERE}.jailer.program")
    checks.program_version(jailer)
    return jailer


def _running(block: FirecrackerSettings) -> RunningSource:
    if block.jailer.enabled or block.network.cni is not None:
        raise InputError(
            f"{_WHERE}.running: a Firecracker that runs already has its jail and its network namespace",
            hint="leave jailer and network.cni out",
        )
    source = RunningSource(block)
    checks.check_socket_path(source.socket, f"{_WHERE}.running.socket")
    source.check()
    return source


def _network(block: FirecrackerSettings, machine_id: str, leftovers: Leftovers) -> Network:
    uid, gid = _user(block)
    if block.network.tap is not None:
        return ExistingTap(block.network, uid=uid)
    if block.network.cni is not None:
        return CniNetwork(block.network, uid=uid, gid=gid, name=machine_id, leftovers=leftovers)
    return OwnTap(block.network, uid=uid, name=machine_id, leftovers=leftovers)


def _user(block: FirecrackerSettings) -> tuple[int, int]:
    """Return who Firecracker is, as far as it is known."""
    if block.jailer.enabled:
        return block.jailer.uid or 0, block.jailer.gid or 0
    running = block.running
    uid = os.geteuid() if running.socket is None or running.uid is None else running.uid
    gid = os.getegid() if running.socket is None or running.gid is None else running.gid
    return uid, gid
