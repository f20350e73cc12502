"""What a ``pkcs11:`` URI says: which module, which token, which key (RFC 7512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final
from urllib.parse import unquote_to_bytes

from firebuild_pki import CAError

_TOKEN: Final = ("token", "manufacturer", "model", "serial")
_SLOT: Final = ("slot-id", "slot-description", "slot-manufacturer")
_KEY: Final = ("object", "id", "type")
_LIBRARY: Final = ("library-manufacturer", "library-description", "library-version")
_PATH: Final = (*_TOKEN, *_SLOT, *_KEY, *_LIBRARY)
_QUERY: Final = ("module-path", "module-name", "pin-source", "pin-value")

_PIN_HINT: Final = "say where the PIN is in ca_key_passphrase: {env: NAME} or {file: PATH}"


@dataclass(frozen=True, slots=True)
class TokenURI:
    """A parsed URI.

    Args:
        text: as it was written.
        path: what token and key have to be: attribute -> value, decoded.
        module_path: the module to load, if the URI names it.
        module_name: its name without directory and suffix, if the URI names it so.
    """

    text: str
    path: Mapping[str, bytes]
    module_path: str | None
    module_name: str | None

    def words(self, *names: str) -> str:
        """Write those of the attributes that are given, for messages: ``token "ca"``."""
        given = [
            f'{name} "{self.path[name].decode(errors="replace")}"' for name in names if name in self.path
        ]
        return ", ".join(given)

    @property
    def token_words(self) -> str:
        """What the token has to be, for messages."""
        return self.words(*_TOKEN, *_SLOT) or "any token"

    @property
    def key_words(self) -> str:
        """What the key has to be, for messages."""
        return self.words("object", "id") or "any private key"


def parse(text: str) -> TokenURI:
    """Parse a URI.

    Raises:
        CAError: it is not one of RFC 7512, holds a PIN, or names something else than a private key.
    """
    path_text, _, query_text = text.removeprefix("pkcs11:").partition("?")
    path = _attributes(text, path_text, ";", _PATH)
    query = _attributes(text, query_text, "&", _QUERY)
    if "pin-value" in query or "pin-source" in query:
        raise CAError("the PIN does not belong into the URI", hint=_PIN_HINT)
    if path.get("type", b"private") != b"private":
        raise CAError(f"expected type=private, found {text}", hint="only a private key can sign")
    module_path, module_name = (_text(query, name) for name in ("module-path", "module-name"))
    _text(path, "object")
    return TokenURI(text, path, module_path, module_name)


def _text(attributes: Mapping[str, bytes], name: str) -> str | None:
    try:
        return attributes[name].decode() if name in attributes else None
    except UnicodeDecodeError:
        raise CAError(f'the attribute "{name}" is not UTF-8 text') from None


def _attributes(text: str, part: str, separator: str, known: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for attribute in filter(None, part.split(separator)):
        name, equals, value = attribute.partition("=")
        if not equals:
            raise CAError(f'expected name=value between every "{separator}", found "{attribute}" in {text}')
        if name not in known and not name.startswith("x-"):  # vendors' own, which may be ignored
            raise CAError(
                f'"{name}" is not an attribute of PKCS#11 URIs (RFC 7512)', hint=_spelling(name, known)
            )
        if name in found:
            raise CAError(f'the attribute "{name}" is given twice in {text}')
        found[name] = unquote_to_bytes(value)
    return found


def _spelling(name: str, known: tuple[str, ...]) -> str:
    other = _QUERY if known is _PATH else _PATH
    if name in other:
        return f'"{name}" stands after the question mark' if other is _QUERY else f'"{name}" stands before it'
    close = get_close_matches(name, known, 1)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(known)}"
