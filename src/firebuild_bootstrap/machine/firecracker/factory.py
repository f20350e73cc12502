"""From the block `machine.firecracker` to a machine, with all checks that need nothing to be started."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.initramfs import kernel_arguments
from firebuild_bootstrap.machine.console import check_copy
from firebuild_bootstrap.machine.drives import VM_CACHES, Drives
from firebuild_bootstrap.machine.firecracker import checks
from firebuild_bootstrap.machine.firecracker.cni import CniNetwork
from firebuild_bootstrap.machine.firecracker.driver import FirecrackerMachine
from firebuild_bootstrap.machine.firecracker.network import ExistingTap, Network, OwnTap
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
    checks.check_modules(block.kernel_modules)
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
        checks.check_kvm()
        return PlainSource(program)
    jailed = JailedSource(program, _jailer(block, path))
    checks.check_socket_path(jailed.socket, f"{_WHERE}.jailer.chroot_base")
    checks.check_kvm()
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
    checks.check_socket_path(
        Path(block.running.socket or "").expanduser().absolute(), f"{_WHERE}.running.socket"
    )
    source = RunningSource(block)
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
