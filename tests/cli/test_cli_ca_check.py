"""`firebuild ca check`: what it prints, and what it exits with."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from fcntl import ioctl
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.plugins import install_moody
from firebuild_bootstrap.polling import readable
from pki import conftest
from pki.conftest import Install
from support import BIN, REPO

install = conftest.install


@pytest.fixture
def config(install: Install) -> Path:
    """A configuration with the moody provider; `moods` writes it again."""
    install_moody(install)
    file = Path("firebuild.yaml").absolute()
    return moods(file)


def moods(file: Path, *names: str, more: str = "") -> Path:
    file.write_text(f"ca:\n  provider: moody\n  moody:\n    moods: [{', '.join(names)}]\n{more}")
    return file


def test_a_good_authority_ends_with_zero(cli: Cli) -> None:
    lines = cli("ca", "check").out.splitlines()
    assert lines[0].startswith("ok    plugin         embedded of firebuild ")
    assert lines[-3:] == [
        "skip  revocation     this provider cannot revoke; the certificates expire by themselves",
        "",
        lines[-1],
    ]
    assert re.fullmatch(r"ready: a build gets what it needs \(\d+\.\d s\)", lines[-1])
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("mebibytes", [250, 600])
def test_few_addresses_are_said_in_words_where_grpc_would_abort(mebibytes: int) -> None:
    limited = [
        "sh",
        "-c",
        f'ulimit -v {mebibytes << 10}; exec "$@"',
        "sh",
        str(BIN / "firebuild"),
        "ca",
        "check",
    ]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=60)
    said = " ".join(done.stdout.split())
    assert done.returncode == 3
    assert (
        f"FAIL handshake the limit of this process's address space (ulimit -v) is {mebibytes} MiB, "
        "and gRPC needs 1024 MiB hint: raise the limit" in said
    )


def test_the_certificates_have_to_last_as_long_as_the_configured_build(cli: Cli) -> None:
    cli.setenv("FIREBUILD_BOOTSTRAP__BUILD_TIMEOUT", "5h")
    assert cli("ca", "check").out.splitlines()[-1].startswith("ready")
    cli.setenv("FIREBUILD_CA__EMBEDDED__LEAF_LIFETIME", "5h8m")
    assert "the CA capped the lifetime of the server certificate" in cli("ca", "check").out
    cli.setenv("FIREBUILD_CA__EMBEDDED__LEAF_LIFETIME", "5h30s")  # the guest's first call takes its time
    done = cli("ca", "check", status=3)
    assert "FAIL  issue server" in done.out
    assert "hint: shorten the build's timeout, or let the CA issue for longer" in done.out


def test_the_option_beats_the_file(cli: Cli, config: Path) -> None:
    assert "moody of acme-moody 1.2: a CA with moods" in cli("ca", "check", "--config", config).out
    assert "embedded of firebuild" in cli("ca", "check", "--config", config, "--ca", "embedded").out


def test_warnings_do_not_stop_a_build_unless_they_shall(cli: Cli, config: Path) -> None:
    moods(config, "many")
    done = cli("ca", "check", "--config", config)
    assert f"warn  settings       {config}:4:12: ca.moody.moods: that is many moods" in " ".join(
        done.out.split("\n")[1:3]
    ).replace("                     ", "")
    assert "\n                       hint: have fewer\n" in done.out
    assert "ready: a build gets what it needs (1 warning, " in done.out
    cli("ca", "check", "--config", config, "--strict", status=3)


@pytest.mark.parametrize(
    ("names", "status", "row", "verdict"),
    [
        (["wrong-settings"], 2, "FAIL  settings       ", "not ready: the configuration is wrong"),
        (["locked"], 3, "FAIL  open           the door is locked\n", "no usable certificates"),
        (["no-role"], 3, "FAIL  role           role: no such role\n", "no usable certificates"),
        (["no-guest"], 3, "FAIL  issue guest    no guest today\n", "no usable certificates"),
        (["slams"], 0, "warn  close          closing the provider failed: ", "(1 warning, "),
    ],
)
def test_the_status_tells_whose_fault_it_is(
    cli: Cli, config: Path, names: list[str], status: int, row: str, verdict: str
) -> None:
    done = cli("ca", "check", "--config", moods(config, *names), status=status)
    assert row in done.out
    assert verdict in done.out.splitlines()[-1]
    assert done.err == ""


def test_a_broken_configuration_is_a_report_as_well(cli: Cli, config: Path) -> None:
    config.write_text("ca:\n  provider: valut\nbootstrap:\n  bind: 8.8.8.8\n")
    done = cli("ca", "check", "--config", config, status=2)
    assert done.out.count("FAIL  settings") == 2
    assert ":2:13: ca.provider: no installed provider is" in " ".join(done.out.split())
    report = json.loads(cli("ca", "check", "--json", "--config", config, status=2).out)
    assert (report["verdict"], report["rows"][0]["step"]) == ("settings", "settings")
    assert report["rows"][0]["message"].startswith(f"{config}:2:13: ca.provider: ")
    assert report["rows"][0]["hint"] == 'did you mean "vault"?'


def test_a_plugin_that_cannot_be_imported_is_a_report_as_well(cli: Cli, install: Install) -> None:
    install("acme-broken", "import nowhere_at_all", name="acme", module="acme_broken")
    done = cli("ca", "check", "--ca", "acme", status=3)
    assert "FAIL  plugin         cannot use the plugin of acme-broken 1.2: importing acme_broken" in done.out
    assert "skip  settings       needs: plugin" in done.out


def test_the_document_is_the_whole_output(cli: Cli, config: Path) -> None:
    done = cli("ca", "check", "--json", "--config", moods(config, "no-role"), status=3)
    report = json.loads(done.out)
    assert (report["provider"], report["verdict"]) == ("moody", "authority")
    [role] = [row for row in report["rows"] if row["about"] == "role"]
    assert role == {
        "about": "role",
        "level": "fatal",
        "message": "role: no such role",
        "hint": "write it",
        "seconds": None,
        "step": "backend",
    }


def test_what_a_backend_says_cannot_steer_the_terminal(cli: Cli, config: Path) -> None:
    done = cli("ca", "check", "--config", moods(config, "tired"))
    assert "\x1b" not in done.out
    assert "warn  backend        tired\\x1b[31m and old\n" in done.out


def test_secrets_are_never_shown(cli: Cli, config: Path) -> None:
    cli.setenv("MOODY_PASSWORD", "hunter2")
    moods(config, "no-server", more="    password: {env: MOODY_PASSWORD}\n")
    for arguments in ([], ["--json"]):
        done = cli("ca", "check", "--config", config, *arguments, status=3)
        assert "hunter2" not in done.out + done.err
        assert "PRIVATE KEY" not in done.out + done.err


def test_slow_steps_say_how_long_they_took(cli: Cli, config: Path) -> None:
    moods(config, "hangs", more="  call_timeout: 600ms\n")
    done = cli("ca", "check", "--config", config, status=3)
    assert re.search(r"FAIL  backend        the check did not end within 0\.6 s \(\d+\.\d s\)\n", done.out)


def on_terminal(arguments: list[str], *, columns: int, environ: Mapping[str, str]) -> str:
    """Run the command on a terminal of its own and return what it wrote there."""
    user, program = pty.openpty()
    ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        [BIN / "firebuild", *arguments],
        stdin=program,
        stdout=program,
        stderr=program,
        env={**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, **environ},
    ):
        os.close(program)
        shown = b""
        while True:
            try:
                shown += os.read(user, 65536)
            except OSError:
                break
    os.close(user)
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours(cli: Cli) -> None:
    shown = on_terminal(["ca", "check"], columns=120, environ={"TERM": "xterm"})
    assert "\x1b[32mok\x1b[0m    plugin         embedded" in shown
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in shown.splitlines()) <= 100


@pytest.mark.parametrize("environ", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_declined(cli: Cli, environ: Mapping[str, str]) -> None:
    shown = on_terminal(["ca", "check"], columns=120, environ=environ)
    assert "ok    plugin         embedded" in shown
    assert "\x1b" not in shown


def test_on_a_narrow_terminal_the_texts_are_below_their_heads(cli: Cli) -> None:
    shown = on_terminal(["ca", "check", "--ca", "file"], columns=48, environ={"NO_COLOR": "1"})
    assert "ok    plugin\n    file of firebuild " in shown
    assert "FAIL  settings\n    command line: ca.file.ca_cert: missing\n      hint: " in shown
    assert max(map(len, shown.splitlines())) <= 48


def test_an_interruption_ends_the_wait_for_a_backend(cli: Cli, config: Path, tmp_path: Path) -> None:
    moods(config, "hangs")
    path = os.pathsep.join([str(tmp_path / "acme-moody"), str(REPO / "tests")])
    with subprocess.Popen(
        [BIN / "firebuild", "ca", "check", "--config", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        shown = b""
        while b"open" not in shown:
            assert readable(process.stdout, seconds=60)
            shown += os.read(process.stdout.fileno(), 4096)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"error: the check was interrupted (SIGINT)\n"
    assert time.monotonic() - began < 40  # not the minute that a call may take
