"""The preflight of the provider: one note for each thing looked at, nothing issued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from firebuild_pki.addresses import proxy_for
from firebuild_pki.chain import describe
from firebuild_pki.http import HTTPFailure
from firebuild_pki.provider import Clock, Note, NoteLevel, Profile, ProviderContext
from firebuild_pki.providers.vault.mount import FLAGS, Mount, data_of
from firebuild_pki.providers.vault.nodes import Budget
from firebuild_pki.providers.vault.session import Session
from firebuild_pki.providers.vault.settings import VaultSettings
from firebuild_pki.providers.vault.transport import Answer, Request
from firebuild_pki.settings import write_duration

USES = 2
"""Requests with the token that are still to come after a check: the certificates of both ends."""

SKEW = timedelta(seconds=30)
"""Difference between the clocks that deserves no word."""

SOON = timedelta(days=7)
"""Time before the end of a CA in which its renewal is due."""

_STATES = {
    200: (NoteLevel.OK, "unsealed, active"),
    429: (NoteLevel.OK, "unsealed, standby"),
    472: (NoteLevel.WARNING, "a secondary for disaster recovery, which signs nothing"),
    473: (NoteLevel.OK, "unsealed, performance standby"),
    501: (NoteLevel.FATAL, "not initialised"),
    503: (NoteLevel.FATAL, "sealed"),
}


def role_notes(
    role: str, data: Mapping[str, Any], profiles: Sequence[Profile], context: ProviderContext, where: str
) -> list[Note]:
    """Say what the settings of a role mean for the certificates that it is to sign.

    Args:
        role: its name.
        data: its settings, as the server shows them.
        profiles: which ends it signs for.
        context: the domain that the names of builds are below, and what lifetime they ask for.
        where: the setting that names the role.

    Returns:
        What will go wrong; one note at level OK if nothing will.
    """
    problems = [
        Note(f"role {role}: {message}", where, hint, level, "role")
        for level, message, hint in (
            *(diagnostic for check in (_extended_usage, _usage) for diagnostic in check(data, profiles)),
            *_names(data, profiles, context.name_suffix),
            *_keys(data),
            *_validity(data, context.lifetime),
        )
    ]
    return problems or [Note(f"role {role}: {_summary(data)}", "", None, NoteLevel.OK, "role")]


Diagnostic = tuple[NoteLevel, str, str]


_AS_FLAG = {
    "serverauth": "server_flag",
    "1.3.6.1.5.5.7.3.1": "server_flag",
    "clientauth": "client_flag",
    "1.3.6.1.5.5.7.3.2": "client_flag",
}
"""Extended key usages, by name and number, that a role may list instead of setting the flag."""


def _extended_usage(data: Mapping[str, Any], profiles: Sequence[Profile]) -> Iterator[Diagnostic]:
    ends = " and the ".join(profiles)
    needed = dict.fromkeys(flag for profile in profiles for flag in FLAGS[profile])
    given = [str(one) for key in ("ext_key_usage", "ext_key_usage_oids") for one in data.get(key) or ()]
    meant = {_AS_FLAG.get(one.strip().lower()) for one in given}
    missing = [flag for flag in needed if not data.get(flag) and flag not in meant]
    others = [one for one in given if one.strip().lower() not in _AS_FLAG]
    others += [name for name in ("code_signing_flag", "email_protection_flag") if data.get(name)]
    if missing:
        message = f"it lacks {' and '.join(missing)}, which the certificate of the {ends} needs"
        yield NoteLevel.FATAL, message, "set " + " ".join(f"{flag}=true" for flag in missing)
    if others:
        message = f"it adds the extended key usage {', '.join(others)}, which will be refused"
        yield NoteLevel.FATAL, message, "leave server_flag and client_flag as the only extended key usages"


def _usage(data: Mapping[str, Any], _: Sequence[Profile]) -> Iterator[Diagnostic]:
    usage = {str(one).lower() for one in data.get("key_usage") or ()}
    if usage and "digitalsignature" not in usage:
        yield NoteLevel.FATAL, "its key_usage lacks DigitalSignature", "set key_usage=DigitalSignature"
    elif usage != {"digitalsignature"}:
        message = "its key_usage is not just DigitalSignature, all that TLS needs with an EC key"
        yield NoteLevel.WARNING, message, "set key_usage=DigitalSignature"


def _names(data: Mapping[str, Any], profiles: Sequence[Profile], suffix: str) -> Iterator[Diagnostic]:
    if data.get("allow_any_name"):
        message = "it allows any name"
        yield NoteLevel.WARNING, message, "set allow_any_name=false and allowed_domains to ca.name_suffix"
    elif [*profiles] == [Profile.PEER]:
        if not data.get("allowed_domains") and not data.get("allowed_uri_sans"):
            hint = "set allowed_uri_sans, allowed_domains, or both"
            yield NoteLevel.FATAL, "it allows neither a domain nor a URI", hint
    elif not data.get("allowed_domains"):
        message = "it allows no domain"
        yield NoteLevel.FATAL, message, "set allowed_domains to ca.name_suffix, and allow_subdomains=true"
    elif not data.get("allow_subdomains") and not data.get("allow_glob_domains"):
        hint = "set allow_subdomains=true"
        yield NoteLevel.FATAL, "it does not allow subdomains, which all names of builds are", hint
    elif suffix and not data.get("allowed_domains_template") and not _covers(data, suffix):
        domains = ", ".join(map(str, data.get("allowed_domains") or ()))
        message = f"it allows {domains}, but the names of builds are below {suffix}"
        hint = f"set allowed_domains={suffix}, or ca.name_suffix to a domain of the role"
        yield NoteLevel.FATAL, message, hint
    if data.get("require_cn"):
        message = "it requires a common name, which names above 64 characters, and URIs, do not have"
        yield NoteLevel.WARNING, message, "set require_cn=false"


def _covers(data: Mapping[str, Any], suffix: str) -> bool:
    """Tell whether names below `suffix` are names below an allowed domain, or may fit an allowed pattern."""
    for domain in map(str, data.get("allowed_domains") or ()):  # the server minds its case
        if data.get("allow_glob_domains") and "*" in domain:
            return True  # whether the pattern fits shows when something is signed
        if data.get("allow_subdomains") and f".{suffix}".endswith(f".{domain}"):
            return True
    return False


def _keys(data: Mapping[str, Any]) -> Iterator[Diagnostic]:
    kind = data.get("key_type")
    if kind not in {None, "any", "ec", "rsa"}:
        message = f"it requires keys of type {kind}, which gRPC cannot use"
        yield NoteLevel.FATAL, message, "set key_type=ec and key_bits=256, or key_type=any"
    elif kind == "rsa":
        hint = "set ca.key_type to rsa2048 or above, or key_type=any on the role"
        yield NoteLevel.WARNING, f"it requires rsa keys of {data.get('key_bits')} bits at least", hint


def _validity(data: Mapping[str, Any], wanted: timedelta) -> Iterator[Diagnostic]:
    if data.get("not_after"):
        hint = "clear not_after, and set max_ttl"
        yield NoteLevel.FATAL, "it has a fixed not_after, so it refuses to be asked for a lifetime", hint
    longest = seconds(data.get("max_ttl"))
    if longest and longest < wanted:
        hint = "raise max_ttl, or shorten bootstrap.build_timeout"
        message = f"its certificates live for {write_duration(longest)} at most, a build asks for "
        message += write_duration(wanted)
        yield NoteLevel.WARNING, message, hint


def _summary(data: Mapping[str, Any]) -> str:
    longest = seconds(data.get("max_ttl"))
    life = f"for up to {write_duration(longest)}" if longest else "for as long as the mount allows"
    domains = ", ".join(map(str, data.get("allowed_domains") or ()))
    uris = ", ".join(map(str, data.get("allowed_uri_sans") or ()))
    names = [f"names below {domains}"] if domains else []
    return f"signs {' and '.join([*names, *([uris] if uris else [])])} {life}"


def seconds(value: object) -> timedelta:
    """Read a lifetime: a number of seconds; zero for anything else."""
    return timedelta(seconds=value) if isinstance(value, int | float) else timedelta(0)


def check(
    settings: VaultSettings, session: Session, mount: Mount, context: ProviderContext
) -> Sequence[Note]:
    """Look at nodes, credentials, roles, CA and clock.

    Raises:
        CAError: no node answers, or the CA certificate cannot be read.
    """
    budget = session.budget()
    nodes = tuple(_nodes(settings, session, context, budget))
    credentials, valid = _credentials(session, budget)
    return (
        *nodes,
        credentials,
        *_roles(settings, mount, context, budget, valid=valid),
        *_authorities(settings, mount, context.clock),
    )


def _nodes(
    settings: VaultSettings, session: Session, context: ProviderContext, budget: Budget
) -> Iterator[Note]:
    notes: list[Note] = []
    clock = context.clock
    for address in settings.address:
        # in namespaces this path is not available
        before = clock()
        try:
            answer = session.transport.send(address, Request("GET", "sys/health"), budget.request_timeout)
        except HTTPFailure as failure:
            notes.append(_state(failure.message, NoteLevel.FATAL, failure.hint))
            continue
        notes.append(_health(answer, proxy_for(address, context.environ)))
        yield from _skew(answer, before + (clock() - before) / 2)
    any_good = any(not note.fatal for note in notes)
    for note in notes:
        level = NoteLevel.WARNING if note.fatal and any_good else note.level
        yield _state(note.message, level, note.hint)


def _health(answer: Answer, proxy: str | None) -> Note:
    level, state = _STATES.get(answer.status, (NoteLevel.FATAL, f"in an unknown state ({answer.status})"))
    version = answer.content.get("version", "unknown")
    through = ", through the proxy in HTTPS_PROXY" if proxy else ""
    return _state(f"{answer.address}: version {version}, {state}{through}", level)


def _state(message: str, level: NoteLevel, hint: str | None = None) -> Note:
    return Note(message, "" if level is NoteLevel.OK else "address", hint, level, "reachable")


def _skew(answer: Answer, now: datetime) -> Iterator[Note]:
    if answer.date is None:
        return
    ahead = answer.date - now
    # the header has whole seconds, cut off
    ahead += timedelta(seconds=0.5)
    size = abs(ahead)
    direction = "ahead of" if ahead > timedelta(0) else "behind"
    message = f"{answer.address}: {size.total_seconds():.0f} s {direction} this machine"
    if size < SKEW:
        yield Note(message, "", None, NoteLevel.OK, "clock")
    else:
        hint = "set the clocks; certificates of a CA that is ahead are not valid yet"
        yield Note(message, "", hint, NoteLevel.WARNING, "clock")


_NOT_ALLOWED = "it is valid, but its policies do not allow that"


def _credentials(session: Session, budget: Budget) -> tuple[Note, bool]:
    """Look at the token; tell besides whether it is known to be valid."""
    answer = session.call("GET", "auth/token/lookup-self", budget)
    data = data_of(answer)
    if not data:
        why, remedy, alive = session.words_of(answer), "", False
        if answer.status == 403:  # the policy "default" allows it, and so does the one of vault-setup
            alive = session.is_alive(budget)
            why, remedy = (_NOT_ALLOWED, "") if alive else session.why_invalid()
            remedy += "" if alive else "; if signing works all the same, "
        hint = f'{remedy}allow it with: path "auth/token/lookup-self" {{ capabilities = ["read"] }}'
        message = f"the token cannot be looked at: {why}"
        return Note(message, "auth", hint, NoteLevel.WARNING, "credentials"), alive
    session.learn_uses(data)
    left, policies = seconds(data.get("ttl")), list(map(str, data.get("policies") or ()))
    life = f"valid for {write_duration(left)}" if left else "without an end"
    message = f"token of {data.get('display_name')}, {life}, policies {', '.join(policies)}"
    if session.uses_left is not None and session.uses_left < USES:
        hint = f"make one that is good for {USES} more requests at least, or without num_uses"
        text = f"{message}: good for {session.uses_left} more requests (num_uses)"
        return Note(text, "auth", hint, NoteLevel.WARNING, "credentials"), True
    if "root" in policies:
        hint = "use a token with the policy that `firebuild ca vault-setup --print` writes"
        text = f"{message}: it may do anything"
        return Note(text, "auth", hint, NoteLevel.WARNING, "credentials"), True
    return Note(message, "", None, NoteLevel.OK, "credentials"), True


def _roles(
    settings: VaultSettings, mount: Mount, context: ProviderContext, budget: Budget, *, valid: bool
) -> Iterator[Note]:
    for name in settings.roles:
        profiles = [profile for profile in settings.profiles if settings.role_for(profile) == name]
        where = "role" if name == settings.role else f"{profiles[0]}_role"
        answer = mount.role(name, budget)
        path = f"{settings.mount}/roles/{name}"
        if answer.status == 404:
            message, hint = f"there is no role {name} in {settings.mount}", f"bao list {settings.mount}/roles"
            yield Note(message, where, hint, NoteLevel.FATAL, "role")
        elif answer.status != 200:
            message = f"role {name}: cannot be looked at"
            unless = "" if valid else "if the token is right, "
            hint = f'{unless}allow it with: path "{path}" {{ capabilities = ["read"] }}'
            yield Note(message, where, hint, NoteLevel.WARNING, "role")
        else:
            yield from role_notes(name, answer.data, profiles, context, where)


def _authorities(settings: VaultSettings, mount: Mount, clock: Clock) -> Iterator[Note]:
    now = clock()
    for chain in mount.chains():
        end = min(one.not_valid_after_utc for one in chain.certificates)
        lowest = chain.certificates[0]
        message = f"{describe(lowest)} and what is above it: valid until {end:%Y-%m-%d %H:%M:%SZ}"
        if end < now:
            yield Note(message, "", "renew the CA", NoteLevel.FATAL, "ca")
        elif end < now + SOON:
            yield Note(message, "", "renew the CA soon", NoteLevel.WARNING, "ca")
        else:
            yield Note(message, "", None, NoteLevel.OK, "ca")
        if chain.root is None and settings.trust is None:
            message = f"the mount does not know the root: {describe(chain.anchor)} is trusted instead"
            hint = "import the root's certificate into the mount, or set trust to a file with it"
            yield Note(message, "trust", hint, NoteLevel.WARNING, "ca")
