"""`firebuild ca inspect` and `revoke`: files with certificates."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.plugins import install_moody
from pki import conftest
from pki.conftest import Install

install = conftest.install


@pytest.fixture
def pair(cli: Cli) -> Path:
    cli("ca", "issue", "--server", "b1", "--guest", "b1", "--out", "pair")
    return Path("pair")


def test_inspect_shows_what_is_there_and_that_it_fits(cli: Cli, pair: Path) -> None:
    done = cli("ca", "inspect", *sorted(pair.iterdir()))
    assert "certificate 1 of pair/ca.pem\n  subject " in done.out
    assert "private key 1 of pair/guest-key.pem\n  key        EC secp256r1\n  encrypted  no\n" in done.out
    assert "ok    server use" in done.out
    assert "ok    guest use" in done.out
    assert "BEGIN" not in done.out
    assert "FAIL" not in done.out
    assert max(map(len, done.out.splitlines())) <= 100


def test_inspect_ends_with_3_if_something_is_wrong(cli: Cli, pair: Path) -> None:
    cli("ca", "issue", "--server", "b2", "--out", "other")
    done = cli("ca", "inspect", "pair/server.pem", "other/server-key.pem", "--trust", "pair/ca.pem", status=3)
    assert "FAIL  key            the key of other/server-key.pem fits none of the certificates" in done.out
    done = cli("ca", "inspect", pair / "server.pem", "--trust", "other/ca.pem", "--json", status=3)
    found = json.loads(done.out)
    assert list(found) == ["sound", "items", "rows"]
    assert not found["sound"]
    assert [item["kind"] for item in found["items"]] == ["certificate", "certificate"]
    assert list(found["rows"][0]) == ["about", "level", "message", "hint"]


def test_inspect_reads_standard_input(cli: Cli, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.BytesIO((pair / "ca.pem").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    assert cli("ca", "inspect", "-").out.startswith("certificate 1 of standard input\n")


def test_inspect_says_what_it_cannot_read(cli: Cli) -> None:
    assert cli("ca", "inspect", "missing.pem", status=2).err == (
        f"error: missing.pem: there is no such file\n  hint: relative paths start at {Path.cwd()}\n"
    )
    Path("notes.txt").write_text("remember the milk")
    done = cli("ca", "inspect", "notes.txt", status=2)
    assert "found text without any BEGIN line" in done.err


def test_inspect_opens_keys_with_a_passphrase_from_a_file(cli: Cli) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(b"open sesame")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    Path("locked.key").write_bytes(pem)
    Path("locked.key").chmod(0o600)
    assert "unknown while it is encrypted" in cli("ca", "inspect", "locked.key").out
    Path("words").write_text("open sesame\n")
    done = cli("ca", "inspect", "locked.key", "--passphrase-file", "words")
    assert "key        EC secp256r1\n  encrypted  with a passphrase" in done.out
    Path("words").write_text("sim sala bim")
    done = cli("ca", "inspect", "locked.key", "--passphrase-file", "words", status=2)
    assert "the passphrase may be wrong" in done.err
    assert "sim sala bim" not in done.err


def test_revoke_needs_a_provider_that_can(cli: Cli, pair: Path) -> None:
    done = cli("ca", "revoke", pair / "server.pem", status=3)
    assert done.err.startswith(
        "error: ca-provider(embedded): it cannot revoke certificates (hint: they end by "
    )


def test_revoke_refuses_what_another_ca_issued_unless_its_issuer_is_gone(
    cli: Cli, pair: Path, install: Install
) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[revokes]")
    files = [pair / "server.pem", pair / "guest.pem"]
    done = cli("ca", "revoke", *files, "--ca", "moody", status=3)
    assert done.err.count("was not issued by a CA of this provider, which are: ") == 2
    assert "  hint: choose the configuration that issued it\n" in done.err
    done = cli("ca", "revoke", *files, "--ca", "moody", "--issuer-gone")
    assert done.out.startswith("revoked pair/server.pem: b1.firebuild.internal, serial number ")
    assert done.out.count("\n") == 2
    told = json.loads(cli("ca", "revoke", *files, "--ca", "moody", "--issuer-gone", "--json").out)
    assert [one["names"] for one in told] == [["b1.firebuild.internal"], ["guest.b1.firebuild.internal"]]
    assert {one["revoked"] for one in told} == {True}


def test_each_is_tried_and_a_failure_is_told(cli: Cli, pair: Path, install: Install) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[revokes-badly]")
    done = cli(
        "ca", "revoke", pair / "server.pem", pair / "ca.pem", "--ca", "moody", "--issuer-gone", status=3
    )
    assert "not revoked: the list is full" in done.err
    assert "is a CA: expected the certificate of a server or guest" in done.err


def test_nothing_is_revoked_if_a_file_cannot_be_read(cli: Cli, pair: Path, install: Install) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[revokes]")
    done = cli("ca", "revoke", pair / "server.pem", pair / "server-key.pem", "--ca", "moody", status=2)
    assert done.out == ""
    assert done.err == (
        f"error: {pair / 'server-key.pem'}: expected a certificate in PEM, found a private key\n"
        "  hint: has this file been swapped with that of the certificate?\n"
    )
