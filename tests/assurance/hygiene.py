"""Commands that are given secrets, which are in no place afterwards that docs/security.md does not name."""

from __future__ import annotations

import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from assurance.commands import Started
from assurance.hosts import meanwhile
from assurance.searching import KEY, TOKEN, Allowed, Found, Search, Watch, walk
from assurance.trials import Effort, trial
from baoserver import DevServer, add_role, sign_policy, write_policy
from firebuild_pki.keys import generate_key
from firebuild_pki.x509 import Validity, make_root, to_pem
from machine_qemu.kernels import kernel_of_tests
from pki_cluster.scene import Scene
from registry.servers import CA, PASSWORD, USER, debian_registry
from support import eventually, family

FILE, VARIABLE = "the secret of a file", "the secret of a variable"
PASSPHRASE, CA_KEY = "the passphrase of the CA", "the key of the CA"
LOGIN, SECRET_ID = "the login of the registry", "the secret id of Vault"
GIVEN: Final = frozenset({VARIABLE, PASSPHRASE, LOGIN})
"""What is in the environment of the command."""
RUN: Final = (
    "RUN --mount=type=secret,id=file --mount=type=secret,id=variable,env=VARIABLE "
    'read -r text < /run/secrets/file && test "$text" && test "$VARIABLE" && busybox sleep 0.3'
)
INSIDE: Final = frozenset({VARIABLE})
"""What may be in the environment of what runs in a sandbox."""
ENDS: Final = (None, None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGQUIT, signal.SIGSEGV)
CORES: Final = (signal.SIGQUIT, signal.SIGSEGV)
PROGRESS: Final = ("plain", "rawjson", "quiet")
FORMS: Final = ("tar", "ext4", "erofs", "squashfs", "oci", "docker", "dir")
SHARED_MEMORY: Final = Path("/dev/shm")


def a_secret() -> bytes:
    """Return a text that is nowhere by chance."""
    return secrets.token_hex(20).encode()


@dataclass(frozen=True)
class Given:
    """What the user has, in files that are not looked at.

    Args:
        directory: of these files.
        secrets: by their names.
        environ: those that are variables of the commands.
        host: of the registry.
        providers: those of the configurations in the directory.
    """

    directory: Path
    secrets: Mapping[str, bytes]
    environ: Mapping[str, str]
    host: str
    providers: tuple[str, ...]


def file_provider(directory: Path, passphrase: bytes) -> tuple[dict[str, Any], bytes]:
    """Make a CA whose key is encrypted: its block of settings, and the number that is the key."""
    now = datetime.now(UTC)
    root = make_root(
        generate_key(), Validity(now - timedelta(hours=1), now + timedelta(days=9)), with_intermediate=False
    )
    certificate, key = directory / "ca.pem", directory / "ca-key.pem"
    certificate.write_bytes(to_pem([root.certificate]))
    key.touch(mode=0o600)
    encryption = serialization.BestAvailableEncryption(passphrase)
    form = serialization.PrivateFormat.PKCS8
    key.write_bytes(root.key.private_bytes(serialization.Encoding.PEM, form, encryption))
    assert isinstance(root.key, ec.EllipticCurvePrivateKey)
    number = root.key.private_numbers().private_value.to_bytes(32, "big")
    block = {"ca_cert": str(certificate), "ca_key": str(key), "ca_key_passphrase": {"env": "CA_PASSPHRASE"}}
    return block, number


def given(cleanup: ExitStack, directory: Path, work: Path) -> Given:
    """Start the servers, and write the configurations and the secrets.

    Args:
        cleanup: ends the servers.
        directory: for all of it.
        work: where the audit log goes.
    """
    directory.mkdir()
    bao = cleanup.enter_context(DevServer(directory))
    scene = Scene.made(bao.api, "pki")
    add_role(bao.api, "peer", suffix="example")
    write_policy(bao.api, "pki", sign_policy("server", "guest", "peer", revoke=True))
    vault = scene.section(bao.address, framework={"revoke_at_end": True}, peer_role="peer")
    vault["vault"]["auth"]["secret_id"] = {"file": str(directory / "secret-id")}
    known = {name: a_secret() for name in (FILE, VARIABLE, PASSPHRASE)}
    block, number = file_provider(directory, known[PASSPHRASE])
    known |= {CA_KEY: number, LOGIN: PASSWORD.encode(), SECRET_ID: scene.login.secret_id.encode()}
    (directory / "secret-id").write_bytes(known[SECRET_ID])
    (directory / "secret").write_bytes(known[FILE] + b"\n")
    (directory / "registry").mkdir()
    ca = CA.made(directory / "registry")
    host = cleanup.enter_context(debian_registry(directory / "registry", ca))
    login = {"ca_file": str(ca.certificate), "username": USER, "password": {"env": "REGISTRY_PASSWORD"}}
    log: dict[str, Any] = {"observers": ["audit-log"], "audit-log": {"path": str(work / "audit.jsonl")}}
    sections: dict[str, dict[str, Any]] = {
        "embedded": {"provider": "embedded"},
        "file": {"provider": "file", "file": block},
        "vault": vault,
    }
    for name, section in sections.items():
        settings = {"ca": section | log, "registries": {"hosts": {host: login}}}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    environ = {
        "BUILD_SECRET": known[VARIABLE].decode(),
        "CA_PASSPHRASE": known[PASSPHRASE].decode(),
        "REGISTRY_PASSWORD": PASSWORD,
        "ROLE_ID": scene.login.role_id,
    }
    return Given(directory, known, environ, host, tuple(sections))


