"""The limits that docs/security.md states are those of the code, and each is held by a test that it names."""

from __future__ import annotations

import re
from inspect import signature
from typing import Final, NamedTuple

import pytest

from firebuild_bootstrap import programs, runs, wire
from firebuild_bootstrap.bootstrap_settings import BootstrapSettings
from firebuild_bootstrap.cli import given
from firebuild_bootstrap.context import FetchLimits, downloads, tree
from firebuild_bootstrap.dockerfile import expansion, lint, stages, syntax
from firebuild_bootstrap.guest import metadata
from firebuild_bootstrap.image import oci
from firebuild_bootstrap.image.worker import packages
from firebuild_bootstrap.layers import apply, compression, reader
from firebuild_bootstrap.machine import console, drives
from firebuild_bootstrap.machine.firecracker import api, cni
from firebuild_bootstrap.mmds import emulator, protocol, store
from firebuild_bootstrap.registry import client, credentials, transport
from firebuild_bootstrap.registry.settings import RegistriesSettings
from firebuild_bootstrap.sandbox import bwrap
from firebuild_bootstrap.service import reporting, server
from firebuild_bootstrap.service.limits import Limits
from firebuild_pki import CASettings, chain, crossing, display, homes, names, pem_files, yaml_reader
from firebuild_pki import settings as ca_settings
from firebuild_pki.http import HTTPClient
from firebuild_pki.providers.vault import transport as vault
from support import REPO


class Held(NamedTuple):
    """The numbers of one cell, and the tests that fail where one of them does not hold any more."""

    numbers: tuple[float, ...]
    proofs: tuple[str, ...]


