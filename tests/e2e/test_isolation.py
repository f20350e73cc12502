"""A RUN can do anything inside its image and nothing outside; every test here tries to prove the opposite."""

from __future__ import annotations

import ctypes
import io
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from support import Firebuild

pytestmark = [pytest.mark.needs("userns")]

ATTACK = Path(__file__).with_name("attack.py")
OF_A_USER = re.compile(
    "(write )?/proc/1/(task/1/)?"
    "(autogroup|clear_refs|coredump_filter|oom_adj|oom_score_adj|sched)( takes a value)?"
)
"""To what of its sandbox's first process a RUN can write, where that is a user's: docs/security.md."""
DAEMON = "4545"  # seconds that nothing else on the machine sleeps
ABSTRACT = f"firebuild-test-{os.getpid()}"
KEY = "the-callers-key"
# Starts firebuild as a login session would: with a session keyring that holds a key of the user's.
WITH_KEY = """#!{python}
import ctypes, os, sys
numbers = {{"x86_64": (250, 248), "aarch64": (219, 217)}}[os.uname().machine]
call = ctypes.CDLL(None).syscall
call(numbers[0], 1, None)
call(numbers[1], b"user", b"{name}", b"secret", ctypes.c_size_t(6), ctypes.c_long(-3))
os.execv("{firebuild}", ["{firebuild}", *sys.argv[1:]])
"""


def copy_python(target: Path) -> str:
    """Copy as much of this Python as the attacks need below `target` and return where it is then."""
    program = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    script = "import __future__, ctypes, functools, json, socket, sys\n"
    script += "for module in list(sys.modules.values()):\n  print(getattr(module, '__file__', None) or '')"
    shown = subprocess.run([program, "-E", "-S", "-c", script], capture_output=True, text=True, check=True)
    files = [program, *(line for line in shown.stdout.splitlines() if line.startswith("/"))]
    files += [path for path in (f"{sysconfig.get_path('stdlib')}/os.py",) if path not in files]
    native = [path for path in files if not path.endswith(".py")]
    libraries = subprocess.run(["ldd", *native], capture_output=True, text=True, check=False).stdout
    for file in (*files, *set(re.findall(r"(/\S+) \(0x", libraries))):
        inside = file.lstrip("/")
        inside = f"usr/{inside}" if inside.split("/")[0] in ("bin", "lib", "lib64") else inside
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target / inside)
    return program


def build(
    firebuild: Firebuild, context: Path, dockerfile: str, output: str = "tar", status: int = 0
) -> subprocess.CompletedProcess[str]:
    (context / "Dockerfile").write_text(dockerfile)
    arguments: list[str | Path] = ["--dockerfile", context / "Dockerfile", "--context", context]
    arguments += ["--output", output]
    return firebuild("rootfs", "--tag", "t/walls:1", *arguments, status=status)


def members(firebuild: Firebuild) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(firebuild.home / "images/names/t/walls/1/rootfs.tar") as tar:
        return {member.name: member for member in tar}


def content(firebuild: Firebuild, name: str) -> str:
    with tarfile.open(firebuild.home / "images/names/t/walls/1/rootfs.tar") as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read().decode()


