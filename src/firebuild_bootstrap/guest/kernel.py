"""The system calls that Python 3.11 has no function for, through the C library (man 2 of each name)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
PLAIN = MS_NOSUID | MS_NODEV | MS_NOEXEC
_MNT_DETACH = 2

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1
# The newer system calls have one number on all architectures; the rest is from linux/landlock.h.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1
_LANDLOCK_WITH_SCOPES = 6
# The only user namespace with a fixed number: the machine's own (PROC_USER_INIT_INO in linux/proc_ns.h).
_INITIAL_USER_NAMESPACE = "user:[4026531837]"


# linux/seccomp.h and linux/audit.h
_PR_SET_SECCOMP = 22
_SECCOMP_FILTER = 2
_SECCOMP_ALLOW = 0x7FFF0000
_SECCOMP_ERRNO = 0x00050000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
# linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_ALU|BPF_AND|BPF_K, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_LOAD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # in struct seccomp_data
_LOAD_NUMBER = ((_LOAD, 0, 0, _NUMBER), (_AND, 0, 0, ~_X32_BIT & 0xFFFFFFFF))
# io_uring_setup, io_uring_enter, io_uring_register
_REFUSED_EVERYWHERE = (425, 426, 427)
# add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd
_REFUSED = {"x86_64": (248, 249, 250, 298, 321, 323), "aarch64": (217, 218, 219, 241, 280, 282)}


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones."""
    _check(_libc().unshare(flags), "unshare")


def address_space_problem(needed: int) -> str:
    """Say that this process can have less than `needed` bytes of addresses (ulimit -v); empty if not.

    gRPC's core aborts the process where it gets none, without a word.
    """
    import resource  # of no use elsewhere

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return ""
    return (
        f"the limit of this process's address space (ulimit -v) is {limit >> 20} MiB, "
        f"and gRPC needs {needed >> 20} MiB"
    )


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount `source` on `target`; empty strings are passed as NULL."""
    encoded = [os.fsencode(text) if text else None for text in (source, target, kind, data)]
    result = _libc().mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mount {kind or source} on {target}")


def mount_unswapped(target: str, data: str) -> None:
    """Mount a tmpfs for secrets, which gets to no disk where the kernel lets that be said."""
    try:  # not in user namespaces, nor before Linux 6.4 (tmpfs(5))
        mount("tmpfs", target, "tmpfs", PLAIN, f"{data},noswap")
    except OSError:
        mount("tmpfs", target, "tmpfs", PLAIN, data)


def detach(target: str) -> None:
    """Unmount `target` lazily."""
    _check(_libc().umount2(os.fsencode(target), _MNT_DETACH), f"umount {target}")


def unmount(target: str) -> None:
    """Unmount `target`; an error while anything on it is in use."""
    _check(_libc().umount2(os.fsencode(target), 0), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root of this mount namespace and put the old one at `old`."""
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: unknown machine type {os.uname().machine}")
    _check(_libc().syscall(ctypes.c_long(number), os.fsencode(new), os.fsencode(old)), "pivot_root")


def raise_loopback() -> None:
    """Bring up the loopback interface of this network namespace (netdevice(7)), which begins without."""
    import fcntl  # only few commands need this and the next one
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("=16sH22x", b"lo", _IFF_UP))


def wipe(memory: bytearray) -> None:
    """Overwrite what is in `memory` with zeros."""
    memory[:] = bytes(len(memory))


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent thread ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def hide_memory() -> None:
    """Keep this process out of core dumps and of the reach of others with the same uid."""
    _prctl(_PR_SET_DUMPABLE, 0)


def hide_arguments() -> None:
    """Blank this process's command line, which anybody in its pid namespace could read."""
    with open("/proc/self/stat", "rb") as file:
        # After the name in parentheses; arg_start and arg_end are fields 48 and 49 (proc(5)).
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    ctypes.memset(start, 0, end - start)


def in_initial_user_namespace() -> bool:
    """Say whether this process is in the machine's own user namespace, and so in no sandbox."""
    return os.readlink("/proc/self/ns/user") == _INITIAL_USER_NAMESPACE


