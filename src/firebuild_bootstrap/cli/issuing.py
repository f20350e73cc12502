"""`firebuild ca issue` and `revoke`: certificates in files; what is issued is written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from firebuild_bootstrap.cli.ca_display import read_named, report_wait
from firebuild_bootstrap.cli.options import read_duration
from firebuild_bootstrap.cli.screen import beside_head
from firebuild_bootstrap.errors import InputError
from firebuild_pki import (
    Authority,
    CAError,
    Capability,
    CASettings,
    IdentityError,
    TLSMaterial,
    UnsupportedOperation,
    open_authority,
)
from firebuild_pki.display import one_line
from firebuild_pki.preflighting import CertificateFacts, certificates_of
from firebuild_pki.values import dataclass

_PRIVATE = 0o600
_PUBLIC = 0o644


@dataclass(frozen=True, slots=True)
class PemFile:
    """A file to write, with its permissions."""

    name: str
    content: bytes = field(repr=False)
    mode: int


def refuse_existing(directory: Path, names: Iterable[str]) -> None:
    """Raise `InputError` if a file of these names exists."""
    found = [name for name in names if os.path.lexists(directory / name)]
    if found:
        verb = "exists" if len(found) == 1 else "exist"
        hint = "--force replaces; or choose another --out"
        raise InputError(f"{directory}: {', '.join(found)} {verb} already", hint=hint)


def write_files(directory: Path, files: Sequence[PemFile], *, replace: bool) -> None:
    """Write all files, or none.

    The directory is made with mode 0700 if it is missing. Each file gets its name only when all of
    them are complete on the disk.

    Args:
        directory: where to.
        files: what to write.
        replace: whether to replace files that exist.

    Raises:
        InputError: a file exists, or the directory cannot be written.
    """
    try:
        with _directory(directory), ExitStack() as staged:
            drafts = [(staged.enter_context(_draft(directory, one)), directory / one.name) for one in files]
            _publish(drafts, replace=replace)
    except FileExistsError as error:
        raise InputError(f"{error.filename2} exists already", hint="--force replaces") from error
    except OSError as error:
        raise InputError(f"{error.filename or directory} can't be written: {error.strerror}") from error


@contextmanager
def _directory(directory: Path) -> Iterator[None]:
    made = not directory.is_dir()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"expected a directory, but {error.filename} is not one") from error
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                directory.rmdir()
        raise


@contextmanager
def _draft(directory: Path, file: PemFile) -> Iterator[Path]:
    path = directory / f".{file.name}.{secrets.token_hex(4)}"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode), "wb") as stream:
            os.fchmod(stream.fileno(), file.mode)
            stream.write(file.content)
            stream.flush()
            os.fsync(stream.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _publish(drafts: Sequence[tuple[Path, Path]], *, replace: bool) -> None:
    published: list[Path] = []
    try:
        for draft, path in drafts:
            if replace:
                os.replace(draft, path)
            else:
                os.link(draft, path)  # unlike a rename, fails if the file was made meanwhile
                published.append(path)
    except BaseException:
        for path in published:
            path.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class IssueRequest:
    """What the options ask for.

    Args:
        ends: server, guest or both.
        build_id: the build whose ends they are.
        suffix: domain below which the names are; None for the configured one.
        directory: where to write.
        ttl: wanted lifetime.
        force: whether to replace files that exist.
    """

    ends: tuple[str, ...]
    build_id: str
    suffix: str | None
    directory: Path
    ttl: timedelta
    force: bool

    @classmethod
    def parse(
        cls, server: str | None, guest: str | None, directory: Path, ttl: str, force: bool
    ) -> IssueRequest:
        """Read the options.

        Raises:
            InputError: they do not fit together.
        """
        named = {"--server": server, "--guest": guest}
        names = {option: _split(option, name) for option, name in named.items() if name is not None}
        if not names:
            raise InputError("expected --server NAME, --guest ID or both")
        ids = {build_id for build_id, _ in names.values()}
        suffixes = {suffix for _, suffix in names.values() if suffix}
        if len(ids) > 1 or len(suffixes) > 1:
            found = " and ".join(f"{option} {one_line(name or '', 100)}" for option, name in named.items())
            raise InputError(
                f"expected both ends of one build, found {found}",
                hint="call the command once for each build",
            )
        ends = tuple(option.removeprefix("--") for option in names)
        return cls(ends, ids.pop(), next(iter(suffixes), None), directory, read_duration(ttl, "--ttl"), force)

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings that this needs: its suffix, and certificates that outlive the command."""
        suffix = {"ca.name_suffix": self.suffix} if self.suffix else {}
        return {**suffix, "ca.revoke_at_end": False}

    @property
    def file_names(self) -> list[str]:
        """Names of the files to write."""
        return [name for end in self.ends for name in (f"{end}.pem", f"{end}-key.pem")] + ["ca.pem"]


@dataclass(frozen=True)
class IssuedFiles:
    """What was issued, and where it is."""

    provider: str
    issuer_fingerprint: str
    directory: Path
    materials: dict[str, TLSMaterial] = field(repr=False)
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {
            "provider": self.provider,
            "issuer_fingerprint_sha256": self.issuer_fingerprint,
            "trust": str(self.directory / "ca.pem"),
            **{end: self._end(end, material) for end, material in self.materials.items()},
            "warnings": list(self.warnings),
        }

    def _end(self, end: str, material: TLSMaterial) -> dict[str, Any]:
        return {
            "name": material.identity,
            "not_before": material.not_before.isoformat(),
            "not_after": material.not_after.isoformat(),
            "fingerprint_sha256": material.fingerprint_sha256,
            "certificate": str(self.directory / f"{end}.pem"),
            "private_key": str(self.directory / f"{end}-key.pem"),
        }