@pytest.fixture(scope="module")
def findings(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What attack.py could do, in a build of its own."""
    context = tmp_path_factory.mktemp("attack")
    (context / "python").mkdir()
    python = copy_python(context / "python")
    shutil.copy(ATTACK, context / "attack.py")
    with_key = context / "firebuild"
    plain = Firebuild(shared_home)
    with_key.write_text(WITH_KEY.format(python=sys.executable, name=KEY, firebuild=plain.program))
    with_key.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{ABSTRACT}")
        listener.listen()
        dockerfile = f"FROM host\nCOPY python attack.py /\nRUN {python} -E -S /attack.py {ABSTRACT} {KEY}\n"
        dockerfile += f"USER 0\nRUN (setsid sleep {DAEMON} &) ; setsid nohup sleep {DAEMON} & true\n"
        dockerfile += (
            f"RUN sleep {DAEMON} & kill -9 -1; kill -9 1; kill -INT 1; kill -STOP 1; sleep 0.1; touch /on\n"
        )
        build(Firebuild(shared_home, with_key), context, dockerfile)
    found: dict[str, Any] = json.loads(content(plain, "findings.json"))
    return found


def test_no_descriptor_of_ours_reaches_a_run(findings: dict[str, Any]) -> None:
    assert set(findings["descriptors"]) == {"0", "1", "2"}
    assert findings["descriptors"]["0"] == "/dev/null"
    assert all(findings["descriptors"][number].startswith("pipe:") for number in "12")


def test_a_run_sees_its_own_processes_only_and_nothing_of_the_first(findings: dict[str, Any]) -> None:
    first = findings["processes"].pop("1")
    assert first.strip("\0 ") == ""
    assert all("attack.py" in command for command in findings["processes"].values())
    opened = {name: text for name, text in findings["first"].items() if text not in ("EACCES", "EPERM")}
    assert opened == {"fd": ""}
    assert set(findings["trace"].values()) == {"EPERM"}


def test_a_run_sees_no_mount_of_the_host(findings: dict[str, Any]) -> None:
    outside = [
        path
        for path in findings["mounts"]
        if path != "/"
        and not path.startswith(("/dev", "/proc"))
        and path not in ("/etc/hosts", "/etc/resolv.conf")
    ]
    assert outside == []


@pytest.mark.parametrize(
    "attempt",
    [
        *("core_pattern", "sysrq", "drop_caches", "max_user_namespaces", "hostname"),
        *("mount tmpfs", "mount proc", "mount cgroup2", "unmount /proc/sys", "remount /proc/sys"),
        *("unshare user", "clone user", "unshare mount", "unshare pid", "join a namespace"),
        *("block device", "character device", "open by handle", "terminal", "set the clock", "load a module"),
        *("reboot", "swap", "raise the limit", "kernel log", "raw disk"),
    ],
)  # fmt: skip
def test_what_reaches_the_kernel_or_the_host_is_refused(findings: dict[str, Any], attempt: str) -> None:
    refusals = ("EPERM", "EACCES", "EROFS", "ENOENT", "ENOSPC", "ENXIO", "ENOSYS", "EINVAL")
    assert findings["attempts"][attempt] in refusals, findings["attempts"]


def test_no_other_way_leads_to_memory_files_or_keys_of_others(findings: dict[str, Any]) -> None:
    refused = re.compile("E[A-Z]+|None")
    found = {name: how for name, how in findings["hunts"].items() if not refused.fullmatch(how)}
    assert {name for name in found if not (os.getuid() and OF_A_USER.fullmatch(name))} == set(), found
    assert "write /proc/1/oom_score_adj" in findings["hunts"]
    assert (findings["keys"], findings["shared memory"]) == ("none", "")


def test_nothing_that_the_hosts_kernel_has_once_for_all_can_be_changed(findings: dict[str, Any]) -> None:
    changed = {what: outcome for what, outcome in findings["changes"].items() if not outcome.startswith("E")}
    assert changed == {}
    assert "chmod /dev/null" in findings["changes"]
    assert "chmod /proc/self/net/dev" in findings["changes"]


def test_devices_work_though_they_cannot_be_changed(findings: dict[str, Any]) -> None:
    zeros = "\0" * 100
    assert findings["devices"] == {"null": "written", "zero": zeros, "full": "ENOSPC", "random": "4"}


def test_a_chroot_leads_nowhere_but_into_the_image(findings: dict[str, Any]) -> None:
    assert "attack.py" in findings["after chroot"]
    assert not Path("/attack.py").exists()


def test_the_callers_keys_stay_with_the_caller(findings: dict[str, Any]) -> None:
    assert findings["key"] in ("ENOKEY", "ENOSYS", "EPERM", "EACCES")


def test_abstract_sockets_of_the_host_are_out_of_reach_where_the_kernel_can(findings: dict[str, Any]) -> None:
    version = ctypes.CDLL(None).syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_ulong(1))
    assert findings["own abstract socket"] == "connected"
    assert findings["abstract socket"] == ("EPERM" if version >= 6 else "connected")


def test_a_run_that_kills_all_it_can_kills_neither_vminit_nor_what_comes_next(
    findings: dict[str, Any], firebuild: Firebuild
) -> None:
    assert "on" in members(firebuild)


def test_background_processes_end_with_their_step(findings: dict[str, Any]) -> None:
    def sleeping() -> bool:
        done = subprocess.run(["pgrep", "-f", f"^sleep {DAEMON}"], capture_output=True, check=False)
        return done.returncode == 0

    time.sleep(0.1)
    assert not sleeping()


def test_rm_rf_of_everything_removes_the_image_and_nothing_else(
    firebuild: Firebuild, context: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (context / "inside").write_text("")
    # Only where it is sure to be in an image.
    rm = "test -e /inside && rm -rf --no-preserve-root /*; true"
    build(firebuild, context, f"FROM host\nRUN ln -s {outside} /way-out\nCOPY inside /\nRUN {rm}\n")
    left = {name.split("/")[0] for name in members(firebuild)} - {"."}
    assert left <= {"dev", "proc", "etc"}
    assert (outside / "kept").read_text() == "kept"
    assert Path("/etc/hosts").stat().st_size >= 0
    assert "host" in firebuild("base", "list").stdout


def test_planted_links_lead_a_copy_nowhere_but_into_the_image(
    firebuild: Firebuild, context: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (context / "file").write_text("new")
    (context / "tree/sub").mkdir(parents=True)
    (context / "tree/sub/file").write_text("new")
    (context / "etc").mkdir()
    (context / "etc/resolv.conf").symlink_to(outside / "resolv.conf")
    ways = f"ln -s {outside} /absolute; ln -s ../../../../../..{outside} /relative"
    dockerfile = f"""
        FROM host
        COPY etc /etc
        RUN {ways}; ln -s /proc/1/root{outside} /proc-way
        COPY file /absolute/a
        COPY file /relative/b
        COPY tree /absolute/
        WORKDIR /absolute/work
        RUN echo x > file; echo x >> /etc/resolv.conf
        COPY file /proc-way/c
    """
    build(firebuild, context, dockerfile)
    assert list(outside.iterdir()) == []
    inside = str(outside).lstrip("/")
    assert {f"{inside}/a", f"{inside}/b", f"{inside}/sub/file", f"{inside}/work/file"} <= set(
        members(firebuild)
    )


def test_a_hostile_archive_in_the_context_writes_nothing_outside(
    firebuild: Firebuild, context: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for names, status in ((["../../up"], 2), ([f"{outside}/absolute", "link/through"], 0)):
        with tarfile.open(context / "evil.tar", "w") as tar:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(outside)
            tar.addfile(link)
            for name in names:
                evil = tarfile.TarInfo(name)
                evil.size = 4
                tar.addfile(evil, io.BytesIO(b"evil"))
        build(firebuild, context, "FROM scratch\nADD evil.tar /a/b/\n", status=status)
        assert list(outside.iterdir()) == []


def test_links_of_the_context_do_not_carry_files_of_the_host_into_the_image(
    firebuild: Firebuild, context: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    (context / "tree").mkdir()
    (context / "tree/link").symlink_to(secret)
    (context / "tree/line\nbreak\x1b[31m").write_text("odd")
    build(firebuild, context, "FROM scratch\nCOPY tree /tree\n")
    found = members(firebuild)
    assert found["tree/link"].issym()
    assert "tree/line\nbreak\x1b[31m" in found
    (context / "direct").symlink_to(secret)
    build(firebuild, context, "FROM scratch\nCOPY direct /direct\n", status=2)


@pytest.mark.needs("tester")
def test_no_other_user_of_the_host_can_execute_a_set_user_id_program_of_an_image(context: Path) -> None:
    tester = pwd.getpwnam("tester").pw_uid
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # cleanup goes on in it
        home = Path(directory)
        home.chmod(0o755)
        firebuild = Firebuild(home)
        shutil.copy("/usr/bin/id", context / "id")
        build(firebuild, context, "FROM scratch\nCOPY --chmod=4755 id /id\n", output="dir")
        program = home / "images/names/t/walls/1/rootfs/id"
        assert program.stat().st_mode & 0o7777 == 0o4755
        with pytest.raises(PermissionError):
            subprocess.run([program, "-u"], user=tester, group=tester, check=False)
