"""Reading the settings of a role: will its certificates pass?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from firebuild_pki.provider import Note, NoteLevel, Profile
from firebuild_pki.providers.vault.signing import FLAGS
from firebuild_pki.settings import write_duration

SHORT = timedelta(hours=1)
"""Builds ask for an hour unless they are allowed to take longer."""


def role_notes(role: str, data: Mapping[str, Any], profile: Profile) -> list[Note]:
    """Say what the settings of a role mean for the certificates of one end.

    Args:
        role: its name.
        data: its settings, as the server shows them.
        profile: which end it signs for.

    Returns:
        What will go wrong; one note at level OK if nothing will.
    """
    problems = [
        Note(f"role {role}: {message}", f"{profile}_role", hint, level, "role")
        for level, message, hint in (*_usage(data, profile), *_names(data), *_keys(data), *_validity(data))
    ]
    return problems or [Note(f"role {role}: {_summary(data)}", "", None, NoteLevel.OK, "role")]


Finding = tuple[NoteLevel, str, str]


def _usage(data: Mapping[str, Any], profile: Profile) -> Iterator[Finding]:
    wanted = FLAGS[profile]
    flags = f"server_flag={_flag(data, 'server_flag')} client_flag={_flag(data, 'client_flag')}"
    others = [*(data.get("ext_key_usage") or ()), *(data.get("ext_key_usage_oids") or ())]
    others += [name for name in ("code_signing_flag", "email_protection_flag") if data.get(name)]
    if flags != wanted:
        message = f"it has {flags}, the certificate of the {profile} will be refused"
        yield NoteLevel.FATAL, message, f"set {wanted}"
    if others:
        message = f"it adds the extended key usage {', '.join(map(str, others))}, which will be refused"
        yield NoteLevel.FATAL, message, f"leave {wanted} as the only extended key usage"
    usage = {str(one).lower() for one in data.get("key_usage") or ()}
    if usage and "digitalsignature" not in usage:
        yield NoteLevel.FATAL, "its key_usage lacks DigitalSignature", "set key_usage=DigitalSignature"
    elif usage != {"digitalsignature"}:
        message = "its key_usage is not just DigitalSignature, all that TLS needs with an EC key"
        yield NoteLevel.WARNING, message, "set key_usage=DigitalSignature"


def _names(data: Mapping[str, Any]) -> Iterator[Finding]:
    if data.get("allow_any_name"):
        message = "it allows any name"
        yield NoteLevel.WARNING, message, "set allow_any_name=false and allowed_domains to ca.name_suffix"
    elif not data.get("allowed_domains"):
        message = "it allows no domain"
        yield NoteLevel.FATAL, message, "set allowed_domains to ca.name_suffix, and allow_subdomains=true"
    elif not data.get("allow_subdomains") and not data.get("allow_glob_domains"):
        hint = "set allow_subdomains=true"
        yield NoteLevel.FATAL, "it does not allow subdomains, which all names of builds are", hint
    if data.get("require_cn"):
        message = "it requires a common name, which names above 64 characters do not have"
        yield NoteLevel.WARNING, message, "set require_cn=false"


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


def _flag(data: Mapping[str, Any], name: str) -> str:
    return "true" if data.get(name) else "false"
