"""`firebuild run`: an image in a machine of its own, with this terminal at its command (docs/run.md)."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from firebuild_bootstrap.cli.display import Boot, window_size
from firebuild_bootstrap.cli.docker import DockerCommand, docker_run_options
from firebuild_bootstrap.cli.failure import SIGNALS, report
from firebuild_bootstrap.cli.identity import identity_from, identity_options, laptop_ca
from firebuild_bootstrap.cli.options import (
    FilePath,
    chosen,
    complete_machines,
    complete_providers,
    complete_tags,
    config_option,
    home_from,
    settings_from,
)
from firebuild_bootstrap.cli.registries import read_policy
from firebuild_bootstrap.cli.runs import Background, record_of, start_in_background
from firebuild_bootstrap.errors import InputError, Interrupted, OutputError, StepFailed
from firebuild_bootstrap.sizes import human_size
from firebuild_pki.display import one_line
from firebuild_pki.homes import read_small

if TYPE_CHECKING:
    from firebuild_bootstrap.events import Event
    from firebuild_bootstrap.machine.base import PublishedPort
    from firebuild_bootstrap.running import RunRequest
    from firebuild_bootstrap.service.console import Console
    from firebuild_bootstrap.settings import BuildSettings
    from firebuild_bootstrap.wire import Attach

_FAILED: Final = 125
"""The exit status of `firebuild run` where it is not that of the command, as Docker has it."""
_GRACE_SECONDS: Final = 10.0
_TALK: Final = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""What commands take as more than a wish that they end: they have any time for it."""
_NAME: Final = re.compile(r"[^=\0]+")
_MAX_ENV_FILE: Final = 1 << 20
_MAX_KEYS: Final = 1 << 20
_PORT: Final = re.compile(r"(?:(\d{1,3}(?:\.\d{1,3}){3}):)?(\d{1,5}):(\d{1,5})(?:/tcp)?", re.ASCII)


class _RunCommand(DockerCommand):
    """Tells its own failures from those of the command also where its arguments are wrong."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; see `click.Command.parse_args`.

        Raises:
            SystemExit: they are wrong, which has been reported.
        """
        try:
            return super().parse_args(ctx, args)
        except (click.UsageError, InputError) as error:
            report(error)
            sys.exit(_FAILED)


