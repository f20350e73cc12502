"""RUN --mount and --network: what a command sees, and what is left of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.sandbox import Bind, IdMap
from guest.build import Build, run_command
from guest.server import a_directory, a_file, a_link, in_tree

pytestmark = pytest.mark.needs("bwrap", "busybox")

SECRET = b"hunter2-\xff-correct-horse"


def bind(target: str, number: int = 1, **fields: Any) -> wire.BindMount:
    return wire.BindMount(target=target, resource=f"mount-{number}", **fields)


def secret(number: int = 1, **fields: Any) -> wire.SecretMount:
    return wire.SecretMount(resource=f"secret-{number}", **fields)


def mounted(shell: str, *mounts: wire.Mount, step: int = 2, **fields: Any) -> wire.RunCommand:
    return run_command(shell, step, mounts=mounts, **fields)


@pytest.fixture
def outside(build: Build) -> Build:
    """A build whose machine has directories outside of the image for scratch and caches."""
    for name in ("scratch", "caches"):
        (build.directory / name).mkdir(mode=0o700)
        build.extra_binds.append(Bind(build.directory / name, f"/run/{name}", read_only=False))
        build.arguments += [f"--{name}", f"/run/{name}"]
    return build


@pytest.fixture(params=["outside", "in the image"])
def anywhere(request: pytest.FixtureRequest, build: Build) -> Build:
    """A build whose machine has such directories, or has none."""
    if request.param == "outside":
        request.getfixturevalue("outside")
    return build


def files(build: Build, number: int = 1, extra: Any = ()) -> None:
    build.server.resources[f"mount-{number}"] = [
        *a_directory("", 0o750),
        *in_tree("a", b"alpha", mode=0o640, mtime_ns=5 * 10**9),
        *a_directory("sub"),
        *in_tree("sub/b", b"beta"),
        *a_link("link", "sub/b"),
        *extra,
    ]


def listing(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Everything below a directory, with what a layer would hold of it."""
    found = {}
    for each in [path, *sorted(path.rglob("*"))]:
        status = each.lstat()
        found[str(each.relative_to(path))] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
        )
    return found


# --- all of them at once --------------------------------------------------------------------------


def test_a_run_has_all_mounts_and_leaves_no_trace_of_them(anywhere: Build) -> None:
    build = anywhere
    files(build)
    build.server.resources |= {
        "mount-2": a_file("one", b"single", mode=0o604),
        "secret-1": a_file("s", SECRET),
        "secret-2": a_file("t", b"in-env"),
    }
    (build.image / "srv").mkdir()
    for folder in (build.image / "srv", build.image / "etc", build.image):
        os.utime(folder, (1, 1))
    before = listing(build.image)
    shell = """
        set -e
        cat /srv/in/a /srv/in/link /srv/one; echo
        busybox stat -c '%a %u:%g %Y %n' /srv/in /srv/in/a /srv/one /run/secrets/s /c /t
        for path in /srv/in/new /srv/in/a /srv/one /run/secrets/s; do
          { echo x > $path; } 2>/dev/null && echo "wrote $path"
        done
        cat /run/secrets/s | busybox od -An -c | busybox tr -d ' \\n'; echo
        echo "$TOKEN $KEPT"
        echo lost > /srv/rw/a; cat /srv/rw/a
        echo kept > /c/file; echo gone > /t/file
        busybox df -k /t | busybox tail -n 1 | busybox awk '{print $2}'
        ls -A /dev / | busybox grep firebuild || true
        test "$(busybox stat -c %F-%a-%u /srv/agent)" = socket-620-0
        test -z "$(ls -A /.firebuild* 2>/dev/null)"
    """
    build.succeed(
        mounted(
            shell,
            bind("in"),
            bind("/srv/one", 2),
            bind("rw", writable=True),
            wire.CacheMount(target="/c", id="c", mode=0o1770, uid=0, gid=0),
            wire.TmpfsMount(target="/t", size=65536),
            secret(target="/run/secrets/s", mode=0o440),
            secret(2, env="TOKEN"),
            wire.SshMount(target="agent", id="default", mode=0o620),
            workdir="/srv",
            env={"TOKEN": "less", "KEPT": "kept"},
        )
    )
    assert build.server.stdout.decode().splitlines() == [
        "alphabetasingle",
        "750 0:0 0 /srv/in",
        "640 0:0 5 /srv/in/a",
        "604 0:0 0 /srv/one",
        f"440 0:0 {build.server.stdout.decode().split('440 0:0 ')[1].split()[0]} /run/secrets/s",
        *build.server.stdout.decode().splitlines()[5:7],
        "hunter2-377-correct-horse",
        "in-env kept",
        "lost",
        "64",
        *([] if build.arguments else [build.server.stdout.decode().splitlines()[-1]]),
    ]
    assert [line.split()[0] for line in build.server.stdout.decode().splitlines()[5:7]] == ["1770", "1777"]
    assert listing(build.image) == before


