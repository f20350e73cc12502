"""`firebuild ca show`, `providers` and `vault-setup`: looking without changing."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.plugins import TALKING, install_moody
from pki import conftest
from pki.conftest import Install
from support import Firebuild

install = conftest.install


def test_show_walks_from_the_leaves_to_the_anchors(cli: Cli) -> None:
    lines = cli("ca", "show").out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        *("server", "guest", "issuer", "trust anchor")
    ]
    text = "\n".join(lines)
    assert "  usage      digitalSignature, serverAuth\n" in text
    assert "  usage      digitalSignature, clientAuth\n" in text
    assert "  signed by  itself\n" in text
    assert "  key        EC secp256r1\n" in text
    assert max(map(len, lines)) <= 100


def test_show_uses_the_configured_keys_names_and_times(cli: Cli) -> None:
    config = Path("firebuild.yaml")
    config.write_text(
        "ca:\n  key_type: rsa2048\n  name_suffix: example.org\n  embedded: {intermediate: false}\n"
        "bootstrap: {build_timeout: 5h}\n"
    )
    seen = json.loads(cli("ca", "show", "--config", config, "--json").out)
    assert list(seen) == ["provider", "server", "guest", "issuers", "anchors", "warnings"]
    assert seen["server"]["key"] == "RSA 2048"
    assert seen["server"]["names"][0].endswith(".example.org")
    assert seen["guest"]["names"][0] == f"guest.{seen['server']['names'][0]}"
    assert seen["issuers"] == []
    assert seen["server"]["issuer"] == seen["anchors"][0]["subject"]
    assert list(seen["anchors"][0]) == [
        *("subject", "issuer", "names", "not_before", "not_after"),
        *("serial", "key", "usages", "fingerprint_sha256"),
    ]


@pytest.mark.parametrize(
    ("mood", "warning"), [("revokes", ""), ("revokes-badly", "was not revoked: the list is full")]
)
def test_show_takes_back_what_it_issued(cli: Cli, install: Install, mood: str, warning: str) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", f"[{mood}]")
    done = cli("ca", "show", "--ca", "moody")
    assert done.err.count("warning: the certificate of ") == (2 if warning else 0)
    assert warning in done.err


def test_show_fails_as_a_build_would(cli: Cli, install: Install) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[locked]")
    done = cli("ca", "show", "--ca", "moody", status=3)
    assert done.err == "error: ca-provider(moody): the door is locked (hint: knock)\n"


def test_providers_lists_what_is_installed_and_what_is_wrong_with_it(cli: Cli, install: Install) -> None:
    install("acme-broken", "import nowhere_at_all", name="acme", module="acme_broken")
    for number in "12":
        install(f"twins-{number}", "", name="twin", module=f"twin_{number}")
    out = cli("ca", "providers").out
    assert "\nembedded  firebuild " in out
    assert "(peer, sign, uri-names)\n          a CA in memory, " in out
    assert "acme      acme-broken 1.2 (cannot be used)\n          cannot use the plugin of acme-broken" in out
    assert out.count('          the provider name "twin" is claimed by twins-1 1.2 and twins-2 1.2\n') == 2
    assert "          hint: uninstall all but one\n" in out
    listed = {one["name"]: one for one in json.loads(cli("ca", "providers", "--json").out)}
    assert listed["embedded"]["capabilities"] == ["peer", "sign", "uri-names"]
    assert listed["embedded"]["location"].endswith("embedded.py")
    assert "nowhere_at_all" in listed["acme"]["problem"]


def test_vault_setup_prints_a_script_and_runs_nothing(cli: Cli) -> None:
    config = Path("firebuild.yaml")
    config.write_text(
        "ca:\n  vault:\n    address: https://vault.example:8200\n    mount: builds/pki\n"
        "    server_role: fb-server\n    guest_role: fb-guest\n"
        "    auth: {method: token, token: {env: VAULT_TOKEN_OF_BUILDS}}\n"
    )
    script = cli("ca", "vault-setup", "--print", "--config", config).out
    assert "https://vault.example:8200" in script
    assert "builds/pki/roles/fb-server" in script
    assert script.endswith("\n")


def test_vault_setup_explains_why_it_does_nothing_itself(cli: Cli) -> None:
    done = cli("ca", "vault-setup", status=2)
    assert done.err == (
        "error: firebuild does not change Vault itself: that needs rights that no build should have\n"
        "  hint: `firebuild ca vault-setup --print` prints a script to read, and to run by hand\n"
    )


def test_vault_setup_needs_no_configuration(cli: Cli) -> None:
    script = cli("ca", "vault-setup", "--print").out
    assert "auth enable -path=approle approle" in script
    assert 'address: "https://127.0.0.1:8200"' in script
    cli.setenv("BAO_ADDR", "https://bao.example:8200")
    script = cli("ca", "vault-setup", "--print", "--auth", "jwt", "--mount", "teams/pki").out
    assert "auth enable -path=jwt jwt" in script
    assert 'address: "https://bao.example:8200"\n    mount: teams/pki\n' in script


def test_vault_setup_takes_what_the_environment_sets_as_it_is(cli: Cli) -> None:
    cli.setenv("FIREBUILD_CA__VAULT__AUTH", "{method: token, token: {env: TOKEN_OF_BUILDS}}")
    cli.setenv("FIREBUILD_CA__VAULT__ADDRESS", "https://set.example")
    script = cli("ca", "vault-setup", "--print").out
    assert "https://set.example" in script
    assert '{"method": "token", "token": {"env": "TOKEN_OF_BUILDS"}}' in script


def test_vault_setup_with_a_configuration_wants_it_whole(cli: Cli) -> None:
    config = Path("firebuild.yaml")
    config.write_text("ca: {vault: {mount: pki}}\n")
    done = cli("ca", "vault-setup", "--print", "--config", config, status=2)
    assert "ca.vault.address: this setting is required" in done.err
    done = cli("ca", "vault-setup", "--print", "--address", "http://vault.example", status=2)
    assert "expected https, found plain http" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ca", "providers", "--json"), ("import", "hook")),
        (("ca", "check", "--ca", "talking", "--json"), ("import", "hook", "open", "sign")),
        (("config", "show"), ("import", "hook")),
        (("doctor", "--json"), ("import", "hook", "open", "sign")),
        (
            ("build", "-q", "--no-cache", "--ca", "talking", "-o", "tar,dest=-", "."),
            ("import", "hook", "open", "sign"),
        ),
    ],
)
@pytest.mark.needs("userns", "busybox")
def test_what_a_plugin_prints_goes_to_standard_error(
    arguments: tuple[str, ...], said: tuple[str, ...], install: Install, tmp_path: Path
) -> None:
    site = install("acme-talking", TALKING, name="talking", module="acme_talking")
    firebuild = Firebuild(tmp_path / "home")
    environ = {**firebuild.environ, "PYTHONPATH": str(site), "FIREBUILD_CA__PROVIDER": "talking"}
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/sh").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/sh").chmod(0o755)
    firebuild("base", "import", "tiny", str(root))
    (root / "Dockerfile").write_text("FROM tiny\nRUN echo made > /made\n")
    done = subprocess.run(
        [firebuild.program, *arguments], env=environ, cwd=root, capture_output=True, timeout=100, check=False
    )
    if "build" in arguments:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            assert "made" in archive.getnames()
    elif "show" in arguments:
        assert done.stdout.startswith(b"#") or b"provider: talking" in done.stdout
    else:
        json.loads(done.stdout)
    for way in ("print", "buffer", "descriptor", "program"):
        assert f"{way} {said[0]}\n".encode() not in done.stdout
        for when in said:
            assert f"{way} {when}\n".encode() in done.stderr
