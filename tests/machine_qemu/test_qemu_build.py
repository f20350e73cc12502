"""Builds in real virtual machines: each boots a kernel, so there are few tests, with much in each."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from baoserver import DevServer, add_role, create_token, mount_pki, sign_policy, write_policy
from firebuild_bootstrap.layers.tar import FILE, Entry
from firebuild_bootstrap.layers.tree import upper_entries
from firebuild_bootstrap.machine.usernet import TUN
from machine_qemu import lonely_host
from machine_qemu.images import arguments, busybox_base
from machine_qemu.kernels import require
from machine_qemu.processes import is_running, machines_of
from support import Firebuild, await_end_of_processes, eventually

pytestmark = [
    pytest.mark.needs("userns", "e2fsck", "busybox"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.long,
    pytest.mark.timeout(400),
]

# Asks the metadata service as vminit did.
METADATA = r"""
RUN ask() { printf "$1 /latest/$2 HTTP/1.1\r\nConnection: close\r\n$3\r\n\r\n" \
 | nc -w 9 169.254.169.254 80; }; \
 token=$(ask PUT api/token "X-metadata-token-ttl-seconds: 60" | tail -n 1); \
 ask GET meta-data "Accept: application/json\r\nX-metadata-token: $token" | tail -n 1
"""


@contextmanager
def home_of_tester() -> Iterator[Path]:
    """A directory for the user `tester`, with what is put there until the first `as_tester` command."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def as_tester(home: Path, packages: str, environ: dict[str, str]) -> Callable[..., str]:
    """Return what runs `firebuild` as the user `tester`, who owns `home` from now on."""
    subprocess.run(["chown", "-R", "tester:", home], check=True)
    user = pwd.getpwnam("tester")

    def firebuild(*words: str | Path) -> str:
        code = "import sys; from firebuild_bootstrap.cli import main; main()"
        command = [f"/usr/bin/python3.{sys.version_info.minor}", "-sSP", "-c", code, *map(str, words)]
        own = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": packages}
        done = subprocess.run(
            command,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            env={**own, "FIREBUILD_HOME": str(home / "store"), **environ},
            cwd=home,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    return firebuild


@pytest.fixture
def bao(tmp_path: Path) -> Iterator[tuple[DevServer, dict[str, Any], str]]:
    """OpenBao with what a build needs, the configuration for it, and a token."""
    with DevServer(tmp_path) as server:
        mount_pki(server.api)
        add_role(server.api, "server", use="server")
        add_role(server.api, "guest", use="client")
        policy = write_policy(server.api, "builds", sign_policy("server", "guest"))
        vault = {
            "address": server.address,
            "server_role": "server",
            "guest_role": "guest",
            "auth": {"method": "token", "token": {"env": "BAO_TOKEN_FOR_BUILDS"}},
        }
        yield server, {"provider": "vault", "vault": vault}, create_token(server.api, policy)


@pytest.mark.needs("bao", "tester")
def test_a_user_without_root_builds_with_certificates_of_openbao_and_the_guest_is_alone(
    bao: tuple[DevServer, dict[str, Any], str],
    public_packages: str,
    context: Path,
    configure: Any,
    tmp_path: Path,
) -> None:
    server, ca, token = bao
    port = server.address.rpartition(":")[2]
    dockerfile = (
        f"FROM busybox\nCOPY hello /srv/hello\n{METADATA}"
        f"RUN echo | nc -w 9 169.254.169.254 {port}; echo status $?; cat /proc/net/route; cat /srv/hello\n"
    )
    (context / "hello").write_text("hello from the context\n")
    with home_of_tester() as home:
        shutil.copy(busybox_base(tmp_path), home / "base.tar")
        shutil.copytree(context, home / "context")
        shutil.copy(configure(ca, serial_log=f"{home}/serial"), home / "config.yaml")
        firebuild = as_tester(home, public_packages, {"BAO_TOKEN_FOR_BUILDS": token})
        firebuild("base", "import", "busybox", home / "base.tar")
        rootfs = arguments(home / "context", dockerfile, "--config", home / "config.yaml")
        said = firebuild(*rootfs, "--output", "tar")
        assert '"status": "success"' in (home / "serial").read_text()
        assert [path.name for path in (home / "store/builds").iterdir()] == ["lock"]
        await_end_of_processes(home)
    assert '"VMMID"' in said
    assert "Bootstrap" not in said
    assert "PRIVATE KEY" not in said
    assert "status 1\n" in said
    assert "Connection refused" in said
    assert "hello from the context" in said
    routes = [line.split()[:3] for line in said.splitlines() if line.startswith("eth0")]
    assert routes == [["eth0", "0000FEA9", "00000000"], ["eth0", "FEA9FEA9", "00000000"]]


STAGES = """\
FROM busybox AS made
RUN --mount=type=cache,target=/c --mount=type=secret,id=token --mount=type=ssh,required \\
 --network=none test -s /run/secrets/token && test -S $SSH_AUTH_SOCK || exit 1; \\
 echo again >> /c/log; cat /c/log; mkdir -m 2750 -p /made/d; echo x > /made/d/x; ln /made/d/x /made/y; \\
 ln -s y /made/z; chown 7:8 /made/y; chmod 4711 /made/y; busybox mkfifo /p; rm /bin/tail
COPY --link hello late /made/
RUN chmod 700 /bin; rm -r /made/z /srv; echo more >> /made/hello; \\
 dd if=/dev/zero of=/made/big bs=1024k count=2
FROM busybox
COPY --from=made --chown=9:10 /made /srv
RUN busybox grep -w $(busybox uname -n) /etc/hosts > /srv/name; echo done > /srv/done; rm -r /etc; mkdir /etc
"""


EPOCH = 1_600_000_000


def layers_of(home: Path) -> dict[str, list[tuple[Entry, int]]]:
    """What each cached step has changed, by its key; no time is later than EPOCH."""
    found = {}
    [store] = (home / "layers").iterdir()
    for key in (store / "cache/keys").iterdir():
        entries = []
        for entry, content in upper_entries(str(store / "names" / os.readlink(key) / "layer/fs")):
            data = hash(os.pread(cast(int, content), entry.size, 0)) if entry.kind == FILE else 0
            entries.append(
                (entry._replace(mtime_ns=min(entry.mtime_ns, EPOCH * 10**9), xattrs=dict(entry.xattrs)), data)
            )
        found[key.name] = entries
    return found


@pytest.fixture
def no_overlays(kernel: Path, tmp_path: Path) -> str:
    """The modules of the test's kernel but for that of overlays."""
    [modules] = (kernel.parent.parent / "lib/modules").iterdir()
    without = tmp_path / "modules" / modules.name
    shutil.copytree(modules, without, copy_function=os.symlink, ignore=shutil.ignore_patterns("overlay.ko*"))
    return str(without)


FORMS = ("tar", "docker", "oci", "ext4", "squashfs", "erofs")


def outputs(directory: Path, *forms: str) -> list[str]:
    """Options for all forms, each a file of that name."""
    return [f"--output={form},dest={directory / form}" for form in forms or FORMS]


def files_in(directory: Path) -> dict[str, str]:
    """The digest of each file in a directory, by its name."""
    found = {}
    for path in directory.iterdir():
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@pytest.mark.release
@pytest.mark.needs("root", "tester", "newuidmap", "sqfstar", "mkfs.erofs")
def test_stages_with_a_cache_and_a_secret_leave_the_same_bytes_wherever_and_by_whom_they_are_built(
    shared: Path, context: Path, configure: Any, tmp_path: Path, no_overlays: str, public_packages: str
) -> None:
    needle = f"hunter2-{os.urandom(8).hex()}"
    (tmp_path / "token").write_text(needle)
    (context / "hello").write_text("hello\n")
    os.utime(context / "hello", ns=(1, EPOCH * 10**9 - 1))
    (context / "late").write_text("when it is checked out\n")
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (tmp_path / "key").write_bytes(key)
    options = (
        *("--secret", f"id=token,src={tmp_path}/token", "--ssh", f"default={tmp_path}/key"),
        *("--iidfile", tmp_path / "id"),
    )
    base = busybox_base(tmp_path)
    homes: dict[str, Firebuild] = {}

    def build(name: str, *more: str | Path, driver: str = "qemu", **settings: Any) -> tuple[str, str]:
        """Build it, and return the image's id and what was said."""
        firebuild = homes.setdefault(name, Firebuild(tmp_path / name))
        if not firebuild.home.exists():
            firebuild.home.mkdir()
            shutil.copytree(shared / "initramfs", firebuild.home / "initramfs")
            firebuild("base", "import", "busybox", base)
        (tmp_path / f"{name}-forms").mkdir(exist_ok=True)
        # EROFS of owners that only are marks takes a newer mkfs.erofs; tests/image has that.
        forms = outputs(tmp_path / f"{name}-forms", *FORMS[:-1] if "--target" in more else FORMS)
        words = arguments(context, STAGES, *options, *forms, *more, "--config", configure(**settings))
        said = firebuild(*words, "--machine", driver, environ={"SOURCE_DATE_EPOCH": f"{EPOCH}"}).stdout
        return (tmp_path / "id").read_text(), said

    # One layer is there from the beginning, and lies between those that the machine makes.
    (context / "alone").write_text("FROM scratch\nCOPY --link hello late /made/\n")
    build("qemu", "-f", context / "alone", driver="local")
    cache = f"{tmp_path}/shared"
    in_vm, said = build("qemu", "--cache-to", f"type=local,dest={cache},mode=max")
    assert said.count("CACHED") == 1
    assert "CACHED" not in build("local", driver="local")[1]
    assert layers_of(homes["qemu"].home) == layers_of(homes["local"].home)
    assert len(layers_of(homes["qemu"].home)) == 5
    assert in_vm == build("local", driver="local")[0]
    in_all_forms = files_in(tmp_path / "qemu-forms")
    assert sorted(in_all_forms) == sorted(FORMS)
    assert in_all_forms == files_in(tmp_path / "local-forms")
    # Another user, another directory, another time.
    with home_of_tester() as home:
        for path in (base, tmp_path / "token", tmp_path / "key"):
            shutil.copy(path, home)
        shutil.copytree(context, home / "context")
        os.utime(home / "context/late")
        (home / "forms").mkdir()
        by_user = as_tester(home, public_packages, {"SOURCE_DATE_EPOCH": f"{EPOCH}"})
        by_user("base", "import", "busybox", home / base.name)
        own = ["--secret", f"id=token,src={home}/token", "--ssh", f"default={home}/key"]
        own += ["--iidfile", f"{home}/id", "--tag", "t/vm:1", *outputs(home / "forms")]
        by_user("build", "--file", home / "context/Dockerfile", *own, home / "context")
        assert (home / "id").read_text() == in_vm
        assert files_in(home / "forms") == in_all_forms
        await_end_of_processes(home)
    fetched, said = build("other", "--cache-from", f"type=local,src={cache}", driver="local")
    assert (fetched, said.count(f"CACHED from {cache}")) == (in_vm, 5)
    # Neither what the kernel can do nor what this user may do tells.
    least: dict[str, Any] = {"kernel_modules": [no_overlays], "ids": "single"}
    build("plain", "-f", context / "alone", driver="local", **least)
    by_comparing, said = build("plain", "--target", "made", **least)
    assert said.count("has no overlay file system") == said.count("CACHED") == 1
    assert by_comparing == build("local", "--target", "made", driver="local")[0]
    for name in ("plain", "local"):
        (tmp_path / f"{name}-forms/erofs").unlink()  # of other builds
    assert files_in(tmp_path / "plain-forms") == files_in(tmp_path / "local-forms")

    serial = tmp_path / "serial"
    serial.unlink()
    firebuild = homes["qemu"]
    for driver in ("qemu", "local"):
        words = arguments(context, STAGES, *options, "--config", configure(), "--machine", driver)
        assert firebuild(*words).stdout.count("CACHED") == 5
    assert not serial.exists()
    await_end_of_processes(firebuild.home)  # that of the last build removes its directory
    kept = [path for path in firebuild.home.rglob("*") if path.is_file()]
    for secret in (needle, key.decode().splitlines()[2]):
        assert [path for path in kept if contains(path, secret)] == []
    used = json.loads(firebuild("cache", "du", "--json").stdout)["entries"]
    assert sorted(row["kind"] for row in used) == ["base", "drive", "mount", *["step"] * 5]
    firebuild("cache", "prune", "--all")
    assert json.loads(firebuild("cache", "du", "--json").stdout)["entries"] != used
    assert not [*firebuild.home.glob("drives/*/names/*"), *firebuild.home.glob("cache-mounts/vm/*/0")]
    assert firebuild.leftovers() == []


def contains(path: Path, needle: str) -> bool:
    """Whether a text is in a file, whose holes may be gigabytes."""
    with path.open("rb") as file:
        end, size = 0, os.fstat(file.fileno()).st_size
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but a hole
                return False
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            if needle.encode() in os.pread(file.fileno(), end - start, start):
                return True
    return False


def test_a_drive_that_is_full_fails_the_step_with_its_output(
    firebuild: Firebuild, context: Path, configure: Any, tmp_path: Path
) -> None:
    step = "RUN echo before; dd if=/dev/zero of=/big bs=1024k count=64; s=$?; echo after $s; exit $s\n"
    options = ("--config", configure(disk_size="32MiB"), f"--keep-on-failure={tmp_path}/kept")
    done = firebuild(*arguments(context, f"FROM busybox\n{step}", *options), status=1)
    assert "No space left on device" in done.stdout
    assert "after 1" in done.stdout
    assert "Dockerfile:2: step 2/2 failed with exit code 1" in done.stderr
    assert "hint: if the machine's drive is full: machine.disk_size has its size" in done.stderr
    [kept] = (tmp_path / "kept").iterdir()
    assert f"is kept in {kept}: console.log, failure.json, rootfs.tar" in done.stdout
    assert '"message": "the command exited with status 1"' in (kept / "console.log").read_text()
    assert firebuild.leftovers() == []


@pytest.mark.root
def test_a_host_that_is_full_is_named_as_the_cause(
    firebuild: Firebuild, context: Path, configure: Any, tmp_path: Path
) -> None:
    step = "RUN dd if=/dev/zero of=/big bs=1024k count=400; sync; echo synced\nRUN echo more > /more; sync\n"
    home = tmp_path / "home"
    home.mkdir()
    prepare = (
        'mount -t tmpfs -o size=150m home "$1"; cp -r "$2"/initramfs "$2"/bases "$1"; shift 2; exec "$@"'
    )
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-ec", prepare, "sh", home, firebuild.home, firebuild.program),
            *arguments(context, f"FROM busybox\n{step}", "--config", configure()),
        ],
        capture_output=True,
        text=True,
        env=Firebuild(home).environ,
        timeout=200,
        check=False,
    )
    assert done.returncode in (1, 4), done.stdout + done.stderr
    assert "this host failed to write to a drive of the machine: is the disk of" in done.stdout + done.stderr


