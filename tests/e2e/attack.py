"""Runs in a RUN as root and tries to get out; writes what it could do to /findings.json."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial

LIBC = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
KEYCTL, CLONE, OPEN_BY_HANDLE, INIT_MODULE = (219, 220, 265, 105) if ARM else (250, 56, 304, 175)
PIDFD_GETFD = 438
NEW_USER, NEW_NS, NEW_PID = 0x10000000, 0x00020000, 0x20000000
ATTACH, BIND, REMOUNT = 16, 4096, 32


def outcome(attempt: Callable[[], object]) -> str:
    """The name of the error, or what came of the attempt."""
    ctypes.set_errno(0)
    try:
        result = attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    if isinstance(result, int) and result == -1:
        return errno.errorcode.get(ctypes.get_errno(), "?")
    return str(result)


def call(number: int, *arguments: object) -> int:
    converted = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    return int(LIBC.syscall(ctypes.c_long(number), *converted))


def read(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return file.read(100).decode("utf-8", "replace")


def write(path: str, text: str) -> str:
    with open(path, "wb", buffering=0) as file:
        file.write(text.encode())
    return "written"


def in_child(attempt: Callable[[], object]) -> str:
    """As `outcome`, in a process of its own, because it may change this one."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(into, outcome(attempt).encode())
        os._exit(0)
    os.close(into)
    os.waitpid(child, 0)
    with os.fdopen(out) as pipe:
        return pipe.read()


def clone_user() -> int:
    child = call(CLONE, NEW_USER | 17, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    return child


def out_of_the_root() -> str:
    """The classic: keep a directory open, make another the root, walk up from the open one."""
    os.mkdir("/cell")
    top = os.open("/", os.O_RDONLY)
    os.chroot("/cell")
    os.fchdir(top)
    for _ in range(50):
        os.chdir("..")
    os.chroot(".")
    return " ".join(os.listdir("/"))


def abstract(name: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"\0{name}")
    return "connected"


def own_abstract() -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0of-this-run")
        listener.listen()
        return in_child(lambda: abstract("of-this-run"))


def attempts() -> dict[str, str]:
    sys_ = "/proc/sys"
    tests: dict[str, Callable[[], object]] = {
        "core_pattern": lambda: write(f"{sys_}/kernel/core_pattern", "core"),
        "sysrq": lambda: write("/proc/sysrq-trigger", "h"),
        "drop_caches": lambda: write(f"{sys_}/vm/drop_caches", "1"),
        "max_user_namespaces": lambda: write(f"{sys_}/user/max_user_namespaces", "9"),
        "hostname": lambda: LIBC.sethostname(b"evil", ctypes.c_size_t(4)),
        "mount tmpfs": lambda: LIBC.mount(b"x", b"/mnt", b"tmpfs", 0, None),
        "mount proc": lambda: LIBC.mount(b"x", b"/mnt", b"proc", 0, None),
        "mount cgroup2": lambda: LIBC.mount(b"x", b"/mnt", b"cgroup2", 0, None),
        "unmount /proc/sys": lambda: LIBC.umount2(sys_.encode(), 2),
        "remount /proc/sys": lambda: LIBC.mount(None, sys_.encode(), None, REMOUNT | BIND, None),
        "unshare user": lambda: LIBC.unshare(NEW_USER),
        "clone user": clone_user,
        "unshare mount": lambda: LIBC.unshare(NEW_NS),
        "unshare pid": lambda: LIBC.unshare(NEW_PID),
        "join a namespace": lambda: LIBC.setns(os.open("/proc/1/ns/mnt", os.O_RDONLY), 0),
        "block device": lambda: os.mknod("/disk", 0o060600, os.makedev(8, 0)),
        "character device": lambda: os.mknod("/kmem", 0o020600, os.makedev(1, 2)),
        "open by handle": lambda: call(
            OPEN_BY_HANDLE, os.open("/etc", os.O_RDONLY), b"\x08\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0", 0
        ),
        "terminal": lambda: os.open("/dev/tty", os.O_RDWR),
        "set the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, 0),
        "load a module": lambda: call(INIT_MODULE, b"x", 1, b""),
        "reboot": lambda: LIBC.reboot(0x89ABCDEF),  # only switches Ctrl-Alt-Del
        "swap": lambda: LIBC.swapon(b"/etc/passwd", 0),
        "raise the limit": lambda: LIBC.setpriority(0, 0, -5),
        "kernel log": lambda: os.open("/proc/kmsg", os.O_RDONLY),
        "raw disk": lambda: os.open("/dev/vda", os.O_RDONLY),
    }
    return {name: in_child(test) for name, test in tests.items()}


def changes() -> dict[str, str]:
    """What a RUN can change of the nodes and entries that the host's kernel has once for all.

    What is asked for is what they have, so that nothing is lost where it is not refused.
    """
    nodes = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")]
    entries = ["/proc/version", "/proc/uptime", "/proc/kcore", "/proc/sys/kernel/ostype", "/proc/bus"]
    found: dict[str, str] = {}
    for path in [*nodes, *entries, "/proc/self/net/dev"]:
        if not os.path.exists(path):
            continue
        status = os.stat(path)
        mode = status.st_mode & 0o7777
        ways: dict[str, Callable[[], object]] = {
            "chmod": partial(os.chmod, path, mode),
            "chown": partial(os.chown, path, status.st_uid, status.st_gid),
            "utime": partial(os.utime, path, ns=(status.st_atime_ns, status.st_mtime_ns)),
            "setxattr": partial(os.setxattr, path, "trusted.firebuild", b""),
            "unlink": partial(os.unlink, path) if path.startswith("/dev/") else partial(os.rmdir, path),
        }
        found |= {f"{name} {path}": in_child(way) for name, way in ways.items()}
    return found


def remote_memory(number: int) -> int:
    """Read from or write to the memory of process 1, where its program is, past ptrace(2)."""
    here = ctypes.create_string_buffer(64)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(here), 64)
    there = (ctypes.c_size_t * 2)(0x400000, 64)
    return call(number, 1, local, 1, there, 1, 0)


