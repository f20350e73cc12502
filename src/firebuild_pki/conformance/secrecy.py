"""Checks that secrets stay where they are."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firebuild_pki.config import redacted
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Breach, contract
from firebuild_pki.conformance.refusals import NONSENSE
from firebuild_pki.conformance.spilling import (
    Record,
    Spill,
    recorded_logs,
    secret_refs,
    with_secret,
)
from firebuild_pki.errors import CAError
from firebuild_pki.provider import Capability, Profile


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
        with recorded_logs() as record:
            _live(ca_bench, record)
            _be_refused(ca_bench, record)
            _fail_to_open(ca_bench, record)
        ca_spill.must_not_be_in(record.text, "a log or an error")

    @contract(see="SecretRef")
    def test_wrong_secrets_are_not_shown(self, ca_bench: Bench, tmp_path: Path) -> None:
        """A secret that is wrong gets into no log and no error."""
        wrong = f"wrong-{secrets.token_hex(16)}"
        place = tmp_path / "wrong"
        place.write_text(wrong)
        with recorded_logs() as record:
            _live(_referring(ca_bench, {"file": str(place)}), record)
        Spill({"that is wrong": wrong}).must_not_be_in(record.text, "a log or an error")

    @contract(see="SecretRef.resolve")
    def test_missing_secrets_are_named(self, ca_bench: Bench) -> None:
        """A secret that is missing is an error with the provider's name."""
        record = Record()
        bench = _referring(ca_bench, {"env": "FIREBUILD_CONFORMANCE_UNSET"})
        _live(bench, record)
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


def _live(bench: Bench, record: Record) -> None:
    try:
        with bench.authority() as authority:
            authority.check()
            server, _ = authority.issue_server(), authority.issue_guest()
            if Capability.REVOKE in authority.capabilities:
                authority.revoke(server)
        record.lines += authority.warnings
    except CAError as error:
        record.add_error(error)


def _be_refused(bench: Bench, record: Record) -> None:
    with bench.direct() as direct:
        request = replace(direct.request(Profile.GUEST)[0], csr_pem=NONSENSE)
        try:
            direct.call("signing nonsense", lambda: direct.provider.sign(request))
        except CAError as error:
            record.add_error(error)


def _fail_to_open(bench: Bench, record: Record) -> None:
    with bench.in_a_broken_world().direct(opened=False) as direct:
        try:
            direct.open()
        except CAError as error:
            record.add_error(error)
