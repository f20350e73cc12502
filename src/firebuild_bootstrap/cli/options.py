"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.settings import BuildSettings

FunctionT = TypeVar("FunctionT", bound="Callable[..., Any]")


def config_option(function: FunctionT) -> FunctionT:
    """Add `--config FILE`."""
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="FIREBUILD_CONFIG",
        show_envvar=True,
        help="Configuration file (YAML).",
    )(function)


def settings_from(config_file: Path | None, overrides: dict[str, Any] | None = None) -> BuildSettings:
    """Load the settings with the environment and the given overrides on top.

    Raises:
        firebuild_pki.SettingsError: every problem, with file, line and column.
    """
    from firebuild_bootstrap.settings import load_settings

    return load_settings(config_file, os.environ, overrides)


def home_from(settings: BuildSettings, check: Callable[[], None] = lambda: None) -> Home:
    """Return where bases and images are: the setting, $FIREBUILD_HOME, or the user's data directory.

    What dead builds left there is removed meanwhile.

    Args:
        settings: may name the directory, and the id mapping.
        check: called again and again while something long goes on; what it raises ends that.
    """
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.names import default_home

    chosen = settings.store.path
    root = Path(chosen).expanduser().absolute() if chosen else default_home(os.environ)
    home = Home(root, ids=settings.machine.ids, check=check)
    home.sweep()
    return home