@click.command(cls=_RunCommand, context_settings={"allow_interspersed_args": False})
@click.argument("image", shell_complete=complete_tags)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--env", "-e", "env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable; repeatable.")
@click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=FilePath(path_type=Path, dir_okay=False),
    help="Set the variables of a file, one NAME[=VALUE] a line; repeatable.",
)
@click.option("--entrypoint", metavar="PROGRAM", help="Execute this instead of ENTRYPOINT and CMD.")
@click.option(
    "--user", "-u", metavar="USER[:GROUP]", help="Run the command as this user instead of the image's."
)
@click.option(
    "--workdir", "-w", metavar="DIR", help="Run the command in this directory instead of the image's."
)
@click.option("--hostname", metavar="NAME", help="The machine's name; by default the id of the run.")
@click.option("--memory", "-m", metavar="SIZE", help="Memory of the machine, for example 512MiB.")
@click.option("--cpus", type=click.IntRange(1, 32), help="Processors of the machine.")
@click.option("--disk", metavar="SIZE", help="How much the command can write, for example 2GiB.")
@click.option("--read-only", is_flag=True, help="The command can't write to its root file system.")
@click.option(
    "--init",
    is_flag=True,
    help="Boot the image's own init, /sbin/init or that of --entrypoint, with COMMAND as its arguments.",
)
@click.option("--interactive", "-i", is_flag=True, help="Pass standard input to the command.")
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.option(
    "--ssh-key",
    "ssh_keys",
    multiple=True,
    metavar="[USER=]FILE",
    help="Authorise the public keys of a file for a user of the image, by default root; repeatable.",
)
@click.option(
    "--network",
    type=click.Choice(["none", "user", "host"]),
    help="none: no network; user: IPv4 to all but this host's loopback (qemu, local); "
    "host: this host's (local). By default as configured.",
)
@click.option(
    "--publish",
    "-p",
    "publish",
    multiple=True,
    metavar="[ADDRESS:]PORT:PORT",
    help="Forward a port of this host, by default on 127.0.0.1, to a port of the machine (qemu); repeatable.",
)
@click.option(
    "--detach",
    "-d",
    is_flag=True,
    help="Run in the background: print the id of the run when its command has begun; see `firebuild ps`.",
)
@click.option("--name", metavar="NAME", help="With --detach: a name for the run, besides its id.")
@click.option("--rm", is_flag=True, help="With --detach: remove the run's record and logs when it ends.")
@click.option(
    "--pull",
    envvar="FIREBUILD_PULL",
    show_envvar=True,
    metavar="missing|always|never",
    help="When to ask a registry for IMAGE, instead of as configured.",
)
@click.option(
    "--ca", metavar="PROVIDER", shell_complete=complete_providers, help="CA provider to use instead."
)
@click.option(
    "--machine",
    "--driver",
    "driver",
    metavar="qemu|firecracker|local",
    shell_complete=complete_machines,
    help="Machine to use instead of the configured one: qemu or firecracker; local is a sandbox, not a VM.",
)
@identity_options
@config_option
@docker_run_options
@click.pass_obj
def run(answer: int | None, /, image: str, command: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND, or the command of the image, in a machine whose root file system is IMAGE.

    The exit status is that of the command, or 128 + N if signal N ended it. It is 125 if firebuild failed,
    126 if the command can't be executed and 127 if it does not exist. What the command writes to its root
    file system is discarded with the machine.
    """
    if options["detach"] and answer is None:
        sys.exit(start_in_background(sys.argv))
    background = None if answer is None else Background(answer)
    signals = Signals(detached=background is not None)
    with signals.installed():
        try:
            status = _run(image, command, options, signals, background)
        except (Exception, Interrupted) as error:
            report(error)
            status = _status_of(error, signals)
    sys.exit(status)


def _status_of(error: BaseException, signals: Signals) -> int:
    if isinstance(error, StepFailed) and error.exit_code in (126, 127):
        return error.exit_code
    return 128 + (signals.last or signal.SIGINT) if isinstance(error, Interrupted) else _FAILED


def _run(
    image: str,
    command: tuple[str, ...],
    options: Mapping[str, Any],
    signals: Signals,
    background: Background | None,
) -> int:
    request = _request(image, command, options)
    settings = _settings(options)
    from firebuild_bootstrap.running import new_id, run_image
    from firebuild_bootstrap.service.console import Console

    if settings.machine.driver == "local" and options["network"] == "none":
        request = replace(request, network="none")
    with ExitStack() as cleanup:
        stream = None if background else sys.stderr
        boot = cleanup.enter_context(
            closing(Boot(f"starting a machine of {one_line(image, 80)}", stream, _show))
        )
        home = home_from(
            settings, check=signals.check, writable=True, tasks=boot.tasks, pull=read_policy(options["pull"])
        )
        cleanup.enter_context(closing(home))
        if (identity := identity_from(options, settings.ca.name_suffix)) is not None:
            request = replace(request, identity=identity)
            settings = _settings(options, laptop_ca(settings.ca, home.root))
        if background is None:
            keyboard = cleanup.enter_context(closing(_Keyboard(request.attach)))

            def started() -> None:
                signals.command_starts()
                keyboard.begin(console)

            signals.console = console = Console(started)
            return run_image(request, settings, home, console, events=boot)
        request = replace(request, id=new_id())
        signals.console = console = Console(signals.command_starts, lambda: background.begun(console.command))
        cleanup.enter_context(
            background.recording(
                home.root,
                record_of(request, options["name"] or "", settings.machine.driver),
                status_of=lambda error: _status_of(error, signals),
                keep=not options["rm"],
            )
        )
        status = run_image(request, settings, home, console, events=background.show)
        background.ended(console.command, status)
        return status


def _settings(options: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> BuildSettings:
    """Load the settings, with what the options say about the machine, and `more` settings by their paths.

    Raises:
        InputError: the machine does not have what an option asks for.
        firebuild_pki.SettingsError: as `settings_from`.
    """
    overrides = {**chosen(options["ca"], options["driver"]), **(more or {})}
    driver = settings_from(options["config_file"], overrides).machine.driver
    if driver == "external":
        raise InputError(
            "firebuild run starts a machine, which the driver external can't",
            hint="use --machine qemu or --machine firecracker",
        )
    wanted = {
        "--memory": ("memory", options["memory"]),
        "--cpus": ("vcpus", options["cpus"]),
        "--network": ("network", options["network"]),
    }
    for option, (name, value) in wanted.items():
        if value is None or (driver, option, value) == ("local", "--network", "none"):  # of the command
            continue
        if driver == "local" and option != "--network":
            raise InputError(f"{option}: the machine local does not take it", hint="use --machine qemu")
        if driver == "firecracker" and option == "--network":
            hint = "it is the setting machine.firecracker.network"
            raise InputError(f"{option}: the machine firecracker does not take it", hint=hint)
        overrides[f"machine.{driver}.{name}"] = value
    if options["init"] and driver == "local":
        raise InputError("--init: a sandbox has no system of its own to boot", hint="use --machine qemu")
    if options["disk"] is not None:
        if driver == "local":
            raise InputError("--disk: the machine local has no drive", hint="use --machine qemu")
        overrides["machine.disk_size"] = options["disk"]
    return settings_from(options["config_file"], overrides)


def _request(image: str, command: tuple[str, ...], options: Mapping[str, Any]) -> RunRequest:
    from firebuild_bootstrap.guest.configure import is_hostname
    from firebuild_bootstrap.running import RunRequest
    from firebuild_bootstrap.wire import Attach

    if options["tty"] and not (sys.stdout.isatty() and (not options["interactive"] or os.isatty(0))):
        raise InputError("--tty: standard input and output are not a terminal", hint="leave --tty out")
    if options["init"] and options["user"] is not None:
        raise InputError("--init: an init is root", hint="leave --user out")
    if options["detach"] and (options["interactive"] or options["tty"]):
        raise InputError(
            "--detach: a run in the background has neither input nor a terminal", hint="leave -i and -t out"
        )
    if options["name"] and not options["detach"]:
        raise InputError(
            "--name is for --detach: nothing of another run is kept", hint="add --detach, or leave --name out"
        )
    hostname = options["hostname"]
    if hostname and not is_hostname(hostname):
        raise InputError(
            f"--hostname: expected a host name, found {one_line(hostname, 80)!r}",
            hint="labels of letters, digits and dashes, with dots between them; 64 characters at most",
        )
    rows, columns = window_size() if options["tty"] else (0, 0)
    entrypoint = options["entrypoint"]
    return RunRequest(
        image=image,
        command=command,
        entrypoint=None if entrypoint is None else ((entrypoint,) if entrypoint else ()),
        env=read_env(options["env_files"], options["env"], os.environ),
        user=options["user"],
        workdir=options["workdir"],
        publish=tuple(map(read_port, options["publish"])),
        hostname=options["hostname"],
        keys=_read_keys(options["ssh_keys"]),
        attach=Attach(
            input=options["interactive"],
            terminal=options["tty"],
            rows=rows,
            columns=columns,
            read_only=options["read_only"],
            init=options["init"],
        ),
    )


def read_env(files: Sequence[Path], given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Read `--env-file` and `--env`, which wins; a name alone has the value that it has here, if it has one.

    As Docker reads them: in a file, empty lines and those that begin with # are left out, quotes are part
    of the value, and no name has a space in it.

    Raises:
        InputError: a file can't be read, or a name is impossible; values are not in the message.
    """
    found: dict[str, str] = {}

    def add(text: str, where: str) -> None:
        name, equals, value = text.partition("=")
        if not _NAME.fullmatch(name) or name != name.strip() or (where != "--env" and len(name.split()) > 1):
            export = name.split()[:1] == ["export"]
            hint = (
                "leave the word export out" if export else "a name is not empty, and has no space around it"
            )
            raise InputError(
                f"{where}: expected NAME=VALUE, found the name {one_line(name, 80)!r}", hint=hint
            )
        if equals:
            found[name] = value
        elif name in environment:
            found[name] = environment[name]

    for path in files:
        for number, line in enumerate(_lines(path), 1):
            text = line.removesuffix("\r").lstrip(" \t")
            if text and not text.startswith("#"):
                add(text, f"{path}:{number}")
    for text in given:
        add(text, "--env")
    return found


def _lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_ENV_FILE + 1)
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"--env-file {path} can't be read: {why}") from error
    if len(data) > _MAX_ENV_FILE:
        raise InputError(
            f"--env-file {path} has more than {human_size(_MAX_ENV_FILE)}",
            hint="the environment of a program holds no more either: execve(2)",
        )
    return lines


