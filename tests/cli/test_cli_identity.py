"""`firebuild run --identity` on the driver local."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from cli.conftest import Cli
from firebuild_bootstrap import identities
from firebuild_bootstrap.identities import MachineIdentity
from firebuild_bootstrap.machine.base import GuestOptions
from firebuild_bootstrap.machine.local import LocalMachine
from firebuild_bootstrap.sandbox.process import SandboxProcess, _first_child
from support import BIN, REPO

pytestmark = pytest.mark.needs("userns")

PAGE = (REPO / "docs/identity.md").read_text()
TLS = "/run/firebuild/tls"
NAMES = ("--identity", "web.example", "--identity", "spiffe://example.org/web")
# Until the files are other ones; then it says so by its exit status.
RENEWED = f"""
trap heard=yes HUP; cd {TLS}; first=$(readlink ..data); cat $first/cert.pem ca.pem
until test $heard && test $(readlink ..data) != $first; do sleep 0.05; done
cat cert.pem ca.pem; exit 5
"""


def certificates(text: str) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(text.encode())


@pytest.mark.parametrize("key", ["host", "machine"])
def test_a_machine_is_renewed_while_its_command_runs(host_cli: Cli, key: str) -> None:
    given = ("--identity-ttl", "1s", "--identity-signal", "hup", "--identity-key", key)
    out = host_cli("run", *NAMES, *given, "host", "/bin/sh", "-c", RENEWED, status=5).out
    first, root, second, again = certificates(out)
    assert root == again
    assert first.public_key() != second.public_key()
    for leaf in (first, second):
        verifier = PolicyBuilder().store(Store([root])).time(leaf.not_valid_after_utc).build_client_verifier()
        names = verifier.verify(leaf, []).subjects or []
        assert [name.value for name in names] == ["web.example", "spiffe://example.org/web"]
    assert host_cli.leftovers() == []


@pytest.mark.parametrize("key", ["host", "machine"])
def test_renewals_that_overtake_a_machine_that_stands_still_end_nothing(
    host_cli: Cli, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """vminit is stopped at the first renewal, and goes on when the eighth certificate is there."""
    renew, start = MachineIdentity._renew, LocalMachine.start
    numbers: list[int] = []
    sandboxes: list[SandboxProcess] = []

    def started(machine: LocalMachine, *options: GuestOptions) -> None:
        start(machine, *options)
        assert machine._process is not None
        sandboxes.append(machine._process)

    def renewed(identity: MachineIdentity) -> None:
        numbers.append(identity._number + 1)
        vminit = _first_child(sandboxes[0]._init_pid)
        assert vminit is not None
        if numbers == [2]:
            os.kill(vminit, signal.SIGSTOP)
        elif len(numbers) == 7:
            monkeypatch.setattr(identities, "_ANSWER", timedelta(minutes=5))
        renew(identity)
        if len(numbers) == 7:
            os.kill(vminit, signal.SIGCONT)

    monkeypatch.setattr(LocalMachine, "start", started)
    monkeypatch.setattr(MachineIdentity, "_renew", renewed)
    monkeypatch.setattr(identities, "_ANSWER", timedelta(seconds=0.1))
    monkeypatch.setattr(identities, "_LONGEST_PAUSE", timedelta(seconds=0.1))
    monkeypatch.setattr(identities, "_SHORTEST_PAUSE", timedelta(seconds=0.1))
    host_cli.setenv("FIREBUILD_BOOTSTRAP__PING_INTERVAL", "60s")  # or it could be taken for dead
    wait = f"cd {TLS}; until test $(readlink ..data | tr -d .) -ge 8; do sleep 0.05; done; cat cert.pem"
    given = ("--identity-ttl", "5s", "--identity-key", key, "--identity-command", "/bin/true")
    done = host_cli("run", *NAMES, *given, "host", "/bin/sh", "-c", wait)
    assert numbers[:7] == [2, 3, 4, 5, 6, 7, 8]
    assert len(certificates(done.out)) == 1
    assert done.err.count("the machine has not taken it") == 6


@pytest.mark.needs("ids")
def test_a_command_is_executed_beside_the_other_and_its_failure_is_a_warning(host_cli: Cli) -> None:
    wait = "until test -e /tmp/told; do sleep 0.05; done; cat /tmp/told; sleep 0.3"
    tell = (
        "/bin/sh -c 'echo $LEVEL $$ $(id -u) $(ls /proc | grep -c ^[0-9]) > /tmp/told; echo no >&2; exit 4'"
    )
    given = ("--identity-ttl", "1s", "--identity-command", tell, "-e", "LEVEL=debug", "--user", "1")
    done = host_cli("run", *NAMES, *given, "host", "/bin/sh", "-c", wait)
    level, number, user, processes = done.out.split()
    assert (level, user) == ("debug", "1")
    # Among the processes of the command, not in a world of its own.
    assert int(number) > 2
    assert int(processes) >= 3
    assert "warning: /bin/sh (--identity-command) ended with status 4: no" in done.err


def test_two_machines_of_one_store_trust_each_other_and_those_of_another_store_do_not(
    host_cli: Cli, tmp_path: Path
) -> None:
    ask = ("--identity", "web.example", "host", "cat", f"{TLS}/ca.pem", f"{TLS}/key.pem")
    one, two = host_cli("run", *ask).out, host_cli("run", *ask).out
    assert certificates(one) == certificates(two)
    assert one != two  # the keys
    kept = host_cli.home / "identities"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert stat.S_IMODE((kept / "ca.pem").stat().st_mode) == 0o600
    shutil.rmtree(kept)
    assert certificates(host_cli("run", *ask).out) != certificates(one)


@pytest.mark.needs("ids")
def test_the_files_have_the_owner_and_the_mode_that_were_asked_for(host_cli: Cli) -> None:
    look = ("host", "/bin/sh", "-c", f"cd {TLS}; stat -Lc '%u:%g %a %n' key.pem ca.pem; touch new")
    own = host_cli("run", "--user", "1", *NAMES, *look, status=1)
    assert own.out == "1:1 400 key.pem\n1:1 444 ca.pem\n"
    assert "Read-only file system" in own.err
    given = ("--identity-owner", "2:3", "--identity-mode", "0640", "--read-only")
    assert host_cli("run", *NAMES, *given, *look, status=1).out == "2:3 640 key.pem\n2:3 444 ca.pem\n"
    assert host_cli("run", "host", "/bin/sh", "-c", f"test ! -e {TLS}").out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--identity-mode", "0440"), "error: --identity-mode: the machine has no identity"),
        ((*NAMES, "--identity-mode", "rw"), "error: --identity-mode: expected three octal digits"),
        ((*NAMES, "--identity-signal", "HOP"), "error: --identity-signal: 'HOP' is not a signal"),
        ((*NAMES, "--identity-signal", "99"), "error: --identity-signal: '99' is not a signal"),
        ((*NAMES, "--identity-signal", "9"), "error: --identity-signal: no command can have a handler for"),
        ((*NAMES, "--identity-command", "a 'b"), "error: --identity-command: No closing quotation"),
        ((*NAMES, "--identity-command", ""), "error: --identity-command: it is empty"),
        ((*NAMES, "--identity-ttl", "soon"), "error: --identity-ttl: expected a duration"),
        ((*NAMES, "--identity-owner", "x"), "error: --identity-owner x: /etc/passwd of the image has no"),
        (("--identity", "Not A Name"), "error: --identity: expected a DNS name"),
        (("--identity", "a.firebuild.internal"), "error: --identity a.firebuild.internal: the names below"),
        ((*NAMES, *NAMES), 'error: --identity: the name "web.example" is there twice'),
    ],
)
def test_what_can_not_be_is_said_in_words(host_cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    assert host_cli("run", *arguments, "host", "/bin/true", status=125).first.startswith(message)


def test_a_provider_that_can_not_sign_for_a_machine_says_what_to_do(host_cli: Cli) -> None:
    host_cli("ca", "issue", "--server", "pair.example", "--guest", "pair.example", "--out", "pair")
    Path("config.yaml").write_text(
        "ca:\n  provider: file\n  file:\n    ca_cert: pair/ca.pem\n"
        "    server_cert: pair/server.pem\n    server_key: pair/server-key.pem\n"
        "    client_cert: pair/guest.pem\n    client_key: pair/guest-key.pem\n"
    )
    done = host_cli("run", "--config", "config.yaml", *NAMES, "host", "/bin/true", status=125)
    assert "choose another provider" in done.err


def test_the_page_names_every_option() -> None:
    done = subprocess.run([BIN / "firebuild", "run", "--help"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"--identity[a-z-]*", done.stdout)) <= set(re.findall(r"--identity[a-z-]*", PAGE))
