"""What errors say of themselves, and what is kept of a step's output."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import (
    BuildTimeout,
    ExitStatus,
    FirebuildError,
    GuestLost,
    InputError,
    Interrupted,
    Location,
    MachineError,
    OutputError,
    StepFailed,
    exit_status_of,
    hint_before,
)
from firebuild_bootstrap.events import Event, EventBus, Notice, StepOutput
from firebuild_bootstrap.failures import explained, with_remedy
from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.machine.local import LocalMachine
from firebuild_bootstrap.machine.usernet import UserNetwork
from firebuild_pki import IdentityError, ProviderError, SettingsError
from firebuild_pki.errors import Problem


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StepFailed("x"), 1),
        (InputError("x"), 2),
        (SettingsError([Problem("f", 1, 2, "a.b", "x")]), 2),
        (IdentityError("x"), 2),
        (ProviderError("x"), 3),
        (GuestLost("x"), 4),
        (BuildTimeout("x"), 5),
        (MachineError("x"), 6),
        (FirebuildError("x"), 70),
        (ValueError("x"), 70),
        (FileNotFoundError(2, "No such file or directory"), 70),
        (RuntimeError("can't start new thread"), 6),
        (MemoryError(), 6),
        (ImportError("x.so: failed to map segment from shared object"), 6),
        (ImportError("No module named x"), 70),
        (OutputError("x"), 74),
        (Interrupted("x"), 130),
    ],
)
def test_every_kind_of_error_has_its_exit_status(error: BaseException, status: int) -> None:
    assert exit_status_of(error) == status


@pytest.mark.parametrize(
    ("hint", "joined"),
    [(None, "go"), ("", "go"), ("log in", "log in; go"), ("is it right?", "is it right? go")],
)
def test_hints_are_joined_as_sentences(hint: str | None, joined: str) -> None:
    assert f"{hint_before(hint)}go" == joined


class OneMachine(Machine):
    """A machine of which only its advice is asked."""

    listen = prepare = start = wait = stop = tree = keep = close = None  # type: ignore[assignment]

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("message", "output", "hint"),
    [
        ("status 1", ["cat: x: No such file"], ""),
        ("status 1", ["dd: No space left on device"], "machine.disk_size"),
        ("/proc: Read-only file system", [], "`mount -o remount,rw /`"),
        ("status 1", ["sh: cannot create /x: Read-only file system"], ""),
        ("status 6", ["curl: (6) Could not resolve host: example.org"], "/etc/resolv.conf"),
        ("status 100", ["W: Temporary failure resolving 'deb.example'", "E: failed"], "/etc/resolv.conf"),
        ("status 1", ["connect: Network is unreachable"], "/etc/resolv.conf"),
        ("status 1", ["wget: bad address 'example.org'"], "/etc/resolv.conf"),
    ],
)
def test_what_a_step_says_of_its_machine_has_a_remedy(message: str, output: list[str], hint: str) -> None:
    found = with_remedy(StepFailed(message), OneMachine(), output).hint
    assert hint in (found or "")
    assert bool(hint) == bool(found)


class OneSandbox(OneMachine):
    no_network = LocalMachine.no_network
    no_port = LocalMachine.no_port
    no_device = LocalMachine.no_device
    _network: UserNetwork | None = None


_PORTS = "the ports of this host"


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        (["[emerg] 3#3: bind() to 0.0.0.0:80 failed (13: Permission denied)", "test failed"], _PORTS),
        (["(13)Permission denied: AH00072: make_sock: could not bind to address [::]:80"], _PORTS),
        (["Bind to port 22 on :: failed: Permission denied.", "Cannot bind any address."], _PORTS),
        (["listen tcp :80: bind: permission denied"], _PORTS),
        (["Error: listen EACCES: permission denied 0.0.0.0:80"], _PORTS),
        (["Caused by: java.net.BindException: Permission denied"], _PORTS),
        (
            ["    self.socket.bind(self.server_address)", "PermissionError: [Errno 13] Permission denied"],
            _PORTS,
        ),
        (["    s.bind(('', 80))", "    ^^^^^", "PermissionError: [Errno 13] Permission denied"], _PORTS),
        (['could not bind IPv4 address "127.0.0.1": Address already in use'], _PORTS),
        (["Error: listen EADDRINUSE: address already in use :::3000"], _PORTS),
        (["mknod: /dev/loop0: Operation not permitted"], "device nodes"),
        (["mknod: '/x': Operation not permitted", "E: failed"], "device nodes"),
        (['sudo: The "no new privileges" flag is set, which prevents sudo from …'], "USER root"),
        (["sudo: effective uid is not 0, is /usr/bin/sudo on a file system with …"], "USER root"),
        (["doas: not installed setuid"], "USER root"),
        (["PermissionError: [Errno 13] Permission denied: 'x'", "binding.gyp not found"], ""),
        (["touch: /x: Operation not permitted"], ""),
    ],
)
def test_what_a_container_can_do_and_a_sandbox_can_not_has_a_remedy(output: list[str], hint: str) -> None:
    found = with_remedy(StepFailed("status 1"), OneSandbox(), output).hint
    assert hint in (found or "")
    assert bool(hint) == bool(found)
    # A virtual machine lets its root do that.
    found = with_remedy(StepFailed("status 1"), OneMachine(), output).hint
    assert bool(found) == (hint == "USER root")


def test_a_step_with_a_loopback_of_its_own_hears_nothing_of_the_ports_of_the_host() -> None:
    output = ["bind: Address already in use"]
    assert with_remedy(StepFailed("x"), OneSandbox(), output, networked=False).hint is None


def test_a_step_with_a_network_of_its_own_is_told_what_that_reaches_and_not_of_the_ports_of_the_host() -> (
    None
):
    sandbox = OneSandbox()
    with closing(UserNetwork(Path("slirp4netns"))) as sandbox._network:
        assert with_remedy(StepFailed("x"), sandbox, ["bind: Address already in use"]).hint is None
        hint = with_remedy(StepFailed("x"), sandbox, ["Network is unreachable"]).hint or ""
    assert "but for its loopback and link-local addresses (machine.local.network: user)" in hint


def test_a_step_that_asked_for_no_network_or_lacks_a_secret_is_told_so() -> None:
    failed = with_remedy(StepFailed("x"), OneMachine(), ["Network is unreachable"], networked=False)
    assert failed.hint == "the step has no network: it says --network=none"
    lacking = with_remedy(StepFailed("x"), OneMachine(), absent=["--secret id=a", "--ssh b"])
    assert (lacking.hint or "").endswith("give --secret id=a; --ssh b")
    assert with_remedy(StepFailed("x", hint="y"), OneMachine(), ["No space left on device"]).hint == "y"


def test_exit_statuses_are_those_that_are_documented() -> None:
    assert sorted(ExitStatus) == [0, 1, 2, 3, 4, 5, 6, 7, 70, 74, 130]


@pytest.mark.parametrize(
    ("location", "text"),
    [(Location("f"), "f"), (Location("f", 2), "f:2"), (Location("f", 2, 3), "f:2:3")],
)
def test_a_location_is_written_as_editors_read_it(location: Location, text: str) -> None:
    assert str(location) == text


def test_an_error_names_place_message_and_hint() -> None:
    error = InputError("no such thing", hint="look again", location=Location("f", 2))
    assert str(error) == "f:2: no such thing\n  hint: look again"
    assert (error.message, error.hint) == ("no such thing", "look again")
    assert str(InputError("plain")) == "plain"


def test_an_interruption_is_no_exception_that_a_handler_of_errors_would_catch() -> None:
    assert not isinstance(Interrupted("x"), Exception)


def test_a_failure_of_no_step_comes_back_as_it_is() -> None:
    error = StepFailed("the guest could not begin")
    assert explained(error, (), 3, Path("Dockerfile"), []) is error


def piece(data: bytes, step: int = 2) -> StepOutput:
    return StepOutput(step=step, stream="stdout", data=data)


def test_the_bus_passes_everything_on_in_order() -> None:
    seen: list[Event] = []
    bus = EventBus(seen.append)
    events = [piece(b"a"), Notice(level="info", message="x"), piece(b"b")]
    for event in events:
        bus(event)
    assert seen == events


def test_the_bus_keeps_the_last_lines_of_each_step() -> None:
    bus = EventBus(lambda _: None)
    for number in range(100):
        bus(piece(f"line {number}\n".encode()))
    bus(piece(b"other", step=3))
    assert bus.last_lines(2) == [f"line {number}" for number in range(85, 100)]
    assert bus.last_lines(3) == ["other"]
    assert bus.last_lines(4) == []


def test_the_bus_joins_pieces_that_break_anywhere() -> None:
    bus = EventBus(lambda _: None)
    for data in ("grö".encode()[:3], "grö".encode()[3:], b"sse\nnext"):
        bus(piece(data))
    assert bus.last_lines(2) == ["grösse", "next"]


def test_the_bus_takes_no_more_room_than_it_needs() -> None:
    bus = EventBus(lambda _: None)
    bus(piece(b"x" * 1_000_000))
    [line] = bus.last_lines(2)
    assert len(line) == 16 * 1024


def test_the_tail_shows_nothing_that_could_move_a_cursor() -> None:
    bus = EventBus(lambda _: None)
    bus(piece(b"\x1b[2J\xff\x07end\ttab\n"))
    assert bus.last_lines(2) == ["\\x1b[2J\\xff\\x07end       tab"]
