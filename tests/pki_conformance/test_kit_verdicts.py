"""The kit fails where the contract is broken, and nowhere else.

The suite of a made-up plugin author runs in a project of its own: nothing of this repository's test
set-up, no plugins of pytest, warnings are errors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

# one run for all of them; on a machine that is busy with other tests it takes minutes
pytestmark = [pytest.mark.xdist_group("kit-verdicts"), pytest.mark.timeout(900)]

Verdicts = dict[str, dict[str, str]]
"""Test class -> test -> message, for the tests that did not pass."""

# RSA keys take seconds to make; what needs nothing but patience is tried on a few checks
SELECTED = """not rsa and (not slow and not without_fixtures
or slow and (right_key or remark or unknown_setting or closing) or without_fixtures and json_schema)"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    project = tmp_path_factory.mktemp("plugin")
    here = Path(__file__).parent
    shutil.copy(here / "suite_of_bad_providers.py", project / "test_conformance.py")
    (project / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nxfail_strict = true\n")
    options = ["-q", "--strict-markers", "-p", "no:cacheprovider", "--basetemp", str(project / "tmp")]
    environ = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(here.parent),
        "PYTEST_ADDOPTS": "",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "-k",
        " ".join(SELECTED.split()),
        "--junitxml",
        "report.xml",
    ]
    done = subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return _read(project / "report.xml")


def _read(report: Path) -> Verdicts:
    found: Verdicts = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        tests = found[case.get("classname", "").rsplit(".", 1)[-1]]
        for broken in (case.find("failure"), case.find("error")):
            if broken is not None:
                # the attribute "message" of a long one is cut
                tests[case.get("name", "")] = (broken.text or "").strip()
    return dict(found)


def failed(verdicts: Verdicts, suite: str) -> set[str]:
    return {name.split("[")[0].removeprefix("test_") for name in verdicts[f"Test_{suite}"]}


HANDSHAKES = {
    "server_and_guest_talk",
    "a_guest_makes_no_server",
    "a_server_makes_no_guest",
    "a_guest_without_a_certificate_is_refused",
    "a_guest_of_another_ca_is_refused",
    "a_server_of_another_ca_is_refused",
    "a_server_with_another_name_is_refused",
}
REMARK = {"the_framework_has_nothing_to_remark"}
KEYS = {"the_kind_of_key_is_certified"}
ISSUING = {
    *HANDSHAKES,
    *REMARK,
    "the_certificates_outlive_the_build",
    "threads_share_an_authority",
    "several_authorities_are_open_at_once",
    "authorities_end_in_any_order",
    "one_build_follows_another",
}
"""Whatever needs the framework to accept the certificates."""
SIGNING = ISSUING | KEYS
LIFETIME = {"the_certificate_lives_as_long_as_was_asked"}
CLOSING = {
    "closing_twice_is_fine",
    "closing_without_opening_is_fine",
    "closing_after_a_failed_opening_is_fine",
}
UNWARNED = {"an_authority_closes_without_a_warning"}
LOOKING = {
    "looking_at_the_settings_touches_nothing",
    "looking_at_the_settings_twice_says_the_same",
}
AFTER_CLOSING = {"nothing_is_issued_after_closing", "nothing_is_issued_after_closing_beside_an_open_one"}
TRUST = {"the_trust_bundle_holds_valid_cas", "the_trust_bundle_stays_the_same", "the_chain_is_complete"}
ANSWERS = {
    "the_answer_is_a_certificate",
    "the_certificate_is_for_the_right_key",
    "the_certificate_has_the_right_names",
    "the_certificate_is_for_one_end_only",
    "the_certificate_is_an_end_entitys",
    "the_certificate_is_valid_now",
    "the_chain_is_complete",
    "the_trust_bundle_stays_the_same",
    "a_provider_shows_no_secrets",
    "what_others_do_wrong_harms_no_open_one",
}
"""Whatever looks at an answer of the provider."""
SIGNED = {
    *LIFETIME,
    "several_names_are_certified",
    "the_serial_number_is_unique",
    "the_chain_holds_issuers_only",
    "the_chain_goes_from_the_bottom_up",
}
"""Whatever looks at an answer to a request of its own."""
SENSE = {"a_request_without_sense_is_refused"}

