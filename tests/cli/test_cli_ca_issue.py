"""`firebuild ca issue`: certificates in files, all of them or none."""

from __future__ import annotations

import errno
import json
import os
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from cli.conftest import Cli
from cli.plugins import install_moody
from firebuild_bootstrap.cli.issuing import PemFile, write_files
from firebuild_bootstrap.errors import InputError
from pki import conftest
from pki.conftest import Install
from pki.tools import handshake

install = conftest.install

ALL = ["ca.pem", "guest-key.pem", "guest.pem", "server-key.pem", "server.pem"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def leaf(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def dns_names(path: Path) -> list[str]:
    extension = leaf(path).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return extension.value.get_values_for_type(x509.DNSName)


def context(directory: Path, end: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if end == "server" else ssl.PROTOCOL_TLS_CLIENT)
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(directory / "ca.pem")
    made.load_cert_chain(directory / f"{end}.pem", directory / f"{end}-key.pem")
    return made


def test_a_pair_of_one_build_shakes_hands(cli: Cli) -> None:
    done = cli("ca", "issue", "--server", "b1", "--guest", "b1", "--out", "new/pair")
    out = Path("new/pair")
    assert names(out) == ALL
    assert dns_names(out / "server.pem") == ["b1.firebuild.internal"]
    assert dns_names(out / "guest.pem") == ["guest.b1.firebuild.internal"]
    handshake(context(out, "server"), context(out, "guest"), "b1.firebuild.internal")
    lines = done.out.splitlines()
    assert lines[0] == "server  b1.firebuild.internal"
    assert any(line.startswith("        valid 20") for line in lines)
    assert "        new/pair/server-key.pem" in lines
    assert "PRIVATE KEY" not in done.out
    assert done.err == ""


def test_keys_and_a_new_directory_are_for_their_owner_alone(cli: Cli) -> None:
    cli("ca", "issue", "--server", "b1", "--guest", "b1", "--out", "pair")
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("pair").iterdir()}
    assert modes == {name: 0o600 if "key" in name else 0o644 for name in ALL}
    assert Path("pair").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("options", "server", "guest"),
    [
        (["--server", "b1.example.org"], "b1.example.org", None),
        (["--guest", "b1"], None, "guest.b1.firebuild.internal"),
        (["--guest", "b1.example.org"], None, "guest.b1.example.org"),
        (["--server", "b1.example.org", "--guest", "b1"], "b1.example.org", "guest.b1.example.org"),
        (["--server", "guest"], "guest.firebuild.internal", None),
    ],
)
def test_the_names_are_those_of_a_build(
    cli: Cli, options: list[str], server: str | None, guest: str | None
) -> None:
    report = json.loads(cli("ca", "issue", *options, "--out", "out", "--json").out)
    out = Path("out")
    for end, name in (("server", server), ("guest", guest)):
        assert (end in report) == (name is not None) == (out / f"{end}.pem").exists()
        if name is not None:
            assert dns_names(out / f"{end}.pem") == [name]
            assert report[end]["name"] == name


def test_the_document_says_where_everything_is(cli: Cli) -> None:
    done = cli("ca", "issue", "--server", "b1", "--out", "out", "--json", "--ttl", "2h")
    report = json.loads(done.out)
    assert list(report) == ["provider", "issuer_fingerprint_sha256", "trust", "server", "warnings"]
    server = report["server"]
    assert list(server) == [
        *("name", "not_before", "not_after", "fingerprint_sha256", "certificate", "private_key")
    ]
    certificate = leaf(Path(server["certificate"]))
    assert server["not_after"] == certificate.not_valid_after_utc.isoformat()
    assert Path(server["private_key"]).exists()
    assert Path(report["trust"]).exists()
    assert "PRIVATE KEY" not in done.out


def test_what_the_ca_does_differently_is_a_warning(cli: Cli) -> None:
    done = cli("ca", "issue", "--server", "b1", "--out", "out", "--ttl", "48h")
    assert done.err.startswith("warning: the CA capped the lifetime of the server certificate: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --server NAME, --guest ID or both"),
        (
            ["--server", "a", "--guest", "b"],
            "expected both ends of one build, found --server a and --guest b",
        ),
        (["--server", "a.x.org", "--guest", "a.y.org"], "expected both ends of one build"),
        (["--server", "a\nb", "--guest", "b"], "expected both ends of one build, found --server a b and --"),
        (["--guest", "guest.b1.example.org"], "expected the id of a build after --guest"),
        (["--guest", "guest.b1\n"], 'expected the id of a build after --guest, found "guest.b1'),
        (["--server", "b1", "--ttl", "60"], "--ttl: expected a duration such as 90s or 1h30m"),
        (["--server", "b1", "--ttl", "0s"], "--ttl: expected a duration above zero"),
    ],
)
def test_options_that_do_not_fit_are_bad_input(cli: Cli, options: list[str], message: str) -> None:
    done = cli("ca", "issue", *options, "--out", "out", status=2)
    assert done.first.startswith(f"error: {message}")
    assert not Path("out").exists()