def test_what_a_run_puts_beside_a_mount_point_stays(build: Build) -> None:
    build.server.resources["secret-1"] = a_file("s", b"x")
    build.succeed(mounted("echo kept > /run/secrets/mine", secret(target="/run/secrets/s")))
    assert [path.name for path in (build.image / "run/secrets").iterdir()] == ["mine"]


def test_a_mount_below_another_one_is_mounted_in_it(outside: Build) -> None:
    files(outside)
    outside.server.resources["secret-1"] = a_file("s", b"deep")
    shell = (
        "cat /a/deep/s /a/a; echo t > /a/deep/t/x; echo '' /a/* /a/deep/*; echo > /a/new || echo read-only"
    )
    outside.succeed(
        mounted(
            shell,
            secret(target="/a/deep/s"),
            wire.TmpfsMount(target="/a/deep/t"),
            wire.CacheMount(target="/a/deep", id="x"),
            bind("/a"),
        )
    )
    assert outside.server.stdout.decode().split() == (
        ["deepalpha", "/a/a", "/a/deep", "/a/link", "/a/sub", "/a/deep/s", "/a/deep/t", "read-only"]
    )
    assert not (outside.image / "a").exists()


def test_mounts_add_nothing_to_the_layer_of_a_run(outside: Build) -> None:
    build = outside
    layers = build.directory / "layers"
    for name in ("lower/0", "lower/1"):
        (layers / name).mkdir(parents=True)
    build.extra_binds += [
        Bind(layers, "/layers", read_only=False),
        Bind(build.image, "/layers/lower/1"),
    ]
    build.arguments += ["--layers", "/layers"]
    (build.image / "srv/deep").mkdir(parents=True)
    files(build)
    build.server.resources["secret-1"] = a_file("s", b"x")
    mounts = (
        bind("/srv/deep/a"),
        secret(target="/run/secrets/s"),
        wire.CacheMount(target="/srv/c", id="c"),
        wire.TmpfsMount(target="/etc/t/t"),
    )
    build.succeed(
        mounted("cat /srv/deep/a/a; echo x > /srv/c/x", *mounts),
        mounted("cat /srv/c/x; echo y > /srv/kept; echo z > /etc/t/kept", *mounts, step=3),
    )
    assert build.server.stdout == b"alphax\n"
    uppers = {
        step: {
            str(path.relative_to(layers / f"upper/{step}/fs"))
            for path in (layers / f"upper/{step}/fs").rglob("*")
        }
        for step in (2, 3)
    }
    assert uppers == {2: set(), 3: {"srv", "srv/kept", "etc", "etc/t", "etc/t/kept"}}


