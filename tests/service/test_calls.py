"""What a guest gets for its calls, over real mutual TLS."""

from __future__ import annotations

import dataclasses
import hashlib
import io
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
from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError, StepFailed
from firebuild_bootstrap.events import (
    Event,
    GuestConnected,
    Notice,
    StepFinished,
    StepOutput,
    StepStarted,
)
from firebuild_bootstrap.failures import located
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.legacy.handlers import HELLO
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
    command = wire.RunCommand(step=2, original="RUN true", argv=("/bin/sh", "-c", "true"))
    running = serve(commands=[command])
    guest = running.caller()
    assert guest.ping("1") == "1"
    assert [json.loads(text)["Argv"] for text in guest.commands()] == [[*command.argv]]


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


def test_a_resource_arrives_complete_with_checksums(serve: Any) -> None:
    large = os.urandom(2 * wire.CHUNK_BYTES + 5)
    entries = (
        entry_of(tar.DIRECTORY, "d"),
        file_entry("d/large", large, from_directory=True, mode=0o4755, mtime_ns=77),
        file_entry("d/empty", b"", from_directory=True),
        entry_of(tar.SYMLINK, "d/link", link_target="../etc"),
        entry_of(tar.HARDLINK, "d/hard", link_target="d/large", owner=(5, 6)),
    )
    running = serve(parcels={"step-2": Parcel(entries)})
    chunks = list(running.caller().resource("step-2"))
    assert [chunk.WhichOneof("payload") for chunk in chunks] == [
        *("header", "eof"),
        *("header", "chunk", "chunk", "chunk", "eof"),
        *("header", "eof"),
        *("header", "eof"),
        *("header", "eof"),
    ]
    contents = [chunk.chunk for chunk in chunks if chunk.HasField("chunk")]
    assert b"".join(part.chunk for part in contents) == large
    assert all(part.checksum == hashlib.sha256(part.chunk).digest() for part in contents)
    assert max(len(part.chunk) for part in contents) <= wire.MAX_CHUNK_BYTES
    headers = [chunk.header for chunk in chunks if chunk.HasField("header")]
    ends = [chunk.eof.id for chunk in chunks if chunk.HasField("eof")]
    assert [header.id for header in headers] == ends
    assert len(set(ends)) == 5
    assert {part.id for part in contents} == {headers[1].id}
    directory, big, _, link, hard = headers
    assert (directory.isDir, directory.kind) == (True, pb.ENTRY_KIND_DIRECTORY)
    assert (big.entryPath, big.size, big.mtimeNs, big.fileMode) == ("d/large", len(large), 77, 0o4755)
    assert (big.fromDirectory, big.keepOwner) == (True, False)
    assert (link.kind, link.linkTarget) == (pb.ENTRY_KIND_SYMLINK, "../etc")
    assert (hard.kind, hard.keepOwner, hard.uid, hard.gid) == (pb.ENTRY_KIND_HARDLINK, True, 5, 6)
    assert hard.targetUser == "5:6"


def test_a_build_without_size_limit_on_files_streams_them_from_disk(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(10 * wire.CHUNK_BYTES))
    entry = file_entry("file", b"", size=path.stat().st_size, open=lambda: path.open("rb"))
    running = serve(parcels={"step-2": Parcel((entry,))})
    digest = hashlib.sha256()
    for chunk in running.caller().resource("step-2"):
        digest.update(chunk.chunk.chunk)
    assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()


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
        list(raw(request_bytes, timeout=10, metadata=(HELLO,)))
    assert refused.value.code() is grpc.StatusCode.ABORTED
    assert words in running.outcome().message
    assert capfd.readouterr().err == ""


def test_output_comes_whole_and_in_pieces_that_a_receiver_can_hold(serve: Any) -> None:
    running = serve(steps=[StepInfo(2, 1, "RUN yes")])
    guest = running.caller()
    guest.out(os.urandom(3_000_000))
    guest.unary("StdErr", pb.LogMessage(line=["one", "two\n", "", "three"], step=2))
    pieces = [event for event in running.events if isinstance(event, StepOutput)]
    assert sum(len(piece.data) for piece in pieces[:-1]) == 3_000_000
    assert max(len(piece.data) for piece in pieces) <= 256 * 1024
    assert pieces[-1].data == b"one\ntwo\n\nthree\n"


