"""What a check of the files has to tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

from firebuild_pki.provider import Note, NoteLevel, Profile
from firebuild_pki.providers.file.certificates import Found
from firebuild_pki.providers.file.keys import LoadedKey, kind_of_key
from firebuild_pki.providers.file.pairs import ReadyPairs
from firebuild_pki.providers.file.settings import FileSettings
from firebuild_pki.providers.file.signing import SigningCA

SOON = timedelta(days=30)
"""How long before its end a certificate deserves a word."""


def findings(opened: SigningCA | ReadyPairs, settings: FileSettings, now: datetime) -> Iterator[Note]:
    """Describe what was read: a note for each thing, warnings for what expires soon.

    Args:
        opened: what `open` read.
        settings: to notice what has no effect.
        now: the current time.
    """
    if isinstance(opened, SigningCA):
        yield from _about_ca(opened, settings, now)
    else:
        yield from _about_pairs(opened, settings, now)


def _about_ca(opened: SigningCA, settings: FileSettings, now: datetime) -> Iterator[Note]:
    ca, reached = opened.ca, opened.path.reached
    kind = kind_of_key(ca.certificate.public_key())
    yield _ok("ca", f"{ca.name} signs with {kind}, valid until {ca.until}", "ca_cert")
    yield from _about_key("key", opened.key, ca, given=settings.ca_key_passphrase is not None)
    text = f"the chain leads to {reached.name}, valid until {reached.until}"
    yield _ok("anchor", text if opened.chain else "the CA itself is the anchor", reached.source.setting)
    above = {one.certificate: one for one in (reached, *opened.path.issuers, ca)}
    yield from _expiring("ca", above.values(), now, SOON)


def _about_pairs(opened: ReadyPairs, settings: FileSettings, now: datetime) -> Iterator[Note]:
    given = {
        Profile.SERVER: settings.server_key_passphrase is not None,
        Profile.GUEST: settings.client_key_passphrase is not None,
    }
    for profile, about in ((Profile.SERVER, "server"), (Profile.GUEST, "client")):
        pair = opened.of(profile)
        text = f"{pair.leaf.name} for {pair.name}, valid until {pair.leaf.until}"
        yield _ok(about, text, pair.leaf.source.setting)
        yield from _about_key(f"{about} key", pair.key, pair.leaf, given=given[profile])
        yield from _expiring(about, [pair.leaf], now, _third_of_life(pair.leaf))
    for anchor in opened.anchors:
        yield _ok("anchor", f"{anchor.name}, valid until {anchor.until}", anchor.source.setting)
    yield from _expiring("anchor", opened.anchors, now, SOON)


def _about_key(about: str, key: LoadedKey, owner: Found, *, given: bool) -> Iterator[Note]:
    state = "encrypted" if key.encrypted else "not encrypted"
    setting = key.source.setting
    yield _ok(about, f"the key in {key.source.real_path} fits {owner.name}; it is {state}", setting)
    if given and not key.encrypted:
        setting = f"{setting}_passphrase"
        yield Note(f"has no effect: the key in {key.source.real_path} is not encrypted", setting, about=about)


def _expiring(about: str, found: Iterable[Found], now: datetime, soon: timedelta) -> Iterator[Note]:
    for one in found:
        left = one.certificate.not_valid_after_utc - now
        if left < soon:
            text = f"{one.name} in {one.source.real_path} expires at {one.until}, in {_about_how_long(left)}"
            yield Note(text, one.source.setting, "renew it", about=about)


def _third_of_life(found: Found) -> timedelta:
    # certificates that are renewed every day are not about to expire all the time
    life = found.certificate.not_valid_after_utc - found.certificate.not_valid_before_utc
    return min(SOON, life / 3)


def _about_how_long(left: timedelta) -> str:
    return f"{left.days} days" if left.days > 1 else f"{left.total_seconds() / 3600:.0f} hours"


def _ok(about: str, message: str, path: str) -> Note:
    return Note(message, path, level=NoteLevel.OK, about=about)
