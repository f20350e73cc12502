"""The rules of Firecracker's API, held by the emulator and, where there is one, by a real Firecracker."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.machine.firecracker.api import (
    ApiError,
    Configuration,
    FirecrackerApi,
    MmdsApi,
    ask_to_end,
    configure,
    is_socket,
    start,
)
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.mmds.store import STORE_LIMIT, HeldMetadata, StoreError
from machine_firecracker.fc_tools import NetworkNamespace, kernel_file, serving

SECRET = "-----BEGIN PRIVATE KEY-----"
DOCUMENT = {"latest": {"meta-data": {"VMMID": "b1", "Bootstrap": {"Key": SECRET}}}}


def configuration(folder: Path, **settings: Any) -> Configuration:
    kernel_file(folder / "vmlinux")
    (folder / "initrd").write_bytes(b"070701")
    (folder / "disk").write_bytes(bytes(1 << 20))
    return Configuration(
        settings=FirecrackerSettings(**settings),
        kernel=str(folder / "vmlinux"),
        initrd=str(folder / "initrd"),
        boot_args="console=ttyS0 reboot=k",
        snapshot=str(folder / "disk"),
        drives=[str(folder / "disk")],
        tap="fctest0",
        mac="06:00:ac:10:00:02",
    )


def refused(call: Callable[[], object], status: int = 400) -> str:
    with pytest.raises(ApiError) as caught:
        call()
    assert caught.value.status == status, str(caught.value)
    return caught.value.message


def test_a_fresh_firecracker_says_who_it_is(api: FirecrackerApi) -> None:
    assert is_socket(api.path)
    assert api.get("/")["state"] == "Not started"
    assert api.get("/version")["firecracker_version"].count(".") == 2
    assert api.get("/machine-config")["vcpu_count"] == 1
    assert api.get("/mmds") == {}


def test_what_the_driver_sends_before_the_network_is_accepted(api: FirecrackerApi, tmp_path: Path) -> None:
    requests = list(configuration(tmp_path, vcpus=3, memory=256 << 20).requests())
    for path, body in requests[:4]:
        api.put(path, body)
    config = api.get("/vm/config")
    assert config["machine-config"]["vcpu_count"] == 3
    assert config["machine-config"]["mem_size_mib"] == 256
    assert config["boot-source"]["boot_args"].startswith("console=ttyS0 reboot=k")
    facts = [
        (drive["drive_id"], drive["is_read_only"], drive["is_root_device"]) for drive in config["drives"]
    ]
    assert facts == [("drive0", True, False), ("drive1", False, False)]


@pytest.mark.needs("root")
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_everything_up_to_the_start_is_accepted(
    program: Path, namespace: NetworkNamespace, tmp_path: Path, version: str
) -> None:
    namespace.ip("tuntap", "add", "dev", "fctest0", "mode", "tap")
    command = namespace.command(program, "--api-sock", "api.sock")
    with serving(command, tmp_path) as api:
        configure(api, configuration(tmp_path, mmds_version=version))
        mmds = {"network_interfaces": ["eth0"], "version": version, "ipv4_address": "169.254.0.1"}
        refused(lambda: api.put("/mmds/config", mmds))
        HeldMetadata().connect(MmdsApi(api))
        metadata = HeldMetadata()
        metadata.put(DOCUMENT)
        metadata.connect(MmdsApi(api))
        metadata.patch({"latest": {"meta-data": {"Bootstrap": None}}})
        assert api.get("/mmds") == {"latest": {"meta-data": {"VMMID": "b1"}}}
        config = api.get("/vm/config")
        assert config["mmds-config"]["version"] == version
        assert config["mmds-config"]["network_interfaces"] == ["eth0"]
        assert config["network-interfaces"][0]["host_dev_name"] == "fctest0"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 128, "ht_enabled": False}),
        ("/machine-config", {"vcpu_count": 33, "mem_size_mib": 128}),
        ("/machine-config", {"vcpu_count": 0, "mem_size_mib": 128}),
        ("/machine-config", {"vcpu_count": True, "mem_size_mib": 128}),
        ("/machine-config", {"mem_size_mib": 128}),
        ("/boot-source", {"kernel_image_path": "/nowhere/vmlinux"}),
        ("/boot-source", {"boot_args": ""}),
        ("/drives/rootfs", {"drive_id": "other", "is_root_device": True}),
        ("/drives/root-fs", {"drive_id": "root-fs", "is_root_device": True, "is_read_only": False}),
        (
            "/drives/rootfs",
            {
                "drive_id": "rootfs",
                "is_root_device": True,
                "is_read_only": False,
                "path_on_host": "/nowhere/disk",
            },
        ),
        (
            "/network-interfaces/eth0",
            {"iface_id": "eth0", "host_dev_name": "fctest0", "allow_mmds_requests": True},
        ),
        ("/network-interfaces/eth0", {"iface_id": "eth1", "host_dev_name": "fctest0"}),
        ("/mmds/config", {"network_interfaces": ["eth0"], "version": "V2"}),
        ("/mmds/config", {"network_interfaces": [], "version": "V2"}),
        ("/mmds/config", {"version": "V2"}),
        ("/actions", {"action_type": "InstanceStart"}),
        ("/actions", {"action_type": "SendCtrlAltDel"}),
        ("/actions", {"action_type": "Jump"}),
        ("/actions", {}),
        ("/no/such/path", {}),
    ],
)
def test_what_is_wrong_is_refused(api: FirecrackerApi, path: str, body: dict[str, Any]) -> None:
    message = refused(lambda: api.put(path, body))
    assert message.startswith(f"Firecracker refused PUT {path} with status 400: ")


def test_metadata_are_replaced_and_merged(api: FirecrackerApi) -> None:
    refused(lambda: api.patch("/mmds", {"a": 1}))
    api.put("/mmds", {"a": {"b": "c", "d": "e"}})
    api.patch("/mmds", {"a": {"b": None}, "f": "g"})
    assert api.get("/mmds") == {"a": {"d": "e"}, "f": "g"}
    api.put("/mmds", {"h": "i"})
    assert api.get("/mmds") == {"h": "i"}


def test_metadata_are_limited(api: FirecrackerApi) -> None:
    room = STORE_LIMIT - len('{"a":"","b":""}')
    api.put("/mmds", {"a": "x" * (room - 100), "b": ""})
    refused(lambda: api.patch("/mmds", {"b": "y" * 101}), 413)
    api.patch("/mmds", {"b": "y" * 100})


def test_too_much_metadata_is_refused_before_it_is_sent() -> None:
    metadata = HeldMetadata()
    with pytest.raises(StoreError, match=r"the metadata takes 51201 bytes, and the store holds 51200"):
        metadata.put({"a": "x" * (STORE_LIMIT - len('{"a":""}') + 1)})
    with pytest.raises(StoreError, match="holds nothing that could be patched"):
        metadata.patch({})


def test_before_firecracker_runs_metadata_are_kept(api: FirecrackerApi) -> None:
    metadata = HeldMetadata()
    metadata.put(DOCUMENT)
    metadata.patch({"latest": {"meta-data": {"VMMID": "b2"}}})
    metadata.connect(MmdsApi(api))
    assert api.get("/mmds")["latest"]["meta-data"]["VMMID"] == "b2"
    metadata.put({"latest": {}})
    assert api.get("/mmds") == {"latest": {}}


def read_request(link: socket.socket) -> None:
    with link.makefile("rb") as stream:
        length = 0
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        stream.read(length)


@pytest.fixture
def answering(tmp_path: Path) -> Callable[[bytes], FirecrackerApi]:
    """Serve one answer, whatever the question."""

    def serve(answer: bytes) -> FirecrackerApi:
        path = tmp_path / "odd.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            with listener:
                link, _ = listener.accept()
                with link:
                    read_request(link)
                    link.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        return FirecrackerApi(path, timeout=10)

    return serve


@pytest.mark.parametrize(
    ("begins", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nA: ", b"a"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"a"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_an_answer_that_only_trickles_is_given_up(tmp_path: Path, begins: bytes, piece: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "slow.sock"))
        listener.listen()
        trickling = threading.Thread(target=trickle, args=(listener, begins, piece))
        trickling.start()
        with pytest.raises(ApiError, match=r"GET /: (timed out|its answer did not end)"):
            FirecrackerApi(tmp_path / "slow.sock", timeout=0.5).get("/")
        trickling.join()


def trickle(listener: socket.socket, begins: bytes, piece: bytes) -> None:
    link, _ = listener.accept()
    with link, suppress(OSError):
        read_request(link)
        link.sendall(begins)
        while True:
            link.sendall(piece)
            threading.Event().wait(0.02)


def test_an_answer_without_end_is_given_up(answering: Callable[[bytes], FirecrackerApi]) -> None:
    with pytest.raises(ApiError, match="its answer has more than 1048576 bytes"):
        answering(http(200, " " * ((1 << 20) + 1))).get("/")


def http(status: int, body: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize("body", ["[]", "no json", ""])
def test_an_answer_that_is_no_object_is_an_error(
    answering: Callable[[bytes], FirecrackerApi], body: str
) -> None:
    with pytest.raises(ApiError, match="answered GET / with something that is not a JSON object"):
        answering(http(200, body)).get("/")


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n"])
def test_a_server_that_is_no_firecracker_is_an_error(
    answering: Callable[[bytes], FirecrackerApi], answer: bytes
) -> None:
    with pytest.raises(ApiError, match=r"did not answer GET /: \w+"):
        answering(answer).get("/")


def test_errors_never_show_metadata(answering: Callable[[bytes], FirecrackerApi]) -> None:
    fault = json.dumps({"fault_message": f"cannot take {json.dumps(DOCUMENT)}"})
    with pytest.raises(ApiError) as caught:
        answering(http(400, fault)).put("/mmds", DOCUMENT)
    assert "PRIVATE" not in str(caught.value)
    assert "its answer is not shown" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"), [("", "without a word"), ("oh   no\n", "oh no"), ('{"x":1}', "{")]
)
def test_a_refusal_in_another_form_is_shown_as_it_is(
    answering: Callable[[bytes], FirecrackerApi], body: str, words: str
) -> None:
    with pytest.raises(ApiError, match=f"refused PUT /x with status 500: {words}"):
        answering(http(500, body)).put("/x", {})


def test_nobody_behind_the_socket_is_an_error_after_the_wait(tmp_path: Path) -> None:
    api = FirecrackerApi(tmp_path / "none.sock")
    with pytest.raises(ApiError, match="did not answer GET /: No such file") as caught:
        api.await_ready(0.1)
    assert caught.value.status == 0
    assert not is_socket(tmp_path / "none.sock")
    assert not is_socket(tmp_path)


def test_waiting_ends_when_the_check_says_so_or_firecracker_refuses(
    answering: Callable[[bytes], FirecrackerApi], tmp_path: Path
) -> None:
    def stop() -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        FirecrackerApi(tmp_path / "none.sock").await_ready(30, stop)
    odd = answering(http(503, ""))
    with pytest.raises(ApiError, match="status 503"):
        odd.await_ready(30)


def hang_up(listener: socket.socket) -> None:
    link, _ = listener.accept()
    link.close()


def test_the_path_of_the_socket_may_have_any_length(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{descriptor}/s")
        os.close(descriptor)
        listener.listen()
        closing = threading.Thread(target=hang_up, args=(listener,))
        closing.start()
        with pytest.raises(ApiError, match="did not answer GET /"):
            FirecrackerApi(folder / "s", timeout=10).get("/")
        closing.join()


def test_start_and_end_are_actions(answering: Callable[[bytes], FirecrackerApi], tmp_path: Path) -> None:
    start(answering(b"HTTP/1.1 204 No Content\r\n\r\n"))
    (tmp_path / "odd.sock").unlink()
    ask_to_end(answering(b"HTTP/1.1 204 No Content\r\n\r\n"))


def test_a_tap_that_cannot_be_opened_comes_with_advice(
    api: FirecrackerApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = configuration(tmp_path)
    broken = Configuration(**{**vars(plan), "tap": "no-such-interface-at-all"})
    with pytest.raises(ApiError, match="refused PUT /network-interfaces/eth0") as caught:
        configure(api, broken)
    assert "tap device" in (caught.value.hint or "")
    with pytest.raises(ApiError, match="refused PUT /boot-source") as other:
        configure(api, Configuration(**{**vars(plan), "kernel": "/nowhere"}))
    assert other.value.hint is None


def test_a_cpu_template_is_sent_only_where_one_is_set(tmp_path: Path) -> None:
    assert "cpu_template" not in dict(configuration(tmp_path).requests())["/machine-config"]
    machine = dict(configuration(tmp_path, cpu_template="T2").requests())["/machine-config"]
    assert machine["cpu_template"] == "T2"
