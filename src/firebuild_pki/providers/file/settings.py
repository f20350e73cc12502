"""Settings of ``ca.file``, and which of the two modes they mean."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, StringConstraints
from pydantic_core import PydanticCustomError

from firebuild_pki.keystores import has_secret
from firebuild_pki.provider import Note, NoteLevel
from firebuild_pki.settings import Duration, PositiveDuration, SecretRef, Settings

FilePath = Annotated[str, StringConstraints(min_length=1)]


def _without_secret(value: str) -> str:
    if has_secret(value):
        text = "the URI holds a secret itself (not shown)"
        hint = "take it out, and say in ca_key_passphrase where it is: {env: NAME} or {file: PATH}"
        raise PydanticCustomError("secret_in_uri", "{text}", {"text": text, "hint": hint})
    return value


KeyPlace = Annotated[FilePath, AfterValidator(_without_secret)]


class FileSettings(Settings):
    """Settings of ``ca.file``: either a CA with its key, or finished certificates for both ends."""

    ca_cert: FilePath | None = None
    """The CA's certificate (PEM). May hold its issuers too, in any order."""
    ca_key: KeyPlace | None = None
    """The CA's private key: a file (PEM: PKCS#8, PKCS#1 or SEC1) that no other user may be able to read, or
    the URI of a key that stays in its store, such as pkcs11:token=ca;object=issuer."""
    ca_key_passphrase: SecretRef | None = None
    """Passphrase of the CA's key if it is encrypted, or the PIN of its store."""
    chain: FilePath | None = None
    """More CA certificates between ca_cert and the anchor (PEM), in any order."""
    anchors: tuple[FilePath, ...] = ()
    """Certificates that server and guest trust (PEM). By default the self-signed certificate that
    ca_cert leads to; without any, ca_cert itself."""
    leaf_lifetime: PositiveDuration = timedelta(hours=24)
    """Upper bound of the lifetime of the certificates that the CA signs."""
    backdate: Duration = timedelta(minutes=5)
    """How far signed certificates begin in the past, for guests whose clock is slow."""
    server_cert: FilePath | None = None
    """A finished certificate for the server (PEM), used instead of signing. May hold its issuers too."""
    server_key: FilePath | None = None
    """Private key of server_cert."""
    server_key_passphrase: SecretRef | None = None
    """Passphrase of the server's key, if it is encrypted."""
    server_name: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Which of the DNS names in server_cert the guest checks. Needed only if it has several."""
    client_cert: FilePath | None = None
    """A finished certificate for the guest (PEM). May hold its issuers too."""
    client_key: FilePath | None = None
    """Private key of client_cert."""
    client_key_passphrase: SecretRef | None = None
    """Passphrase of the guest's key, if it is encrypted."""


class Mode(StrEnum):
    """What the files are for."""

    SIGN = "ca_key"
    """A CA that signs."""
    PAIRS = "finished certificates"
    """Finished certificates; nothing is signed."""


_NEEDED = {
    Mode.SIGN: ("ca_cert", "ca_key"),
    Mode.PAIRS: ("ca_cert", "server_cert", "server_key", "client_cert", "client_key"),
}
_ONLY = {
    Mode.SIGN: ("ca_key", "ca_key_passphrase"),
    Mode.PAIRS: (
        "server_cert",
        "server_key",
        "server_key_passphrase",
        "server_name",
        "client_cert",
        "client_key",
        "client_key_passphrase",
    ),
}
_BOTH_WAYS = (
    "a CA that signs needs ca_cert and ca_key; finished certificates need ca_cert, server_cert, server_key, "
    "client_cert and client_key"
)


def mode_of(settings: FileSettings) -> Mode:
    """Tell what the settings mean; a single setting of the pairs is enough for that."""
    return Mode.PAIRS if _given(settings, _ONLY[Mode.PAIRS]) else Mode.SIGN


def notes_about(settings: FileSettings) -> Iterator[Note]:
    """Name what is missing, mixed up or without effect; no I/O."""
    mode = mode_of(settings)
    signing, pairs = _given(settings, _ONLY[Mode.SIGN]), _given(settings, _ONLY[Mode.PAIRS])
    if signing and pairs:
        yield _fatal(
            signing[0],
            f"expected a CA that signs or finished certificates, found both: {_words(signing + pairs)}",
            f"remove {_words(signing)}, or {_words(pairs)}",
        )
        return
    missing = [name for name in _NEEDED[mode] if getattr(settings, name) is None]
    for name in missing:
        beside = [other for other in (*_NEEDED[mode], *_ONLY[mode]) if getattr(settings, other) is not None]
        why = f"missing beside {_words(list(dict.fromkeys(beside)))}" if beside else "missing"
        yield _fatal(name, why, _BOTH_WAYS)
    if mode is Mode.PAIRS:
        yield from _without_effect(settings)


def _without_effect(settings: FileSettings) -> Iterator[Note]:
    for name in ("leaf_lifetime", "backdate"):
        # by value: a dump of the settings, loaded again, has every default written out
        if getattr(settings, name) != FileSettings.model_fields[name].default:
            yield Note("has no effect on finished certificates", name, "remove it")


def _given(settings: FileSettings, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(settings, name) is not None]


def _fatal(path: str, message: str, hint: str) -> Note:
    return Note(message, path, hint, NoteLevel.FATAL)


def _words(names: list[str]) -> str:
    return ", ".join(names)
