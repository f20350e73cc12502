"""`firebuild build --ready`: an image is booted, and stored only when it answers; on the driver local."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.processes import guests
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.config import Healthcheck, ImageConfig
from firebuild_bootstrap.readiness import Checks, Schedule, checks_of
from support import BIN, REPO, leftovers, unwarned

PAGE = (REPO / "docs/ready.md").read_text()

pytestmark = pytest.mark.needs("userns")

SERVER = """\
FROM host
RUN echo 'app:x:1234:1234::/home/app:/bin/sh' >> /etc/passwd && mkdir -m 777 /state
ENV PATH=/bin:/usr/bin STATE=/state
WORKDIR /state
"""


def dockerfile(*lines: str) -> None:
    Path("Dockerfile").write_text(SERVER + "".join(f"{line}\n" for line in lines))


def is_stored(cli: Cli, tag: str) -> bool:
    return cli.status_of("images", "inspect", tag) == 0


@pytest.mark.needs("ids")
def test_an_image_that_answers_is_stored_with_all_that_was_asked_for(host_cli: Cli) -> None:
    dockerfile(
        "USER app",
        "HEALTHCHECK --interval=100ms CMD test $(id -u) = 1234 && test -e $STATE/up && ! test -e /proc/2000",
        'CMD ["/bin/sh", "-c", "sleep 0.2; touch up; exec sleep 1000"]',
    )
    done = host_cli("build", "-t", "ready", "--ready", "--output", "out.tar", "--iidfile", "id", ".")
    assert "info: the image answers, " in done.out
    assert Path("out.tar").exists()
    assert Path("id").read_text().startswith("sha256:")
    assert is_stored(host_cli, "ready")
    # What it did while it ran is not in it.
    host_cli("run", "--entrypoint", "/bin/sh", "ready", "-c", "! test -e up")
    # An image whose steps are all cached is asked as well.
    dockerfile('CMD ["/bin/sh", "-c", "exec sleep 1000"]')
    assert host_cli("build", "-t", "again", "--ready=true", ".").out.count("info: the image answers") == 1
    assert host_cli.leftovers() == []


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            ["HEALTHCHECK --retries=2 CMD echo not yet >&2; exit 4"],
            ["--ready", "--ready-interval=50ms"],
            "the image does not answer: 2 checks in a row failed, and the last ended with status 4: not yet",
        ),
        (
            [],
            [
                "--ready=sleep 1000 & sleep 1000",
                "--ready-timeout=100ms",
                "--ready-interval=1ms",
                "--ready-retries=1",
            ],
            "the image does not answer: the check took longer than 0.1s",
        ),
        (
            ['HEALTHCHECK --interval=1ms CMD ["/none"]'],
            ["--ready", "--ready-retries=1"],
            "the image does not answer: the check ended with status 127: /none: not found",
        ),
    ],
)
def test_one_that_does_not_is_not_stored_and_the_end_of_its_console_is_shown(
    host_cli: Cli, lines: list[str], options: list[str], message: str
) -> None:
    dockerfile(*lines, "CMD printf 'no \\033[31m database'; exec sleep 1000")
    host_cli("rmi", "-f", "mute") if is_stored(host_cli, "mute") else None
    given = (*options, "--output", "out.tar", "--iidfile", "id", "--metadata-file", "all")
    done = host_cli("build", "-t", "mute", *given, ".", status=7)
    assert done.err.startswith(
        f"error: {message}\n  the end of its console:\n    no \\x1b[31m database\n  hint: "
    )
    assert not is_stored(host_cli, "mute")
    assert sorted(path.name for path in Path().iterdir()) == ["Dockerfile"]
    assert host_cli.leftovers() == []


def test_the_image_that_had_the_tag_keeps_it(host_cli: Cli) -> None:
    dockerfile('CMD ["/bin/sh", "-c", "exec sleep 1000"]')
    host_cli("build", "-q", "-t", "kept", "--ready=true", ".")
    before = host_cli("images", "inspect", "kept").out
    dockerfile("ENV NEW=1", 'CMD ["/bin/sh", "-c", "exit 3"]')
    done = host_cli("build", "-t", "kept", "--ready=true", "--ready-retries=1", ".", status=7)
    assert done.err == (
        "error: the command of the image ended with status 3 before it answered\n"
        "  its command has written nothing\n"
    )
    assert host_cli("images", "inspect", "kept").out == before
    dockerfile('CMD ["/none"]')
    done = host_cli("build", "-t", "kept", "--ready=true", ".", status=7)
    assert done.first.startswith("error: the command of the image can't be executed: /none: not found")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (['CMD ["/bin/sh"]'], ["--ready"], "--ready: the image has no HEALTHCHECK"),
        (['CMD ["/bin/sh"]', "HEALTHCHECK NONE"], ["--ready"], "--ready: the image has no HEALTHCHECK"),
        (["ENTRYPOINT []", "CMD []"], ["--ready=true"], "the image t:latest has neither ENTRYPOINT nor CMD"),
        (
            ['CMD ["/bin/sh"]'],
            ["--ready-retries=3"],
            "--ready-retries needs --ready",
        ),
        (
            ['CMD ["a"]'],
            ["--ready=b", "--ready-retries=x"],
            "--ready-retries: expected a whole number, found 'x'",
        ),
        (['CMD ["a"]'], ["--ready=b", "--ready-timeout=1"], "--ready-timeout: expected a duration"),
        (['CMD ["a"]'], ["--ready=b", "--machine=external"], "--ready starts a machine"),
    ],
)
def test_what_could_never_answer_is_an_error_before_anything_is_built(
    host_cli: Cli, lines: list[str], options: list[str], message: str
) -> None:
    dockerfile("RUN exit 9", *lines)
    assert message in host_cli("build", "-t", "t", *options, ".", status=2).first


@contextmanager
def asking(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A build that asks an image which never answers."""
    dockerfile("CMD echo up; exec sleep 1000")
    environ = {**os.environ, "FIREBUILD_HOME": str(home)}
    command = [str(BIN / "firebuild"), "build", "--progress=rawjson", "-t", "never", "--ready=false", "."]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("name") == "waiting until the image answers":
                break
        yield process


