"""What a RUN is kept from beside what its namespaces hide."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from firebuild_bootstrap.guest import kernel
from guest.build import Build, run_command

LIMIT = Path("/proc/sys/user/max_user_namespaces")
LANDLOCK = ctypes.CDLL(None).syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_ulong(1))


def aside(task: Callable[[], bytes]) -> bytes:
    """What `task` returns on a thread of its own: to the kernel these walls stand around one thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(task).result()


@pytest.mark.needs("bwrap", "busybox")
def test_a_run_makes_no_user_namespace_and_the_machine_keeps_its_own_limit(build: Build) -> None:
    before = LIMIT.read_text()
    shell = "busybox unshare -U true || echo refused; cat /proc/sys/user/max_user_namespaces"
    build.succeed(run_command(shell), run_command(shell, step=3))
    assert build.server.stdout == b"refused\n0\n" * 2
    assert LIMIT.read_text() == before


def test_the_machines_own_user_namespace_is_recognised(tmp_path: Path) -> None:
    whole = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    inside = os.stat("/proc/self/ns/user").st_ino
    assert kernel.in_initial_user_namespace() is (inside == 0xEFFFFFFD)
    assert whole or not kernel.in_initial_user_namespace()


def connect(name: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        return errno.errorcode.get(client.connect_ex(f"\0{name}"), "connected").encode()


def test_abstract_sockets_outside_are_out_of_reach_and_those_inside_are_not() -> None:
    name = f"outside-{os.getpid()}"

    def outside() -> bytes:
        kernel.leave_abstract_sockets()
        return connect(name)

    def inside() -> bytes:
        kernel.leave_abstract_sockets()
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(f"\0inside-{name}")
            own.listen()
            return connect(f"inside-{name}")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        assert connect(name) == b"connected"
        if os.geteuid() == 0:  # others need no_new_privs for it, which a sandbox sets
            assert aside(outside) == (b"EPERM" if LANDLOCK >= 6 else b"connected")
    assert os.geteuid() != 0 or aside(inside) == b"connected"


def test_a_kernel_without_scopes_keeps_its_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_LANDLOCK_WITH_SCOPES", 1000)
    name = f"outside-{os.getpid()}"

    def outside() -> bytes:
        kernel.leave_abstract_sockets()
        return connect(name)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        assert aside(outside) == b"connected"


def keyring() -> bytes:
    """The number of the session keyring (keyctl_get_keyring_ID(3))."""
    number = kernel._KEYCTL[os.uname().machine]
    return str(ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, ctypes.c_long(-3), 1)).encode()


def test_the_session_keyring_is_exchanged() -> None:
    def exchange() -> bytes:
        kernel.leave_session_keyring()
        before = keyring()
        kernel.leave_session_keyring()
        return b"" if before == keyring() and before != b"-1" else b"exchanged"

    assert aside(exchange) == b"exchanged"


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.ENOSYS, False), (errno.EPERM, False), (errno.EDQUOT, True)]
)
def test_keys_that_can_not_be_left_behind_end_the_run_and_missing_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    class Libc:
        def syscall(self, *arguments: object) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(kernel, "_libc", Libc)
    if raised:
        with pytest.raises(OSError, match="keyctl"):
            kernel.leave_session_keyring()
    else:
        kernel.leave_session_keyring()


def test_an_unknown_machine_has_no_keys_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keyring()
    monkeypatch.setattr(kernel, "_KEYCTL", {})
    kernel.leave_session_keyring()
    monkeypatch.undo()
    assert keyring() == before


NO_NEW_PRIVS = 38  # PR_SET_NO_NEW_PRIVS, which a sandbox sets


def test_system_calls_that_no_build_needs_are_refused_and_others_are_not() -> None:
    def attempts() -> bytes:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        kernel.refuse_system_calls()
        refused = (*kernel._REFUSED_EVERYWHERE, *kernel._REFUSED[os.uname().machine])
        found = set()
        for number in refused:
            libc.syscall(ctypes.c_long(number), 0, None, 0, 0, 0)
            found.add(errno.errorcode[ctypes.get_errno()])
        # The numbers beside them, with arguments that do no harm.
        for number in (424, 428, min(kernel._REFUSED[os.uname().machine]) - 1):
            libc.syscall(ctypes.c_long(number), -1, None, 0, 0, 0)
            found.add(f"beside {errno.errorcode[ctypes.get_errno()] == 'ENOSYS'}")
        return " ".join(sorted(found)).encode()

    assert aside(attempts) == b"ENOSYS beside False"


def test_a_kernel_without_filters_keeps_its_system_calls_and_one_that_forbids_them_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Libc:
        number = errno.EINVAL

        def prctl(self, *arguments: object) -> int:
            ctypes.set_errno(self.number)
            return -1

    monkeypatch.setattr(kernel, "_libc", Libc)
    kernel.refuse_system_calls()
    monkeypatch.setattr(Libc, "number", errno.EACCES)
    with pytest.raises(OSError, match="seccomp"):
        kernel.refuse_system_calls()
