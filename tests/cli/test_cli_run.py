"""`firebuild run` on the driver local: the same session and the same vminit as in a virtual machine."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.terminals import on_terminal
from firebuild_bootstrap.cli.run import read_env
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.running import RunRequest, command_of, stop_signal
from firebuild_bootstrap.wire import Attach
from support import BIN, REPO, await_end_of_processes, leftovers, unwarned

pytestmark = pytest.mark.needs("userns")

PAGE = (REPO / "docs/run.md").read_text()
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUgOPwXBTUOAx3EOCxzAoNIwwAAAAAAAAAAAAAAAAAA me@here"


@pytest.fixture
def image(host_cli: Cli) -> str:
    """An image that says all that an image can say about its command."""
    Path("Dockerfile").write_text(
        "FROM host\n"
        "RUN echo 'app:x:1234:1234::/home/app:/bin/sh' >> /etc/passwd && echo 'app:x:1234:' >> /etc/group\n"
        "ENV GREETING=hello PATH=/bin:/usr/bin\nWORKDIR /srv\nUSER app\n"
        'ENTRYPOINT ["/bin/sh", "-c", "echo $GREETING $1 $PWD; id -u", "-"]\nCMD ["default"]\n'
    )
    host_cli("build", "-q", "-t", "app", ".")
    return "app"


def start(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Run a command that says when it is there, and wait until it does."""
    process = subprocess.Popen(
        [BIN / "firebuild", "run", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "FIREBUILD_HOME": str(home)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n", process.communicate()
    return process


@pytest.mark.needs("ids")
def test_the_image_and_the_options_say_what_is_executed(host_cli: Cli, image: str) -> None:
    assert host_cli("run", image).out == "hello default /srv\n1234\n"
    given = ("-e", "GREETING=bye", "--user", "0", "--workdir", "/tmp")
    assert host_cli("run", *given, image, "me").out == "bye me /tmp\n0\n"
    assert host_cli("run", "--entrypoint", "/bin/sh", image, "-c", "exit 3", status=3).out == ""
    assert host_cli.leftovers() == []


@pytest.mark.needs("ids")
def test_another_user_can_open_its_standard_streams_by_their_names(host_cli: Cli) -> None:
    words = "cat /dev/stdin; echo out > /dev/stdout; echo err > /dev/stderr"
    done = subprocess.run(
        [BIN / "firebuild", "run", "-i", "--user", "1234:5678", "host", "/bin/sh", "-ec", words],
        input=b"in\n",
        capture_output=True,
        check=True,
        env={**os.environ, "FIREBUILD_HOME": str(host_cli.home)},
    )
    assert (done.stdout, done.stderr) == (b"in\nout\n", b"err\n")
    Path("Dockerfile").write_text("FROM host\nUSER 1234\nRUN echo err > /dev/stderr\n")
    host_cli("build", "-t", "streams", "--quiet", ".")


def test_the_directory_of_a_volume_is_there_even_if_the_image_has_none(host_cli: Cli) -> None:
    Path("Dockerfile").write_text(
        "FROM host\nRUN mkdir /own && echo kept > /own/file && chmod 700 /own && echo > /plain\n"
        "VOLUME /a/made /own relative /plain\n"
    )
    host_cli("build", "-t", "volumes", "--quiet", ".")
    words = "echo > /a/made/file; ls -ldn /a/made /own /relative | cut -c -14; cat /own/file; echo > /plain"
    done = host_cli("run", "volumes", "/bin/sh", "-ec", words)
    assert done.out.splitlines() == ["drwxr-xr-x 2 0", "drwx------ 2 0", "drwxr-xr-x 2 0", "kept"]
    assert host_cli("run", "--read-only", "volumes", "/bin/sh", "-c", "cd /a/made && pwd").out == "/a/made\n"


def test_an_image_is_called_by_the_id_that_its_build_prints(host_cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM host\nCMD echo this one\n")
    image = host_cli("build", "-q", ".").out.strip()
    assert host_cli("run", image).out == "this one\n"
    [name] = re.findall(r'"tag": "(.+)"', host_cli("images", "inspect", image).out)
    host_cli("images", "tag", image, "web:1")
    assert f"has the names {name}, web:1" in host_cli("images", "rm", "web:1", image, status=2).err
    host_cli("images", "rm", "web:1")
    assert host_cli("images", "rm", image).out == f"removed {name}\n"
    assert f"there is no image {image}" in host_cli("images", "rm", image, status=2).err
    host_cli.setenv("FIREBUILD_PULL", "missing")
    assert f"no image of the store has the id {image}" in host_cli("run", image, status=125).err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nosuch host true", "no such option '--nosuch'"),
        (
            "-v /a:/b host true",
            "--volume is an option of docker run that firebuild does not have\n  hint: files of this host",
        ),
        ("--mount=type=bind host true", "--mount is an option of docker run"),
        ("--network container:web host true", "invalid value for '--network': 'container:web'"),
        ("--read-only=perhaps host true", "--read-only: expected true or false, found 'perhaps'"),
        ("--env-file / host true", "'/' is a directory"),
        ("--hostname a_b host true", "--hostname: expected a host name, found 'a_b'\n  hint: labels"),
        (
            "--identity *.web host true",
            '--identity: expected a DNS name, found "*.web"\n  hint: certificates',
        ),
        ("", "missing argument 'IMAGE'"),
    ],
)
def test_wrong_arguments_have_a_status_that_no_command_has(host_cli: Cli, words: str, message: str) -> None:
    assert message in host_cli("run", *words.split(), status=125).err


def test_flags_take_true_and_false_and_what_follows_the_image_is_the_command_s(host_cli: Cli) -> None:
    words = (
        "/bin/sh",
        "-c",
        'echo "$A$B $*"; echo > /file',
        "-",
        "--read-only=false",
        "-v",
        "--",
        "--init=true",
    )
    done = host_cli("run", "--read-only=true", "-q", "-ieA=1", "--env", "B=2", "host", *words, status=2)
    assert done.out == "12 --read-only=false -v -- --init=true\n"
    done = host_cli("run", "--read-only=false", "-e", "--privileged=1", "--", "host", *words)
    assert unwarned(done.err) == ""


def test_a_command_has_any_time_for_signals_that_say_something_else_than_end(host_cli: Cli) -> None:
    words = "trap 'echo once' USR1; trap 'echo done; exit 3' USR2; echo up; while :; do sleep 0.05; done"
    process = start(host_cli.home, "host", "/bin/sh", "-c", words)
    assert process.stdout is not None
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == b"once\n"
    process.send_signal(signal.SIGUSR2)
    output, complaints = process.communicate(timeout=30)
    assert (output, unwarned(complaints.decode())) == (b"done\n", "")
    assert process.returncode == 3
    assert host_cli.leftovers() == []


def test_entrypoint_and_command_are_combined_as_docker_does() -> None:
    config = ImageConfig(entrypoint=("a",), cmd=("b",))
    assert command_of(RunRequest(image="i"), config) == ("a", "b")
    assert command_of(RunRequest(image="i", command=("c",)), config) == ("a", "c")
    assert command_of(RunRequest(image="i", entrypoint=("d",)), config) == ("d",)
    assert command_of(RunRequest(image="i", entrypoint=(), command=("c",)), config) == ("c",)
    booted = RunRequest(image="i", command=("c",), attach=Attach(init=True))
    assert command_of(booted, config) == ("/sbin/init", "c")
    assert command_of(replace(booted, entrypoint=("/e",)), config) == ("/e", "c")
    with pytest.raises(InputError, match="neither ENTRYPOINT nor CMD"):
        command_of(RunRequest(image="i"), ImageConfig())


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("", signal.SIGTERM),
        ("SIGUSR1", signal.SIGUSR1),
        ("quit", signal.SIGQUIT),
        ("9", signal.SIGKILL),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMIN", signal.SIGRTMIN),
        *(
            (text, signal.SIGTERM)
            for text in ("0", "65", "9" * 5000, "SIG_DFL", "NONE", "RTMIN+999", "RTMIN+x y")
        ),
    ],
)
def test_the_signal_that_stops_is_the_images_where_it_is_one(said: str, number: int) -> None:
    assert stop_signal(ImageConfig(stop_signal=said)) == number
    assert stop_signal(ImageConfig(), init=True) == signal.SIGRTMIN + 3


