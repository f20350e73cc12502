"""A server with the right certificate that sends what it must not: an error in words, and nothing else."""

from __future__ import annotations

import os
import selectors
import socket
from typing import Any

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.attached import Control
from firebuild_bootstrap.guest.errors import ProtocolError
from firebuild_bootstrap.guest.probing import Probes
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.sandbox import Bind
from guest.build import Build, copy_command, run_command
from guest.local import Local
from guest.server import END, group, member, piece

ONE, TREE = group(), group(from_directory=True)


def run(**fields: Any) -> pb.ToGuest:
    step = {"number": 2, "text": "RUN x", "workdir": "/", "user": "0:0", **fields.pop("step", {})}
    fields = {"argv": ["/bin/true"], "network": "default", **fields}
    return pb.ToGuest(run=pb.Run(step=pb.Step(**step), **fields))


def secret(**fields: Any) -> pb.Mount:
    return pb.Mount(target="/m", resource="r", secret=pb.Mount.Secret(**fields))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.ToGuest(), "the server sent nothing where a step was due"),
        (piece(b"x"), "the server sent files where a step was due"),
        (ONE, "the server sent group where a step was due"),
        (pb.ToGuest(files_end=pb.FilesEnd()), "the server sent files_end where a step was due"),
        (run(step={"number": -(2**31)}), "a step has the number -2147483648"),
        (run(step={"workdir": "\0"}), "workdir: '\\x00' contains a NUL"),
        (run(step={"workdir": "/" + "n" * 1_000_000}), "File name too long"),
        (run(step={"user": "x" * 1_000_000}), "USER xxx"),
        (run(step={"user": "9" * 5000}), "ids go from 0 to 4294967294"),
        (run(argv=[]), "the command is empty"),
        (run(argv=["a\0b"]), "contains a NUL or invalid Unicode"),
        (run(env=[pb.Variable(name="a=b")]), "the environment has an impossible name"),
        (run(network="lan"), "network: expected default, none, host, found 'lan'"),
        (run(mounts=[pb.Mount(target="/m")]), "a mount of a kind that is not known"),
        (run(mounts=[pb.Mount(target="/m", bind=pb.Mount.Bind())]), "a bind mount without a resource"),
        (run(mounts=[pb.Mount(target="/../proc", tmpfs=pb.Mount.Tmpfs())]), "/proc"),
        (run(mounts=[pb.Mount(target="/m", tmpfs=pb.Mount.Tmpfs(size=-1))]), "size of a mount: expected a"),
        (run(mounts=[secret(access=pb.Mount.Access(mode=-1))]), "mode of a mount: expected a number from 0"),
        (run(mounts=[secret(access=pb.Mount.Access(uid=2**40))]), "uid of a mount: expected a number from 0"),
        (run(mounts=[secret(env="A=B")]), "expected the name of a variable"),
    ],
)
def test_a_step_that_no_step_can_be_is_refused(local: Local, message: pb.ToGuest, words: str) -> None:
    error = local.refusal(message)
    assert words in error.message
    assert len(error.message) < 4100, "the server sees no more of what it has sent"
    assert error.exit_status == 1
    assert local.tree() == {}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (run(), "expected a command in place of the failed one, the server sent something else"),
        (piece(b"x"), "expected a command in place of the failed one, the server sent something else"),
        (pb.ToGuest(finish=pb.Finish()), "expected a command in place of the failed one"),
        (run(attach=pb.Attach(window=pb.Window(rows=-1))), "can't be read: a terminal of -1 rows"),
        (run(attach=pb.Attach(), argv=[]), "the command is empty"),
    ],
)
def test_in_the_place_of_a_run_comes_another_one_or_nothing(
    local: Local, message: pb.ToGuest, words: str
) -> None:
    local.server.meanwhile = [None, message]
    assert words in local.refusal(run_command("", argv=(), pauses=True)).message


@pytest.mark.parametrize(
    "early", [run(), pb.ToGuest(finish=pb.Finish()), pb.ToGuest(checkpoint=pb.Checkpoint())]
)
def test_a_step_that_comes_before_the_last_one_is_done_ends_the_session(
    local: Local, early: pb.ToGuest
) -> None:
    local.server.meanwhile = [early]
    local.server.resources["r"] = [ONE, piece(member("s")), END]
    error = local.refusal(run_command("", mounts=(wire.BindMount(target="/m", resource="r"),)))
    assert error.message == f"the server sent {early.WhichOneof('message')} before the last step was done"


