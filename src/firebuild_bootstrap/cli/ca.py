"""`firebuild ca` and `firebuild plugin`: try, use and look at certificate authorities, and write one."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firebuild_bootstrap.cli.options import (
    FilePath,
    chosen,
    config_option,
    interruptible,
    json_option,
    provider_option,
    settings_from,
)
from firebuild_bootstrap.cli.output import print_json
from firebuild_pki.display import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from firebuild_pki.preflighting import PreflightReport, PreflightRow


_VAULT_LOGINS = ("approle", "jwt", "kubernetes", "cert", "token", "token_file")


@click.group()
def ca() -> None:
    """Check, use and inspect the certificate authority."""


@ca.command()
@config_option
@provider_option
@json_option
@click.option("--strict", is_flag=True, help="Treat warnings as failures.")
@click.pass_context
def check(
    context: click.Context, config_file: Path | None, provider: str | None, as_json: bool, strict: bool
) -> None:
    """Check everything that a build needs from the CA.

    It opens the CA, has the provider check its backend, issues certificates for a build that does not exist,
    makes a connection with them, and revokes them if the provider can.

    Exit status: 0 ready, 2 the configuration is wrong, 3 no usable certificates.
    """
    from firebuild_bootstrap.cli.ca_display import print_row, print_verdict

    on_row: Callable[[PreflightRow], None] = (lambda _: None) if as_json else print_row
    with interruptible("the check") as interrupted:
        report = _preflight(config_file, provider, interrupted, on_row)
    if as_json:
        print_json(report.to_json())
    else:
        print_verdict(report)
    context.exit(_status(report, strict=strict))


@ca.command()
@click.option(
    "--server", metavar="NAME", help="Make the server's certificate for <id>.<suffix>, or for <id>."
)
@click.option("--guest", metavar="ID", help="Make the guest's certificate for the build <id>.")
@click.option(
    "--out",
    "directory",
    type=FilePath(path_type=Path),
    required=True,
    metavar="DIR",
    help="Directory to write to.",
)
@click.option("--ttl", metavar="DURATION", default="1h", show_default=True, help="Lifetime to ask for.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@config_option
@provider_option
@json_option
def issue(config_file: Path | None, provider: str | None, as_json: bool, **options: Any) -> None:
    """Issue certificates into files.

    The certificates are for scripts and your own services. The command writes server.pem and guest.pem
    (certificate and chain), server-key.pem and guest-key.pem (mode 0600), and ca.pem (the trust anchors
    for the other end). Give both --server and --guest for a pair of one build. With the embedded provider
    only such a pair fits together, because its CA ends with this command, unless ca.embedded.directory
    keeps it.
    """
    from firebuild_bootstrap.cli.issuing import IssueRequest, issue_files, print_issued
    from firebuild_bootstrap.cli.paths import check_can_be_made

    request = IssueRequest.parse(**options)
    check_can_be_made(request.directory)
    with interruptible("issuing") as interrupted:
        settings = settings_from(config_file, {**chosen(provider), **request.overrides})
        issued = issue_files(request, settings.ca, interrupted)
    if as_json:
        print_json(issued.to_json())
    else:
        print_issued(issued)


@ca.command()
@config_option
@provider_option
@json_option
def show(config_file: Path | None, provider: str | None, as_json: bool) -> None:
    """Show the certificates of a build.

    It shows the certificates of server and guest, and their chains up to the trust anchors. For that it
    issues a pair for a build that does not exist, and revokes it if the provider can.
    """
    from firebuild_bootstrap.cli.ca_display import issue_pair, print_certificates

    with interruptible("showing the certificates") as interrupted:
        settings = settings_from(config_file, chosen(provider))
        issued = issue_pair(settings.ca, settings.bootstrap.certificate_lifetime, interrupted)
    if as_json:
        print_json(issued.to_json())
    else:
        print_certificates(issued)


@ca.command()
@click.argument("files", nargs=-1, required=True, type=FilePath(path_type=Path), metavar="FILE...")
@click.option(
    "--trust",
    type=FilePath(path_type=Path),
    metavar="FILE",
    help="Trust anchors; by default the self-signed CAs among the files.",
)
@click.option(
    "--passphrase-file",
    type=FilePath(path_type=Path),
    metavar="FILE",
    help="File with the passphrase of encrypted keys.",
)
@json_option
@click.pass_context
def inspect(
    context: click.Context,
    files: tuple[Path, ...],
    trust: Path | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Inspect files with certificates.

    Certificates, private keys, certificate signing requests and revocation lists, in PEM, DER, PKCS#7 or
    PKCS#12; - reads standard input. It shows what each is, and whether they fit together: key and
    certificate, chain and trust anchor, dates, usages. It shows no part of a private key.

    Exit status: 0 all is right, 2 a file cannot be read, 3 something is wrong.
    """
    from firebuild_bootstrap.cli.ca_display import inspect_paths, print_inspection
    from firebuild_bootstrap.errors import ExitStatus

    found = inspect_paths(files, trust, passphrase_file)
    if as_json:
        print_json(found.to_json())
    else:
        print_inspection(found)
    context.exit(ExitStatus.SUCCESS if found.sound else ExitStatus.CERTIFICATE_AUTHORITY)