COLUMNS: Final = ("memory", "descriptors", "disk", "time")
UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "min": 60}
FETCH, REGISTRIES, BOOTSTRAP, SERVER = FetchLimits(), RegistriesSettings(), BootstrapSettings(), Limits()
TIMEOUT: Final = REGISTRIES.timeout.total_seconds()
CALL, ISSUE = (
    CASettings.model_fields[name].default.total_seconds() for name in ("call_timeout", "issue_timeout")
)
HTTP: Final = signature(HTTPClient).parameters
ANSWER: Final = "pki/test_pki_http.py::test_an_answer_is_bounded_in_size_and_time"
GIT: Final = "context/test_git.py::test_a_small_repository_that_becomes_large_is_refused"
PACKAGES: Final = (
    "image/test_packages.py::test_a_database_of_more_than_its_limit_is_not_read",
    "image/test_packages.py::test_links_lead_nowhere_and_neither_size_nor_number_is_without_bound",
)
PULLING: Final = "registry/test_pulling.py::"
LAYER: Final = "layers/test_reader.py::test_a_layer_that_claims_too_much_is_not_unpacked"
CNI: Final = (
    "machine_firecracker/test_firecracker_cni.py"
    "::test_a_plugin_that_goes_on_for_ever_is_ended_and_everything_is_taken_back"
)
LIMITS: Final = {
    "one file": {
        "memory": Held(
            (yaml_reader.MAX_NODES, yaml_reader.MAX_DEPTH),
            (
                "pki/test_pki_documents.py::test_aliases_of_aliases_cannot_blow_up",
                "cli/test_cli_bad_values.py::test_a_deeply_nested_configuration_is_refused_with_its_place",
            ),
        ),
    },
    "its text, or that of an ignore file; a word after the expansion of its variables": {
        "memory": Held(
            (syntax.MOST_TEXT, expansion.MAX_WORD),
            (
                "dockerfile/test_parsing.py::test_a_dockerfile_without_end_is_refused_at_its_limit",
                "context/test_dockerignore.py::test_an_ignore_file_of_a_terabyte_is_an_error",
                "dockerfile/test_expansion.py::test_a_variable_that_doubles_again_and_again_is_an_error_with_its_line",
            ),
        ),
        "time": Held(
            (stages._MOST_NESTED, tree.MOST_WILD),
            (
                "context/test_dockerignore.py::test_patterns_with_wildcards_have_a_bound_and_paths_have_none",
                "dockerfile/test_stages.py::test_stages_need_one_another_in_a_row_of_a_bounded_length",
                "dockerfile/test_parsing.py"
                "::test_an_instruction_is_continued_over_many_lines_but_not_over_any_number",
            ),
        ),
    },
    "warnings that are shown": {
        "time": Held(
            (lint.MOST_SHOWN,),
            ("cli/test_cli_build.py::test_of_many_warnings_the_first_are_shown_and_all_are_counted",),
        ),
    },
    "the total text of expanded variables; the total that instructions inherit from those before them": {
        "memory": Held(
            (expansion.Budget().left,),
            (
                "dockerfile/test_expansion.py::test_all_variables_together_have_a_bound_too",
                "dockerfile/test_expansion.py::test_what_instructions_have_of_those_before_them_has_a_bound",
            ),
        ),
    },
    "a Dockerfile": {
        "memory": Held(
            (syntax.MOST_TEXT,),
            (
                "cli/test_cli_build.py::test_standard_input_is_read_up_to_a_limit",
                "cli/test_cli_build.py::test_a_dockerfile_in_an_archive_is_not_cut_where_it_is_too_large",
            ),
        ),
    },
    "a build context": {
        "disk": Held(
            (given._CONTEXT_LIMIT,), ("cli/test_cli_build.py::test_standard_input_is_read_up_to_a_limit",)
        ),
    },
    "a download": {
        "memory": Held(
            (downloads._CHUNK,), ("context/test_downloads.py::test_what_comes_with_a_redirect_is_not_read",)
        ),
        "disk": Held(
            (FETCH.total_bytes,), ("context/test_downloads.py::test_a_download_of_too_many_bytes_is_refused",)
        ),
        "time": Held(
            (FETCH.idle_seconds, FETCH.total_seconds),
            (
                "context/test_downloads.py::test_a_server_that_is_silent_is_given_up",
                "context/test_downloads.py::test_a_server_that_only_trickles_is_given_up",
            ),
        ),
    },
    "git and its child processes": {
        "memory": Held(
            (FETCH.memory, programs.MOST_OUTPUT),
            (GIT, "context/test_git.py::test_a_git_that_goes_on_for_ever_is_ended"),
        ),
        "disk": Held((FETCH.total_bytes, FETCH.total_entries), (GIT,)),
        "time": Held(
            (FETCH.total_seconds,), ("context/test_git.py::test_a_server_that_never_answers_is_given_up",)
        ),
    },
    "databases of packages": {
        "memory": Held(
            (
                packages._LARGEST_DATABASE,
                packages._LARGEST_FILE,
                packages._LARGEST_METADATA,
                packages._MOST_PACKAGES,
            ),
            PACKAGES,
        ),
        "time": Held(
            (packages._MOST_INSTRUCTIONS,),
            ("image/test_packages.py::test_a_database_that_is_a_program_is_damaged",),
        ),
    },
    "a manifest, an index or a configuration": {
        "memory": Held(
            (oci.MAX_DOCUMENT, oci.MAX_MEMBERS),
            (
                f"{PULLING}test_an_endless_or_huge_manifest_is_refused_after_4_mib",
                "image/test_intake.py::test_an_image_of_too_many_layers_is_refused_at_once",
                "image/test_oci.py::test_no_list_has_more_than_1024_members",
                "image/test_intake.py::test_no_list_of_a_docker_archive_has_more_than_1024_members",
            ),
        ),
        "time": Held(
            (oci._MAX_INDEXES, TIMEOUT),
            (
                "image/test_intake.py::test_indexes_in_indexes_end_somewhere",
                f"{PULLING}test_a_head_or_a_body_that_drips_is_given_up",
            ),
        ),
    },
    "a token; text of an error": {
        "memory": Held(
            (transport._MAX_TOKEN, transport._MAX_ERROR),
            (
                "registry/test_logins.py::test_a_realm_that_gives_no_token_is_named",
                f"{PULLING}test_what_a_registry_says_is_bounded",
            ),
        ),
        "time": Held(
            (transport._MAX_REDIRECTS,),
            (f"{PULLING}test_redirects_are_followed_a_few_times_and_never_to_plain_http",),
        ),
    },
    "blobs": {
        "descriptors": Held(
            (REGISTRIES.connections,),
            (f"{PULLING}test_no_more_layers_come_at_a_time_than_the_setting_says",),
        ),
        "disk": Held(
            (),
            (
                f"{PULLING}test_a_wrong_length_is_refused",
                f"{PULLING}test_what_can_not_be_used_is_refused_before_a_layer_comes",
            ),
        ),
        "time": Held((client._LEAST, TIMEOUT), (f"{PULLING}test_a_head_or_a_body_that_drips_is_given_up",)),
    },
    "the window of its decompressor": {
        "memory": Held(
            (compression._MOST_DICTIONARY,),
            ("layers/test_compression.py::test_compressed_data_can_ask_for_so_much_memory_only",),
        ),
    },
    "its tar archive": {
        "memory": Held(
            (reader.LAYER_LIMITS.header, apply.REMEMBERED),
            (
                "layers/test_reader.py::test_limits_hold_for_entries_content_and_headers",
                "layers/test_apply.py::test_directories_without_end_are_refused",
            ),
        ),
        "descriptors": Held(
            (apply._HELD,),
            ("layers/test_apply.py::test_a_tree_may_be_deeper_than_descriptors_and_paths_are_long",),
        ),
        "disk": Held(
            (reader.LAYER_LIMITS.content, reader.LAYER_LIMITS.entries, apply._MOST_MADE),
            (LAYER, "layers/test_apply.py::test_directories_that_no_entry_describes_are_bounded_too"),
        ),
    },
    "calls": {
        "memory": Held(
            (wire.MAX_MESSAGE_BYTES, server._MOST_CALLS),
            (
                "service/test_calls.py::test_messages_above_the_limit_are_refused",
                "service/test_memory.py::test_a_guest_can_not_make_its_server_keep_more_than_a_bounded_amount",
                "service/test_memory.py::test_a_guest_has_128_calls_open_at_most",
            ),
        ),
        "descriptors": Held(
            (BOOTSTRAP.max_connections,),
            ("service/test_refused_peers.py::test_the_guest_cannot_have_more_connections_than_the_limit",),
        ),
        "time": Held(
            (
                BOOTSTRAP.initial_timeout.total_seconds(),
                BOOTSTRAP.missed_pings,
                BOOTSTRAP.build_timeout.total_seconds(),
            ),
            (
                "service/test_supervision.py::test_a_guest_that_never_calls_is_lost",
                "service/test_supervision.py::test_a_guest_that_stops_pinging_is_lost",
                "service/test_supervision.py::test_a_build_that_takes_too_long_is_ended_while_the_guest_pings",
            ),
        ),
    },
    "the layer that a step made": {
        "disk": Held(
            (drives.SCRATCH_BYTES,), ("machine/test_drives.py::test_a_layer_without_an_end_is_cut_off",)
        ),
    },
    "output that is shown (`bootstrap.log_limit`); the text of an error": {
        "memory": Held(
            (BOOTSTRAP.log_limit, reporting._MAX_REASON),
            (
                "legacy/test_old_guest_calls.py::test_steps_that_take_turns_do_not_get_around_the_limit",
                "pages/test_security_page.py::test_the_reason_of_a_guest_is_cut",
            ),
        ),
    },
    "requests to an SSH agent": {
        "memory": Held(
            (wire.MAX_AGENT_MESSAGE,),
            ("service/test_agents.py::test_what_a_guest_may_not_ask_ends_the_build",),
        ),
        "descriptors": Held(
            (wire.MAX_AGENT_REQUESTS,),
            ("service/test_agents.py::test_a_guest_that_takes_no_replies_is_sent_no_more_than_it_may_ask",),
        ),
    },
    "its console output": {
        "memory": Held(
            (console._LIMIT,),
            (
                "machine/test_serial_copy.py"
                "::test_of_a_console_without_end_the_end_and_a_bounded_copy_are_kept",
            ),
        ),
        "disk": Held(
            (console._COPY_LIMIT,),
            (
                "machine/test_serial_copy.py"
                "::test_of_a_console_without_end_the_end_and_a_bounded_copy_are_kept",
            ),
        ),
    },
    "its output": {
        "disk": Held((runs.LOG_BYTES,), ("test_runs.py::test_of_output_without_end_the_last_is_kept",)),
    },
    "connections to the server of a build": {
        "descriptors": Held(
            (SERVER.max_handshakes,),
            (
                "service/test_refused_peers.py::test_peers_that_hold_connections_open_cannot_keep_the_guest_out",
            ),
        ),
        "time": Held(
            (SERVER.handshake_timeout,),
            ("service/test_refused_peers.py::test_a_peer_that_dawdles_is_refused",),
        ),
    },
    "a metadata document": {
        "memory": Held(
            (metadata._MAX_DOCUMENT,),
            ("guest/test_guest_metadata.py::test_faults_are_sentences_without_the_document",),
        ),
        "time": Held(
            (metadata._ANSWER_SECONDS,),
            ("guest/test_guest_exchange.py::test_an_answer_that_drips_is_not_waited_for_for_ever",),
        ),
    },
    "requests": {
        "memory": Held(
            (protocol.MAX_REQUEST_BYTES,),
            ("mmds/test_emulator.py::test_a_request_may_take_2500_bytes_and_not_one_more",),
        ),
        "descriptors": Held(
            (emulator._MAX_CONNECTIONS,),
            ("mmds/test_emulator.py::test_too_many_connections_are_closed_and_the_service_lives",),
        ),
        "time": Held(
            (emulator._IDLE_SECONDS,), ("mmds/test_emulator.py::test_a_silent_connection_is_closed",)
        ),
    },
    "the document, with Firecracker's limit": {
        "memory": Held(
            (store.STORE_LIMIT,),
            (
                "mmds/test_store.py"
                "::test_the_limit_counts_bytes_of_compact_json_and_a_refused_write_changes_nothing",
            ),
        ),
    },
    "an answer (`ca.call_timeout`); a certificate that is pending (`ca.issue_timeout`)": {
        "memory": Held(
            (crossing.MAX_PEM, crossing.MAX_NOTES),
            (
                "pki/test_pki_untrusted_plugins.py::test_more_than_a_megabyte_of_certificates_is_refused",
                "pki/test_pki_untrusted_plugins.py::test_notes_without_end_are_refused",
            ),
        ),
        "time": Held(
            (CALL, ISSUE),
            (
                "pki/test_pki_patience.py::test_a_provider_that_does_not_answer_is_an_error_that_may_heal",
                "pki/test_pki_pending.py::test_the_limit_of_the_whole_is_a_setting",
            ),
        ),
    },
    "the backend of `vault`: an answer": {
        "memory": Held(
            (vault.MAX_ANSWER,), ("pki_vault/test_vault_retries.py::test_an_answer_without_end_is_given_up",)
        ),
        "time": Held(
            (vault.MAX_REDIRECTS,),
            (
                "pki_vault/test_vault_answers.py::test_redirects_in_a_circle_end",
                "pki_vault/test_vault_retries.py::test_an_answer_that_trickles_is_given_up_as_a_whole",
            ),
        ),
    },
    "the backend of `step-ca` or `cfssl`: an answer": {
        "memory": Held((HTTP["longest"].default,), (ANSWER,)),
        "time": Held((HTTP["timeout"].default,), (ANSWER,)),
    },
    "chains from a leaf to an anchor that are tried": {
        "memory": Held(
            (chain._MAX_LINKS,), ("pki/test_pki_paths.py::test_what_is_known_of_cas_does_not_grow_for_ever",)
        ),
        "time": Held(
            (chain._MAX_PATHS,),
            ("pki/test_pki_paths.py::test_a_heap_of_cas_that_all_sign_each_other_is_searched_in_no_time",),
        ),
    },
    "its size; names": {
        "memory": Held(
            (names.MAX_CSR, names.MAX_NAMES),
            (
                "pki/test_pki_requests.py::test_a_request_that_asks_for_more_than_its_names_is_refused",
                "pki/test_pki_names.py::test_names_are_bounded_and_each_is_there_once",
            ),
        ),
    },
    "a secret in a file or a pipe": {
        "memory": Held(
            (ca_settings._MAX_SECRET,), ("pki/test_pki_homes.py::test_a_device_or_a_directory_is_no_secret",)
        ),
        "time": Held(
            (homes.PATIENCE,), ("pki/test_pki_homes.py::test_a_pipe_is_read_to_its_end_within_a_bound",)
        ),
    },
    "its size": {
        "memory": Held(
            (pem_files.MAX_SIZE,), ("pki_file/test_file_wrong_files.py::test_a_huge_file_is_not_read",)
        ),
    },
    "an answer of its API": {
        "memory": Held(
            (api._MAX_ANSWER,),
            ("machine_firecracker/test_firecracker_api.py::test_an_answer_without_end_is_given_up",),
        ),
        "time": Held(
            (api._SECONDS,),
            ("machine_firecracker/test_firecracker_api.py::test_an_answer_that_only_trickles_is_given_up",),
        ),
    },
    "its answer": {
        "memory": Held(
            (credentials._MAX_ANSWER,),
            (
                "registry/test_logins.py"
                "::test_a_program_for_credentials_is_bounded_in_output_and_time_and_ends_with_its_children",
            ),
        ),
        "time": Held(
            (credentials._HELPER_SECONDS,),
            (
                "registry/test_logins.py"
                "::test_a_program_for_credentials_is_bounded_in_output_and_time_and_ends_with_its_children",
            ),
        ),
    },
    "standard output; standard error": {
        "memory": Held((programs.MOST_OUTPUT,), (CNI,)),
        "time": Held((cni._SECONDS,), (CNI,)),
    },
    "its answers": {
        "memory": Held(
            (bwrap._MOST_OUTPUT,),
            ("sandbox/test_sandbox.py::test_a_program_that_writes_for_ever_is_ended",),
        ),
    },
    "a line of text that is shown; a message of several lines": {
        "memory": Held(
            (display.LINE_LIMIT, display.BLOCK_LIMIT),
            ("pki/test_pki_display.py::test_a_flood_becomes_a_short_line",),
        ),
    },
}
CELLS: Final = [(what, column) for what, cells in LIMITS.items() for column in cells]


