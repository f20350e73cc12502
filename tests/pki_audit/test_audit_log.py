"""The audit log: one line of JSON for each event, whatever happens around it."""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from firebuild_pki import (
    CAError,
    CAEvent,
    CASettings,
    EventKind,
    MaterialError,
    PluginCatalog,
    Profile,
    SettingsError,
    open_authority,
    parse_document,
    validate,
)
from firebuild_pki.observers.audit_log import MAX_REASON, AuditLogSettings, append, line_of
from pki.tools import NOW, Clock, ca_settings, entry, leaf_of
from support import said_without_home

EVENT = CAEvent(EventKind.REFUSED, NOW, "vault", "b", Profile.GUEST, ("guest.b.x",), reason="no")
ME = pwd.getpwuid(os.geteuid()).pw_name


def catalog() -> PluginCatalog:
    observers = [entry("audit-log", "firebuild_pki.observers.audit_log", "firebuild_pki.observers")]
    providers = [
        entry("embedded", "firebuild_pki.providers.embedded"),
        entry("revoker", "pki.characters:revoker"),
    ]
    return PluginCatalog(providers=providers, observers=observers)


def watched(path: object, provider: str = "embedded", **more: Any) -> Any:
    section = {"provider": provider, "observers": ["audit-log"], "audit-log": {"path": str(path)}, **more}
    return open_authority(ca_settings(section, catalog()), build_id="b", clock=Clock())


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_the_life_of_a_build_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with watched(path, "revoker") as authority:
        server = authority.issue_server()
        authority.revoke(server)
        with pytest.raises(MaterialError) as refused:
            authority.issue_guest(build_deadline=NOW + timedelta(days=365))
        assert authority.warnings == ()
    issued, revoked, refusal, closed = lines(path)
    common = {
        "format": 1,
        "time": "2030-05-17T12:00:00.000Z",
        "build_id": "b",
        "provider": "revoker",
        "user": ME,
        "host": socket.gethostname(),
        "labels": {},
    }
    nothing = dict.fromkeys(
        ("serial", "fingerprint_sha256", "not_before", "not_after", "signature_algorithm")
    )
    certificate = {
        "profile": "server",
        "names": ["b.firebuild.internal"],
        "serial": f"{leaf_of(server).serial_number:x}",
        "fingerprint_sha256": server.fingerprint_sha256,
        "not_before": "2030-05-17T11:55:00.000Z",
        "not_after": "2030-05-17T13:00:00.000Z",
        "reason": None,
        "signature_algorithm": "ECDSA with SHA-256",
    }
    assert issued == {**common, "kind": "issued", **certificate}
    assert revoked == {**common, "kind": "revoked", **certificate}
    guest = {"profile": "guest", "names": ["guest.b.firebuild.internal"], "reason": refused.value.message}
    assert refusal == {**common, "kind": "refused", **nothing, **guest}
    assert closed == {**common, "kind": "closed", **nothing, "profile": None, "names": [], "reason": None}


def test_no_key_is_ever_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with watched(path) as authority:
        materials = [authority.issue_server(), authority.issue_guest()]
    text = path.read_text()
    assert "PRIVATE" not in text
    for material in materials:
        for line in material.private_key_pem.decode().splitlines()[1:-1]:
            assert line not in text


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_settings_that_are_spelled_in_two_ways_are_not_chosen_from() -> None:
    text = "ca:\n  observers: [audit-log]\n  audit_log: {path: a}\n  audit-log: {path: b}\n"
    words = r"c\.yaml:4:3: ca\.audit-log: the settings of audit-log are here twice, also as audit_log"
    with pytest.raises(SettingsError, match=words):
        validate(CASettings, parse_document(text, source="c.yaml"), "ca")


def test_a_log_in_the_home_of_nobody_is_an_error() -> None:
    with pytest.raises(CAError, match="no home directory is known for ~nobody-here"):
        _ = AuditLogSettings(path="~nobody-here/log").file


@pytest.mark.needs("root")
def test_a_log_of_a_user_without_a_home_has_no_place() -> None:
    imports = "import platformdirs\nfrom firebuild_pki.observers.audit_log import AuditLogSettings"
    said = said_without_home(imports, "AuditLogSettings().file")
    assert "there is no directory for the audit log: this user has no home directory" in said


def test_the_log_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "newer" / "audit.jsonl"
    append(path, b"{}\n")
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text("earlier\n")
    path.chmod(0o640)
    append(path, b"{}\n")
    assert path.read_text() == "earlier\n{}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_log_may_be_rotated_in_the_middle_of_a_build(tmp_path: Path) -> None:
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    with watched(path) as authority:
        authority.issue_server()
        path.rename(old)
        authority.issue_guest()
    assert [one["profile"] for one in lines(old)] == ["server"]
    assert [one["kind"] for one in lines(path)] == ["issued", "closed"]


