from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.sandbox import Host, IdMap, IdMode, IdRange, detect
from firebuild_bootstrap.sandbox.bwrap import remedy
from firebuild_bootstrap.sandbox.idmap import candidates

BWRAP = Path("/usr/bin/bwrap")


def make_host(tmp_path: Path, uid: int = 1000, *, tools: bool = True) -> Host:
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("newuidmap", "newgidmap") if tools else ():
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    (tmp_path / "sysctl").mkdir(exist_ok=True)
    (tmp_path / "status").write_text("Name:\tpython\nNoNewPrivs:\t0\nSeccomp:\t0\n")
    (tmp_path / "uid_map").write_text("         0          0 4294967295\n")
    (tmp_path / "subuid").write_text("other:1:1\n# a comment\nme:100000:65536\nme:300000:10\n1000:9:x\n")
    (tmp_path / "subgid").write_text("me:200000:65536\n")
    return Host(
        uid=uid,
        gid=uid,
        user="me",
        path=str(programs),
        subuid=tmp_path / "subuid",
        subgid=tmp_path / "subgid",
        uid_map=tmp_path / "uid_map",
        gid_map=tmp_path / "uid_map",
        status=tmp_path / "status",
        sysctl=tmp_path / "sysctl",
        container_marks=(tmp_path / "dockerenv",),
    )


class NoPrograms(Host):
    def program(self, name: str) -> str | None:
        return None


def test_root_has_every_id_of_its_own_namespace(tmp_path: Path) -> None:
    [idmap] = candidates(make_host(tmp_path, uid=0))
    assert idmap.mode is IdMode.FULL
    assert idmap.uids == (IdRange(0, 0, 4294967295),)
    assert idmap.note == ""


def test_root_of_a_container_with_some_ids_maps_just_those(tmp_path: Path) -> None:
    host = make_host(tmp_path, uid=0)
    host.uid_map.write_text("0 1000 1\n1 100000 65536\n")
    [idmap] = candidates(host)
    assert idmap.uids == (IdRange(0, 0, 1), IdRange(1, 1, 65536))


def test_root_of_a_container_with_one_id_gets_one_and_a_note(tmp_path: Path) -> None:
    host = make_host(tmp_path, uid=0)
    host.uid_map.write_text("0 1000 1\n")
    [idmap] = candidates(host)
    assert idmap.mode is IdMode.SINGLE
    assert "maps one user id only" in idmap.note


def test_a_user_with_subordinate_ids_is_root_inside_and_owns_the_ranges_from_one_on(tmp_path: Path) -> None:
    best, last = candidates(make_host(tmp_path))
    assert best.mode is IdMode.SUBIDS
    assert best.uids == (IdRange(0, 1000, 1), IdRange(1, 100000, 65536), IdRange(65537, 300000, 10))
    assert best.gids == (IdRange(0, 1000, 1), IdRange(1, 200000, 65536))
    assert last.mode is IdMode.SINGLE
    assert "newuidmap refused" in last.note


