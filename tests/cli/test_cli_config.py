"""`firebuild config`, and where settings come from."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from cli.conftest import Cli


@pytest.fixture
def config(cli: Cli) -> Path:
    file = Path("firebuild.yaml").absolute()
    file.write_text("ca:\n  provider: embedded\nbootstrap:\n  build_timeout: 5m\n")
    return file


def test_check_says_what_it_looked_at(cli: Cli, config: Path) -> None:
    default = "defaults and environment: ok (CA provider embedded, machine local)\n"
    assert cli("config", "check").out == default
    assert cli("config", "check", "--config", config).out.startswith(f"{config}: ok ")


def test_the_file_may_be_named_by_the_environment(cli: Cli, config: Path) -> None:
    cli.setenv("FIREBUILD_CONFIG", config)
    assert cli("config", "check").out.startswith(f"{config}: ok ")
    assert yaml.safe_load(cli("config", "show").out)["bootstrap"]["build_timeout"] == "5m"


def test_an_empty_variable_names_no_file(cli: Cli) -> None:
    cli.setenv("FIREBUILD_CONFIG", "")
    assert cli("config", "check").out.startswith("defaults and environment")


def test_a_file_that_looks_as_if_it_were_meant_is_warned_of(cli: Cli, config: Path) -> None:
    unread = cli("images", "list")
    remedy = "use --config firebuild.yaml, or set FIREBUILD_CONFIG=firebuild.yaml"
    assert unread.err == f"warning: firebuild.yaml in this directory is not read ({remedy})\n"
    assert not cli("images", "list", "--config", config).err
    other = config.rename("firebuild.yml")
    assert "--config firebuild.yml" in cli("config", "check").err
    for value in (other, ""):
        cli.setenv("FIREBUILD_CONFIG", value)
        assert not cli("config", "check").err


def test_the_option_beats_the_variable_and_the_environment_beats_the_file(cli: Cli, config: Path) -> None:
    cli.setenv("FIREBUILD_CONFIG", "/none.yaml")
    cli.setenv("FIREBUILD_BOOTSTRAP__BUILD_TIMEOUT", "7m")
    shown = yaml.safe_load(cli("config", "show", "--config", config).out)
    assert shown["bootstrap"]["build_timeout"] == "7m"


def test_every_problem_is_named_with_line_and_column(cli: Cli, config: Path) -> None:
    config.write_text("ca: {provider: valut}\nbootstrap:\n  bind: 8.8.8.8\n  pingg: 1\n")
    lines = cli("config", "check", "--config", config, status=2).err.splitlines()
    assert [line.partition(": ")[2] if number == 0 else line for number, line in enumerate(lines)] == [
        f'{config}:1:16: ca.provider: no installed provider is called "valut" (hint: did you mean "vault"?)',
        f'{config}:3:9: bootstrap.bind: expected a loopback address, found "8.8.8.8": the driver local runs '
        "the guest on this host",
        next(line for line in lines if "pingg" in line),
    ]
    assert lines[-1].startswith(f"{config}:4:3: bootstrap.pingg: unknown setting")


@pytest.mark.parametrize(
    "suffix", ["''", "'*.example'", ".example", "Example.com", "bücher.example", "a_b.c"]
)
def test_a_domain_that_no_name_can_be_below_is_named_with_its_place(
    cli: Cli, config: Path, suffix: str
) -> None:
    config.write_text(f"ca:\n  name_suffix: {suffix}\n")
    done = cli("config", "check", "--config", config, status=2)
    words = "ca.name_suffix: expected a lower-case domain as name suffix, found "
    assert done.first.startswith(f"error: {config}:2:16: {words}")


@pytest.mark.parametrize(
    ("content", "message"),
    [("ca: {", "not valid YAML"), ("- 1\n", "expected"), (b"\xff\xfe\x00", "firebuild.yaml")],
)
def test_a_file_that_is_no_configuration_is_bad_input(
    cli: Cli, config: Path, content: str | bytes, message: str
) -> None:
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = cli("config", "check", "--config", config, status=2)
    assert done.err.startswith(f"error: {config}")
    assert message in done.err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.yaml", "error: none.yaml: cannot read the file: No such file or directory\n"),
        (".", "error: invalid value for '--config' (env var: 'FIREBUILD_CONFIG'): File '.' is a directory\n"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_bad_input(cli: Cli, path: str, message: str) -> None:
    assert cli("config", "check", "--config", path, status=2).err.startswith(message)


def test_a_misspelt_variable_is_no_secret_wish(cli: Cli) -> None:
    cli.setenv("FIREBUILD_BOOTSTRAP__PING", "5s")
    done = cli("config", "check", status=2)
    assert done.err.startswith(
        "error: environment variable FIREBUILD_BOOTSTRAP__PING: bootstrap.ping: unknown"
    )


def test_what_the_provider_says_of_its_settings_has_its_place(cli: Cli, config: Path) -> None:
    config.write_text(
        "ca:\n  provider: file\n  file:\n    ca_cert: ca.pem\n    ca_key: ca.key\n    server_cert: s.pem\n"
    )
    done = cli("config", "check", "--config", config, status=2)
    assert done.err.startswith(f"error: {config}:5:13: ca.file.ca_key: expected a CA that signs or ")


def test_a_warning_of_the_provider_stops_nothing(cli: Cli, config: Path) -> None:
    names = ("ca_cert", "server_cert", "server_key", "client_cert", "client_key")
    files = "".join(f"    {name}: none.pem\n" for name in names)
    config.write_text(f"ca:\n  provider: file\n  file:\n{files}    backdate: 1m\n")
    done = cli("config", "check", "--config", config)
    assert done.out.startswith(f"{config}: ok ")
    where = f"{config}:9:15: ca.file.backdate"
    assert done.err == f"warning: {where}: has no effect on finished certificates\n  hint: remove it\n"


def test_the_schema_accepts_what_show_prints_and_refuses_a_typo(cli: Cli) -> None:
    schema = json.loads(cli("config", "schema").out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    shown = yaml.safe_load(cli("config", "show").out)
    jsonschema.validate(shown, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"bootstrapp": {}}, schema)


def test_show_prints_settings_that_can_be_read_again(cli: Cli, config: Path) -> None:
    first = cli("config", "show", "--config", config).out
    config.write_text(first)
    assert cli("config", "show", "--config", config).out == first