def test_processes_and_open_files_in_mounts_end_with_their_run(outside: Build) -> None:
    files(outside)
    mounts = (bind("/rw", writable=True), wire.CacheMount(target="/c", id="c"), wire.TmpfsMount(target="/t"))
    shell = """
        (cd /rw/sub; exec 3>>/c/log 4>>/t/x 5<>/rw/a; while echo again >&5; do :; done) >/dev/null 2>&1 &
        (cd /c; while :; do echo x > n; rm n; done) >/dev/null 2>&1 &
        busybox chmod 000 /rw/sub /c; busybox ln -s / /rw/out; mkdir() { busybox mkdir $*; }; mkdir /rw/new
        until busybox test -e /c/log; do :; done
    """
    outside.succeed(
        mounted(shell, *mounts),
        mounted("busybox stat -c %a /c /rw/sub; cat /rw/a; ls /c; ls /t", *mounts, step=3),
    )
    assert outside.server.stdout.decode().replace("n\n", "") == "0\n755\nalphalog\n"
    assert list((outside.directory / "scratch").iterdir()) == []
    assert (outside.image / "bin/busybox").exists()


# --- where mounts may be ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/to-proc", "/to-proc/self", "/to-proc/1/root/x", "/to-dev", "/to-root"])
def test_links_of_the_image_lead_no_mount_into_proc_or_over_the_root(build: Build, target: str) -> None:
    for name, text in (("to-proc", "proc"), ("to-dev", "/dev/../dev"), ("to-root", "/..")):
        (build.image / name).symlink_to(text)
    abort = build.fail(mounted("true", wire.TmpfsMount(target=target)))
    assert (abort.reason, f"mount {target}: " in abort.error) == ("file", True)
    assert not (build.image / "proc").exists()


def test_links_of_the_image_lead_a_mount_nowhere_else(build: Build) -> None:
    (build.image / "up").symlink_to("../../../../mounted")
    (build.image / "out").symlink_to(build.outside)
    before = listing(build.outside)
    build.succeed(
        mounted(
            # The root itself may be one: /tmp often is.
            'cat /proc/mounts | busybox awk \'$3 == "tmpfs" && $2 != "/" { print $2 }\' | busybox sort',
            wire.TmpfsMount(target="/up/x"),
            wire.TmpfsMount(target="/out"),
            wire.TmpfsMount(target="/dev/shm"),
        )
    )
    assert build.server.stdout.decode().split() == sorted(
        ["/dev", "/dev/shm", "/dev/shm", str(build.outside), "/mounted/x"]
    )
    assert listing(build.outside) == before
    assert sorted(path.name for path in build.image.iterdir()) == ["bin", "etc", "out", "up"]


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (bind("/etc/passwd"), "there is a file in the image, and a directory can't be mounted on it"),
        (bind("/bin", 2), "there is a directory in the image, and a file can't be mounted on it"),
        (wire.SshMount(target="/bin", id="a"), "there is a directory in the image, and a file can't be"),
        (wire.TmpfsMount(target="/etc/passwd/x"), "Not a directory"),
        (wire.TmpfsMount(target="/loop/x"), "Too many levels of symbolic links"),
    ],
)
def test_a_mount_that_does_not_fit_to_the_image_says_why(build: Build, mount: Any, words: str) -> None:
    files(build)
    build.server.resources["mount-2"] = a_file("one", b"single")
    (build.image / "loop").symlink_to("loop")
    abort = build.fail(mounted("true", mount))
    assert abort.reason == "file"
    assert f"mount {mount.target}: {words}" in abort.error


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([], "the server sent no files"),
        (a_file("s", b"1") + a_file("t", b"2"), "expected one file as the secret"),
        (a_link("s", "/etc/passwd"), "expected a file as the secret"),
        (a_file("s", b"x" * (wire.MAX_SECRET_BYTES + 1)), "at most 512000 bytes"),
        (a_file("s", b"a\0b"), "contains a NUL"),
    ],
)
def test_what_a_server_sends_wrongly_for_a_mount_ends_the_build(
    build: Build, chunks: Any, words: str
) -> None:
    build.server.resources |= {"mount-1": chunks, "secret-1": chunks}
    mount = secret(env="S") if chunks else bind("/b")
    abort = build.fail(mounted("true", mount))
    assert words in abort.error
    assert sorted(path.name for path in build.image.iterdir()) == ["bin", "etc"]


