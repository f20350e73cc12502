"""Speaks mutual TLS with the identity of its machine, over standard input and output instead of a socket.

    peer.py answer NAME      wait for a peer that is called NAME, and answer what it says
    peer.py ask NAME         say something to the peer that is called NAME

What it has to tell goes to standard error. It needs Python's standard library alone.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

TLS = Path("/run/firebuild/tls")
_T = TypeVar("_T")


class Refused(Exception):
    """The peer is not the one that is expected."""


class Connection:
    """One end of a connection: TLS whose records travel over descriptors 0 and 1."""

    def __init__(self, *, server: bool) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # `names` is compared instead: a SPIFFE ID is not a host name
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(TLS / "ca.pem")
        context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)

    def _do(self, act: Callable[[], _T]) -> _T:
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                self._flush()
                if data := os.read(0, 65536):
                    self._in.write(data)
                else:
                    self._in.write_eof()
            finally:
                self._flush()

    def _flush(self) -> None:
        while data := self._out.read(65536):
            os.write(1, data)

    def handshake(self, name: str) -> None:
        """Begin, and make sure of the peer's name.

        Raises:
            Refused: it has other names.
            ssl.SSLError: its certificate is of another CA, or it has none, or has refused ours.
        """
        self._do(self._tls.do_handshake)
        certificate = self._tls.getpeercert() or {}
        names = [str(entry[1]) for entry in certificate.get("subjectAltName", ())]
        if name not in names:
            self.hang_up()
            raise Refused(f"the peer is {', '.join(names)}, expected {name}")

    def hang_up(self) -> None:
        """Say that nothing more comes, and wait for the other end: it may be speaking still."""
        with suppress(ssl.SSLError):
            self._do(self._tls.unwrap)

    def say(self, text: str) -> None:
        """Send a line."""
        self._do(lambda: self._tls.write(f"{text}\n".encode()))

    def hear(self) -> str:
        """Receive a line.

        Raises:
            Refused: the peer has hung up instead.
        """
        data = b""
        while not data.endswith(b"\n"):
            if not (piece := self._do(lambda: self._tls.read(65536))):
                raise Refused("the peer has hung up")
            data += piece
        return data.decode().rstrip("\n")


def main(role: str, name: str) -> int:
    """Be one end; return the exit status."""
    connection = Connection(server=role == "answer")
    try:
        connection.handshake(name)
        if role == "answer":
            heard = connection.hear()
            connection.say(f"you said: {heard}")
        else:
            connection.say("hello")
            heard = connection.hear()
    except (Refused, ssl.SSLError) as error:
        print(f"{role}: refused: {error}", file=sys.stderr)
        return 3
    print(f"{role}: {name}: {heard}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