def leave_session_keyring() -> None:
    """Exchange the inherited session keyring, with the caller's keys in it, for an empty one.

    Where the kernel has no keys, or keeps this process away from all of them, there is nothing to leave.
    """
    number = _KEYCTL.get(os.uname().machine)
    if number is None:
        return
    result = _libc().syscall(ctypes.c_long(number), ctypes.c_long(_KEYCTL_JOIN_SESSION_KEYRING), None)
    if result < 0 and ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
        _check(-1, "keyctl")


def leave_abstract_sockets() -> None:
    """Keep this process from abstract UNIX sockets outside of it and its children (landlock(7)).

    They belong to the network namespace and so are not hidden by any other. Linux can do so since 6.12;
    before, nothing happens.
    """
    system_call = _libc().syscall
    version = ctypes.c_ulong(_LANDLOCK_CREATE_RULESET_VERSION)
    create = ctypes.c_long(_LANDLOCK_CREATE_RULESET)
    if system_call(create, None, ctypes.c_size_t(0), version) < _LANDLOCK_WITH_SCOPES:
        return
    # handled_access_fs, handled_access_net, scoped
    rules = struct.pack("=3Q", 0, 0, _LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET)
    ruleset = _check(system_call(create, rules, ctypes.c_size_t(len(rules)), ctypes.c_ulong(0)), "landlock")
    restrict = ctypes.c_long(_LANDLOCK_RESTRICT_SELF)
    try:
        _check(system_call(restrict, ctypes.c_int(ruleset), ctypes.c_ulong(0)), "landlock")
    finally:
        os.close(ruleset)


def refuse_system_calls() -> None:
    """Take system calls away from this process that no build needs and that lead deep into the kernel.

    They fail with ENOSYS, which programs are prepared for, as on a kernel that was built without them. One
    without seccomp filters keeps them.

    Raises:
        OSError: there are filters, and it may not set one.
    """
    machine = os.uname().machine
    special = _REFUSED.get(machine, ())
    common = _REFUSED_EVERYWHERE
    end = len(common) + len(special) + 4
    program = [
        *_LOAD_NUMBER,
        *((_JUMP_IF_EQUAL, end - at, 0, number) for at, number in enumerate(common)),
        (_LOAD, 0, 0, _ARCHITECTURE),  # programs of another one have other numbers
        (_JUMP_IF_EQUAL, 0, len(special) + len(_LOAD_NUMBER), _AUDIT_ARCH.get(machine, 0)),
        *_LOAD_NUMBER,
        *((_JUMP_IF_EQUAL, len(special) - at, 0, number) for at, number in enumerate(special)),
        (_RETURN, 0, 0, _SECCOMP_ALLOW),
        (_RETURN, 0, 0, _SECCOMP_ERRNO | errno.ENOSYS),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    filtered = struct.pack("@HP", len(program), ctypes.addressof(code))
    mode, address = ctypes.c_ulong(_SECCOMP_FILTER), ctypes.c_char_p(filtered)
    if _libc().prctl(_PR_SET_SECCOMP, mode, address, 0, 0) < 0 and ctypes.get_errno() != errno.EINVAL:
        _check(-1, "seccomp")


def drop_capabilities(keep: frozenset[int]) -> None:
    """Drop every capability outside `keep` from all sets, the bounding set included."""
    number = 0
    while _libc().prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in keep:
            _prctl(_PR_CAPBSET_DROP, number)
        number += 1
    _libc().prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # EINVAL before Linux 4.3
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc().capget(header, data), "capget")
    words = struct.unpack("=6I", data.raw)
    masks = [sum(1 << (item - base) for item in keep if base <= item < base + 32) for base in (0, 32)]
    now = [words[1] & masks[0], words[4] & masks[1]]
    # Inheritable stays empty: a file with inheritable capabilities must not pass them on.
    _check(_libc().capset(header, struct.pack("=6I", now[0], now[0], 0, now[1], now[1], 0)), "capset")


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def receive_descriptors(control: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes, and up to `most` descriptors with them, which are closed on exec (unix(7)).

    Not by `socket.recv_fds`, which ignores its flags (python/cpython#128881): what is executed next would
    inherit them.

    Raises:
        OSError: as recvmsg(2).
    """
    from socket import CMSG_LEN, MSG_CMSG_CLOEXEC

    number = struct.Struct("=i")
    data, messages, _, _ = control.recvmsg(size, CMSG_LEN(most * number.size), MSG_CMSG_CLOEXEC)
    return data, [descriptor for _, _, each in messages for (descriptor,) in number.iter_unpack(each)]