def test_a_user_without_newuidmap_is_told_to_install_it(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    lonely = NoPrograms(**{name: getattr(host, name) for name in host.__dataclass_fields__})
    [idmap] = candidates(lonely)
    assert idmap.mode is IdMode.SINGLE
    assert "chown to other users needs subordinate ids (install uidmap), or run as root" in idmap.note
    host.subgid.unlink()
    [idmap] = candidates(lonely)
    assert f"(install uidmap and add the line me:100000:65536 to {host.subgid})" in idmap.note


@pytest.mark.parametrize("gone", [True, False])
def test_a_user_without_entries_is_told_which_line_to_add(tmp_path: Path, gone: bool) -> None:
    host = make_host(tmp_path)
    if gone:
        host.subgid.unlink()
    else:
        host.subgid.write_text("other:1:1\n")
    [idmap] = candidates(host)
    assert f"add the line me:100000:65536 to {host.subgid})" in idmap.note


def test_the_line_to_add_has_ids_that_no_other_user_has(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    host.subuid.write_text("a:100000:65536\nb:300000:65536\nodd:x:1\nc:165536:1\n")
    host.subgid.write_text("a:100000:65536\nd:170000:100\n")
    [idmap] = candidates(host)
    assert f"add the line me:170100:65536 to {host.subuid} and {host.subgid})" in idmap.note
    host.subgid.write_text("a:100000:65536\nd:170100:70000\n")
    [idmap] = candidates(host)
    assert "add the line me:365536:65536 to" in idmap.note


def test_an_unreadable_file_of_subordinate_ids_is_an_error_that_names_it(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    host.subuid.unlink()
    host.subuid.mkdir()
    with pytest.raises(MachineError, match="subuid: Is a directory"):
        candidates(host)


def test_a_map_survives_the_trip_to_another_process(tmp_path: Path) -> None:
    for idmap in candidates(make_host(tmp_path)):
        assert IdMap.from_json(json.loads(json.dumps(idmap.as_json()))) == idmap


def test_the_current_host_is_this_process() -> None:
    host = Host.current()
    assert (host.uid, host.gid) == (os.geteuid(), os.getegid())
    assert host.program("sh")


def test_no_more_ranges_are_used_than_one_map_can_have(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    host.subuid.write_text("".join(f"me:{number}:1\n" for number in range(100_000, 101_000)))
    host.subgid.write_text("".join(f"me:{number}:1000\n" for number in range(100_000, 900_000, 1000)))
    [best, _] = candidates(host)
    lines = ["".join(entry.line for entry in ranges) for ranges in (best.uids, best.gids)]
    assert all(4000 < len(text) < 4096 and text.count("\n") <= 340 for text in lines)  # user_namespaces(7)


def test_other_encodings_in_the_file_of_subordinate_ids_are_none_of_our_business(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    host.subuid.write_bytes(b"# f\xfcr alle\nj\xf6rg:1:1\nme:100000:10\n")
    assert candidates(host)[0].uids == (IdRange(0, 1000, 1), IdRange(1, 100000, 10))


def test_a_service_without_new_privileges_is_told_that_it_has_none(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    assert "is it setuid root" in candidates(host)[-1].note
    host.status.write_text("Name:\tpython\nNoNewPrivs:\t1\nSeccomp:\t0\n")
    assert "NoNewPrivileges= of its service" in candidates(host)[-1].note
    host.status.unlink()
    assert "is it setuid root" in candidates(host)[-1].note


@pytest.mark.root
@pytest.mark.needs("root")
def test_a_proc_that_shows_others_or_nothing_is_an_error_before_a_sandbox_is_tried() -> None:
    ask = "from firebuild_bootstrap.sandbox.bwrap import expected; expected()"
    command = [sys.executable, "-c", f"try:\n {ask}\nexcept Exception as error: print(error)"]
    where = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def said(*unshare: str) -> str:
        return subprocess.run(
            ["unshare", *unshare, *command], env=where, check=True, capture_output=True, text=True
        ).stdout

    assert said("--pid", "--fork", "--mount-proc") == ""
    elsewhere = said("--pid", "--fork")
    assert elsewhere.startswith("/proc is of another PID namespace, so the processes of a sandbox can't be")
    assert "unshare --mount-proc" in elsewhere
    without = said("--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh")
    assert without.startswith("/proc is not mounted")


def test_a_user_without_a_name_is_called_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242424)
    assert Host.current().user == "4242424"


@pytest.mark.needs("userns")
def test_what_is_detected_works_and_is_the_best_for_root() -> None:
    idmap = detect()
    assert idmap.mode is (IdMode.FULL if os.geteuid() == 0 else idmap.mode)


def test_a_host_without_any_sandbox_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo bubblewrap 0.11.0 && exit\n'
        "echo 'bwrap: No permissions to create new namespace' >&2; exit 1\n"
    )
    broken.chmod(0o755)
    host = make_host(tmp_path)
    sysctl = host.sysctl / "kernel/unprivileged_userns_clone"
    sysctl.parent.mkdir(parents=True)
    sysctl.write_text("0\n")
    with pytest.raises(MachineError, match="No permissions to create new namespace") as caught:
        detect(host, bwrap=broken)
    assert caught.value.hint is not None
    assert "sysctl -w kernel.unprivileged_userns_clone=1" in caught.value.hint


@pytest.mark.needs("userns")
def test_a_range_that_newuidmap_refuses_leads_to_one_id_and_says_why(tmp_path: Path) -> None:
    stranger = replace(make_host(tmp_path), uid=99_999_999, gid=99_999_999)
    idmap = detect(stranger)
    assert idmap.mode is IdMode.SINGLE
    assert "newuidmap refused the range of me" in idmap.note
    assert "newuidmap failed: " in idmap.note


@pytest.mark.parametrize(
    ("sysctl", "value", "expected"),
    [
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", f"give {BWRAP} a profile"),
    ],
)
def test_each_cause_has_its_own_remedy(tmp_path: Path, sysctl: str, value: str, expected: str) -> None:
    host = make_host(tmp_path)
    path = host.sysctl / sysctl
    path.parent.mkdir(parents=True)
    path.write_text(value + "\n")
    assert expected in remedy(host, BWRAP)


def test_inside_a_container_the_remedy_is_how_to_start_it(tmp_path: Path) -> None:
    host = make_host(tmp_path, uid=0)
    host.container_marks[0].touch()
    assert "--security-opt seccomp=unconfined" in remedy(host, BWRAP)


@pytest.mark.parametrize(
    ("points", "hidden"),
    [
        (("/", "/proc", "/proc/sys/fs/binfmt_misc"), False),
        (("/", "/proc", "/proc/kcore"), True),
    ],
)
def test_a_container_that_hides_parts_of_proc_is_recognised(
    tmp_path: Path, points: tuple[str, ...], hidden: bool
) -> None:
    host = make_host(tmp_path, uid=0)
    (tmp_path / "self").mkdir()
    lines = [f"22 21 0:20 / {point} rw - proc proc rw" for point in points]
    (tmp_path / "self/mountinfo").write_text("\n".join(lines))
    assert ("procMount: Unmasked" in remedy(host, BWRAP)) is hidden


def test_a_proc_of_processes_only_is_recognised(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    host.sysctl.rmdir()
    assert "ProcSubset=pid" in remedy(host, BWRAP)


def test_a_kernel_without_user_namespaces_is_recognised(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    host.uid_map.unlink()
    assert "CONFIG_USER_NS" in remedy(host, BWRAP)


def test_without_a_known_cause_the_remedy_is_general(tmp_path: Path) -> None:
    assert "run as root" in remedy(make_host(tmp_path), BWRAP)
    of_root = remedy(make_host(tmp_path, uid=0), BWRAP)
    assert of_root.startswith("a chroot allows no user namespaces")
    assert "root," not in of_root