EXPECTED: dict[str, set[str]] = {
    "good": set(),
    "secretive": set(),
    "pairs": set(),
    # the certificate
    "wrong_key": SIGNING | SENSE | {"the_certificate_is_for_the_right_key"},
    "wrong_names": SIGNING | {"the_certificate_has_the_right_names", "several_names_are_certified"},
    "both_usages": REMARK
    | {"the_certificate_is_for_one_end_only", "a_guest_makes_no_server", "a_server_makes_no_guest"},
    "leaf_is_ca": SIGNING | {"the_certificate_is_an_end_entitys"},
    "no_signatures": SIGNING | {"the_certificate_is_an_end_entitys"},
    "signs_certificates": SIGNING | {"the_certificate_is_an_end_entitys"},
    "no_key_usage": REMARK | {"the_certificate_is_an_end_entitys"},
    "same_serial": {"the_serial_number_is_unique"},
    "small_serial": REMARK | {"the_serial_number_is_unique"},
    "expired": SIGNING | LIFETIME | {"the_certificate_is_valid_now"},
    "not_yet": SIGNING | LIFETIME | {"the_certificate_is_valid_now"},
    "too_short": REMARK | LIFETIME | {"the_certificates_outlive_the_build"},
    # the chain
    "reversed_chain": REMARK | {"the_chain_goes_from_the_bottom_up"},
    "missing_intermediate": SIGNING | {"the_chain_is_complete"},
    "stranger_in_chain": {"the_chain_is_complete"},
    "root_in_chain": REMARK | {"the_chain_holds_issuers_only"},
    "leaf_in_chain": REMARK | {"the_chain_holds_issuers_only"},
    "repeated": REMARK | {"the_chain_holds_issuers_only"},
    "chain_with_leaf": {"the_answer_is_a_certificate"},
    "as_text": {"the_answer_is_a_certificate"},
    "forgetful": {"the_trust_bundle_stays_the_same"},
    "distrusted": SIGNING | UNWARNED | TRUST,
    "absent": SIGNING | UNWARNED | TRUST,
    # no answer
    "nothing": SIGNING | ANSWERS | SIGNED | SENSE,
    "raising": SIGNING | ANSWERS | SIGNED | SENSE,
    "slow": REMARK | {"the_certificate_is_for_the_right_key"},
    "obliging": SENSE,
    "stillborn": SIGNING
    | UNWARNED
    | TRUST
    | ANSWERS
    | SIGNED
    | SENSE
    | CLOSING
    | LOOKING
    | {
        "the_way_of_issuing_is_clear",
        "what_is_not_promised_is_unsupported",
        *AFTER_CLOSING,
        "a_check_finds_nothing_fatal",
        "logs_and_errors_show_no_secrets",
    },
    # the life
    "sharing": {
        "several_authorities_are_open_at_once",
        "authorities_end_in_any_order",
        "nothing_is_issued_after_closing_beside_an_open_one",
    },
    "closes_once": {"closing_twice_is_fine"},
    "closes_open": CLOSING,
    "closes_badly": CLOSING | UNWARNED | REMARK | AFTER_CLOSING,
    "undead": AFTER_CLOSING,
    "gloomy": {"a_check_finds_nothing_fatal"},
    "mumbling": {"a_check_says_what_it_looked_at"},
    "wordy": {"a_check_finds_nothing_fatal", "a_check_says_what_it_looked_at"},
    "revoking": {"an_unknown_certificate_is_not_taken_back"},
    # state that is shared in the process
    "logged_in": set(),
    "logs_all_out": {
        "authorities_end_in_any_order",
        "several_authorities_are_open_at_once",
        "what_others_do_wrong_harms_no_open_one",
    },
    "first_logs_out": {"authorities_end_in_any_order"},
    "last_logs_out": {
        "authorities_end_in_any_order",
        "several_authorities_are_open_at_once",
        "what_others_do_wrong_harms_no_open_one",
    },
    "miscounting": {"what_others_do_wrong_harms_no_open_one"},
    "breaks_in": {"what_others_do_wrong_harms_no_open_one"},
    "borrowing": {"nothing_is_issued_after_closing_beside_an_open_one"},
    # the settings
    "peeping": {"looking_at_the_settings_touches_nothing"},
    "reading": {"looking_at_the_settings_touches_nothing"},
    "calling": {"looking_at_the_settings_touches_nothing"},
    "moody": REMARK | {"looking_at_the_settings_twice_says_the_same"},
    "alarmist": SIGNING | UNWARNED | {"looking_at_the_settings_twice_says_the_same"},
    "lax": {"an_unknown_setting_is_an_error", "every_setting_is_described"},
    "odd": {"the_settings_have_a_json_schema", "every_setting_is_described"},
    # discretion
    "leaking_in_repr": {"a_provider_shows_no_secrets"},
    "leaking_in_environ": {"a_provider_shows_no_secrets"},
    "leaking_in_log": {"logs_and_errors_show_no_secrets", "wrong_secrets_are_not_shown"},
    "leaking_in_warning": REMARK | {"logs_and_errors_show_no_secrets", "wrong_secrets_are_not_shown"},
    "leaking_in_error": {"wrong_secrets_are_not_shown"},
    "leaking_a_key": {"a_provider_shows_no_secrets"},
    "in_plain_sight": {"settings_show_no_secrets"},
    "careless": {"missing_secrets_are_named"},
    "blaming": {"missing_secrets_are_named"},
    # what is declared and what is not
    "undeclared": {"what_is_not_promised_is_unsupported"},
    "unsettled": SIGNING | UNWARNED | ANSWERS | SENSE | {"the_way_of_issuing_is_clear"},
    "undeclared_lack": {
        "a_certificate_is_taken_back",
        "an_unknown_certificate_is_not_taken_back",
        "a_check_says_what_it_looked_at",
        "a_failing_backend_is_an_error",
        "what_the_policy_forbids_is_refused",
    },
    "unenforced": {
        "a_failing_backend_is_an_error",
        "what_the_policy_forbids_is_refused",
        "bad_settings_are_errors",
    },
    "misdirected": {
        "a_failing_backend_is_an_error",
        "what_the_policy_forbids_is_refused",
        "bad_settings_are_errors",
    },
    "strict": set(),
    "strict_at_the_second_step": set(),
    "modest": KEYS | LIFETIME | {"several_names_are_certified"},
    "without_fixtures": {"the_settings_have_a_json_schema"},
    # ready pairs
    "pairs_undeclared": SIGNED | KEYS | {"the_way_of_issuing_is_clear"},
    "pairs_with_both_usages": REMARK
    | {"the_certificate_is_for_one_end_only", "a_guest_makes_no_server", "a_server_makes_no_guest"},
    "pairs_with_other_key": ISSUING | {"the_certificate_is_for_the_right_key"},
    "pairs_with_no_key": ISSUING | ANSWERS,
    "pairs_with_odd_key": ISSUING | ANSWERS,
    "pairs_with_nothing": ISSUING | ANSWERS,
    "pairs_with_name": ISSUING | {"the_certificate_has_the_right_names"},
}


