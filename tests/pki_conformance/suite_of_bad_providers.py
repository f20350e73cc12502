"""A plugin author's test module: the kit on many providers. Run by test_kit_verdicts.py, elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pytest

from firebuild_pki import PluginCatalog
from firebuild_pki.conformance import Feature, ProviderConformance
from pki_conformance.bad_answers import Rolling, RollingOnce, RollingUnseen
from pki_conformance.bad_habits import HABITS, MORE_HABITS
from pki_conformance.current import catalog

INSTALLED = pytest.fixture(lambda _: None)
"""The catalog that authors begin with."""

USUAL = frozenset({Feature.REVOKE, Feature.CHECK, Feature.POLICY, Feature.FAULTS})


class Common(ProviderConformance):
    unsupported = USUAL
    provider = ""
    block: Mapping[str, Any] = {}
    more: Mapping[str, Any] = {}

    @pytest.fixture
    def ca_settings(self) -> Mapping[str, Any]:
        return {"provider": self.provider, self.provider: self.block, **self.more}

    @pytest.fixture
    def ca_catalog(self) -> PluginCatalog:
        return catalog(self.provider)

    @pytest.fixture
    def ca_environ(self) -> Mapping[str, str]:
        return {**os.environ, "TOKEN": "right-token-of-the-test"}


def suite(provider: str, **attributes: Any) -> type[Common]:
    return type("Suite", (Common,), {"provider": provider, **attributes})


def selected(provider: str, checks: str, **attributes: Any) -> type[Common]:
    """A suite of some checks only, for flaws of which the others say nothing new."""
    dropped = [name for name in dir(Common) if name.startswith("test_")]
    kept = [f"test_{name}" for name in checks.split()]
    return suite(provider, **{name: None for name in dropped if name not in kept}, **attributes)


PLAIN = """good wrong-key wrong-names both-usages leaf-is-ca no-signatures no-key-usage signs-certificates
same-serial small-serial expired not-yet too-short reversed-chain missing-intermediate root-in-chain
leaf-in-chain repeated chain-with-leaf as-text nothing raising obliging forgetful distrusted absent sharing
logged-in logs-all-out first-logs-out last-logs-out miscounting breaks-in borrowing
closes-once closes-open closes-badly undead peeping reading calling moody alarmist undeclared secretive
lax odd unsettled careless blaming stillborn stranger-in-chain"""
for name in PLAIN.split():
    globals()[f"Test_{name.replace('-', '_')}"] = suite(name)

for leak in ("repr", "environ", "log", "warning", "error"):
    globals()[f"Test_leaking_in_{leak}"] = suite("secretive", block={"leak": leak})

BRIEFLY = {"call_timeout": "300ms"}
MANNERS = """logs_and_errors_show_no_secrets no_secret_is_an_argument the_process_stays_as_it_was
nothing_is_left_behind"""
DISCRETION = """no_secret_is_printed no_secret_is_put_into_the_environment wrong_secrets_are_not_shown
files_keep_secrets standard_output_is_left_alone"""
Test_habit_discreet = suite("indiscreet", block={"leak": "discreet"})
for habit in (HABITS.keys() | MORE_HABITS.keys()) - {"discreet", "signals"}:
    globals()[f"Test_habit_{habit.replace(' ', '_')}"] = selected(
        "indiscreet", f"{MANNERS} {DISCRETION}" if habit in HABITS else MANNERS, block={"leak": habit}
    )

ANSWER, TRUST = "the_answer_is_a_certificate", "the_trust_bundle_holds_valid_cas"
REMARK = "the_framework_has_nothing_to_remark"
Test_other_issuer = selected("other-issuer", f"the_chain_is_complete {REMARK}")
Test_cancelled = selected("cancelled", f"{ANSWER} {REMARK}")
Test_one_remark = selected("one-remark", f"{ANSWER} {REMARK}")
Test_lazy_answer = selected("lazy-answer", f"{ANSWER} {REMARK}", more=BRIEFLY)
Test_generated_check = selected(
    "generated-check",
    "a_check_finds_nothing_fatal a_check_says_what_it_looked_at",
    more=BRIEFLY,
    unsupported=USUAL - {Feature.CHECK},
)
Test_generated_trust = selected("generated-trust", f"{TRUST} {REMARK}")
Test_listing = selected("listing", f"the_way_of_issuing_is_clear {REMARK}")
PENDING = "pending_certificates_do_not_mix nothing_that_is_pending_comes_after_closing"
for name in ("pending", "pending-one", "pending-for-ever"):
    globals()[f"Test_{name.replace('-', '_')}"] = selected(name, f"{ANSWER} {REMARK} {PENDING}")
ROLLED = "a_build_survives_a_roll_over the_next_build_follows_a_roll_over"
for kind in (Rolling, RollingUnseen, RollingOnce):
    name = re.sub("(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()
    globals()[f"Test_{name.replace('-', '_')}"] = selected(
        name, ROLLED, ca_roll_over=pytest.fixture(lambda _, kind=kind: kind.roll_over)
    )
Test_not_installed = selected("nowhere", f"{ANSWER} {TRUST} {REMARK}", ca_catalog=INSTALLED)
Test_habit_signals = selected("indiscreet", "the_process_stays_as_it_was", block={"leak": "signals"})

Test_leaking_a_key = suite("secretive", block={"leak": "key"})
Test_revoking = suite("revoking", unsupported=USUAL - {Feature.REVOKE})
for name in ("gloomy", "mumbling", "wordy"):
    globals()[f"Test_{name}"] = suite(name, unsupported=USUAL - {Feature.CHECK})
Test_pairs = suite("pairs", unsupported=USUAL | {Feature.SIGN})
Test_pairs_undeclared = suite("pairs")
for flaw in ("both usages", "other key", "no key", "odd key", "name", "nothing"):
    globals()[f"Test_pairs_with_{flaw.replace(' ', '_')}"] = suite(
        "pairs", block={"flaw": flaw}, unsupported=USUAL | {Feature.SIGN}
    )
Test_undeclared_lack = suite("good", unsupported=frozenset())
Test_modest = suite("good", unsupported=USUAL | {Feature.P384, Feature.LIFETIME, Feature.SEVERAL_NAMES})
Test_slow = suite("slow", more={"call_timeout": "300ms"})


class Test_in_plain_sight(Common):  # noqa: N801
    provider = "in-plain-sight"

    @pytest.fixture
    def ca_secrets(self) -> Iterable[str]:
        return ["plain-password"]


class Demanding(Common):
    """Says that its settings can be bad, that it has a policy and faults."""

    provider = "fickle"
    unsupported = USUAL - {Feature.POLICY, Feature.FAULTS}
    moods: ClassVar = {"policy": "refuse", "faults": "break"}
    bad: ClassVar[Mapping[str, object]] = {"mood": 5, "inner.depth": "deep"}

    @pytest.fixture
    def ca_refusing_settings(self) -> Mapping[str, Any]:
        return {"provider": self.provider, "fickle": {"mood": self.moods["policy"]}}

    @pytest.fixture
    def ca_broken_settings(self) -> Mapping[str, Any]:
        return {"provider": self.provider, "fickle": {"mood": self.moods["faults"]}}

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return self.bad


class Test_strict(Demanding):  # noqa: N801
    """Is right about that."""


class Test_strict_at_the_second_step(Demanding):  # noqa: N801
    """Fails when something is to be signed, not before."""

    moods: ClassVar = {"policy": "refuse", "faults": "refuse"}


class Test_unenforced(Demanding):  # noqa: N801
    """Has none of it."""

    moods: ClassVar = {"policy": "", "faults": ""}
    bad: ClassVar = {"mood": "fine"}


class Test_misdirected(Demanding):  # noqa: N801
    """Means other settings."""

    moods: ClassVar = {"policy": "blame", "faults": "refuse-settings"}
    bad: ClassVar = {"inner.elsewhere.mood": 5}


class Test_without_fixtures(ProviderConformance):  # noqa: N801
    """Forgot the one fixture that has to be there."""
