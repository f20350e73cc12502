"""Addresses to listen on, and how they are written."""

from __future__ import annotations

import socket
from typing import Final

from firebuild_bootstrap.errors import InputError

_BACKLOG: Final = 64


def listen(host: str, port: int = 0) -> socket.socket:
    """Open a listening TCP socket; port 0 picks a free one.

    Raises:
        InputError: the address cannot be bound.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(
            f"the bootstrap server cannot listen on {host} port {port}: {error.strerror}",
            hint="bootstrap.bind has to be an address of this host; port 0 picks a free port",
        ) from error


def format_address(address: tuple[object, ...]) -> str:
    """Write a socket address as `127.0.0.1:80` or `[::1]:80`."""
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
