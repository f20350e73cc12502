"""How errors leave the command: one message on stderr, a status, and never a traceback."""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import pytest

from cli.conftest import Cli
from firebuild_bootstrap.cli.failure import report
from firebuild_bootstrap.errors import ExitStatus, FirebuildError, OutputError
from firebuild_bootstrap.image.bases import BaseStore
from firebuild_bootstrap.service import BootstrapServer
from support import BIN, Firebuild

# A provider as a plugin brings it, whose service is down.
BROKEN_PROVIDER = """
    from firebuild_pki import CAProvider, ProviderError, ProviderSpec, Settings, hookimpl

    class Broken(CAProvider):
        def __init__(self, settings, context):
            pass

        def open(self):
            raise {error}

        def trust_bundle(self):
            raise NotImplementedError

        def sign(self, request):
            raise NotImplementedError

    @hookimpl
    def register_ca_providers():
        return [ProviderSpec("broken", Settings, Broken, "a CA that is down")]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    def write(module: str, code: str) -> None:
        info = tmp_path / f"site/{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[firebuild_pki.providers]\nbroken = {module}\n")
        (tmp_path / f"site/{module}.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return write


@contextmanager
def stdout_is(descriptor: int) -> Iterator[None]:
    saved = os.dup(1)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def pipe_without_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("group", [[], ["base"], ["cache"], ["config"]])
def test_a_command_that_is_left_out_is_bad_input_and_the_help_says_which_there_are(
    cli: Cli, group: list[str]
) -> None:
    done = cli(*group, status=2)
    name = " ".join(["firebuild", *group])
    assert done.out == ""
    assert done.err.startswith(f"error: expected a command after `{name}`\n\nUsage: {name} ")


@pytest.mark.parametrize(
    ("arguments", "message", "where"),
    [
        (["rootfs"], "missing option '--tag'", "firebuild rootfs"),
        (["images", "inspect"], "missing argument 'TAG'", "firebuild images inspect"),
        (["bild"], "no such command 'bild'", "firebuild"),
        (["base", "list", "--al"], "no such option '--al'", "firebuild base list"),
    ],
)
def test_usage_errors_look_like_all_others(cli: Cli, arguments: list[str], message: str, where: str) -> None:
    done = cli(*arguments, status=2)
    assert done.err.startswith(f"error: {message}")
    assert done.err.endswith(f"\n  hint: `{where} --help` says what is expected\n")


def test_version_is_one_line(cli: Cli) -> None:
    assert re.fullmatch(r"firebuild \d+\.\d+\.\d+\n", cli("--version").out)


def test_a_mistake_of_ours_is_one_line_and_a_hint(cli: Cli) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the first line\n  and the second")

    cli.monkeypatch.setattr(BaseStore, "list", broken)
    assert cli("base", "list", status=70).err == (
        "error: internal error: RuntimeError: the first line and the second\n"
        "  hint: FIREBUILD_DEBUG=1 shows where; please report it\n"
    )


def test_debugging_shows_where_a_mistake_of_ours_is(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    cli.setenv("FIREBUILD_DEBUG", "1")
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("ours")
    assert report(caught.value) is ExitStatus.INTERNAL
    shown = capfd.readouterr().err
    assert shown.startswith("error: internal error: RuntimeError: ours\nTraceback (most recent call last):")
    assert "test_cli_failures.py" in shown


def test_debugging_changes_nothing_about_a_mistake_of_the_user(cli: Cli) -> None:
    cli.setenv("FIREBUILD_DEBUG", "1")
    assert cli("images", "rm", "x", status=2).first.startswith("error: there is no image")


def test_want_of_room_or_rights_is_nobody_s_internal_error(cli: Cli) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/some/file")

    cli.monkeypatch.setattr(BaseStore, "list", full)
    assert cli("base", "list", status=6).err == (
        "error: /some/file: No space left on device\n  hint: make room there, or let this user write there\n"
    )


def test_an_operating_system_error_without_a_file_is_told_all_the_same(cli: Cli) -> None:
    def exhausted(*_: object) -> None:
        raise OSError(24, "Too many open files")

    cli.monkeypatch.setattr(BaseStore, "list", exhausted)
    assert cli("base", "list", status=6).err == (
        "error: Too many open files\n"
        "  hint: raise the limit of open files: `ulimit -n`, or LimitNOFILE= of its service\n"
    )


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(12, "ulimit -u and -v"), (5, "the kernel's log"), (30, "make room"), (27, "ulimit -f")],
)
def test_what_the_system_refuses_has_the_remedy_for_that(cli: Cli, number: int, remedy: str) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, "no", "/some/file")

    cli.monkeypatch.setattr(BaseStore, "list", refused)
    assert remedy in cli("base", "list", status=6).err


def test_a_command_leaves_no_file_open(cli: Cli) -> None:
    def each() -> int:
        cli("images", "list")
        cli("config", "show")
        cli("ca", "check")
        cli("build", "--check", "missing", status=2)
        cli("no-such-command", status=2)
        gc.collect()  # what wakes the threads of gRPC goes with them
        return len(os.listdir("/proc/self/fd"))

    once = each()
    assert [each(), each()] == [once, once]


def test_ctrl_c_outside_a_build_ends_with_130(cli: Cli) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    cli.monkeypatch.setattr(BaseStore, "list", interrupted)
    assert cli("base", "list", status=130).err.strip() == "error: interrupted"


@pytest.mark.needs("userns")
@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ("broken_service", 'ProviderError("the CA answered 503")', "the CA answered 503"),
        ("broken_code", 'ConnectionResetError("gone")', "gone"),
    ],
)
def test_a_certificate_authority_that_fails_has_status_3(
    cli: Cli, install: Callable[[str, str], None], module: str, error: str, message: str
) -> None:
    install(module, BROKEN_PROVIDER.format(error=error))
    Path("Dockerfile").write_text("FROM scratch\n")
    done = cli("rootfs", "--no-cache", "--tag", "t/ca:1", "--ca", "broken", status=3)
    assert message in done.err
    assert "broken" in done.first
    assert cli.leftovers() == []


def test_a_plugin_that_cannot_be_imported_has_status_3_and_is_named(
    cli: Cli, install: Callable[[str, str], None]
) -> None:
    install("broken_import", "import nothing_of_that_name\n")
    cli.setenv("FIREBUILD_CA__PROVIDER", "broken")
    done = cli("config", "check", status=3)
    assert "cannot use the plugin of broken_import 1.0" in done.first
    assert "No module named 'nothing_of_that_name'" in done.first


WORRIED_PROVIDER = """
    from firebuild_pki import ProviderSpec, hookimpl
    from firebuild_pki.providers.embedded import EmbeddedProvider, EmbeddedSettings

    class Worried(EmbeddedProvider):
        def close(self):
            raise OSError("the token could not be revoked")

    @hookimpl
    def register_ca_providers():
        return [ProviderSpec("broken", EmbeddedSettings, Worried, "a CA that does not let go")]
