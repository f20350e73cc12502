"""RUN steps that try to get out of every kind of machine."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from assurance.commands import HANG
from assurance.trials import Effort, trial
from components import missing
from e2e.test_isolation import ABSTRACT, ATTACK, KEY, OF_A_USER, WITH_KEY, copy_python
from machine_qemu.kernels import kernel_of_tests
from support import BIN, await_end_of_processes, unmeasured

HERE: Final = Path(__file__).resolve().parent
KERNEL: Final = (
    *("kernel/core_pattern", "kernel/modprobe", "kernel/hostname", "kernel/domainname", "kernel/sysrq"),
    *("kernel/printk", "kernel/panic", "kernel/pid_max", "kernel/threads-max", "kernel/kptr_restrict"),
    *("kernel/dmesg_restrict", "kernel/randomize_va_space", "vm/overcommit_memory", "vm/swappiness"),
    *("vm/mmap_min_addr", "fs/file-max", "fs/suid_dumpable", "fs/protected_symlinks", "kernel/shmmax"),
    *("user/max_user_namespaces", "user/max_mnt_namespaces", "net/core/somaxconn", "net/ipv4/ip_forward"),
)
NODES: Final = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True)
class Kind:
    """A machine, and who asks for it.

    Args:
        environ: settings.
        user: who runs the command; empty for this one.
        vm: it has a kernel of its own, in which a RUN may do what it likes.
    """

    environ: dict[str, str]
    user: str = ""
    vm: bool = False


def kinds(*, with_vm: bool) -> dict[str, Kind]:
    """Return those that work here."""
    ids = "FIREBUILD_MACHINE__IDS"
    found = {"one id": Kind({ids: "single"})}
    if os.geteuid() == 0:
        found["all ids of root"] = Kind({ids: "full"})
    elif not missing(["newuidmap"]):
        found["subordinate ids"] = Kind({ids: "subids"})
    if not missing(["tester"]) and _tester_can():
        found["subordinate ids of a plain user"] = Kind({ids: "subids"}, "tester")
        found["one id of a plain user"] = Kind({ids: "single"}, "tester")
    if with_vm and (kernel := kernel_of_tests()):
        settings = {"FIREBUILD_MACHINE__DRIVER": "qemu", "FIREBUILD_MACHINE__QEMU__KERNEL": str(kernel)}
        found["virtual machine"] = Kind({**settings, "FIREBUILD_BOOTSTRAP__INITIAL_TIMEOUT": "4m"}, vm=True)
    return found


def _tester_can() -> bool:
    """Whether other users may execute the command where it is installed."""
    try:
        done = subprocess.run(
            [BIN / "firebuild", "--version"], user="tester", cwd="/", capture_output=True, check=False
        )
    except PermissionError:  # in a directory of another user
        return False
    return done.returncode == 0


class Scene:
    """A context with the attacks, and things outside that nobody may change.

    Args:
        directory: for all of it; other users can reach it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.context = directory / "context"
        self.outside = directory / "outside"
        for folder in (self.context / "python", self.outside / "folder"):
            folder.mkdir(parents=True)
        self.outside.chmod(0o777)
        (self.outside / "folder").chmod(0o777)
        (self.outside / "kept").write_text("kept")
        (self.outside / "kept").chmod(0o666)
        self.python = copy_python(self.context / "python")
        shutil.copy(ATTACK, self.context / "attack.py")
        shutil.copy(HERE / "escaping.py", self.context / "escaping.py")
        self.with_key = directory / "firebuild"
        text = WITH_KEY.format(python=sys.executable, name=KEY, firebuild=BIN / "firebuild")
        self.with_key.write_text(text)
        self.with_key.chmod(0o755)

    @contextmanager
    def sockets(self) -> Iterator[None]:
        """Listen where no RUN may call."""
        with ExitStack() as stack:
            for address in (f"\0{ABSTRACT}", str(self.outside / "socket")):
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(address)
                listener.listen()
            yield

    def world(self) -> dict[str, Any]:
        """Describe all that is outside and has to stay as it is."""
        found: dict[str, Any] = {}
        for path in sorted(self.outside.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (
                content,
                status.st_mode,
                status.st_uid,
                status.st_mtime_ns,
                os.listxattr(path),
            )
        for name in KERNEL:
            path = Path("/proc/sys", name)
            found[str(path)] = path.read_text() if path.exists() else ""
        for name in NODES:
            status = Path("/dev", name).stat()
            found[name] = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev)
        for name in ("/etc/passwd", "/etc/hosts", "/etc/resolv.conf", "/etc/ld.so.preload", "/attack.py"):
            found[name] = Path(name).read_bytes() if Path(name).is_file() else None
        found["host"] = socket.gethostname()
        return found


