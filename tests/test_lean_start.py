"""What a start imports: seconds depend on the machine, the modules do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from firebuild_bootstrap.sandbox import find_runtime

# A build needs most of these; nobody should wait for them to read a help text or a list.
BUILDING = frozenset({"grpc", "google.protobuf", "OpenSSL", "asyncio", "firebuild_bootstrap.build"})
READING = frozenset({"yaml", "jsonschema", "http.client", "urllib.request", "tarfile", "zstandard"})
SETTINGS = frozenset({"pydantic", "cryptography", "importlib.metadata", "email"})


def imported_by(home: Path, module: str, *arguments: str, **variables: str) -> set[str]:
    """Run `module`'s `main` with the arguments and return the names of all modules imported then."""
    program = (
        f"import sys, {module} as program\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n"
        "    status = program.main()\n"
        "except SystemExit as ended:\n"
        "    status = ended.code\n"
        "print('MODULES', *sys.modules, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FIREBUILD", "COV"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environ, "FIREBUILD_HOME": str(home), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.rpartition("MODULES")[2].split())


# The argparse of Python 3.14 has colours, and those are dataclasses.
ARGPARSE = {"dataclasses"} if sys.version_info >= (3, 14) else set[str]()


def imported_without_site(*modules: str) -> set[str]:
    """Import modules as in a sandbox, where `site` and its path files take no part."""
    runtime = find_runtime()
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    command = [*runtime.python, "-c", program]
    done = subprocess.run(command, env=runtime.env, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "arguments", "unwanted"),
    [
        (
            "firebuild_bootstrap.guest.main",
            ("--help",),
            BUILDING | READING | SETTINGS | {"ssl", "dataclasses", "subprocess"} - ARGPARSE,
        ),
        ("firebuild_bootstrap.cli.app", ("--help",), BUILDING | READING | SETTINGS),
        ("firebuild_bootstrap.cli.app", ("rootfs", "--help"), BUILDING | READING | SETTINGS),
        ("firebuild_bootstrap.cli.app", ("config", "check"), BUILDING | READING),
        ("firebuild_bootstrap.cli.app", ("ca", "--help"), BUILDING | READING | SETTINGS),
        ("firebuild_bootstrap.cli.app", ("ca", "show"), BUILDING | READING),
        ("firebuild_bootstrap.cli.app", ("images", "list"), BUILDING | READING - {"tarfile"}),
    ],
)
def test_a_start_imports_only_what_it_needs(
    tmp_path: Path, module: str, arguments: tuple[str, ...], unwanted: frozenset[str]
) -> None:
    assert not unwanted & imported_by(tmp_path, module, *arguments)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (("--version",), {"completion"}),
        (("build", "--help"), {"completion", "rootfs"}),
        (("ps",), {"completion", "runs"}),
    ],
)
def test_a_command_imports_none_of_the_others(
    tmp_path: Path, arguments: tuple[str, ...], needed: set[str]
) -> None:
    imported = imported_by(tmp_path, "firebuild_bootstrap.cli.app", *arguments)
    commands = {"ca", "completion", "config", "doctor", "images", "initramfs", "rootfs", "run", "runs"}
    assert {name for name in commands if f"firebuild_bootstrap.cli.{name}" in imported} == needed


@pytest.mark.parametrize("line", ["images rm --config FILE ", "base rm ", "build --machine "])
def test_a_tab_imports_no_models_of_settings(tmp_path: Path, line: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"store: {{path: {tmp_path}}}\n")
    asked = {
        "_FIREBUILD_COMPLETE": "bash_complete",
        "COMP_LINE": f"firebuild {line.replace('FILE', str(config))}",
    }
    imported = imported_by(tmp_path, "firebuild_bootstrap.cli.app", **asked)
    assert imported & (BUILDING | SETTINGS | READING) <= {"yaml", "tarfile"}


def test_a_build_that_is_cached_whole_imports_nothing_that_executes_or_checks_settings(
    tmp_path: Path,
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    build = ("build", "--tag", "lean", str(tmp_path))
    imported = imported_by(tmp_path / "home", "firebuild_bootstrap.cli.app", *build)
    assert "grpc" in imported
    assert "firebuild_bootstrap.settings" not in imported  # nobody has written any
    heavy = {"pydantic", "cryptography", "grpc", "google.protobuf", "yaml", "asyncio", "ssl", "http.client"}
    heavy |= {"importlib.metadata", "email", "zipfile"}
    assert not heavy & imported_by(tmp_path / "home", "firebuild_bootstrap.cli.app", *build)


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (("client", "executor"), {"http.client", "email", "pathlib", "pydantic", "cryptography"}),
        (("enter",), {"dataclasses", "inspect", "subprocess", "asyncio", "ssl", "grpc"}),
    ],
)
def test_the_guest_imports_only_what_a_step_needs(modules: tuple[str, ...], unwanted: set[str]) -> None:
    assert not unwanted & imported_without_site(*(f"firebuild_bootstrap.guest.{name}" for name in modules))


def test_layers_bring_nothing_into_vminit_that_it_does_not_have() -> None:
    names = ("apply", "reader", "root", "tar", "tree")
    imported = imported_without_site(*(f"firebuild_bootstrap.layers.{name}" for name in names))
    heavy = {"tarfile", "shutil", "hashlib", "zlib", "bz2", "lzma", "decimal", "dataclasses", "inspect"}
    assert not heavy & imported


def test_a_worker_imports_no_dataclasses() -> None:
    imported = imported_without_site("firebuild_bootstrap.image.worker.__main__")
    assert not {"dataclasses", "inspect", "subprocess", "asyncio", "grpc"} & imported


def test_a_cleanup_imports_no_sandbox_where_its_owners_are_everyones(tmp_path: Path) -> None:
    """Each build starts one."""
    for part in ("content/1/layer", "names"):
        (tmp_path / "layers/x" / part).mkdir(parents=True)
    (tmp_path / "layers/x/names/1").symlink_to("../content/1")
    retired = tmp_path / "removing/b1.1"
    retired.mkdir(parents=True)
    runtime = find_runtime()
    program = (
        "import os, sys\n"
        f"sys.argv = ['cleanup', {str(tmp_path / 'builds/b1')!r}, '', 'x', str(os.getppid())]\n"
        "os.geteuid = lambda: 0\n"
        "from firebuild_bootstrap.machine import cleanup\n"
        "cleanup.main()\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run(
        [*runtime.python, "-c", program],
        env=runtime.env,
        input=os.fsencode(retired),
        stdout=subprocess.PIPE,
        check=True,
    )
    heavy = {"subprocess", "logging", "shutil", "json", "firebuild_bootstrap.sandbox"}
    assert not heavy & set(done.stdout.decode().split())
    assert not retired.exists()
    assert (tmp_path / "layers/x/content/1/durable").exists()