def test_an_interrupted_check_ends_the_build_and_leaves_nothing(host_home: Path, host_cli: Cli) -> None:
    with asking(host_home) as process:
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (error, process.returncode) == (b"error: the build was interrupted (SIGINT)\n", 130)
    assert leftovers(host_home) == []
    assert not is_stored(host_cli, "never")


def test_a_machine_that_ends_meanwhile_is_said_with_the_end_of_the_console(
    host_home: Path, host_cli: Cli
) -> None:
    with asking(host_home) as process:
        while not (machines := guests()):
            assert process.poll() is None
        for machine in machines:
            os.kill(machine, signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 4, error
    assert error.startswith(b"error: "), error
    assert b"  the end of its console:\n    up\n" in error or b"its command has written nothing" in error
    assert leftovers(host_home) == []
    assert not is_stored(host_cli, "never")


def test_the_time_limit_of_the_build_ends_it_where_all_steps_are_cached(
    host_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREBUILD_BOOTSTRAP__INITIAL_TIMEOUT", "1500ms")
    monkeypatch.setenv("FIREBUILD_BOOTSTRAP__BUILD_TIMEOUT", "10ms")
    Path("Dockerfile").write_text('FROM host\nCMD ["/bin/sleep", "1000"]\n')
    done = host_cli("build", "-t", "late", "--ready=sleep 1000", "--ready-timeout=20s", ".", status=5)
    assert done.first == "error: the build and its outputs took longer than 1.51 seconds"


def test_the_examples_of_the_page_do_what_it_says(host_home: Path, host_cli: Cli) -> None:
    (text,) = re.findall(r"^```dockerfile\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    Path("Dockerfile").write_text(text)
    (block,) = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    examples = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    assert len(examples) == 2
    environ = {**os.environ, "FIREBUILD_HOME": str(host_home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    for command, expected in examples:
        shell = ["/bin/sh", "-c", f"{{ {command}; }} 2>&1"]
        done = subprocess.run(shell, env=environ, capture_output=True, text=True, check=True)
        assert unwarned(done.stdout) == expected


def test_options_go_before_the_healthcheck_and_that_before_dockers_defaults() -> None:
    own = Healthcheck(("CMD", "own"), interval_ns=5_000_000_000, retries=7)
    asked = Healthcheck(("CMD-SHELL", "asked it"), timeout_ns=2_000_000)
    config = ImageConfig(healthcheck=own, shell=("/bin/ash", "-ec"))
    assert checks_of(asked, config) == Checks(
        argv=("/bin/ash", "-ec", "asked it"), interval=5.0, timeout=0.002, retries=7
    )
    assert checks_of(Healthcheck(()), config).argv == ("own",)
    assert checks_of(asked, ImageConfig()) == Checks(argv=("/bin/sh", "-c", "asked it"), timeout=0.002)
    with pytest.raises(InputError, match="no HEALTHCHECK"):
        checks_of(Healthcheck(()), ImageConfig())


def test_checks_that_count_are_those_of_docker_and_others_come_before() -> None:
    schedule, now, begun = Schedule(Checks(argv=("x",), interval=10, retries=2), 100.0), 100.0, []
    while True:
        if schedule.begins(now):
            begun.append(now - 100)
            if schedule.failed(now):
                break
        now += 0.5
    assert begun == [0, 0.5, 1.5, 3.5, 7.5, 10, 20]

    starting = Schedule(Checks(argv=("x",), interval=10, retries=1, start_period=12, timeout=1), 0.0)
    assert [at for at in range(16) if starting.begins(at) and not starting.failed(at)] == [0, 1, 2, 4, 5, 10]
    assert starting.failures == 1