def test_variables_are_read_as_docker_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# a comment\n\n  A=1\nB='2' \nC\nD\n")
    found = read_env([file], ["A=3", "E=", "F"], {"C": "here", "F": "there"})
    assert found == {"A": "3", "B": "'2' ", "C": "here", "E": "", "F": "there"}
    file.write_text("A=1\n=secret\n")
    with pytest.raises(InputError, match=r"env:2: expected NAME=VALUE") as raised:
        read_env([file], [], {})
    assert "secret" not in str(raised.value)
    file.write_text("A=1\nexport B=secret\n")
    with pytest.raises(InputError, match=r"env:2: .*found the name 'export B'") as raised:
        read_env([file], [], {})
    assert raised.value.hint == "leave the word export out"
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_env([tmp_path / "none"], [], {})
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_env([file], [], {})
    file.write_bytes(b"A=" + b"a" * (1 << 20))
    with pytest.raises(InputError, match=r"env has more than 1\.0 MiB"):
        read_env([file], [], {})


def test_the_machine_is_configured_before_the_command_starts(host_cli: Cli) -> None:
    Path("key.pub").write_text(f"{KEY}\n")
    script = (
        "hostname; cat /etc/hostname /root/.ssh/authorized_keys /etc/profile.d/firebuild.sh; cat /etc/hosts"
    )
    given = ("--hostname", "web.example", "--ssh-key", "key.pub", "-e", "LEVEL=debug")
    out = host_cli("run", *given, "host", "/bin/sh", "-c", script.replace("hostname;", "uname -n;", 1)).out
    lines = out.splitlines()
    assert lines[:3] == ["web.example", "web.example", KEY]
    assert "export LEVEL=debug" in lines
    assert "127.0.1.1 web.example web" in lines


