"""Reading the settings of a role: will its certificates pass?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from firebuild_pki.provider import Note, NoteLevel, Profile
from firebuild_pki.providers.vault.signing import FLAGS
from firebuild_pki.settings import write_duration

SHORT = timedelta(hours=1)
"""Builds ask for an hour unless they are allowed to take longer."""


def role_notes(
    role: str, data: Mapping[str, Any], profiles: Sequence[Profile], suffix: str, where: str
) -> list[Note]:
    """Say what the settings of a role mean for the certificates that it is to sign.

    Args:
        role: its name.
        data: its settings, as the server shows them.
        profiles: which ends it signs for.
        suffix: domain that the names of builds are below; empty if unknown.
        where: the setting that names the role.

    Returns:
        What will go wrong; one note at level OK if nothing will.
    """
    problems = [
        Note(f"role {role}: {message}", where, hint, level, "role")
        for level, message, hint in (
            *(finding for check in (_extended_usage, _usage) for finding in check(data, profiles)),
            *_names(data, suffix),
            *_keys(data),
            *_validity(data),
        )
    ]
    return problems or [Note(f"role {role}: {_summary(data)}", "", None, NoteLevel.OK, "role")]


Finding = tuple[NoteLevel, str, str]


def _extended_usage(data: Mapping[str, Any], profiles: Sequence[Profile]) -> Iterator[Finding]:
    ends = " and the ".join(profiles)
    missing = [FLAGS[profile] for profile in profiles if not data.get(FLAGS[profile])]
    others = [*(data.get("ext_key_usage") or ()), *(data.get("ext_key_usage_oids") or ())]
    others += [name for name in ("code_signing_flag", "email_protection_flag") if data.get(name)]
    if missing:
        message = f"it lacks {' and '.join(missing)}, which the certificate of the {ends} needs"
        yield NoteLevel.FATAL, message, "set " + " ".join(f"{flag}=true" for flag in missing)
    if others:
        message = f"it adds the extended key usage {', '.join(map(str, others))}, which will be refused"
        yield NoteLevel.FATAL, message, "leave server_flag and client_flag as the only extended key usages"


def _usage(data: Mapping[str, Any], _: Sequence[Profile]) -> Iterator[Finding]:
    usage = {str(one).lower() for one in data.get("key_usage") or ()}
    if usage and "digitalsignature" not in usage:
        yield NoteLevel.FATAL, "its key_usage lacks DigitalSignature", "set key_usage=DigitalSignature"
    elif usage != {"digitalsignature"}:
        message = "its key_usage is not just DigitalSignature, all that TLS needs with an EC key"
        yield NoteLevel.WARNING, message, "set key_usage=DigitalSignature"


def _names(data: Mapping[str, Any], suffix: str) -> Iterator[Finding]:
    if data.get("allow_any_name"):
        message = "it allows any name"
        yield NoteLevel.WARNING, message, "set allow_any_name=false and allowed_domains to ca.name_suffix"
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
        message = "it requires a common name, which names above 64 characters do not have"
        yield NoteLevel.WARNING, message, "set require_cn=false"


def _covers(data: Mapping[str, Any], suffix: str) -> bool:
    """Tell whether names below `suffix` are names below an allowed domain, or may fit an allowed pattern."""
    for domain in map(str.lower, map(str, data.get("allowed_domains") or ())):
        if data.get("allow_glob_domains") and "*" in domain:
            return True  # whether the pattern fits shows when something is signed
        if data.get("allow_subdomains") and f".{suffix}".endswith(f".{domain}"):
            return True
    return False


def _keys(data: Mapping[str, Any]) -> Iterator[Finding]:
    kind = data.get("key_type")
    if kind not in {None, "any", "ec", "rsa"}:
        message = f"it requires keys of type {kind}, which gRPC cannot use"
        yield NoteLevel.FATAL, message, "set key_type=ec and key_bits=256, or key_type=any"
    elif kind == "rsa":
        hint = "set ca.key_type to rsa2048 or above, or key_type=any on the role"
        yield NoteLevel.WARNING, f"it requires rsa keys of {data.get('key_bits')} bits at least", hint


def _validity(data: Mapping[str, Any]) -> Iterator[Finding]:
    if data.get("not_after"):
        hint = "clear not_after, and set max_ttl"
        yield NoteLevel.FATAL, "it has a fixed not_after, so it refuses to be asked for a lifetime", hint
    longest = seconds(data.get("max_ttl"))
    if longest and longest < SHORT:
        hint = "raise max_ttl above the build's timeout"
        message = f"its certificates live for {write_duration(longest)} at most"
        yield NoteLevel.WARNING, message, hint


def _summary(data: Mapping[str, Any]) -> str:
    longest = seconds(data.get("max_ttl"))
    life = f"for up to {write_duration(longest)}" if longest else "for as long as the mount allows"
    domains = ", ".join(map(str, data.get("allowed_domains") or ()))
    return f"signs names below {domains} {life}"


def seconds(value: object) -> timedelta:
    """Read a lifetime: a number of seconds; zero for anything else."""
    return timedelta(seconds=value) if isinstance(value, int | float) else timedelta(0)
