"""The block machine.external: what it takes, and how its mistakes are named."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from firebuild_bootstrap.machine.external.settings import ExternalSettings, split_host_port
from firebuild_bootstrap.settings import load_settings
from firebuild_pki import SettingsError


def load(tmp_path: Path, text: str, **environ: str) -> ExternalSettings:
    file = tmp_path / "config.yaml"
    file.write_text(f"machine: {{external: {text}}}\n")
    return load_settings(file, environ).machine.external


def test_metadata_go_to_standard_output_unless_something_else_is_said(tmp_path: Path) -> None:
    assert ExternalSettings().to_stdout
    assert load(tmp_path, "{metadata: stdout}").to_stdout
    assert load(tmp_path, "{metadata: {file: /x}}").metadata.file == "/x"
    assert load(tmp_path, "{metadata: {firecracker_socket: /x}}").metadata.firecracker_socket == "/x"
    assert not load(tmp_path, "{metadata: {file: /x}}").to_stdout
    assert not load(tmp_path, "{metadata: {firecracker_socket: /x}}").to_stdout


def test_metadata_can_come_from_the_environment(tmp_path: Path) -> None:
    found = load(tmp_path, "{}", FIREBUILD_MACHINE__EXTERNAL__METADATA__FILE="/x")
    assert found.metadata.file == "/x"


@pytest.mark.parametrize("metadata", ["stdout", {"file": "/x"}, {"firecracker_socket": "/y"}])
def test_what_is_dumped_loads_again_and_is_what_the_schema_says(metadata: object) -> None:
    settings = ExternalSettings.model_validate({"metadata": metadata})
    dumped = settings.model_dump(mode="json")
    assert dumped["metadata"] == metadata
    assert ExternalSettings.model_validate(dumped) == settings
    assert ExternalSettings(metadata=settings.metadata) == settings
    jsonschema.validate({"metadata": metadata}, ExternalSettings.json_schema())


@pytest.mark.parametrize("metadata", ["stderr", {}, {"file": "/x", "firecracker_socket": "/y"}])
def test_the_schema_refuses_what_the_settings_refuse(metadata: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"metadata": metadata}, ExternalSettings.json_schema())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{metadata: stderr}", "metadata: expected stdout, {file: PATH} or {firecracker_socket: PATH}"),
        ("{metadata: {}}", "metadata: expected stdout, {file: PATH}"),
        ("{metadata: {file: /a, firecracker_socket: /b}}", "metadata: expected stdout, {file: PATH}"),
        ("{metadata: {fil: /a}}", "metadata.fil"),
        ("{metadata: {file: ''}}", "metadata.file"),
        ("{bind: host.example}", 'bind: expected an IP address of this host, found "host.example"'),
        (
            "{bind: '10.0.0.1:70000'}",
            'bind: expected host:port such as 192.0.2.1:7000, found "10.0.0.1:70000"',
        ),
        ("{bind: '1:2:3'}", "bind: '1:2:3' does not appear to be an IPv4 or IPv6 address"),
        (
            "{bind: 0.0.0.0}",
            "a guest can't connect to 0.0.0.0: set advertise to the address that it connects to",
        ),
        ("{bind: '::'}", "a guest can't connect to ::: set advertise"),
        ("{advertise: 'x:0'}", 'advertise: expected a port that the guest can call, found "x:0"'),
        ("{advertise: 'a b'}", "advertise: expected host:port"),
        ("{end_timeout: 0s}", "end_timeout: "),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert problem in str(caught.value), str(caught.value)
    assert "config.yaml:1:" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1", "10.0.0.1", None),
        ("10.0.0.1:7000", "10.0.0.1", 7000),
        ("build.example:7000", "build.example", 7000),
        ("fd00::1", "fd00::1", None),
        ("[fd00::1]:7000", "fd00::1", 7000),
        ("[fd00::1]", "fd00::1", None),
    ],
)
def test_hosts_and_ports_are_told_apart(text: str, host: str, port: int | None) -> None:
    assert split_host_port(text) == (host, port)