def read_port(text: str) -> PublishedPort:
    """Read `[ADDRESS:]PORT:PORT[/tcp]`.

    Raises:
        InputError: it is something else.
    """
    from firebuild_bootstrap.machine.base import PublishedPort

    found = _PORT.fullmatch(text)
    ports = [int(number) for number in found.group(2, 3)] if found else []
    usable = found is not None and all(0 < port < 1 << 16 for port in ports)
    if found is None or not usable or not _is_address(found[1] or "127.0.0.1"):
        raise InputError(
            f"--publish: expected [ADDRESS:]PORT:PORT, found {one_line(text, 80)!r}",
            hint="as 8080:80, or 0.0.0.0:8080:80 for all addresses; TCP only",
        )
    return PublishedPort(found[1] or "127.0.0.1", *ports)


def _is_address(text: str) -> bool:
    from ipaddress import AddressValueError, IPv4Address

    with suppress(AddressValueError):
        return bool(str(IPv4Address(text)))
    return False


def _read_keys(given: Sequence[str]) -> dict[str, str]:
    from firebuild_bootstrap.guest.configure import parse_keys
    from firebuild_bootstrap.guest.errors import GuestError

    found: dict[str, str] = {}
    for text in given:
        user, equals, name = text.partition("=")
        user, path = (user, Path(name)) if equals else ("root", Path(text))
        try:
            keys = read_small(path, _MAX_KEYS, patience=None).decode()
            if "PRIVATE KEY" in keys:
                raise InputError(f"--ssh-key {path}: this is a private key", hint=f"give {path}.pub")
            parse_keys(user, keys)
        except OSError as error:
            raise InputError(f"--ssh-key {path} can't be read: {error.strerror}") from error
        except (UnicodeDecodeError, GuestError) as error:
            raise InputError(
                f"--ssh-key {path}: expected public keys, one a line",
                hint="as in a file .pub of ssh-keygen, for example ssh-ed25519 AAAA… you@example",
            ) from error
        found[user] = found.get(user, "") + keys.removesuffix("\n") + "\n"
    return found


