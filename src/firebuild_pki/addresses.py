"""URLs: where they lead, whether a secret may be sent there, and by which proxy."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit


def split_url(url: str) -> SplitResult:
    """Split a URL; what is not a URL has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def joined(base: str, location: str) -> str:
    """Return where a Location leads; an empty text, which nothing is sent to, for what is not a URL."""
    try:
        target = urljoin(base, location)
        urlsplit(target).port  # noqa: B018 - the port is read here
    except ValueError:
        return ""
    return target


def is_safe(url: str) -> bool:
    """Tell whether a secret may be sent to an address: https, or plain http to a loopback address."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    if not parts.hostname or any(one.isspace() for one in url):
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine by its mere spelling; nothing is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_for(url: str, environ: Mapping[str, str], *, plain: bool = False) -> str | None:
    """Find the proxy for an address: HTTPS_PROXY or ALL_PROXY, unless NO_PROXY excludes its host.

    Args:
        plain: whether plain http has one, too, in HTTP_PROXY: it sees what is sent, so never with secrets.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    values = {name.lower(): value for name, value in environ.items() if value}
    proxy = values.get(f"{parts.scheme}_proxy") or values.get("all_proxy")
    if parts.scheme not in ("http", "https") or is_loopback(host) or not proxy:
        return None
    if parts.scheme == "http" and not plain:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return None if _is_excluded(host, port, values.get("no_proxy", "")) else proxy


def _is_excluded(host: str, port: int, no_proxy: str) -> bool:
    """Read NO_PROXY as Go's programs do (golang.org/x/net/http/httpproxy).

    It names hosts with all below them, addresses and networks, each but the last with `:PORT` or without.
    """
    for entry in filter(None, map(str.strip, no_proxy.lower().split(","))):
        if entry == "*":
            return True
        with suppress(ValueError):
            network = ipaddress.ip_network(entry, strict=False)
            with suppress(ValueError):
                if ipaddress.ip_address(host) in network:
                    return True
            continue
        with suppress(ValueError):
            parts = urlsplit(f"//{entry}")
            name = (parts.hostname or "").removeprefix("*").lstrip(".")
            if name and parts.port in (None, port) and (host == name or host.endswith(f".{name}")):
                return True
    return False
