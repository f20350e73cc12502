"""Checks that secrets stay where they are."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from firebuild_pki.config import redacted
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Breach, contract
from firebuild_pki.conformance.life import live, lived
from firebuild_pki.conformance.spilling import (
    Record,
    Spill,
    recorded_logs,
    secret_refs,
    with_secret,
)
from firebuild_pki.conformance.watching import Traces, traced
from firebuild_pki.provider import Profile


class SecrecyChecks(Checks):
    """Secrets of the settings, of the author's list, and one that the kit planted in the environment."""

    @contract(see="SecretRef")
    def test_settings_show_no_secrets(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """Settings hold references to secrets, so no secret shows in them."""
        settings = ca_bench.settings
        ca_spill.must_not_be_in(repr(settings) + str(settings), "repr(settings)")
        shown = json.dumps(redacted(settings), ensure_ascii=False)
        ca_spill.must_not_be_in(shown, "the settings as `firebuild config show` prints them")

    @contract(see="CAProvider")
    def test_a_provider_shows_no_secrets(self, ca_bench: Bench, ca_spill: Spill) -> None:
        """No secret shows in the repr of a provider."""
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
        """A file with a secret is readable for its owner alone, and gone after close()."""
        _, traces = lived(ca_bench)
        _must_be_kept_by_files(ca_spill, traces)

    @contract(see="SecretRef")
    def test_wrong_secrets_are_not_shown(self, ca_bench: Bench, tmp_path: Path) -> None:
        """A secret that is wrong gets no further than the right one: into no log, no error, nothing else."""
        wrong = f"wrong-{secrets.token_hex(16)}"
        place = tmp_path / "wrong"
        place.write_text(wrong)
        bench = _referring(ca_bench, {"file": str(place)})
        with traced() as traces, recorded_logs() as record:
            live(bench, record, traces)
        spill = Spill({"that is wrong": wrong})
        spill.must_not_be_in(record.text, "a log or an error")
        _must_not_be_printed(spill, traces)
        _must_not_be_an_argument(spill, traces)
        _must_not_be_in_the_environment(spill, traces)
        _must_be_kept_by_files(spill, traces)

    @contract(see="SecretRef.resolve")
    def test_missing_secrets_are_named(self, ca_bench: Bench) -> None:
        """A secret that is missing is an error with the provider's name."""
        record = Record()
        bench = _referring(ca_bench, {"env": "FIREBUILD_CONFORMANCE_UNSET"})
        live(bench, record, Traces())
        if not record.lines:
            raise Breach("no error")
        if "FIREBUILD_CONFORMANCE_UNSET" not in record.text or f"({ca_bench.name})" not in record.text:
            raise Breach(record.text.rstrip().splitlines()[-1])


def _referring(bench: Bench, ref: Mapping[str, str]) -> Bench:
    """Make every reference to a secret lead elsewhere."""
    paths = [path for path, _ in secret_refs(bench.settings.provider_settings)]
    if not paths:
        pytest.skip("the settings refer to no secrets")
    block: Any = bench.section.get(bench.name)
    for path in paths:
        block = with_secret(block, path, ref)
    return bench.with_block(block)


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
