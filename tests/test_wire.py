"""Durations, the Bootstrap block and pieces of files on the wire, with old peers in mind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firebuild_bootstrap import wire


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
    with pytest.raises(wire.WireError, match="HostTime of the metadata: 'noon' is not a number"):
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
    assert str(caught.value).startswith(f"{name} of the metadata: ")


def test_a_checksum_is_sha256() -> None:
    assert wire.checksum(b"").hex().startswith("e3b0c442")
    assert wire.method("Ping") == "/proto.RootfsServer/Ping"
