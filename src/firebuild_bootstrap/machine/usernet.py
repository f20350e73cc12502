"""A network for RUN steps of the machine `local`: slirp4netns, between their namespace and this host's."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, cast

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.enter import CONNECT, CONNECTED
from firebuild_bootstrap.machine.console import BoundedLog
from firebuild_bootstrap.polling import readable
from firebuild_bootstrap.programs import start_hint, start_problem

PROGRAM: Final = "slirp4netns"
TUN: Final = Path("/dev/net/tun")
_SETTING: Final = "machine.local.network: user"
_LEAVE: Final = "or leave machine.local.network at host"
_DEVICE: Final = "uplink"
_MTU: Final = 65520
# slirp4netns(1): what is asked there, the host's own name server is asked, wherever that is.
_NAME_SERVER: Final = "10.0.2.3"
_BEGIN_SECONDS: Final = 30.0
_END_SECONDS: Final = 5.0
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: process, user, group


class UserNetwork:
    """Connects the network that a guest makes with this host's, from when the guest asks until `close`.

    The program ends with this process, however that ends: it waits for the end of a pipe.

    Args:
        program: slirp4netns.

    Attributes:
        guest_end: a descriptor for the guest (`vminit --uplink`); `begun` closes it here.
    """

    def __init__(self, program: Path) -> None:
        self._program = program
        self._control, guest_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.guest_end = guest_end.detach()
        self._exit_read, self._exit_write = os.pipe()
        self._process: _Program | None = None
        self._thread = threading.Thread(target=self._serve, name="firebuild-user-network", daemon=True)

    def begun(self) -> None:
        """Wait for the guest, which has its end now, on a thread."""
        os.close(self.guest_end)
        self.guest_end = -1
        self._thread.start()

    def problem(self) -> str:
        """Return why there is no connection any more; empty while there is one."""
        if self._process is None or self._process.runs():
            return ""
        return f"the network for RUN steps has ended: {self._process.last_words()}"

    def close(self) -> None:
        """End the connection. Idempotent."""
        if self._exit_write < 0:
            return
        self._control.shutdown(socket.SHUT_RDWR)
        os.close(self._exit_write)
        self._exit_write = -1
        if self.guest_end >= 0:
            os.close(self.guest_end)
        else:
            self._thread.join(_END_SECONDS)
        if self._process is not None:
            self._process.end(_END_SECONDS)
        self._control.close()
        os.close(self._exit_read)

    def _serve(self) -> None:
        with suppress(OSError):  # the guest has ended
            word, process = receive_with_sender(self._control, len(CONNECT))
            if word == CONNECT:
                self._control.send(self._answer(process))

    def _answer(self, guest: int) -> bytes:
        """Start the program and return the answer for the guest, which waits for one.

        Args:
            guest: the process that asks.
        """
        try:
            ready_read, ready_write = os.pipe()
            with open(ready_read, "rb") as ready:
                try:
                    arguments = command(self._program, guest, ready=ready_write, end=self._exit_read)
                    self._process = _Program(arguments, (ready_write, self._exit_read))
                finally:
                    os.close(ready_write)
                if not readable(ready, seconds=_BEGIN_SECONDS):
                    self._process.end(0)
                    return f"{self._program} made no network within {_BEGIN_SECONDS:g} seconds".encode()
                return CONNECTED if ready.read(1) else self._process.last_words().encode()
        except OSError as error:
            hint = start_hint(error, "install the package slirp4netns")
            return f"{start_problem(self._program, error)}; {hint}".encode()


class _Program:
    """A running slirp4netns, and what it says."""

    def __init__(self, arguments: Sequence[str], descriptors: Sequence[int]) -> None:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            env={"PATH": os.defpath},
            cwd="/",
            start_new_session=True,  # an interruption from the terminal is the build's
        )
        self._process = process
        self._log = BoundedLog(cast("IO[bytes]", process.stdout))

    def runs(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """Wait for its end and return the last line that it wrote."""
        status = self._process.wait()
        self._log.finish(1)
        lines = self._log.text().strip().splitlines()
        return f"{PROGRAM}: {lines[-1] if lines else f'status {status}'}"

    def end(self, seconds: float) -> None:
        """Wait that long until it has ended by itself, and end it then."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def receive_with_sender(control: socket.socket, size: int) -> tuple[bytes, int]:
    """Receive up to `size` bytes, and the id here of the process that sent them (unix(7), SO_PASSCRED)."""
    data, messages, _, _ = control.recvmsg(size, socket.CMSG_SPACE(_CREDENTIALS.size))
    senders = [_CREDENTIALS.unpack(each)[0] for _, kind, each in messages if kind == socket.SCM_CREDENTIALS]
    return data, senders[0] if senders else 0


def command(program: Path, guest: int, *, ready: int, end: int) -> list[str]:
    """Return the command, which has these descriptors: pipes for its begin and its end.

    Args:
        guest: the process with the network. Its sandbox can't be had with paths of namespaces
            (rootless-containers/slirp4netns#317).
    """
    return [
        *(str(program), "--configure", f"--mtu={_MTU}", "--disable-host-loopback"),
        *("--enable-sandbox", "--enable-seccomp", f"--ready-fd={ready}", f"--exit-fd={end}"),
        *(str(guest), _DEVICE),
    ]


def find_program(tun: Path = TUN) -> Path:
    """Return slirp4netns, where this user can run it.

    Args:
        tun: the device through which it gets packets.

    Raises:
        InputError: it is not there, or the device can't be opened.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise InputError(
            f"{_SETTING}: {PROGRAM} was not found", hint=f"install the package {PROGRAM}, {_LEAVE}"
        )
    check_tun(_SETTING, _LEAVE, tun)
    return Path(found)


def check_tun(setting: str, leave: str, device: Path = TUN) -> None:
    """Make sure that this user can have a tap device in a namespace of its own.

    Args:
        setting: what needs it.
        leave: the remedy besides, which ends the hint.

    Raises:
        InputError: this host does not allow it.
    """
    if not os.access(device, os.R_OK | os.W_OK):
        raise InputError(
            f"{setting} needs {device}, and this user can't open it",
            hint=f"`sudo modprobe tun` and `sudo chmod 0666 {device}`, {leave}",
        )


def resolv_conf(host: str) -> str:
    """Return the resolv.conf(5) of RUN steps: this host's, with the name server that is there for them."""
    kept = [line for line in host.splitlines() if not line.startswith("nameserver")]
    return "".join(f"{line}\n" for line in (f"nameserver {_NAME_SERVER}", *kept))