def test_a_guest_may_ask_for_the_commands_again_and_again(serve: Any) -> None:
    guest = serve(commands=[]).caller()
    assert [guest.commands() for _ in range(20)] == [[]] * 20


def test_an_old_guest_is_told_places_that_it_can_not_misunderstand(serve: Any) -> None:
    entries = (entry_of(tar.DIRECTORY, "d"), file_entry("d/f", b"x", from_directory=True, mode=0o4755))
    running = serve(parcels={"step-2": Parcel(entries)})
    guest = running.caller(hello=False)
    sources = [json.loads(command).get("Source") for command in guest.commands()]
    assert sources == [None, "step-2/1", None]
    headers = [chunk.header for chunk in guest.resource("step-2/1") if chunk.HasField("header")]
    root = headers[0].targetPath
    assert root.startswith("/.firebuild-")
    assert [header.targetPath.removeprefix(root) for header in headers] == [
        *("", "/0", "/0/d", "/0/d/f", "/sums", "/place"),
    ]
    for header in headers:
        assert (header.sourcePath, header.targetWorkdir) == (header.targetPath, "/")
        assert (header.targetUser, header.fileMode) == ("0:0", 0o700 if header.isDir else 0o600)
        assert (header.kind, header.entryPath, header.size, header.mtimeNs) == (0, "", 0, 0)


def test_an_old_guest_that_asks_for_files_before_commands_ends_the_build(serve: Any) -> None:
    running = serve(parcels={"step-2": Parcel((file_entry("f", b"x"),))})
    with pytest.raises(grpc.RpcError, match="before it asked for commands"):
        list(running.caller(hello=False).resource("step-2"))
    assert ending_of(running.outcome()) == "server-error"


def test_a_guest_that_announces_itself_is_not_told_anything_else_because_an_old_one_called(
    serve: Any,
) -> None:
    running = serve(parcels={"step-2": Parcel((file_entry("f", b"x"),))})
    running.caller(hello=False).commands()
    guest = running.caller()
    assert [json.loads(command)["Source"] for command in guest.commands()] == ["step-2"]
    assert next(iter(guest.resource("step-2"))).header.entryPath == "f"


def gone() -> io.BytesIO:
    raise FileNotFoundError(2, "No such file or directory")


def forbidden() -> io.BytesIO:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"open": gone}, "f has vanished since the build began"),
        ({"open": forbidden}, "f can't be read: [Errno 13] Permission denied"),
        ({"size": 2}, "f changed while it was being sent: expected 2 bytes, found 3"),
        ({"open": None}, "f: a file without content can't be sent"),
    ],
)
def test_a_file_that_cannot_be_sent_fails_the_call_and_the_build(
    serve: Any, changes: dict[str, Any], text: str
) -> None:
    running = serve(parcels={"step-2": Parcel((file_entry("f", b"abc", **changes),))})
    with pytest.raises(grpc.RpcError) as failed:
        list(running.caller().resource("step-2"))
    assert failed.value.code() is grpc.StatusCode.ABORTED
    assert text in str(failed.value.details())
    outcome = running.outcome()
    assert ending_of(outcome) == "server-error"
    assert isinstance(outcome.error, InputError)
    assert text in outcome.message


@pytest.mark.parametrize(("path", "stage", "shown"), [("nope", "", "nope"), ("f", "base", "base://f")])
def test_an_unknown_resource_fails_the_call_and_the_build(
    serve: Any, path: str, stage: str, shown: str
) -> None:
    running = serve()
    with pytest.raises(grpc.RpcError, match=shown):
        list(running.caller().resource(path, stage))
    assert isinstance(running.outcome().error, InputError)


def test_a_fault_of_the_server_itself_fails_the_build_without_a_traceback_for_the_guest(serve: Any) -> None:
    def broken() -> io.BytesIO:
        raise RuntimeError("boom")

    running = serve(parcels={"step-2": Parcel((file_entry("f", b"abc", open=broken),))})
    with pytest.raises(grpc.RpcError) as failed:
        list(running.caller().resource("step-2"))
    assert "Traceback" not in str(failed.value.details())
    error = running.outcome().error
    assert error is not None
    assert isinstance(error.__cause__, RuntimeError)


