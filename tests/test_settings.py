"""The configuration file: defaults, precedence, and what mistakes look like."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from firebuild_bootstrap.cli.options import settings_from
from firebuild_bootstrap.settings import BuildSettings, load_settings
from firebuild_pki import PluginCatalog, SettingsError, check_settings
from firebuild_pki.config import NOT_SELECTED

EXAMPLE = Path(__file__).parents[1] / "config.example.yaml"


def keys(data: object, prefix: str = "") -> set[str]:
    if not isinstance(data, dict):
        return {prefix}
    return {name for key, value in data.items() for name in keys(value, f"{prefix}.{key}")}


def plugin_blocks() -> dict[str, type[BaseModel]]:
    """The blocks of the plugins that come with firebuild."""
    own = PluginCatalog()
    providers = {
        one.name: own.load_provider(one.name).settings_model
        for one in own.providers()
        if one.distribution == "firebuild"
    }
    observers = {
        one.name: own.load_observer(one.name).settings_model
        for one in own.observers()
        if one.distribution == "firebuild"
    }
    return {name: model for name, model in {**providers, **observers}.items() if model is not None}


def test_the_example_equals_the_defaults() -> None:
    example, defaults = load_settings(EXAMPLE, {}).model_dump(), load_settings(None, {}).model_dump()
    for name in plugin_blocks().keys() - {"embedded"}:
        assert example["ca"].pop(name) == NOT_SELECTED
    assert example == defaults


def test_the_example_shows_every_setting() -> None:
    written = yaml.safe_load(EXAMPLE.read_text())
    shown = {block: written["ca"].pop(block) for block in plugin_blocks()}
    written["ca"]["embedded"] = shown["embedded"]
    assert keys(written) == keys(BuildSettings().model_dump(mode="json"))
    for block, model in plugin_blocks().items():
        text = re.split(rf"^  {block}:$", EXAMPLE.read_text(), flags=re.MULTILINE)[1]
        mine = re.split(r"^ {0,2}\w", text, flags=re.MULTILINE)[0]
        named = set(re.findall(r"^ +(?:# )?(\w+): ", mine.replace(":\n", ": \n"), flags=re.MULTILINE))
        assert set(model.model_fields) <= named, block


@pytest.mark.parametrize("name", ["embedded", "file", "vault"])
def test_every_provider_of_the_example_can_be_selected(name: str) -> None:
    settings = load_settings(
        EXAMPLE, {"FIREBUILD_CA__PROVIDER": name, "FIREBUILD_CA__OBSERVERS": "[audit-log]"}
    )
    assert not [note for note in check_settings(settings.ca, {}) if note.fatal]


def test_the_schema_accepts_the_example_and_states_the_defaults() -> None:
    schema = BuildSettings.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    document = {**yaml.safe_load(EXAMPLE.read_text()), "store": {}}
    jsonschema.validate(document, schema)
    defaults = schema["$defs"]["BootstrapSettings"]["properties"]
    assert {name: defaults[name]["default"] for name in ("build_timeout", "ping_interval")} == {
        "build_timeout": "30m",
        "ping_interval": "5s",
    }
    with pytest.raises(jsonschema.ValidationError, match="driverr"):
        jsonschema.validate({"machine": {"driverr": "local"}}, schema)


def test_a_guest_is_not_told_to_be_silent_for_longer_than_it_takes() -> None:
    assert load_settings(None, {"FIREBUILD_BOOTSTRAP__PING_INTERVAL": "24h"}).bootstrap.ping_interval
    with pytest.raises(SettingsError, match="ping_interval: expected a duration of 24h at most"):
        load_settings(None, {"FIREBUILD_BOOTSTRAP__PING_INTERVAL": "25h"})


def test_environment_beats_file_and_options_beat_both(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("bootstrap: {build_timeout: 1m, initial_timeout: 1m, ping_interval: 1m}\n")
    environ = {
        "FIREBUILD_BOOTSTRAP__BUILD_TIMEOUT": "2m",
        "FIREBUILD_BOOTSTRAP__PING_INTERVAL": "2m",
        "FIREBUILD_HOME": "/not/a/setting",
    }
    settings = load_settings(file, environ, {"bootstrap.ping_interval": "3m"}).bootstrap
    assert settings.initial_timeout == timedelta(minutes=1)
    assert settings.build_timeout == timedelta(minutes=2)
    assert settings.ping_interval == timedelta(minutes=3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("boostrap: {}", "1:1: boostrap: unknown setting"),
        (
            "bootstrap: {bind: 0.0.0.0}",
            '1:19: bootstrap.bind: expected a loopback address, found "0.0.0.0"',
        ),
        (
            "bootstrap: {bind: localhost}",
            '1:19: bootstrap.bind: expected an IP address such as 127.0.0.1, found "localhost"',
        ),
        (
            "bootstrap:\n  build_timeout: 30",
            "2:18: bootstrap.build_timeout: expected a duration such as 90s or 1h30m",
        ),
        ("bootstrap: {build_timeout: 0s}", "bootstrap.build_timeout: expected a duration above zero"),
        (
            "bootstrap: {log_limit: 3 parsecs}",
            "bootstrap.log_limit: expected a size such as 64MiB, found '3 parsecs'",
        ),
        ("bootstrap: {missed_pings: 0}", "bootstrap.missed_pings: "),
        ("machine: {driver: locl}", "machine.driver: expected 'local', 'qemu', 'firecracker' or 'external'"),
        (
            "machine: {disk_size: 4KiB}",
            "machine.disk_size: expected at least 1MiB, found 4KiB",
        ),
    ],
)
def test_mistakes_are_named_with_line_column_and_path(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text + "\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(file, {})
    assert f"{file}:" in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("2048", 2048), ("4KiB", 4096), ("1 MiB", 1 << 20), ("2GiB", 2 << 30)]
)
def test_sizes_are_numbers_of_bytes_or_have_a_unit(tmp_path: Path, text: str, size: int) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"bootstrap: {{log_limit: {text}}}\n")
    assert load_settings(file, {}).bootstrap.log_limit == size


def test_settings_that_nobody_has_written_are_those_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FIREBUILD_")]:
        monkeypatch.delenv(name)
    unwritten, loaded = settings_from(None), load_settings(None, {})
    known = [
        (section, name, value)
        for section in ("machine", "store", "bootstrap", "cache", "registries")
        for name, value in vars(getattr(unwritten, section)).items()
        if not name.startswith("_")
    ]
    known.remove(("machine", "local", SimpleNamespace(**loaded.machine.local.model_dump())))
    assert known == [(part, name, getattr(getattr(loaded, part), name)) for part, name, _ in known]
    assert len(known) > 10
    assert unwritten.ca_provider == loaded.ca.provider
    assert unwritten.machine.qemu == loaded.machine.qemu
