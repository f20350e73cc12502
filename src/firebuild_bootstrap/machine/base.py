"""The seam between a build and the machine it runs in."""

from __future__ import annotations

import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerSink
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.machine.workspace import BuildDirectory
    from firebuild_bootstrap.mmds.store import MetadataWriter
    from firebuild_bootstrap.wire import CacheMount

FINISHED: Final = "layers/upper"
"""Where in a machine's directory the layer of each finished step appears under its number, by a rename."""


@dataclass(frozen=True)
class MachineExit:
    """How a machine ended.

    Args:
        code: exit status of vminit; 128 + N after signal N.
        log: the last that it wrote, for messages.
        explained: whether `log` says why it ended, rather than what it wrote before.
    """

    code: int
    log: str = ""
    explained: bool = False

    @property
    def signal(self) -> int | None:
        """The signal that ended it, if one did."""
        return self.code - 128 if self.code > 128 else None

    @property
    def description(self) -> str:
        """How it ended, for messages."""
        if self.explained:
            return self.log
        if self.signal is None:
            return f"vminit ended with status {self.code}"
        try:
            name = signal.Signals(self.signal).name
        except ValueError:
            name = f"signal {self.signal}"
        return f"vminit was ended by {name}"


@dataclass(frozen=True)
class Listening:
    """Where the guest of a machine calls back.

    Args:
        listener: a listening TCP socket, in whatever network the guest can reach.
        host_port: its address as the guest dials it.
    """

    listener: socket.socket
    host_port: str


@dataclass(frozen=True)
class PublishedPort:
    """A TCP port of this host that leads to one of the machine.

    Args:
        address: of this host, to listen on.
        host: the port there.
        guest: the machine's port.
    """

    address: str
    host: int
    guest: int

    def __str__(self) -> str:
        """Write it as `docker ps` does."""
        return f"{self.address}:{self.host}->{self.guest}/tcp"


@dataclass(frozen=True)
class GuestOptions:
    """What the machine tells vminit on its command line; times in seconds."""

    mmds_timeout: float = 30.0
    connect_timeout: float = 30.0


@dataclass(frozen=True)
class StepLayer:
    """What one step has changed, apart from everything else.

    Args:
        step: its number.
        directory: what `LayerTrees.adopt` takes.
    """

    step: int
    directory: Path


Taken = Callable[[int, Path], Path | None]
"""Takes the number of a finished step and the directory of its layer; returns where its tree is now, or None
where it did not take it."""


class Machine(ABC):
    """One build's machine, from empty to stopped.

    The order is listen, metadata.put, prepare, start, wait or stop, layers or tree, close. `close` is always
    allowed.

    Args:
        workspace: its directory, which is closed with it.
    """

    metadata: MetadataWriter
    """Where the guest reads its metadata from."""

    def __init__(self, workspace: BuildDirectory) -> None:
        self._workspace = workspace

    def publish(self, ports: Sequence[PublishedPort]) -> None:
        """Have ports of this host lead to the machine for as long as it runs; called before `listen`.

        Raises:
            InputError: this machine can't, or this host does not let us listen there.
        """
        if ports:
            raise InputError(
                "--publish: only the machine qemu does that",
                hint="a command of local listens on this host itself, a tap of firecracker has an address",
            )

    @abstractmethod
    def listen(self) -> Listening:
        """Open the port that the guest calls; the caller closes the socket.

        Raises:
            FirebuildError: the address can't be used.
        """

    @abstractmethod
    def prepare(self, layers: Sequence[Layer], caches: Sequence[CacheMount] = ()) -> tuple[str, ...]:
        """Make ready what the machine starts from.

        Args:
            layers: of the root file system, the lowest first; without any it is empty (FROM scratch).
            caches: the cache mounts that its steps use.

        Returns:
            notes for the user: what this machine can't do or could not keep.

        Raises:
            MachineError: it can't be prepared.
        """

    def receiver(self, taken: Taken) -> LayerSink | None:  # noqa: ARG002
        """Return what takes the layers that the guest sends; None where they are on this host anyway.

        Args:
            taken: is given each, as soon as it is complete.
        """
        return None

    @abstractmethod
    def start(self, options: GuestOptions = ...) -> None:
        """Start vminit.

        Raises:
            MachineError: it can't be started.
        """

    def poll(self) -> MachineExit | None:
        """Return how the machine ended, or None while it runs (or was never started)."""
        return self.wait(0)

    @abstractmethod
    def wait(self, timeout: float | None = None) -> MachineExit | None:
        """Wait up to `timeout` seconds for the end and return what `poll` says then."""

    @abstractmethod
    def stop(self, grace: float = 5.0) -> MachineExit | None:
        """End the machine: politely first, by force after `grace` seconds. Nothing of it runs afterwards."""

    @abstractmethod
    def tree(self) -> ArchiveLayer | None:
        """Return the whole root file system of a machine that has ended, where its steps left no layers.

        None where it is out of reach.

        Raises:
            MachineError: it can't be read, or the disk is full.
        """

    def layers(self) -> tuple[StepLayer, ...]:
        """Return what each finished step has changed, in their order; the machine has to be stopped.

        They are gone with the machine unless somebody takes them. None where the steps work on one root
        file system and are not kept apart, and none that `receiver` has given to others.
        """
        upper = self._workspace.path / FINISHED
        if not upper.is_dir():
            return ()
        return tuple(StepLayer(step, upper / str(step)) for step in sorted(map(int, os.listdir(upper))))

    @abstractmethod
    def keep(self, into: Path) -> tuple[str, ...]:
        """Put what is left of a machine that has failed and is stopped into the directory `into`.

        That is its root file system, in `rootfs.tar`, as far as it is on this host, and the last that it
        wrote, in `console.log`; each only if there is any.

        Returns:
            notes for the user.

        Raises:
            MachineError: the disk is full.
        """

    def silence(self) -> str:
        """Say what it means that a guest is lost, and what to do, where its console is known to be empty.

        Empty where the console holds something, or is not known.
        """
        return ""

    def no_room(self) -> str:
        """Say what to do where a step finds no room."""
        return "if the machine's drive is full: machine.disk_size has its size"

    def no_network(self) -> str:
        """Say what to do where a step reaches no other machine, or can't look up a name."""
        return "the machine's network is that of who starts it: look at its routes and its /etc/resolv.conf"

    def no_port(self) -> str:
        """Say what to do where a step can't listen on a port; empty for nothing."""
        return ""

    def no_device(self) -> str:
        """Say what to do where a step can't make a device node; empty for nothing."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Stop, and remove everything that belongs to the machine. Idempotent."""