"""


@pytest.mark.needs("userns")
def test_what_closing_the_certificate_authority_has_to_say_is_told_once(
    cli: Cli, install: Callable[[str, str], None]
) -> None:
    install("worried", WORRIED_PROVIDER)
    Path("Dockerfile").write_text("FROM scratch\n")
    done = cli("rootfs", "--no-cache", "--tag", "t/worried:1", "--output", "tar", "--ca", "broken")
    lines = [line for line in done.out.splitlines() if "revoked" in line]
    assert lines == ["warning: closing the provider failed: OSError: the token could not be revoked"]
    assert done.err == ""


def test_a_reader_that_has_gone_ends_the_command_silently(cli: Cli) -> None:
    with stdout_is(pipe_without_reader()):
        done = cli("config", "schema", status=74)
    assert done.err == ""


@pytest.mark.needs("userns")
@pytest.mark.parametrize("stderr", ["> image.tar 2> /dev/full", "2>&1 > image.tar | true"])
def test_progress_beside_an_image_that_cannot_be_written_has_the_status_of_output(
    host_cli: Cli, stderr: str
) -> None:
    Path("Dockerfile").write_text("FROM host\nRUN true\n")
    script = f'"$0" build --output type=tar,dest=- . {stderr}; echo ${{PIPESTATUS[0]}}'
    environ = {**os.environ, "FIREBUILD_HOME": str(host_cli.home)}
    command = ["bash", "-c", script, str(BIN / "firebuild")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("74\n", "")


def test_a_full_disk_behind_stdout_is_told(cli: Cli) -> None:
    with stdout_is(os.open("/dev/full", os.O_WRONLY)):
        done = cli("config", "schema", status=74)
    assert done.err == "error: standard output can't be written: No space left on device\n"


@pytest.mark.needs("userns")
def test_a_refused_peer_is_told_once(cli: Cli) -> None:
    start = BootstrapServer.start

    def start_and_call(server: BootstrapServer, listener: socket.socket | None = None) -> str:
        host_port = start(server, listener)
        host, _, port = host_port.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(ConnectionResetError):
                stranger.recv(1)
        return host_port

    cli.monkeypatch.setattr(BootstrapServer, "start", start_and_call)
    cli.monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would hide the matter
    Path("Dockerfile").write_text("FROM scratch\n")
    done = cli("rootfs", "--no-cache", "--tag", "t/refused:1", "--output", "tar")
    assert done.out.count("warning: refused a connection from 127.0.0.1:") == 1
    assert done.err == ""


@pytest.mark.needs("userns")
@pytest.mark.parametrize("progress", ["plain", "rawjson"])
def test_a_build_whose_reader_has_gone_cleans_up_and_ends_silently(cli: Cli, progress: str) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    with stdout_is(pipe_without_reader()):
        done = cli("rootfs", "--tag", "t/pipe:1", "--output", "tar", "--progress", progress, status=74)
    assert done.err == ""
    assert cli.leftovers() == []


def test_a_broken_receiver_of_events_is_traced_to_standard_output(
    cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    error = FirebuildError("the receiver of the build's events failed")
    error.__cause__ = OutputError("standard output can't be written: no paper")
    assert report(error) is ExitStatus.OUTPUT
    assert capfd.readouterr().err == "error: standard output can't be written: no paper\n"


def test_a_click_error_without_a_command_is_told_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert report(click.ClickException("something")) is ExitStatus.BAD_INPUT
    assert capfd.readouterr().err == "error: something\n"


def test_a_full_stderr_leaves_the_status(cli: Cli) -> None:
    saved = os.dup(2)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 2)
    os.close(full)
    try:
        cli("images", "rm", "x", status=2)
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_the_installed_command_stops_where_its_reader_does(tmp_path: Path) -> None:
    process = Firebuild(tmp_path / "home").popen("base", "list")
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (74, b"")


@pytest.mark.parametrize(
    ("argument", "stream", "status"),
    [("--version", "", 0), ("nope", "2>&-", 2), ("--help", ">/dev/full", 74)],
)
def test_the_installed_command_ends_with_the_status_of_what_it_did(
    argument: str, stream: str, status: int
) -> None:
    code = "from firebuild_bootstrap.cli import program; program()"
    script = f'exec "$0" -c "{code}" {argument} {stream}'
    done = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True, timeout=60, check=False)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr


@pytest.mark.needs("userns")
def test_streams_that_the_caller_closed_do_no_harm(tmp_path: Path) -> None:
    firebuild = Firebuild(tmp_path / "home")
    (tmp_path / "tree").mkdir()
    script = f'exec "$0" base import tiny {tmp_path}/tree <&- >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", script, str(firebuild.program)],
        env=firebuild.environ,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (74, b"")  # what it made of the tree has nobody read
    assert "tiny:latest" in firebuild("base", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("images save tiny:1", 74),
        ("images export tiny:1 -o tar,dest=-", 74),
        ("build -t tiny:2 -o type=oci,dest=- .", 74),
        ("build -q -t tiny:2 .", 74),
        ("build -t tiny:2 .", 0),  # what it shows is no result
        ("images rm tiny:1 tiny:3", 74),
        ("images inspect tiny:1", 74),
        ("config show", 74),
        ("ca providers --json", 74),
        ("--version", 74),
    ],
)
@pytest.mark.needs("userns")
def test_a_result_that_cannot_be_written_is_an_error_where_standard_output_is_closed(
    tmp_path: Path, arguments: str, status: int
) -> None:
    firebuild = Firebuild(tmp_path / "home")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nLABEL a=b\n")
    firebuild("build", "-q", "-t", "tiny:1", "-t", "tiny:3", str(tmp_path))
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" {arguments} >&-', str(firebuild.program)],
        env=firebuild.environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status
    said = "error: standard output can't be written: it is closed\n"
    assert done.stderr == (said if status else "")
    # An image that nobody gets is not built; all else is done.
    names = firebuild("images", "list").stdout
    assert ("tiny:2" in names) == (arguments in ("build -q -t tiny:2 .", "build -t tiny:2 ."))
    assert ("tiny:1" in names, "tiny:3" in names) == (("rm" not in arguments),) * 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("images", "save", "tiny:1"),
        ("images", "export", "tiny:1", "-o", "tar,dest=-"),
        ("build", "-q", "-t", "tiny:1", "-o", "type=docker,dest=-", "."),
    ],
)
@pytest.mark.needs("userns")
def test_an_archive_whose_reader_has_gone_is_an_error_in_words(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    firebuild = Firebuild(tmp_path / "home")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    firebuild("build", "-q", "-t", "tiny:1", str(tmp_path))
    process = subprocess.Popen(
        [firebuild.program, *arguments],
        env=firebuild.environ,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 74
    assert error == b"error: standard output can't be written: Broken pipe\n"


def in_mount_namespace(firebuild: Firebuild, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell whose mounts end with it; the command is its $0."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(firebuild.program)],
        env=firebuild.environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.root
@pytest.mark.needs("userns")
def test_a_full_disk_is_a_machine_error_wherever_it_strikes(tmp_path: Path) -> None:
    """One small disk after the other, each mounted for this command alone."""
    home = tmp_path / "home"
    home.mkdir()
    firebuild = Firebuild(home)
    (tmp_path / "payload").write_bytes(os.urandom(1 << 20))
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY payload /\n")
    build = f"rootfs --dockerfile {tmp_path}/Dockerfile --context {tmp_path} --tag t/full:1 --output tar"
    for size, command, status in (("256k", "base from-host", 6), ("512k", build, 1), ("1500k", build, 6)):
        script = (
            f'mount -t tmpfs -o size={size} none {home} && "$0" {command}; status=$?;'
            f" echo left: $(ls {home}/builds {home}/*/staging 2>/dev/null | grep -v :); exit $status"
        )
        done = in_mount_namespace(firebuild, script)
        report = f"{size} {command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == status, report
        assert "No space left on device" in done.stderr, report
        assert str(home) in done.stderr, report
        assert "  hint: " in done.stderr, report
        assert "Traceback" not in done.stderr, report
        assert "internal error" not in done.stderr, report
        assert done.stdout.splitlines()[-1] in ("left:", "left: lock"), report


@pytest.mark.root
@pytest.mark.needs("userns", "busybox")
def test_a_run_without_room_says_where_and_how_to_make_some(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    firebuild = Firebuild(home)
    shutil.copy("/bin/busybox", tmp_path / "sh")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY sh /bin/sh\n")
    script = (
        f'mount -t tmpfs -o size=8m none {home} && "$0" build -q -t full {tmp_path} && '
        f"{{ head -c 9000000 /dev/zero >{home}/filler; true; }} 2>/dev/null && "
        f'truncate -s -8192 {home}/filler && "$0" run --machine local full /bin/sh -c true'
    )
    done = in_mount_namespace(firebuild, script)
    assert done.returncode == 125, done.stderr
    assert re.search(
        rf"^error: .*: No space left on device\n  hint: if the disk of {home}/builds/\S+ is full: "
        r"`firebuild du` shows what the store takes, `firebuild cache prune`",
        done.stderr,
    ), done.stderr
