"""A network for RUN steps: QEMU's user-mode network in this host's own, at the end of the machine's tap."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.machine.console import BoundedLog
from firebuild_bootstrap.machine.qemu.command import CONFINED, Program
from firebuild_bootstrap.machine.qemu.holder import FIRST_FILE, NETWORK
from firebuild_bootstrap.machine.qemu.namespace import MachineNamespace
from firebuild_bootstrap.sandbox import Runtime, Sandbox

# The second is what systemd-resolved uses itself where the first names its own address on loopback.
_RESOLVERS: Final = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


class Uplink:
    """The process that carries the packets of a machine's tap into this host's network, until it is closed.

    Args:
        sandbox: for it.
        runtime: the Python that starts it.
        program: QEMU.
        tap: the end of the tap device.

    Raises:
        MachineError: it could not be started.
    """

    def __init__(self, sandbox: Sandbox, runtime: Runtime, program: Program, tap: int) -> None:
        self._process = MachineNamespace(sandbox, runtime, binds=program.binds, own_network=False)
        try:
            self._log = BoundedLog(self._process.output)
            self._process.run(uplink_command(program, FIRST_FILE), [tap])
        except BaseException:
            self._process.close()
            raise

    def wait(self, timeout: float) -> int | None:
        """Wait up to `timeout` seconds for its end and return its exit status, or None while it runs."""
        return self._process.process.wait(timeout)

    def check(self) -> None:
        """Make sure that it runs.

        Raises:
            MachineError: it has ended.
        """
        status = self.wait(0)
        if status is not None:
            self._log.finish(1)
            words = self._log.text().strip().splitlines() or [f"status {status}"]
            raise MachineError(f"the network for RUN steps has ended: {words[-1]}")

    def close(self) -> None:
        """End it. Idempotent."""
        self._process.close()


def uplink_command(program: Program, tap: int) -> list[str]:
    """Return the command of a QEMU without a machine that connects a tap with this host's network.

    Args:
        tap: the descriptor that the process has it at.
    """
    return [
        str(program.path),
        *("-M", "none", "-no-user-config", "-nodefaults", "-display", "none", *CONFINED),
        *("-netdev", f"user,id=host,ipv6=off,net={NETWORK}", "-netdev", f"tap,id=tap,fd={tap}"),
        *("-netdev", "hubport,id=a,hubid=0,netdev=host", "-netdev", "hubport,id=b,hubid=0,netdev=tap"),
    ]


def name_servers(named: Sequence[str], files: Sequence[Path] = _RESOLVERS) -> tuple[str, ...]:
    """Return up to two DNS servers that the machine can reach.

    Args:
        named: those of the settings; none for this host's own.
        files: where this host's own are.

    Raises:
        InputError: one can't be reached from the machine, or there is none.
    """
    closed = next((server for server in named if not _is_open(server)), None)
    if closed is not None:
        raise InputError(
            f"machine.qemu.name_servers: the machine can't reach {closed}, which is on this host or its link",
            hint="name servers of other networks",
        )
    found = [*named] or [server for file in files for server in _listed(file) if _is_open(server)]
    if not found:
        raise InputError(
            "machine.qemu.network: user: this host's DNS servers are on this host or its link, where the "
            "machine can't reach them",
            hint="name others in machine.qemu.name_servers",
        )
    return tuple(dict.fromkeys(found))[:2]


def _listed(file: Path) -> list[str]:
    try:
        lines = file.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
    words = (line.split() for line in lines)
    return [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]


def _is_open(server: str) -> bool:
    try:
        address = ipaddress.IPv4Address(server)
    except ValueError:
        return False  # IPv6 has no way out
    special = address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
    return not special and address not in ipaddress.IPv4Network(NETWORK)
