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
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree

import pytest

# one run for all of them; on a machine that is busy with other tests it takes minutes
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("kit-verdicts"), pytest.mark.timeout(900)]

Verdicts = dict[str, dict[str, str]]
"""Test class -> test -> message, for the tests that did not pass."""

# RSA keys take seconds to make; what needs nothing but patience is tried on a few checks; and of checks that
# are made several times, for each end and in each order, one is enough
SELECTED = """not rsa and not guest] and (not any_order or third-first-second or first_logs_out)
and (not slow and not without_fixtures
or slow and (right_key or remark or unknown_setting or closing) or without_fixtures and json_schema)"""


# All checks of the providers without a flaw; of the others what is to fail, and an eighth of what is not.
SAMPLE = """\
from zlib import crc32

FAILING = {failing}

def pytest_collection_modifyitems(items):
    def is_wanted(item):
        suite, check = item.parent.name.removeprefix("Test_"), item.originalname.removeprefix("test_")
        failing = FAILING.get(suite)
        return not failing or check in failing or crc32(item.nodeid.encode()) % 8 == 0

    items[:] = filter(is_wanted, items)
"""


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.release)])
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    project = tmp_path_factory.mktemp("plugin")
    here = Path(__file__).parent
    shutil.copy(here / "suite_of_bad_providers.py", project / "test_conformance.py")
    if request.param == "some":
        (project / "conftest.py").write_text(SAMPLE.format(failing=EXPECTED))
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
PENDING = {"pending_certificates_do_not_mix", "nothing_that_is_pending_comes_after_closing"}
SENSE = {"a_request_without_sense_is_refused"}
WRONG = {"wrong_secrets_are_not_shown"}
PRINTED = WRONG | {"no_secret_is_printed"}
ARGUMENT = WRONG | {"no_secret_is_an_argument"}
ENVIRONMENT = WRONG | {"no_secret_is_put_into_the_environment"}
FILE = WRONG | {"files_keep_secrets"}

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
    "nothing": SIGNING | PENDING | ANSWERS | SIGNED | SENSE,
    "raising": SIGNING | PENDING | ANSWERS | SIGNED | SENSE,
    "slow": REMARK | {"the_certificate_is_for_the_right_key", "nothing_that_is_pending_comes_after_closing"},
    "obliging": SENSE,
    "stillborn": SIGNING
    | PENDING
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
    "habit_discreet": set(),
    "habit_print": PRINTED | {"standard_output_is_left_alone"},
    "habit_print_in_a_child": PRINTED | {"standard_output_is_left_alone"},
    "habit_print_on_standard_error": PRINTED,
    "habit_print_bytes": PRINTED,
    "habit_print_in_a_thread": PRINTED,
    "habit_print_past_Python": PRINTED,
    "habit_argument": ARGUMENT,
    "habit_shell": ARGUMENT,
    "habit_spawn": ARGUMENT,
    "habit_environment": ENVIRONMENT | {"the_process_stays_as_it_was"},
    "habit_environment_for_a_moment": ENVIRONMENT,
    "habit_file_open_to_all": FILE,
    "habit_file_kept": FILE | {"nothing_is_left_behind"},
    "habit_file_kept_elsewhere": FILE,
    # manners
    "habit_chatty": {"standard_output_is_left_alone"},
    "habit_moved": {"the_process_stays_as_it_was"},
    "habit_masked": {"the_process_stays_as_it_was"},
    "habit_variable": {"the_process_stays_as_it_was"},
    "habit_impatient": {"the_process_stays_as_it_was"},
    "habit_litter": {"nothing_is_left_behind"},
    "habit_child_left": {"nothing_is_left_behind"},
    "habit_spawn_in_the_old_way": {"no_secret_is_an_argument"},
    "habit_log_beside": {"logs_and_errors_show_no_secrets"},
    "habit_log_a_field": {"logs_and_errors_show_no_secrets"},
    "habit_log_as_basic": {"logs_and_errors_show_no_secrets"},
    "habit_log_in_hexadecimal": {"logs_and_errors_show_no_secrets"},
    "habit_warn": {"logs_and_errors_show_no_secrets"},
    "habit_thread_left": {"nothing_is_left_behind"},
    "habit_pool_left": {"nothing_is_left_behind"},
    "habit_file_left_open": {"nothing_is_left_behind"},
    "habit_socket_left_open": {"nothing_is_left_behind"},
    "habit_signals": {"the_process_stays_as_it_was"},
    "habit_logging": {"the_process_stays_as_it_was"},
    "habit_distrustless": {"the_process_stays_as_it_was"},
    # what is looked at in the provider's thread, within its limit, and by type
    "other_issuer": REMARK | {"the_chain_is_complete"},
    "cancelled": REMARK | {"the_answer_is_a_certificate"},
    "one_remark": REMARK | {"the_answer_is_a_certificate"},
    "lazy_answer": REMARK | {"the_answer_is_a_certificate"},
    "generated_check": {"a_check_finds_nothing_fatal", "a_check_says_what_it_looked_at"},
    "generated_trust": REMARK | {"the_trust_bundle_holds_valid_cas"},
    "listing": REMARK | {"the_way_of_issuing_is_clear"},
    # what comes later
    "pending": set(),
    "pending_one": {"pending_certificates_do_not_mix"},
    "pending_for_ever": {"nothing_that_is_pending_comes_after_closing"},
    # a CA that rolls over
    "rolling": set(),
    "rolling_unseen": {"a_build_survives_a_roll_over"},
    "rolling_once": {"a_build_survives_a_roll_over", "the_next_build_follows_a_roll_over"},
    "not_installed": REMARK,
    # secrets that are missing
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
    for suite in verdicts.keys() - {"Test_modest", "Test_without_fixtures", "Test_not_installed"}:
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


