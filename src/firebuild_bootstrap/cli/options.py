"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from firebuild_bootstrap.errors import MachineError
from firebuild_pki.display import counted, one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.errors import FirebuildError
    from firebuild_bootstrap.events import Tasks
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.settings import BuildSettings
    from firebuild_pki import CASettings


MACHINES = ("local", "qemu", "firecracker", "external")
"""The drivers, as `machine.settings` has them: its import would make a help text wait."""

_USUAL_NAMES = ("firebuild.yaml", "firebuild.yml")

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def stacked(*options: Callable[[Any], Any]) -> Callable[[FunctionT], FunctionT]:
    """Return what adds options to a command, in this order."""

    def add(function: FunctionT) -> FunctionT:
        for option in reversed(options):
            function = option(function)
        return function

    return add


class FilePath(click.Path):
    """A path of the command line, which is not empty: an unset variable would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.Path`."""
        if value == "":
            self.fail("expected a path, found an empty text", param, ctx)
        return super().convert(value, param, ctx)


def config_option(function: FunctionT) -> FunctionT:
    """Add `--config FILE`."""
    return click.option(
        "--config",
        "config_file",
        type=FilePath(path_type=Path, dir_okay=False),
        envvar="FIREBUILD_CONFIG",
        show_envvar=True,
        callback=_notice_unread,
        help="Configuration file (YAML); without it, none is read.",
    )(function)


def _notice_unread(context: click.Context, _: click.Parameter, file: Path | None) -> Path | None:
    """Warn of a file that looks as if it were meant: whoever has one may believe that its CA is used.

    An empty FIREBUILD_CONFIG says that none is meant.
    """
    if file is None and "FIREBUILD_CONFIG" not in os.environ and not context.resilient_parsing:
        for name in filter(os.path.isfile, _USUAL_NAMES):
            remedy = f"use --config {name}, or set FIREBUILD_CONFIG={name}"
            click.echo(f"warning: {name} in this directory is not read ({remedy})", err=True)
    return file


def chosen(provider: str | None, machine: str | None = None) -> dict[str, Any]:
    """Return the settings that `--ca` and `--machine` mean, by their paths."""
    given = {"ca.provider": provider, "machine.driver": machine}
    return {path: value for path, value in given.items() if value}


def read_duration(text: str, option: str) -> timedelta:
    """Read a duration of more than zero.

    Raises:
        InputError: it is none; the message names the option.
    """
    from pydantic import TypeAdapter, ValidationError

    from firebuild_bootstrap.errors import InputError
    from firebuild_pki.config import PositiveDuration

    try:
        return TypeAdapter[timedelta](PositiveDuration).validate_python(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{option}: {reason}") from None


def read_size(text: str, option: str) -> int:
    """Read a number of bytes, such as `5GiB`.

    Raises:
        InputError: it is none; the message names the option.
    """
    from firebuild_bootstrap.errors import InputError
    from firebuild_bootstrap.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error


def settings_from(config_file: Path | None, overrides: dict[str, Any] | None = None) -> BuildSettings:
    """Load the settings with the environment and the given overrides on top.

    Raises:
        firebuild_pki.SettingsError: every problem, with file, line and column.
    """
    from firebuild_bootstrap.image.names import RESERVED_ENVIRONMENT

    settings = any(name.startswith("FIREBUILD_") and name not in RESERVED_ENVIRONMENT for name in os.environ)
    if config_file is None and not overrides and not settings:
        return cast("BuildSettings", _Unwritten())
    from firebuild_bootstrap.settings import load_settings

    return load_settings(config_file, os.environ, overrides)


class _Unwritten:
    """The settings where nobody has written any, read without the models that check what somebody writes.

    Those models are half of what a build imports that is cached whole, and a tenth of what a small one does.
    Neither asks for anything but the following; whoever asks for more gets it from the models.
    """

    ca_provider = "embedded"

    def __init__(self) -> None:
        local = SimpleNamespace(network="host")
        self.machine = _Section(self, "machine", driver="local", ids="auto", at_once=2, local=local)
        self.store = _Section(self, "store", path=None)
        self.cache = _Section(self, "cache", max_size=None, import_from=(), export_to=())
        self.bootstrap = _Section(
            self,
            "bootstrap",
            bind="127.0.0.1",
            initial_timeout=timedelta(minutes=1),
            build_timeout=timedelta(minutes=30),
            build_time=timedelta(minutes=31),
            certificate_lifetime=timedelta(minutes=41),
            ping_interval=timedelta(seconds=5),
            missed_pings=6,
            max_connections=16,
            log_limit=64 << 20,
        )
        self.registries = _Section(self, "registries", pull="missing")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaded, name)

    @cached_property
    def ca(self) -> CASettings:
        from firebuild_pki import CASettings

        return CASettings.model_validate({})

    @cached_property
    def loaded(self) -> BuildSettings:
        from firebuild_bootstrap.settings import load_settings

        return load_settings(None, {})


class _Section:
    def __init__(self, settings: _Unwritten, section: str, **known: object) -> None:
        self._settings = settings
        self._section = section
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._settings.loaded, self._section), name)


