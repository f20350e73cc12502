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
    """Try, use and look at the certificate authority."""


@ca.command()
@config_option
@provider_option
@json_option
@click.option("--strict", is_flag=True, help="Let warnings count as failures.")
@click.pass_context
def check(
    context: click.Context, config_file: Path | None, provider: str | None, as_json: bool, strict: bool
) -> None:
    """Try all that a build needs of the CA.

    Opens it, asks the provider to look at its backend, issues certificates for a build that does not
    exist, makes a connection with them, and revokes them where the provider can.

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
    help="Where to write.",
)
@click.option("--ttl", metavar="DURATION", default="1h", show_default=True, help="Wanted lifetime.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@config_option
@provider_option
@json_option
def issue(config_file: Path | None, provider: str | None, as_json: bool, **options: Any) -> None:
    """Issue certificates into files.

    They are for scripts, and for services of your own. Writes server.pem and guest.pem (certificate and
    chain), server-key.pem and guest-key.pem (mode 0600), and ca.pem (what the other end has to trust). Ask
    for both ends at once to get a pair of one build. With the embedded provider only such a pair fits
    together, because its CA ends with this command, unless ca.embedded.directory keeps it.
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

    From those of server and guest up to the trust anchors. Issues a pair for a build that does not exist,
    and revokes it where the provider can.
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
    help="Holds the passphrase of encrypted keys.",
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
    """Look into files with certificates.

    Certificates, private keys, certificate signing requests and revocation lists, in PEM, DER, PKCS#7 or
    PKCS#12; - reads standard input. Says what each is, and whether they fit together: key and certificate,
    chain and trust anchor, dates, use. Nothing of a private key is shown.

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
    help="Revoke also what none of the provider's present CAs signed, after they were renewed.",
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

    Each FILE holds a certificate that the configured provider issued, as `firebuild ca issue` writes them;
    what comes after the first certificate is its chain. Its key is not needed. All files are read before
    anything is revoked, and each is tried.

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
    help="What to repeat: what a build does (open, both certificates, close), or one certificate.",
)
@click.option("--count", type=click.IntRange(1, 1_000_000), default=100, show_default=True, help="How often.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Threads in each process.",
)
@click.option(
    "--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes side by side."
)
@click.option("--duration", metavar="DURATION", help="Begin nothing more after this time.")
@config_option
@provider_option
@json_option
@click.pass_context
def bench(
    context: click.Context, /, config_file: Path | None, provider: str | None, as_json: bool, **plan: Any
) -> None:
    """Measure how fast the CA issues.

    It really issues certificates, for builds that do not exist, and says before what that leaves behind.
    Prints certificates a second, p50, p99 and max of the time that each took, errors by what they say,
    requests and bytes. Ctrl-C ends it, and prints what it has.

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

    Each with where it comes from and what it can do, or with what is wrong with it.
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
@click.option("--mount", metavar="PATH", help="Where the PKI engine is to be mounted.")
@click.option(
    "--auth",
    type=click.Choice(_VAULT_LOGINS),
    help="How builds log in; by default as the configuration says, or with AppRole.",
)
@config_option
def vault_setup(print_it: bool, config_file: Path | None, **options: str | None) -> None:
    """Print what prepares Vault or OpenBao.

    The script makes the mount, the roles, a policy and the auth method for the configuration and the options.
    firebuild never runs it, because that needs rights that no build should have. Read it, and have an
    operator run it.

    Without a configuration it is for AppRole, the mount pki, and the address in VAULT_ADDR or BAO_ADDR. It
    ends with the settings for firebuild that belong to it.
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
    """Begin a plugin of your own."""


@plugin.command()
@click.argument("name")
@click.option(
    "--dir",
    "directory",
    type=FilePath(path_type=Path, file_okay=False),
    default=Path(),
    show_default="the current directory",
    help="Where to put the new project.",
)
def new(name: str, directory: Path) -> None:
    """Write the project of a new CA provider that works, with its tests.

    NAME is what people will write in their configuration: ca.provider: NAME.
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
