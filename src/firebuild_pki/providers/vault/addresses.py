"""Which addresses may be talked to: https, and plain http on this machine only."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from pydantic_core import PydanticCustomError


def check_address(text: str) -> str:
    """Check the address of a node, as a validator of settings.

    Returns:
        The address without a slash at its end.

    Raises:
        PydanticCustomError: it is not a base URL, or plain http to another machine.
    """
    wanted = "expected an address such as https://vault.example:8200"
    parts = _split(text)
    if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _refusal(f'{wanted}, found "{_without_user(text)}"')
    if parts.username is not None or parts.password is not None:
        raise _refusal(f"{wanted}, found one with a user name or password (not shown)")
    if parts.query or parts.fragment:
        raise _refusal(f'{wanted}, found "?" or "#" in it')
    tail = parts.path.rstrip("/").rpartition("/")[2]
    if tail in {"v1", "ui"}:
        bare = text.rstrip("/").removesuffix(f"/{tail}")
        raise _refusal(f'{wanted}, found "{text}"', f"leave /{tail} away: {bare}")
    if not is_safe(text):
        raise _refusal(
            f'expected https, found plain http to "{parts.hostname}"',
            "plain http is for loopback addresses only: 127.0.0.0/8, ::1 and localhost",
        )
    return text.rstrip("/")


def is_safe(url: str) -> bool:
    """Tell whether a token may be sent to an address: https, or plain http to a loopback address."""
    parts = _split(url)
    if parts is None or not parts.hostname:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine by its mere spelling; nothing is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def base_of(url: str) -> tuple[str, str]:
    """Split a full URL into scheme and host, and the path with its query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}", parts._replace(scheme="", netloc="", fragment="").geturl()


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return None if any(one.isspace() for one in url) else parts


def _without_user(text: str) -> str:
    return text.rpartition("@")[2]


def _refusal(text: str, hint: str = "") -> PydanticCustomError:
    return PydanticCustomError("address", "{text}", {"text": text, "hint": hint})
