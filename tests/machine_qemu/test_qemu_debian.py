"""A real distribution, built in a virtual machine and in the sandbox on this host: every file is the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.sandbox import Sandbox
from machine_qemu.images import arguments, read_ext4
from support import Firebuild

pytestmark = [
    pytest.mark.needs("userns", "e2fsck", "busybox"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.timeout(400),
]

DEBIAN = """\
FROM debian
RUN ! command -v python3
RUN groupadd --gid 1700 crew && useradd --create-home --uid 1234 --groups crew app
COPY tree/ /srv/tree/
COPY --chown=app:crew tree/script /usr/local/bin/tool
RUN ln /usr/local/bin/tool /usr/local/bin/twin && chmod 4755 /srv/tree/suid && mkfifo /srv/fifo \\
 && perl -e '($f, $n, $v) = ("/srv/tree/private", "user.mark", "value"); \\
    syscall(188, $f, $n, $v, 5, 0) == 0 or die $!' \\
 && chown 40000:50 /srv/fifo && rm -r /usr/share/doc && mv /etc/issue /srv/
USER app
WORKDIR /home/app/work
RUN id > id && umask > mask && /usr/local/bin/tool > said
"""


def ext4_of(firebuild: Firebuild, tag: str) -> Path:
    [output] = json.loads(firebuild("images", "inspect", tag).stdout)["outputs"]
    return Path(output["path"])


def make_tree(tree: Path) -> None:
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/deep").write_text("deep\n")
    (tree / "a").chmod(0o2755)
    (tree / "script").write_text("#!/bin/sh\necho tool\n")
    (tree / "script").chmod(0o755)
    (tree / "suid").write_bytes(bytes(range(256)) * 5000)
    (tree / "private").write_text("x")
    (tree / "private").chmod(0o600)
    (tree / "empty").mkdir(mode=0o700)
    (tree / "dangling").symlink_to("gone")


@pytest.mark.release
@pytest.mark.root
@pytest.mark.needs("mmdebstrap")
def test_a_debian_without_python_becomes_the_same_as_on_the_machine_local(
    shared: Path, tmp_path: Path, context: Path, configure: Any, sandbox: Sandbox
) -> None:
    archive = tmp_path / "debian.tar"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", archive], check=True, timeout=300
    )
    shutil.copytree(shared / "initramfs", tmp_path / "home/initramfs", dirs_exist_ok=True)
    firebuild = Firebuild(tmp_path / "home")
    firebuild("base", "import", "debian", archive)
    make_tree(context / "tree")
    found = {}
    for driver in ("local", "qemu"):
        firebuild(
            *arguments(context, DEBIAN, "--config", configure(), "--machine", driver),
            *("--output", "ext4"),
            timeout=300,
        )
        image = ext4_of(firebuild, "t/vm:1")
        assert subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False).returncode == 0
        found[driver] = read_ext4(image, sandbox, tmp_path)
    (local, local_times), (qemu, qemu_times) = found["local"], found["qemu"]
    assert {name: (local.get(name), node) for name, node in qemu.items() if local.get(name) != node} == {}
    assert qemu.keys() == local.keys()
    made = (context / "tree/private").stat().st_mtime
    old = {name: time for name, time in local_times.items() if time < made - 1}
    assert len(old) > 1000
    assert {name: qemu_times[name] for name in old} == old
    assert qemu["srv/tree/private"].attributes == (("SCHILY.xattr.user.mark", "value"),)
    assert qemu["srv/fifo"].owner == (40000, 50)
    assert firebuild.leftovers() == []
