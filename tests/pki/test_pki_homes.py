"""Files that settings name, where something else is: it is refused at once, or read with a bound in time."""

from __future__ import annotations

import errno
import os
import ssl
import threading
import time
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.machine.firecracker.checks import check_kernel
from firebuild_bootstrap.machine.qemu.kernel import read_release
from firebuild_bootstrap.microvm import read_kernel
from firebuild_pki import CAError, SecretError, SecretRef
from firebuild_pki.connections import load_pair
from firebuild_pki.homes import open_file, read_small


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_pipe_is_read_to_its_end_within_a_bound(fifo: Path) -> None:
    def write() -> None:
        with open(fifo, "wb") as out:
            out.write(b"half")
            out.flush()
            time.sleep(0.1)
            out.write(b" and half\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert SecretRef(file=str(fifo)).resolve({}) == "half and half"
    writer.join()
    before = time.monotonic()
    with pytest.raises(OSError, match=r"no file, and what comes from it has no end after 0\.2 s") as caught:
        read_small(fifo, 100, patience=0.2)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - before < 5
    with open(os.open(fifo, os.O_RDWR), "wb") as out:  # a writer that goes on and on
        out.write(b"some")
        out.flush()
        with pytest.raises(OSError, match="has no end"):
            read_small(fifo, 100, patience=0.2)


def test_a_device_or_a_directory_is_no_secret(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="/dev/zero, but it has more than"):
        SecretRef(file="/dev/zero").resolve({})
    with pytest.raises(SecretError, match="Is a directory"):
        SecretRef(file=str(tmp_path)).resolve({})
    with pytest.raises(SecretError, match="but it is empty"):
        SecretRef(file="/dev/null").resolve({})


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_has_to_be_a_file_is_refused_at_once_where_it_is_none(
    kind: str, fifo: Path, tmp_path: Path
) -> None:
    path = {"fifo": fifo, "device": Path("/dev/zero"), "directory": tmp_path}[kind]
    why = "Is a directory" if kind == "directory" else "it is not a regular file"
    with pytest.raises(OSError, match=why):
        open_file(path)
    with pytest.raises(InputError, match=rf"machine\.firecracker\.kernel: .* can't be read: {why}"):
        check_kernel(str(path))
    with pytest.raises(InputError, match=f"--kernel: .* can't be read: {why}"):
        read_kernel(path, "x86_64", "--kernel")
    with pytest.raises(InputError, match=f"the kernel .* can't be read: {why}"):
        read_release(path)
    with pytest.raises(CAError, match=f"cannot read cert_file .*: {why}"):
        load_pair(ssl.create_default_context(), path, path, "")