def test_what_is_written_is_gone_and_nothing_is_written_to_a_read_only_image(host_cli: Cli) -> None:
    host_cli("run", "host", "/bin/sh", "-c", "echo text > /file; cat /file")
    host_cli("run", "host", "/bin/sh", "-c", "test ! -e /file")
    done = host_cli("run", "--read-only", "host", "/bin/sh", "-c", "echo text > /file", status=2)
    assert "Read-only file system" in done.err
    assert (
        host_cli("run", "--network", "none", "host", "/bin/sh", "-c", "cat /proc/net/dev").out.count(":") == 1
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("host", "no-such-command"), 127, "error: no-such-command: not found in PATH="),
        (("host", "/etc"), 126, "error: /etc: "),
        (("--workdir", "/bin/sh", "host", "/bin/sh"), 125, "error: WORKDIR /bin/sh: "),
        (("--user", "nobody-there", "host", "/bin/sh"), 125, "error: "),
        (("no-such-image",), 125, "error: "),
        (("--memory", "1GiB", "host"), 125, "error: --memory: the machine local does not take it"),
        (("--disk", "1GiB", "host"), 125, "error: --disk: the machine local has no drive"),
        (("--publish", "80", "host"), 125, "error: --publish: expected [ADDRESS:]PORT:PORT, found '80'"),
        (("-p", "80:65536", "host"), 125, "error: --publish: expected [ADDRESS:]PORT:PORT"),
        (
            ("-p", "999.1.1.1:80:80", "host"),
            125,
            "error: --publish: expected [ADDRESS:]PORT:PORT, found '999",
        ),
        (("-p", "8080:80", "host", "true"), 125, "error: --publish: only the machine qemu does that"),
        (("--init", "host"), 125, "error: --init: a sandbox has no system of its own to boot"),
        (("--init", "--user", "1", "host"), 125, "error: --init: an init is root"),
        (
            ("--machine", "qemu", "--network", "host", "host"),
            125,
            "error: command line: machine.qemu.network: ",
        ),
        (("--machine", "external", "host"), 125, "error: firebuild run starts a machine"),
        (("--tty", "host"), 125, "error: --tty: standard input and output are not a terminal"),
        (("--ssh-key", "private", "host"), 125, "error: --ssh-key private: this is a private key"),
        (("--ssh-key", "none", "host"), 125, "error: --ssh-key none can't be read: No such file"),
        (("--ssh-key", "me=Dockerfile", "host"), 125, "error: --ssh-key Dockerfile: expected public keys"),
        (
            ("--ssh-key", "/dev/zero", "host"),
            125,
            "error: --ssh-key /dev/zero can't be read: it has",
        ),
        (("--hostname", "not a name", "host", "/bin/sh"), 125, "error: --hostname: "),
    ],
)
def test_what_goes_wrong_is_said_in_words(
    host_cli: Cli, arguments: tuple[str, ...], status: int, message: str
) -> None:
    Path("private").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    Path("Dockerfile").write_text("FROM host\n")
    assert host_cli("run", *arguments, status=status).first.startswith(message)


