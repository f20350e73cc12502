"""Parses what registries answer: errors, challenges, Retry-After, and URLs; all of it is untrusted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_pki.addresses import is_safe, split_url
from firebuild_pki.display import one_line

SLOW: Final = "try again; where it is always that slow, raise registries.timeout"
"""The hint where a registry takes too long."""

BEHIND_PROXY: Final = (
    "behind a proxy that terminates TLS, the registry's own URL has to be configured with https"
)
"""The hint where a registry with https leads to an address without: most know no better."""

# A challenge's scheme, or one of its parameters (RFC 9110, section 11.2).
_CHALLENGE: Final = re.compile(r'([A-Za-z0-9_-]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+)))?')


class RegistryError(InputError):
    """A registry did not do what was asked of it.

    Args:
        message: which registry, what was asked, and what it said.
        status: of its answer, 0 where there was none.
        passing: whether it may be otherwise a moment later.
        after: seconds that it asked to wait.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int = 0,
        passing: bool = False,
        after: float = 0.0,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.passing = passing
        self.after = after


def read_challenges(headers: Sequence[str]) -> dict[str, dict[str, str]]:
    """Read WWW-Authenticate: each scheme in lower case, with its parameters."""
    found: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for header in headers:
        for match in _CHALLENGE.finditer(header[:8192]):
            name, quoted, plain = match[1].lower(), match[2], match[3]
            if quoted is None and plain is None:
                current = found.setdefault(name, {})
            else:
                current[name] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
    return {scheme: found[scheme] for scheme in ("bearer", "basic") if scheme in found}


def error_words(body: bytes) -> str:
    """Return what is in the body of an error (distribution-spec, "Error Codes"), in one harmless line.

    Proxies, and servers of files, answer with a line of plain text; a page of HTML is passed over.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return _plain_words(body)
    if not isinstance(document, dict):
        return ""
    errors = document.get("errors")
    texts = []
    for error in errors[:5] if isinstance(errors, list) else [document]:
        if isinstance(error, dict):
            parts = (error.get(name) for name in ("code", "message", "details", "error", "error_description"))
            texts.append(": ".join(part for part in parts if isinstance(part, str) and part))
    return one_line("; ".join(filter(None, texts)), 300)


def _plain_words(body: bytes) -> str:
    try:
        text = body.decode().strip()
    except UnicodeDecodeError:
        return ""
    return "" if text.startswith(("<", "{", "[")) or "\0" in text else one_line(text, 300)


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port: where a login may be sent that is meant for there (RFC 6454)."""
    parts = split_url(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


def shown_url(url: str) -> str:
    """Return a URL of others without what may be secret in it."""
    parts = split_url(url)
    return (
        one_line(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", 200)
        if parts.scheme
        else "an invalid URL"
    )


def is_downgrade(url: str, target: str) -> bool:
    """Tell whether a request may not go on from one URL to another: only to https, or plain http on loopback.

    From https it goes to https only.
    """
    return not is_safe(target) or (split_url(url).scheme == "https" and split_url(target).scheme != "https")
