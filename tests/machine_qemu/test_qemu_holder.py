"""The process that holds a machine's namespace, without a namespace."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import runpy
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.machine.qemu import holder

Held = tuple[Callable[..., None], socket.socket, dict[str, Any]]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Runs the holder with its last steps only noted."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    done: dict[str, Any] = {}
    monkeypatch.setattr(holder, "FIRST_FILE", 900)
    monkeypatch.setattr(holder, "drop_capabilities", lambda keep: done.update(capabilities=keep))
    monkeypatch.setattr(os, "closerange", lambda *numbers: done.update(closed=numbers))
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: done.update(limit=limit))
    monkeypatch.setattr(os, "execv", lambda program, argv: done.update(program=program, argv=argv))

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["holder", str(theirs.detach()), *map(str, arguments)])
        holder.main()

    with mine, theirs:
        yield run, mine, done


def test_ports_go_out_and_a_command_comes_in(hold: Held, tmp_path: Path) -> None:
    run, control, done = hold
    (tmp_path / "disk").write_text("content")
    link = tmp_path / "link"
    command = {"argv": ["/bin/qemu", "-M"], "links": {str(link): "/proc/self/fd/900"}}
    with open(tmp_path / "disk") as disk:
        socket.send_fds(control, [json.dumps(command).encode()], [disk.fileno()])
    run(-1, 1, 0, 0)
    data, descriptors, _, _ = socket.recv_fds(control, 100, 5)
    assert data == holder.READY
    *listeners, free = (socket.socket(fileno=descriptor) for descriptor in descriptors)
    for listener in listeners:
        with listener:
            assert listener.getsockname()[0] == "127.0.0.1"
    with free:
        assert free.getsockname()[1] == 0
    assert len(listeners) == 2
    with open(900) as received:
        assert os.get_inheritable(900)
        assert received.read() == "content"
    assert done == {
        "closed": (3, 900),
        "limit": (resource.RLIMIT_CORE, (0, 0)),
        "capabilities": frozenset(),
        "program": "/bin/qemu",
        "argv": ["/bin/qemu", "-M"],
    }
    assert str(link.readlink()) == "/proc/self/fd/900"


def test_without_a_command_it_ends(hold: Held) -> None:
    run, control, done = hold
    control.shutdown(socket.SHUT_WR)
    run(-1, 0)
    assert done == {}


def test_a_program_that_can_not_be_run_is_named(hold: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    run, control, _ = hold

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "execv", refuse)
    socket.send_fds(control, [b'{"argv": ["/bin/qemu"], "links": {}}'], [])
    with pytest.raises(SystemExit, match="/bin/qemu can't be run: Permission denied"):
        run(-1, 0)


def test_a_port_in_use_is_said(hold: Held) -> None:
    run, _, _ = hold
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(SystemExit, match="Address already in use"),
    ):
        run(-1, 0, taken.getsockname()[1])


def test_with_the_device_the_end_of_a_tap_goes_out(hold: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    run, control, _ = hold
    monkeypatch.setattr(holder, "open_uplink", os.dup)
    control.shutdown(socket.SHUT_WR)
    run(0, 0)
    _, [descriptor], _, _ = socket.recv_fds(control, 100, 5)
    assert os.path.sameopenfile(0, descriptor)
    os.close(descriptor)


def test_as_a_module_it_does_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine:
        mine.shutdown(socket.SHUT_WR)
        monkeypatch.setattr(sys, "argv", ["holder", str(theirs.detach()), "-1", "0"])
        monkeypatch.delitem(sys.modules, holder.__name__)
        runpy.run_module(holder.__name__, run_name="__main__")
        assert mine.recv(100) == holder.READY


def test_what_the_routes_close_is_closed_after_the_gateway_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bytes]] = []

    def ioctl(_file: object, request: int, data: bytes) -> bytes:
        asked.append((request, data))
        return data

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(holder, "Interface", lambda control, name: _Interface(name, asked))
    reading, writing = os.pipe()
    os.close(holder.open_uplink(writing))
    os.close(reading)
    os.close(writing)
    assert asked[0] == (0x400454CA, struct.pack("16sH22x", b"uplink", 0x1002))
    assert [word for _, word in asked[1:4]] == [b"address", b"up", b"route 0.0.0.0 10.0.2.2"]
    closed = [
        (socket.inet_ntoa(data[12:16]), socket.inet_ntoa(data[44:48]), struct.unpack_from("=H", data, 56)[0])
        for _, data in asked[4:]
    ]
    assert ("169.254.0.0", "255.255.0.0", 0x201) in closed
    assert ("10.0.2.0", "255.255.255.128", 0x201) in closed


class _Interface:
    """Notes what it is asked for."""

    def __init__(self, name: str, asked: list[tuple[int, bytes]]) -> None:
        assert name == "uplink"
        self._asked = asked

    def set_address(self, address: str, netmask: str) -> None:
        assert (address, netmask) == ("10.0.2.15", "255.255.255.0")
        self._asked.append((0, b"address"))

    def set_up(self) -> None:
        self._asked.append((0, b"up"))

    def add_route(self, destination: str, _netmask: str, gateway: str) -> None:
        self._asked.append((0, f"route {destination} {gateway}".encode()))
