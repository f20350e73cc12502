"""What a guest says about a command that a user is attached to, and what of it is believed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.service.console import Console

RUN = wire.RunCommand(step=1, original="x", argv=("x",), attach=wire.Attach(input=True))
STEP = wire.RunCommand(step=1, original="x", argv=("x",))


def test_a_command_begins_takes_its_input_and_ends_with_its_status(serve: Any) -> None:
    begun = threading.Event()
    console = Console(begun=begun.set)
    running = serve(commands=[RUN], console=console)
    guest = running.guest()
    assert guest.hear("run").attach.input
    guest.say(begun=pb.Begun())
    assert begun.wait(10)
    assert console.write(b"in")
    assert guest.hear("input").data == b"in"
    guest.say(input_taken=pb.InputTaken(bytes=2))
    console.signal(15)
    assert guest.hear("signal").number == 15
    guest.say(done=pb.Done(step=1, exit_code=7))
    guest.hear("finish")
    assert console.exit_code == 7
    assert not console.write(b"more")


@pytest.mark.parametrize(
    ("lies", "error"),
    [
        ([{"begun": pb.Begun()}] * 2, "the guest says a second time that its command has begun"),
        (
            [{"input_taken": pb.InputTaken(bytes=1)}],
            "the guest says that its command has taken 1 byte of input",
        ),
        ([{"input_taken": pb.InputTaken(bytes=-1)}], "has taken -1 bytes of input"),
        ([{"done": pb.Done(step=1, exit_code=256)}], "256"),
        ([{"done": pb.Done(step=2)}], "the guest says that step 2 is done, and works on step 1"),
    ],
)
def test_a_guest_that_lies_about_its_command_ends_the_run(
    serve: Any, lies: list[dict[str, Any]], error: str
) -> None:
    running = serve(commands=[RUN], console=Console())
    guest = running.guest()
    guest.hear("run")
    for lie in lies:
        guest.say(**lie)
    assert error in running.outcome().message


@pytest.mark.parametrize("said", [{"begun": pb.Begun()}, {"input_taken": pb.InputTaken(bytes=1)}])
def test_a_step_of_a_build_is_nothing_to_be_attached_to(serve: Any, said: dict[str, Any]) -> None:
    running = serve(commands=[STEP])
    guest = running.guest()
    guest.hear("run")
    guest.say(**said)
    assert f"the guest sent {next(iter(said))}, where done or want was due" in running.outcome().message


def test_who_writes_waits_until_the_guest_has_taken_enough() -> None:
    console, full = Console(), threading.Event()
    console.begin(full.set)
    wrote: list[bool] = []
    writer = threading.Thread(target=lambda: wrote.append(console.write(bytes(wire.INPUT_BYTES + 1))))
    writer.start()
    assert full.wait(10)
    assert [len(pb.ToGuest.FromString(said).input.data) for said in console.messages()] == [wire.INPUT_BYTES]
    assert wrote == []  # and nothing but this lets it go on:
    console.taken(1)
    writer.join(10)
    assert wrote == [True]
    with pytest.raises(InputError, match="has taken"):
        console.taken(wire.INPUT_BYTES + 1)