FOUND = {
    "print": "no_secret_is_printed: the secret token in what is printed on standard output",
    "print_bytes": "no_secret_is_printed: the secret token in what is printed on standard error",
    "argument": "no_secret_is_an_argument: the secret token in the arguments of the child process sh",
    "shell": "no_secret_is_an_argument: the secret token in the arguments of the child process true",
    "environment": "no_secret_is_put_into_the_environment: "
    "the secret token in os.environ, as INDISCREET_TOKEN",
    "file_open_to_all": "files_keep_secrets: the secret token in the file /*, which other users can read",
    "file_kept": "files_keep_secrets: the secret token in the file /*, which is still there after close()",
    "chatty": "standard_output_is_left_alone: 14 characters on standard output",
    "moved": "the_process_stays_as_it_was: the working directory is changed after something was issued",
    "masked": "the_process_stays_as_it_was: the umask is changed after something was issued",
    "variable": "the_process_stays_as_it_was: "
    "the environment variable INDISCREET is changed after something was issued",
    "child_left": "nothing_is_left_behind: the process cat (*), the process cat (*)",
    "spawn_in_the_old_way": "no_secret_is_an_argument: "
    "the secret token in the arguments of the child process true",
    "log_beside": "logs_and_errors_show_no_secrets: the secret token in a log or an error",
    "log_as_basic": "logs_and_errors_show_no_secrets: the secret token in a log or an error, as base64",
    "log_in_hexadecimal": "logs_and_errors_show_no_secrets: "
    "the secret token in a log or an error, as hexadecimal digits",
    "thread_left": "nothing_is_left_behind: the thread poller",
    "pool_left": "nothing_is_left_behind: the thread pool_0",
    "file_left_open": "nothing_is_left_behind: the open descriptor of /etc/passwd",
    "socket_left_open": "nothing_is_left_behind: the open descriptor of socket:",
    "signals": "the_process_stays_as_it_was: what signals do is changed after something was issued",
    "logging": "the_process_stays_as_it_was: the set-up of logging is changed after something was issued",
    "distrustless": "the_process_stays_as_it_was: "
    "the default context of ssl is changed after something was issued",
    "litter": "nothing_is_left_behind: the file /*, the file /*",
}


@pytest.mark.parametrize("habit", FOUND)
def test_a_habit_is_named_and_the_secret_is_not_shown(verdicts: Verdicts, habit: str) -> None:
    tests = verdicts[f"Test_habit_{habit}"]
    check, _, expected = FOUND[habit].partition(": ")
    (found,) = (line for line in tests[f"test_{check}"].splitlines() if line.startswith("found: "))
    assert fnmatchcase(found, f"found: {expected}*"), found
    assert "right-token-of-the-test" not in str(tests)


def test_a_suite_without_settings_says_what_is_missing(verdicts: Verdicts) -> None:
    (message,) = verdicts["Test_without_fixtures"].values()
    assert "Test_without_fixtures has no fixture ca_settings; docs/conformance.md" in message


SAID = {
    "other_issuer": ("the_chain_is_complete[server]", "authority key identifier"),
    "cancelled": ("the_answer_is_a_certificate[server]", "CancelledError: the event loop was stopped"),
    "one_remark": ("the_answer_is_a_certificate[server]", "a tuple of sentences, found str"),
    "lazy_answer": ("the_answer_is_a_certificate[server]", "within 0.3 s"),
    "generated_check": ("a_check_finds_nothing_fatal", "within 0.3 s"),
    "generated_trust": ("the_trust_bundle_holds_valid_cas", "expected a TrustBundle, found generator"),
    "listing": ("the_way_of_issuing_is_clear", "expected a frozenset of capabilities, found list"),
}


@pytest.mark.parametrize("suite", SAID)
def test_what_a_provider_returned_is_named(verdicts: Verdicts, suite: str) -> None:
    check, expected = SAID[suite]
    (found,) = (
        line for line in verdicts[f"Test_{suite}"][f"test_{check}"].splitlines() if line.startswith("found: ")
    )
    assert expected in found


def test_a_plugin_that_is_not_installed_is_one_failure_with_the_remedy(verdicts: Verdicts) -> None:
    ((_, message),) = verdicts["Test_not_installed"].items()
    assert "the plugin nowhere cannot be loaded, so no check of Suite can run" in message
    assert "-m pip install -e ." in message
