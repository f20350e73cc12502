"""The limits that docs/security.md states are those of the code."""

from __future__ import annotations

import re

import pytest

from firebuild_bootstrap.bootstrap_settings import BootstrapSettings
from firebuild_bootstrap.cli import stdin
from firebuild_bootstrap.dockerfile import expansion
from firebuild_bootstrap.guest import metadata
from firebuild_bootstrap.image import oci
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
