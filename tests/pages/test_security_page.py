"""The limits that docs/security.md states are those of the code."""

from __future__ import annotations

import re

import pytest

from firebuild_bootstrap.bootstrap_settings import BootstrapSettings
from firebuild_bootstrap.cli import stdin
from firebuild_bootstrap.context import FetchLimits
from firebuild_bootstrap.dockerfile import expansion
from firebuild_bootstrap.guest import metadata
from firebuild_bootstrap.image import oci
from firebuild_bootstrap.image.worker import packages
from firebuild_bootstrap.layers import apply, reader
from firebuild_bootstrap.mmds import emulator, protocol, store
from firebuild_bootstrap.registry import transport
from firebuild_bootstrap.service import reporting, server
from firebuild_pki import CASettings, chain, crossing, display, names, pem_files, yaml_reader
from firebuild_pki.providers.vault import transport as vault
from support import REPO

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "min": 60}
LIMITS = {
    "values in one file; nesting": (yaml_reader.MAX_NODES, yaml_reader.MAX_DEPTH),
    "a word after its variables are expanded": (expansion.MAX_WORD,),
    "a Dockerfile; a build context": (stdin._DOCKERFILE_LIMIT, stdin._CONTEXT_LIMIT),
    "bytes; time without any progress; time in all": (
        FetchLimits().total_bytes,
        FetchLimits().idle_seconds,
        FetchLimits().total_seconds,
    ),
    "of rpm; of dpkg or apk; other metadata; packages": (
        packages._LARGEST_DATABASE,
        packages._LARGEST_FILE,
        packages._LARGEST_METADATA,
        packages._MOST_PACKAGES,
    ),
    "a manifest, an index or a configuration": (oci.MAX_DOCUMENT,),
    "members of an index or layers of an image; indexes in each other": (oci.MAX_MEMBERS, oci._MAX_INDEXES),
    "redirects; text of an error that is read; a token": (
        transport._MAX_REDIRECTS,
        transport._MAX_ERROR,
        transport._MAX_TOKEN,
    ),
    "entries": (reader.LAYER_LIMITS.entries,),
    "missing directories that are made for its entries": (apply._MOST_MADE,),
    "calls that wait at a time": (server._MOST_CALLS,),
    "output of a step that is shown as it comes (`bootstrap.log_limit`)": (BootstrapSettings().log_limit,),
    "reason of a failure": (reporting._MAX_REASON,),
    "a metadata document": (metadata._MAX_DOCUMENT,),
    "a request; connections": (protocol.MAX_REQUEST_BYTES, emulator._MAX_CONNECTIONS),
    "the document, as Firecracker has it": (store.STORE_LIMIT,),
    "certificates in one answer; notes": (crossing.MAX_PEM, crossing.MAX_NOTES),
    "one answer (`ca.call_timeout`); one certificate that is pending (`ca.issue_timeout`)": tuple(
        CASettings.model_fields[name].default.total_seconds() for name in ("call_timeout", "issue_timeout")
    ),
    "the backend of `vault`: one answer": (vault.MAX_ANSWER,),
    "ways from a leaf to an anchor that are tried": (chain._MAX_PATHS,),
    "its size; names": (names.MAX_CSR, names.MAX_NAMES),
    "its size": (pem_files.MAX_SIZE,),
    "one line of text that is shown; a message of several": (display.LINE_LIMIT, display.BLOCK_LIMIT),
}

