"""Parts of the kit on their own: what no provider of the suites makes them do."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import Field

from firebuild_pki import SecretRef, Settings
from firebuild_pki.conformance.spilling import recorded_logs, secret_refs, with_secret
from firebuild_pki.conformance.watching import traced, watched


class Login(Settings):
    name: str = "builder"
    password: SecretRef = SecretRef(env="PASSWORD")


class Many(Settings):
    logins: tuple[Login, ...] = ()
    tokens: dict[str, SecretRef] = Field(default_factory=dict)
    login: Login | None = None


def test_references_to_secrets_are_found_wherever_they_are() -> None:
    settings = Many(logins=(Login(), Login()), tokens={"a": SecretRef(file="b")})
    assert [path for path, _ in secret_refs(settings)] == [
        ("logins", 0, "password"),
        ("logins", 1, "password"),
        ("tokens", "a"),
    ]


def test_references_can_be_replaced_wherever_they_are() -> None:
    raw = {"logins": [{"name": "x"}, {}], "other": 1}
    ref = {"env": "E"}
    assert with_secret(raw, ("logins", 1, "password"), ref) == {
        "logins": [{"name": "x"}, {"password": ref}],
        "other": 1,
    }
    assert with_secret(None, ("login", "password"), ref) == {"login": {"password": ref}}
    assert raw == {"logins": [{"name": "x"}, {}], "other": 1}


def test_only_the_thread_that_is_watched_counts() -> None:
    def look() -> None:
        os.stat("/")
        os.listdir("/")

    with watched() as seen:
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert seen == []
        look()
    assert seen == ["os.stat '/'", "os.listdir '/'"]
    look()
    assert len(seen) == 2


def test_every_usual_way_out_is_watched(tmp_path: Path) -> None:
    before = (os.open, open, socket.socket.__init__)
    with watched() as seen:
        (tmp_path / "file").write_text("x")
        os.path.exists("/")
        list(tmp_path.iterdir())
        tempfile.TemporaryFile().close()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", 1), timeout=5)
        subprocess.run(["true"], check=True)
    ways = [one.split(" ")[0] for one in seen]
    assert {"open", "os.stat", "os.open", "socket.getaddrinfo", "socket.socket", "subprocess.Popen"} <= set(
        ways
    )
    assert f"open {str(tmp_path / 'file')!r}" in seen or f"open {tmp_path / 'file'!r}" in seen
    assert (os.open, open, socket.socket.__init__) == before


def test_warnings_are_recorded_and_come_out_all_the_same() -> None:
    with warnings.catch_warnings(record=True) as shown, recorded_logs() as record:
        warnings.simplefilter("always")
        warnings.warn("used the token", stacklevel=1)
    assert record.text == "used the token"
    assert [str(one.message) for one in shown] == ["used the token"]


def test_a_backend_in_the_same_process_may_do_what_it_likes(capfd: pytest.CaptureFixture[str]) -> None:
    """It runs in a thread that was there before, or in one that such a thread starts."""

    def serve() -> None:
        print("request with a token")
        file = Path(tempfile.gettempdir(), "served")
        file.write_text("token")
        Path(tempfile.gettempdir(), "serving").mkdir()
        os.environ["SERVED"] = "token"
        subprocess.run(["true", "token"], check=True)

    def serve_in_a_thread() -> None:
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()

    with ThreadPoolExecutor(1) as backend:
        backend.submit(int).result()
        with traced() as traces:
            backend.submit(serve_in_a_thread).result()
            os.environ.pop("SERVED")
            traces.look("now")
    assert capfd.readouterr().out == "request with a token\n"
    assert traces.printed == {"standard output": "", "standard error": ""}
    assert (traces.commands, traces.variables, traces.files) == ([], [], [])
    assert (traces.changes, traces.left) == ({}, [])


def test_what_is_traced_is_put_back(tmp_path: Path) -> None:
    before = os.getcwd(), socket.getdefaulttimeout(), dict(os.environ), tempfile.gettempdir(), sys.stdout
    mask = os.umask(0o027)
    with traced() as traces:
        os.chdir(tmp_path)
        os.umask(0)
        socket.setdefaulttimeout(3)
        os.environ["ADDED"] = "1"
        home = os.environ.pop("PATH")
        traces.look("now")
        assert home
    assert os.umask(mask) == 0o027
    assert before == (
        os.getcwd(),
        socket.getdefaulttimeout(),
        dict(os.environ),
        tempfile.gettempdir(),
        sys.stdout,
    )
    assert set(traces.changes) == {
        "the working directory",
        "the umask",
        "the default timeout of sockets",
        "the environment variable ADDED",
        "the environment variable PATH",
    }


def test_a_stream_that_is_kept_leads_to_where_it_led_before(capfd: pytest.CaptureFixture[str]) -> None:
    with traced() as traces:
        kept = logging.StreamHandler()
        print("during", file=kept.stream)
    print("after", file=kept.stream)
    assert traces.printed["standard error"] == "during\n"
    assert capfd.readouterr().err == "after\n"


def test_files_are_seen_however_they_are_written(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with traced() as traces:
        place = Path(tempfile.gettempdir())
        (place / "open").write_text("open")
        (place / "open").read_text()
        (place / "mine").touch(mode=0o600)
        with os.fdopen(os.open(place / "mine", os.O_WRONLY), "w") as file:
            file.write("mine")
        (private / "within").write_text("within")
        os.rename(place / "open", place / "moved")
        unreadable = place / "unreadable"
        unreadable.write_text("?")
        unreadable.chmod(0)
        os.unlink(place / "mine")
        with tempfile.TemporaryFile() as nameless:
            nameless.write(b"nameless")
        Path(os.devnull).write_text("nothing")
    found = {Path(one.path).name.split(" ")[0]: (one.exposed, one.removed, one.text) for one in traces.files}
    readable = "?" if os.geteuid() == 0 else ""
    assert found.pop("unreadable") == (False, False, readable)
    (nameless_one,) = (found.pop(name) for name in set(found) - {"open", "mine", "within"})
    assert nameless_one == (False, True, "nameless")
    assert found == {
        "open": (True, False, "open"),
        "mine": (False, True, "mine"),
        "within": (False, False, "within"),
    }
    assert [Path(one.removeprefix("the file ")).name for one in traces.left] == ["moved", "unreadable"]


def test_processes_are_seen_however_they_are_started() -> None:
    with traced() as traces:
        subprocess.Popen(args=("true", b"bytes", Path("path"))).wait()
        subprocess.run("true shell", shell=True, check=True)
        os.system("true system")
        with os.popen("true popen") as pipe:
            pipe.read()
        with suppress(FileNotFoundError):
            subprocess.run([b"/no/such/program"], check=True)
        with warnings.catch_warnings():
            # newer Pythons warn of forks beside threads, such as those of the test runner
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # a zombie does nothing any more
    os.waitpid(child, 0)
    assert traces.commands == [
        "true bytes path",
        "true shell",
        "true system",
        "true popen",
        "/no/such/program",
    ]
    assert traces.left == []
