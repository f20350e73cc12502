"""Commands as JSON: what old peers read, what ours do, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.legacy.commands import (
    GUEST,
    MOUNTS_SINCE,
    announced,
    decode_command,
    encode_command,
    needs_mounts,
)

RUN = wire.RunCommand(
    step=3,
    original="RUN make $X",
    workdir="/srv",
    user="app",
    argv=("/bin/sh", "-c", "make $X"),
    env={"A": "1"},
    args={"B": "2"},
)
COPY = wire.CopyCommand(
    step=4, original="COPY a /b/", source="step-4", target="/b/", chown="1:2", chmod="u+x"
)
MOUNTED = wire.RunCommand(
    step=5,
    original="RUN x",
    workdir="/srv",
    argv=("x",),
    network="none",
    mounts=(
        wire.BindMount(target="a", resource="step-5-mount-1", writable=True),
        wire.CacheMount(
            target="/c",
            id="c",
            sharing="locked",
            resource="step-5-mount-2",
            read_only=True,
            mode=0o700,
            uid=1,
            gid=2,
        ),
        wire.TmpfsMount(target="/dev/shm", size=4096),
        wire.SecretMount(resource="step-5-mount-4", env="TOKEN"),
        wire.SecretMount(resource="step-5-mount-5", target="/run/secrets/s", mode=0o440, uid=3, gid=4),
    ),
)


def test_a_run_has_the_members_that_old_guests_read() -> None:
    document = json.loads(encode_command(RUN))
    assert document["OriginalCommand"] == "RUN make $X"
    assert document["Command"] == "make $X"
    assert document["Shell"] == {"OriginalCommand": "", "Commands": ["/bin/sh", "-c"]}
    assert document["Workdir"] == {"OriginalCommand": "", "Value": "/srv"}
    assert document["User"] == {"OriginalCommand": "", "Value": "app"}
    assert document["Env"] == {"A": "1"}
    assert document["Args"] == {"B": "2"}


def test_a_copy_has_the_members_that_old_guests_read() -> None:
    document = json.loads(encode_command(COPY))
    assert document["Source"] == document["OriginalSource"] == "step-4"
    assert document["Target"] == "/b/"
    assert document["Stage"] == ""
    assert document["UserFromLocalChown"] == {"OriginalCommand": "", "Value": "1:2"}


def test_an_add_has_no_stage() -> None:
    add = wire.CopyCommand(step=1, original="ADD a b", source="s", target="b", keyword="ADD")
    assert "Stage" not in json.loads(encode_command(add))
    assert decode_command(encode_command(add)) == add


@pytest.mark.parametrize(
    "command",
    [
        RUN,
        COPY,
        wire.RunCommand(step=1, original="RUN x", argv=("x",), script="#!/bin/sh\n"),
        wire.WorkdirCommand(step=2, original="WORKDIR /a", workdir="/a"),
        MOUNTED,
    ],
)
def test_what_is_written_is_read(command: wire.AnyCommand) -> None:
    assert decode_command(encode_command(command)) == command


def test_commands_of_an_old_server_are_understood() -> None:
    run = decode_command(
        '{"OriginalCommand":"RUN true","Args":{"B":"2"},"Command":"true","Env":{"A":"1"},'
        '"Shell":{"OriginalCommand":"","Commands":["/bin/sh","-c"]},'
        '"Workdir":{"OriginalCommand":"","Value":"/"},"User":{"OriginalCommand":"","Value":"0:0"}}'
    )
    assert isinstance(run, wire.RunCommand)
    assert (run.step, run.argv) == (0, ("/bin/sh", "-c", "true"))
    copy = decode_command(
        '{"originalcommand":"COPY s t","OriginalSource":"s","Source":"s","Stage":"","Target":"t",'
        '"Workdir":{"Value":"/w"},"User":{"Value":"0:0"},"UserFromLocalChown":null,"Future":1}'
    )
    assert isinstance(copy, wire.CopyCommand)
    assert (copy.source, copy.target, copy.workdir, copy.chown) == ("s", "t", "/w", None)


def test_an_unknown_instruction_is_skipped() -> None:
    assert decode_command('{"OriginalCommand":"VOLUME /x"}') is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "lacks OriginalCommand"),
        ('{"OriginalCommand":"RUN x"}', "lacks Shell"),
        ('{"OriginalCommand":"RUN x","Shell":{"Commands":"sh"}}', "Commands of a command: expected"),
        ('{"OriginalCommand":"RUN x","Argv":[1]}', "Argv of a command: expected strings"),
        ('{"OriginalCommand":"RUN x","Argv":["x"],"Env":{"A":1}}', "Env of a command: expected"),
        ('{"OriginalCommand":"RUN x","Argv":["x"],"Step":true}', "Step of a command: expected int"),
        ('{"OriginalCommand":"RUN x","Argv":["x"],"User":"root"}', "User of a command: expected an"),
        ('{"OriginalCommand":"RUN x","Argv":["x"],"Step":-1}', "Step of a command: expected a number"),
        (
            '{"OriginalCommand":"RUN x","Argv":["x"],"Step":2147483648}',
            "Step of a command: expected a number",
        ),
        ('{"OriginalCommand":"COPY x","Source":"x","Target":"a\\u0000"}', "Target of a command: .* a NUL"),
        ('{"OriginalCommand":"COPY x","Source":"\\ud800","Target":"a"}', "Source of a command: .* a broken"),
        ('{"OriginalCommand":"WORKDIR x","Workdir":{"Value":"\\u0000"}}', "Value of a command: .* a NUL"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_command_is_refused_in_words(text: str, complaint: str) -> None:
    with pytest.raises(wire.WireError, match=complaint):
        decode_command(text)


# --- mounts ---------------------------------------------------------------------------------------


def test_a_run_without_mounts_has_no_key_for_them() -> None:
    assert not {"Mounts", "Network"} & json.loads(encode_command(RUN)).keys()
    assert not needs_mounts(RUN)
    assert not needs_mounts(COPY)


def test_the_resources_of_mounts_are_those_that_the_guest_asks_for() -> None:
    assert wire.mount_resources(MOUNTED) == tuple(f"step-5-mount-{number}" for number in (1, 2, 4, 5))
    assert wire.mount_resources(COPY) == ()
    assert needs_mounts(MOUNTED)


def test_a_command_that_needs_mounts_is_never_written_for_an_old_guest() -> None:
    for mounted in (MOUNTED, dataclasses.replace(RUN, network="host")):
        with pytest.raises(ValueError, match="without its mounts"):
            encode_command(mounted, extended=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Type": "npipe"}, "Type of a mount: 'npipe'"),
        ({"Type": None}, "lacks Type"),
        ({"Target": ""}, "Target of a mount is empty"),
        ({"Target": ".."}, "nothing can be mounted on '/'"),
        ({"Target": "/proc"}, "nothing can be mounted on '/proc'"),
        ({"Target": "/x/../proc/self"}, "nothing can be mounted on '/proc/self'"),
        ({"Target": "//dev/"}, "nothing can be mounted on '/dev'"),
        ({"Target": "/a\0"}, "NUL"),
        ({"Resource": ""}, "Resource of a bind mount is empty"),
        ({"Writable": 1}, "Writable of a command: expected bool"),
        ({"Type": "tmpfs", "Size": -1}, "Size of a command: expected a number"),
        ({"Type": "tmpfs", "Size": True}, "Size of a command: expected int"),
        ({"Type": "cache"}, "lacks Id"),
        ({"Type": "cache", "Id": "a\0"}, "NUL"),
        (
            {"Type": "cache", "Id": "c", "Sharing": "often"},
            "Sharing of a command: expected shared, private, locked",
        ),
        ({"Type": "cache", "Id": "c", "Mode": 0o10000}, "Mode of a command"),
        ({"Type": "cache", "Id": "c", "Uid": 2**32 - 1}, "Uid of a command"),
        ({"Type": "secret", "Target": ""}, "Env of a secret mount"),
        ({"Type": "secret", "Env": "A=B"}, "Env of a secret mount"),
        ({"Type": "secret", "Resource": None}, "Resource of a secret mount is empty"),
    ],
)
def test_a_mount_that_makes_no_sense_is_refused(changes: dict[str, object], words: str) -> None:
    mount = {"Type": "bind", "Target": "/a", "Resource": "r", **changes}
    document = json.loads(encode_command(RUN)) | {"Mounts": [mount]}
    with pytest.raises(wire.WireError) as caught:
        decode_command(json.dumps(document))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"Mounts": {}}, "Mounts of a command: expected list"),
        ({"Mounts": ["/a"]}, "Mounts of a command: expected objects"),
        ({"Network": "wifi"}, "Network of a command: expected default, none, host, found 'wifi'"),
    ],
)
def test_mounts_and_network_have_their_types(members: dict[str, object], words: str) -> None:
    with pytest.raises(wire.WireError, match=words):
        decode_command(json.dumps(json.loads(encode_command(RUN)) | members))


def test_only_versions_that_exist_count_as_announced() -> None:
    assert announced(GUEST) == announced(GUEST[1:]) == MOUNTS_SINCE
    assert announced([("firebuild-guest", "1"), ("x", "2")]) == 1
    assert announced([("firebuild-guest", "3"), ("firebuild-guest", b"2")]) == 0
