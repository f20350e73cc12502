"""RUN: what a command sees, what it may do, and what the server hears of it."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.guest.enter import Launcher
from firebuild_bootstrap.guest.netfiles import network_files
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.sandbox import IdMap
from guest.build import Build, run_command, workdir_command
from guest.server import Log
from support import REPO

pytestmark = pytest.mark.needs("bwrap", "busybox")


def output_of(build: Build, shell: str, **fields: Any) -> str:
    build.succeed(run_command(shell, **fields))
    return build.server.stdout.decode()


# --- what the server hears ------------------------------------------------------------------------


def test_output_and_events_of_a_command_reach_the_server(build: Build) -> None:
    build.succeed(run_command("echo out; echo err >&2"))
    assert build.server.stdout == b"out\n"
    assert build.server.written("stderr") == b"err\n"
    assert build.server.events == [(2, "STARTED", 0), (2, "FINISHED", 0)]


def test_events_and_output_of_steps_come_in_order(build: Build) -> None:
    build.succeed(run_command("echo a", step=2), run_command("echo b", step=5))
    told = [(log.step, log.data or log.event) for log in build.server.logs]
    assert told == [
        (2, "STARTED"),
        (2, b"a\n"),
        (2, "FINISHED"),
        (5, "STARTED"),
        (5, b"b\n"),
        (5, "FINISHED"),
    ]


def test_output_that_is_not_utf8_arrives_byte_for_byte(build: Build) -> None:
    build.succeed(run_command(r"printf '\377\000\200no newline'"))
    assert build.server.stdout == b"\xff\x00\x80no newline"


def test_a_slow_server_gets_every_byte_and_the_guest_stays_small(build: Build) -> None:
    size = 100 * 1024 * 1024
    sizes: list[int] = []

    def slow(log: Log) -> None:
        if log.data and not len(build.server.logs) % 200:
            time.sleep(0.05)

    build.server.on_log = slow
    with build.start(run_command(f"dd if=/dev/zero bs=64k count={size // 65536} 2>/dev/null")) as running:
        pid = vminit_pid(running.sandbox.process.pid)
        while running.sandbox.poll() is None:
            if len(build.server.logs) > 1:
                sizes.append(resident(pid))
            time.sleep(0.05)
        assert running.finish().status == 0
    received = sum(len(log.data) for log in build.server.logs)
    assert received == size
    assert build.server.successes == 1
    assert max(sizes) - sizes[0] < 16 * 1024 * 1024
    assert len(build.server.logs) < 4 * size // 65536


def vminit_pid(bwrap: int) -> int:
    """The program below bubblewrap's two processes."""
    for _ in range(200):
        pid = bwrap
        for _ in range(2):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(children[0]) if children else 0
            if not pid:
                break
        if pid:
            return pid
        time.sleep(0.01)
    raise AssertionError("vminit did not start")


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def test_many_small_writes_become_few_calls(build: Build) -> None:
    build.succeed(run_command("i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done"))
    assert build.server.stdout == b"".join(b"%d\n" % number for number in range(3000))
    assert len(build.server.logs) < 300


