"""The DHCP client's messages; a whole conversation with a real server is in the tests that boot."""

from __future__ import annotations

import socket

import pytest

from firebuild_bootstrap.guest.init_network import Reply, decode, encode, settings_of
from firebuild_bootstrap.guest.init_settings import NetworkSettings

HARDWARE = bytes.fromhex("525400123456")
ADDRESS = socket.inet_aton("10.0.2.15")


def reply(options: dict[int, bytes], transaction: int = 7, operation: int = 2) -> bytes:
    return encode(operation, transaction, HARDWARE, options, ADDRESS)


def test_a_message_has_the_form_of_the_rfc() -> None:
    packet = encode(1, 0x01020304, HARDWARE, {53: b"\x01", 55: b"\x01\x03\x06"})
    assert packet[:12] == bytes([1, 1, 6, 0, 1, 2, 3, 4, 0, 0, 0x80, 0])
    assert packet[28:44] == HARDWARE + bytes(10)
    assert len(packet[:236]) == 236
    assert packet[236:] == b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\x37\x03\x01\x03\x06" + b"\xff"


def test_a_reply_is_read_with_its_options() -> None:
    found = decode(reply({53: b"\x05", 0x36: b"abcd"}), 7)
    assert found == Reply(5, ADDRESS, {53: b"\x05", 54: b"abcd"})


def test_padding_and_a_missing_end_do_no_harm() -> None:
    packet = reply({53: b"\x02"})
    assert decode(packet[:-1], 7) == decode(packet, 7)
    assert decode(packet[:240] + b"\0\0" + packet[240:], 7) == decode(packet, 7)
    assert decode(packet[:240], 7) == Reply(0, ADDRESS, {})
    assert decode(packet[:240] + b"\x35", 7) == Reply(0, ADDRESS, {})


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"short",
        reply({}, transaction=8),
        reply({}, operation=1),
        reply({}).replace(b"\x63\x82", b"\0\0"),
    ],
)
def test_what_is_not_for_us_is_ignored(packet: bytes) -> None:
    assert decode(packet, 7) is None


def test_a_lease_becomes_settings() -> None:
    def addresses(*texts: str) -> bytes:
        return b"".join(socket.inet_aton(text) for text in texts)

    options = {
        1: addresses("255.255.255.0"),
        3: addresses("10.0.2.2", "10.0.2.9"),
        6: addresses("10.0.2.3", "10.0.2.4", "10.0.2.5"),
    }
    assert settings_of(Reply(5, ADDRESS, options)) == NetworkSettings(
        "static", "10.0.2.15", "255.255.255.0", "10.0.2.2", "", ("10.0.2.3", "10.0.2.4")
    )
    assert settings_of(Reply(5, ADDRESS, {})) == NetworkSettings("static", "10.0.2.15", "255.0.0.0")
