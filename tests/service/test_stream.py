"""A session from the host's side: what is said in which order, what is believed, and how it ends."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.errors import GuestLost, InputError, StepFailed
from firebuild_bootstrap.events import (
    Event,
    GuestConnected,
    Notice,
    StepFinished,
    StepOutput,
    StepProgress,
    StepStarted,
)
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.reader import LayerReader
from firebuild_bootstrap.service import Limits, StepInfo
from support import ending_of

RUN = wire.RunCommand(step=3, original="RUN x", argv=("x",))
COPY = wire.CopyCommand(step=2, original="COPY f /", source="step-2", target="/")
WORKDIR = wire.WorkdirCommand(step=4, original="WORKDIR /w", workdir="/w")


@dataclass(frozen=True)
class File:
    """A resource of one file; `reads` says how often a piece of it was asked for."""

    content: bytes = b"content"
    name: str = "f"
    open: Callable[[], Any] | None = None

    def entries(self) -> Iterator[Entry]:
        yield Entry(
            source=self.name,
            path=self.name,
            kind=tar.FILE,
            mode=0o644,
            mtime_ns=0,
            size=len(self.content),
            open=self.open or (lambda: io.BytesIO(self.content)),
        )


@dataclass
class Sink:
    """Wants the layer of one step, and no more than some bytes of it."""

    step: int
    most: int = 1 << 20
    written: bytes = b""
    told: list[int] = field(default_factory=list)

    def wanted(self, step: int, /) -> bool:
        return step == self.step

    def write(self, step: int, data: bytes, /) -> None:
        assert step == self.step
        self.written += data
        if len(self.written) > self.most:
            raise InputError("the layer has too many bytes")

    def finished(self, step: int, /) -> None:
        self.told.append(step)


def names(tar: bytes) -> list[str]:
    return [entry.path for entry in LayerReader(io.BytesIO(tar))]


# --- a session that goes well ---------------------------------------------------------------------


def test_one_step_is_sent_at_a_time_and_files_come_with_their_copy(serve: Any) -> None:
    running = serve(
        commands=[COPY, RUN, WORKDIR],
        parcels={"step-2": File()},
        steps=[StepInfo(2, 7, "COPY f /"), StepInfo(3, 8, "RUN x"), StepInfo(4, 9, "WORKDIR /w")],
        total_steps=5,
    )
    guest = running.guest()
    assert messages.decode(pb.ToGuest(apply=guest.hear("apply"))) == replace(COPY, source="")
    assert running.of(GuestConnected)
    assert len(running.welcomed) == 1  # before anything was sent
    assert names(guest.files()) == ["f"]
    guest.done(2)
    assert messages.decode(pb.ToGuest(run=guest.hear("run"))) == RUN
    guest.say(output=pb.Output(data=b"out"))
    guest.say(output=pb.Output(data=b"err\xff", stderr=True))
    guest.say(alive=pb.Alive())
    guest.done(3)
    assert guest.hear("workdir").step.workdir == "/w"
    guest.done(4)
    guest.hear("finish")
    assert running.server.wait(0) is None  # what was said so far may still be on its way to a drive
    guest.done(0)
    assert guest.end() == (grpc.StatusCode.OK, "")
    assert ending_of(running.outcome()) == "success"
    assert [(event.step, event.line, event.total) for event in running.of(StepStarted)] == [
        (2, 7, 5), (3, 8, 5), (4, 9, 5)
    ]  # fmt: skip
    assert running.of(StepStarted)[1].instruction == "RUN x"
    finished = running.of(StepFinished)[0]
    assert (finished.step, finished.exit_code, finished.seconds) == (2, 0, 1.5)
    assert [(event.step, event.stream, event.data) for event in running.of(StepOutput)] == [
        (3, "stdout", b"out"), (3, "stderr", b"err\xff")
    ]  # fmt: skip


def test_files_of_mounts_come_when_they_are_wanted(serve: Any) -> None:
    mounts = (
        wire.BindMount(target="/a", resource="step-3-mount-1"),
        wire.SecretMount(resource="step-3-mount-2", env="TOKEN"),
    )
    parcels = {mount.resource: File(name=mount.resource[-1]) for mount in mounts}
    running = serve(commands=[replace(RUN, mounts=mounts)], parcels=parcels)
    guest = running.guest()
    guest.hear("run")
    for number in ("2", *("1",) * 10):
        guest.say(want=pb.Want(resource=f"step-3-mount-{number}"))
        assert names(guest.files()) == [number]
    guest.say(want=pb.Want(resource="step-2"))
    assert guest.end()[0] is grpc.StatusCode.ABORTED
    assert "the guest wants the files 'step-2', which step 3 does not have" in running.outcome().message


def test_the_layer_of_a_step_is_taken_where_it_is_wanted(serve: Any) -> None:
    sink = Sink(step=4)
    running = serve(commands=[RUN, WORKDIR], layers=sink)
    guest = running.guest()
    guest.hear("run")
    guest.done(3)
    guest.hear("workdir")
    assert sink.told == [3]
    guest.done(4)
    assert guest.hear("checkpoint").step == 4
    guest.say(layer=pb.Layer(data=b"a" * 1000))
    guest.say(layer=pb.Layer(data=b"b"))
    assert sink.told == [3]
    # Who is killed now has not been told that step 4 is finished, and loses its layer.
    assert [event.step for event in running.of(StepFinished)] == [3]
    guest.say(layer=pb.Layer(last=True))
    guest.hear("finish")
    assert (sink.told, sink.written) == ([3, 4], b"a" * 1000 + b"b")
    assert [event.step for event in running.of(StepFinished)] == [3, 4]


def test_progress_is_told_of_files_that_take_long(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firebuild_bootstrap.service.stream._PROGRESS_SECONDS", 0)
    running = serve(commands=[COPY], parcels={"step-2": File(bytes(3_000_000))})
    guest = running.guest()
    guest.hear("apply")
    assert names(guest.files()) == ["f"]
    told = running.of(StepProgress)
    assert [event.step for event in told] == [2] * len(told)
    assert told[-1].bytes > 3_000_000


# --- output ---------------------------------------------------------------------------------------


def at_the_run(serve: Any, **options: Any) -> tuple[Any, Any]:
    """Return a server and its guest, which is told to execute step 3."""
    running = serve(commands=[RUN], **options)
    guest = running.guest()
    guest.hear("run")
    return running, guest


def test_output_arrives_in_order_and_byte_by_byte_in_pieces_that_a_receiver_can_hold(serve: Any) -> None:
    running, guest = at_the_run(serve)
    for number in range(20):
        guest.say(output=pb.Output(data=b"\xff\x00%d" % number, stderr=number % 2 == 1))
    large = os.urandom(wire.CHUNK_BYTES)
    guest.say(output=pb.Output(data=large))
    guest.done(3)
    guest.hear("finish")
    outputs = running.of(StepOutput)
    assert [event.data for event in outputs[:20]] == [b"\xff\x00%d" % number for number in range(20)]
    assert [event.stream for event in outputs[:20]] == ["stdout", "stderr"] * 10
    assert {event.step for event in outputs} == {3}
    assert b"".join(event.data for event in outputs[20:]) == large
    assert max(len(event.data) for event in outputs) <= 256 * 1024


def test_of_a_step_that_writes_too_much_the_head_and_the_tail_are_shown(serve: Any) -> None:
    running = serve(limits=Limits(max_log_bytes=10), commands=[RUN, replace(RUN, step=4)])
    guest = running.guest()
    guest.hear("run")
    guest.say(output=pb.Output(data=b"1234567"))
    for number in range(30):
        guest.say(output=pb.Output(data=b"%04d" % number * 1024, stderr=number % 2 == 1))
    guest.done(3)
    guest.hear("run")
    shown = b"".join(event.data for event in running.of(StepOutput))
    assert shown.startswith(b"1234567000")
    assert shown[10:] == b"".join(b"%04d" % number * 1024 for number in range(22, 30))
    assert [event.stream for event in running.of(StepOutput)][-2:] == ["stdout", "stderr"]
    (notice,) = running.of(Notice)
    left_out = 7 + 30 * 4096 - len(shown)
    assert notice.message.startswith(f"step 3 wrote more than 10 bytes: {left_out} bytes are left out here")
    kinds = [type(event) for event in running.events]
    assert kinds.index(Notice) < kinds.index(StepFinished)
    guest.say(output=pb.Output(data=b"next step"))
    guest.done(4)
    guest.hear("finish")
    assert running.of(StepOutput)[-1].data == b"next step"


def test_the_end_of_output_comes_before_the_end_of_the_build(serve: Any) -> None:
    running, guest = at_the_run(serve, limits=Limits(max_log_bytes=3))
    guest.say(output=pb.Output(data=b"123the reason"))
    guest.done(0, error="x", reason="internal")
    running.outcome()
    assert b"".join(event.data for event in running.of(StepOutput)) == b"123the reason"
    assert running.of(Notice) == []  # nothing is missing


# --- failures -------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_the_build_with_what_the_guest_says(serve: Any) -> None:
    running = serve(commands=[RUN, WORKDIR])
    guest = running.guest()
    guest.hear("run")
    guest.done(3, error="exit \x1b[31m7", exit_code=7, reason="command")
    assert guest.end() == (grpc.StatusCode.OK, "")
    outcome = running.outcome()
    assert (ending_of(outcome), outcome.step, outcome.exit_code, outcome.reason) == (
        "aborted", 3, 7, "command"
    )  # fmt: skip
    assert isinstance(outcome.error, StepFailed)
    assert "\x1b" not in outcome.message
    assert running.of(StepFinished)[-1].exit_code == 7


def test_no_files_are_sent_without_end(serve: Any) -> None:
    mount = wire.BindMount(target="/a", resource="m")
    running = serve(commands=[replace(RUN, mounts=(mount,))], parcels={"m": File(name="f")})
    guest = running.guest()
    guest.hear("run")
    for _ in range(10):
        guest.say(want=pb.Want(resource="m"))
        guest.files()
    guest.say(want=pb.Want(resource="m"))
    assert guest.end()[0] is grpc.StatusCode.ABORTED
    assert "the guest wants the files 'm' of step 3 more than 10 times" in running.outcome().message


@pytest.mark.parametrize(("step", "finished"), [(3, [1]), (0, [])])
def test_the_exit_status_of_what_is_no_command_means_nothing(
    serve: Any, step: int, finished: list[int]
) -> None:
    running = serve(commands=[RUN])
    guest = running.guest()
    guest.hear("run")
    guest.done(step, reason="file")
    guest.end()
    outcome = running.outcome()
    assert (outcome.step, outcome.exit_code, outcome.message) == (step, None, "the guest gave no reason")
    assert [event.exit_code for event in running.of(StepFinished)] == finished


def test_a_guest_that_gives_up_in_the_middle_of_files_is_sent_no_more_of_them(serve: Any) -> None:
    running = serve(commands=[COPY], parcels={"step-2": File(bytes(100_000_000))})
    guest = running.guest()
    guest.hear("apply")
    guest.done(2, error="the disk is full", reason="file")
    heard = sum(1 for _ in guest.call)
    assert heard < 50
    assert running.outcome().message == "the disk is full"


def gone() -> io.BytesIO:
    raise FileNotFoundError(2, "No such file or directory")


def forbidden() -> io.BytesIO:
    raise PermissionError(13, "Permission denied")


def broken() -> io.BytesIO:
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("opened", "words"),
    [
        (gone, "f has vanished since the build began"),
        (forbidden, "f can't be read: Permission denied"),
        (broken, "the bootstrap server failed: RuntimeError('boom')"),
    ],
)
def test_a_file_that_can_not_be_sent_is_told_to_both_sides(serve: Any, opened: Any, words: str) -> None:
    running = serve(commands=[COPY], parcels={"step-2": File(open=opened)})
    guest = running.guest()
    guest.hear("apply")
    assert guest.end() == (grpc.StatusCode.ABORTED, words)
    outcome = running.outcome()
    assert (ending_of(outcome), outcome.message) == ("server-error", words)
    assert outcome.error is not None
    assert isinstance(outcome.error, InputError) or isinstance(outcome.error.__cause__, RuntimeError)


def test_a_slow_guest_slows_the_reading_of_files_down(serve: Any) -> None:
    read = 0

    class Endless(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            read += size or 0
            return b"x" * (size or 0)

    running = serve(commands=[COPY], parcels={"step-2": File(bytes(100_000_000), open=Endless)})
    guest = running.guest()
    guest.hear("apply")
    before = -1
    while before != read:
        before = read
        time.sleep(0.3)
    assert 0 < read <= 24 * wire.CHUNK_BYTES
    assert running.server.wait(0) is None


def test_a_layer_of_more_bytes_than_the_sink_takes_ends_the_build(serve: Any) -> None:
    sink = Sink(step=3, most=2_500_000)
    running = serve(commands=[RUN], layers=sink)
    guest = running.guest()
    guest.hear("run")
    guest.done(3)
    guest.hear("checkpoint")
    for _ in range(40):
        guest.say(layer=pb.Layer(data=bytes(wire.CHUNK_BYTES)))
    assert guest.end() == (grpc.StatusCode.ABORTED, "the layer has too many bytes")
    assert (len(sink.written), sink.told) == (3 * wire.CHUNK_BYTES, [])
    assert ending_of(running.outcome()) == "server-error"


# --- what no guest of ours says -------------------------------------------------------------------


def hello(version: int) -> bytes:
    return pb.FromGuest(hello=pb.Hello(version=version)).SerializeToString()


def said(**message: Any) -> bytes:
    return pb.FromGuest(**message).SerializeToString()


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ([hello(2)], "the guest's vminit speaks another version of the session"),
        ([said(done=pb.Done(step=3))], "the guest sent done, where hello was due"),
        ([hello(3), hello(3)], "the guest sent hello, where done or want was due"),
        ([hello(3), said(done=pb.Done(step=4))], "says that step 4 is done, and works on step 3"),
        ([hello(3), said(done=pb.Done())], "says that step 0 is done, and works on step 3"),
        ([hello(3), said(done=pb.Done(step=3, duration_ms=-1))], "says that step 3 took -0.001 seconds"),
        ([hello(3), said(done=pb.Done(step=3, duration_ms=2**63 - 1))], "step 3 took 9.22337e+15 seconds"),
        (
            [hello(3), said(done=pb.Done(step=3, failure=pb.Failure(exit_code=256, reason="command")))],
            "says that step 3 ended with status 256",
        ),
        ([hello(3), said(done=pb.Done(failure=pb.Failure(exit_code=-1)))], "step 0 ended with status -1"),
        ([hello(3), said(layer=pb.Layer(data=b"x"))], "a layer that it was not asked for"),
        ([hello(3), b""], "a message that says nothing"),
        ([hello(3), b"\xff"], "bytes that are not a message of a session"),
        ([hello(3), said(output=pb.Output(data=bytes(2_000_000)))], "; 1114112 are allowed"),
        ([hello(3), said(want=pb.Want(resource="\x1b" * 1000))], "the guest wants the files '\\x1b"),
    ],
)
def test_what_a_guest_must_not_say_ends_the_build(serve: Any, says: list[bytes], words: str) -> None:
    running = serve(commands=[RUN])
    guest = running.guest(hello=False)
    for message in says:
        guest.say_bytes(message)
        if message is says[0] and len(says) > 1:
            guest.hear("run")
    code, details = guest.end()
    outcome = running.outcome()
    assert (code, ending_of(outcome)) == (grpc.StatusCode.ABORTED, "server-error")
    assert words in outcome.message
    assert words in details


def test_a_guest_can_not_say_more_before_it_is_asked_again(serve: Any) -> None:
    running = serve(commands=[COPY], parcels={"step-2": File(bytes(100_000_000))})
    guest = running.guest()
    guest.hear("apply")
    for _ in range(20):
        guest.say(want=pb.Want(resource="x"))
    guest.end()
    message = running.outcome().message
    assert "the guest sent want before it was asked again" in message or "the guest wants" in message


def test_a_second_session_ends_the_build(serve: Any) -> None:
    running = serve(commands=[RUN])
    first = running.guest()
    first.hear("run")
    assert running.guest().end() == (grpc.StatusCode.ABORTED, "the guest began a second session")
    assert ending_of(running.outcome()) == "server-error"
    assert first.end() == (grpc.StatusCode.FAILED_PRECONDITION, "the build has ended")


def test_a_session_does_not_end_with_the_success_of_old_calls(serve: Any) -> None:
    running = serve(commands=[RUN], layers=(sink := Sink(step=3)))
    guest = running.guest()
    guest.hear("run")
    with pytest.raises(grpc.RpcError, match="began with a session, and went on with the calls of old guests"):
        running.caller().say("done")
    assert ending_of(running.outcome()) == "server-error"
    assert sink.told == []


@pytest.mark.parametrize("call", ["success", "resource"])
def test_each_old_call_is_refused_in_a_session(serve: Any, call: str) -> None:
    running = serve(commands=[RUN])
    running.guest().hear("run")
    with pytest.raises(grpc.RpcError, match="began with a session"):
        running.caller().success() if call == "success" else list(running.caller().resource("x"))


def test_old_calls_do_not_go_on_with_a_session(serve: Any) -> None:
    running = serve(commands=[RUN])
    running.caller().ping()
    code, details = running.guest().end()
    assert code is grpc.StatusCode.ABORTED
    assert details == "the guest began with the calls of old guests, and went on with a session"


def test_a_stranger_with_a_certificate_of_the_same_authority_hears_nothing(serve: Any, workshop: Any) -> None:
    running = serve(commands=[RUN])
    stranger = running.caller(workshop.issue("stranger.b1.firebuild.internal"), inner=True)
    method: Any = stranger.channel.stream_stream(wire.method("Session"))
    call = method(iter([hello(3)]), timeout=10)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() is grpc.StatusCode.PERMISSION_DENIED
    running.refusal()


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["leave", "cancel", "close"])
def test_a_guest_that_leaves_without_a_word_is_lost(serve: Any, how: str) -> None:
    running = serve(commands=[RUN], limits=Limits(reconnect_grace=0.3))
    guest = running.guest()
    guest.hear("run")
    if how == "leave":
        guest.leave()
    elif how == "cancel":
        guest.call.cancel()
    else:
        running.close_callers()
    outcome = running.outcome()
    assert isinstance(outcome.error, GuestLost)
    assert "during step 3 before it reported a result" in outcome.message


def test_a_guest_that_says_nothing_is_lost_and_one_that_is_alive_is_not(serve: Any) -> None:
    running = serve(commands=[RUN], limits=Limits(ping_interval=0.1, missed_pings=5))
    guest = running.guest()
    guest.hear("run")
    until = time.monotonic() + 1
    while time.monotonic() < until:
        guest.say(alive=pb.Alive())
        assert running.server.wait(0.05) is None
    assert "the guest fell silent during step 3" in running.outcome().message
    assert guest.end() == (grpc.StatusCode.FAILED_PRECONDITION, "the build has ended")


def test_a_guest_is_not_lost_for_a_receiver_that_takes_its_time(serve: Any) -> None:
    def receive(event: Event) -> None:
        if isinstance(event, StepOutput):
            time.sleep(1)

    running = serve(commands=[RUN], limits=Limits(ping_interval=0.1, missed_pings=3), events=receive)
    guest = running.guest()
    guest.hear("run")
    for _ in range(2):
        guest.say(output=pb.Output(data=b"long\n"))
    guest.say(done=pb.Done(step=3))
    guest.hear("finish")
    guest.say(done=pb.Done())
    assert running.outcome().error is None


def test_a_stopped_server_ends_the_session_at_once(serve: Any) -> None:
    running = serve(commands=[RUN])
    guest = running.guest()
    guest.hear("run")
    began = time.monotonic()
    running.server.stop(20)
    assert time.monotonic() - began < 10
    assert guest.end() == (grpc.StatusCode.FAILED_PRECONDITION, "the build has ended")


def test_output_is_read_no_faster_than_it_is_taken(serve: Any) -> None:
    taken, go = threading.Semaphore(0), threading.Event()

    def sink(event: Any) -> None:
        if isinstance(event, StepOutput):
            taken.release()
            go.wait(20)

    running = serve(commands=[RUN], events=sink)
    guest = running.guest()
    guest.hear("run")
    sent: list[int] = []

    def says() -> Iterator[bytes]:
        for number in range(1000):
            sent.append(number)
            yield said(output=pb.Output(data=bytes(60_000)))

    guest.say_all(says())
    assert taken.acquire(timeout=10)
    before = -1
    while len(sent) != before:  # it stands still, and not at the end
        before = len(sent)
        time.sleep(0.3)
    assert before < 100
    go.set()


@pytest.mark.root
def test_the_whole_way_works_with_the_guest_of_ours(serve: Any, tmp_path: Path) -> None:
    """The guest's own end of the stream, in this process: what the service sends is what it reads."""
    from firebuild_bootstrap.guest.client import Client
    from firebuild_bootstrap.guest.executor import Executor
    from firebuild_bootstrap.guest.stop import Stop
    from firebuild_bootstrap.guest.stream import join
    from firebuild_bootstrap.layers.root import Root

    running = serve(
        commands=[replace(COPY, target="/dir/"), WORKDIR], parcels={"step-2": File(bytes(5_000_000))}
    )
    material = running.materials[1]
    block = wire.BootstrapBlock(
        host_port=running.address,
        ca_chain=material.trust_pem.decode(),
        cert=material.certificate_chain_pem.decode(),
        key=material.private_key_pem.decode(),
        server_name=material.server_name,
    )
    stop = Stop()
    client = Client(block, stop)
    with Root(str(tmp_path)) as root, join(client, stop, 5.0) as host:
        Executor(root, host, stop).execute()
        host.success()
    client.close()
    stop.close()
    assert ending_of(running.outcome()) == "success"
    assert (tmp_path / "dir/f").read_bytes() == bytes(5_000_000)
    assert (tmp_path / "w").is_dir()