def test_a_name_that_is_no_dns_name_is_refused(cli: Cli) -> None:
    done = cli("ca", "issue", "--server", "No_Name", "--out", "out", status=2)
    assert done.first.startswith('error: expected a build id that is a DNS label, found "No_Name"')
    done = cli("ca", "issue", "--server", "b1.No_Domain", "--out", "out", status=2)
    assert done.first.startswith('error: expected a lower-case domain as name suffix, found "No_Domain"')


def test_files_are_replaced_only_by_force(cli: Cli) -> None:
    cli("ca", "issue", "--server", "b1", "--out", "out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    done = cli("ca", "issue", "--server", "b1", "--guest", "b1", "--out", "out", status=2)
    assert done.first == "error: out: server.pem, server-key.pem, ca.pem exist already"
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    cli("ca", "issue", "--server", "b1", "--guest", "b1", "--out", "out", "--force")
    assert names(Path("out")) == ALL
    assert all(path.read_bytes() != content for path, content in before.items())
    handshake(context(Path("out"), "server"), context(Path("out"), "guest"), "b1.firebuild.internal")


def test_one_file_in_the_way_is_named(cli: Cli) -> None:
    Path("out").mkdir()
    Path("out/ca.pem").symlink_to("nowhere")
    done = cli("ca", "issue", "--server", "b1", "--out", "out", status=2)
    assert done.first == "error: out: ca.pem exists already"
    assert names(Path("out")) == ["ca.pem"]


def test_a_directory_that_is_none_is_bad_input(cli: Cli) -> None:
    Path("file").write_text("")
    assert cli("ca", "issue", "--server", "b1", "--out", "file", status=2).first == (
        "error: expected a directory, but file is not one"
    )
    done = cli("ca", "issue", "--server", "b1", "--out", "file/below", status=2)
    assert done.first == "error: expected a directory, but file is not one"


def test_a_refusal_of_the_ca_writes_nothing(cli: Cli, install: Install) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[no-guest]")
    done = cli("ca", "issue", "--server", "b1", "--guest", "b1", "--out", "out", "--ca", "moody", status=3)
    assert done.first == "error: ca-provider(moody): no guest today"
    assert not Path("out").exists()


def test_certificates_that_are_handed_out_are_not_revoked_at_the_end(cli: Cli, install: Install) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[revokes-badly]")  # which would be a warning
    cli.setenv("FIREBUILD_CA__REVOKE_AT_END", "true")
    assert cli("ca", "issue", "--server", "b1", "--out", "out", "--ca", "moody").err == ""


@pytest.mark.parametrize(
    "command", [["issue", "--server", "b1", "--out", "out"], ["show"], ["revoke", "out/server.pem"]]
)
def test_what_a_provider_waits_for_is_said_on_standard_error(
    cli: Cli, install: Install, command: list[str]
) -> None:
    install_moody(install)
    cli("ca", "issue", "--server", "b1", "--out", "out")
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[waits, busy]")
    done = cli("ca", *command, "--ca", "moody", *(["--force"] if "issue" in command else []), status=3)
    assert done.first == r"ca-provider(moody): no answer of it, trying\x1b[31m for 30 s"
    assert done.out == ""


FILES = [PemFile("one.pem", b"1", 0o644), PemFile("two.pem", b"2", 0o600), PemFile("three.pem", b"3", 0o644)]


def test_a_file_that_appears_meanwhile_is_kept_and_nothing_else_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "two.pem").write_text("mine")
    with pytest.raises(InputError, match=r"two\.pem exists already"):
        write_files(out, FILES, replace=False)
    assert names(out) == ["two.pem"]
    assert (out / "two.pem").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = iter(range(2))

    def fsync(_descriptor: int) -> None:
        if next(syncs, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"out can't be written: No space left on device"):
        write_files(out, FILES, replace=False)
    assert not out.exists()


def test_the_umask_does_not_decide(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_files(tmp_path / "out", FILES, replace=True)
    finally:
        os.umask(before)
    assert (tmp_path / "out/one.pem").stat().st_mode & 0o777 == 0o644