@pytest.mark.release
def test_a_machine_without_drivers_and_one_whose_kernel_panics_say_why(
    firebuild: Firebuild, context: Path, configure: Any, tmp_path: Path, kernel: Path
) -> None:
    bare = tmp_path / "boot/vmlinuz"
    bare.parent.mkdir()
    shutil.copy(kernel, bare)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kernel": str(bare)}, "no modules for the kernel"),
        ({"kernel_args": ["rdinit=/nothing"]}, "the machine's kernel gave up: "),
    )
    for settings, words in cases:
        config = configure(**settings)
        done = firebuild(*arguments(context, "FROM busybox\nRUN true\n", "--config", config), status=4)
        assert words in done.stderr
        assert firebuild.leftovers() == []


def test_a_killed_firebuild_leaves_no_machine_and_no_file(
    firebuild: Firebuild, context: Path, configure: Any
) -> None:
    dockerfile = "FROM busybox\nRUN echo running; sleep 4000\n"
    options = ("--progress", "rawjson", "--config", configure())
    process = firebuild.popen(*arguments(context, dockerfile, *options))
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdout as events:
        for line in events:
            if json.loads(line)["event"] == "step-output":
                break
        else:
            pytest.fail(process.stderr.read().decode())
        machines = machines_of(process.pid)
        assert machines
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert eventually(lambda: not any(is_running(pid) for pid in machines))
    assert eventually(lambda: firebuild.leftovers() == []), firebuild.leftovers()


