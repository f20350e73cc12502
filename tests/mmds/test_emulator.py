"""The emulator answers a guest as Firecracker's metadata service does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from firebuild_bootstrap.accepting import Acceptor
from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.mmds import BOOTSTRAP_WIPE, DataStore, MetadataEmulator, MmdsVersion
from firebuild_bootstrap.mmds import emulator as emulator_module
from firebuild_bootstrap.mmds.protocol import BadRequest, MetadataService, parse_request
from support import eventually, no_descriptors

JSON = {"Accept": "application/json"}
V1 = MmdsVersion.V1
_PIECES = [
    *(
        b"GET ",
        b"PUT ",
        b"POST ",
        b" HTTP/1.1\r\n",
        b" HTTP/1.0\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"Connection: close\r\n",
    ),
    *(
        b"/",
        b"//",
        b"/latest/",
        b"meta-data",
        b"/latest/api/token",
        b"http://",
        b"[",
        b"]",
        b":",
        b"a~0~1b",
        b"~",
        b"n",
    ),
    *(
        b"Accept: application/json\r\n",
        b"X-metadata-token: ",
        b"X-metadata-token-ttl-seconds: ",
        b"Content-Length: ",
    ),
    *(b"1" * 30, b"-1", b"\xb2"),
]


def raw(guest: Any, data: bytes) -> bytes:
    """Send bytes as they are and return all that comes until the other side closes."""
    guest.http.connect()
    guest.http.sock.sendall(data)
    received = b""
    while part := guest.http.sock.recv(65536):
        received += part
    guest.http.close()
    return received


def test_v2_wants_a_token_and_takes_the_one_it_issued(serve: Any) -> None:
    guest = serve()
    status, body, _ = guest.ask("GET", "/latest/meta-data/VMMID")
    assert status == 401
    assert body.startswith("No MMDS token provided.")
    assert guest.ask("GET", "/latest/meta-data/VMMID", {"X-metadata-token": "junk"})[:2] == (
        *(401, "MMDS token not valid."),
    )
    headers = {"X-metadata-token": guest.token()}
    assert guest.ask("GET", "/latest/meta-data/VMMID", headers)[:2] == (200, "vm-1")


@pytest.mark.parametrize("forge", [lambda token: token[:-4] + "AAA=", lambda token: "ü", lambda token: ""])
def test_a_forged_token_is_not_valid(serve: Any, forge: Any) -> None:
    guest = serve()
    forged = forge(guest.token())
    assert guest.ask("GET", "/", {"X-metadata-token": forged})[:2] == (401, "MMDS token not valid.")


def test_a_token_of_another_machine_is_not_valid(serve: Any, folder: Path) -> None:
    first, second = serve(folder / "a" / "s"), serve(folder / "b" / "s")
    assert second.ask("GET", "/", {"X-metadata-token": first.token()})[0] == 401


def test_a_token_expires(serve: Any) -> None:
    now = 1000.0
    guest = serve(clock=lambda: now)
    headers = {"X-metadata-token": guest.token(ttl=10)}
    now = 1009.9
    assert guest.ask("GET", "/", headers)[0] == 200
    now = 1010.0
    assert guest.ask("GET", "/", headers)[0] == 401


@pytest.mark.parametrize("ttl", ["0", "21601", "-1", "x", "1.5", "", "9" * 30])
def test_a_wrong_lifetime_is_refused(serve: Any, ttl: str) -> None:
    status, body, _ = serve().ask("PUT", "/latest/api/token", {"X-metadata-token-ttl-seconds": ttl})
    assert status == 400
    assert "time to live" in body


def test_a_missing_lifetime_is_refused(serve: Any) -> None:
    status, body, _ = serve().ask("PUT", "/latest/api/token")
    assert (status, body.startswith("Token time to live value not found.")) == (400, True)


def test_the_longest_lifetime_is_six_hours(serve: Any) -> None:
    assert serve().token(ttl=21600)


def test_the_aws_names_are_known_from_1_13_on(serve: Any, folder: Path) -> None:
    put = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    new = serve()
    status, token, _ = new.ask("PUT", "/latest/api/token", put)
    assert status == 200
    assert new.ask("GET", "/", {"X-aws-ec2-metadata-token": token})[0] == 200
    old = serve(folder / "old" / "s", release=(1, 12))
    assert old.ask("PUT", "/latest/api/token", put)[0] == 400
    assert "aws" not in old.ask("GET", "/")[1]
    assert old.token()


def test_v1_needs_no_token(serve: Any) -> None:
    guest = serve(version=V1)
    assert guest.ask("GET", "/latest/meta-data/VMMID")[:2] == (200, "vm-1")
    assert guest.token()


def test_v1_before_1_13_knows_no_put(serve: Any) -> None:
    status, body, response = serve(version=V1, release=(1, 12)).ask("PUT", "/latest/api/token")
    assert (status, body, response.getheader("Allow")) == (405, "Not allowed HTTP method.", "GET")


def test_patch_is_for_the_host_alone(serve: Any) -> None:
    status, _, response = serve().ask("PATCH", "/")
    assert (status, response.getheader("Allow")) == (405, "GET, PUT")


@pytest.mark.parametrize("method", ["POST", "DELETE", "HEAD"])
def test_other_methods_are_unknown(serve: Any, method: str) -> None:
    assert serve().ask(method, "/")[0] == 501


def test_json_comes_only_for_exactly_that_accept(serve: Any) -> None:
    guest = serve(version=V1)
    status, body, response = guest.ask("GET", "/latest/meta-data/Env", JSON)
    assert (status, body, response.getheader("Content-Type")) == (
        *(200, '{"A":"1","B":"2"}', "application/json"),
    )
    for accept in ("*/*", "application/json, text/plain", "text/plain"):
        status, body, response = guest.ask("GET", "/latest/meta-data/Env", {"Accept": accept})
        assert (status, body, response.getheader("Content-Type")) == (200, "A\nB", "text/plain")


def test_the_text_form_lists_sorted_names_with_a_slash_after_objects(serve: Any) -> None:
    guest = serve(version=V1)
    assert guest.ask("GET", "/latest/meta-data/")[1] == "Count\nEnv/\nList\nVMMID\na/b/"
    assert guest.ask("GET", "/")[1] == "latest/"


@pytest.mark.parametrize("path", ["/latest/meta-data/Count", "/latest/meta-data/List"])
def test_a_leaf_that_is_no_string_has_no_text_form(serve: Any, path: str) -> None:
    guest = serve(version=V1)
    status, body, _ = guest.ask("GET", path)
    assert (status, body) == (501, "Cannot retrieve value. The value has an unsupported type.")
    assert guest.ask("GET", path, JSON)[0] == 200


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("//latest///meta-data//VMMID", "vm-1"),
        ("/latest/meta-data/VMMID/", "vm-1"),
        ("/latest/meta-data/List/0", "zero"),
        ("/latest/meta-data/List/1/x/", "y"),
        ("/latest/meta-data/a~1b/m~0n", "escaped"),
        ("http://169.254.169.254/latest/meta-data/VMMID", "vm-1"),
    ],
)
def test_paths_are_json_pointers(serve: Any, path: str, value: str) -> None:
    assert serve(version=V1).ask("GET", path)[:2] == (200, value)


@pytest.mark.parametrize(
    "path",
    [
        "/latest/nothing",
        "/latest/meta-data/List/2",
        "/latest/meta-data/List/00",
        "/latest/meta-data/List/-",
        "/latest/meta-data/VMMID/0",
    ],
)
def test_what_is_not_there_is_not_found(serve: Any, path: str) -> None:
    assert serve(version=V1).ask("GET", path)[:2] == (404, f"Resource not found: {path}.")


def test_a_forwarded_put_is_refused(serve: Any) -> None:
    headers = {"X-metadata-token-ttl-seconds": "60", "X-Forwarded-For": "10.0.0.1"}
    status, body, _ = serve().ask("PUT", "/latest/api/token", headers)
    assert status == 400
    assert "X-Forwarded-For" in body


def test_put_works_for_the_token_only(serve: Any) -> None:
    guest = serve()
    headers = {"X-metadata-token-ttl-seconds": "60"}
    assert guest.ask("PUT", "/latest/meta-data", headers)[:2] == (
        404,
        "Resource not found: /latest/meta-data.",
    )
    assert guest.ask("PUT", "//latest//api/token", headers)[0] == 200


def test_a_request_may_take_2500_bytes_and_not_one_more(serve: Any) -> None:
    frame = b"GET / HTTP/1.1\r\nConnection: close\r\nX: %s\r\n\r\n"
    room = 2500 - len(frame % b"")
    guest = serve(version=V1)
    assert raw(guest, frame % (b"a" * room)).startswith(b"HTTP/1.1 200 OK")
    answer = raw(guest, frame % (b"a" * (room + 1)))
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"2500 bytes" in answer
    body = b"GET / HTTP/1.1\r\nContent-Length: 2500\r\n\r\n"
    assert raw(guest, body).startswith(b"HTTP/1.1 400 Bad Request")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n name: folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_a_malformed_request_is_refused_and_the_connection_closed(serve: Any, request_: bytes) -> None:
    answer = raw(serve(version=V1), request_)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"Connection: close" in answer


@pytest.mark.parametrize("target", ["http:", "http://[:]/x", "http://[::1/x", "http://a]b[/"])
def test_a_target_without_a_path_that_can_be_read_is_refused(serve: Any, target: str) -> None:
    answer = raw(serve(version=V1), f"GET {target} HTTP/1.1\r\nConnection: close\r\n\r\n".encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
    assert answer.endswith(b"Invalid URI.")


@hypothesis.given(
    st.lists(st.sampled_from(_PIECES) | st.binary(max_size=8), max_size=12).map(b"".join),
    st.sampled_from([V1, MmdsVersion.V2]),
)
def test_whatever_is_sent_is_answered_or_awaited(request_: bytes, version: MmdsVersion) -> None:
    store = DataStore()
    store.put({"latest": {"meta-data": {"a~/b": "text", "n": 1}}})
    service = MetadataService(store, clock=lambda: 0.0, version=version)
    try:
        parsed = parse_request(request_)
    except BadRequest:
        return
    if parsed is not None:
        assert service.respond(parsed[0]).encode(keep_alive=True).startswith(b"HTTP/1.1 ")


def test_requests_may_come_in_pieces_and_several_at_once(serve: Any) -> None:
    guest = serve(version=V1)
    guest.http.connect()
    sock = guest.http.sock
    sock.sendall(b"GET /latest/meta-data/VMMID HT")
    time.sleep(0.05)
    sock.sendall(b"TP/1.1\r\n\r\nGET / HTTP/1.1\r\nContent-Length: 2\r\n\r\nxxGET / HTTP/1.0\r\n\r\n")
    received = b""
    while part := sock.recv(65536):
        received += part
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.count(b"Connection: keep-alive") == 2


def test_a_silent_connection_is_closed(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator_module, "_IDLE_SECONDS", 0.1)
    guest = serve()
    guest.http.connect()
    assert guest.http.sock.recv(1) == b""


def test_too_many_connections_are_closed_and_the_service_lives(serve: Any, folder: Path) -> None:
    guest = serve(version=V1)
    path = str(folder / "private" / "mmds.sock")
    many = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(33)]
    try:
        for sock in many:
            sock.settimeout(10)
            sock.connect(path)
        assert many[-1].recv(1) == b""
    finally:
        for sock in many:
            sock.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert guest.ask("GET", "/")[0] == 200
            return
        except OSError:
            guest.http.close()
    pytest.fail("the service does not answer any more")


def test_a_guest_that_comes_while_there_is_no_descriptor_is_answered_later(
    serve: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    accept = Acceptor._accept

    def counted(acceptor: Acceptor) -> None:
        nonlocal tries
        tries += 1
        accept(acceptor)

    monkeypatch.setattr(Acceptor, "_accept", counted)
    serve(version=V1)
    with socket.socket(socket.AF_UNIX) as client:
        with no_descriptors():
            client.connect(str(folder / "private" / "mmds.sock"))
            assert eventually(lambda: tries >= 3)
            time.sleep(0.25)
            assert tries <= 6  # every 0.1 s, not again and again
        client.sendall(b"GET /latest HTTP/1.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_the_wipe_takes_the_credentials_out_and_nothing_else(serve: Any, store: DataStore) -> None:
    store.patch({"latest": {"meta-data": {"Bootstrap": {"Key": "secret"}}}})
    guest = serve(version=V1)
    assert guest.ask("GET", "/latest/meta-data/Bootstrap/Key")[1] == "secret"
    store.patch(BOOTSTRAP_WIPE)
    assert guest.ask("GET", "/latest/meta-data/Bootstrap/Key")[0] == 404
    assert guest.ask("GET", "/latest/meta-data/VMMID")[1] == "vm-1"
    assert "secret" not in guest.ask("GET", "/", JSON)[1]


# --- sockets ------------------------------------------------------------------------------------


def test_the_socket_and_its_directory_are_private(serve: Any, folder: Path) -> None:
    serve()
    assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "private" / "mmds.sock").stat().st_mode) == 0o600


@pytest.mark.needs("tester")
@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_another_user_can_neither_connect_nor_see_the_socket(serve: Any, folder: Path, mode: int) -> None:
    serve()
    folder.chmod(0o755)
    (folder / "private").chmod(mode)  # even with an open directory, the socket's own mode holds
    path = folder / "private" / "mmds.sock"
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
    done = subprocess.run(
        ["su", "tester", "-s", "/bin/sh", "-c", f'/usr/bin/python3 -c "{program}"'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PermissionError" in done.stderr


def test_a_directory_that_others_may_enter_is_refused(folder: Path, store: DataStore) -> None:
    shared = folder / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(MachineError, match="others may enter") as refused:
        MetadataEmulator(store, shared / "s").start()
    assert refused.value.hint is not None
    assert list(shared.iterdir()) == []


def test_a_path_beyond_107_bytes_works(serve: Any, folder: Path) -> None:
    path = folder / ("d" * 120) / "mmds.sock"
    serve(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(f"/proc/self/fd/{directory}/mmds.sock")
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 401")
    finally:
        os.close(directory)


def test_a_stale_socket_is_replaced(serve: Any, folder: Path) -> None:
    (folder / "private").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(folder / "private" / "mmds.sock"))
    assert serve().token()


def test_a_living_socket_is_left_alone(serve: Any, folder: Path, store: DataStore) -> None:
    guest = serve()
    with pytest.raises(MachineError, match="another process serves there\n  hint: end that"):
        MetadataEmulator(store, folder / "private" / "mmds.sock").start()
    assert guest.token()


def test_a_file_is_never_replaced(folder: Path, store: DataStore) -> None:
    path = folder / "file"
    path.write_text("precious")
    with pytest.raises(MachineError, match="it exists and is not a socket\n  hint: remove it"):
        MetadataEmulator(store, path).start()
    assert path.read_text() == "precious"


def test_a_name_that_no_socket_can_have_is_an_error(folder: Path, store: DataStore) -> None:
    with pytest.raises(MachineError, match="cannot serve metadata at"):
        MetadataEmulator(store, folder / ("n" * 200)).start()


def test_tcp_on_loopback_works(serve: Any) -> None:
    assert serve(("127.0.0.1", 0), version=V1).ask("GET", "/")[1] == "latest/"
    assert serve(("::1", 0), version=V1).ask("GET", "/")[1] == "latest/"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::"])
def test_metadata_is_not_served_to_the_world(store: DataStore, host: str) -> None:
    with pytest.raises(MachineError, match="loopback or link-local"):
        MetadataEmulator(store, (host, 0)).start()


def test_a_taken_port_is_an_error(store: DataStore) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(MachineError, match="cannot serve metadata at 127"),
    ):
        MetadataEmulator(store, ("127.0.0.1", taken.getsockname()[1])).start()


def test_stop_leaves_no_thread_no_file_and_no_connection(folder: Path, store: DataStore) -> None:
    before = set(threading.enumerate())
    path = folder / "mmds.sock"
    emulator = MetadataEmulator(store, path)
    emulator.stop()
    emulator.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(b"GET / HT")
        emulator.stop()
        with contextlib.suppress(ConnectionResetError):  # what was not read yet makes it a reset
            assert sock.recv(1) == b""
    emulator.stop()
    assert set(threading.enumerate()) == before
    assert not path.exists()


def test_stop_does_not_remove_the_socket_of_a_successor(folder: Path, store: DataStore) -> None:
    path = folder / "mmds.sock"
    emulator = MetadataEmulator(store, path)
    emulator.start()
    path.unlink()
    path.write_text("successor")
    emulator.stop()
    assert path.read_text() == "successor"


def test_a_guest_can_read_the_whole_document(serve: Any) -> None:
    guest = serve()
    _, body, _ = guest.ask("GET", "/", {**JSON, "X-metadata-token": guest.token()})
    assert json.loads(body)["latest"]["meta-data"]["Env"] == {"A": "1", "B": "2"}


def test_a_request_that_came_before_the_start_is_answered_after_it(folder: Path, store: DataStore) -> None:
    emulator = MetadataEmulator(store, folder / "early.sock", version=V1)
    address = emulator.listen()
    assert emulator.listen() == address == f"unix:{folder / 'early.sock'}"
    with socket.socket(socket.AF_UNIX) as guest:
        guest.settimeout(30)
        guest.connect(str(folder / "early.sock"))
        guest.sendall(b"GET /latest/meta-data HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert emulator.start() == address
        assert guest.recv(100).startswith(b"HTTP/1.1 200 ")
    emulator.stop()
    assert not (folder / "early.sock").exists()


def test_what_could_not_be_started_can_be_stopped(
    folder: Path, store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    emulator = MetadataEmulator(store, folder / "mmds.sock")
    with monkeypatch.context() as patch:
        patch.setattr(emulator_module, "threading", SimpleNamespace(Thread=Refused, Event=threading.Event))
        with pytest.raises(RuntimeError, match="new thread"):
            emulator.start()
        emulator.stop()
    assert not (folder / "mmds.sock").exists()


def test_a_socket_that_was_never_served_is_removed(folder: Path, store: DataStore) -> None:
    emulator = MetadataEmulator(store, folder / "idle.sock")
    emulator.listen()
    emulator.stop()
    assert not (folder / "idle.sock").exists()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"no colon", b"Invalid header line."),
        (b"Content-Length: x", b"Invalid Content-Length."),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding is not supported."),
    ],
)
def test_a_malformed_header_is_named(serve: Any, header: bytes, reason: bytes) -> None:
    assert raw(serve(version=V1), b"PUT / HTTP/1.1\r\n" + header + b"\r\n\r\n").endswith(reason)


# --- as its users' programs may use it --------------------------------------------------------------


def test_an_emulator_may_be_started_twice_and_stopped_by_several_threads(folder: Path) -> None:
    before = threading.active_count()
    for number in range(5):
        emulator = MetadataEmulator(DataStore(), folder / str(number))
        assert emulator.start() == emulator.start()
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(emulator.stop) for _ in range(8)]:
                done.result()
        assert not (folder / str(number)).exists()
    assert threading.active_count() == before


def test_a_relative_path_is_that_of_the_directory_at_that_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    emulator = MetadataEmulator(DataStore(), Path("socket"))
    monkeypatch.chdir("/")
    assert emulator.start() == f"unix:{folder}/socket"
    emulator.stop()
    assert not (folder / "socket").exists()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (("localhost", 0), "expected an IP address"),
        (("127.0.0.1", 70_000), "a port is 0 to 65535"),
        (("203.0.113.1", 0), "loopback or link-local"),
        (Path("/dev/null/socket"), "cannot serve metadata at /dev/null/socket: "),
    ],
)
def test_an_address_that_cannot_be_used_is_an_error_in_words(where: Any, words: str) -> None:
    with pytest.raises(MachineError, match=words):
        MetadataEmulator(DataStore(), where).start()
