"""What an old guest gets for its calls, over real mutual TLS, and what holds for every guest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.events import (
    Event,
    GuestConnected,
    StepOutput,
)
from firebuild_bootstrap.failures import located
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.service import Limits, StepInfo
from firebuild_pki import open_authority
from service.conftest import file_entry
from support import ending_of


@dataclasses.dataclass(frozen=True)
class Parcel:
    content: tuple[Entry, ...]

    def entries(self) -> Any:
        yield from self.content


def entry_of(kind: tar.Kind, path: str, **changes: Any) -> Entry:
    entry = Entry(source=path, path=path, kind=kind, mode=0o755, mtime_ns=0, from_directory=True)
    return dataclasses.replace(entry, **changes)


RUN = wire.RunCommand(step=2, original="RUN true", argv=("true",))


def test_material_of_the_default_authority_is_all_that_a_build_needs(serve: Any) -> None:
    with open_authority(build_id="b7") as authority:
        running = serve(materials=(authority.issue_server(), authority.issue_guest()))
        assert running.caller().ping("hello") == "hello"
    (connected,) = running.events
    assert isinstance(connected, GuestConnected)
    assert connected.tls_version == "TLSv1.3"
    assert connected.peer.startswith("127.0.0.1:")


def test_a_guest_may_ping_before_it_asks_for_the_commands(serve: Any) -> None:
    guest = serve(commands=[RUN]).caller()
    assert guest.ping("1") == "1"
    assert [json.loads(text)["OriginalCommand"] for text in guest.commands()][1:] == ["RUN true"]


def test_the_guest_is_welcomed_once_and_before_its_first_call_is_answered(serve: Any) -> None:
    welcomed: list[float] = []

    def welcome() -> None:
        time.sleep(0.3)
        welcomed.append(time.monotonic())

    running = serve(on_guest_connected=welcome)
    guest = running.caller()
    answered: list[float] = []

    def call() -> None:
        guest.ping()
        answered.append(time.monotonic())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guest.commands()
    assert len(welcomed) == 1
    assert len(answered) == 4
    assert min(answered) > welcomed[0]
    assert len(running.of(GuestConnected)) == 1


@pytest.mark.parametrize("error", [MachineError("the metadata could not be wiped"), OSError("no socket")])
def test_a_failing_welcome_ends_the_build_before_any_command_is_told(serve: Any, error: Exception) -> None:
    def welcome() -> None:
        raise error

    running = serve(on_guest_connected=welcome)
    with pytest.raises(grpc.RpcError) as refused:
        running.caller().commands()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    outcome = running.outcome()
    assert ending_of(outcome) == "server-error"
    assert str(error) in outcome.message
    with pytest.raises(FirebuildError):
        outcome.raise_for_failure()


def test_a_resource_arrives_complete_with_checksums(serve: Any, tmp_path: Path) -> None:
    large = os.urandom(2 * wire.CHUNK_BYTES + 5)
    path = tmp_path / "large"
    path.write_bytes(large)
    entries = (
        entry_of(tar.DIRECTORY, "d"),
        entry_of(tar.FILE, "d/large", size=len(large), open=lambda: path.open("rb")),
        file_entry("d/empty", b"", from_directory=True),
    )
    running = serve(parcels={"step-2": Parcel(entries)})
    guest = running.caller()
    assert [json.loads(command).get("Source") for command in guest.commands()] == [None, "step-2/1", None]
    chunks = list(guest.resource("step-2/1"))
    assert [chunk.WhichOneof("payload") for chunk in chunks] == [
        *("header", "eof") * 3,
        *("header", "chunk", "chunk", "chunk", "eof"),
        *("header", "eof"),
        *("header", "chunk", "eof") * 2,
    ]
    headers = [chunk.header for chunk in chunks if chunk.HasField("header")]
    ends = [chunk.eof.id for chunk in chunks if chunk.HasField("eof")]
    assert [header.id for header in headers] == ends
    assert len(set(ends)) == 7
    contents = [chunk.chunk for chunk in chunks if chunk.HasField("chunk")]
    assert all(part.checksum == hashlib.sha256(part.chunk).digest() for part in contents)
    assert max(len(part.chunk) for part in contents) <= wire.MAX_CHUNK_BYTES
    assert b"".join(part.chunk for part in contents if part.id == headers[3].id) == large
    # Places that such a guest can't misunderstand.
    root = headers[0].targetPath
    assert root.startswith("/.firebuild-")
    assert [header.targetPath.removeprefix(root) for header in headers] == [
        *("", "/0", "/0/d", "/0/d/large", "/0/d/empty", "/sums", "/place"),
    ]
    for header in headers:
        assert (header.sourcePath, header.targetWorkdir) == (header.targetPath, "/")
        assert (header.targetUser, header.fileMode) == ("0:0", 0o700 if header.isDir else 0o600)


@pytest.mark.parametrize(
    ("method", "request_bytes", "words"),
    [
        ("Commands", b"\xff", "bytes that are not a message Empty"),
        ("StdOut", b"\x0a\xff", "bytes that are not a message LogMessage"),
        ("StdErr", b"\x0a\x01\xff", "bytes that are not a message LogMessage"),
        ("Resource", b"\x0a\x05", "bytes that are not a message ResourceRequest"),
        ("Ping", pb.PingRequest(id="x" * 140_000).SerializeToString(), "PingRequest of 140004 bytes; 131072"),
    ],
)
def test_a_request_that_nobody_can_read_ends_the_build_in_words(
    serve: Any, capfd: pytest.CaptureFixture[str], method: str, request_bytes: bytes, words: str
) -> None:
    running = serve()
    raw: Any = running.caller().channel.unary_stream(wire.method(method))
    with pytest.raises(grpc.RpcError, match=words) as refused:
        list(raw(request_bytes, timeout=10))
    assert refused.value.code() is grpc.StatusCode.ABORTED
    assert words in running.outcome().message
    assert capfd.readouterr().err == ""


def test_output_comes_whole_and_in_pieces_that_a_receiver_can_hold(serve: Any) -> None:
    running = serve(commands=[RUN])
    text = "".join(f"{number:09d}\n" for number in range(300_000))
    running.caller().say(text)
    pieces = [event.data for event in running.of(StepOutput)]
    assert b"".join(pieces) == text.encode()
    assert max(map(len, pieces)) <= 256 * 1024


def test_a_guest_may_ask_for_the_commands_again_and_again(serve: Any) -> None:
    guest = serve(commands=[]).caller()
    assert [guest.commands() for _ in range(20)] == [guest.commands()] * 20


def test_an_old_guest_that_asks_for_files_before_commands_ends_the_build(serve: Any) -> None:
    running = serve(parcels={"step-2": Parcel((file_entry("f", b"x"),))})
    with pytest.raises(grpc.RpcError, match="before it asked for commands"):
        list(running.caller().resource("step-2"))
    assert ending_of(running.outcome()) == "server-error"


def test_success_ends_the_build_and_every_later_call_is_refused(serve: Any) -> None:
    running = serve()
    guest = running.caller()
    guest.success()
    outcome = running.outcome()
    assert ending_of(outcome) == "success"
    assert outcome.message == ""
    outcome.raise_for_failure()
    for call in (guest.ping, guest.success, guest.commands, lambda: list(guest.resource("x"))):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert running.outcome() is outcome


def test_the_end_of_the_build_ends_a_running_transfer(serve: Any) -> None:
    parcel = Parcel(tuple(file_entry(str(n), bytes(wire.CHUNK_BYTES)) for n in range(16)))
    running = serve(parcels={"step-2": parcel})
    guest = running.caller()
    guest.commands()
    stream = guest.resource("step-2/1")
    next(iter(stream))
    guest.abort("enough")
    with pytest.raises(grpc.RpcError) as ended:
        list(stream)
    assert ended.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "enough" in running.outcome().message


def test_a_receiver_of_events_that_fails_ends_the_build(serve: Any) -> None:
    received: list[Event] = []

    def sink(event: Event) -> None:
        received.append(event)
        if isinstance(event, StepOutput):
            raise BrokenPipeError(32, "Broken pipe")

    running = serve(events=sink, limits=Limits(max_log_bytes=1), commands=[RUN])
    running.caller().say("ab")
    outcome = running.outcome()
    assert ending_of(outcome) == "server-error"
    assert "Broken pipe" in outcome.message
    assert [type(event) for event in received] == [GuestConnected, StepOutput]


def test_messages_above_the_limit_are_refused(serve: Any) -> None:
    running = serve()
    with pytest.raises(grpc.RpcError) as refused:
        running.caller().say("x" * (wire.MAX_MESSAGE_BYTES + 1))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert running.of(StepOutput) == []


def test_commands_and_resources_have_to_fit_together(serve: Any) -> None:
    with pytest.raises(ValueError, match="step-2"):
        serve(commands=[], parcels={"step-2": Parcel(())})


# --- mounts -----------------------------------------------------------------------------------------


MOUNTED = dataclasses.replace(
    RUN,
    mounts=(
        wire.BindMount(target="/a", resource="step-2-mount-1"),
        wire.SecretMount(resource="step-2-mount-2", env="TOKEN"),
        wire.TmpfsMount(target="/t"),
    ),
)


def test_a_mount_without_its_resource_is_a_mistake_of_the_caller(serve: Any) -> None:
    with pytest.raises(ValueError, match="step-2-mount-1, step-2-mount-2"):
        serve(commands=[MOUNTED])


@pytest.mark.parametrize("changes", [{"mounts": (wire.TmpfsMount(target="/t"),)}, {"network": "none"}])
def test_a_guest_that_would_ignore_mounts_never_hears_of_the_command(
    serve: Any, changes: dict[str, Any]
) -> None:
    running = serve(commands=[dataclasses.replace(RUN, **changes)])
    with pytest.raises(grpc.RpcError) as caught:
        running.caller().commands()
    assert caught.value.code() is grpc.StatusCode.ABORTED
    error = running.outcome().error
    assert isinstance(error, InputError)
    assert "too old for this Dockerfile: step 2 has --mount or --network" in str(error)
    assert str(located(error, running.outcome().step, [StepInfo(2, 7, "RUN x")], Path("D"))).startswith(
        "D:7: "
    )