def issue_files(request: IssueRequest, settings: CASettings, check: Callable[[], None]) -> IssuedFiles:
    """Issue what was asked for and write it; nothing is issued if files are in the way.

    Raises:
        InputError: files exist, or cannot be written there.
        firebuild_pki.CAError: nothing usable was issued.
    """
    if not request.force:
        refuse_existing(request.directory, request.file_names)
    with _opened(request, settings, check) as authority:
        materials = {end: _issue(authority, end, request.ttl) for end in request.ends}
        write_files(request.directory, _files(materials), replace=request.force)
        issuer = authority.issuer_fingerprint
    return IssuedFiles(settings.provider, issuer, request.directory, materials, authority.warnings)


def print_issued(issued: IssuedFiles) -> None:
    """Say what was written; keys only by the names of their files."""
    for warning in issued.warnings:
        click.echo(f"warning: {one_line(warning)}", err=True)
    for end, material in issued.materials.items():
        where = [issued.directory / f"{end}.pem", issued.directory / f"{end}-key.pem"]
        facts = [
            material.identity,
            f"valid {material.not_before:%Y-%m-%d %H:%M:%SZ} to {material.not_after:%Y-%m-%d %H:%M:%SZ}",
            f"sha256 {material.fingerprint_sha256}",
            *map(str, where),
        ]
        _print_block(end, facts)
    _print_block("trust", [f"issuer sha256 {issued.issuer_fingerprint}", str(issued.directory / "ca.pem")])


@dataclass(frozen=True)
class Revoked:
    """A certificate that was to be revoked.

    Args:
        file: the file with it.
        certificate: what it is.
        problem: why it was not revoked; None if it was.
        hint: what to do about that.
    """

    file: str
    certificate: CertificateFacts
    problem: str | None = None
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {
            "file": self.file,
            "names": list(self.certificate.names),
            "serial": self.certificate.serial,
            "fingerprint_sha256": self.certificate.fingerprint_sha256,
            "not_after": self.certificate.not_after.isoformat(),
            "revoked": self.problem is None,
            "problem": self.problem,
            "hint": self.hint,
        }


def revoke_files(
    files: Sequence[Path], settings: CASettings, check: Callable[[], None], *, issuer_gone: bool
) -> list[Revoked]:
    """Revoke the first certificate of each file.

    Raises:
        InputError: a file cannot be read; nothing is revoked then.
        firebuild_pki.CAError: the provider cannot be opened, or cannot revoke.
    """
    try:
        contents = {str(path): read_named(path) for path in files}
        facts = {name: certificates_of(content)[0] for name, content in contents.items()}
    except CAError as error:
        raise InputError(error.message, hint=error.hint) from error
    build_id = f"revoke-{secrets.token_hex(4)}"
    with open_authority(settings, build_id=build_id, check=check, report=report_wait) as authority:
        if Capability.REVOKE not in authority.capabilities:
            until = max(one.not_after for one in facts.values())
            raise UnsupportedOperation(
                "it cannot revoke certificates",
                provider=settings.provider,
                hint=f"they end by themselves, the last one at {until:%Y-%m-%d %H:%M:%SZ}",
            )
        return [
            _revoke(authority, name, content.data, facts[name], issuer_gone)
            for name, content in contents.items()
        ]


def _revoke(
    authority: Authority, file: str, data: bytes, facts: CertificateFacts, issuer_gone: bool
) -> Revoked:
    try:
        authority.revoke_certificate(data, issuer_gone=issuer_gone)
    except CAError as error:
        return Revoked(file, facts, error.message, error.hint)
    return Revoked(file, facts)


def print_revoked(revoked: Sequence[Revoked]) -> None:
    """Say of each certificate what became of it; failures on standard error."""
    for one in revoked:
        name = next(iter(one.certificate.names), one.certificate.subject)
        what = f"{one.file}: {name}, serial number {one.certificate.serial}"
        if one.problem is None:
            click.echo(f"revoked {one_line(what)}")
            continue
        click.echo(f"error: {one_line(f'{what}: not revoked: {one.problem}', 2000)}", err=True)
        if one.hint:
            click.echo(f"  hint: {one_line(one.hint, 1000)}", err=True)


def _opened(request: IssueRequest, settings: CASettings, check: Callable[[], None]) -> Authority:
    try:
        return open_authority(settings, build_id=request.build_id, check=check, report=report_wait)
    except IdentityError as error:  # of a name that the options gave
        raise InputError(error.message, hint=error.hint) from error


def _print_block(head: str, facts: list[str]) -> None:
    lines = beside_head(head, 8, facts[0]) + [line for fact in facts[1:] for line in beside_head("", 8, fact)]
    click.echo("\n".join(line for line in lines if line))


def _issue(authority: Authority, end: str, ttl: timedelta) -> TLSMaterial:
    return authority.issue_server(ttl=ttl) if end == "server" else authority.issue_guest(ttl=ttl)


def _files(materials: dict[str, TLSMaterial]) -> list[PemFile]:
    files = []
    for end, material in materials.items():
        files.append(PemFile(f"{end}-key.pem", material.private_key_pem, _PRIVATE))
        files.append(PemFile(f"{end}.pem", material.certificate_chain_pem, _PUBLIC))
    trust = next(iter(materials.values())).trust_pem
    return [*files, PemFile("ca.pem", trust, _PUBLIC)]


def _split(option: str, name: str) -> tuple[str, str]:
    build_id, _, suffix = name.partition(".")
    if build_id == "guest" and suffix:
        raise InputError(
            f'expected the id of a build after {option}, found "{one_line(name, 100)}"',
            hint=f'"guest." is put before it: try {option} {one_line(suffix, 100)}',
        )
    return build_id, suffix