def test_an_image_of_another_platform_is_refused(host_cli: Cli, image: str) -> None:
    record = (host_cli.home / f"images/names/library/{image}/latest/image.json").resolve()
    before = record.read_text()
    record.write_text(before.replace('"linux/amd64"', '"linux/s390x"'))
    try:
        done = host_cli("run", image, status=125)
    finally:
        record.write_text(before)  # the store is that of other tests, too
    assert done.first == "error: the image app:latest is for linux/s390x, and this host executes linux/amd64"


def test_input_passes_in_both_directions_without_a_limit_and_unchanged(
    host_home: Path, tmp_path: Path
) -> None:
    data = os.urandom(3_000_000)
    command = [str(BIN / "firebuild"), "run", "-i", "host", "cat"]
    environ = {**os.environ, "FIREBUILD_HOME": str(host_home)}
    done = subprocess.run(command, input=data, capture_output=True, env=environ, check=True)
    assert done.stdout == data
    # A command that takes none of it ends all the same.
    done = subprocess.run([*command[:-1], "true"], input=data, capture_output=True, env=environ, check=True)
    assert (done.stdout, unwarned(done.stderr.decode())) == (b"", "")


@pytest.mark.parametrize(
    ("script", "sent", "status", "out"),
    [
        ("trap 'echo heard; exit 4' INT; echo up; while :; do sleep 0.05; done", ["INT"], 4, b"heard\n"),
        ("echo up; exec sleep 1000", ["TERM"], 128 + signal.SIGTERM, b""),
        ("trap '' INT TERM; echo up; exec sleep 1000", ["INT", "TERM"], 128 + signal.SIGTERM, b""),
        ("echo up; kill -KILL $$", [], 128 + signal.SIGKILL, b""),
    ],
)
def test_signals_are_the_commands_and_a_second_one_ends_the_machine(
    host_home: Path, script: str, sent: list[str], status: int, out: bytes
) -> None:
    process = start(host_home, "host", "/bin/sh", "-c", script)
    for name in sent:
        process.send_signal(signal.Signals[f"SIG{name}"])
        if len(sent) > 1:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5 if name == "INT" else 0)
    assert (process.communicate(timeout=30)[0], process.returncode) == (out, status)
    assert leftovers(host_home) == []


def test_nothing_is_left_when_firebuild_is_killed(host_home: Path) -> None:
    process = start(host_home, "host", "/bin/sh", "-c", "echo up; exec sleep 1000")
    process.kill()
    process.communicate(timeout=30)  # its pipes are closed when the command has gone, too
    await_end_of_processes(host_home)
    assert leftovers(host_home) == []


