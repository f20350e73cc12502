"""`firebuild ca bench`: how many certificates the configured CA issues, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from firebuild_bootstrap.cli.options import read_duration, settings_from
from firebuild_bootstrap.cli.output import print_json
from firebuild_bootstrap.cli.screen import print_table
from firebuild_bootstrap.errors import ExitStatus
from firebuild_pki import CASettings
from firebuild_pki.benching import Measured, Plan, Work, measure
from firebuild_pki.display import counted, one_line


def bench(
    config_file: Path | None,
    overrides: dict[str, Any],
    interrupted: Callable[[], None],
    *,
    as_json: bool,
    work: str,
    duration: str | None,
    **numbers: int,
) -> int:
    """Warn, measure, print.

    Args:
        config_file: names the provider and its settings.
        overrides: settings of the command line.
        interrupted: raises once a signal has come.
        as_json: whether to print a JSON document.
        work: name of a `Work`.
        duration: after which nothing more is begun.
        numbers: see `Plan`.

    Returns:
        the exit status.

    Raises:
        InputError: the duration is none.
        SettingsError: the configuration is wrong.
    """
    limit = None if duration is None else read_duration(duration, "--duration")
    plan = Plan(Work(work), duration=limit, **numbers)
    load = partial(_load, config_file, overrides)
    for line in warnings(load(), plan):
        click.echo(line, err=True)
    measured = measure(load, plan, interrupted)
    if as_json:
        print_json(measured.to_json())
    else:
        print_measured(measured)
    if measured.interrupted:
        return ExitStatus.INTERRUPTED
    return ExitStatus.CERTIFICATE_AUTHORITY if measured.tally.errors else ExitStatus.SUCCESS


def _load(config_file: Path | None, overrides: dict[str, Any]) -> CASettings:
    return settings_from(config_file, overrides).ca


def warnings(settings: CASettings, plan: Plan) -> Iterator[str]:
    """Say what the measurement leaves behind."""
    end = "" if plan.duration is None else ", as far as the duration allows"
    yield (
        f"This really issues: up to {counted(plan.certificates, 'certificate')}{end}, through the provider "
        f"{settings.provider}, for builds that do not exist (bench-…)."
    )
    if settings.provider == "embedded":
        yield "Nothing has to be cleaned up: its CAs end with each build."
        return
    yield "What to clean up:"
    if settings.revoke_at_end:
        yield "  ca.revoke_at_end is set: each is revoked, so the CA's revocation list grows by as many."
    else:
        yield "  they are not revoked (ca.revoke_at_end), and end after an hour or what the CA grants;"
    yield "  a CA that stores or logs what it issues, or takes money for it, does so for each."
    if settings.provider == "vault":
        yield "  Vault: bao write <mount>/tidy tidy_cert_store=true, once they have ended; no_store=true on"
        yield "  the roles keeps none. Tokens of logins are revoked when their authority is closed."


def print_measured(measured: Measured) -> None:
    """Print the figures as tables."""
    found = measured.to_json()
    if measured.interrupted:
        click.echo("interrupted: these are the figures until then")
    click.echo(
        f"{counted(found['certificates'], 'certificate')} in {found['seconds']:.1f} s: "
        f"{found['certificates_per_second']:.1f} a second "
        f"({found['processes']} process{'' if found['processes'] == 1 else 'es'} "
        f"of {counted(found['concurrency'], 'thread')})"
    )
    rows = [
        (what, *(f"{times[name]:.1f}" for name in ("p50", "p99", "max")))
        for what, times in (("certificate", found["certificate_ms"]), ("build", found["build_ms"]))
        if times is not None
    ]
    if rows:
        print_table(("ms", "p50", "p99", "max"), rows)
        each = (
            f"{found['requests_per_certificate']:.1f} requests",
            f"{found['bytes_sent_per_certificate']:.0f} bytes sent",
            f"{found['bytes_received_per_certificate']:.0f} bytes received",
            f"{found['cpu_ms_per_certificate']:.1f} ms of the processor here",
        )
        click.echo("each certificate: " + ", ".join(each))
    click.echo(f"errors: {sum(measured.tally.errors.values())}")
    for kind, count in found["errors"].items():
        click.echo(f"  {count} x {one_line(kind, 300)}")
    for text in found["warnings"]:
        click.echo(f"warning: {one_line(text, 300)}")