PROOFS = {
    "values in one file; nesting": "pki/test_pki_documents.py::test_aliases_of_aliases_cannot_blow_up",
    "a word after its variables are expanded": "dockerfile/test_expansion.py::test_all_variables_together_have_a_bound_too",  # noqa: E501
    "a Dockerfile; a build context": "cli/test_cli_build.py::test_standard_input_is_read_up_to_a_limit",
    "bytes; time without any progress; time in all": "context/test_downloads.py::test_a_download_of_too_many_bytes_is_refused",  # noqa: E501
    "of rpm; of dpkg or apk; other metadata; packages": "image/test_packages.py::test_links_lead_nowhere_and_neither_size_nor_number_is_without_bound",  # noqa: E501
    "a manifest, an index or a configuration": "registry/test_pulling.py::test_an_endless_or_huge_manifest_is_refused_after_4_mib",  # noqa: E501
    "members of an index or layers of an image; indexes in each other": "image/test_intake.py::test_an_image_of_too_many_layers_is_refused_at_once",  # noqa: E501
    "redirects; text of an error that is read; a token": "registry/test_pulling.py::test_what_a_registry_says_is_bounded",  # noqa: E501
    "entries": "layers/test_reader.py::test_limits_hold_for_entries_content_and_headers",
    "missing directories that are made for its entries": "layers/test_apply.py::test_directories_that_no_entry_describes_are_bounded_too",  # noqa: E501
    "calls that wait at a time": "service/test_memory.py::test_a_guest_can_not_make_its_server_keep_more_than_a_bounded_amount",  # noqa: E501
    "output of a step that is shown as it comes (`bootstrap.log_limit`)": "service/test_calls.py::test_steps_that_take_turns_do_not_get_around_the_limit",  # noqa: E501
    "a metadata document": "guest/test_guest_exchange.py::test_a_body_over_the_limit_is_not_read",
    "a request; connections": "mmds/test_emulator.py::test_too_many_connections_are_closed_and_the_service_lives",  # noqa: E501
    "the document, as Firecracker has it": "mmds/test_store.py::test_the_limit_counts_bytes_of_compact_json_and_a_refused_write_changes_nothing",  # noqa: E501
    "certificates in one answer; notes": "pki/test_pki_untrusted_plugins.py::test_more_than_a_megabyte_of_certificates_is_refused",  # noqa: E501
    "one answer (`ca.call_timeout`); one certificate that is pending (`ca.issue_timeout`)": "pki/test_pki_pending.py::test_the_limit_of_the_whole_is_a_setting",  # noqa: E501
    "ways from a leaf to an anchor that are tried": "pki/test_pki_paths.py::test_a_heap_of_cas_that_all_sign_each_other_is_searched_in_no_time",  # noqa: E501
    "its size; names": "pki/test_pki_names.py::test_names_are_bounded_and_each_is_there_once",
    "its size": "pki_file/test_file_wrong_files.py::test_a_huge_file_is_not_read",
    "the backend of `vault`: one answer": "pki_vault/test_vault_retries.py::test_an_answer_without_end_is_given_up",  # noqa: E501
    "one line of text that is shown; a message of several": "pki/test_pki_display.py::test_a_long_line_is_cut_and_says_how_long_it_was",  # noqa: E501
}  # fmt: skip
"""The test that a limit holds, by what is limited."""
HELD_HERE = {"reason of a failure"}


def rows() -> dict[str, str]:
    _, _, text = (REPO / "docs/security.md").read_text().partition("## Limits of what comes from outside\n")
    found = re.findall(r"^\|[^|]*\| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return dict(found[1:])


def written(text: str) -> tuple[int, ...]:
    numbers = re.findall(r"([\d,]+)(?: (\w+))?", text)
    return tuple(int(number.replace(",", "")) * UNITS.get(unit, 1) for number, unit in numbers)


def test_every_limit_of_the_page_is_held_to_the_code() -> None:
    assert set(rows()) == set(LIMITS)


@pytest.mark.parametrize("what", LIMITS)
def test_a_limit_is_what_the_page_says(what: str) -> None:
    assert written(rows()[what]) == LIMITS[what]


def test_every_limit_has_a_test_that_it_holds() -> None:
    assert set(PROOFS) | HELD_HERE == set(LIMITS)


@pytest.mark.parametrize("what", PROOFS)
def test_the_test_of_a_limit_exists(what: str) -> None:
    file, _, name = PROOFS[what].partition("::")
    assert re.search(rf"^def {name}\(", (REPO / "tests" / file).read_text(), re.MULTILINE)


def test_the_reason_of_a_guest_is_cut() -> None:
    text = "x" * (10 * reporting._MAX_REASON)
    assert (
        len(reporting.aborted(text, step=0, exit_code=0, reason="file").message) < 2 * reporting._MAX_REASON
    )