@pytest.mark.parametrize("suite", EXPECTED)
def test_exactly_the_checks_fail_that_are_about_the_flaw(verdicts: Verdicts, suite: str) -> None:
    assert failed(verdicts, suite) == EXPECTED[suite]


def test_no_suite_is_forgotten(verdicts: Verdicts) -> None:
    assert {f"Test_{name}" for name in EXPECTED} == set(verdicts)


def test_every_check_has_failed_once(verdicts: Verdicts) -> None:
    from firebuild_pki.conformance import ProviderConformance

    checks = {name.removeprefix("test_") for name in dir(ProviderConformance) if name.startswith("test_")}
    assert set().union(*EXPECTED.values()) == checks


def test_failures_say_what_was_wanted_and_found_and_where_to_read_more(verdicts: Verdicts) -> None:
    for suite in verdicts.keys() - {"Test_modest", "Test_without_fixtures"}:
        for message in verdicts[suite].values():
            lines = [line.split(":")[0] for line in message.removeprefix("Failed: ").splitlines()]
            assert lines[:2] == ["the contract", "found"], message
            assert lines[-1] == "read more"


def test_a_failure_in_full(verdicts: Verdicts) -> None:
    message = verdicts["Test_reversed_chain"]["test_the_chain_goes_from_the_bottom_up[server]"]
    wanted, found, more = message.removeprefix("Failed: ").splitlines()
    assert (
        wanted == "the contract: The chain goes from the bottom up: each certificate is signed by the next."
    )
    assert found.startswith('found: the order "CN=Operator Upper" (sha256 ')
    assert more == "read more: docs/conformance.md; firebuild_pki.SignedCertificate"


def test_what_works_after_all_must_not_be_declared_unsupported(verdicts: Verdicts) -> None:
    tests = verdicts["Test_modest"]
    assert set(tests) == {
        "test_several_names_are_certified",
        "test_the_certificate_lives_as_long_as_was_asked[20]",
        "test_the_certificate_lives_as_long_as_was_asked[120]",
        "test_the_kind_of_key_is_certified[p384]",
    }
    assert tests["test_the_kind_of_key_is_certified[p384]"].removeprefix("Failed: ") == (
        "declared unsupported, but works: p384\n"
        "read more: docs/conformance.md; take it out of Suite.unsupported"
    )


def test_it_is_said_whose_closing_ended_whose_work(verdicts: Verdicts) -> None:
    tests = verdicts["Test_first_logs_out"]
    found = {name.partition("[")[2]: message.splitlines()[1] for name, message in tests.items()}
    # whoever opened first, and is not the last to close, ends the login of the others
    assert set(found) == {
        f"{order}]"
        for order in ("first-second-third", "first-third-second", "second-first-third", "third-first-second")
    }
    assert found["first-second-third]"] == (
        "found: the second of three, after the first was closed: ca-provider(first-logs-out): "
        "issuing the guest certificate failed: RuntimeError: CKR_USER_NOT_LOGGED_IN"
    )
    (message,) = verdicts["Test_miscounting"].values()
    assert "found: after another one was closed twice: ca-provider(miscounting): " in message


def test_secrets_that_leaked_are_named_and_not_shown(verdicts: Verdicts) -> None:
    message = verdicts["Test_leaking_in_log"]["test_logs_and_errors_show_no_secrets"]
    assert "found: the secret token in a log or an error" in message
    assert "right-token-of-the-test" not in str(verdicts["Test_leaking_in_log"])


def test_a_suite_without_settings_says_what_is_missing(verdicts: Verdicts) -> None:
    (message,) = verdicts["Test_without_fixtures"].values()
    assert "Test_without_fixtures has no fixture ca_settings; docs/conformance.md" in message