class Bench:
    """Commands, each of which is watched while it runs, and all that they wrote.

    Args:
        effort: counts them.
        cleanup: ends the servers.
    """

    def __init__(self, effort: Effort, cleanup: ExitStack) -> None:
        self._effort = effort
        self._seen = effort.directory / "seen"
        self._home, self._work, self._out = (self._seen / name for name in ("home", "work", "out"))
        for name in ("home", "work", "out", "tmp", "user", "run"):
            (self._seen / name).mkdir(parents=True, mode=0o700)
        self._given = given(cleanup, effort.directory / "given", self._work)
        self._search = Search(self._given.secrets)
        # One in a machine takes longer than a short form of this trial, without KVM.
        self._kernel = kernel_of_tests() if effort.seconds >= 60 else None
        self._context = effort.directory / "context"
        self._context.mkdir()
        shutil.copy("/bin/busybox", self._context / "sh")
        for name, last in (("Dockerfile", "RUN busybox sleep 0.1"), ("Failing", "RUN exit 3")):
            lines = ("FROM scratch", "COPY sh /bin/sh", "COPY sh /bin/busybox", RUN, last)
            (self._context / name).write_text("".join(f"{line}\n" for line in lines))
        home = self._home
        self._allowed = (
            # While they are written they have names of their own, and this mode.
            Allowed(KEY, f"{self._out}/tls[0-9]*/(server|guest)-key\\.pem"),
            Allowed(KEY, f"{self._out}/tls[0-9]*/\\.(server|guest)-key\\.pem\\.[0-9a-f]{{8}}"),
            Allowed(KEY, f"{home}/identities/(ca|ca-former)\\.pem"),
            Allowed(KEY, f"{home}/identities/\\.ca-\\w+"),
        )
        self._tag = f"{self._given.host}/app:1"
        config = ("--config", str(self._config("embedded")))
        first = self._start("build", "-q", "-t", self._tag, *self._secrets(), *config, str(self._context))
        assert first.end().in_words().status == 0
        self._number = 0

    def _secrets(self) -> tuple[str, ...]:
        file = f"id=file,src={self._given.directory / 'secret'}"
        return ("--secret", file, "--secret", "id=variable,env=BUILD_SECRET")

    def _config(self, provider: str) -> Path:
        return self._given.directory / f"{provider}.yaml"

    def _start(self, *words: str) -> Started:
        names = {
            "FIREBUILD_HOME": "home",
            "HOME": "user",
            "TMPDIR": "tmp",
            "XDG_RUNTIME_DIR": "run",
            "XDG_STATE_HOME": "user/state",
            "XDG_CACHE_HOME": "user/cache",
        }
        environ = {name: str(self._seen / folder) for name, folder in names.items()}
        if self._kernel:
            environ["FIREBUILD_MACHINE__QEMU__KERNEL"] = str(self._kernel)
            environ["FIREBUILD_BOOTSTRAP__INITIAL_TIMEOUT"] = "4m"
            environ["FIREBUILD_MACHINE__DISK_SIZE"] = "1GiB"  # it is looked at with its holes
        environ |= {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "SOURCE_DATE_EPOCH": "0",
            "FIREBUILD_PULL": "never",
        }
        return Started(words, {**environ, **self._given.environ}, cwd=self._work)

    def works(self) -> dict[str, tuple[str, ...]]:
        """Return commands by their names; each is for one provider, and writes to a place of its own."""
        self._number += 1
        chance, new = self._effort.chance, f"{self._out}/{self._number}"
        form, progress = chance.choice(FORMS), chance.choice(PROGRESS)
        build = ("build", "--no-cache", "--progress", progress, *self._secrets())
        cache = f"type=local,dest={new}.cache,mode=max"
        context = str(self._context)
        run = ("run", "--machine", "local", "--identity", "web.example")
        sleep = ("/bin/busybox", "sleep", "0.5")
        issue = (
            "ca",
            "issue",
            "--server",
            "a.firebuild.internal",
            "--guest",
            "a",
            "--out",
            f"{self._out}/tls{self._number}",
        )
        alone = {"build in QEMU": (*build, "--machine", "qemu", context)} if self._kernel else {}
        return {
            **alone,
            "build": (*build, "-t", "app:1", "-o", f"{form},dest={new}.{form}", "--cache-to", cache, context),
            "build that fails": (
                *build,
                "-f",
                f"{context}/Failing",
                f"--keep-on-failure={new}.kept",
                context,
            ),
            "build --push": (*build, "-t", self._tag, "--push", "--provenance=mode=max", "--sbom", context),
            "images export": ("images", "export", self._tag, "-o", f"{form},dest={new}.{form}"),
            "images push": ("images", "push", self._tag),
            "run": (*run, "--identity-key", chance.choice(["host", "machine"]), self._tag, *sleep),
            "run --detach": (*run, "--detach", "--rm", self._tag, *sleep),
            "ca check": ("ca", "check"),
            "ca check --json": ("ca", "check", "--json"),
            "ca issue": issue,
            "config show": ("config", "show"),
            "images provenance": ("images", "provenance", self._tag),
        }

    def attempt(self, name: str) -> None:
        """Run a command, end it in some way, and look at all that it may have written or shown."""
        chance = self._effort.chance
        words = self.works()[name]
        at = 2 if words[0] in ("ca", "config", "images") else 1
        provider = chance.choice(self._given.providers)
        if words[0] != "images" or chance.random() < 0.5:
            words = (*words[:at], "--config", str(self._config(provider)), *words[at:])
        number = chance.choice(ENDS)
        started = self._start(*words)
        with Watch(self._search, started.process.pid, GIVEN, INSIDE) as watch:
            found = set[Found]()
            with meanwhile(lambda: found.update(self._look())):
                if number:
                    self._trouble(started, number)
                ended = started.end()
            found |= self._look()
            assert eventually(lambda: not watch.living()), f"{watch.living()} are left of {ended}"
        found |= watch.found | self._look()
        found |= self._search.data((ended.out + ended.err).encode(), "the output")
        self._clear()
        self._effort.counts["processes looked at"] += len(watch.seen)
        assert not found, f"{sorted(found)}\n{ended}\n{number!r}"
        assert "Traceback" not in ended.out + ended.err, str(ended)
        if number is None:
            ended.in_words()

    def _trouble(self, started: Started, number: int) -> None:
        """Send a signal to the command or to one of its processes, at some moment."""
        chance = self._effort.chance
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(chance.random() * 1.5)
        pids = family({started.process.pid}) if chance.random() < 0.3 else {started.process.pid}
        pid = chance.choice(sorted(pids))
        if number == signal.SIGINT and pid == started.process.pid:
            started.interrupt(number)
            return
        with suppress(OSError):  # it has ended
            # Before its first line it is a Python like any other, which dumps core with its environment.
            if number not in CORES or eventually(lambda: has_begun(pid), 20):
                os.kill(pid, number)

    def _clear(self) -> None:
        """Remove what was written, but for the store: what is there was looked at."""
        for folder in (self._out, self._work, self._seen / "tmp"):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _look(self) -> set[Found]:
        found = self._search.tree(self._seen, self._allowed)
        found |= self._search.tree(self._given.directory / "registry" / "data")
        shared = (self._search.file(path) for path in walk(SHARED_MEMORY))
        # It is everybody's: keys and tokens may be those of other programs.
        return found | {each for each in set().union(*shared) if each.what not in (KEY, TOKEN)}


def has_begun(pid: int) -> bool:
    """Tell whether a process has given up core dumps, as each command does first (proc_pid_limits(5))."""
    return (
        re.search(r"^Max core file size +0 ", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
        is not None
    )


@contextmanager
def core_dumps() -> Iterator[None]:
    """Let the processes that are started in the block dump core, where the kernel does that into files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@trial(
    "key-hygiene",
    "commands that get secrets, ended in all ways, and whether files, processes or output show them",
    seconds=300,
    needs=("busybox", "userns", "bao", "docker-registry", "mkfs.erofs", "sqfstar"),
)
def hygiene(effort: Effort) -> None:
    """Run commands with each CA, let some of them end badly, and look."""
    with ExitStack() as cleanup:
        cleanup.enter_context(core_dumps())
        bench = Bench(effort, cleanup)
        while effort.goes_on():
            for name in effort.shuffled(bench.works()):
                effort.attempt(name, partial(bench.attempt, name))
