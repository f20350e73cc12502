"""The helper that stands between vminit and a RUN: makes the sandbox, becomes the user, executes.

Processes of its own, because namespaces and forks don't go together with gRPC's threads. The request is
a JSON object on standard input (never in argv, which others can read), and after it the secrets as bytes,
which unlike text can be wiped; what goes wrong before the command
runs is reported as JSON on a descriptor. Four processes take part:

    L  the launcher: forks an A for each RUN, and passes on its exit status. It is forked from vminit before
       that has read its metadata, so that no key ever was in its memory, and never sees a request itself. A
       Python of its own for each RUN would take half of the time of a short one.
    A  unshares, waits for B and ends as it has
    B  process 1 of the new pid namespace; mounts, forks C, reaps; when B ends the kernel kills the rest
    C  drops privileges and executes the command
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

from firebuild_bootstrap.polling import readable

from . import kernel
from .mounts import BadMount, MountPoint, enter_root

_NET_RAW, _CAPABILITIES = 13, 64  # linux/capability.h; more than there are
# What container engines leave to a process by default, by number (linux/capability.h).
KEPT_CAPABILITIES = frozenset(
    {
        0,  # CHOWN
        1,  # DAC_OVERRIDE
        3,  # FOWNER
        4,  # FSETID
        5,  # KILL
        6,  # SETGID
        7,  # SETUID
        8,  # SETPCAP
        10,  # NET_BIND_SERVICE
        _NET_RAW,
        18,  # SYS_CHROOT
        27,  # MKNOD
        29,  # AUDIT_WRITE
        31,  # SETFCAP
    }
)
NOT_EXECUTABLE = 126
NOT_FOUND = 127
STARTED = b"+"
"""What comes with the descriptors: of the command's process, of the channel for probes where it may have some
(probing.py), and of its terminal where it has one."""
CONNECT, CONNECTED = b"connect", b"connected"
"""What the host is asked for the network of the process that asks, and what it answers when that has a way
out; anything else is why it has none."""
# A pipe holds more (pipe(7)), so that writing the report never waits for the reader.
_MAX_REPORT = 4000


# The package is found by its path, because -I and -S keep everything else of the environment out.
_LAUNCHER = (
    "import socket, sys; sys.path.append(sys.argv[1]); "
    "from firebuild_bootstrap.guest.enter import serve; "
    "serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))"
)
_PACKAGES = os.path.realpath(f"{__file__}/../../..")

_HEAD_BYTES = 16
# What comes with descriptors, and how many at once: the kernel takes 253 (SCM_MAX_FD, unix(7)).
_MORE, _LAST = b"+", b"."
_AT_ONCE = 200


class Request(NamedTuple):
    """What to execute and as whom.

    Args:
        root: directory of the image.
        argv: the command.
        env: its whole environment but for secrets.
        workdir: where it begins.
        uid: its user.
        gid: its group.
        groups: its supplementary groups.
        script: text of a file to run instead of `argv`.
        mounts: see `enter_root`.
        hidden: see `enter_root`.
        own_network: with nothing but a loopback interface.
        secrets: bytes of each secret, which follow the request.
        secret_env: variables, each with the number of the secret that is its value.
        attached: the command is what the machine is there for; its descriptors are sent (attached.py).
        input: what follows the request and the secrets is its standard input.
        terminal: its streams are a new terminal.
        read_only: the image can't be written to.
        init: the command itself is process 1, and keeps all rights.
        probed: process 1 executes what it is asked for meanwhile (probing.py).
    """

    root: str
    argv: tuple[str, ...]
    env: dict[str, str]
    workdir: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    script: str | None = None
    mounts: tuple[MountPoint, ...] = ()
    hidden: str = ""
    own_network: bool = False
    secrets: tuple[int, ...] = ()
    secret_env: tuple[tuple[str, int], ...] = ()
    attached: bool = False
    input: bool = False
    terminal: bool = False
    read_only: bool = False
    init: bool = False
    probed: bool = False

    def to_bytes(self) -> bytes:
        """Write the request as the helper reads it: its length, itself; the secrets come after it."""
        data = json.dumps(self._asdict()).encode("ascii")
        return b"%0*x" % (_HEAD_BYTES, len(data)) + data

    @classmethod
    def read(cls, descriptor: int) -> tuple[Request, tuple[bytearray, ...]]:
        """Read what `to_bytes` wrote, and the secrets.

        Raises:
            OSError: it is not complete; whoever wrote it has died.
        """
        data = _read(descriptor, int(_read(descriptor, _HEAD_BYTES), 16))
        members = json.loads(data)
        for name in ("argv", "groups", "secrets"):
            members[name] = tuple(members[name])
        members["mounts"] = tuple(MountPoint(*each) for each in members["mounts"])
        request = cls(**members)
        return request, tuple(_read(descriptor, size) for size in request.secrets)


def _read(descriptor: int, size: int) -> bytearray:
    """Read exactly `size` bytes, past all buffers that could keep a copy."""
    memory = bytearray(size)
    view = memoryview(memory)
    while view:
        read = os.readv(descriptor, [view])
        if not read:
            raise OSError(errno.EPIPE, "the request is not complete")
        view = view[read:]
    return memory


class Launcher:
    """Starts the helpers of RUNs, one after the other: a process without threads that forks.

    Args:
        fork: make it out of this process, which has no other thread yet, rather than of a new Python.
        uplink: a socket, which it takes over: RUNs get a network of their own, which the host connects with
            its own when it is asked over this socket. -1 for the network around.
    """

    def __init__(self, *, fork: bool = False, uplink: int = -1) -> None:
        self._control, other = socket.socketpair()
        with other:
            self._pid = self._forked(other, uplink) if fork else self._spawned(other, uplink)
        if uplink >= 0:
            os.close(uplink)

    def _forked(self, other: socket.socket, uplink: int) -> int:
        pid = os.fork()
        if pid == 0:
            self._control.close()
            with open(os.devnull, "r+b") as null:  # vminit's own are read until everybody has closed them
                for descriptor in range(3):
                    os.dup2(null.fileno(), descriptor)
            close_others(other.fileno(), uplink)
            serve(other, uplink)
        return pid

    def _spawned(self, other: socket.socket, uplink: int) -> int:
        command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _LAUNCHER, _PACKAGES]
        import subprocess  # takes longer than all the rest, and the other way goes without

        process = subprocess.Popen(
            [*command, str(other.fileno()), str(uplink)],
            stdin=subprocess.DEVNULL,
            # Some Pythons find their own library only through it; the command itself gets its request's.
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            pass_fds=[number for number in (other.fileno(), uplink) if number >= 0],
            cwd="/",
        )
        process.returncode = 0  # it is reaped here
        return process.pid

    def start(self, *descriptors: int) -> None:
        """Start a helper.

        Args:
            descriptors: its standard input, output and error; what takes the report of a failure, closed
                without one when the command runs; and locks, open as long as anything of the command runs.
        """
        with suppress(BrokenPipeError):  # `wait` tells
            while descriptors:
                now, descriptors = descriptors[:_AT_ONCE], descriptors[_AT_ONCE:]
                socket.send_fds(self._control, [_MORE if descriptors else _LAST], now)

    def wait(self) -> int:
        """Return the exit status of the helper, as shells have it."""
        with suppress(ConnectionResetError):
            if status := self._control.recv(1):
                return status[0]
        return 128 + signal.SIGKILL

    def kill(self) -> None:
        """End the launcher, and with it the helper and all that it has started; harmless when repeated."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """End the launcher and forget it."""
        if self._pid:
            self.kill()
            os.waitpid(self._pid, 0)
            self._pid = 0
            self._control.close()


class _Refused(Exception):
    """The command can't be executed: a message and the exit status that shells use for it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def close_others(*needed: int) -> None:
    """Close all that vminit was started with: a RUN could count the descriptors of its process 1."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in (0, 1, 2, *needed):
            with suppress(OSError):  # that of the list
                os.close(int(name))


def serve(control: socket.socket, uplink: int = -1) -> NoReturn:
    """Be a launcher, with a single thread, until the other end of `control` is closed or vminit has ended.

    Args:
        uplink: see `Launcher`.
    """
    kernel.die_with_parent(signal.SIGKILL)
    os.chdir("/")
    launcher = os.getpid()
    disconnected = _connect(uplink) if uplink >= 0 else ""
    descriptors: list[int] = []
    while True:
        word, received = kernel.receive_descriptors(control, 1, _AT_ONCE)
        descriptors += received
        if not word:
            os._exit(0)
        if word == _MORE:
            continue
        child = os.fork()
        if child == 0:
            control.close()
            _help(descriptors, launcher, disconnected)
        while descriptors:
            os.close(descriptors.pop())
        control.sendall(bytes([exit_status(os.waitpid(child, 0)[1])]))


def _connect(uplink: int) -> str:
    """Move to a network of our own that the host connects with its own; return why there is none, if so."""
    from . import init_network

    try:
        kernel.unshare(kernel.CLONE_NEWNET)
        kernel.raise_loopback()
        with socket.socket(fileno=uplink) as host:
            host.send(CONNECT)
            answer = host.recv(_MAX_REPORT)
        if answer != CONNECTED:
            return answer.decode("utf-8", "replace") or "the host has closed the connection"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for destination, netmask in init_network.CLOSED:
                init_network.reject(control, destination, netmask)
        # A packet socket (packet(7)) asks no routing table.
        kernel.drop_capabilities(frozenset(range(_CAPABILITIES)) - {_NET_RAW})
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _help(descriptors: Sequence[int], launcher: int, disconnected: str) -> NoReturn:
    """Read the request from standard input, execute it, and exit with the command's own status.

    Args:
        disconnected: why there is no network but one without a way out; empty where there is.
    """
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)  # it ended before the kernel was asked to tell
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    status = descriptors[3]
    os.umask(0o022)
    with _reporting(status):
        request, secrets = Request.read(0)
        kernel.leave_session_keyring()
        if request.own_network:
            _leave_network()
        elif disconnected:
            reason = f"there is no network for RUN steps: {disconnected}"
            raise _Refused(reason, NOT_EXECUTABLE)
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC)
    alive, held = socket.socketpair()
    child = os.fork()
    if child == 0:
        held.close()
        with _reporting(status):
            _first_process(request, secrets, status, alive)
    _wipe(secrets)
    alive.close()
    os.close(status)
    # Its terminal stays open here: it must not end while nobody in there has it open (systemd at its start).
    kernel.receive_descriptors(held, 1, 1)
    status = exit_status(os.waitpid(child, 0)[1])
    # How the kernel ends a process 1 that has called reboot(2), to halt or to restart (pid_namespaces(7)).
    os._exit(0 if request.init and status in (128 + signal.SIGINT, 128 + signal.SIGHUP) else status)


def _leave_network() -> None:
    try:
        kernel.unshare(kernel.CLONE_NEWNET)
        kernel.raise_loopback()
    except OSError as error:  # a small kernel may have been built without
        reason = f"--network=none: this machine can't make a network of its own: {error.strerror}"
        raise _Refused(reason, NOT_EXECUTABLE) from error


def _wipe(secrets: tuple[bytearray, ...]) -> None:
    for secret in secrets:
        kernel.wipe(secret)


def _first_process(
    request: Request, secrets: tuple[bytearray, ...], status: int, parent: socket.socket
) -> NoReturn:
    kernel.die_with_parent(signal.SIGKILL)
    if readable(parent, seconds=0):
        os._exit(1)  # the parent died before the kernel was asked to tell
    # Python's handler would let a RUN end its own process 1; unhandled signals from inside don't reach it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if request.terminal:
        import fcntl  # noqa: F401 - now, because in the image there is no Python
        import termios  # noqa: F401
    if request.probed:
        from . import probing
    script = enter_root(
        request.root,
        request.script,
        request.mounts,
        secrets,
        request.hidden,
        read_only=request.read_only,
        init=request.init,
    )
    terminal = _open_terminal(parent) if request.terminal else None
    parent.close()
    # A RUN sees this process as /proc/1; with the memory hidden, even root can't read its files there.
    kernel.hide_arguments()
    kernel.hide_memory()
    argv = (script,) if script else request.argv
    if request.init:
        slave = os.dup(terminal[1]) if terminal else None
        _hand_over(status, os.getpid(), terminal, probed=False)
        _execute(request, argv, {}, slave)
    child = os.fork()
    if child == 0:
        with _reporting(status):
            secret_env = {name: bytes(secrets[number]) for name, number in request.secret_env}
            _execute(request, argv, secret_env, terminal[1] if terminal else None)
    _wipe(secrets)
    channel = _hand_over(status, child, terminal, probed=request.probed) if request.attached else None
    os.close(status)
    if channel is not None:
        os._exit(exit_status(probing.serve(channel, child, lambda argv: _probe(request, argv))))
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    while True:
        pid, result = os.wait()
        if pid == child:
            os._exit(exit_status(result))


def _open_terminal(parent: socket.socket) -> tuple[int, int]:
    """Open a terminal of the command's own devpts, where it can find out the name, and send it to the parent.

    It is /dev/console as well, as runc has it: an init such as systemd writes to that.
    """
    terminal = os.openpty()
    with open("/dev/console", "xb"):
        pass
    kernel.mount(os.ttyname(terminal[1]), "/dev/console", flags=kernel.MS_BIND)
    socket.send_fds(parent, [STARTED], terminal[1:])
    return terminal


def _probe(request: Request, argv: tuple[str, ...]) -> NoReturn:
    """Execute a probe; what goes wrong before is its output."""
    try:
        _execute(request._replace(input=False), argv, {}, None)
    except BaseException as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        os._exit(error.exit_code if isinstance(error, _Refused) else NOT_EXECUTABLE)
    os._exit(NOT_EXECUTABLE)


def _hand_over(
    status: int, child: int, terminal: tuple[int, int] | None, *, probed: bool
) -> socket.socket | None:
    """Send what leads to the command, for signals, probes and its terminal; keep the channel for probes."""
    descriptors, kept = [os.pidfd_open(child)], None
    if probed:
        kept, other = socket.socketpair()
        descriptors.append(other.detach())
    if terminal is not None:
        descriptors.append(terminal[0])
        os.close(terminal[1])
    with socket.socket(fileno=os.dup(status)) as channel, suppress(BrokenPipeError):
        socket.send_fds(channel, [STARTED], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    return kept


def _execute(
    request: Request, argv: tuple[str, ...], secret_env: dict[str, bytes], terminal: int | None
) -> None:
    os.setsid()
    if terminal is not None:
        _take_terminal(terminal, request.uid)
    elif not request.input:
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
    try:
        os.chdir(request.workdir)
    except OSError as error:
        raise _Refused(f"WORKDIR {request.workdir}: {error.strerror}", NOT_EXECUTABLE) from error
    _own_pipes(request.uid)
    if not request.init:
        kernel.leave_abstract_sockets()
        kernel.refuse_system_calls()
        _become(request)
    # What is ignored or blocked stays so across exec (signal(7)): Python ignores some, and whoever runs
    # firebuild under nohup(1), or in the background of a script, others.
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # What os.execve makes of text again: the bytes as they were. Secrets win, as in BuildKit.
    env = {**request.env, **{name: os.fsdecode(value) for name, value in secret_env.items()}}
    _exec(argv, env, path_is_secret="PATH" in secret_env)


def _take_terminal(terminal: int, uid: int) -> None:
    import fcntl
    import termios

    os.fchown(terminal, uid, -1)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    os.close(terminal)


def _own_pipes(uid: int) -> None:
    """Give the command's user the pipes it has as standard streams.

    Only their owner may open /dev/stdout or /dev/stderr, where images of servers have their logs; so does
    runc (fixStdioPermissions).
    """
    for descriptor in range(3):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            with suppress(OSError):  # an owner that is not mapped: the command writes to what is open
                os.fchown(descriptor, uid, -1)


def _become(request: Request) -> None:
    try:
        os.setgroups(request.groups)
    except OSError:
        # Where one uid is mapped, groups can't be set; being root without them changes nothing.
        if (request.uid, request.gid) != (0, 0):
            raise
    os.setresgid(request.gid, request.gid, request.gid)
    # Before the change of user: dropping needs a capability that it takes away. SETUID is among those kept.
    kernel.drop_capabilities(KEPT_CAPABILITIES)
    os.setresuid(request.uid, request.uid, request.uid)


def _exec(argv: tuple[str, ...], env: dict[str, str], *, path_is_secret: bool) -> None:
    """Execute as execvp(3) does, with the PATH of the command's own environment."""
    name = argv[0]
    path = env.get("PATH", "")
    folders = [""] if "/" in name else [folder or "." for folder in path.split(":")]
    candidates = [os.path.join(folder, name) for folder in folders]
    denied = ""
    for candidate in candidates:
        shown = name if path_is_secret else candidate
        try:
            os.execve(candidate, argv, env)  # noqa: S606 - a shell would be wrong here
        except (FileNotFoundError, NotADirectoryError):
            if os.path.lexists(candidate) and not os.path.isdir(candidate):
                denied = f"{shown}: the interpreter or loader that the file names is not in the image"
                raise _Refused(denied, NOT_FOUND) from None
        except OSError as error:
            denied = denied or f"{shown}: {_why(error)}"
    if denied:
        raise _Refused(denied, NOT_EXECUTABLE)
    where = "" if "/" in name else f" in PATH={'a secret' if path_is_secret else path}"
    raise _Refused(f"{name}: not found{where}", NOT_FOUND)


def _why(error: OSError) -> str:
    if error.errno == errno.ENOEXEC:
        return "neither a program of this architecture nor a script with a #! line"
    if error.errno == errno.E2BIG:
        return "an argument or variable is longer than the kernel takes (128 KiB), or all together are"
    return error.strerror or str(error)


def exit_status(result: int) -> int:
    """Return what shells make of a status of wait(2)."""
    code = os.waitstatus_to_exitcode(result)
    return code if code >= 0 else 128 - code


class _reporting:  # noqa: N801
    """Reports an exception on the status descriptor and ends the process; nobody else would see it."""

    def __init__(self, status: int) -> None:
        self._status = status

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        code = error.exit_code if isinstance(error, _Refused) else 1
        reason = {_Refused: "command", BadMount: "file"}.get(type(error), "internal")
        known = isinstance(error, OSError | _Refused | BadMount)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        report = json.dumps({"message": text[:_MAX_REPORT], "exit_code": code, "reason": reason})
        os.write(self._status, report.encode("ascii"))
        os._exit(code)