def _show(event: Event) -> None:
    """Show the command's output where it belongs, and what firebuild says on standard error."""
    from firebuild_bootstrap.events import Notice, StepOutput

    match event:
        case StepOutput(stream="stdout"):
            sys.stdout.buffer.write(event.data)
            sys.stdout.buffer.flush()
        case StepOutput():
            _to_stderr(event.data)
        case Notice(level="warning"):
            click.echo(f"warning: {one_line(event.message, 1000)}", err=True)


def _to_stderr(data: bytes) -> None:
    from firebuild_bootstrap.layers.tar import write_all

    try:
        write_all(2, data)
    except OSError as error:
        raise OutputError(
            f"standard error can't be written: {error.strerror}",
            reader_gone=isinstance(error, BrokenPipeError),
        ) from error


class Signals:
    """The signals of one run: before the command is there they end firebuild, then they are the command's.

    One that the command does not heed within ten seconds, or another one, ends the machine, but for those of
    `_TALK`. The handlers take a note, and `check` acts on it.

    Args:
        detached: SIGTERM asks the command to end as its image wants to be asked, for as long as it takes.
    """

    def __init__(self, *, detached: bool = False) -> None:
        self._detached = detached
        self.console: Console | None = None
        self.last = 0
        """The last signal that came."""
        self._came: list[int] = []
        self._resized = False
        self._started = False
        self._passed_on = False
        self._deadline = 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals until the block ends; main thread only."""
        kept = [each for each in (*SIGNALS, *_TALK) if signal.getsignal(each) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._note) for number in kept}
        previous[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, self._note_size)
        try:
            yield
        finally:
            for number, handler in previous.items():
                # On the way out an impatient signal must not replace the exit status.
                signal.signal(number, signal.SIG_IGN if number in SIGNALS and self.last else handler)

    def command_starts(self) -> None:
        """Take note that the command can take signals from now on."""
        self._started = True

    def check(self) -> None:
        """Pass on what has come.

        Raises:
            Interrupted: nobody is there to take it, or the command has not heeded it.
        """
        if self._resized and self.console is not None:
            self._resized = False
            self.console.resize(*window_size())
        while self._came:
            number = self._came[0]
            if number in _TALK and self._started and self.console is not None:
                del self._came[0]
                self.console.signal(number)
                continue
            if self._passed_on or not self._started or self.console is None:
                # It stays for whoever asks next, in this thread or another.
                raise Interrupted(f"the run was interrupted ({signal.Signals(number).name})")
            del self._came[0]
            stops = self._detached and number == signal.SIGTERM
            self.console.signal(self.console.stop_signal if stops else number)
            self._passed_on = True
            self._deadline = time.monotonic() + (math.inf if self._detached else _GRACE_SECONDS)
        if self._passed_on and time.monotonic() > self._deadline:
            name = signal.Signals(self.last).name
            raise Interrupted(f"the command did not end within {_GRACE_SECONDS:g} seconds after {name}")

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in _TALK and self._started:
            if number not in self._came:
                self._came.append(number)
            return
        if len(self._came) > 1:  # the clean-up is too slow for somebody
            os.write(2, b"error: interrupted again, the rest is cleaned up in the background\n")
            os._exit(128 + number)
        self.last = number
        self._came.append(number)

    def _note_size(self, _number: int, _frame: FrameType | None) -> None:
        self._resized = True


class _Keyboard:
    """Standard input, which is the command's from when that begins; a terminal then gives one key at a time.

    Before, Ctrl-C is a signal that ends firebuild, which may wait for a registry or a machine.
    """

    def __init__(self, attach: Attach) -> None:
        self._attach = attach
        self._lock = threading.Lock()
        self._before: list[Any] | None = None
        self._closed = False

    def begin(self, console: Console) -> None:
        """Pass standard input on; called by a thread of the server."""
        with self._lock:
            if self._closed or not self._attach.input:
                return
            if self._attach.terminal:
                import termios
                import tty

                with suppress(termios.error):  # it has hung up, which the reader is told, too
                    self._before = termios.tcgetattr(0)
                    tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead stays
            threading.Thread(target=_read_input, args=(console,), name="stdin", daemon=True).start()

    def close(self) -> None:
        """Leave the terminal as it was."""
        with self._lock:
            self._closed = True
            if self._before is not None:
                import termios

                termios.tcsetattr(0, termios.TCSADRAIN, self._before)


def _read_input(console: Console) -> None:
    with suppress(OSError):
        while data := os.read(0, 64 * 1024):
            if not console.write(data):
                return
    console.end_input()
