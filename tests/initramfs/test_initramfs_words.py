"""The words between host and machine: the kernel's command line, and the report on the serial console."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.init_settings import (
    LINK_LOCAL,
    PREFIX,
    InitError,
    InitSettings,
    NetworkSettings,
    Report,
    class_netmask,
    parse_command_line,
    parse_ip,
    same_network,
    say,
)
from firebuild_bootstrap.initramfs import EMULATED, GuestReport, StaticAddress, kernel_arguments

# --- the command line ---------------------------------------------------------------------------


def test_the_init_understands_what_the_host_writes() -> None:
    text = kernel_arguments(
        reboot="k",
        network=StaticAddress("172.16.0.2/30", "172.16.0.1", "eth0", ("1.1.1.1", "9.9.9.9")),
        root="/dev/vdb",
        scratch="/dev/vdc",
        caches=("0" * 64, "f" * 64),
        mmds="http://169.254.169.253",
        mmds_timeout=1.5,
        connect_timeout=7,
        extra=EMULATED,
    )
    assert text.startswith("console=ttyS0 reboot=k panic=-1 quiet ")
    assert text.endswith("tsc_early_khz=2600000")
    network = NetworkSettings(
        "static", "172.16.0.2", "255.255.255.252", "172.16.0.1", "eth0", ("1.1.1.1", "9.9.9.9")
    )
    assert parse_command_line(text) == InitSettings(
        root="/dev/vdb",
        scratch="/dev/vdc",
        caches=("0" * 64, "f" * 64),
        mmds="http://169.254.169.253",
        mmds_timeout=1.5,
        connect_timeout=7.0,
        network=network,
    )


def test_caches_are_named_by_sums() -> None:
    with pytest.raises(InitError, match=r"firebuild\.caches: expected SHA-256 sums, found '\.\./x'"):
        parse_command_line("firebuild.caches=../x")


def test_the_defaults_of_both_sides_agree() -> None:
    assert parse_command_line(kernel_arguments()) == InitSettings() == parse_command_line("quiet ro")
    assert parse_command_line(kernel_arguments(network=None)).network.method == "dhcp"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("dhcp", NetworkSettings("dhcp")),
        ("on", NetworkSettings("dhcp")),
        ("off", NetworkSettings("none")),
        ("none", NetworkSettings("none")),
        ("", NetworkSettings("none")),
        ("169.254.0.15", LINK_LOCAL),
        (":::::eth1:dhcp", NetworkSettings("dhcp", device="eth1")),
        (":::::eth1", NetworkSettings("dhcp", device="eth1")),
        ("::::::off", NetworkSettings("none")),
        ("10.0.0.2:::::eth1:off", NetworkSettings("static", "10.0.0.2", "255.0.0.0", device="eth1")),
        (
            "10.0.0.2:10.0.0.9:10.0.0.1:255.255.255.0:name:eth0:off:8.8.8.8::10.0.0.3",
            NetworkSettings("static", "10.0.0.2", "255.255.255.0", "10.0.0.1", "eth0", ("8.8.8.8",)),
        ),
    ],
)
def test_ip_is_read_as_the_kernel_reads_it(value: str, expected: NetworkSettings) -> None:
    assert parse_ip(value) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("firebuild.rot=/dev/vdb", r"firebuild\.rot: there is no such setting"),
        ("firebuild.network=x", r"firebuild\.network: there is no such setting"),
        ("firebuild.mmds_timeout=soon", "expected seconds, found 'soon'"),
        ("firebuild.connect_timeout=-1", "expected seconds, found '-1'"),
        ("firebuild.end=explode", "expected reboot or poweroff, found 'explode'"),
        ("ip=10.0.0", "'10.0.0' is not an IPv4 address"),
        ("ip=10.0.0.2::gateway", "'gateway' is not an IPv4 address"),
        ("ip=::::::bootp", "expected dhcp or off in field 7, found 'bootp'"),
        ("ip=fd00::1", "not an IPv4 address"),
    ],
)
def test_a_wrong_setting_is_told_in_words(text: str, message: str) -> None:
    with pytest.raises(InitError, match=message) as caught:
        parse_command_line(text)
    assert caught.value.status == "settings"


def test_masks_and_networks() -> None:
    masks = [class_netmask(address) for address in ("10.1.1.1", "172.16.0.1", "192.168.0.1", "x")]
    assert masks == ["255.0.0.0", "255.255.0.0", "255.255.255.0", "255.255.255.0"]
    assert same_network(("10.0.0.1", "10.0.0.254"), "255.255.255.0")
    assert not same_network(("10.0.0.1", "10.0.1.1"), "255.255.255.0")


@pytest.mark.parametrize(
    "fields", [{"root": "/dev/v da"}, {"mmds": "http://ü"}, {"extra": ['a="b"']}, {"extra": ["a\nb"]}]
)
def test_what_no_command_line_can_hold_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"can't be an argument of a kernel: .*\n  hint: kernel_args are"):
        kernel_arguments(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("network", [StaticAddress("10.0.0.300/8"), StaticAddress(gateway="here")])
def test_a_wrong_address_is_refused(network: StaticAddress) -> None:
    with pytest.raises(InputError, match="the machine's network: "):
        kernel_arguments(network=network)


# --- the report ---------------------------------------------------------------------------------


def test_the_host_understands_what_the_init_says(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.write_text("[    0.1] the kernel says something without an end")
    say(Report("failed", 4, 'no "build" ü nowhere').line(), str(console))
    parsed = GuestReport.parse(console.read_text().replace("\n", "\r\n") + "[   5.7] reboot: Restarting\r\n")
    assert parsed == GuestReport("failed", 4, 'no "build" ü nowhere')
    assert parsed.exit_code == 4


def test_a_report_is_one_line_of_ascii_whatever_the_reason() -> None:
    line = Report("internal", message="ü\n" * 5000).line()
    assert line.isascii()
    assert "\n" not in line
    assert len(line) < 8000
    assert json.loads(line.removeprefix(PREFIX))["version"] == 1


def test_a_machine_without_a_console_stays_silent(tmp_path: Path) -> None:
    say("anything", str(tmp_path))


@pytest.mark.parametrize(
    ("serial", "expected"),
    [
        ("", GuestReport("none", None, "the machine ended without a report")),
        (
            "a\n\nb\r\nc\n",
            GuestReport("none", None, "the machine ended without a report; its last output: a / b / c"),
        ),
        (
            "x\n[ 1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n[ 1.1] CPU",
            GuestReport(
                "panic", None, "the machine's kernel gave up: Attempted to kill init! exitcode=0x00000100"
            ),
        ),
        (
            "Initramfs unpacking failed: write error\nKernel panic - not syncing: VFS: Unable to mount root",
            GuestReport(
                "panic",
                None,
                "the machine's kernel gave up: VFS: Unable to mount root"
                " (the initramfs could not be unpacked: write error; give the machine 256 MiB of memory,"
                " and a kernel that knows the initramfs's compression)",
            ),
        ),
    ],
)
def test_a_machine_that_could_not_report_is_described(serial: str, expected: GuestReport) -> None:
    assert GuestReport.parse(serial) == expected
    assert expected.exit_code == 70


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"status": 1, "message": ""}', '{"status": "success"}', '{"status": "success", "exit"'],
)
def test_a_garbled_report_is_none(text: str) -> None:
    assert GuestReport.parse(f"{PREFIX}{text}\n").status == "none"


def test_the_last_report_counts_and_odd_values_are_unknown() -> None:
    first, second = Report("failed", 1, "no").line(), Report("success", 0).line()
    assert GuestReport.parse(f"{first}\n{second}\n{PREFIX}cut off") == GuestReport("success", 0)
    odd = f'{PREFIX}{{"status": "success", "exit": true, "message": ""}}'
    assert GuestReport.parse(odd) == GuestReport("success", None)
    assert GuestReport.parse(odd).exit_code == 70
