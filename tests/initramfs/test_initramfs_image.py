"""The finished initramfs: small, complete, the same every time, and without a trace of this host."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest

import firebuild_bootstrap
from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.initramfs import Compression, image, initramfs_image
from firebuild_bootstrap.initramfs.runtime import PythonRuntime, RuntimeFile, compile_sources, find_python
from initramfs.archives import Found, read_cpio, read_initramfs
from initramfs.elves import make_elf, make_module

MIB = 1024 * 1024
PROBE = """
import importlib, pkgutil, sys
import firebuild_bootstrap.guest as guest
for module in pkgutil.iter_modules(guest.__path__):
    importlib.import_module(f"firebuild_bootstrap.guest.{module.name}")
import grpc, hashlib, traceback, encodings.idna, importlib.metadata
print("imported", len(sys.modules), guest.__file__)
"""


@pytest.fixture(scope="module")
def small() -> PythonRuntime:
    """A runtime of one module: enough to see how an initramfs is put together."""
    real = find_python()
    return replace(real, files=tuple(file for file in real.files if file.target == "os.py"))


def test_it_is_small(initramfs: Path, entries: list[Found]) -> None:
    # About 16 MB with a distribution's Python; one that was built on this host may hold symbols besides.
    assert initramfs.stat().st_size < 30_000_000
    assert sum(len(entry.data) for entry in entries) < 100 * MIB


@pytest.mark.needs("userns")
def test_every_part_of_vminit_can_be_imported_from_it_alone(tree: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "chroot", str(tree)]
    done = subprocess.run(
        [*command, "/vminit/bin/python3", "-IBSXutf8", "-c", PROBE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported ")
    assert "/vminit/lib" in done.stdout


def test_it_holds_no_source_code_no_tests_and_no_tools(entries: list[Found]) -> None:
    paths = [entry.path for entry in entries]
    assert not [path for path in paths if path.endswith(".py")]
    for unwanted in ("/test/", "/tests/", "/idlelib", "/ensurepip", "/pip", "site-packages", "_testcapi"):
        assert not [path for path in paths if unwanted in path]


def test_it_holds_nothing_of_this_host_and_nobodys_secrets(
    entries: list[Found], monkeypatch: pytest.MonkeyPatch, small: PythonRuntime, tmp_path: Path
) -> None:
    own = [entry for entry in entries if not entry.path.startswith("lib/") and entry.data[:4] != b"\x7fELF"]
    places = {str(Path(firebuild_bootstrap.__file__).parents[2]), sys.prefix, str(Path.home()), os.getcwd()}
    for place in places:
        assert not [entry.path for entry in own if f"{place}/".encode() in entry.data]
    monkeypatch.setenv("VAULT_TOKEN", "s.a-secret-of-the-host")
    made = initramfs_image(tmp_path, runtime=small)
    assert b"s.a-secret-of-the-host" not in b"".join(entry.data for entry in read_initramfs(made))


def test_files_belong_to_root_and_only_programs_can_be_executed(entries: list[Found]) -> None:
    by_path = {entry.path: entry for entry in entries}
    assert {(entry.uid, entry.gid, entry.time) for entry in entries} == {(0, 0, 0)}
    assert stat.S_IMODE(by_path["init"].mode) == 0o755
    assert by_path["dev/console"].device == (5, 1)
    assert by_path["init"].data.startswith(b"#!/vminit/bin/python3 ")
    assert not [entry.path for entry in entries if stat.S_ISREG(entry.mode) and entry.mode & 0o7022]


def test_the_same_inputs_give_the_same_bytes_from_anywhere(initramfs: Path, tmp_path: Path) -> None:
    """A second process, another directory, copied packages, other times: nothing of it shows."""
    packages = tmp_path / "elsewhere"
    ignore = shutil.ignore_patterns("__pycache__")
    source = Path(firebuild_bootstrap.__file__).parent
    shutil.copytree(source, packages / source.name, ignore=ignore, copy_function=shutil.copyfile)
    program = (
        f"import sys; sys.path.insert(0, {str(packages)!r})\n"
        "from pathlib import Path\nfrom firebuild_bootstrap.initramfs import initramfs_image\n"
        "import firebuild_bootstrap; assert 'elsewhere' in firebuild_bootstrap.__file__\n"
        "print(initramfs_image(Path('store')))"
    )
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    environ = {**unmeasured, "PYTHONHASHSEED": "4711", "LANG": "C", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    other = tmp_path / done.stdout.strip()
    assert other.name == initramfs.name
    assert other.read_bytes() == initramfs.read_bytes()


def test_it_is_made_once_and_then_taken_from_the_store(
    small: PythonRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = initramfs_image(tmp_path, runtime=small)
    monkeypatch.setattr(image, "compress", lambda *_: pytest.fail("it was made again"))
    os.utime(first, (1, 1))
    assert initramfs_image(tmp_path, runtime=small) == first
    assert first.stat().st_mtime > 1  # it counts as used


def test_every_input_gives_an_initramfs_of_its_own(
    small: PythonRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "compress", lambda *_: b"")  # takes most of the time
    plain = initramfs_image(tmp_path, runtime=small)
    (tmp_path / "os.py").write_bytes(small.files[0].source.read_bytes() + b"# changed\n")
    changed = replace(small, files=(RuntimeFile("os.py", tmp_path / "os.py"),))
    assert initramfs_image(tmp_path, runtime=changed) != plain
    assert initramfs_image(tmp_path, runtime=small, kernel_modules=[modules(tmp_path / "k")]) != plain
    assert initramfs_image(tmp_path, runtime=small, compression=Compression.GZIP) != plain


def modules(folder: Path, release: str = "6.1.0-test") -> Path:
    folder.mkdir()
    for name in ("virtio_mmio", "virtio_blk", "virtio_net"):
        (folder / f"{name}.ko").write_bytes(make_module(release))
    return folder


def test_modules_lie_below_their_kernels_release_with_the_order_to_load_them(
    small: PythonRuntime, tmp_path: Path
) -> None:
    folders = [modules(tmp_path / "a", "6.1.0-a"), modules(tmp_path / "b", "6.1.0-b")]
    found = {
        e.path: e.data
        for e in read_initramfs(initramfs_image(tmp_path, runtime=small, kernel_modules=folders))
    }
    assert found["vminit/modules/6.1.0-a/order"] == b"virtio_mmio.ko\nvirtio_blk.ko\nvirtio_net.ko\n"
    assert found["vminit/modules/6.1.0-b/virtio_net.ko"] == make_module("6.1.0-b")
    with pytest.raises(InputError, match=r"of the same kernel: 6\.1\.0-a, 6\.1\.0-a\n  hint: name one"):
        initramfs_image(tmp_path, runtime=small, kernel_modules=[folders[0], folders[0]])


def test_gzip_and_none_are_what_every_kernel_reads(small: PythonRuntime, tmp_path: Path) -> None:
    packed = initramfs_image(tmp_path, runtime=small, compression=Compression.GZIP)
    assert packed.suffix == ".gz"
    assert packed.read_bytes()[4:8] == bytes(4)  # no time
    plain = initramfs_image(tmp_path, runtime=small, compression=Compression.NONE)
    assert plain.suffix == ".cpio"
    assert plain.read_bytes() == gzip.decompress(packed.read_bytes())
    assert "init" in {entry.path for entry in read_cpio(plain.read_bytes())}


def test_a_missing_or_failing_compressor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="lz4 was not found") as caught:
        image.compress(b"data", Compression.LZ4)
    assert "--compress zstd" in str(caught.value)
    (tmp_path / "lz4").write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    (tmp_path / "lz4").chmod(0o755)
    with pytest.raises(MachineError, match="lz4 failed: no memory"):
        image.compress(b"data", Compression.LZ4)


def test_another_architecture_is_refused(small: PythonRuntime) -> None:
    with pytest.raises(MachineError, match=r"on riscv64: supported are x86_64 and aarch64"):
        image.collect(small, environ={}, machine="riscv64")


def test_an_unusual_loader_finds_the_libraries_at_its_own_place(
    small: PythonRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = tmp_path / "store/glibc/lib/ld-linux.so"
    loader.parent.mkdir(parents=True)
    loader.write_bytes(b"loader")
    (tmp_path / "python").write_bytes(make_elf(interpreter=str(loader)))
    odd = replace(small, program=tmp_path / "python", files=())
    found = {entry.path: entry.data for entry in image.collect(odd, environ={}, machine="x86_64").entries}
    assert found["lib/ld-linux.so"] == b"loader"
    assert found[str(loader.parent).strip("/")] == b"/lib"


def test_a_file_that_can_not_be_read_is_named(small: PythonRuntime, tmp_path: Path) -> None:
    gone = replace(small, files=(RuntimeFile("os.py", tmp_path / "gone.py"),))
    with pytest.raises(MachineError, match=r"gone\.py can't be read: No such file"):
        initramfs_image(tmp_path, runtime=gone)


def test_a_source_that_does_not_compile_is_an_error_in_words() -> None:
    with pytest.raises(MachineError, match="could not compile the initramfs: SyntaxError"):
        compile_sources(Path(sys.executable), {"a.py": b"def"}, "/initramfs")


def test_a_store_that_can_not_be_written_is_an_error_in_words(small: PythonRuntime, tmp_path: Path) -> None:
    (tmp_path / "initramfs").write_text("in the way")
    with pytest.raises(MachineError, match="the initramfs can't be stored") as caught:
        initramfs_image(tmp_path, runtime=small)
    assert "FIREBUILD_HOME" in str(caught.value)


def test_what_nobody_used_for_a_month_is_removed(small: PythonRuntime, tmp_path: Path) -> None:
    made = initramfs_image(tmp_path, runtime=small)
    for name, days in (("old.cpio.zst", 31), ("young.cpio.zst", 29)):
        (made.parent / name).write_text("")
        os.utime(made.parent / name, (time.time() - days * 86400,) * 2)
    initramfs_image(tmp_path, runtime=small)
    assert {path.name for path in made.parent.iterdir()} == {made.name, "young.cpio.zst"}


def test_a_python_without_files_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from firebuild_bootstrap.initramfs import runtime

    monkeypatch.setattr(runtime, "_MODULES", ("no_such_package",))
    with pytest.raises(MachineError, match="the package no_such_package was not found"):
        find_python()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_args, **_fields: str(tmp_path))
    with pytest.raises(MachineError, match="standard library of this Python is not at"):
        find_python()
