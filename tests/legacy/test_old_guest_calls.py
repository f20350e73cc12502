"""An old guest's calls one by one: what it is told, and what the server makes of what it says."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.errors import GuestLost, InputError, StepFailed
from firebuild_bootstrap.events import StepFinished, StepOutput, StepStarted
from firebuild_bootstrap.legacy import copying, scripts
from firebuild_bootstrap.service import Limits, StepInfo
from service.conftest import file_entry
from support import ending_of


@dataclasses.dataclass(frozen=True)
class Parcel:
    """Yields one list of entries after the other, and the last one again and again."""

    lists: Sequence[Sequence[Entry]]
    asked: list[int] = dataclasses.field(default_factory=list)

    def entries(self) -> Any:
        self.asked.append(0)
        yield from self.lists[min(len(self.asked), len(self.lists)) - 1]


def copy(step: int = 2) -> wire.CopyCommand:
    return wire.CopyCommand(step=step, original="COPY f /f", source=f"step-{step}", target="/f")


def run(step: int = 2, **fields: Any) -> wire.RunCommand:
    fields = {"argv": ("/bin/sh", "-c", "echo $A"), "original": "RUN echo $A", **fields}
    return wire.RunCommand(step=step, **fields)


# --- commands -----------------------------------------------------------------------------------------


def test_an_old_guest_is_told_scripts_without_anything_that_it_would_change(serve: Any) -> None:
    old = serve(
        commands=[run(env={"A": "1"}, user="app", workdir="/w"), copy(3)],
        parcels={"step-3": Parcel([[file_entry()]])},
    ).old_guest()
    assert [command["OriginalCommand"].split()[0] for command in old.commands] == [
        "RUN",
        "RUN",
        "COPY",
        "RUN",
    ]
    for command in old.commands:
        assert command["Workdir"]["Value"] == "/"
        if "Shell" in command:
            assert command["Command"] == "firebuild"
            assert (command["Env"], command["Args"], command["User"]["Value"]) == ({}, {}, "0:0")
    assert [json.loads(text) for text in old.calls.commands()] == old.commands


def test_more_steps_than_one_message_holds_are_refused(serve: Any) -> None:
    # About 3.9 MB: more than the 3,774,873 bytes that an old guest takes, less than 4 MiB.
    commands = [run(step, argv=("/bin/sh", "-c", "x" * 100_000)) for step in range(2, 39)]
    running = serve(commands=commands)
    with pytest.raises(grpc.RpcError, match="too many steps for one message"):
        running.caller().commands()
    assert isinstance(running.outcome().error, InputError)


def test_long_lists_of_files_become_several_lines() -> None:
    names = [f"{number:05d}-{'x' * 90}" for number in range(1500)]
    lines = list(scripts.lines("chmod 644", names))
    assert len(lines) == 3
    assert max(map(len, lines)) < 65_000
    assert [word for line in lines for word in line.split() if "-x" in word] == names
    assert list(scripts.lines("chmod 644", [])) == []


# --- files --------------------------------------------------------------------------------------------


def gone() -> io.BytesIO:
    raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ([file_entry()], [file_entry(open=gone)], "f has vanished since the build began"),
        ([file_entry()], [file_entry(open=lambda: io.BytesIO(b"ab"))], "it has become shorter"),
        ([file_entry()], [file_entry(open=lambda: io.BytesIO(b"abcd"))], "it has become longer"),
        ([file_entry()], [file_entry(mode=0o600)], "there is something else now"),
        ([file_entry()], [], "there is something else now"),
        ([file_entry()], [file_entry(open=None)], "a file without content"),
    ],
)
def test_a_file_that_changes_between_the_two_looks_ends_the_build(
    serve: Any, first: list[Entry], second: list[Entry], text: str
) -> None:
    parcel = Parcel([first, second])
    running = serve(commands=[copy()], parcels={"step-2": parcel})
    old = running.old_guest()
    with pytest.raises(grpc.RpcError, match=text):
        list(old.calls.resource("step-2/1"))
    outcome = running.outcome()
    assert ending_of(outcome) == "server-error"
    assert text in outcome.message


@pytest.mark.parametrize("names", [["step-2"], ["nope"], ["step-2/2"], ["step-2/1", "step-2/1"]])
def test_portions_are_given_once_and_in_their_order(serve: Any, names: list[str]) -> None:
    size = copying.PORTION_BYTES + 1
    entry = file_entry(size=size, open=lambda: io.BytesIO(bytes(size)))
    running = serve(commands=[copy()], parcels={"step-2": Parcel([[entry]])})
    old = running.old_guest()
    with pytest.raises(grpc.RpcError, match="which is not what comes next"):
        for name in names:
            list(old.calls.resource(name))
    assert isinstance(running.outcome().error, InputError)


def test_a_stream_that_is_cancelled_ends_the_build(serve: Any) -> None:
    size = copying.PORTION_BYTES
    entry = file_entry(size=size, open=lambda: io.BytesIO(bytes(size)))
    running = serve(commands=[copy()], parcels={"step-2": Parcel([[entry]])})
    stream = running.old_guest().calls.resource("step-2/1")
    next(iter(stream))
    stream.cancel()
    outcome = running.outcome()
    assert isinstance(outcome.error, GuestLost)
    assert running.of(StepStarted)[0].step == 2


# --- what it says -------------------------------------------------------------------------------------


def test_marks_become_events_and_the_rest_is_output(serve: Any) -> None:
    running = serve(
        commands=[run(2), run(3)], steps=[StepInfo(2, 7, "RUN a"), StepInfo(3, 8, "RUN b")], total_steps=3
    )
    old = running.old_guest()
    old.report("P", 0)
    for step in (2, 3):
        old.calls.say(old.mark("B", step), "some", f"thing\n{old.mark('E', step, '0')}")
        old.calls.say(old.mark("B", step), f"err {step}", method="StdErr")
    old.calls.success()
    assert ending_of(running.outcome()) == "success"
    assert [(event.step, event.line, event.total) for event in running.of(StepStarted)] == [
        (2, 7, 3),
        (3, 8, 3),
    ]
    assert [(event.step, event.exit_code) for event in running.of(StepFinished)] == [(2, 0), (3, 0)]
    told = [(event.step, event.stream, event.data) for event in running.of(StepOutput)]
    assert told == [
        item
        for step in (2, 3)
        for item in (
            (step, "stdout", b"some"),
            (step, "stdout", b"thing\n"),
            (step, "stderr", f"err {step}".encode()),
        )
    ]


@pytest.mark.parametrize(
    ("said", "words", "exit_code"),
    [
        ("", "the guest reported success, but step 2 was not seen to end", None),
        ("P0", "the guest reported success, but step 2 was not seen to end", None),
        ("P0 B2", "the guest reported success, but step 2 was not seen to end", None),
        ("P0 B2 E2:0 B3", "the guest reported success, but step 3 was not seen to end", None),
        ("P0 B3 E3:0", "the guest reported success, but step 2 was not seen to end", None),
        ("P0 B2 E2:0 B3 E3:255", "the command exited with status 255", 255),
        ("P0 B2 E2:7 E2:0 E3:0", "the command exited with status 7", 7),
        ("P0 B2 X2:why E2:0 E3:0", "why", None),
        ("P0 B2 X2 E2:0 E3:0", "the guest gave no reason", None),
    ],
)
def test_success_is_believed_only_of_a_guest_that_has_nothing_left(
    serve: Any, said: str, words: str, exit_code: int | None
) -> None:
    running = serve(commands=[run(2), run(3)])
    old = running.old_guest()
    for mark in said.split():
        old.report(mark[0], int(mark[1]), mark[3:])
    old.calls.success()
    outcome = running.outcome()
    assert isinstance(outcome.error, StepFailed)
    assert (outcome.message, outcome.exit_code) == (words, exit_code)


def test_a_step_begins_and_ends_once_however_often_that_is_reported(serve: Any) -> None:
    running = serve(commands=[run(2), run(3)])
    old = running.old_guest()
    for step in (0, 2, 3) * 3:
        old.report("B", step)
        old.report("E", step, "0")
    old.calls.success()
    assert ending_of(running.outcome()) == "success"
    assert [event.step for event in running.of(StepStarted)] == [2, 3]
    assert [event.step for event in running.of(StepFinished)] == [2, 3]


@pytest.mark.parametrize(
    ("kind", "step", "value", "words"),
    [
        *((kind, 4, "", "about step 4, which this build does not have") for kind in "BDEX"),
        ("E", 2, "256", "the guest says that step 2 ended with status 256"),
    ],
)
def test_impossible_marks_end_the_build(serve: Any, kind: str, step: int, value: str, words: str) -> None:
    running = serve(commands=[run(2)])
    old = running.old_guest()
    old.report("B", 2)
    with pytest.raises(grpc.RpcError):
        old.report(kind, step, value)
        old.calls.success()
    outcome = running.outcome()
    assert (ending_of(outcome), running.of(StepFinished)) == ("server-error", [])
    assert words in outcome.message


def test_steps_that_take_turns_do_not_get_around_the_limit(serve: Any) -> None:
    running = serve(limits=Limits(max_log_bytes=3), commands=[run(2), run(3)])
    old = running.old_guest()
    for step in (2, 3, 2):
        old.report("D", step, base64.b64encode(b"x" * 40_000).decode())
    old.calls.abort("enough")
    running.outcome()
    assert len(b"".join(event.data for event in running.of(StepOutput))) == 3 + 3 + 3 * 32 * 1024


def test_pieces_without_number_do_not_outlive_the_build(serve: Any) -> None:
    """Each is looked at together with what is held back: in all it would take an hour."""
    running = serve(commands=[run(2)])
    old = running.old_guest()
    old.calls.say(f"\x01{old.nonce}:D:2:", "A" * 1_000_000)
    stream: Any = old.calls.channel.unary_unary(wire.method("StdOut"))
    call = stream.future(pb.LogMessage(line=["A"] * 1_000_000).SerializeToString())
    assert running.server.wait(1) is None
    began = time.monotonic()
    running.server.stop()
    assert time.monotonic() - began < 10
    assert call.code() is not grpc.StatusCode.OK


def test_what_never_became_a_mark_is_output_in_the_end(serve: Any) -> None:
    running = serve(commands=[run(2)])
    old = running.old_guest()
    old.report("P", 0)
    old.calls.say(old.mark("B", 2), old.mark("E", 2, "0"), "\x01")
    old.calls.say(old.mark("E", 2, "0"), old.mark("Z", 2))
    old.calls.success()
    assert ending_of(running.outcome()) == "success"
    assert [event.data for event in running.of(StepOutput)] == [b"\x01"]


def test_output_in_marks_is_the_bytes_that_were_written(serve: Any) -> None:
    running = serve(commands=[run(2)])
    old = running.old_guest()
    old.report("P", 0)
    mark = old.mark("D", 2, "YWJj\n/w==\n")
    old.calls.say(old.mark("B", 2) + mark[:20], mark[20:], old.mark("D", 2, "odd"), old.mark("E", 2, "0"))
    old.calls.say(old.mark("D", 2, "AAo="), method="StdErr")
    old.calls.success()
    assert ending_of(running.outcome()) == "success"
    told = [(event.stream, event.data) for event in running.of(StepOutput)]
    assert told == [("stdout", b"abc\xff"), ("stdout", b"odd"), ("stderr", b"\0\n")]


def test_an_exit_status_that_is_no_number_is_a_failure(serve: Any) -> None:
    running = serve(commands=[run(2)])
    old = running.old_guest()
    old.report("P", 0)
    old.calls.say(old.mark("B", 2), old.mark("E", 2, "x"), old.mark("X", 2, "too late"))
    old.calls.abort("anything")
    outcome = running.outcome()
    assert (outcome.step, outcome.exit_code) == (2, 1)
    assert outcome.message == "the command exited with status 1"


def test_an_abort_without_marks_is_told_in_the_guests_words(serve: Any) -> None:
    running = serve(commands=[run(2)])
    old = running.old_guest()
    old.report("P", 0)
    old.calls.say(old.mark("B", 2))
    old.calls.abort("no more\x1b[2J memory" + "!" * 10_000)
    outcome = running.outcome()
    assert (outcome.step, ending_of(outcome)) == (2, "aborted")
    assert outcome.message.startswith("no more\\x1b[2J memory!")
    assert len(outcome.message) < 4_100
    assert [(event.step, event.exit_code) for event in running.of(StepFinished)] == [(2, 1)]


@pytest.mark.parametrize(
    ("said", "message"), [("changed its mind", "changed its mind"), ("", "the guest gave no reason")]
)
def test_an_old_guest_that_speaks_before_it_has_commands_is_heard(
    serve: Any, said: str, message: str
) -> None:
    running = serve(commands=[run(2)])
    guest = running.caller()
    assert guest.ping("first") == "first"
    guest.say("early")
    guest.abort(said)
    assert running.outcome().message == message
    assert [event.data for event in running.of(StepOutput)] == [b"early"]


def test_an_old_guest_pings_every_five_seconds_whatever_it_is_told(serve: Any) -> None:
    running = serve(commands=[run(2)], limits=Limits(ping_interval=0.1, missed_pings=1))
    old = running.old_guest()
    assert running.server.wait(0.5) is None
    old.calls.abort("enough")
    assert "enough" in running.outcome().message
