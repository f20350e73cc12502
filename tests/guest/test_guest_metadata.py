"""Reading the metadata, and the command line of vminit on top of it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.guest.errors import GuestError, InputError
from firebuild_bootstrap.guest.main import main
from firebuild_bootstrap.guest.metadata import MetadataClient
from firebuild_bootstrap.mmds import DataStore, MetadataEmulator, MmdsVersion
from support import serving

DOCUMENT = {"LocalHostname": "box", "Env": {"A": "1"}}


def serve(directory: Path, document: Any = DOCUMENT, **options: Any) -> MetadataEmulator:
    store = DataStore()
    store.put({"latest": {"meta-data": document}})
    return MetadataEmulator(store, directory / "mmds/sock", **options)


@pytest.mark.parametrize("version", list(MmdsVersion))
@pytest.mark.parametrize("release", [(1, 12), (1, 13)])
def test_every_version_of_the_service_is_read(
    tmp_path: Path, version: MmdsVersion, release: tuple[int, int]
) -> None:
    emulator = serve(tmp_path, version=version, release=release)
    address = emulator.start()
    assert MetadataClient(address).read() == DOCUMENT
    emulator.stop()


def test_tcp_works_and_no_proxy_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    store = DataStore()
    store.put({"latest": {"meta-data": DOCUMENT}})
    emulator = MetadataEmulator(store, ("127.0.0.1", 0))
    assert MetadataClient(emulator.start()).read() == DOCUMENT
    emulator.stop()


def test_a_service_that_comes_up_later_is_waited_for(tmp_path: Path) -> None:
    emulator = serve(tmp_path)
    timer = threading.Timer(0.4, emulator.start)
    timer.start()
    assert MetadataClient(f"unix:{tmp_path}/mmds/sock", timeout=20).read() == DOCUMENT
    timer.join()
    emulator.stop()


def test_a_service_that_never_comes_up_is_an_error_after_the_time_given(tmp_path: Path) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    client = MetadataClient(f"unix:{tmp_path}/none", timeout=3, clock=lambda: now[0], sleep=sleep)
    with pytest.raises(InputError, match="did not answer within 3 s: FileNotFoundError"):
        client.read()
    assert 3 <= now[0] < 4


@pytest.mark.parametrize(
    "address",
    [
        "",
        "unix:",
        "unix:rel",
        "https://x",
        "http://",
        "http://h/path",
        "http://u@h",
        "http://h:x",
        "http://h:65536",
        "http://[::1",
    ],
)
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="expected unix:/path/of/socket or http://host"):
        MetadataClient(address)


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers from the server's list: (status, body); the last answer repeats."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        answers = self.server.answers  # type: ignore[attr-defined]
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.server.seen.append((self.command, self.path, dict(self.headers)))  # type: ignore[attr-defined]
        if status == 0:
            self.wfile.write(body)
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def faulty() -> Iterator[http.server.HTTPServer]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Faulty)
    server.seen = []  # type: ignore[attr-defined]
    with serving(server):
        yield server


def ask(server: http.server.HTTPServer, *answers: tuple[int, bytes], timeout: float = 0.5) -> dict[str, Any]:
    server.answers = list(answers)  # type: ignore[attr-defined]
    return MetadataClient(f"http://127.0.0.1:{server.server_port}", timeout=timeout).read()


@pytest.mark.parametrize("status", [404, 405, 501])
def test_without_tokens_the_request_goes_without_one(faulty: http.server.HTTPServer, status: int) -> None:
    assert ask(faulty, (status, b""), (200, b"{}")) == {}
    (put, token_path, put_headers), (get, path, headers) = faulty.seen  # type: ignore[attr-defined]
    assert (put, token_path, get, path) == ("PUT", "/latest/api/token", "GET", "/latest/meta-data")
    assert put_headers["X-metadata-token-ttl-seconds"] == "60"
    assert headers["Accept"] == "application/json"
    assert "X-metadata-token" not in headers


def test_a_token_is_sent_along(faulty: http.server.HTTPServer) -> None:
    ask(faulty, (200, b"T0K\n"), (200, b"{}"))
    assert faulty.seen[1][2]["X-metadata-token"] == "T0K"  # type: ignore[attr-defined]


def test_a_server_error_is_tried_again(faulty: http.server.HTTPServer) -> None:
    assert ask(faulty, (503, b""), (404, b""), (500, b""), (404, b""), (200, b'{"a": "b"}')) == {"a": "b"}


def test_a_broken_answer_is_tried_again(faulty: http.server.HTTPServer) -> None:
    assert ask(faulty, (0, b"not http\r\n\r\n"), (404, b""), (200, b"{}")) == {}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(401, b"no")], "refused a session token with HTTP status 401"),
        ([(200, b"T"), (401, b"no")], "refused latest/meta-data with HTTP status 401"),
        ([(404, b""), (404, b"Resource not found")], "has no latest/meta-data"),
        ([(404, b""), (200, b'{"Key": "SECRETWORD", ')], "is not a JSON object"),
        ([(404, b""), (200, b'["SECRETWORD"]')], "is not a JSON object"),
        ([(404, b""), (200, b"[" * 100_000 + b"SECRETWORD")], "is not a JSON object"),
        ([(404, b""), (200, b"x" * (4 * 1024 * 1024 + 1))], "more than 4194304 bytes"),
        ([(500, b"SECRETWORD")], "did not answer within 0.5 s"),
    ],
)
def test_faults_are_sentences_without_the_document(
    faulty: http.server.HTTPServer, answers: list[tuple[int, bytes]], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        ask(faulty, *answers)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "SECRETWORD" not in f"{chain} {vars(chain)}"
        chain = chain.__cause__ or chain.__context__


# --- the command line -----------------------------------------------------------------------------


def run_main(tmp_path: Path, *arguments: str, document: Any = DOCUMENT) -> int:
    emulator = serve(tmp_path, document)
    address = emulator.start()
    (tmp_path / "root").mkdir(exist_ok=True)
    try:
        return main([*arguments, "--root", str(tmp_path / "root"), "--mmds", address])
    finally:
        emulator.stop()


@pytest.mark.root
def test_metadata_without_a_build_configure_the_machine(tmp_path: Path) -> None:
    assert run_main(tmp_path, "--hostname-file", "/name") == 0
    assert (tmp_path / "root/name").read_text() == "box\n"


def test_metadata_with_a_build_start_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(tmp_path, document={"Bootstrap": {"HostPort": "h:1"}}) == 2
    assert capsys.readouterr().err == "vminit: the Bootstrap metadata lacks CAChain\n"


def test_bootstrap_without_a_build_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(tmp_path, "bootstrap") == 2
    assert "no Bootstrap block" in capsys.readouterr().err


@pytest.mark.root
def test_configure_can_be_asked_for_beside_a_build(tmp_path: Path) -> None:
    assert run_main(tmp_path, "configure", document={**DOCUMENT, "Bootstrap": {"Key": "x"}}) == 0
    assert (tmp_path / "root/etc/hostname").exists()


def test_notes_of_the_configuration_go_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firebuild_bootstrap.guest.configure.configure", lambda *_: ["something to know"])
    assert run_main(tmp_path) == 0
    assert capsys.readouterr().err == "vminit: something to know\n"


@pytest.mark.parametrize("arguments", [["unknown"], ["--mmds-timeout", "-1"], ["--no"]])
def test_a_wrong_command_line_ends_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: vminit" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vminit {version('firebuild')}\n"


def test_an_interrupt_while_waiting_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: MetadataClient) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(MetadataClient, "read", interrupted)
    assert main([]) == 130


def test_every_error_has_an_exit_status() -> None:
    assert GuestError("x").exit_status == 70
    assert json.dumps(InputError("x").exit_status) == "2"


@pytest.mark.parametrize("body", [b"[]", b"?", b"[" * 100_000], ids=["list", "text", "deep"])
def test_metadata_that_are_no_object_are_refused(faulty: http.server.HTTPServer, body: bytes) -> None:
    with pytest.raises(InputError, match=r"latest/meta-data at .* is not a JSON object"):
        ask(faulty, (404, b""), (200, body))


def test_metadata_over_the_limit_are_refused(faulty: http.server.HTTPServer) -> None:
    with pytest.raises(InputError, match=r"the metadata at .* has more than \d+ bytes"):
        ask(faulty, (404, b""), (200, bytes(20 << 20)))


@pytest.mark.parametrize("host", ["x" * 70, "a..b"])
def test_a_name_that_can_be_no_hosts_is_refused_at_once(host: str) -> None:
    with pytest.raises(InputError, match=f"--mmds http://{host}: expected a host name"):
        MetadataClient(f"http://{host}").read()
