"""`firebuild run --ssh-key`: OpenSSH's own server in a virtual machine, and its client on this host."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import Firebuild

pytestmark = [
    pytest.mark.needs("userns", "ids", "busybox", "qemu", "sshd", "ssh-agent"),
    pytest.mark.xdist_group("qemu"),
    pytest.mark.timeout(400),
]

DOCKERFILE = """\
FROM busybox
COPY files /
RUN busybox mkdir -p -m 0700 /root /home/app && busybox chown app /home/app
RUN ssh-keygen -q -t ed25519 -N '' -f /key
CMD ["/bin/sh", "-c", "busybox mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e -p 2222 -h /key \
 -o UsePAM=no -o PidFile=none -o PasswordAuthentication=no"]
"""
LOGIN = (
    '. /etc/profile.d/firebuild.sh; echo "$LEVEL $(id -un) $(busybox hostname)"; busybox tail -c 3; exit 7'
)


def server_files(root: Path) -> None:
    """The programs, with their libraries and the user that the server gives its rights up for."""
    sessions = [str(file) for file in Path("/usr/lib/openssh").glob("sshd-*")]  # since OpenSSH 9.8
    for program in ("/usr/sbin/sshd", "/usr/bin/ssh-keygen", *sessions):
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for file in (program, *re.findall(r"(/\S+) \(0x", listed)):
            target = root / file[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\n"
        "sshd:x:100:65534::/run/sshd:/bin/false\n"
    )
    (root / "etc/ssh").mkdir()
    (root / "etc/ssh/sshd_config").write_text("")


def make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def log_in(port: int, user: str, key: Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run LOGIN there with something at its input."""
    options = (
        "BatchMode=yes",
        "IdentitiesOnly=yes",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
    )
    command = ["ssh", "-F", "none", "-q", "-i", str(key), "-p", str(port), *(f"-o{one}" for one in options)]
    return subprocess.run(
        [*command, f"{user}@127.0.0.1", LOGIN], input=data, capture_output=True, timeout=120, check=False
    )


def test_who_has_the_key_logs_in_and_nobody_else(
    firebuild: Firebuild, configure: Any, context: Path, tmp_path: Path
) -> None:
    server_files(context / "files")
    (context / "Dockerfile").write_text(DOCKERFILE)
    firebuild("build", "-q", "-t", "sshd", context)
    of_root, of_app = make_key(tmp_path / "root"), make_key(tmp_path / "app")
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    given = ("--hostname", "web", "-e", "LEVEL=two words", "--publish", f"{port}:2222")
    keys = ("--ssh-key", f"{of_root}.pub", "--ssh-key", f"app={of_app}.pub")
    process = firebuild.popen("run", "--config", configure(accelerator="tcg"), *given, *keys, "sshd")
    assert process.stderr is not None
    said = [process.stderr.readline()]
    while said[-1] and b"Server listening on 0.0.0.0 port 2222" not in said[-1]:
        said.append(process.stderr.readline())
    assert said[-1], said
    done = log_in(port, "root", of_root, 100_000 * b"x" + b"end")
    assert (done.stdout, done.returncode) == (b"two words root web\nend", 7), done
    done = log_in(port, "app", of_app, b"of app")
    assert (done.stdout, done.returncode) == (b"two words app web\napp", 7), done
    for user, key in (("root", of_app), ("app", of_root)):
        done = log_in(port, user, key)
        assert (done.stdout, done.returncode) == (b"", 255), done
    process.terminate()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error  # the server's own way to end
    assert b"Received signal 15" in error
    assert firebuild.leftovers() == []
