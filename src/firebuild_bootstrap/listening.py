"""Addresses to listen on, and how they are written."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from typing import Final

from firebuild_bootstrap.errors import InputError

_BACKLOG: Final = 64


def listen(host: str, port: int = 0, *, setting: str = "bootstrap.bind") -> socket.socket:
    """Open a listening TCP socket; port 0 picks a free one.

    Args:
        host: address of this host.
        port: the port there.
        setting: that both come from.

    Raises:
        InputError: the address cannot be bound, or nobody could connect to it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        _check_loopback(listener)
        return listener
    except OSError as error:
        raise unusable_address(
            f"the bootstrap server cannot listen on {host} port {port}", error, port, setting
        ) from error


def _check_loopback(listener: socket.socket) -> None:
    """Close it and raise OSError if its loopback interface is down, which bind(2) does not mind."""
    address = listener.getsockname()[:2]
    if not ipaddress.ip_address(address[0]).is_loopback:
        return
    with socket.socket(listener.family, socket.SOCK_DGRAM) as trial:
        try:
            trial.connect(address)  # asks for the route and sends nothing
        except OSError:
            listener.close()
            raise


def unusable_address(message: str, error: Exception, port: int, setting: str) -> InputError:
    """Return the error of an address that can't be listened on.

    Args:
        message: which.
        error: says why.
        port: which of the address.
        setting: that the address comes from.
    """
    # Python's own text of such an error repeats the address.
    number = None if isinstance(error, socket.gaierror) else getattr(error, "errno", None)
    why = os.strerror(number) if number else getattr(error, "strerror", None) or str(error)
    hint = f"{setting} has to name an address of this host"
    if number == errno.EADDRINUSE:
        hint = (
            f"`ss -ltnp 'sport = :{port}'` shows who has the port; end that, or choose another for {setting}"
        )
    elif number == errno.ENETUNREACH:
        hint = "the loopback interface is down, as in a new network namespace: `ip link set lo up`"
    elif number in (errno.EACCES, errno.EPERM):
        hint = (
            "ports below net.ipv4.ip_unprivileged_port_start, which is 1024 by default, are root's: "
            "choose a higher one"
        )
    return InputError(f"{message}: {why}", hint=hint)


def format_address(address: tuple[object, ...]) -> str:
    """Write a socket address as `127.0.0.1:80` or `[::1]:80`."""
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
