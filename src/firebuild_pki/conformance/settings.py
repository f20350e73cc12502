"""Checks of the settings and of what a provider says about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import PydanticUserError

from firebuild_pki.config import ca_json_schema
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Breach, contract
from firebuild_pki.conformance.watching import watched
from firebuild_pki.errors import SettingsError
from firebuild_pki.provider import Note
from firebuild_pki.settings import Settings

UNKNOWN = "no_such_setting"


class SettingsChecks(Checks):
    """The provider's block of settings."""

    @contract(see="Settings")
    def test_an_unknown_setting_is_an_error(self, ca_bench: Bench) -> None:
        """A setting that does not exist is an error with its path."""
        block = ca_bench.section.get(ca_bench.name) or {}
        _must_be_refused(ca_bench.with_block({**block, UNKNOWN: 1}), ca_bench.name, UNKNOWN)

    @contract(see="SettingsError")
    def test_bad_settings_are_errors(self, ca_bench: Bench, ca_bad_settings: Mapping[str, object]) -> None:
        """A setting with a bad value is an error with its path."""
        if not ca_bad_settings:
            pytest.skip("the fixture ca_bad_settings lists none")
        for path, value in ca_bad_settings.items():
            block = _with_value(ca_bench.section.get(ca_bench.name) or {}, path.split("."), value)
            _must_be_refused(ca_bench.with_block(block), ca_bench.name, path)

    @contract(see="ca_json_schema")
    def test_the_settings_have_a_json_schema(self, ca_bench: Bench) -> None:
        """The settings can be described as JSON Schema."""
        json.dumps([_schema(ca_bench), ca_json_schema(ca_bench.catalog)])

    @contract(see="Settings")
    def test_every_setting_is_described(self, ca_bench: Bench) -> None:
        """Every setting has a description: the string below it in the model."""
        bare = sorted(_undescribed(_schema(ca_bench)))
        if bare:
            raise Breach("no description of " + ", ".join(bare))

    @contract(see="CAProvider.validate")
    def test_looking_at_the_settings_touches_nothing(self, ca_bench: Bench) -> None:
        """Making the provider and validate() do no input and output."""
        _notes(ca_bench, [])  # modules that are imported on first use are read from files
        seen: list[str] = []
        _notes(ca_bench, seen)
        if seen:
            raise Breach("; ".join(dict.fromkeys(seen)))

    @contract(see="CAProvider.validate")
    def test_looking_at_the_settings_twice_says_the_same(self, ca_bench: Bench) -> None:
        """validate() returns notes, none fatal for good settings, always the same."""
        notes = _notes(ca_bench, [])
        for note in notes:
            if not isinstance(note, Note) or note.fatal:
                raise Breach(f"{note!r}")
        if _notes(ca_bench, []) != notes:
            raise Breach("other notes the second time")


def _notes(bench: Bench, seen: list[str]) -> list[Note]:
    settings, context = bench.settings, bench.context

    def look() -> list[Note]:
        with watched() as done:
            provider = settings.spec.factory(settings.provider_settings, context)
            notes = list(provider.validate() or ())
        seen.extend(done)
        return notes

    with bench.direct(opened=False) as direct:
        return direct.call("looking at the settings", look)


def _must_be_refused(bench: Bench, name: str, path: str) -> None:
    try:
        bench.authority().close()
    except SettingsError as error:
        found = [problem.path for problem in error.problems]
        if f"ca.{name}.{path}" not in found:
            raise Breach(f"an error at {', '.join(found)} instead of ca.{name}.{path}") from error
        return
    raise Breach(f"{path} was accepted")


def _with_value(block: Mapping[str, Any], path: list[str], value: object) -> dict[str, Any]:
    key, *below = path
    found = block.get(key)
    inner = found if isinstance(found, Mapping) else {}
    return {**block, key: _with_value(inner, below, value) if below else value}


def _schema(bench: Bench) -> Mapping[str, Any]:
    model = bench.settings.spec.settings_model
    try:
        return model.json_schema() if issubclass(model, Settings) else model.model_json_schema()
    except PydanticUserError as error:
        raise Breach(str(error).splitlines()[0]) from error


def _undescribed(schema: Mapping[str, Any]) -> Iterator[str]:
    blocks = {schema.get("title", ""): schema, **schema.get("$defs", {})}
    for title, block in blocks.items():
        for name, field in block.get("properties", {}).items():
            if not field.get("description"):
                yield f"{title}.{name}"