def test_a_slow_guest_slows_the_reading_of_files_down(serve: Any) -> None:
    read = 0

    class Endless(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            read += size or 0
            return bytes(size or 0)

    running = serve(parcels={"step-2": Parcel((file_entry("f", b"", open=Endless),))})
    stream = running.caller().resource("step-2")
    next(iter(stream))
    before = -1
    while before != read:
        before = read
        time.sleep(0.3)
    assert read <= 24 * wire.CHUNK_BYTES
    stream.cancel()
    assert running.server.wait(0.2) is None


def test_output_arrives_in_order_and_byte_by_byte(serve: Any) -> None:
    running = serve(commands=[RUN])
    guest = running.caller()
    for number in range(20):
        guest.out(b"\xff\x00%d" % number, method="StdErr" if number % 2 else "StdOut")
    outputs = running.of(StepOutput)
    assert [event.data for event in outputs] == [b"\xff\x00%d" % number for number in range(20)]
    assert [event.stream for event in outputs] == ["stdout", "stderr"] * 10
    assert {event.step for event in outputs} == {2}


def test_lines_of_an_old_guest_become_output_of_step_0(serve: Any) -> None:
    running = serve()
    running.caller().unary("StdOut", pb.LogMessage(line=["one", "two\n", "drei ü"]))
    running.caller().unary("StdOut", pb.LogMessage())
    (output,) = running.of(StepOutput)
    assert (output.step, output.data) == (0, "one\ntwo\ndrei ü\n".encode())


def test_steps_are_reported_with_their_place_in_the_dockerfile(serve: Any) -> None:
    running = serve(steps=[StepInfo(2, 7, "RUN true")], total_steps=5)
    guest = running.caller()
    guest.report(2)
    guest.report(2, 3)
    guest.unary("StdOut", pb.LogMessage(step=2, event=pb.StepEvent()))
    (started,) = running.of(StepStarted)
    assert (started.step, started.total, started.instruction, started.line) == (2, 5, "RUN true", 7)
    (done,) = running.of(StepFinished)
    assert (done.step, done.exit_code, done.seconds) == (2, 3, 1.5)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.LogMessage(step=4, data=b"x"), "about step 4, which this build does not have"),
        (pb.LogMessage(step=4, event=pb.StepEvent(kind=pb.StepEvent.STARTED)), "about step 4"),
        (pb.LogMessage(event=pb.StepEvent(kind=pb.StepEvent.FINISHED)), "without its number"),
        (pb.AbortRequest(step=4, error="x"), "about step 4"),
    ],
)
def test_a_guest_that_speaks_of_steps_that_do_not_exist_ends_the_build(
    serve: Any, request_: Any, words: str
) -> None:
    running = serve(commands=[RUN])
    method = "Abort" if isinstance(request_, pb.AbortRequest) else "StdOut"
    with pytest.raises(grpc.RpcError):
        running.caller().unary(method, request_)
    outcome = running.outcome()
    assert ending_of(outcome) == "server-error"
    assert words in outcome.message


def test_a_guest_that_asks_for_files_that_do_not_exist_ends_the_build(serve: Any) -> None:
    running = serve(commands=[RUN])
    with pytest.raises(grpc.RpcError):
        list(running.caller().resource("step-9"))
    outcome = running.outcome()
    assert ending_of(outcome) == "server-error"
    assert "the guest asked for the resource 'step-9', which this build does not have" in outcome.message


@pytest.mark.parametrize(
    ("number", "milliseconds", "words"),
    [
        (-1, 0, "step 2 ended with status -1"),
        (256, 0, "step 2 ended with status 256"),
        (0, -1, "step 2 took -0.001 seconds"),
        (0, 2**63 - 1, "step 2 took 9.22337e+15 seconds"),
    ],
)
def test_no_step_can_end_so(serve: Any, number: int, milliseconds: int, words: str) -> None:
    running = serve(commands=[RUN])
    ended = pb.StepEvent(kind=pb.StepEvent.FINISHED, exit_code=number, duration_ms=milliseconds)
    with pytest.raises(grpc.RpcError):
        running.caller().unary("StdOut", pb.LogMessage(step=2, event=ended))
    outcome = running.outcome()
    assert (ending_of(outcome), running.of(StepFinished)) == ("server-error", [])
    assert words in outcome.message


