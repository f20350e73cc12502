"""Ports of this host that lead into a namespace: here this process's own, and a server of ours for QEMU's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.machine.base import PublishedPort
from firebuild_bootstrap.machine.qemu import publishing
from firebuild_bootstrap.machine.qemu.publishing import Publisher
from support import REPO, eventually


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    link, _ = server.accept()
                    with link:
                        while data := link.recv(65536):
                            link.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def asked(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
        link.sendall(data)
        link.shutdown(socket.SHUT_WR)
        return link.makefile("rb").read()


def test_a_connection_that_can_not_be_accepted_does_not_end_the_port(
    echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_FIRST_INNER", echo)
    port, real, failures = free_port(), socket.socket.accept, [24, 103]  # EMFILE, ECONNABORTED

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise OSError(failures.pop(), "not now")
        return real(listener)

    with closing(Publisher([PublishedPort("127.0.0.1", port, 80)])) as publisher:
        monkeypatch.setattr(socket.socket, "accept", accept)
        publisher.start([socket.socket()])
        assert asked(port, b"hello") == b"hello"
        assert not failures


def test_connections_are_relayed_in_both_directions_and_their_sockets_used_again(
    echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_FIRST_INNER", echo)
    port = free_port()
    with closing(Publisher([PublishedPort("127.0.0.1", port, 80)])) as publisher:
        assert publisher.forwards == (f"tcp:127.0.0.1:{echo}-169.254.0.15:80",)
        publisher.start([socket.socket()])  # one for all that come
        for size in (3, 100_000, 0, 7):
            assert asked(port, b"x" * size) == b"x" * size


def test_what_waits_and_what_is_open_ends_with_the_publisher(
    echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_FIRST_INNER", echo)
    port = free_port()
    publisher = Publisher([PublishedPort("127.0.0.1", port, 80)])
    publisher.start([socket.socket()])
    address = ("127.0.0.1", port)
    with socket.create_connection(address, 30) as one, socket.create_connection(address, 30) as other:
        one.sendall(b"x")
        assert one.recv(1) == b"x"
        publisher.close()
        publisher.close()
        for link in (one, other):
            with suppress(ConnectionResetError):
                assert link.recv(1) == b""


def test_a_socket_that_is_given_back_while_the_publisher_closes_is_closed(
    echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_FIRST_INNER", echo)
    port, inside = free_port(), socket.socket()
    publisher = Publisher([PublishedPort("127.0.0.1", port, 80)])
    closing_it = threading.Thread(target=publisher.close)

    def disconnected(one: socket.socket) -> bool:
        closing_it.start()
        closing_it.join(0.2)  # it waits for us, or is done
        return True

    monkeypatch.setattr(publishing, "_disconnected", disconnected)
    publisher.start([inside])
    assert asked(port, b"x") == b"x"
    assert eventually(lambda: inside.fileno() == -1)
    closing_it.join()


def test_a_machine_that_does_not_listen_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_FIRST_INNER", free_port())
    port = free_port()
    with closing(Publisher([PublishedPort("127.0.0.1", port, 80)])) as publisher:
        publisher.start([socket.socket()])
        for _ in range(2):
            with suppress(ConnectionResetError, BrokenPipeError):
                assert asked(port, b"") == b""


def test_an_address_that_is_taken_or_of_another_host_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        both = [PublishedPort("127.0.0.1", free_port(), 80), PublishedPort("127.0.0.1", port, 80)]
        with pytest.raises(
            InputError, match=f"127.0.0.1:{port} can't be listened on: Address already in use"
        ) as refused:
            Publisher(both)
        page = (REPO / "docs/troubleshooting.md").read_text("utf-8")
        assert str(refused.value).replace(str(port), "8080") in page
        socket.create_server(("127.0.0.1", both[0].host)).close()  # the first was given free
    with pytest.raises(InputError, match=r"192.0.2.1:80 can't be listened on: "):
        Publisher([PublishedPort("192.0.2.1", 80, 80)])
