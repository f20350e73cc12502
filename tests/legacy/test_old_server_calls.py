"""What a Go server says and is told, call by call."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.bootstrap import bootstrap
from firebuild_bootstrap.guest.errors import GuestError, ServerLost
from firebuild_bootstrap.guest.stream import BATCH_BYTES
from firebuild_bootstrap.legacy.old_server import OldServer
from firebuild_bootstrap.legacy.scripts import encode_command
from guest.build import Build, copy_command, make_block, make_image, run_command
from guest.local import Local
from guest.pki import Pki
from guest.server import BuildServer, Log, chunk, head

ROOT = pytest.mark.root
SANDBOX = pytest.mark.needs("bwrap", "busybox")
EOF = pb.ResourceChunk(eof=pb.ResourceChunk.ResourceEof(id="other"))


@pytest.fixture
def local(pki: Pki, server: BuildServer, tmp_path: Path) -> Iterator[Local]:
    server.old = True
    local = Local(pki, server, make_image(tmp_path / "image", busybox=False))
    yield local
    local.close()


def file(name: str = "f", data: bytes = b"", **fields: Any) -> list[pb.ResourceChunk]:
    return [head(name, **fields), *([chunk(data, "any")] if data else []), EOF]


@SANDBOX
def test_an_old_server_gets_lines_of_text_and_no_events(build: Build) -> None:
    document = {
        "OriginalCommand": "RUN x",
        "Command": r"printf 'one\ntwo\377\n'; printf 'er' >&2; printf rest",
        "Shell": {"OriginalCommand": "", "Commands": ["/bin/sh", "-c"]},
        "Env": {"A": "1"},
        "Args": {},
        "Workdir": {"OriginalCommand": "", "Value": "/"},
        "User": {"OriginalCommand": "", "Value": "0:0"},
    }
    build.succeed(json.dumps(document))
    lines = {name: [] for name in ("stdout", "stderr")}  # type: dict[str, list[str]]
    for log in build.server.logs:
        lines[log.stream] += log.lines
    assert lines == {"stdout": ["one", "two\ufffd", "rest"], "stderr": ["er"]}


def test_an_old_server_gets_a_long_line_in_pieces(local: Local) -> None:
    local.server.commands = []
    with local.calls() as host:
        assert list(host.steps()) == []
        for _ in range(3):
            host.write(0, "stdout", b"x" * BATCH_BYTES)
        host.write(0, "stdout", "é".encode()[:1])
        host.finished(0, 0, 0.0)
    text = "".join(line for log in local.server.logs for line in log.lines)
    assert text == "x" * 3 * BATCH_BYTES + "\ufffd"
    assert max(len(line) for log in local.server.logs for line in log.lines) <= 2 * BATCH_BYTES


# --- files ----------------------------------------------------------------------------------------


@ROOT
def test_headers_say_where_files_go(local: Local) -> None:
    local.copy(
        [
            *file("src", isDir=True, targetPath="/t/dir", fileMode=0o700 | 1 << 31),
            *file("src/a", b"A", targetPath="/t/dir/a", fileMode=0o755 | 1 << 23, targetUser="7:8"),
            *file("src/b", b"B", targetPath="rel", targetWorkdir="/w"),
            *file("src/c", b"C", targetPath="/t/dir"),
            *file("src/d", b"D", targetPath="/t/"),
        ],
        "/t",
    )
    assert local.tree() == {
        "t": "dir",
        "t/dir": "dir",
        "t/dir/a": "A",
        "w": "dir",
        "w/rel": "B",
        "t/dir/c": "C",
        "t/d": "D",
    }
    assert (local.mode("t/dir/a"), local.owner("t/dir/a"), local.mode("t/dir")) == (0o4755, (7, 8), 0o700)
    assert (local.owner("t"), local.owner("w")) == ((0, 0), (0, 0))
    assert [(request.path, request.stage) for request in local.server.requests] == [("files", "")]


@pytest.mark.root
def test_go_file_modes_carry_setgid_and_sticky_elsewhere(local: Local) -> None:
    local.copy(file(targetPath="/f", fileMode=0o750 | 1 << 22 | 1 << 20), "/f")
    assert local.mode("f") == 0o3750


@ROOT
def test_a_target_is_cleaned_before_links_are_followed(local: Local) -> None:
    (local.image / "x/y").mkdir(parents=True)
    (local.image / "a").symlink_to("x/y")
    local.copy(file("f", b"F", targetPath="/a/../g"), "/a/../g", source="files")
    assert local.tree()["g"] == "F"


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([head(), chunk(b"x", checksum=b"0" * 32), EOF], "checksum"),
        ([head(), chunk(b"x", checksum=b""), EOF], "checksum"),
        ([head(), chunk(b"x")], "in the middle"),
        ([head()], "in the middle"),
        ([chunk(b"x")], "chunk where the header"),
        ([EOF], "eof where the header"),
        ([pb.ResourceChunk()], "nothing where the header"),
        ([head(), chunk(b"x"), head("g")], "header before the end"),
        ([head(), pb.ResourceChunk()], "nothing before the end"),
        ([head("a\0b"), EOF], "a path with a NUL"),
        ([head(targetPath="/x\0y"), EOF], "a path with a NUL"),
        ([head(), chunk(bytes(wire.MAX_CHUNK_BYTES + 1)), EOF], "a chunk has 3774874 bytes"),
        ([head(), chunk(bytes(wire.MAX_MESSAGE_BYTES)), EOF], "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_broken_stream_is_an_error_and_leaves_what_was_there(
    local: Local, chunks: list[pb.ResourceChunk], words: str
) -> None:
    (local.image / "t").write_text("old")
    error = local.refused(chunks, "/t")
    assert words in error.message
    assert error.reason == "protocol"
    assert local.tree() == {"t": "old"}


# --- how it ends ----------------------------------------------------------------------------------


@SANDBOX
def test_a_ping_that_fails_now_and_then_is_forgiven(build: Build) -> None:
    def moody(context: grpc.ServicerContext) -> None:
        if len(build.server.pings) % 3:
            context.abort(grpc.StatusCode.INTERNAL, "not now")

    build.server.on_ping = moody
    build.server.old = True
    build.ping_interval = 0.05
    build.succeed(run_command("sleep 1.2"))
    assert len(build.server.pings) > 9
    assert len(set(build.server.pings)) == len(build.server.pings)


@ROOT
def test_pings_continue_during_a_copy_and_their_loss_ends_it(local: Local, pki: Pki) -> None:
    def endless(context: grpc.ServicerContext) -> Iterator[pb.ResourceChunk]:
        yield head()
        yield chunk(b"x")
        while context.is_active():
            time.sleep(0.05)

    local.server.resources["files"] = endless
    local.server.commands = [copy_command("/f")]
    local.server.on_ping = lambda context: context.abort(grpc.StatusCode.INTERNAL, "gone")
    with pytest.raises(ServerLost, match="3 pings"):
        bootstrap(make_block(pki, local.server, ping_interval=0.05), str(local.image))
    assert local.tree() == {}
    assert ["3 pings" in abort.error for abort in local.server.aborts] == [True]


def test_a_server_that_sends_nothing_more_is_lost(local: Local) -> None:
    over = threading.Event()

    def stall(_: grpc.ServicerContext) -> Iterator[pb.ResourceChunk]:
        yield head()
        over.wait(20)

    local.client.call_timeout = 0.5
    error = local.refused(stall)
    over.set()
    assert "the server sent nothing of 'files' for 0.5 s" in error.message
    assert error.exit_status == 4


def test_the_guests_own_work_on_a_file_does_not_count(local: Local) -> None:
    local.client.call_timeout = 0.5
    local.server.resources["files"] = [*file("f", b"x", targetPath="/f"), *file("g", b"y", targetPath="/g")]
    local.server.commands = [copy_command("/t")]
    taken = []
    with local.calls() as host:
        for step in host.steps():
            time.sleep(0.4)
            taken += (
                [each.entry.path for each in host.files("files")]
                if isinstance(step, wire.CopyCommand)
                else []
            )
    assert taken == ["f", "g"]


def test_a_server_that_takes_no_output_is_lost(local: Local) -> None:
    over = threading.Event()
    local.server.on_log = lambda message: over.wait(20)
    local.client.call_timeout = 0.3
    with local.calls() as host, pytest.raises(ServerLost) as caught:
        host.write(0, "stdout", b"line\n")
    over.set()
    assert caught.value.message == "the server did not take the output within 0.3 s"
    assert local.stop.reason is caught.value


def test_a_server_that_refuses_output_ends_the_build(local: Local) -> None:
    def refuse(_: Log) -> None:
        raise RuntimeError("disk full")

    local.server.on_log = refuse
    with local.calls() as host, pytest.raises(ServerLost, match="no longer takes output: UNKNOWN"):
        host.write(0, "stdout", b"line\n")


def test_a_writer_that_waits_for_a_stuck_server_is_released_by_the_end(local: Local) -> None:
    stuck = threading.Event()
    local.server.on_log = lambda message: stuck.wait(10)
    threading.Timer(0.5, lambda: local.stop.set(ServerLost("gone"))).start()
    with local.calls() as host, pytest.raises(ServerLost, match="gone"):
        host.write(2, "stdout", b"line\n")
    stuck.set()


def test_the_end_of_the_connection_is_told_in_words(local: Local) -> None:
    with local.calls() as host:
        local.client.close()
        with pytest.raises(ServerLost, match="the connection to the server was closed"):
            host.success()
        assert not host.ping("1", 1)
        assert not host.abort(GuestError("x"))


def test_a_success_that_the_server_does_not_take_is_an_error(local: Local) -> None:
    with local.calls() as host:
        local.server.stop()
        with pytest.raises(ServerLost, match="did not take the success"):
            host.success()


def test_an_error_with_a_name_that_is_not_utf8_can_be_reported(local: Local) -> None:
    with local.calls() as host:
        assert host.abort(GuestError("b\udcffad"))
    assert [abort.error for abort in local.server.aborts] == ["b?ad"]


class Garbled(BuildServer):
    """Answers with bytes that are not messages, but for some calls."""

    def _handlers(self) -> grpc.GenericRpcHandler:
        def commands(_request: bytes, _context: grpc.ServicerContext) -> bytes:
            texts = [text for text in self.commands if isinstance(text, str)]
            return pb.CommandsResponse(command=texts).SerializeToString() if texts else b"\xff"

        def garbled(_request: bytes, _context: grpc.ServicerContext) -> bytes:
            return b"\xff"

        def stream(_request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
            yield b"\xff"

        methods: dict[str, Any] = {
            "Commands": grpc.unary_unary_rpc_method_handler(commands),
            "Ping": grpc.unary_unary_rpc_method_handler(garbled),
            "Resource": grpc.unary_stream_rpc_method_handler(stream),
        }
        return grpc.method_handlers_generic_handler(wire.SERVICE, methods)


def test_bytes_that_are_no_messages_end_the_build_in_words(pki: Pki, tmp_path: Path) -> None:
    server = Garbled(pki).start()
    local = Local(pki, server, make_image(tmp_path / "image", busybox=False))
    with pytest.raises(GuestError, match="what is not a CommandsResponse"), local.calls():
        pass
    server.commands = [encode_command(copy_command("/f"))]
    with local.calls() as host, pytest.raises(GuestError, match="what is not a ResourceChunk"):
        list(host.steps())
    server.commands = [encode_command(run_command("true"))]
    with OldServer(local.client, local.stop, 0.05):
        assert local.stop.wait(10)
    assert "what is not a PingResponse" in str(local.stop.reason)
    local.close()
    server.stop()
