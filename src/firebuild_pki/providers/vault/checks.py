"""The preflight of the provider: one note for each thing looked at, nothing issued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from firebuild_pki.chain import describe
from firebuild_pki.provider import Clock, Note, NoteLevel, Profile, ProviderContext
from firebuild_pki.providers.vault.faults import NodeFailed
from firebuild_pki.providers.vault.mount import Mount, data_of
from firebuild_pki.providers.vault.nodes import Budget
from firebuild_pki.providers.vault.roles import role_notes, seconds
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


def check(
    settings: VaultSettings, session: Session, mount: Mount, context: ProviderContext
) -> Sequence[Note]:
    """Look at nodes, credentials, roles, CA and clock.

    Raises:
        CAError: no node answers, or the CA certificate cannot be read.
    """
    budget = session.budget()
    return (
        *_nodes(settings, session, context.clock, budget),
        *_credentials(session, budget),
        *_roles(settings, mount, context.name_suffix, budget),
        *_authorities(settings, mount, context.clock),
    )


def _nodes(settings: VaultSettings, session: Session, clock: Clock, budget: Budget) -> Iterator[Note]:
    notes: list[Note] = []
    for address in settings.address:
        # in namespaces this path is not available
        before = clock()
        try:
            answer = session.transport.send(address, Request("GET", "sys/health"), budget.request_timeout)
        except NodeFailed as failed:
            notes.append(_state(str(failed.fault), NoteLevel.FATAL, failed.fault.hint))
            continue
        notes.append(_health(answer, session.transport.proxy_for(address)))
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


def _credentials(session: Session, budget: Budget) -> Iterator[Note]:
    answer = session.call("GET", "auth/token/lookup-self", budget)
    data = data_of(answer)
    if not data:
        hint = 'allow it with: path "auth/token/lookup-self" { capabilities = ["read"] }'
        message = f"the token cannot be looked at ({session.words_of(answer)})"
        yield Note(message, "auth", hint, NoteLevel.WARNING, "credentials")
        return
    session.learn_uses(data)
    left, policies = seconds(data.get("ttl")), list(map(str, data.get("policies") or ()))
    life = f"valid for {write_duration(left)}" if left else "without an end"
    message = f"token of {data.get('display_name')}, {life}, policies {', '.join(policies)}"
    if session.uses_left is not None and session.uses_left < USES:
        hint = f"make one that is good for {USES} more requests at least, or without num_uses"
        text = f"{message}: good for {session.uses_left} more requests (num_uses)"
        yield Note(text, "auth", hint, NoteLevel.WARNING, "credentials")
    elif "root" in policies:
        hint = "use a token with the policy that `firebuild ca vault-setup --print` writes"
        yield Note(f"{message}: it may do anything", "auth", hint, NoteLevel.WARNING, "credentials")
    else:
        yield Note(message, "", None, NoteLevel.OK, "credentials")


def _roles(settings: VaultSettings, mount: Mount, suffix: str, budget: Budget) -> Iterator[Note]:
    for name in settings.roles:
        profiles = [profile for profile in Profile if settings.role_for(profile) == name]
        where = "role" if name == settings.role else f"{profiles[0]}_role"
        answer = mount.role(name, budget)
        path = f"{settings.mount}/roles/{name}"
        if answer.status == 404:
            message, hint = f"there is no role {name} in {settings.mount}", f"bao list {settings.mount}/roles"
            yield Note(message, where, hint, NoteLevel.FATAL, "role")
        elif answer.status != 200:
            message = f"role {name}: cannot be looked at"
            hint = f'allow it with: path "{path}" {{ capabilities = ["read"] }}'
            yield Note(message, where, hint, NoteLevel.WARNING, "role")
        else:
            yield from role_notes(name, answer.data, profiles, suffix, where)


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