def test_no_build_is_given_up_with_such_a_status(serve: Any) -> None:
    running = serve(commands=[RUN])
    with pytest.raises(grpc.RpcError):
        running.caller().unary("Abort", pb.AbortRequest(error="x", exit_code=-2, reason="command"))
    assert "step 0 ended with status -2" in running.outcome().message


def test_a_step_begins_and_ends_once_however_often_that_is_reported(serve: Any) -> None:
    running = serve(commands=[RUN])
    guest = running.caller()
    for _ in range(3):
        guest.report(2)
        guest.report(2, 0)
    assert (len(running.of(StepStarted)), len(running.of(StepFinished))) == (1, 1)


@pytest.mark.parametrize(
    ("ends", "words", "exit_code"),
    [
        ({}, "success, but step 2 was not seen to end", None),
        ({2: 0}, "success, but step 3 was not seen to end", None),
        ({3: 0}, "success, but step 2 was not seen to end", None),
        ({2: 7, 3: 0}, "success, though step 2 ended with status 7", 7),
        ({2: 0, 3: 255}, "success, though step 3 ended with status 255", 255),
    ],
)
def test_success_is_believed_only_of_a_guest_that_has_nothing_left(
    serve: Any, ends: dict[int, int], words: str, exit_code: int | None
) -> None:
    running = serve(commands=[RUN, dataclasses.replace(RUN, step=3)])
    guest = running.caller()
    for step, code in ends.items():
        guest.report(step)
        guest.report(step, code)
    guest.success()
    outcome = running.outcome()
    assert (ending_of(outcome), outcome.exit_code, outcome.reason) == ("aborted", exit_code, "protocol")
    assert words in outcome.message


def test_a_failed_step_is_not_forgotten_when_it_ends_again_with_success(serve: Any) -> None:
    running = serve(commands=[RUN])
    guest = running.caller()
    for code in (7, 0):
        guest.report(2, code)
    guest.success()
    assert running.outcome().exit_code == 7


def test_success_of_all_steps_is_success(serve: Any) -> None:
    running = serve(commands=[RUN])
    guest = running.caller()
    guest.report(2)
    guest.report(2, 0)
    guest.success()
    assert ending_of(running.outcome()) == "success"


def test_of_a_step_that_writes_too_much_the_head_and_the_tail_are_shown(serve: Any) -> None:
    running = serve(limits=Limits(max_log_bytes=10), commands=[RUN, dataclasses.replace(RUN, step=3)])
    guest = running.caller()
    guest.report(2)
    guest.out(b"1234567")
    for number in range(30):
        guest.out(b"%04d" % number * 1024, method="StdErr" if number % 2 else "StdOut")
    guest.report(2, 1)
    shown = b"".join(event.data for event in running.of(StepOutput))
    assert shown.startswith(b"1234567000")
    assert shown[10:] == b"".join(b"%04d" % number * 1024 for number in range(22, 30))
    assert [event.stream for event in running.of(StepOutput)][-2:] == ["stdout", "stderr"]
    (notice,) = running.of(Notice)
    left_out = 7 + 30 * 4096 - len(shown)
    assert notice.message.startswith(f"step 2 wrote more than 10 bytes: {left_out} bytes are left out here")
    kinds = [type(event) for event in running.events]
    assert kinds.index(Notice) < kinds.index(StepFinished)
    guest.out(b"next step", step=3)
    assert running.of(StepOutput)[-1].data == b"next step"


def test_the_end_of_output_comes_before_the_end_of_the_build(serve: Any) -> None:
    running = serve(limits=Limits(max_log_bytes=3), commands=[RUN])
    guest = running.caller()
    guest.out(b"123the reason")
    guest.unary("Abort", pb.AbortRequest(error="x", step=2, exit_code=1, reason="command"))
    running.outcome()
    assert b"".join(event.data for event in running.of(StepOutput)) == b"123the reason"
    assert running.of(Notice) == []  # nothing is missing


