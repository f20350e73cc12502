"""The part of this Python that goes into a machine: enough for vminit, and some margin.

Sources are compiled without their paths on this host (PEP 3147 allows a module without source, PEP 552 a
compiled file that is never compared with one), so that vminit starts without compiling anything.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import marshal
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

import firebuild_bootstrap
import firebuild_pki
from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.programs import LimitExceeded, run_program
from firebuild_pki.values import dataclass

# A process of its own that always does the same: what is shared and interned shows in compiled code.
_WORKER: Final = """
import importlib.util, marshal, sys
sources = marshal.load(sys.stdin.buffer)
for name in sorted(sources):
    path, source = sources[name]
    code = compile(source, path, "exec", dont_inherit=True)
    # PEP 552: a hash that is never compared with the source, which is not there
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    sources[name] = header + marshal.dumps(code)
marshal.dump(sources, sys.stdout.buffer)
"""


# Top-level names of the standard library that no part of vminit, grpc or protobuf imports.
_UNUSED: Final = re.compile(
    r"__phello__|_pyrepl|antigravity|cgi|cgitb|chunk|code|codeop|compileall|crypt|curses|dbm|distutils|doctest"
    r"|ensurepip|ftplib|idlelib|imaplib|imghdr|lib2to3|mailbox|mailcap|msilib|nntplib|pdb|pipes|poplib|profile"
    r"|pstats|pyclbr|pydoc|pydoc_data|sqlite3|smtpd|smtplib|sndhdr|sunau|telnetlib|test|tests|this|tkinter"
    r"|trace|turtle|turtledemo|unittest|uu|venv|wave|webbrowser|wsgiref|xdrlib|xmlrpc|zipapp"
    r"|config-.*|.*-packages|_sysconfigdata_.*"
)
_UNUSED_EXTENSIONS: Final = re.compile(
    r"_?(test|xx)|_(bz2|codecs|crypt|curses|dbm|gdbm|lsprof|lzma|multibytecodec|sqlite3|tkinter|uuid)"
    r"|audioop|nis|ossaudiodev|readline|spwd"
)
_ENCODINGS: Final = re.compile(
    r"__init__|aliases|ascii|latin_1|utf_.*|idna|punycode|.*escape|undefined|.*_codec|charmap|cp437"
)
_OWN: Final = (
    "firebuild_pki/__init__.py",
    "firebuild_pki/values.py",
    "firebuild_bootstrap/__init__.py",
    "firebuild_bootstrap/locales.py",
    "firebuild_bootstrap/polling.py",
    "firebuild_bootstrap/messages.py",
    "firebuild_bootstrap/wire.py",
    "firebuild_bootstrap/_proto",
    "firebuild_bootstrap/guest",
    "firebuild_bootstrap/layers",
    "firebuild_bootstrap/legacy/__init__.py",
    "firebuild_bootstrap/legacy/old_server.py",
)
_PACKAGES: Final = ("grpc", "google.protobuf", "google._upb")
_MODULES: Final = ("typing_extensions",)
_COMPILE_SECONDS: Final = 900.0
_MOST_COMPILED: Final = 256 << 20  # the standard library has 10 MB
_SKIPPED_FOLDERS: Final = frozenset({"__pycache__", "test", "tests", "testing"})


def compile_sources(python: Path, sources: Mapping[str, bytes], prefix: str) -> dict[str, bytes]:
    """Return the compiled form of each source.

    Args:
        python: the interpreter.
        sources: source code by the path of its file, relative to `prefix`.
        prefix: where the files are in the machine; tracebacks name them so.

    Raises:
        MachineError: the interpreter failed.
    """
    request = marshal.dumps({name: (f"{prefix}/{name}", data) for name, data in sources.items()})
    try:
        done = run_program(
            [python, "-I", "-S", "-B", "-X", "utf8", "-W", "ignore", "-c", _WORKER],
            data=request,
            env={"PYTHONHASHSEED": "0"},
            seconds=_COMPILE_SECONDS,
            most=_MOST_COMPILED,
        )
    except LimitExceeded as error:
        raise MachineError(f"{python} could not compile the initramfs: {error}") from error
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it failed silently"]
        raise MachineError(f"{python} could not compile the initramfs: {words[-1]}")
    compiled: dict[str, bytes] = marshal.loads(done.stdout)  # noqa: S302 - our own
    return compiled


@dataclass(frozen=True)
class RuntimeFile:
    """A file of this host, and its path in the runtime's library directory."""

    target: str
    source: Path

    @property
    def is_python(self) -> bool:
        """Whether it is source code, which is compiled."""
        return self.source.suffix == ".py"