@pytest.mark.root
def test_steps_with_a_network_reach_others_and_not_this_host(
    firebuild: Firebuild, context: Path, configure: Any
) -> None:
    require(os.access(TUN, os.R_OK | os.W_OK), f"needs {TUN}: modprobe tun")
    config = configure(network="user", name_servers=[lonely_host.ADDRESSES[1]])
    others = (lonely_host.ADDRESSES[0], "169.254.1.1", "10.0.2.2")
    ask = "; ".join(f"echo {one} $(echo hi | nc -w 9 {one} {lonely_host.PORT} 2>&1)" for one in others)
    dockerfile = f"FROM busybox\nRUN cat /etc/resolv.conf; {ask}\n"
    words = arguments(context, dockerfile, "--config", config)
    os.environ["FIREBUILD_HOME"] = str(firebuild.home)
    try:
        said = lonely_host.run("build", str(firebuild.program), *map(str, words))
    finally:
        del os.environ["FIREBUILD_HOME"]
    status, output, errors = json.loads(said)
    assert status == 0, output + errors
    assert f"nameserver {lonely_host.ADDRESSES[1]}" in output
    assert f"\n{others[0]} the host\n" in output
    assert f"\n{others[1]} nc: can't connect to remote host ({others[1]}): " in output
    assert f"\n{others[2]} nc: can't connect to remote host ({others[2]}): " in output