def dockerfile(scene: Scene, seed: int, count: int) -> str:
    """Write what attacks: by a list, by chance, in a cache mount, and by links for what the host writes."""
    run = f"{scene.python} -E -S"
    chance = f"{run} /escaping.py {seed} {count} {scene.outside} {KEY}"
    flip = f"ln -s {scene.outside} /c/way; rm -rf /c/way; mkdir -p /c/way/x; rm -rf /c/way"
    return "\n".join(
        [
            "FROM host AS attacks",
            "COPY python attack.py escaping.py /",
            f"RUN {run} /attack.py {ABSTRACT} {KEY} && echo FOUND $(cat /findings.json)",
            f"RUN --mount=type=cache,id=race,target=/c {chance}; "
            f"i=0; while test $i -lt 200; do {flip}; i=$((i+1)); done; ln -sfn {scene.outside} /c/way",
            "COPY escaping.py /planted/0/a",
            "COPY escaping.py /planted/1/",
            "COPY python/usr /planted/2/folder",
            "WORKDIR /planted/3/work",
            "RUN --mount=type=cache,id=race,target=/c --mount=type=tmpfs,target=/planted/4/t "
            "--mount=type=bind,source=escaping.py,target=/planted/5/file "
            "--mount=type=cache,target=/c/way/deep "
            "touch /planted/4/t/x /c/way/deep/x; true",
            "",
        ]
    )


def attack(effort: Effort, scene: Scene, name: str, kind: Kind) -> None:
    """Let a build attack; nothing outside may change."""
    home = scene.directory / f"home-{name.replace(' ', '-')}"
    environ = {**unmeasured(), "FIREBUILD_HOME": str(home), "FIREBUILD_PULL": "never", **kind.environ}
    user: dict[str, Any] = {}
    if kind.user:
        user = {"user": kind.user, "group": kind.user, "extra_groups": []}
        environ["HOME"] = str(scene.directory / "of-tester")
    if not home.exists():
        home.mkdir()
        if kind.user:
            entry = pwd.getpwnam(kind.user)
            os.chown(home, entry.pw_uid, entry.pw_gid)
        imported = ["base", "from-host", "host"]
        subprocess.run(
            [BIN / "firebuild", *imported], env=environ, check=True, capture_output=True, cwd="/", **user
        )
    file = scene.context / "Dockerfile"
    count = 30 if effort.seconds < 60 else 300
    file.write_text(dockerfile(scene, effort.chance.getrandbits(32), count))
    before = scene.world()
    done = subprocess.run(
        [scene.with_key, "build", "--no-cache", "--progress", "plain", str(scene.context)],
        env=environ,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=HANG * 3,
        check=False,
        **user,
    )
    said = done.stdout + done.stderr
    after = scene.world()
    changed = {path: (before.get(path), after.get(path)) for path in before.keys() | after.keys()}
    changed = {path: both for path, both in changed.items() if both[0] != both[1]}
    assert changed == {}, changed
    assert done.returncode in (0, 1), said[-3000:]  # what is mounted over a planted link may be refused
    assert "Traceback" not in done.stderr, said[-3000:]
    [tried] = re.findall(r"TRIED (\{.*\})", said) or [said[-3000:]]
    [listed] = re.findall(r"FOUND (\{.*\})", said) or ["{}"]
    report = json.loads(tried)
    for what, times in report["counts"].items():
        effort.counts[f"{what} in a RUN"] += times
    effort.counts[f"build with {name}"] += 1
    findings = json.loads(listed)
    effort.counts["attempt of the list"] += sum(
        len(findings.get(part, ())) for part in ("attempts", "hunts", "changes")
    )
    if not kind.vm:
        worked = [what.partition(": ")[2] for what in report["worked"]]
        for part in ("attempts", "hunts", "changes"):
            worked += [what for what, how in findings[part].items() if not re.fullmatch("E[A-Z]+|None", how)]
        if kind.user or os.geteuid() != 0:
            worked = [what for what in worked if not OF_A_USER.fullmatch(what)]
        assert worked == [], (worked, findings)
    assert findings["key"].startswith("E"), findings["key"]


@trial(
    "escapes",
    "RUN steps that try by a list and by chance to get out of sandboxes of all kinds of ids, and of a VM",
    seconds=300,
    needs=("userns",),
)
def escapes(effort: Effort) -> None:
    """Attack from each kind of machine in turn."""
    with tempfile.TemporaryDirectory(
        prefix="firebuild-escapes-", dir="/tmp", ignore_cleanup_errors=True
    ) as name:
        Path(name).chmod(0o755)
        scene = Scene(Path(name))
        found = kinds(with_vm=effort.seconds >= 60)
        with scene.sockets():
            while effort.goes_on():
                for each in effort.shuffled(found):
                    effort.attempt(f"attack with {each}", partial(attack, effort, scene, each, found[each]))
        await_end_of_processes(Path(name), 60)
        for home in Path(name).glob("home-*"):
            subprocess.run([BIN / "firebuild", "rm-tree", home], check=False, capture_output=True)