def test_a_terminal_is_the_commands_with_its_size_and_its_keys(host_home: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["FIREBUILD_HOME"] = str(host_home)
        os.execv(BIN / "firebuild", ["firebuild", "run", "-it", "host", "/bin/sh"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    read = _reader(terminal)
    read("# ")
    os.write(terminal, b"tty; stty size\n")
    assert "/dev/pts/0\r\n33 77\r\n" in read("# ")
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 99, 0, 0))
    # The new size is there when its signal is.
    os.write(terminal, b"until stty size | grep 99; do sleep 0.05; done\n")
    assert "40 99\r\n" in read("# ")
    os.write(terminal, b"echo ready; sleep 1000\n")
    read("ready\r\n")
    os.write(terminal, b"\x03")
    read("# ")
    os.write(terminal, b"exit 5\n")
    read("")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    os.close(terminal)


def test_keys_are_those_of_firebuild_until_the_command_has_begun(host_home: Path) -> None:
    """A machine that does not come, or a registry that does not answer, would hold the terminal otherwise."""
    environ = {**os.environ, "FIREBUILD_HOME": str(host_home), "FIREBUILD_PULL": "missing"}
    with socket.create_server(("127.0.0.1", 0)) as registry:
        image = f"localhost:{registry.getsockname()[1]}/never"
        with on_terminal(BIN / "firebuild", "run", "-it", image, environ=environ) as terminal:
            connection = registry.accept()[0]
            assert terminal.keys() == "handled"
            terminal.type("\x03")
            connection.close()
            terminal.read()
            assert terminal.status() == 130
    given = ("run", "-it", "host", "/bin/sh", "-c", "echo up; read typed; echo got $typed")
    with on_terminal(BIN / "firebuild", *given, environ=environ) as terminal:
        terminal.type("ahead\n")
        terminal.read("up\r\n")
        assert terminal.keys() == "passed on"
        assert "got ahead\r\n" in terminal.read()
        assert terminal.status() == 0


def test_the_console_is_the_terminal_which_stays_while_nobody_has_it_open(host_home: Path) -> None:
    """systemd closes its terminal when it starts, and opens /dev/console to say something."""
    script = (
        "exec </dev/null >/dev/null 2>&1; sleep 0.5; echo later >/dev/console; echo last >/dev/tty; exit 3"
    )
    environ = {**os.environ, "FIREBUILD_HOME": str(host_home)}
    given = ("run", "-it", "host", "/bin/sh", "-c", script)
    with on_terminal(BIN / "firebuild", *given, environ=environ) as terminal:
        assert "later\r\nlast\r\n" in terminal.read()
        assert terminal.status() == 3


def _reader(terminal: int) -> Callable[[str], str]:
    """Return what reads up to a text, or without one to the end."""
    said = ""

    def read(until: str) -> str:
        nonlocal said
        while not until or until not in said:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # nobody has the other side any more
                data = b""
            if not data:
                assert not until, said
                break
            said += data.decode()
        before, _, said = said.partition(until) if until else (said, "", "")
        return before + until

    return read


def test_the_examples_of_the_page_do_what_it_says(host_home: Path, tmp_path: Path) -> None:
    examples = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", PAGE, re.MULTILINE)
    assert len(examples) == 14
    path = f"{BIN}:{os.environ['PATH']}"
    environ = {**os.environ, "FIREBUILD_HOME": str(host_home), "PATH": path}
    for command, expected in examples:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=tmp_path,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if "error:" in expected else subprocess.DEVNULL,
            text=True,
            check=False,
        )
        assert unwarned(done.stdout) == expected, command


def test_the_page_names_every_option() -> None:
    done = subprocess.run([BIN / "firebuild", "run", "--help"], capture_output=True, text=True, check=True)
    missing = {name for name in re.findall(r"--[a-z-]+", done.stdout) if f"`{name}" not in PAGE}
    assert missing == {"--help", "--port"}