def rows() -> dict[str, dict[str, str]]:
    """The cells of the table, by what is limited and by column."""
    _, _, text = (REPO / "docs/security.md").read_text().partition("## Limits of what comes from outside\n")
    text, _, _ = text.partition("\n## ")
    head, _, *lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    assert tuple(cell.strip() for cell in head[2:]) == COLUMNS
    found = [(what.strip(), [cell.strip() for cell in cells]) for _, what, *cells in lines]
    assert len({what for what, _ in found}) == len(found)
    return {what: dict(zip(COLUMNS, cells, strict=True)) for what, cells in found}


def written(text: str) -> tuple[int, ...]:
    numbers = re.findall(r"(\d[\d,]*)(?: (\w+))?", text)
    return tuple(int(number.replace(",", "")) * UNITS.get(unit, 1) for number, unit in numbers)


def test_every_limit_of_the_page_is_held_to_the_code_and_every_other_cell_has_a_reason() -> None:
    for what, cells in rows().items():
        limited = {column for column, cell in cells.items() if not re.match(r"- \w", cell)}
        assert limited == LIMITS[what].keys(), what
    assert rows().keys() == LIMITS.keys()


@pytest.mark.parametrize(("what", "column"), CELLS)
def test_a_limit_is_what_the_page_says(what: str, column: str) -> None:
    assert written(rows()[what][column]) == LIMITS[what][column].numbers


@pytest.mark.parametrize(("what", "column"), CELLS)
def test_the_tests_of_a_limit_exist(what: str, column: str) -> None:
    assert LIMITS[what][column].proofs
    for proof in LIMITS[what][column].proofs:
        file, _, name = proof.partition("::")
        assert re.search(rf"^def {name}\(", (REPO / "tests" / file).read_text(), re.MULTILINE), proof


def test_the_reason_of_a_guest_is_cut() -> None:
    text = "x" * (10 * reporting._MAX_REASON)
    assert (
        len(reporting.aborted(text, step=0, exit_code=0, reason="file").message) < 2 * reporting._MAX_REASON
    )