def home_from(
    settings: BuildSettings,
    check: Callable[[], None] = lambda: None,
    *,
    writable: bool = False,
    tasks: Tasks | None = None,
    pull: str | None = None,
) -> Home:
    """Return where bases and images are: the setting, $FIREBUILD_HOME, or the user's data directory.

    What dead builds left there is removed meanwhile.

    Args:
        settings: may name the directory, and the id mapping.
        check: called again and again while something long goes on; what it raises ends that.
        writable: whether something will be written there.
        tasks: receives the progress of long work.
        pull: when FROM asks a registry, instead of the setting.

    Raises:
        InputError: the directory can't be used for that.
    """
    from firebuild_bootstrap.cli.paths import check_store
    from firebuild_bootstrap.cli.registries import puller
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.bases import PullPolicy
    from firebuild_bootstrap.image.names import at_home, default_home

    chosen = settings.store.path
    root = at_home(chosen, "store.path").absolute() if chosen else default_home(os.environ)
    check_store(root, writable=writable, setting="store.path" if chosen else "FIREBUILD_HOME")
    home = Home(
        root,
        ids=settings.machine.ids,
        check=check,
        tasks=tasks,
        pull=puller(settings),
        policy=PullPolicy(pull or settings.registries.pull),
    )
    home.sweep()
    return home


@contextmanager
def watched(config_file: Path | None, *, writable: bool = True) -> Iterator[Home]:
    """Give what `home_from` does to a command that may take long, which shows on standard error.

    Standard output is for what comes of it.
    """
    from firebuild_bootstrap.cli.display import make_renderer
    from firebuild_bootstrap.cli.output import guarded_stderr
    from firebuild_bootstrap.events import EventBus, Tasks

    settings = settings_from(config_file)
    with ExitStack() as cleanup:
        renderer = cleanup.enter_context(closing(make_renderer("auto", guarded_stderr())))
        tasks = Tasks(EventBus(renderer))
        yield cleanup.enter_context(closing(home_from(settings, writable=writable, tasks=tasks)))


def warn(error: FirebuildError) -> None:
    """Say what is wrong with one thing of several, on standard error."""
    remedy = f" ({error.hint})" if error.hint else ""
    click.echo(f"warning: {one_line(error.message + remedy, 1000)}", err=True)


@contextmanager
def listing(
    incomplete: str = "what is shown is not all",
) -> Iterator[Callable[[FirebuildError], None]]:
    """Give what takes the errors of single things that a list leaves out, each of which is shown.

    Args:
        incomplete: says what comes of that.

    Raises:
        MachineError: at the end of the block, where there was one: who reads the list has to know.
    """
    left = 0

    def leave_out(error: FirebuildError) -> None:
        nonlocal left
        left += 1
        warn(error)

    yield leave_out
    if left:
        raise MachineError(
            f"{incomplete}: {counted(left, 'record')} of the store can't be read",
            hint="`firebuild store check` says what to do about each",
        )


def leave_out_closed(home: Home, leave_out: Callable[[FirebuildError], None]) -> None:
    """Tell `leave_out` of each directory of a store that this user may not enter: its size is not known."""
    for directory in home.closed():
        leave_out(
            MachineError(
                f"{directory} belongs to another user: its size is not known", hint="ask as that user"
            )
        )


def complete_tags(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of an image in the store."""
    return _completed(context, incomplete, lambda home: map(str, home.images.names()))


def complete_bases(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a base."""
    return _completed(context, incomplete, lambda home: map(str, home.bases.names()))


def complete_providers(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a CA provider."""
    from importlib.metadata import entry_points

    names = {point.name for point in entry_points(group="firebuild_pki.providers")}
    return sorted(name for name in names if name.startswith(incomplete))


def complete_machines(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a machine driver."""
    return [name for name in MACHINES if name.startswith(incomplete)]


def _completed(context: click.Context, incomplete: str, names: Callable[[Home], Iterable[str]]) -> list[str]:
    # A shell shows what is written here amid the user's line, so that a broken store completes nothing.
    with suppress(Exception):
        from firebuild_bootstrap.home import Home

        return [
            name
            for name in names(Home(_store(context.params.get("config_file"))))
            if name.startswith(incomplete)
        ]
    return []


def _store(config_file: Path | None) -> Path:
    """Return the directory of the store, without the models that check settings: a Tab can't wait for them.

    Raises:
        firebuild_pki.SettingsError: the file is not readable YAML.
    """
    from firebuild_bootstrap.image.names import RESERVED_ENVIRONMENT, at_home, default_home
    from firebuild_pki import Document, load_document

    document = Document({}) if config_file is None else load_document(config_file)
    section = document.merged(os.environ, reserved=RESERVED_ENVIRONMENT).data.get("store") or {}
    chosen = section.get("path")
    return at_home(chosen, "store.path").absolute() if chosen else default_home(os.environ)


def provider_option(function: FunctionT) -> FunctionT:
    """Add `--ca PROVIDER`."""
    help_text = "CA provider to use instead of the configured one."
    return click.option(
        "--ca", "provider", metavar="PROVIDER", shell_complete=complete_providers, help=help_text
    )(function)


def json_option(function: FunctionT) -> FunctionT:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")(function)


@contextmanager
def interruptible(what: str) -> Iterator[Callable[[], None]]:
    """Notice signals at safe points, so that what was begun is also ended.

    Args:
        what: what the signals interrupt, for the message.

    Yields:
        A function to call again and again; it raises `Interrupted` once a signal has come.
    """
    from firebuild_bootstrap.cli.failure import Interrupts
    from firebuild_bootstrap.errors import Interrupted

    interrupts = Interrupts()
    try:
        with interrupts.installed():
            yield interrupts.check
            interrupts.check()
    except Interrupted as error:
        raise Interrupted(error.message.replace("the build", what)) from error
