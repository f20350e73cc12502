"""`firebuild doctor`: what this machine can do, and how to fix the rest."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from firebuild_bootstrap.cli.options import (
    MACHINES,
    chosen,
    complete_machines,
    config_option,
    home_from,
    interruptible,
    json_option,
    provider_option,
    settings_from,
)
from firebuild_bootstrap.cli.output import print_json
from firebuild_bootstrap.cli.screen import print_checked, styled

_WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ok": ("ok", {"fg": "green"}),
    "limited": ("warn", {"fg": "yellow"}),
    "missing": ("none", {"dim": True}),
    "wrong": ("FAIL", {"fg": "red", "bold": True}),
}
_ABOUT_WIDTH = 20
_READY = "ready: builds with this configuration can work here"
_NOT_READY = "not ready: something that builds with this configuration need is missing"


@click.command()
@config_option
@provider_option
@click.option(
    "--machine",
    metavar="|".join(MACHINES),
    shell_complete=complete_machines,
    help="Driver to use instead of the configured one.",
)
@click.option("--offline", is_flag=True, help="Do not ask registries.")
@json_option
@click.pass_context
def doctor(
    context: click.Context,
    /,
    config_file: Path | None,
    provider: str | None,
    **options: Any,
) -> None:
    """Check what works on this machine.

    It tests the requirements of builds: user namespaces, overlays, the store, KVM with a guest of a few
    bytes, each machine driver, programs, registries, the clock and the certificate authority. It says how
    to get what is missing, and changes nothing.

    Exit status: 0 builds with this configuration can work, 2 the configuration is wrong, 6 a requirement is
    missing.
    """
    from firebuild_bootstrap.doctor import Level, examine, worst
    from firebuild_bootstrap.errors import ExitStatus

    settings = settings_from(config_file, chosen(provider, options["machine"]))
    findings = []
    with interruptible("the check") as check, closing(home_from(settings, check, writable=True)) as home:
        for finding in examine(settings, home, network=not options["offline"], check=check):
            findings.append(finding)
            if not options["as_json"]:
                level = _WORDS[finding.level.value]
                print_checked(level, finding.about, _ABOUT_WIDTH, finding.message, finding.hint)
    verdict = worst(findings)
    if options["as_json"]:
        document = {"ready": verdict is not Level.WRONG, "findings": [one.to_json() for one in findings]}
        print_json(document)
    else:
        ready = verdict is not Level.WRONG
        words = _READY if ready else _NOT_READY
        click.echo(f"\n{styled(words, bold=True, fg='green' if ready else 'red')}")
    context.exit(ExitStatus.MACHINE if verdict is Level.WRONG else ExitStatus.SUCCESS)