def test_probes_come_one_at_a_time() -> None:
    told: list[tuple[int, bytes]] = []
    ours, theirs = socket.socketpair()
    with selectors.DefaultSelector() as selector, theirs:
        probes = Probes(ours, selector, lambda status, output: told.append((status, output)))
        probes.ask([])  # there is none to be killed
        probes.ask(["a"])
        with pytest.raises(ProtocolError, match="before the last one had ended"):
            probes.ask(["b"])
        head, (pipe,), _, _ = socket.recv_fds(theirs, 4, 1)
        assert theirs.recv(int.from_bytes(head)) == b'["a"]'
        os.write(pipe, b"x" * 5000)
        theirs.send(b"\x07")
        probes.ready("probes")
        assert told == [(7, b"x" * 4096)]
        probes.ready("probe")  # which one look had found together with the status
        theirs.send(b"\x08")  # nobody has asked
        probes.ready("probes")
        assert len(told) == 1
        probes.ask(["c"])
        theirs.shutdown(socket.SHUT_RDWR)
        probes.ready("probes")
        assert not probes.open
        os.close(pipe)
        probes.close()
    control = Control(lambda _: None)
    control.put_probe(["a"])
    control.put_probe([])
    with pytest.raises(ProtocolError, match="before the last one had ended"):
        control.put_probe(["b"])
    control.close()


@pytest.mark.parametrize(
    "files",
    [
        [],
        [ONE, piece(member("s", kind=tar.DIRECTORY)), END],
        [ONE, piece(member("s") + member("t")), END],
        [ONE, piece(member("s", size=wire.MAX_SECRET_BYTES + 1)), END],
    ],
)
def test_what_is_no_secret_is_refused(local: Local, files: list[pb.ToGuest]) -> None:
    local.server.resources["r"] = files
    error = local.refusal(run(mounts=[secret(access=pb.Mount.Access(mode=0o400))]))
    assert error.reason == "protocol"
    said = ("expected a file as the secret", "expected one file as the secret", "a secret has at most ")
    assert any(words in error.message for words in said)


@pytest.mark.root
@pytest.mark.parametrize("target", ["/t", "../../../t", "/../t/"])
def test_files_stay_in_the_image_whatever_links_come_with_them(local: Local, target: str) -> None:
    outside = local.image.parent / "outside"
    outside.mkdir()
    up = member("l", kind=tar.SYMLINK, linkname="../" * 40 + str(outside)[1:])
    stream = [TREE, piece(up + member("l/evil", b"x")), END]
    local.copy(stream, target)
    assert os.listdir(outside) == []
    inside = local.image / str(outside)[1:] / "evil"
    assert inside.read_text() == "x"


@pytest.mark.needs("bwrap", "busybox")
def test_a_link_that_comes_for_a_bind_mount_shows_nothing_of_the_machine(build: Build) -> None:
    build.server.resources["r"] = [ONE, piece(member("s", kind=tar.SYMLINK, linkname="/run/firebuild")), END]
    abort = build.fail(run_command("ls /m", mounts=(wire.BindMount(target="/m", resource="r"),)))
    assert "what was sent is neither a file nor a directory" in abort.error
    assert build.server.stdout == b""


@pytest.mark.needs("bwrap", "busybox")
def test_what_a_server_sends_reaches_no_terminal_as_it_is(build: Build) -> None:
    build.server.resources["files"] = [ONE, piece(member("s")), END]
    outcome = build.run(copy_command("/t", chown="a\x1b[2J\u202e"))
    assert outcome.status == 1
    assert outcome.stderr.startswith("vminit: --chown a\\x1b[2J\\u202e: "), outcome.stderr


@pytest.mark.needs("bwrap", "busybox")
def test_layers_need_no_scratch_directory_for_mounts(build: Build) -> None:
    directory = build.directory / "layers"
    for name in ("lower/0", "lower/1"):
        (directory / name).mkdir(parents=True)
    build.extra_binds = [
        Bind(directory, "/layers", read_only=False),
        Bind(build.image, "/layers/lower/1"),
    ]
    build.arguments = ["--layers", "/layers"]
    build.server.resources |= {"r": [ONE, piece(member("s", b"bound")), END], "files": []}
    build.succeed(
        run_command("cat /m", mounts=(wire.BindMount(target="/m", resource="r"),)), copy_command("/x", step=3)
    )
    assert build.server.stdout == b"bound"
    assert sorted(os.listdir(directory / "upper/2/fs")) == []
