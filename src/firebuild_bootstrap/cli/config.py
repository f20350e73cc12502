"""`firebuild config`: checks the settings, prints their JSON Schema, and shows the effective ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from firebuild_bootstrap.cli.options import config_option, settings_from
from firebuild_bootstrap.cli.output import print_json
from firebuild_pki.display import one_line


@click.group()
def config() -> None:
    """Check, describe and show the configuration."""


@config.command()
@config_option
def check(config_file: Path | None) -> None:
    """Check the configuration, and report every problem with file, line and column.

    It connects to nothing; `firebuild ca check` does.
    """
    from firebuild_pki import check_settings

    settings = settings_from(config_file)
    for note in check_settings(settings.ca):
        click.echo(f"warning: {one_line(str(replace(settings.ca.problem(note), hint=None)))}", err=True)
        if note.hint:
            click.echo(f"  hint: {one_line(note.hint)}", err=True)
    where = one_line(str(config_file or "defaults and environment"))
    click.echo(f"{where}: ok (CA provider {settings.ca.provider}, machine {settings.machine.driver})")


@config.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    from firebuild_bootstrap.settings import BuildSettings

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print_json({**document, **BuildSettings.json_schema()})


@config.command()
@config_option
def show(config_file: Path | None) -> None:
    """Print the effective settings as YAML, secrets as references."""
    import yaml

    from firebuild_pki.config import redacted

    click.echo(yaml.safe_dump(redacted(settings_from(config_file)), sort_keys=False), nl=False)
