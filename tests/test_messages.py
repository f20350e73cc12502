"""The messages of a session: commands and pieces of files cross the wire as they are, or are refused."""

from __future__ import annotations

import os
from typing import Any

import pytest

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.wire import WireError

STEP: dict[str, Any] = {"step": 3, "original": "RUN x", "workdir": "/w", "user": "app:1"}
RUN = pb.Run(step=pb.Step(number=3, workdir="/"), argv=["true"], network="default")


@pytest.mark.parametrize(
    "command",
    [
        wire.RunCommand(**STEP, argv=("/bin/sh", "-c", "x\n'é'"), env={"B": "1", "A": ""}, args={"C": "3"}),
        wire.RunCommand(**STEP, argv=("x",), script="", network="none", pauses=True),
        wire.RunCommand(**STEP, argv=("x",), attach=wire.Attach(input=True, probed=True, rows=1, columns=2)),
        wire.RunCommand(
            **STEP,
            argv=("x",),
            script="#!/bin/sh\n",
            mounts=(
                wire.BindMount(target="b", resource="step-3-mount-1", writable=True),
                wire.CacheMount(
                    target="/c", id="i", sharing="locked", read_only=True, mode=0o1777, uid=5, gid=6
                ),
                wire.CacheMount(target="/d", id="i", resource="step-3-mount-2"),
                wire.TmpfsMount(target="/t", size=2**40),
                wire.SecretMount(resource="step-3-mount-3", env="TOKEN", uid=2**32 - 2),
                wire.SecretMount(resource="step-3-mount-4", target="/run/secrets/s"),
                wire.SshMount(target="/a", id="\nwork", mode=0o666, uid=2, gid=3),
            ),
            network="host",
        ),
        wire.CopyCommand(**STEP, source="", target="/to/", target_is_directory=True, chown="", chmod="u=rwX"),
        wire.CopyCommand(**STEP, source="", target="to", link=True),
        wire.WorkdirCommand(**STEP),
    ],
)
def test_a_command_arrives_as_it_was_sent(command: wire.AnyCommand) -> None:
    arrived = messages.decode_to_guest(messages.encode(command).SerializeToString())
    assert isinstance(arrived, pb.ToGuest)
    assert messages.decode(arrived) == command
    if isinstance(command, wire.RunCommand):
        again = messages.decode(arrived)
        assert isinstance(again, wire.RunCommand)
        assert list(again.env) == list(command.env)  # `env` in a RUN shows the order


def run(**fields: Any) -> pb.ToGuest:
    changed = pb.Run.FromString(RUN.SerializeToString())
    changed.MergeFrom(pb.Run(**fields))
    return pb.ToGuest(run=changed)


def mounted(**fields: Any) -> pb.ToGuest:
    return run(mounts=[pb.Mount(**{"target": "/m", **fields})])


CACHE = pb.Mount.Cache(id="i", sharing="shared")


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        (pb.ToGuest(workdir=pb.Workdir(step=pb.Step(number=0, workdir="/"))), "a step has the number 0"),
        (run(step=pb.Step(workdir="/a\0b")), "workdir: '/a\\x00b' contains a NUL"),
        (run(step=pb.Step(user="a\0")), "user: "),
        (run(network="lan"), "network: expected default, none, host, found 'lan'"),
        (mounted(), "a mount of a kind that is not known"),
        (mounted(target="", tmpfs=pb.Mount.Tmpfs()), "nothing can be mounted on '/'"),
        (mounted(target="/proc/x", tmpfs=pb.Mount.Tmpfs()), "nothing can be mounted on '/proc/x'"),
        (mounted(tmpfs=pb.Mount.Tmpfs(size=-1)), "size of a mount: expected a number from 0"),
        (mounted(bind=pb.Mount.Bind()), "a bind mount without a resource"),
        (mounted(cache=pb.Mount.Cache(sharing="mine")), "sharing: expected shared, private, locked"),
        (mounted(cache=pb.Mount.Cache(id="\0", sharing="shared")), "id of a mount: "),
        (
            mounted(cache=pb.Mount.Cache(sharing="shared", access=pb.Mount.Access(mode=0o10000))),
            "mode of a mount: expected a number from 0 to 4095, found 4096",
        ),
        (mounted(target="", ssh=pb.Mount.Ssh(id="a")), "nothing can be mounted on '/'"),
        (mounted(resource="r", secret=pb.Mount.Secret(env="A=B")), "secret mount: expected the name of a"),
        (mounted(target="", resource="r", secret=pb.Mount.Secret()), "secret mount: expected the name of a"),
        (
            mounted(resource="r", secret=pb.Mount.Secret(access=pb.Mount.Access(uid=2**32 - 1))),
            "uid of a mount: ",
        ),
    ],
)
def test_a_command_that_no_host_of_ours_sends_is_refused(message: pb.ToGuest, refusal: str) -> None:
    with pytest.raises(WireError) as caught:
        messages.decode(message)
    assert refusal in str(caught.value)


def test_what_is_no_command_is_none() -> None:
    assert messages.decode(pb.ToGuest(finish=pb.Finish())) is None
    assert messages.decode(pb.ToGuest()) is None


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_000, 1024 * 1024])
def test_a_piece_is_written_as_protobuf_writes_it_and_read_without_it(size: int) -> None:
    data = os.urandom(size)
    written = messages.encode_piece(data[: size // 2], memoryview(data)[size // 2 :])
    plain = pb.ToGuest(piece=pb.Piece(data=data)).SerializeToString()
    assert pb.ToGuest.FromString(written) == pb.ToGuest.FromString(plain)
    for message in (written, plain):
        arrived = messages.decode_to_guest(message)
        assert isinstance(arrived, memoryview)
        assert bytes(arrived) == data


def test_a_piece_may_be_written_in_another_way_than_ours() -> None:
    unknown = b"\x10\x05"  # a field that a later version may have
    for inner in (unknown + b"\x0a\x04data", b"\x0a\x84\x00data", b"\x0a\x04data" + unknown):
        arrived = messages.decode_to_guest(b"\x3a" + bytes((len(inner),)) + inner)
        assert isinstance(arrived, memoryview)
        assert bytes(arrived) == b"data"


@pytest.mark.parametrize(
    "message",
    [messages.encode_piece(b"data")[:-1], b"\x3a", b"\x3a\xff\xff\xff\xff\xff\xff", b"\xff\xff"],
)
def test_what_is_damaged_is_refused(message: bytes) -> None:
    with pytest.raises(WireError, match="not a message of a session"):
        messages.decode_to_guest(message)
