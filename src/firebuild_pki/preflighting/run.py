"""The preflight itself: what a build does with its authority, without the build."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import cast

from cryptography import x509
from pydantic import BaseModel

from firebuild_pki.authority import Authority, open_authority
from firebuild_pki.chain import describe, extension_of, parse_certificates
from firebuild_pki.config import CASettings
from firebuild_pki.errors import CAError, MaterialError, SettingsError
from firebuild_pki.guarded import check_settings
from firebuild_pki.issuing import lifetime_for
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.material import TLSMaterial
from firebuild_pki.names import Identity
from firebuild_pki.pem_files import Source, open_to
from firebuild_pki.preflighting.report import (
    PreflightReport,
    PreflightRow,
    RowLevel,
    Steps,
    ok,
    row_of,
    skipped,
    warning,
)
from firebuild_pki.provider import Capability, Clock, Profile, SignRequest, utc_now
from firebuild_pki.settings import SecretRef
from firebuild_pki.values import dataclass
from firebuild_pki.x509 import Validity, make_csr, make_leaf, make_root, to_pem

HANDSHAKE_TIMEOUT = timedelta(seconds=10)

FOREIGN = "another-build.invalid"
"""A domain that no build has (RFC 6761 section 6.4)."""

Rows = Iterable[PreflightRow]

_LATER = (
    "open",
    "backend",
    "issue server",
    "issue guest",
    "verification",
    "handshake",
    "refusal",
    "revocation",
)


def rogue_peer(guest: TLSMaterial, clock: Clock) -> TLSMaterial:
    """Make a guest that trusts the same CA and has the same name, certified by a CA of its own."""
    validity = Validity.starting(clock(), timedelta(hours=1), backdate=timedelta(minutes=5))
    root = make_root(generate_key(), validity, with_intermediate=False)
    key = generate_key()
    leaf = make_leaf(key.public_key(), root, validity, profile=Profile.GUEST, dns_names=(guest.identity,))
    return replace(guest, certificate_chain_pem=to_pem([leaf]), private_key_pem=private_key_pem(key))


def preflight(
    settings: CASettings,
    *,
    build_time: timedelta,
    ttl: timedelta | None = None,
    clock: Clock = utc_now,
    environ: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
    on_row: Callable[[PreflightRow], None] = lambda _: None,
) -> PreflightReport:
    """Try all that a build needs of its authority, and revoke the certificates made for that.

    The authority is opened once, for a build id that starts with ``preflight-``. Every call of the
    provider is bounded by ``ca.call_timeout``.

    Args:
        settings: the section ``ca``.
        build_time: how long the longest build takes; the certificates have to be valid that long.
        ttl: lifetime to ask for; by default what `Authority.issue_server` chooses.
        clock: the current time. The handshakes go by the clock of the machine.
        environ: where secret references look, by default the environment of this process.
        check: called again and again; what it raises ends the preflight.
        on_row: told about each row as soon as it is there.

    Returns:
        The report. What is wrong with the authority is in it, and raises nothing.
    """
    surroundings = os.environ if environ is None else environ
    wanted = _Wanted(settings, build_time, ttl, clock, surroundings)
    return _Preflight(wanted, check, Steps(check, on_row)).run()


def refused(error: CAError, *, on_row: Callable[[PreflightRow], None] = lambda _: None) -> PreflightReport:
    """Report settings that could not even be loaded.

    Args:
        error: why not: a `SettingsError`, or an error of loading the selected plugin.
        on_row: as for `preflight`.
    """
    steps = Steps(lambda: None, on_row)

    def fail() -> list[PreflightRow]:
        raise error

    failed = "settings" if isinstance(error, SettingsError) else "plugin"
    steps.take(failed, fail)
    later = _LATER if failed == "settings" else ("settings", *_LATER)
    for about in later:
        steps.take(about, list, needs=(failed,))
    return PreflightReport(error.provider or "", "", steps.verdict, tuple(steps.rows), steps.seconds)


@dataclass(frozen=True)
class _Wanted:
    settings: CASettings
    build_time: timedelta
    ttl: timedelta | None
    clock: Clock
    environ: Mapping[str, str]


class _Preflight:
    def __init__(self, wanted: _Wanted, check: Callable[[], None], steps: Steps) -> None:
        self._settings, self._wanted, self._check, self._steps = wanted.settings, wanted, check, steps
        self._build_id = f"preflight-{secrets.token_hex(4)}"
        self._told: set[str] = set()
        self._failed_observers: list[str] = []
        self._issued: dict[str, TLSMaterial] = {}
        self._authority: Authority | None = None

    def run(self) -> PreflightReport:
        take = self._steps.take
        take("plugin", self._plugin)
        take("settings", self._look_at_settings)
        take("open", self._open, needs=("settings",))
        try:
            self._use()
        finally:
            self._close()
        steps = self._steps
        return PreflightReport(
            self._settings.provider, self._build_id, steps.verdict, tuple(steps.rows), steps.seconds
        )

    def _use(self) -> None:
        take = self._steps.take
        take("backend", self._examine, needs=("open",))
        take("issue server", lambda: self._issue("server", self._opened.issue_server), needs=("backend",))
        take("issue guest", lambda: self._issue("guest", self._opened.issue_guest), needs=("backend",))
        both = ("issue server", "issue guest")
        take("verification", self._verify, needs=both)
        take("handshake", self._shake_hands, needs=both)
        take("refusal", self._refuse, needs=("handshake",))
        if self._settings.observers:
            take("observers", self._observers, needs=("open",))
        take("revocation", self._revoke, needs=("open",))

    def _close(self) -> None:
        if self._authority is not None:
            self._authority.close()
            for text in self._news():
                self._steps.add("close", warning("close", text))

    # --- the steps ------------------------------------------------------------------------------

    def _plugin(self) -> Rows:
        name, spec = self._settings.provider, self._settings.spec
        origin = next(one for one in self._settings.catalog.providers() if one.name == name)
        yield ok("plugin", f"{name} of {origin}: {spec.summary}")

    def _look_at_settings(self) -> Rows:
        Identity(self._build_id, self._settings.name_suffix)  # raises if the suffix is not a domain
        notes = check_settings(self._settings, self._wanted.environ)
        problems = [self._settings.problem(note) for note in notes]
        remarks = [warning("settings", str(replace(one, hint=None)), one.hint) for one in problems]
        remarks += _open_secrets(self._settings.provider_settings, f"ca.{self._settings.provider}")
        return remarks or [ok("settings", "nothing to remark")]

    def _open(self) -> Rows:
        now = self._wanted.clock()
        lifetime, _ = lifetime_for(now, self._wanted.ttl, now + self._wanted.build_time)
        self._authority = authority = open_authority(
            self._settings,
            build_id=self._build_id,
            clock=self._wanted.clock,
            environ=self._wanted.environ,
            check=self._check,
            patient=False,  # a preflight can simply be repeated
            lifetime=lifetime,
        )
        self._news()  # the notes about the settings have had their rows
        for anchor in parse_certificates(authority.trust_pem, "trust anchors"):
            yield ok("open", f"trust anchor {describe(anchor)} until {_at(anchor.not_valid_after_utc)}")

    def _examine(self) -> Rows:
        notes = self._opened.examine()
        return [row_of("backend", note) for note in notes] or [ok("backend", "nothing to remark")]

    def _issue(self, end: str, issue: Callable[..., TLSMaterial]) -> Rows:
        deadline = self._wanted.clock() + self._wanted.build_time
        material = self._issued[end] = issue(ttl=self._wanted.ttl, build_deadline=deadline)
        yield ok(
            f"issue {end}",
            f"{material.identity} until {_at(material.not_after)}, needed until {_at(deadline)}",
        )
        for text in self._news():
            yield warning(f"issue {end}", text)
        for remark in self._opened.remarks:
            if remark not in self._told:
                self._told.add(remark)
                yield ok(f"issue {end}", remark)

    def _verify(self) -> Rows:
        # nothing is issued that failed a check
        yield ok("verification", "key, name, usage, validity, chain and path of both are right")

    def _shake_hands(self) -> Rows:
        from firebuild_pki.grpc_handshake import handshake

        seen = handshake(self._issued["server"], self._issued["guest"], timeout=HANDSHAKE_TIMEOUT)
        yield ok("handshake", f"{seen.tls_version} over gRPC; each end saw the other's name")
        signatures = " and ".join(dict.fromkeys(seen.signatures))
        yield ok("algorithms", f"key exchange {seen.group}; certificates signed with {signatures}")

    def _refuse(self) -> Rows:
        server, guest = self._issued["server"], self._issued["guest"]
        rogue = rogue_peer(guest, self._wanted.clock)
        yield _refusal("a guest without a certificate", server, guest, anonymous=True)
        yield _refusal("a guest of the same name with a certificate of another CA", server, rogue)
        if Capability.SIGN in self._opened.capabilities:  # ready pairs may be for both roles
            yield _refusal("a server with the guest's certificate", guest, guest)
        yield from self._refuse_foreign(server, guest)

    def _refuse_foreign(self, server: TLSMaterial, guest: TLSMaterial) -> Rows:
        """Show that a CA of this build alone cannot vouch for others: it signs, and the peer refuses."""
        if not _only_for(server):
            return
        name, key = f"guest.{FOREIGN}", generate_key()
        ttl = guest.not_after - self._wanted.clock()
        request = SignRequest(make_csr(key, [name]), Profile.GUEST, (name,), ttl, self._build_id)
        answer = self._opened.signed_unchecked(request)
        foreign = replace(
            guest,
            certificate_chain_pem=answer.certificate_pem + answer.chain_pem,
            private_key_pem=private_key_pem(key),
            identity=name,
        )
        who = f"a guest that this CA certified as {name}, outside of its build,"
        yield _refusal(who, server, foreign, with_reason=True)

    def _observers(self) -> Rows:
        if not self._failed_observers:
            yield ok("observers", f"told of all this: {', '.join(self._settings.observers)}")
        for failure in self._failed_observers:
            yield warning("observers", failure)

    def _revoke(self) -> Rows:
        if not self._issued:
            return [skipped("revocation", "nothing was issued")]
        if Capability.REVOKE not in self._opened.capabilities:
            return [
                skipped("revocation", "this provider cannot revoke; the certificates expire by themselves")
            ]
        return [self._revoked(end, material) for end, material in self._issued.items()]

    def _revoked(self, end: str, material: TLSMaterial) -> PreflightRow:
        try:
            self._opened.revoke(material)
        except CAError as error:
            which, why = f"the {end} certificate", error.message
            if self._settings.revoke_at_end:
                return warning("revocation", f"{which} was not revoked: {why}", error.hint)
            return skipped("revocation", f"{which} stays valid until {_at(material.not_after)}: {why}")
        return ok("revocation", f"the {end} certificate is revoked")

    # --- helpers --------------------------------------------------------------------------------

    @property
    def _opened(self) -> Authority:
        return cast(Authority, self._authority)  # every step that asks needs the step "open"

    def _news(self) -> list[str]:
        """Take the warnings that have come up since the last time; those of observers aside."""
        new = [text for text in self._opened.warnings if text not in self._told]
        self._told.update(new)
        self._failed_observers += [text for text in new if text.startswith("the observer ")]
        return [text for text in new if not text.startswith("the observer ")]


def _refusal(
    who: str,
    server: TLSMaterial,
    guest: TLSMaterial,
    *,
    anonymous: bool = False,
    with_reason: bool = False,
) -> PreflightRow:
    from firebuild_pki.grpc_handshake import handshake

    try:
        handshake(server, guest, timeout=HANDSHAKE_TIMEOUT, anonymous=anonymous)
    except MaterialError as error:
        return ok("refusal", f"{who} is refused" + (f": {_reason(error)}" if with_reason else ""))
    return PreflightRow("refusal", RowLevel.FATAL, f"{who} was let in")


def _reason(error: MaterialError) -> str:
    return error.message.rpartition(" refuses the ")[2].partition(": ")[2] or error.message


def _only_for(server: TLSMaterial) -> bool:
    """Tell whether each anchor permits the names of this one build and no others."""
    own = [x509.DNSName(server.server_name)]
    constraints = [
        extension_of(anchor, x509.NameConstraints)
        for anchor in parse_certificates(server.trust_pem, "trust anchors")
    ]
    return all(
        one is not None
        and [base for base in one.permitted_subtrees or () if type(base) is x509.DNSName] == own
        for one in constraints
    )


def _at(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")


def _open_secrets(block: object, path: str) -> Iterator[PreflightRow]:
    """Say which files with secrets others can read; that of a private key is an error where it is read."""
    for name in type(block).model_fields if isinstance(block, BaseModel) else ():
        value, where = getattr(block, name, None), f"{path}.{name}"  # a plugin may leave one unset
        if not isinstance(value, SecretRef):
            yield from _open_secrets(value, where)
            continue
        file = None if value.file is None else Source("", value.file)
        with suppress(OSError):  # whoever needs it says so
            if file is not None and (status := os.stat(file.real_path)):
                whom = open_to(stat.S_IMODE(status.st_mode), status.st_uid, os.geteuid())
                if whom is not None:
                    text = f"{where}: the secret in {file.real_path} can be read {whom}"
                    yield warning("settings", text, f"chmod 600 {file.quoted}")