def test_a_command_ignores_no_signal_whoever_runs_firebuild(build: Build) -> None:
    """As nohup(1) has it, and the shell of a script for what it runs in the background."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        # Busybox's shell executes the last command itself, and ignores SIGQUIT.
        found = output_of(build, "grep -E '^Sig(Ign|Blk)' /proc/self/status; true")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
    of_libc = 1 << 31 | 1 << 32  # signals 32 and 33, which no program can change (signal(7))
    assert [int(line.split()[1], 16) & ~of_libc for line in found.splitlines()] == [0, 0]


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -KILL $$", 137),
        ("kill -TERM $$", 143),
        ("kill -PIPE $$", 141),
    ],
)
def test_a_failed_command_aborts_the_build_with_its_exit_status(build: Build, script: str, code: int) -> None:
    abort = build.fail(run_command("true", step=2), run_command(script, step=3), run_command("true", step=4))
    assert (abort.step, abort.exit_code, abort.reason) == (3, code, "command")
    assert f"status {code}" in abort.error
    assert build.server.events[-1] == (3, "FINISHED", code)


def test_a_pipe_that_breaks_ends_the_writer_as_in_any_shell(build: Build) -> None:
    assert output_of(build, "cat /dev/zero | head -c 3 | cat; echo done").endswith("done\n")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("/no/such",), 127, "/no/such: not found"),
        (("nosuch",), 127, "nosuch: not found in PATH="),
        (("/etc/passwd",), 126, "Permission denied"),
        (("/bin/text",), 126, "neither a program"),
        (("/bin/orphan",), 127, "interpreter"),
        (("",), 127, "empty"),
        (("/bin/sh", "x" * (1 << 17)), 126, "longer than the kernel takes (128 KiB), or all together are"),
    ],
)
def test_a_command_that_cannot_be_executed_says_why(
    build: Build, argv: tuple[str, ...], code: int, words: str
) -> None:
    for name, text in (("text", "no hash bang"), ("orphan", "#!/no/interpreter\n")):
        (build.image / "bin" / name).write_text(text)
        (build.image / "bin" / name).chmod(0o755)
    abort = build.fail(run_command("", argv=argv))
    assert (abort.exit_code, abort.reason) == (code, "command")
    assert words in abort.error


def test_processes_in_the_background_die_with_the_command(build: Build) -> None:
    script = "(while true; do touch /alive; sleep 0.05; done) >/dev/null 2>&1 & sleep 300 & sleep 0.2"
    build.succeed(
        run_command(script),
        run_command("rm /alive; sleep 0.3; ls /alive 2>/dev/null || echo quiet; ps", step=3),
    )
    listing = build.server.stdout.decode()
    assert "quiet" in listing
    assert "sleep 300" not in listing


def test_sigterm_kills_the_command_and_aborts(build: Build) -> None:
    with build.start(run_command("echo up; sleep 300")) as running:
        build.server.wait_for(lambda: b"up" in build.server.stdout)
        started = time.monotonic()
        running.sandbox.terminate()
        outcome = running.finish(10)
    assert time.monotonic() - started < 5
    assert outcome.status == 128 + signal.SIGTERM
    assert "SIGTERM" in outcome.stderr
    assert [(abort.step, "SIGTERM" in abort.error) for abort in build.server.aborts] == [(2, True)]


# --- what it sees ---------------------------------------------------------------------------------


def test_rm_rf_of_the_root_harms_the_image_only(build: Build) -> None:
    (build.outside / "precious").write_text("kept")
    (build.image / "link").symlink_to(build.outside)
    script = "busybox rm -rf --no-preserve-root / 2>/dev/null; /bin/busybox rm -rf /* 2>/dev/null; echo over"
    build.succeed(run_command(script))
    assert b"over" in build.server.stdout
    assert (build.outside / "precious").read_text() == "kept"
    assert not (build.image / "bin").exists()
    assert not (build.image / "etc/passwd").exists()
    assert (build.directory / "mmds").exists()


def test_a_command_sees_neither_vminit_nor_the_metadata_socket(build: Build) -> None:
    script = (
        "ls /proc; cat /proc/*/cmdline | busybox tr '\\0' ' '; ls -a / /run; "
        "busybox find / -xdev -name 'mmds*'; cat /proc/mounts; cat /proc/1/environ; "
        "ls /proc/1/fd /proc/1/root"
    )
    (build.image / "probe").write_text(script)
    build.run(run_command("", argv=("/bin/sh", "/probe")))
    seen = build.server.stdout.decode()
    assert "/bin/sh /probe" in seen
    for word in ("vminit", "mmds", "firebuild", "python", "import", "/image", str(build.directory)):
        assert word not in seen, word
    assert b"Permission denied" in build.server.written("stderr")  # of /proc/1


def test_standard_input_is_empty_and_the_umask_is_022(build: Build) -> None:
    assert (
        output_of(build, "cat; touch /made; umask; busybox readlink /proc/self/fd/0") == "0022\n/dev/null\n"
    )
    assert build.mode("made") == 0o644


def test_no_descriptor_of_vminit_is_inherited(build: Build) -> None:
    assert output_of(build, "ls /proc/$$/fd; true") == "0\n1\n2\n"


def test_dev_is_private_and_the_images_own_is_hidden_and_kept(build: Build) -> None:
    (build.image / "dev").mkdir()
    (build.image / "dev/own").write_text("kept")
    seen = output_of(
        build,
        "ls /dev; echo x >/dev/null; head -c2 /dev/zero | busybox wc -c; "
        "head -c4 /dev/urandom | busybox wc -c; "
        "touch /dev/shm/x /dev/y; ls -ld /dev/shm; ls -l /dev/ptmx; echo ok | cat /dev/stdin",
    )
    listing, _, rest = seen.partition("2\n")
    names = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert listing.split() == names.split()
    assert rest.startswith("4\ndrwxrwxrwt")
    assert seen.endswith("ok\n")
    assert [path.name for path in (build.image / "dev").iterdir()] == ["own"]


def test_the_kernels_switches_are_read_only_and_its_memory_hidden(build: Build) -> None:
    script = (
        "for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /proc/sys/vm/drop_caches; do "
        "(echo x > $f) 2>/dev/null && echo written $f; done; "
        "for f in kcore keys timer_list sched_debug latency_stats; do [ ! -e /proc/$f ] || "
        "busybox grep -c /proc/$f /proc/self/mountinfo; cat /proc/$f 2>/dev/null; done | busybox sort -u; "
        "busybox mount -o remount,rw /proc/sys 2>/dev/null || echo refused"
    )
    assert output_of(build, script) == "1\nrefused\n"


def test_mount_points_that_were_missing_are_gone_afterwards(build: Build) -> None:
    before = sorted(path.name for path in build.image.rglob("*"))
    build.succeed(run_command("cat /proc/version /etc/resolv.conf /etc/hosts; ls /dev/null"))
    assert sorted(path.name for path in build.image.rglob("*")) == before


def test_a_root_that_is_mounted_read_only_is_an_error_with_the_path(build: Build) -> None:
    build.read_only = True
    error = build.fail(run_command("true")).error
    assert error == "/proc: Read-only file system"
    assert error in (REPO / "docs/troubleshooting.md").read_text("utf-8")


HOSTS = "etc/hosts"


def test_a_command_finds_the_name_of_its_machine_in_the_hosts_file(build: Build) -> None:
    # 127.0.0.1 is what containers say, and 127.0.1.1 what Debian says.
    script = "name=$(busybox hostname); busybox awk -v name=$name '$2 == name' /etc/hosts; echo $name"
    assert output_of(build, script) == "127.0.1.1 firebuild\nfirebuild\n"
    assert not (build.image / HOSTS).exists()


def test_a_name_that_the_hosts_file_has_is_not_added_again(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    outer = Path("/etc/hosts").read_text()
    with Root(str(tmp_path)) as root:
        for name, added in (("localhost", ""), ("local", "127.0.1.1 local\n"), ("", "")):
            with network_files(root, name):
                assert (tmp_path / HOSTS).read_text() == outer + added


@pytest.mark.parametrize(
    ("before", "command", "after"),
    [
        ("1.2.3.4 own\n", "echo 9.9.9.9 mine >> /etc/hosts; cat /etc/hosts", "1.2.3.4 own\n9.9.9.9 mine\n"),
        ("1.2.3.4 own", "echo 9.9.9.9 mine >> /etc/hosts", "1.2.3.4 own\n9.9.9.9 mine\n"),
        (None, "echo 9.9.9.9 mine >> /etc/hosts", "9.9.9.9 mine\n"),
        ("1.2.3.4 own\n", "echo all new > /etc/hosts", "all new\n"),
        ("1.2.3.4 own\n", "echo new > /etc/h; busybox mv /etc/h /etc/hosts", "new\n"),
        ("1.2.3.4 own\n", "busybox rm /etc/hosts", None),
        ("1.2.3.4 own\n", "busybox rm -rf /etc", None),
        ("1.2.3.4 own\n", "busybox rm -rf /etc; busybox mkdir /etc; echo x > /etc/hosts", "x\n"),
        ("1.2.3.4 own\n", "true", "1.2.3.4 own\n"),
        (None, "true", None),
    ],
)
def test_what_a_command_does_to_the_networks_files_is_in_the_image(
    build: Build, before: str | None, command: str, after: str | None
) -> None:
    hosts = build.image / HOSTS
    if before is not None:
        hosts.write_text(before)
    build.succeed(run_command(command))
    assert (hosts.read_text() if hosts.exists() else None) == after
    assert [path.name for path in build.image.glob("etc/.*")] == []


def test_a_network_file_that_grew_huge_is_not_read_into_memory(build: Build) -> None:
    (build.image / HOSTS).write_text("1.2.3.4 own\n")
    build.succeed(run_command("busybox truncate -s 64G /etc/hosts"))
    assert (build.image / HOSTS).stat().st_size == 64 << 30
    assert [path.name for path in build.image.glob("etc/.*")] == []


@pytest.mark.parametrize("before", [None, "own.conf"])
def test_a_package_may_put_a_link_in_place_of_resolv_conf(build: Build, before: str | None) -> None:
    if before is not None:
        (build.image / "etc/resolv.conf").symlink_to(before)
    build.succeed(run_command("busybox ln -sf ../run/stub.conf /etc/resolv.conf"))
    assert os.readlink(build.image / "etc/resolv.conf") == "../run/stub.conf"


def test_a_line_goes_where_the_images_link_leads(build: Build) -> None:
    (build.image / "etc/resolv.conf").symlink_to("real.conf")
    (build.image / "etc/real.conf").write_text("# own\n")
    build.succeed(run_command("echo search example >> /etc/resolv.conf"))
    assert os.readlink(build.image / "etc/resolv.conf") == "real.conf"
    assert (build.image / "etc/real.conf").read_text() == "# own\nsearch example\n"


@pytest.mark.parametrize("target", ["../nowhere/stub.conf", "resolv.conf", "/"])
def test_a_line_takes_the_place_of_a_link_that_leads_to_no_file(build: Build, target: str) -> None:
    (build.image / "etc/resolv.conf").symlink_to(target)
    build.succeed(run_command("echo search example >> /etc/resolv.conf"))
    assert (build.image / "etc/resolv.conf").read_text() == "search example\n"


def test_a_command_that_leaves_etc_alone_leaves_its_time_and_its_files_alone(build: Build) -> None:
    (build.image / HOSTS).write_text("1.2.3.4 own\n")
    os.utime(build.image / HOSTS, ns=(5, 5))
    os.utime(build.image / "etc", ns=(7, 7))
    (build.image / HOSTS).chmod(0o640)
    build.succeed(run_command("cat /etc/hosts"))
    assert (build.image / "etc").stat().st_mtime_ns == 7
    found = (build.image / HOSTS).stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o640, 5)


def test_mount_points_leave_no_trace_in_the_times_of_directories(build: Build) -> None:
    """Neither where the command does nothing, nor where it changes the directory itself."""
    os.utime(build.image / "etc", ns=(7, 7))
    for name in ("proc", "dev"):
        (build.image / name).rmdir() if (build.image / name).exists() else None
    os.utime(build.image, ns=(9, 9))
    build.succeed(
        run_command("busybox touch -d @1000 /etc"),
        run_command("busybox rm -r /etc; busybox touch -d @2000 /", step=3),
        run_command("true", step=4),
    )
    assert build.image.stat().st_mtime_ns == 2000 * 10**9
    assert not (build.image / "etc").exists()
    assert not (build.image / "proc").exists()


def test_the_time_that_a_command_gives_to_etc_stays(build: Build) -> None:
    build.succeed(run_command("busybox touch -d @1000 /etc"))
    assert (build.image / "etc").stat().st_mtime_ns == 1000 * 10**9


def test_names_resolve_as_in_the_machine_around_even_through_a_dangling_link(build: Build) -> None:
    (build.image / "etc/resolv.conf").symlink_to("../run/resolve/stub.conf")
    (build.image / "etc/hosts").symlink_to("/../../../hosts")
    assert output_of(build, "cat /etc/resolv.conf; cat /etc/hosts") == (
        Path("/etc/resolv.conf").read_text() + Path("/etc/hosts").read_text() + "127.0.1.1 firebuild\n"
    )
    assert not (build.image / "run").exists()
    assert not (build.image / "hosts").exists()


def test_links_in_place_of_proc_and_dev_do_not_lead_outside(build: Build) -> None:
    (build.image / "proc").symlink_to("/../../../proc2")
    (build.image / "proc2").mkdir()
    (build.image / "dev").symlink_to("/etc/../dev2")
    (build.image / "dev2").mkdir()
    assert output_of(build, "ls /proc2/self/status; ls /dev2/null") == "/proc2/self/status\n/dev2/null\n"


def test_the_machines_own_root_can_be_the_image(build: Build) -> None:
    build.arguments = ["--root", "/"]
    script = "readlink /proc/self/fd/0; ls -d /image; ls /dev; cat /proc/1/cmdline | tr '\\0' x"
    build.succeed(run_command(script, env={"PATH": "/usr/bin:/bin"}))
    assert build.server.stdout.startswith(b"/dev/null\n/image\n")
    assert b"urandom" in build.server.stdout


def test_an_image_whose_proc_is_a_file_is_an_error(build: Build) -> None:
    (build.image / "proc").write_text("")
    abort = build.fail(run_command("true"))
    assert ("/proc" in abort.error, abort.reason) == (True, "file")


def test_a_run_that_copies_etc_finds_no_file_of_ours_there(build: Build) -> None:
    (build.image / "etc/hosts").write_text("1.2.3.4 own\n")
    (build.image / "etc/resolv.conf").symlink_to("real.conf")
    before = (build.image / "etc/hosts").stat()
    build.succeed(run_command("busybox mkdir /copy; busybox cp -a /etc/. /copy"))
    names = {path.name for path in (build.image / "copy").iterdir()}
    assert names == {path.name for path in (build.image / "etc").iterdir()}
    assert (build.image / "etc/hosts").read_text() == "1.2.3.4 own\n"
    after = (build.image / "etc/hosts").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_a_directory_in_place_of_resolv_conf_stays(build: Build) -> None:
    (build.image / "etc/resolv.conf").mkdir()
    build.succeed(run_command("echo x > /etc/resolv.conf/file"))
    assert (build.image / "etc/resolv.conf/file").read_text() == "x\n"


# --- what it may do -------------------------------------------------------------------------------


def test_capabilities_are_those_of_a_container(build: Build) -> None:
    seen = output_of(build, "busybox grep Cap /proc/self/status")
    expected = "00000000a80425fb"
    values = dict(line.split(":\t") for line in seen.splitlines())
    assert values == {
        "CapInh": "0000000000000000",
        "CapPrm": expected,
        "CapEff": expected,
        "CapBnd": expected,
        "CapAmb": "0000000000000000",
    }


@pytest.mark.root
def test_user_by_name_has_its_groups_and_home_and_no_capabilities(build: Build) -> None:
    (build.image / "home/app").mkdir(parents=True)
    script = "id -u; id -g; id -G; echo $HOME; pwd; busybox grep CapEff /proc/self/status; "
    script += "echo x >/etc/passwd || true"
    seen = output_of(build, script, user="app", workdir="/home/app")
    assert seen.split("\n")[:5] == ["1000", "1001", "1001 10 50", "/home/app", "/home/app"]
    assert "CapEff:\t0000000000000000" in seen
    assert b"Permission denied" in build.server.written("stderr")


@pytest.mark.root
def test_a_numeric_user_with_group_has_that_group_only(build: Build) -> None:
    assert output_of(build, "id -u; id -g; id -G; echo $HOME", user="4242:77") == "4242\n77\n77\n/\n"


@pytest.mark.root
@pytest.mark.parametrize(
    ("user", "ids"), [("1500", "1500 0 0"), ("1500:1600", "1500 1600 1600"), ("01500", "1500 0 0")]
)
def test_a_number_is_an_id_even_where_it_is_a_name(build: Build, user: str, ids: str) -> None:
    (build.image / "etc/passwd").write_text("root:x:0:0::/root:\n1500:x:0:0::/root:\n01500:x:0:0::/:\n")
    (build.image / "etc/group").write_text("root:x:0:\n1600:x:0:\n")
    assert output_of(build, "echo $(id -u) $(id -g) $(id -G)", user=user).strip() == ids


@pytest.mark.root
def test_a_number_finds_the_user_who_has_it_before_the_one_who_is_named_so(build: Build) -> None:
    (build.image / "etc/passwd").write_text("1500:x:0:0::/root:\nreal:x:1500:70::/home/real:\n")
    assert output_of(build, "echo $(id -u) $(id -g) $HOME", user="1500") == "1500 70 /home/real\n"


def test_an_unknown_user_is_an_error_before_anything_runs(build: Build) -> None:
    abort = build.fail(run_command("echo ran", user="nobody-here"))
    assert "no 'nobody-here'" in abort.error
    assert build.server.stdout == b""


def test_the_environment_is_args_then_env_and_path_and_home(build: Build) -> None:
    seen = output_of(
        build, "env", env={"A": "env", "Q": 'a "b" $c\nd'}, args={"A": "arg", "B": "arg"}, argv=("/bin/env",)
    )
    assert sorted(seen.replace("\nd", "<d").splitlines()) == [
        "A=env",
        "B=arg",
        "HOME=/root",
        f"PATH={wire.DEFAULT_PATH}",
        'Q=a "b" $c<d',
    ]


def test_path_and_home_of_the_image_win(build: Build) -> None:
    seen = output_of(build, "", argv=("env",), env={"PATH": "/nowhere:/bin", "HOME": "/elsewhere"})
    assert sorted(seen.split()) == ["HOME=/elsewhere", "PATH=/nowhere:/bin"]


def test_exec_form_is_passed_verbatim(build: Build) -> None:
    seen = output_of(build, "", argv=("echo", "$HOME", "a  b", "*", "'x'"))
    assert seen == "$HOME a  b * 'x'\n"


def test_a_script_runs_with_its_own_first_line_and_leaves_nothing(build: Build) -> None:
    (build.image / "bin/awk").symlink_to("busybox")
    script = '#!/bin/awk -f\nBEGIN { print "from awk" }\n'
    build.succeed(run_command("", script=script), run_command("ls /dev/firebuild-run 2>&1 || true", step=3))
    assert build.server.stdout.startswith(b"from awk\n")
    assert b"No such file" in build.server.stdout


@pytest.mark.root
def test_a_script_runs_as_another_user_too(build: Build) -> None:
    assert output_of(build, "", script="#!/bin/sh\nid -u\n", user="app") == "1000\n"


def test_a_missing_workdir_is_created(build: Build) -> None:
    assert output_of(build, "pwd", workdir="/deep/er") == "/deep/er\n"


def test_a_very_long_path_does_not_hang_the_report(build: Build) -> None:
    path = ":".join(["/nowhere" * 100] * 110)
    abort = build.fail(run_command("", argv=("missing",), env={"PATH": path}))
    assert abort.exit_code == 127
    assert abort.error.startswith("missing: not found in PATH=/nowhere")


@pytest.mark.root
def test_workdir_creates_with_the_current_user(build: Build) -> None:
    build.succeed(workdir_command("/srv/app", user="app"))
    assert (build.owner("srv"), build.owner("srv/app")) == ((1000, 1001), (1000, 1001))
    assert build.mode("srv/app") == 0o755


def test_a_workdir_that_is_a_file_is_an_error(build: Build) -> None:
    abort = build.fail(workdir_command("/etc/passwd"))
    assert "WORKDIR /etc/passwd" in abort.error
    assert abort.reason == "file"


def test_a_nul_in_the_environment_is_an_error_not_a_crash(build: Build) -> None:
    assert "NUL" in build.fail(run_command("true", env={"A": "a\0b"})).error


def test_an_impossible_name_in_the_environment_is_an_error(build: Build) -> None:
    assert "'A=B'" in build.fail(run_command("true", env={"A=B": "c"})).error


# --- where only one id exists ---------------------------------------------------------------------


def test_root_works_where_one_id_is_mapped(build: Build, single_idmap: IdMap) -> None:
    build.idmap = single_idmap
    assert output_of(build, "id -u; touch /made; echo $HOME") == "0\n/root\n"


def test_another_user_needs_more_ids_and_the_error_says_so(build: Build, single_idmap: IdMap) -> None:
    build.idmap = single_idmap
    abort = build.fail(run_command("true", user="app"))
    assert "USER app" in abort.error
    assert "/etc/subuid" in abort.error


def test_a_launcher_takes_more_descriptors_than_the_kernel_sends_at_once() -> None:
    with closing(Launcher()) as launcher:
        ends = [os.pipe() for _ in range(4)]
        locks = [os.dup(0) for _ in range(300)]
        launcher.start(ends[0][0], *(write for _, write in ends[1:]), *locks)
        for descriptor in (ends[0][0], *(write for _, write in ends[1:]), ends[0][1], *locks):
            os.close(descriptor)
        report = os.read(ends[3][0], 4096)
        for read, _ in ends[1:]:
            os.close(read)
        assert (launcher.wait(), json.loads(report)["message"]) == (
            1,
            "[Errno 32] the request is not complete",
        )
        launcher.kill()
        assert launcher.wait() == 137