@ca.command()
@click.argument("files", nargs=-1, required=True, type=FilePath(path_type=Path), metavar="FILE...")
@click.option(
    "--issuer-gone",
    is_flag=True,
    help="Revoke also certificates of former CAs, which none of the provider's present CAs signed.",
)
@config_option
@provider_option
@json_option
@click.pass_context
def revoke(
    context: click.Context,
    /,
    config_file: Path | None,
    provider: str | None,
    **options: Any,
) -> None:
    """Revoke certificates.

    Each FILE has a certificate that the configured provider issued, as `firebuild ca issue` writes it; the
    certificates after the first are its chain. The key is not needed. The command reads all files before
    it revokes anything, and tries every certificate.

    Exit status: 0 all are revoked, 2 a file or the configuration is wrong, 3 one was not revoked.
    """
    from firebuild_bootstrap.cli.issuing import print_revoked, revoke_files
    from firebuild_bootstrap.errors import ExitStatus

    with interruptible("revoking") as interrupted:
        settings = settings_from(config_file, {**chosen(provider), "ca.revoke_at_end": False})
        revoked = revoke_files(options["files"], settings.ca, interrupted, issuer_gone=options["issuer_gone"])
    if options["as_json"]:
        print_json([one.to_json() for one in revoked])
    else:
        print_revoked(revoked)
    failed = any(one.problem for one in revoked)
    context.exit(ExitStatus.CERTIFICATE_AUTHORITY if failed else ExitStatus.SUCCESS)


@ca.command()
@click.option(
    "--profile",
    "work",
    type=click.Choice(("build", "server", "guest")),
    default="build",
    show_default=True,
    help="What to repeat: the calls of a build (open, both certificates, close), or one certificate.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1_000_000),
    default=100,
    show_default=True,
    help="Number of repetitions.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Threads in each process.",
)
@click.option(
    "--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of processes."
)
@click.option("--duration", metavar="DURATION", help="Start no further repetition after this time.")
@config_option
@provider_option
@json_option
@click.pass_context
def bench(
    context: click.Context, /, config_file: Path | None, provider: str | None, as_json: bool, **plan: Any
) -> None:
    """Measure how fast the CA issues.

    It issues real certificates for builds that do not exist, and first says what these leave behind at the
    CA. It prints the certificates per second, the p50, p99 and maximum of the time for each, the errors
    by message, the requests and bytes. Ctrl-C ends it and prints the results so far.

    Exit status: 0 no error, 2 the configuration is wrong, 3 something was not issued, 130 interrupted.
    """
    from firebuild_bootstrap.cli import bench as measuring
    from firebuild_bootstrap.cli.failure import Interrupts

    interrupts = Interrupts()
    with interrupts.installed():
        status = measuring.bench(config_file, chosen(provider), interrupts.check, as_json=as_json, **plan)
    context.exit(status)


