"""A machine that somebody has started by hand: the command of its image on the console, and no host.

The initramfs holds what is to be executed (`images export --firecracker`, docs/run.md); output goes to the
console, and what comes from there is the command's input.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import write_all

from .attached import Control
from .bootstrap import heeding_signals
from .configure import Paths, configure
from .errors import InputError, ProtocolError, StepError, complain
from .executor import Executor
from .init_settings import COMMAND
from .stop import Stop

_CONSOLE = "/dev/console"
_SCRATCH = "/run/firebuild"


class _Console:
    """The other end, as `executor.Host` has it: one command, and a terminal that somebody looks at.

    Args:
        command: with a terminal.
        terminal: the console.
    """

    def __init__(self, command: wire.RunCommand, terminal: int) -> None:
        self._command = command
        self._terminal = terminal
        self._room = threading.Semaphore(wire.INPUT_BYTES)
        self._control = Control(self._taken)

    def steps(self) -> Iterator[wire.AnyCommand]:
        yield self._command

    def control(self) -> Control:
        return self._control

    def write(self, _step: int, _stream: str, data: bytes, /) -> None:
        write_all(self._terminal, data)

    def started(self, _step: int, /) -> None:
        pass

    def finished(self, step: int, exit_code: int, seconds: float) -> None:
        pass

    def _nobody(self, *_: object) -> NoReturn:
        raise ProtocolError("there is no host to ask")

    files = ask_agent = identity = instead = _nobody

    def read(self) -> None:
        """Pass on what is typed, for as long as there is a console."""
        with suppress(OSError):
            while data := os.read(self._terminal, 4096):
                for _ in data:
                    self._room.acquire()
                self._control.put_input(data, last=False)

    def _taken(self, count: int) -> None:
        self._room.release(count)


def read_command() -> tuple[wire.RunCommand, str, int]:
    """Return what is to be executed, the machine's name, and the signal that asks the command to end.

    Raises:
        InputError: that is not said, or not so that it can be understood.
    """
    try:
        with open(COMMAND, encoding="utf-8") as file:
            said: dict[str, Any] = json.load(file)
        command = wire.RunCommand(
            step=1,
            original=shlex.join(said["argv"]),
            argv=tuple(said["argv"]),
            env=dict(said["env"]),
            workdir=said["workdir"],
            user=said["user"],
            attach=wire.Attach(input=True, terminal=True, volumes=tuple(said.get("volumes", ()))),
        )
        return command, said["hostname"], int(said["stop_signal"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{COMMAND} does not say what is executed: {error!r:.200}") from error


def run_alone(root_path: str) -> int:
    """Execute the command in the image at `root_path`, and return its exit status.

    Args:
        root_path: the mounted image.

    Raises:
        GuestError: it could not be executed.
    """
    command, hostname, stop_signal = read_command()
    os.makedirs(_SCRATCH, mode=0o700, exist_ok=True)
    with ExitStack() as stack:
        terminal = os.open(_CONSOLE, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        stack.callback(os.close, terminal)
        stop = Stop()
        stack.callback(stop.close)
        host = _Console(command, terminal)
        stack.enter_context(_raw(terminal))
        stack.enter_context(heeding_signals(lambda _: host.control().put_signal(stop_signal)))
        threading.Thread(target=host.read, name="console", daemon=True).start()
        root = stack.enter_context(Root(root_path))

        def configured() -> list[str]:
            document = {"LocalHostname": hostname}
            return configure(document, root_path, Paths(environment_file=""), running=True)

        try:
            Executor(root, host, stop, scratch=_SCRATCH, configure=configured).execute()
        except StepError as error:
            complain(error.message)
            return error.exit_code or error.exit_status
        return host.control().status


@contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """Pass each key on as it is: the command's own terminal is what makes lines and signals of them."""
    import termios

    if not os.isatty(terminal):
        yield
        return
    before = termios.tcgetattr(terminal)
    mode = termios.tcgetattr(terminal)
    mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
    mode[1] &= ~termios.OPOST
    mode[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    termios.tcsetattr(terminal, termios.TCSANOW, mode)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