def test_a_link_that_comes_as_the_files_of_a_mount_is_not_followed(build: Build) -> None:
    build.server.resources["mount-1"] = a_link("l", "/etc", from_directory=False)
    abort = build.fail(mounted("ls /b", bind("/b")))
    assert "mount /b" in abort.error


def test_a_secret_that_is_no_text_reaches_the_variable_byte_for_byte(build: Build) -> None:
    build.server.resources["secret-1"] = a_file("s", SECRET)
    build.succeed(mounted('printf %s "$S"', secret(env="S")))
    assert build.server.stdout == SECRET


def test_a_secret_as_path_is_in_no_message(build: Build) -> None:
    build.server.resources["secret-1"] = a_file("s", b"/hunter2")
    abort = build.fail(run_command("", argv=("nosuch",), mounts=(secret(env="PATH"),)))
    assert "hunter2" not in abort.error
    assert "nosuch: not found" in abort.error


@pytest.mark.needs("ids")
def test_a_command_finds_no_other_secret_than_its_own(build: Build) -> None:
    """Neither in the processes around it nor in what was mounted for a moment."""
    build.server.resources["secret-1"] = a_file("s", b"hunter2")
    build.server.resources["secret-2"] = a_file("t", b"trustno1")
    shell = """
        cat /proc/*/environ /proc/*/cmdline /proc/1/fd/* 2>/dev/null | busybox grep -a -c 'hunter[2]'
        busybox find / -xdev -type f -size -2 ! -path /t -exec busybox grep -l 'trustno[1]' {} +
        cat /proc/mounts | busybox grep -c firebuild
        id -u; cat /s; cat /t
    """
    build.run(
        mounted(shell, secret(target="/s"), secret(2, target="/t", uid=1000, gid=1000), user="app:1000")
    )
    lines = build.server.stdout.decode().splitlines()
    assert lines == ["0", "0", "1000", "trustno1"]


# --- network --------------------------------------------------------------------------------------


def test_a_run_without_a_network_has_its_own_loopback_and_nothing_else(build: Build) -> None:
    port = f"{int(build.server.host_port.rpartition(':')[2]):04X}"
    server = f"cat /proc/net/tcp /proc/net/tcp6 | busybox grep -c ':{port} 0*:0000 0A'"
    shell = f"""
        cat /proc/net/dev | busybox awk 'NR > 2 {{ print $1 }}'
        {server}
        busybox ping -c 1 -W 5 127.0.0.1 > /dev/null && echo self
        busybox ping -c 1 -W 5 192.0.2.1 2>&1 | busybox tail -n 1
    """
    build.succeed(
        mounted(shell, network="none"),
        mounted(server, step=3, network="host"),
    )
    assert build.server.stdout.decode().splitlines() == [
        "lo:",
        "0",
        "self",
        "ping: sendto: Network is unreachable",
        "1",
    ]


def test_one_mapped_id_is_enough_for_all_mounts(outside: Build, single_idmap: IdMap) -> None:
    outside.idmap = single_idmap
    files(outside)
    outside.server.resources["secret-1"] = a_file("s", b"x")
    outside.succeed(
        mounted(
            "cat /a/a /s; echo y > /c/y; echo z > /t/z",
            bind("/a"),
            secret(target="/s"),
            wire.CacheMount(target="/c", id="c"),
            wire.TmpfsMount(target="/t"),
            network="none",
        )
    )
    assert outside.server.stdout == b"alphax"
    other = mounted("true", secret(target="/s", uid=1000))
    assert "uid 1000 does not exist in this sandbox" in outside.run(other).stderr