@ca.command()
@json_option
def providers(as_json: bool) -> None:
    """List the installed providers and key stores.

    For each, show its package and its features, or why it can't be loaded.
    """
    from firebuild_bootstrap.cli.ca_display import print_providers
    from firebuild_pki.preflighting import list_providers

    listed = list_providers()
    if as_json:
        print_json([one.to_json() for one in listed])
    else:
        print_providers(listed)


@ca.command("vault-setup")
@click.option("--print", "print_it", is_flag=True, help="Print the script; nothing is run.")
@click.option("--address", metavar="URL", help="URL of Vault or OpenBao.")
@click.option("--mount", metavar="PATH", help="Mount path of the PKI engine.")
@click.option(
    "--auth",
    type=click.Choice(_VAULT_LOGINS),
    help="How builds log in; by default as configured, or with AppRole.",
)
@config_option
def vault_setup(print_it: bool, config_file: Path | None, **options: str | None) -> None:
    """Print a script that prepares Vault or OpenBao.

    The script creates the mount, the roles, a policy and the auth method for the configuration and the
    options. firebuild never runs it, because it needs rights that no build should have. Read it, and have
    an operator run it.

    Without a configuration, the script uses AppRole, the mount pki, and the address in VAULT_ADDR or
    BAO_ADDR. It ends with the matching settings for firebuild.
    """
    import firebuild_pki
    from firebuild_bootstrap.errors import InputError

    if not print_it:
        raise InputError(
            "firebuild does not change Vault itself: that needs rights that no build should have",
            hint="`firebuild ca vault-setup --print` prints a script to read, and to run by hand",
        )
    overrides = firebuild_pki.vault_setup_settings(os.environ, fresh=config_file is None, **options)
    settings = settings_from(config_file, {"ca.provider": "vault", **overrides})
    click.echo(firebuild_pki.vault_setup(settings.ca), nl=False)


def _preflight(
    config_file: Path | None,
    provider: str | None,
    interrupted: Callable[[], None],
    on_row: Callable[[PreflightRow], None],
) -> PreflightReport:
    from firebuild_pki import CAError
    from firebuild_pki.preflighting import preflight, refused

    try:
        settings = settings_from(config_file, chosen(provider))
    except CAError as error:
        return refused(error, on_row=on_row)
    return preflight(
        settings.ca,
        build_time=settings.bootstrap.build_time,
        ttl=settings.bootstrap.certificate_lifetime,
        check=interrupted,
        on_row=on_row,
    )


def _status(report: PreflightReport, *, strict: bool) -> int:
    from firebuild_bootstrap.errors import ExitStatus
    from firebuild_pki.preflighting import RowLevel, Verdict

    if report.verdict is Verdict.SETTINGS:
        return ExitStatus.BAD_INPUT
    if report.verdict is Verdict.AUTHORITY or (strict and report.count(RowLevel.WARNING)):
        return ExitStatus.CERTIFICATE_AUTHORITY
    return ExitStatus.SUCCESS


@click.group()
def plugin() -> None:
    """Start a plugin."""


@plugin.command()
@click.argument("name")
@click.option(
    "--dir",
    "directory",
    type=FilePath(path_type=Path, file_okay=False),
    default=Path(),
    show_default="the current directory",
    help="Directory to create the project in.",
)
def new(name: str, directory: Path) -> None:
    """Create the project of a new, working CA provider with tests.

    NAME selects the provider in the configuration: ca.provider: NAME.
    """
    from firebuild_bootstrap.errors import InputError
    from firebuild_pki import CAError, new_plugin

    try:
        project = new_plugin(name, directory)
    except CAError as error:
        raise InputError(error.message, hint=error.hint) from error
    click.echo(f"wrote {one_line(str(project))}\n\nTry it:")
    for command in (
        f"cd {shlex.quote(str(project))}",
        "pip install -e . pytest",
        "pytest",
        f"firebuild ca check --ca {name.removeprefix('firebuild-pki-')}",
    ):
        click.echo(f"  {one_line(command)}")
