"""A real Debian image: built by us, compared file by file, and with what buildah makes of the same."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pytest

from support import Firebuild

pytestmark = [
    pytest.mark.release,
    pytest.mark.root,
    pytest.mark.needs("userns", "mmdebstrap", "buildah"),
    pytest.mark.xdist_group("debian"),
    pytest.mark.long,
    pytest.mark.timeout(600),
]

BIG = 64 << 20

DOCKERFILE = """\
FROM debian-minbase
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \\
 && apt-get install -y --no-install-recommends tree \\
 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1700 crew && useradd --create-home --uid 1234 --groups crew app
COPY tree/ /srv/tree/
COPY --chown=app:crew tree/script /usr/local/bin/tool
COPY big.bin /srv/
USER app
WORKDIR /home/app/work
RUN id > id && tree --version > version && umask > mask
ENTRYPOINT ["/usr/local/bin/tool"]
"""

# buildah 1.28 drops the setuid and setgid bits of what it copies; BuildKit, and we, keep them.
KEPT_BITS = {"srv/tree/a": 0o2755, "srv/tree/suid": 0o4750}

# What legitimately differs between two runs of the same commands, and why.
EXPLAINED = {
    **dict.fromkeys(
        (f"dev/{name}" for name in ("console", "full", "null", "ptmx", "random", "tty", "urandom", "zero")),
        "user namespaces make no device nodes; the kernel of a microVM mounts its own /dev",
    ),
    "etc/hostname": "buildah leaves the mount point it made",
    "etc/hosts": "buildah leaves the mount point it made",
    "etc/resolv.conf": "buildah leaves the mount point it made",
    "run/.containerenv": "buildah leaves the mount point it made",
    "run/secrets": "buildah leaves the mount point it made",
    "etc/shadow": "the day of the last password change",
    "etc/shadow-": "the day of the last password change",
    "var/cache/apt/pkgcache.bin": "holds times",
    "var/cache/apt/srcpkgcache.bin": "holds times",
    "var/cache/ldconfig/aux-cache": "holds inode numbers and times",
    "var/log/alternatives.log": "times",
    "var/log/apt/eipp.log.xz": "times",
    "var/log/apt/history.log": "times",
    "var/log/apt/term.log": "times",
    "var/log/dpkg.log": "times",
    "var/lib/dpkg/status": "order of fields may differ",
}


@dataclass(frozen=True)
class Node:
    """One file of an image as it counts: everything but times."""

    kind: str
    mode: int
    owner: tuple[int, int]
    content: str


def digest(stream: IO[bytes]) -> str:
    return hashlib.file_digest(cast("Any", stream), "sha256").hexdigest()


def nodes_of_tar(path: Path) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.removeprefix("./").rstrip("/")
            if name in ("", "."):
                continue
            owner = (member.uid, member.gid)
            if member.isdir():
                node = Node("dir", member.mode, owner, "")
            elif member.issym():
                node = Node("link", 0, owner, member.linkname)
            elif member.islnk():
                first = nodes[member.linkname.removeprefix("./")]
                node = Node("file", first.mode, first.owner, first.content)
            elif member.isfile():
                stream = archive.extractfile(member)
                assert stream is not None
                node = Node("file", member.mode, owner, digest(stream))
            else:
                node = Node("device", member.mode, owner, f"{member.devmajor}:{member.devminor}")
            nodes[name] = node
    return nodes


def nodes_of_directory(root: Path) -> dict[str, Node]:
    nodes = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            status = path.lstat()
            owner = (status.st_uid, status.st_gid)
            mode = stat.S_IMODE(status.st_mode)
            if path.is_symlink():
                node = Node("link", 0, owner, str(path.readlink()))
            elif path.is_dir():
                node = Node("dir", mode, owner, "")
            elif path.is_file():
                with path.open("rb") as stream:
                    node = Node("file", mode, owner, digest(stream))
            else:
                numbers = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
                node = Node("device", mode, owner, numbers)
            nodes[str(path.relative_to(root))] = node
    return nodes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = tmp_path_factory.mktemp("debian") / "debian.tar"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", archive], check=True, timeout=300
    )
    return archive


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = tmp_path_factory.mktemp("context")
    tree = context / "tree"
    (tree / "a/b/c").mkdir(parents=True)
    (tree / "a/b/c/deep").write_text("deep\n")
    (tree / "a").chmod(0o2755)
    (tree / "script").write_text("#!/bin/sh\necho tool\n")
    (tree / "script").chmod(0o755)
    (tree / "suid").write_bytes(b"\x7fELF")
    (tree / "suid").chmod(0o4750)
    (tree / "private").write_text("x")
    (tree / "private").chmod(0o600)
    (tree / "empty").mkdir(mode=0o700)
    (tree / "absolute").symlink_to("/etc/passwd")
    (tree / "relative").symlink_to("a/b/c/deep")
    (tree / "dangling").symlink_to("gone")
    with (context / "big.bin").open("wb") as big:
        for _ in range(BIG >> 20):
            big.write(os.urandom(1 << 20))
    (context / "Dockerfile").write_text(DOCKERFILE)
    return context


@pytest.fixture(scope="module")
def image(base: Path, context: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Node]:
    firebuild = Firebuild(tmp_path_factory.mktemp("home"))
    firebuild("base", "import", "debian-minbase", base)
    done = firebuild(
        *("rootfs", "--dockerfile", context / "Dockerfile", "--context", context),
        *("--tag", "t/debian:1", "--output", "tar", "--output", "ext4"),
        timeout=400,
    )
    assert "Setting up tree" in done.stdout
    found = json.loads(firebuild("images", "inspect", "t/debian:1").stdout)
    outputs = {output["type"]: Path(output["path"]) for output in found["outputs"]}
    check = ["/usr/sbin/e2fsck", "-fn", str(outputs["ext4"])]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    return nodes_of_tar(outputs["tar"])


@pytest.fixture(scope="module")
def buildah_image(
    base: Path, context: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Node]]:
    scratch = tmp_path_factory.mktemp("buildah")
    storage = ["--storage-driver", "vfs", "--root", str(scratch / "root"), "--runroot", str(scratch / "run")]

    def buildah(*arguments: str | Path) -> str:
        command = ["buildah", *storage, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=400).stdout

    own_context = scratch / "base"
    own_context.mkdir()
    (own_context / "base.tar").hardlink_to(base)
    (own_context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    build = ("bud", "--isolation", "chroot", "--quiet")
    buildah(*build, "--tag", "localhost/debian-minbase", own_context)
    buildah(*build, "--tag", "localhost/ours", context)
    container = buildah("from", "--pull-never", "localhost/ours").strip()
    yield nodes_of_directory(Path(buildah("mount", container).strip()))
    buildah("umount", "--all")
    buildah("rm", "--all")


def test_every_file_of_the_context_arrived(image: dict[str, Node], context: Path) -> None:
    expected = {
        f"srv/tree/{name}": Node(node.kind, node.mode, (0, 0), node.content)
        for name, node in nodes_of_directory(context / "tree").items()
    }
    arrived = {name: node for name, node in image.items() if name.startswith("srv/tree/")}
    assert arrived == expected
    sent = nodes_of_directory(context)
    assert image["srv/big.bin"].content == sent["big.bin"].content
    tool = image["usr/local/bin/tool"]
    assert (tool.owner, tool.content) == ((1234, 1700), sent["tree/script"].content)


def test_every_file_of_the_base_is_there_unless_the_steps_changed_it(
    image: dict[str, Node], base: Path
) -> None:
    before = nodes_of_tar(base)
    changed = {name for name, node in before.items() if image.get(name) != node}
    touched = (
        "dev", "etc/group", "etc/gshadow", "etc/ld.so.cache", "etc/passwd", "etc/shadow",
        "etc/subgid", "etc/subuid", "var/cache/apt", "var/cache/ldconfig", "var/lib/apt",
        "var/lib/dpkg", "var/log",
    )  # fmt: skip
    assert {name for name in changed if not name.startswith(touched)} == set()


def test_the_user_ran_with_its_ids(image: dict[str, Node]) -> None:
    assert image["home/app/work/id"].owner == (1234, 1234)
    assert image["home/app/work"].owner == (1234, 1234)


def test_buildah_makes_the_same_of_the_same_dockerfile(
    image: dict[str, Node], buildah_image: dict[str, Node]
) -> None:
    for name, mode in KEPT_BITS.items():
        assert (image[name].mode, buildah_image[name].mode) == (mode, mode & 0o777)
    names = (image.keys() | buildah_image.keys()) - EXPLAINED.keys() - KEPT_BITS.keys()
    differing = {
        name: (image.get(name), buildah_image.get(name))
        for name in sorted(names)
        if image.get(name) != buildah_image.get(name)
    }
    assert differing == {}, "\n".join(f"{name}: {pair}" for name, pair in differing.items())