@dataclass(frozen=True)
class PythonRuntime:
    """This Python.

    Args:
        program: the interpreter itself.
        library: its library directory, relative to the prefix, such as `lib/python3.11`.
        files: what goes below `library`.
    """

    program: Path
    library: str
    files: tuple[RuntimeFile, ...]

    @property
    def extensions(self) -> list[Path]:
        """The extension modules, which may need libraries."""
        return [file.source for file in self.files if not file.is_python]


def find_python() -> PythonRuntime:
    """Describe the runtime of this process.

    Raises:
        MachineError: a part of it is missing, or is not in files.
    """
    base = getattr(sys, "_base_executable", None) or sys.executable
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    files = [*_standard_library(standard), *_extensions(), *_own(), *_packages()]
    unique = {file.target: file for file in reversed(files)}
    return PythonRuntime(
        Path(os.path.realpath(base)),
        # `sys.platlibdir` and this name are what the interpreter looks for (Modules/getpath.py).
        f"{sys.platlibdir}/{standard.name}",
        tuple(unique[target] for target in sorted(unique)),
    )


def _standard_library(root: Path) -> Iterator[RuntimeFile]:
    if not (root / "os.py").is_file():
        raise MachineError(
            f"the standard library of this Python is not at {root}",
            hint="run firebuild with a Python whose library is in files",
        )
    for path in _sources(root):
        parts = path.relative_to(root).parts
        top = parts[0].removesuffix(".py")
        if _UNUSED.fullmatch(top):
            continue
        if top == "encodings" and not _ENCODINGS.fullmatch(path.stem):
            continue
        yield RuntimeFile("/".join(parts), path)


def _extensions() -> Iterator[RuntimeFile]:
    """Yield the standard library's extension modules; some Pythons have all of them built in."""
    # Of the base, not of a virtual environment.
    base = {"platbase": sysconfig.get_config_var("installed_platbase")}
    folder = Path(sysconfig.get_path("platstdlib", vars=base), "lib-dynload")
    for path in sorted(folder.glob("*")):
        if _is_extension(path) and not _UNUSED_EXTENSIONS.match(path.name):
            yield RuntimeFile(f"lib-dynload/{path.name}", path)


def _own() -> Iterator[RuntimeFile]:
    roots = {root.name: root for root in map(_folder, (firebuild_bootstrap, firebuild_pki))}
    for name in _OWN:
        package, _, inner = name.partition("/")
        root = roots[package]
        found = [root / inner] if name.endswith(".py") else [*_sources(root / inner)]
        yield from (RuntimeFile(f"{package}/{path.relative_to(root)}", path) for path in found)


def _folder(package: ModuleType) -> Path:
    return Path(package.__file__ or "").resolve().parent


def _packages() -> Iterator[RuntimeFile]:
    for name in _PACKAGES:
        spec = _spec(name)
        for folder in spec.submodule_search_locations or ():
            root = Path(folder)
            for path in _sources(root, extensions=True):
                yield RuntimeFile(f"{name.replace('.', '/')}/{path.relative_to(root)}", path)
    for name in _MODULES:
        yield RuntimeFile(f"{name}.py", Path(_spec(name).origin or ""))


def _spec(name: str) -> importlib.machinery.ModuleSpec:
    spec = importlib.util.find_spec(name)
    if spec is not None:
        places = spec.submodule_search_locations or [spec.origin or ""]
        if all(os.path.exists(place) for place in places):
            return spec
    raise MachineError(
        f"the package {name} was not found in files beside this firebuild",
        hint="install firebuild with its dependencies into a directory or a virtual environment",
    )


def _sources(root: Path, *, extensions: bool = False) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py") or (extensions and _is_extension(Path(name))):
                yield Path(folder, name)


def _is_extension(path: Path) -> bool:
    return path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
