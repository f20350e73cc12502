"""A network namespace for one machine, seen from outside: its ports, and the program that runs in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final, cast

from firebuild_bootstrap.errors import MachineError, reason_of
from firebuild_bootstrap.guest.kernel import receive_descriptors
from firebuild_bootstrap.machine.qemu.holder import FIRST_FILE, READY
from firebuild_bootstrap.sandbox import Bind, Runtime, Sandbox
from firebuild_pki.values import dataclass

_HOLDER: Final = "firebuild_bootstrap.machine.qemu.holder"
_START_SECONDS: Final = 60.0
_LAST_WORDS_SECONDS: Final = 10.0


@dataclass(frozen=True)
class HandedFile:
    """A file of this host that a program in the namespace gets, without seeing where it lies."""

    path: Path
    writable: bool = False

    def open(self) -> int:
        """Open it.

        Raises:
            MachineError: it can't be opened.
        """
        try:
            return os.open(self.path, (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise MachineError(f"{self.path} can't be opened: {error.strerror}") from error


def path_of(number: int) -> str:
    """Return the path in the sandbox of the file number `number` (from 0) of those that a program gets."""
    return f"/proc/self/fd/{FIRST_FILE + number}"


class MachineNamespace:
    """A sandbox whose network is a loopback interface, with ports that are open on this side.

    The sandbox sees programs and libraries of the host, read-only, and no other file. It ends with this
    process, however that ends.

    Args:
        sandbox: makes it.
        runtime: the Python for the process that holds it until a program runs.
        ports: to listen on in there; 0 picks a free one.
        binds: what the program needs besides `runtime`.
        tun: the device /dev/net/tun, where the namespace is to have a way out; its other end is `uplink`.
        own_network: False takes this host's network instead.
        sockets: how many TCP sockets to make in there, for whoever connects them.

    Raises:
        MachineError: it could not be made.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        runtime: Runtime,
        ports: Sequence[int] = (),
        binds: Sequence[Bind] = (),
        *,
        tun: HandedFile | None = None,
        own_network: bool = True,
        sockets: int = 0,
    ) -> None:
        self.listeners: tuple[socket.socket, ...] = ()
        self.sockets: tuple[socket.socket, ...] = ()
        self.uplink: int | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, ExitStack() as cleanup:
                handed = [theirs.fileno()]
                if tun is not None:
                    handed.append(tun.open())
                    cleanup.callback(os.close, handed[-1])
                numbers = [*handed, -1][:2]
                self.process = sandbox.popen(
                    runtime.module(_HOLDER, *map(str, (*numbers, sockets, *ports))),
                    binds=[*runtime.binds, *binds],
                    env=runtime.env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=handed,
                    network=not own_network,
                )
        except BaseException:
            self._control.close()
            raise
        try:
            opened = self._receive(len(ports) + sockets + (tun is not None))
            self.uplink = opened.pop() if tun is not None else None
            made = tuple(socket.socket(fileno=descriptor) for descriptor in opened)
            self.listeners, self.sockets = made[: len(ports)], made[len(ports) :]
        except BaseException:
            self.close()
            raise

    @property
    def output(self) -> IO[bytes]:
        """What the program writes, to be read once."""
        return cast("IO[bytes]", self.process.stdout)  # `_start` asks for a pipe

    def run(
        self,
        argv: Sequence[str],
        files: Sequence[HandedFile | int] = (),
        devices: Sequence[Path] = (),
    ) -> None:
        """Run a program in the namespace, without any privileges.

        Args:
            argv: the command, with the full path of the program.
            files: are at `path_of` 0, 1, …; open descriptors as they are.
            devices: of this host, which the program finds at the same paths.

        Raises:
            MachineError: a file can't be opened, or the namespace has ended.
        """
        links = {str(path): path_of(len(files) + number) for number, path in enumerate(devices)}
        with ExitStack() as cleanup:
            descriptors = []
            for file in (*files, *(HandedFile(path, writable=True) for path in devices)):
                if isinstance(file, HandedFile):
                    descriptors.append(file.open())
                    cleanup.callback(os.close, descriptors[-1])
                else:
                    descriptors.append(file)
            self._send(argv, descriptors, links)

    def close(self) -> None:
        """End everything in the namespace and close the ports. Idempotent."""
        self._control.close()
        for one in (*self.listeners, *self.sockets):
            one.close()
        if self.uplink is not None:
            os.close(self.uplink)
            self.uplink = None
        self.process.kill()
        self.process.close()

    def _receive(self, expected: int) -> list[int]:
        self._control.settimeout(_START_SECONDS)
        try:
            data, descriptors = receive_descriptors(self._control, len(READY), max(expected, 1))
        except OSError as error:
            raise MachineError(f"the machine's network could not be made: {reason_of(error)}") from error
        if data != READY:
            raise MachineError(f"the machine's network could not be made: {self._last_words()}")
        return descriptors

    def _send(self, argv: Sequence[str], descriptors: Sequence[int], links: Mapping[str, str]) -> None:
        message = json.dumps({"argv": list(argv), "links": dict(links)}).encode()
        try:
            socket.send_fds(self._control, [message], list(descriptors))
        except BrokenPipeError as error:
            raise MachineError(f"the machine's network is gone: {self._last_words()}") from error
        self._control.close()

    def _last_words(self) -> str:
        """Return the last line that the process wrote, which has failed, and make sure that it is gone.

        Its end of the socket closes before it says why (Python prints `sys.exit(text)` at its very end).
        """
        self.process.wait(_LAST_WORDS_SECONDS)
        self.process.kill()
        lines = self.output.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with status {self.process.poll()}"