MOUNTS = """\
FROM busybox
RUN --mount=type=bind,target=/run/x/in --mount=type=bind,source=hello,target=/m,rw \\
 --mount=type=cache,target=/c --mount=type=tmpfs,target=/t,size=64k --network=none \\
 --mount=type=secret,id=token,required,uid=1000 --mount=type=secret,id=token,env=TOKEN \\
 cat /run/x/in/hello /m; ls -A / | grep -c firebuild; busybox stat -c '%a %u' /run/secrets/token; \\
 test "$TOKEN" = "$(cat /run/secrets/token)" && echo same; busybox awk 'NR > 2 {print $1}' /proc/net/dev; \\
 echo > /run/x/in/hello || echo refused; echo > /m && echo > /t/x && echo again >> /c/log
RUN --mount=type=cache,target=/c --mount=type=secret,id=token cat /c/log; exit 7
"""


def test_mounts_leave_nothing_in_a_layer_and_a_secret_is_nowhere(
    firebuild: Firebuild, context: Path, configure: Any, tmp_path: Path
) -> None:
    (context / "hello").write_text("hello\n")
    needle = f"hunter2-{os.urandom(8).hex()}"
    (tmp_path / "token").write_text(needle)
    options = ("--secret", f"id=token,src={tmp_path}/token", f"--keep-on-failure={tmp_path}/kept")
    done = firebuild(*arguments(context, MOUNTS, *options, "--config", configure()), status=1)
    said = done.stdout.splitlines()
    order = ("hello", "hello", "0", "400 1000", "same", "lo:", "refused", "again")
    found = [-1]
    for word in order:
        found.append(next(index for index, line in enumerate(said) if word in line and index > found[-1]))
    assert "step 3/3 failed with exit code 7" in done.stderr
    [archive] = tmp_path.glob("kept/*/rootfs.tar")
    with tarfile.open(archive) as tar:
        names = {name.strip("./").split("/")[0] for name in tar.getnames()}
    assert names == {"", "bin", "etc"}
    await_end_of_processes(firebuild.home)
    files = [path for top in (firebuild.home, tmp_path) for path in top.rglob("*") if path.is_file()]
    assert {tmp_path / "token"} == {path for path in files if contains(path, needle)}
    assert needle not in done.stdout + done.stderr
    assert firebuild.leftovers() == []
