"""Checks that secrets stay where they are."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import PydanticUserError

from firebuild_pki.config import ca_json_schema, redacted
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Violation, contract
from firebuild_pki.conformance.life import live, lived
from firebuild_pki.conformance.spilling import (
    Record,
    Spill,
    recorded_logs,
    secret_refs,
    with_secret,
)
from firebuild_pki.conformance.watching import Traces, traced, watched
from firebuild_pki.errors import SettingsError
from firebuild_pki.provider import Note, Profile
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
            raise Violation("no description of " + ", ".join(bare))

    @contract(see="CAProvider.validate")
    def test_looking_at_the_settings_touches_nothing(self, ca_bench: Bench) -> None:
        """Creating the provider and validate() do no I/O."""
        _notes(ca_bench, [])  # modules that are imported on first use are read from files
        seen: list[str] = []
        _notes(ca_bench, seen)
        if seen:
            raise Violation("; ".join(dict.fromkeys(seen)))

    @contract(see="CAProvider.validate")
    def test_looking_at_the_settings_twice_says_the_same(self, ca_bench: Bench) -> None:
        """validate() returns the same notes each time, none of them fatal for good settings."""
        notes = _notes(ca_bench, [])
        for note in notes:
            if not isinstance(note, Note) or note.fatal:
                raise Violation(f"{note!r}")
        if _notes(ca_bench, []) != notes:
            raise Violation("other notes the second time")


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
            raise Violation(f"an error at {', '.join(found)} instead of ca.{name}.{path}") from error
        return
    raise Violation(f"{path} was accepted")


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
        raise Violation(str(error).splitlines()[0]) from error


def _undescribed(schema: Mapping[str, Any]) -> Iterator[str]:
    blocks = {schema.get("title", ""): schema, **schema.get("$defs", {})}
    for title, block in blocks.items():
        for name, field in block.get("properties", {}).items():
            if not field.get("description"):
                yield f"{title}.{name}"


class SecrecyChecks(Checks):
    """Secrets of the settings, of the author's list, and one that the kit planted in the environment."""

    @contract(see="SecretRef")
    def test_settings_show_no_secrets(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """Settings contain references to secrets, so they show no secret."""
        settings = ca_bench.settings
        ca_spill.must_not_be_in(repr(settings) + str(settings), "repr(settings)")
        shown = json.dumps(redacted(settings), ensure_ascii=False)
        ca_spill.must_not_be_in(shown, "the settings as `firebuild config show` prints them")

    @contract(see="CAProvider")
    def test_a_provider_shows_no_secrets(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """The repr of a provider shows no secret."""
        with ca_bench.direct() as direct:
            direct.answer(Profile.SERVER)
            shown = repr(direct.provider) + str(direct.provider)
        ca_spill.must_not_be_in(shown, "repr(provider)")

    @contract(see="CAProvider")
    def test_logs_and_errors_show_no_secrets(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """No secret gets into logs, warnings and errors, at any log level."""
        record, _ = lived(ca_bench)
        ca_spill.must_not_be_in(record.text, "a log or an error")

    @contract(see="CAProvider")
    def test_no_secret_is_printed(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """No secret is printed, neither by the provider nor by a process that it starts."""
        _, traces = lived(ca_bench)
        _must_not_be_printed(ca_spill, traces)

    @contract(see="CAProvider")
    def test_no_secret_is_an_argument(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """No secret is an argument of a child process, where every user of the machine can read it."""
        _, traces = lived(ca_bench)
        _must_not_be_an_argument(ca_spill, traces)

    @contract(see="CAProvider")
    def test_no_secret_is_put_into_the_environment(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """No secret is put into the environment of the process, not even for a moment."""
        _, traces = lived(ca_bench)
        _must_not_be_in_the_environment(ca_spill, traces)

    @contract(see="CAProvider")
    def test_files_keep_secrets(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """A file with a secret is readable by its owner only, and removed after close()."""
        _, traces = lived(ca_bench)
        _must_be_kept_by_files(ca_spill, traces)

    @contract(see="SecretRef")
    def test_wrong_secrets_are_not_shown(self, ca_bench: Bench, tmp_path: Path) -> None:
        """A wrong secret is as confidential as the right one: it is in no log, no error, nothing else."""
        wrong = f"wrong-{secrets.token_hex(16)}"
        place = tmp_path / "wrong"
        place.write_text(wrong)
        bench = _referring(ca_bench, {"file": str(place)})
        with recorded_logs() as record, traced() as traces:
            live(bench, record, traces)
        spill = Spill({"that is wrong": wrong})
        must_be_nowhere(spill, record, traces)

    @contract(see="SecretRef.resolve")
    def test_missing_secrets_are_named(self, ca_bench: Bench) -> None:
        """A secret that is missing is an error with the provider's name."""
        record = Record()
        bench = _referring(ca_bench, {"env": "FIREBUILD_CONFORMANCE_UNSET"})
        live(bench, record, Traces())
        if not record.lines:
            raise Violation("no error")
        if "FIREBUILD_CONFORMANCE_UNSET" not in record.text or f"({ca_bench.name})" not in record.text:
            raise Violation(record.text.rstrip().splitlines()[-1])


def _referring(bench: Bench, ref: Mapping[str, str]) -> Bench:
    """Make every reference to a secret lead elsewhere."""
    paths = [path for path, _ in secret_refs(bench.settings.provider_settings)]
    if not paths:
        pytest.skip("the settings refer to no secrets")
    block: Any = bench.section.get(bench.name)
    for path in paths:
        block = with_secret(block, path, ref)
    return bench.with_block(block)


def must_be_nowhere(spill: Spill, record: Record, traces: Traces) -> None:
    """Look for the secrets in all that was said and done.

    Raises:
        Violation: one is there.
    """
    spill.must_not_be_in(record.text, "a log or an error")
    _must_not_be_printed(spill, traces)
    _must_not_be_an_argument(spill, traces)
    _must_not_be_in_the_environment(spill, traces)
    _must_be_kept_by_files(spill, traces)


def _must_not_be_printed(spill: Spill, traces: Traces) -> None:
    for stream, text in traces.printed.items():
        spill.must_not_be_in(text, f"what is printed on {stream}")


def _must_not_be_an_argument(spill: Spill, traces: Traces) -> None:
    for command in traces.commands:
        spill.must_not_be_in(command, f"the arguments of the child process {command.split(maxsplit=1)[0]}")


def _must_not_be_in_the_environment(spill: Spill, traces: Traces) -> None:
    for name, value in traces.variables:
        spill.must_not_be_in(value, f"os.environ, as {name}")


def _must_be_kept_by_files(spill: Spill, traces: Traces) -> None:
    for file in traces.files:
        if file.exposed:
            spill.must_not_be_in(file.text, f"the file {file.path}, which other users can read")
        if not file.removed:
            spill.must_not_be_in(file.text, f"the file {file.path}, which is still there after close()")
