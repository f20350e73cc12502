"""A small root file system made of the host's own programs, for builds without any download."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.programs import LimitExceeded, run_program

# A shell, coreutils, and what the RUN lines of everyday Dockerfiles use; the rest is left out silently.
TOOLS: Final = (
    "sh", "bash", "env", "awk", "bzip2", "cmp", "diff", "find", "getent", "grep", "egrep", "fgrep", "gzip",
    "gunzip", "zcat", "hostname", "ldd", "ps", "sed", "tar", "which", "xargs", "xz", "zstd", "arch", "base32",
    "base64", "basename", "cat", "chgrp", "chmod", "chown", "chroot", "cksum", "comm", "cp", "csplit", "cut",
    "date", "dd", "df", "dirname", "du", "echo", "expand", "expr", "factor", "false", "fmt", "fold", "groups",
    "head", "id", "install", "join", "link", "ln", "ls", "md5sum", "mkdir", "mkfifo", "mknod", "mktemp", "mv",
    "nice", "nl", "nohup", "nproc", "od", "paste", "pr", "printenv", "printf", "pwd", "readlink", "realpath",
    "rm", "rmdir", "seq", "sha1sum", "sha256sum", "sha512sum", "shuf", "sleep", "sort", "split", "stat",
    "stdbuf", "stty", "sum", "sync", "tac", "tail", "tee", "test", "[", "timeout", "touch", "tr", "true",
    "truncate", "tsort", "tty", "uname", "unexpand", "uniq", "unlink", "wc", "who", "whoami", "yes",
)  # fmt: skip
_SEARCH: Final = "/usr/bin:/bin:/usr/sbin:/sbin"
_LINKS: Final = ("bin", "sbin", "lib", "lib64")
_DIRECTORIES: Final = {
    "dev": 0o755, "etc": 0o755, "home": 0o755, "mnt": 0o755, "opt": 0o755, "proc": 0o555, "root": 0o700,
    "run": 0o755, "srv": 0o755, "sys": 0o555, "tmp": 0o1777, "usr": 0o755, "usr/bin": 0o755,
    "usr/lib": 0o755, "usr/lib64": 0o755, "usr/local": 0o755, "usr/local/bin": 0o755, "usr/sbin": 0o755,
    "usr/share": 0o755, "var": 0o755,
    "var/cache": 0o755, "var/lib": 0o755, "var/log": 0o755, "var/tmp": 0o1777,
}  # fmt: skip
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n",
}
_LIBRARY: Final = re.compile(r"(?:=> |^\s+)(/\S+) \(0x", re.MULTILINE)


def make_host_tree(root: Path, search_path: str = _SEARCH) -> None:
    """Fill the empty directory `root`.

    Args:
        search_path: where to look for the tools.

    Raises:
        MachineError: there is no shell, or `ldd` can't tell which libraries it needs.
    """
    if shutil.which("sh", path=search_path) is None:
        raise MachineError(
            f"no shell was found in {search_path}", hint="import a base from a tar archive instead"
        )
    root.chmod(0o755)
    for name, mode in _DIRECTORIES.items():
        (root / name).mkdir()
        (root / name).chmod(mode)
    for name in _LINKS:
        (root / name).symlink_to(f"usr/{name}")
    for name, text in _FILES.items():
        (root / name).write_text(text, "utf-8")
        (root / name).chmod(0o644)
    found = {name: shutil.which(name, path=search_path) for name in TOOLS}
    tools = {name: os.path.realpath(path) for name, path in found.items() if path}
    for name, path in tools.items():
        _copy(path, root / "usr/bin" / name)
    for library in _libraries(sorted(set(tools.values()))):
        _copy(library, root / _inside(library))


def _libraries(programs: list[str]) -> list[str]:
    """Return the libraries and the loader that `programs` need, by the paths they look for."""
    try:
        done = run_program(
            ["ldd", *programs], install="install it, or import a base from a tar archive instead"
        )
    except LimitExceeded as error:
        raise MachineError(f"ldd failed: {error}") from error
    found = sorted(set(_LIBRARY.findall(done.stdout.decode("utf-8", "replace"))))
    # The C library loads these by name when it looks up users and hosts (nsswitch.conf(5)).
    return [*found, *_siblings(found, ("libnss_files.so.2", "libnss_dns.so.2"))]


def _siblings(libraries: Iterable[str], names: tuple[str, ...]) -> list[str]:
    folders = [os.path.dirname(path) for path in libraries if os.path.basename(path).startswith("libc.so")]
    paths = (os.path.join(folder, name) for folder in folders for name in names)
    return [path for path in paths if os.path.exists(path)]


def _inside(library: str) -> str:
    first = library.split("/")[1]
    return f"usr{library}" if first in _LINKS else library.lstrip("/")


def _copy(source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(source, target)
        target.chmod(0o755)