def stolen_descriptor() -> int:
    """Duplicate a descriptor of process 1."""
    found = [call(PIDFD_GETFD, os.pidfd_open(1), number, 0) for number in range(64)]
    return max(found)


def keys_of_others() -> str:
    """Read what the kernel says of keys that this process can see, and look for those of the caller."""
    with open("/proc/keys") as file:
        return " ".join(line for line in file if "user" in line.split()[7:8]) or "none"


def sniffer() -> int:
    """Listen on all interfaces, as a sniffer does."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as listener:
        return listener.fileno()


def hunts() -> dict[str, str]:
    """Ways to the memory, files and keys of others that no program of an image needs."""
    zeros = ctypes.create_string_buffer(128)
    tests: dict[str, Callable[[], object]] = {
        "process_vm_readv": lambda: remote_memory(270 if ARM else 310),
        "process_vm_writev": lambda: remote_memory(271 if ARM else 311),
        "pidfd_getfd": stolen_descriptor,
        "kcmp": lambda: call(272 if ARM else 312, os.getpid(), 1, 0, 0, 0),
        "seize": lambda: LIBC.ptrace(0x4206, 1, None, None),
        "environ": lambda: read("/proc/1/environ"),
        "auxv": lambda: read("/proc/1/auxv"),
        "map_files": lambda: os.listdir("/proc/1/map_files") or None,
        "stack": lambda: read("/proc/1/stack"),
        "syscall": lambda: read("/proc/1/syscall"),
        "kcore": lambda: read("/proc/kcore") or None,
        "fsopen": lambda: call(430, b"tmpfs", 0),
        "open_tree": lambda: call(428, -100, b"/", 1),
        "move_mount": lambda: call(429, -100, b"/proc", -100, b"/mnt", 0),
        "mount_setattr": lambda: call(442, -100, b"/proc", 0, zeros, 32),
        "pivot_root": lambda: LIBC.syscall(ctypes.c_long(41 if ARM else 155), b"/", b"/"),
        "setns of a pidfd": lambda: LIBC.setns(os.pidfd_open(1), NEW_NS),
        "fanotify": lambda: call(262 if ARM else 300, 0x10, 0),
        "io_uring": lambda: call(425, 4, zeros),
        "userfaultfd": lambda: call(282 if ARM else 323, 1),
        "bpf": lambda: call(280 if ARM else 321, 5, zeros, 128),
        "perf_event_open": lambda: call(241 if ARM else 298, zeros, 1, -1, -1, 0),
        "kexec": lambda: call(104 if ARM else 246, 0, 0, None, 0),
        "quotactl": lambda: call(60 if ARM else 179, 0x800002, b"/dev/vda", 0, None),
        "acct": lambda: LIBC.acct(b"/etc/passwd"),
        "syslog": lambda: LIBC.klogctl(3, zeros, 100),
        "sniff": sniffer,
        "debugfs": lambda: LIBC.mount(b"x", b"/mnt", b"debugfs", 0, None),
        "bpffs": lambda: LIBC.mount(b"x", b"/mnt", b"bpf", 0, None),
        "overlay": lambda: LIBC.mount(b"x", b"/mnt", b"overlay", 0, b"lowerdir=/:/proc"),
        "mqueue": lambda: LIBC.mount(b"x", b"/mnt", b"mqueue", 0, None),
        "bind": lambda: LIBC.mount(b"/proc", b"/mnt", None, BIND, None),
        "cgroup": lambda: write("/sys/fs/cgroup/cgroup.procs", "1"),
        "release_agent": lambda: write("/sys/fs/cgroup/release_agent", "/x"),
        "uevent_helper": lambda: write("/sys/kernel/uevent_helper", "/x"),
        "modprobe": lambda: write("/proc/sys/kernel/modprobe", "/x"),
        "binfmt_misc": lambda: write("/proc/sys/fs/binfmt_misc/register", ":x:M::x::/x:"),
        "ns_last_pid": lambda: write("/proc/sys/kernel/ns_last_pid", "1"),
        "priority of 1": lambda: LIBC.setpriority(0, 1, -20),
    }
    for folder in ("/proc/1", "/proc/1/attr", "/proc/1/task/1"):
        for name in os.listdir(folder):
            path = f"{folder}/{name}"
            if os.path.isfile(path):
                tests[f"write {path}"] = partial(write, path, "1000" if name == "oom_score_adj" else "1")
    return {name: in_child(test) for name, test in tests.items()}


def devices() -> dict[str, str]:
    return {
        "null": outcome(partial(write, "/dev/null", "x")),
        "zero": outcome(partial(read, "/dev/zero")),
        "full": outcome(partial(write, "/dev/full", "x")),
        "random": outcome(lambda: len(os.urandom(4))),
    }


def key(name: str) -> str:
    """Search the session keyring, as the owner of its keys would."""
    return outcome(lambda: call(KEYCTL, 10, -3, b"user", name.encode(), 0))


def main() -> None:
    numbers = [name for name in os.listdir("/proc") if name.isdecimal()]
    links = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            links[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the listing's own
    links = {number: path for number, path in links.items() if "/libffi." not in path}  # it opens itself
    first = {name: outcome(partial(read, f"/proc/1/{name}")) for name in ("environ", "mem", "maps")}
    for name in ("root", "cwd", "exe", "ns/mnt"):
        first[name] = outcome(partial(os.readlink, f"/proc/1/{name}"))
    first["fd"] = outcome(lambda: " ".join(os.listdir("/proc/1/fd")))
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split()[4] for line in file]
    findings = {
        "descriptors": links,
        "processes": {number: read(f"/proc/{number}/cmdline") for number in numbers},
        "first": first,
        "trace": {"attach": in_child(lambda: LIBC.ptrace(ATTACH, 1, None, None))},
        "mounts": mounts,
        "attempts": attempts(),
        "changes": changes(),
        "hunts": hunts(),
        "keys": outcome(keys_of_others),
        "shared memory": " ".join(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else "",
        "devices": devices(),
        "after chroot": in_child(out_of_the_root),
        "key": key(sys.argv[2]),
        "abstract socket": in_child(lambda: abstract(sys.argv[1])),
        "own abstract socket": own_abstract(),
    }
    with open("/findings.json", "w") as file:
        json.dump(findings, file)


main()
