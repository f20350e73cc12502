"""A whole build as vminit sees it: joining it, losing it, and how it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest import bootstrap as guest_bootstrap
from firebuild_bootstrap.guest.bootstrap import bootstrap, read_block, set_clock
from firebuild_bootstrap.guest.errors import GuestError, InputError, Interrupted, ServerLost
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.sandbox import Bind
from guest.build import Build, copy_command, make_block, run_command, workdir_command
from guest.pki import Pki
from guest.server import BuildServer, a_file, group, member, piece

ROOT = pytest.mark.root
SANDBOX = pytest.mark.needs("bwrap", "busybox")


@pytest.fixture
def image(tmp_path: Path) -> str:
    (tmp_path / "image").mkdir()
    return str(tmp_path / "image")


def put(server: BuildServer, *commands: wire.AnyCommand | pb.ToGuest) -> None:
    server.commands = list(commands)


# --- from start to end ----------------------------------------------------------------------------


@ROOT
def test_a_build_ends_in_one_success_after_all_output(pki: Pki, server: BuildServer, image: str) -> None:
    server.resources["files"] = a_file("f", b"content")
    put(server, workdir_command("/w", step=2), copy_command("/f", step=3))
    bootstrap(make_block(pki, server), image, sync=True)
    assert (server.successes, server.aborts) == (1, [])
    assert (Path(image) / "f").read_text() == "content"
    assert [event[:2] for event in server.events] == [
        (2, "STARTED"), (2, "FINISHED"), (3, "STARTED"), (3, "FINISHED")
    ]  # fmt: skip
    assert server.calls == ["Session"]


@ROOT
def test_a_failed_step_is_reported_once_with_everything_known(
    pki: Pki, server: BuildServer, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.resources["files"] = a_file("f", b"content")
    put(server, copy_command("/f", step=7, chown="nobody-here"))
    usual, said = signal.getsignal(signal.SIGTERM), list[tuple[str, bool]]()

    def complain(text: str) -> None:
        said.append((text, signal.getsignal(signal.SIGTERM) is usual))

    monkeypatch.setattr(guest_bootstrap, "complain", complain)
    with pytest.raises(GuestError) as failed:
        bootstrap(make_block(pki, server), image)
    # Who was told may end this process at once: it must not die of that before it has said why.
    assert said == [(failed.value.message, False)]
    assert failed.value.told
    [abort] = server.aborts
    assert (abort.step, abort.exit_code, abort.reason) == (7, 0, "file")
    assert "nobody-here" in abort.error
    assert server.successes == 0


@ROOT
@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.ToGuest(workdir=pb.Workdir()), "a step that can't be read: a step has the number 0"),
        (pb.ToGuest(files_end=pb.FilesEnd()), "the server sent files_end where a step was due"),
        (piece(b"x"), "the server sent files where a step was due"),
        (pb.ToGuest(), "the server sent nothing where a step was due"),
    ],
)
def test_what_is_no_step_ends_the_session_with_a_word(
    pki: Pki, server: BuildServer, image: str, message: pb.ToGuest, words: str
) -> None:
    put(server, workdir_command("/made"), message, workdir_command("/never", step=3))
    with pytest.raises(GuestError, match=words):
        bootstrap(make_block(pki, server), image)
    assert [(abort.reason, words in abort.error) for abort in server.aborts] == [("protocol", True)]
    assert [path.name for path in Path(image).iterdir()] == ["made"]


@ROOT
def test_a_fault_of_vminit_itself_is_told_to_the_server(
    pki: Pki, server: BuildServer, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, workdir_command("/made"))
    monkeypatch.setattr("firebuild_bootstrap.guest.executor.Users", lambda root: 1 / 0)
    with pytest.raises(GuestError, match="ZeroDivisionError"):
        bootstrap(make_block(pki, server), image)
    assert [abort.reason for abort in server.aborts] == ["internal"]


def test_a_missing_root_is_an_error_before_the_server_is_called(pki: Pki, server: BuildServer) -> None:
    with pytest.raises(InputError, match="--root /no/such: there is no such directory"):
        bootstrap(make_block(pki, server), "/no/such")
    assert server.calls == []


# --- who is talked to -----------------------------------------------------------------------------


def refusal(block: wire.BootstrapBlock, image: str, connect_timeout: float = 20) -> ServerLost:
    started = time.monotonic()
    with pytest.raises(ServerLost) as caught:
        bootstrap(block, image, connect_timeout=connect_timeout)
    assert time.monotonic() - started < 10
    assert "PRIVATE KEY" not in str(caught.value)
    return caught.value


def test_a_server_of_a_strange_authority_is_refused_at_once(
    pki: Pki, server: BuildServer, image: str
) -> None:
    error = refusal(replace(make_block(pki, server), ca_chain=pki.stranger.pem.decode()), image)
    assert "the guest's clock says 20" in error.message
    assert (error.exit_status, server.calls) == (4, [])


def test_a_server_of_another_name_is_refused(pki: Pki, server: BuildServer, image: str) -> None:
    error = refusal(replace(make_block(pki, server), server_name="b-2.firebuild.internal"), image)
    assert "as b-2.firebuild.internal" in error.message
    assert server.calls == []


def test_a_guest_of_a_strange_authority_does_not_get_in(pki: Pki, server: BuildServer, image: str) -> None:
    pair = pki.stranger.issue("guest.b-1.firebuild.internal", server=False)
    block = replace(make_block(pki, server), cert=pair.cert.decode(), key=pair.key.decode())
    refusal(block, image, connect_timeout=1)
    assert server.calls == []


def test_a_server_that_refuses_the_guest_is_not_asked_again(
    pki: Pki, server: BuildServer, image: str
) -> None:
    server.on_commands = lambda context: context.abort(grpc.StatusCode.PERMISSION_DENIED, "not your build")
    assert "PERMISSION_DENIED: not your build" in refusal(make_block(pki, server), image).message
    assert len(server.calls) == 1


def test_nobody_there_is_an_error_after_a_while(pki: Pki, server: BuildServer, image: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        block = replace(make_block(pki, server), host_port=f"127.0.0.1:{free.getsockname()[1]}")
        error = refusal(block, image, connect_timeout=0.6)
    assert "UNAVAILABLE" in error.message
    assert "clock" not in error.message


@ROOT
def test_a_server_that_comes_up_later_is_found(pki: Pki, image: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers: list[BuildServer] = []
    timer = threading.Timer(0.5, lambda: servers.append(BuildServer(pki, port=port).start()))
    timer.start()
    unbound = BuildServer(pki)
    unbound.host_port = f"127.0.0.1:{port}"
    bootstrap(make_block(pki, unbound), image)
    timer.join()
    assert servers[0].successes == 1
    servers[0].stop()


@ROOT
def test_a_host_that_is_slow_to_answer_the_handshake_is_waited_for(
    pki: Pki, server: BuildServer, image: str
) -> None:
    host, port = server.host_port.rsplit(":", 1)

    def forward(source: socket.socket, target: socket.socket, delay: float) -> None:
        time.sleep(delay)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        for _ in range(2):  # the guest's own handshake, and gRPC's
            guest, _ = listener.accept()
            with guest, socket.create_connection((host, int(port))) as backend:
                upwards = threading.Thread(target=forward, args=(guest, backend, 0))
                upwards.start()
                forward(backend, guest, 1.0)
                upwards.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = threading.Thread(target=serve, args=(listener,))
        relay.start()
        block = replace(make_block(pki, server), host_port=f"127.0.0.1:{listener.getsockname()[1]}")
        bootstrap(block, image)
        relay.join()
    assert len(server.calls) >= 1
    assert server.successes == 1


@pytest.mark.parametrize("member", ["cert", "key", "ca_chain"])
def test_unusable_credentials_are_an_error_without_their_text(
    pki: Pki, server: BuildServer, image: str, member: str
) -> None:
    changes: dict[str, Any] = {member: "SECRETWORD"}
    with pytest.raises(GuestError) as caught:
        bootstrap(replace(make_block(pki, server), **changes), image, connect_timeout=0.5)
    assert "SECRETWORD" not in str(caught.value)


# --- losing the server ----------------------------------------------------------------------------


@SANDBOX
def test_a_lost_server_ends_the_running_command_and_vminit(build: Build) -> None:
    build.ping_interval = 0.1
    with build.start(run_command("echo up; sleep 300")) as running:
        build.server.wait_for(lambda: b"up" in build.server.stdout and len(build.server.pings) > 2)
        build.server.stop()
        outcome = running.finish(20)
    assert outcome.status == 4
    assert "vminit: the server ended the session: " in outcome.stderr


@ROOT
def test_a_host_that_falls_silent_is_noticed(
    pki: Pki, server: BuildServer, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firebuild_bootstrap.guest.client._LEAST_PATIENCE", 0.3)
    host, port = server.host_port.rsplit(":", 1)
    silent = threading.Event()

    def forward(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(65536)) and not silent.is_set():
                target.sendall(data)

    def serve(listener: socket.socket) -> None:
        for _ in range(2):  # the guest's own handshake, and gRPC's
            guest, _ = listener.accept()
            backend = socket.create_connection((host, int(port)))
            stack.enter_context(guest)
            stack.enter_context(backend)
            threading.Thread(target=forward, args=(backend, guest), daemon=True).start()
            threading.Thread(target=forward, args=(guest, backend), daemon=True).start()

    def stall(_: grpc.ServicerContext) -> Iterator[pb.ToGuest]:
        silent.set()
        yield group()

    server.resources["files"] = stall
    put(server, workdir_command("/d"), copy_command("/f", step=3))
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        block = replace(make_block(pki, server), host_port=f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ServerLost, match=r"the server ended the session: UNAVAILABLE: .*[Pp]ing"):
            bootstrap(replace(block, ping_interval=0.1), image)
    assert server.aborts == []


@ROOT
def test_a_success_that_the_server_does_not_take_is_an_error(pki: Pki, image: str) -> None:
    def refuse(context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "too late")

    server = BuildServer(pki).start()
    server.on_success = refuse
    with pytest.raises(ServerLost, match="did not take the success: FAILED_PRECONDITION: too late"):
        bootstrap(make_block(pki, server), image)
    server.stop()


# --- signals --------------------------------------------------------------------------------------


@ROOT
def test_a_signal_ends_a_copy_with_an_abort(pki: Pki, server: BuildServer, image: str) -> None:
    def endless(context: grpc.ServicerContext) -> object:
        yield group()
        yield piece(member("f", bytes(1000))[:600])
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        while context.is_active():
            time.sleep(0.02)
            yield piece(b"")

    server.resources["files"] = endless  # type: ignore[assignment]
    put(server, copy_command("/f"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT") as caught:
        bootstrap(make_block(pki, server), image)
    assert caught.value.exit_status == 130
    assert len(server.aborts) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_reason_to_stop_counts_and_late_comers_are_called_at_once() -> None:
    stop = Stop()
    called: list[int] = []
    stop.check()
    with stop.calling(lambda: called.append(1)):
        stop.set(Interrupted(15, "SIGTERM"))
        stop.set(Interrupted(2, "SIGINT"))
        with stop.calling(lambda: called.append(2)):
            pass
    assert called == [1, 2]
    assert stop.wait(5)
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop.check()
    stop.close()


# --- secrets and the block ------------------------------------------------------------------------


@SANDBOX
def test_the_private_key_is_in_no_output_and_no_file_of_the_image(build: Build, pki: Pki) -> None:
    secret = pki.guest.key.decode().splitlines()[1]
    search = "busybox find / -xdev -type f -exec busybox grep 'PRIVATE KEY' {} +"
    outcome = build.run(run_command(f"{search}; env; cat /proc/*/environ; false"))
    assert outcome.status == 1
    told = outcome.stderr + build.server.stdout.decode(errors="replace") + str(build.server.aborts)
    assert secret not in told
    files = [path for path in build.image.rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("missing", ["HostPort", "CAChain", "Cert", "Key", "ServerName"])
def test_an_incomplete_block_names_what_is_missing(pki: Pki, server: BuildServer, missing: str) -> None:
    document = make_block(pki, server).as_json()
    del document[missing]
    with pytest.raises(InputError, match=missing) as caught:
        read_block({"Bootstrap": document})
    assert "BEGIN" not in str(caught.value)


def test_no_block_means_no_build() -> None:
    with pytest.raises(InputError, match="no Bootstrap block"):
        read_block({})


def test_a_clock_that_is_behind_is_set_to_the_hosts() -> None:
    calls: list[tuple[int, float]] = []

    def adjust(clock: int, seconds: float) -> None:
        calls.append((clock, seconds))

    set_clock(1_900_000_000.0, now=lambda: 5.0, adjust=adjust)
    assert calls == [(time.CLOCK_REALTIME, 1_900_000_000.0)]
    set_clock(1_900_000_000.0, now=lambda: 1_900_000_500.0, adjust=adjust)
    set_clock(None, now=lambda: 5.0, adjust=adjust)
    assert len(calls) == 1


def test_a_clock_that_may_not_be_set_is_left_alone() -> None:
    def forbidden(clock: int, seconds: float) -> None:
        raise PermissionError(1, "Operation not permitted")

    set_clock(1_900_000_000.0, now=lambda: 5.0, adjust=forbidden)


# --- speed ----------------------------------------------------------------------------------------


def test_help_and_the_metadata_need_no_grpc() -> None:
    code = (
        "import sys; from firebuild_bootstrap.guest import main, metadata\n"
        "assert not {'grpc', 'google.protobuf', 'cryptography', 'pydantic'} & set(sys.modules)\n"
        "from firebuild_bootstrap.guest import bootstrap\n"
        "assert not {'cryptography', 'pydantic', 'click', 'yaml'} & set(sys.modules), 'too much'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@SANDBOX
def test_a_sandbox_without_the_image_is_an_error_in_words(build: Build, tmp_path: Path) -> None:
    build.extra_binds = [Bind(tmp_path / "outside", "/elsewhere")]
    build.arguments = ["--root", "/nothing-here"]
    outcome = build.run(run_command("true"))
    assert (outcome.status, outcome.stderr) == (
        2,
        "vminit: --root /nothing-here: there is no such directory\n",
    )