def test_steps_that_take_turns_do_not_get_around_the_limit(serve: Any) -> None:
    running = serve(limits=Limits(max_log_bytes=3), commands=[RUN, dataclasses.replace(RUN, step=3)])
    guest = running.caller()
    for step in (2, 3, 2):
        guest.out(b"x" * 40_000, step=step)
    guest.out(b"", step=3)
    guest.report(2, 1)
    assert len(b"".join(event.data for event in running.of(StepOutput))) == 3 + 3 + 3 * 32 * 1024


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
    parcel = Parcel(tuple(file_entry(str(n), bytes(wire.CHUNK_BYTES)) for n in range(100)))
    running = serve(parcels={"step-2": parcel})
    guest = running.caller()
    stream = guest.resource("step-2")
    next(iter(stream))
    guest.report(2, 0)
    guest.success()
    with pytest.raises(grpc.RpcError) as ended:
        list(stream)
    assert ended.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert ending_of(running.outcome()) == "success"


def test_an_abort_tells_step_and_exit_code(serve: Any) -> None:
    running = serve(steps=[StepInfo(4, 9, "RUN false")])
    request = pb.AbortRequest(error="RUN failed", step=4, exit_code=137, reason="command")
    running.caller().unary("Abort", request)
    outcome = running.outcome()
    assert (ending_of(outcome), outcome.step, outcome.exit_code, outcome.reason, outcome.message) == (
        *("aborted", 4, 137, "command", "RUN failed"),
    )
    with pytest.raises(StepFailed) as failed:
        outcome.raise_for_failure()
    assert (failed.value.step, failed.value.exit_code) == (4, 137)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.AbortRequest(error="could not copy"), "could not copy"),
        (pb.AbortRequest(), "the guest gave no reason"),
        (pb.AbortRequest(error="no such user", reason="file", exit_code=1), "no such user"),
    ],
)
def test_an_abort_that_is_no_failed_command_has_no_exit_code(
    serve: Any, request_: pb.AbortRequest, message: str
) -> None:
    running = serve()
    running.caller().unary("Abort", request_)
    outcome = running.outcome()
    assert (outcome.exit_code, outcome.message) == (None, message)


def test_a_receiver_of_events_that_fails_ends_the_build(serve: Any) -> None:
    received: list[Event] = []

    def sink(event: Event) -> None:
        received.append(event)
        if isinstance(event, StepOutput):
            raise BrokenPipeError(32, "Broken pipe")

    running = serve(events=sink, limits=Limits(max_log_bytes=1), commands=[RUN])
    guest = running.caller()
    guest.out(b"ab")
    outcome = running.outcome()
    assert ending_of(outcome) == "server-error"
    assert "Broken pipe" in outcome.message
    assert [type(event) for event in received] == [GuestConnected, StepOutput]


def test_messages_above_the_limit_are_refused(serve: Any) -> None:
    running = serve()
    with pytest.raises(grpc.RpcError) as refused:
        running.caller().out(bytes(wire.MAX_MESSAGE_BYTES + 1))
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


@pytest.mark.parametrize("hello", [False, True])
@pytest.mark.parametrize("changes", [{"mounts": (wire.TmpfsMount(target="/t"),)}, {"network": "none"}])
def test_a_guest_that_would_ignore_mounts_never_hears_of_the_command(
    serve: Any, hello: Any, changes: dict[str, Any]
) -> None:
    running = serve(commands=[dataclasses.replace(RUN, **changes)])
    with pytest.raises(grpc.RpcError) as caught:
        running.caller(hello=hello).commands()
    assert caught.value.code() is grpc.StatusCode.ABORTED
    error = running.outcome().error
    assert isinstance(error, InputError)
    assert "too old for this Dockerfile: step 2 has --mount or --network" in str(error)
    assert str(located(error, running.outcome().step, [StepInfo(2, 7, "RUN x")], Path("D"))).startswith(
        "D:7: "
    )
