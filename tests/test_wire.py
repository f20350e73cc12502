"""Commands, durations and the Bootstrap block on the wire, with old peers in mind."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firebuild_bootstrap import wire
from firebuild_bootstrap.legacy.commands import (
    GUEST,
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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5s", 5), ("1m30s", 90), ("1.5h", 5400), ("250ms", 0.25), ("0", 0), (".5s", 0.5), ("3µs", 3e-6)],
)
def test_durations_are_read_as_go_writes_them(text: str, seconds: float) -> None:
    assert wire.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "-5s", "1d", "5s!", "1" * 300_000, "9" * 50 + "h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(wire.WireError, match="expected a duration"):
        wire.parse_duration(text)


@given(st.integers(min_value=0, max_value=10**9))
def test_durations_survive_a_round_trip_to_the_millisecond(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert wire.parse_duration(wire.format_duration(seconds)) == pytest.approx(seconds)


BLOCK = wire.BootstrapBlock(
    host_port="127.0.0.1:1",
    ca_chain="ca",
    cert="cert",
    key="-----BEGIN PRIVATE KEY-----",
    server_name="b.example.internal",
    ping_interval=2.5,
    host_time=1234.5,
)


def test_the_bootstrap_block_has_string_leaves_only_and_survives_a_round_trip() -> None:
    document = BLOCK.as_json()
    assert {type(value) for value in document.values()} == {str}
    assert document["PingInterval"] == "2500ms"
    assert wire.BootstrapBlock.from_json(document) == BLOCK


def test_an_old_host_gives_no_time() -> None:
    document = BLOCK.as_json()
    del document["HostTime"], document["PingInterval"]
    block = wire.BootstrapBlock.from_json(document)
    assert (block.host_time, block.ping_interval) == (None, 5.0)


def test_the_key_is_not_in_the_repr_nor_in_an_error() -> None:
    assert "PRIVATE" not in repr(BLOCK)
    document: dict[str, object] = {**BLOCK.as_json(), "Cert": 5}
    with pytest.raises(wire.WireError, match="lacks Cert") as caught:
        wire.BootstrapBlock.from_json(document)
    assert "PRIVATE" not in str(caught.value)
    with pytest.raises(wire.WireError, match="HostTime"):
        wire.BootstrapBlock.from_json({**BLOCK.as_json(), "HostTime": "noon"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("HostTime", text) for text in ("nan", "inf", "-1", "1e300")),
        *(("PingInterval", text) for text in ("25h", f"{'9' * 400}h", 5, "x" * 100_000)),
    ],
)
def test_a_time_that_makes_no_sense_is_refused_in_a_short_sentence(name: str, value: object) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.BootstrapBlock.from_json({**BLOCK.as_json(), name: value})
    assert len(str(caught.value)) < 200


def test_a_checksum_is_sha256() -> None:
    assert wire.checksum(b"").hex().startswith("e3b0c442")
    assert wire.method("Ping") == "/proto.RootfsServer/Ping"


# --- mounts ---------------------------------------------------------------------------------------


def test_the_resources_of_mounts_are_those_that_the_guest_asks_for() -> None:
    assert wire.mount_resources(MOUNTED) == tuple(f"step-5-mount-{number}" for number in (1, 2, 4, 5))
    assert wire.mount_resources(COPY) == ()
    assert needs_mounts(MOUNTED)
    assert not needs_mounts(RUN)
    assert not needs_mounts(COPY)


def test_a_command_that_needs_mounts_is_never_written_for_an_old_guest() -> None:
    for mounted in (MOUNTED, dataclasses.replace(RUN, network="host")):
        with pytest.raises(ValueError, match="without its mounts"):
            encode_command(mounted)


def test_only_the_first_version_counts_as_announced() -> None:
    assert announced([("x", "1"), GUEST])
    assert not announced([("firebuild-guest", "2"), ("x", "1")])
