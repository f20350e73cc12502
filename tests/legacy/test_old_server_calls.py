"""What a Go server says and is told, call by call."""

from __future__ import annotations

import json

import pytest

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.run import BATCH_BYTES
from firebuild_bootstrap.legacy.commands import encode_command
from guest.build import Build, copy_command
from guest.local import Local
from guest.server import chunk, eof, header

SANDBOX = pytest.mark.needs("bwrap", "busybox")


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
    for name, message in build.server.logs:
        assert not message.data
        assert not message.HasField("event")
        lines[name] += message.line
    assert lines == {"stdout": ["one", "two\ufffd", "rest"], "stderr": ["er"]}


def test_an_old_server_gets_a_long_line_in_pieces(local: Local) -> None:
    local.server.commands = []
    with local.calls() as host:
        assert list(host.steps()) == []
        for _ in range(3):
            host.write(0, "stdout", b"x" * BATCH_BYTES)
        host.write(0, "stdout", "é".encode()[:1])
        host.finished(0, 0, 0.0)
    text = "".join(line for _, message in local.server.logs for line in message.line)
    assert text == "x" * 3 * BATCH_BYTES + "\ufffd"
    assert max(len(line) for _, message in local.server.logs for line in message.line) <= 2 * BATCH_BYTES


def classic(name: str, data: bytes = b"", **fields: object) -> list[pb.ResourceChunk]:
    fields = {"kind": 0, "entryPath": "", "id": "", "targetWorkdir": "/", **fields}
    return [header(name, **fields), *([chunk(data, "any")] if data else []), eof("other")]


def old_copy(target: str = "/t", **fields: object) -> str:
    return encode_command(copy_command(target, step=0))


@pytest.mark.root
def test_an_old_servers_headers_say_where_files_go(local: Local) -> None:
    local.server.resources["files"] = [
        *classic("src", isDir=True, targetPath="/t/dir", fileMode=0o700 | 1 << 31),
        *classic("src/a", b"A", targetPath="/t/dir/a", fileMode=0o755 | 1 << 23, targetUser="7:8"),
        *classic("src/b", b"B", targetPath="rel", targetWorkdir="/w"),
        *classic("src/c", b"C", targetPath="/t/dir"),
        *classic("src/d", b"D", targetPath="/t/"),
    ]
    local.execute(old_copy())
    expected = {
        "t": "dir",
        "t/dir": "dir",
        "t/dir/a": "A",
        "w": "dir",
        "w/rel": "B",
        "t/dir/c": "C",
        "t/d": "D",
    }
    assert local.tree() == expected
    assert (local.mode("t/dir/a"), local.owner("t/dir/a"), local.mode("t/dir")) == (0o4755, (7, 8), 0o700)
    assert local.server.events == []


def test_go_file_modes_carry_setgid_and_sticky_elsewhere(local: Local) -> None:
    local.server.resources["files"] = classic("f", targetPath="/f", fileMode=0o750 | 1 << 22 | 1 << 20)
    local.execute(old_copy())
    assert local.mode("f") == 0o3750
