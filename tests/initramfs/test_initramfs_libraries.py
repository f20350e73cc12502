"""The libraries that go along, as the loader would find them."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.initramfs.libraries import ElfError, LibraryFinder, read_elf
from firebuild_bootstrap.initramfs.runtime import find_python
from firebuild_bootstrap.sandbox import find_runtime
from initramfs.elves import make_elf

LOADER = "/lib64/ld-linux-x86-64.so.2"


def finder(conf: Path = Path("/nonexistent"), **environ: str) -> LibraryFinder:
    return LibraryFinder("x86_64", environ, conf)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that needs libone and has a folder of its own for libraries."""
    path = tmp_path / "bin/program"
    path.parent.mkdir()
    (tmp_path / "own").mkdir()
    path.write_bytes(make_elf(needed=["libone.so"], runpath="$ORIGIN/../own", interpreter=LOADER))
    return path


def library(path: Path, **fields: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make_elf(**fields))  # type: ignore[arg-type]
    return path


def test_the_real_python_gets_every_library_that_it_has_loaded() -> None:
    runtime, bare = find_python(), find_runtime()  # without what a measured start would load
    found = LibraryFinder(os.uname().machine, os.environ).closure(runtime.program, runtime.extensions).files
    program = "import ctypes, hashlib, ssl, grpc, google._upb._message; print(open('/proc/self/maps').read())"
    maps = subprocess.run(
        [*bare.python, "-c", program], env=bare.env, capture_output=True, text=True, check=True
    ).stdout
    loaded = {os.path.realpath(path) for path in re.findall(r"/\S+\.so\S*", maps)}
    wanted = {path for path in loaded if not path.endswith(tuple(EXTENSION_SUFFIXES))}
    assert wanted
    assert wanted <= {os.path.realpath(path) for path in found.values()}


def test_a_library_beside_the_program_is_found_and_so_is_what_that_needs(program: Path) -> None:
    one = library(program.parents[1] / "own/libone.so", needed=["libtwo.so"])
    two = library(program.parents[1] / "own/libtwo.so", needed=["ld-linux-x86-64.so.2"])
    found = finder().closure(program, [])
    assert found.loader == LOADER
    assert {name: found.files[name] for name in ("libone.so", "libtwo.so")} == {
        "libone.so": program.parent / "../own/libone.so",
        "libtwo.so": program.parent / "../own/libtwo.so",
    }
    assert one.exists()
    assert two.exists()


def test_an_old_rpath_counts_unless_there_is_a_runpath() -> None:
    assert read_elf(make_elf(rpath="/a:/b")).search == ("/a", "/b")
    assert read_elf(make_elf(rpath="/a", runpath="/c")).search == ("/c",)


def test_the_environment_and_the_configuration_name_more_directories(program: Path, tmp_path: Path) -> None:
    library(tmp_path / "env/libone.so", needed=["libtwo.so"])
    two = library(tmp_path / "conf/libtwo.so")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/x.conf").write_text(f"# a comment\n{tmp_path}/conf\n")
    (tmp_path / "ld.so.conf").write_text("include conf.d/*.conf\n\n")
    found = finder(tmp_path / "ld.so.conf", LD_LIBRARY_PATH=f"{tmp_path}/env:").closure(program, [])
    assert found.files["libtwo.so"] == two


def test_a_configuration_that_includes_itself_ends(program: Path, tmp_path: Path) -> None:
    library(tmp_path / "env/libone.so", needed=["libtwo.so"])
    two = library(tmp_path / "conf/libtwo.so")
    (tmp_path / "ld.so.conf").write_text(f"include *.conf\n{tmp_path}/conf\n")
    (tmp_path / "other.conf").symlink_to("ld.so.conf")
    found = finder(tmp_path / "ld.so.conf", LD_LIBRARY_PATH=f"{tmp_path}/env").closure(program, [])
    assert found.files["libtwo.so"] == two


def test_another_architectures_library_and_a_linker_script_are_passed_over(
    program: Path, tmp_path: Path
) -> None:
    library(program.parents[1] / "own/libone.so", machine=183)
    (tmp_path / "script").mkdir()
    (tmp_path / "script/libone.so").write_text("GROUP ( libone.so.1 )\n")
    right = library(tmp_path / "right/libone.so")
    found = finder(LD_LIBRARY_PATH=f"{tmp_path}/script:{tmp_path}/right").closure(program, [])
    assert found.files["libone.so"] == right


def test_what_the_c_library_loads_by_itself_comes_from_where_it_is(program: Path) -> None:
    own = program.parents[1] / "own"
    library(own / "libone.so", needed=["libc.so.6"])
    library(own / "libc.so.6")
    library(own / "libgcc_s.so.1")
    assert finder().closure(program, []).files["libgcc_s.so.1"] == program.parent / "../own/libgcc_s.so.1"


def test_a_missing_library_is_named_with_who_needs_it(program: Path) -> None:
    with pytest.raises(MachineError, match=r"program needs the library libone\.so, which was not found") as e:
        finder().closure(program, [])
    assert "LD_LIBRARY_PATH" in str(e.value)


@pytest.mark.needs("busybox")
def test_a_static_python_is_refused_in_words() -> None:
    with pytest.raises(MachineError, match="statically linked"):
        finder().closure(Path("/bin/busybox"), [])


def test_a_script_in_place_of_python_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\n")
    with pytest.raises(MachineError, match="it is not an ELF file"):
        finder().closure(tmp_path / "python", [])
    with pytest.raises(MachineError, match="No such file"):
        finder().closure(tmp_path / "missing", [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an ELF file"),
        (b"\x7fELF", "not an ELF file"),
        (b"\x7fELF\x01\x01" + bytes(80), "not for a 64-bit"),
        (make_elf(needed=["lib.so"])[:100], "it is a broken ELF file"),
        (make_elf(needed=["lib.so"]).replace((0x400000).to_bytes(8, "little"), b"\xff" * 8), "broken"),
        (make_elf(needed=["lib.so"])[:-3], "broken"),
    ],
)
def test_a_broken_file_is_told_from_a_good_one(data: bytes, message: str) -> None:
    with pytest.raises(ElfError, match=message):
        read_elf(data)