def test_lines_of_parallel_builds_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    program = """
import sys
from pathlib import Path
from firebuild_pki.observers.audit_log import append
for _ in range(200):
    append(Path(sys.argv[1]), (sys.argv[2] * 6000 + "\\n").encode())
"""
    running = [subprocess.Popen([sys.executable, "-c", program, path, letter]) for letter in "abc"]
    assert [one.wait() for one in running] == [0, 0, 0]
    found = path.read_text().splitlines()
    assert sorted(found) == [letter * 6000 for letter in "abc" for _ in range(200)]


def test_neither_names_nor_reasons_break_a_line(tmp_path: Path) -> None:
    nasty = 'a\nb\r\x1b[2J\x00\x7f\x85\u2028"\\\udcff'
    line = line_of(replace(EVENT, names=(nasty,), reason=nasty))
    assert line.count(b"\n") == 1
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    found = json.loads(line)
    assert (found["names"], found["reason"]) == ([nasty], nasty)


def test_a_reason_has_a_limit() -> None:
    found = json.loads(line_of(replace(EVENT, reason="x" * (MAX_REASON + 1))))
    assert found["reason"] == "x" * MAX_REASON


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert json.loads(line_of(EVENT))["user"] == str(os.geteuid())


def a_directory(path: Path) -> Path:
    path.mkdir()
    return path


def below_a_file(path: Path) -> Path:
    path.write_text("")
    return path / "audit.jsonl"


def a_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def a_link(path: Path) -> Path:
    path.with_name("target").write_text("")
    path.symlink_to("target")
    return path


def a_full_disk(path: Path) -> Path:
    return Path("/dev/full")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (a_directory, "Is a directory (hint: look at ca.audit-log.path)"),
        (below_a_file, "Not a directory (hint: look at ca.audit-log.path)"),
        (a_pipe, "expected a file (hint: look at ca.audit-log.path)"),
        (
            a_link,
            "it is a symbolic link (hint: name the file that it leads to in ca.audit-log.path)",
        ),
        (a_full_disk, "No space left on device (hint: look at ca.audit-log.path)"),
    ],
)
def test_a_log_that_cannot_be_written_is_a_warning_and_the_build_goes_on(
    tmp_path: Path, obstacle: Callable[[Path], Path], reason: str
) -> None:
    path = obstacle(tmp_path / "audit.jsonl")
    with watched(path) as authority:
        assert authority.issue_server()
        assert authority.issue_guest()
    words = f"cannot write the audit log {path}: {reason}"
    assert authority.warnings == (
        f'the observer "audit-log" failed on "issued": {words}',
        f'the observer "audit-log" failed on "closed": {words}',
    )
    if obstacle is a_link:
        assert (tmp_path / "target").read_text() == ""


@pytest.mark.needs("tester")
def test_a_log_in_a_directory_of_somebody_else_is_a_warning(tmp_path: Path) -> None:
    # root may write everywhere, so this runs as somebody else
    program = f"""
import os
os.setuid({pwd.getpwnam("tester").pw_uid})
from firebuild_pki.errors import CAError
from firebuild_pki.observers.audit_log import append
from pathlib import Path
try:
    append(Path("/etc/ca-audit.jsonl"), b"")
except CAError as error:
    print(error)
"""
    program = program.replace("\nos.setuid", "\nimport firebuild_pki.observers.audit_log\nos.setuid")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write the audit log /etc/ca-audit.jsonl: Permission denied")


def test_links_on_the_way_to_the_log_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "log").symlink_to("disk")
    append(tmp_path / "log" / "audit.jsonl", b"{}\n")
    assert (tmp_path / "disk" / "audit.jsonl").read_text() == "{}\n"


def test_after_a_line_that_was_cut_off_the_next_one_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    program = """
import resource, sys
from pathlib import Path
from firebuild_pki import CAError
from firebuild_pki.observers.audit_log import append
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    append(Path(sys.argv[1]), b"0123456789ABC\\n")
except CAError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert f"cannot write the audit log {path}: No space left on device" in done.stdout
    append(path, b"{}\n")
    assert path.read_text() == "0123456789\n{}\n"


def test_without_a_path_the_log_is_in_the_users_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert AuditLogSettings().file == Path("/somewhere/firebuild/ca-audit.jsonl")


def test_the_path_may_begin_with_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert AuditLogSettings(path="~/audit.jsonl").file == Path("/home/somebody/audit.jsonl")


def test_an_unknown_setting_is_an_error_with_its_path() -> None:
    section = {"observers": ["audit-log"], "audit-log": {"pth": "/tmp/x"}}
    with pytest.raises(SettingsError) as caught:
        ca_settings(section, catalog())
    assert [problem.path for problem in caught.value.problems] == ["ca.audit-log.pth"]


def test_an_error_says_which_file_and_keeps_its_cause(tmp_path: Path) -> None:
    with pytest.raises(CAError) as caught:
        append(tmp_path, b"")
    assert isinstance(caught.value.__cause__, IsADirectoryError)
