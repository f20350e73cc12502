"""Whole builds on a machine that firebuild neither starts nor ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from machine_external.api import FirecrackerApiStandIn
from machine_external.tool import Tool, WatchedFile, debugfs, holds_build, mount, unmount
from support import Firebuild, eventually

pytestmark = [pytest.mark.needs("userns"), pytest.mark.needs("busybox")]
SECRET = "PRIVATE KEY"


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[Tool]:
    made = Tool(tmp_path / "tool")
    yield made
    made.close()


class Build:
    """A running `firebuild rootfs --machine external`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def end(self) -> tuple[int, bytes, bytes]:
        out, error = self.process.communicate(timeout=90)
        assert b"Traceback" not in error, error
        return self.process.returncode, out, error

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


Start = Callable[..., Build]


@pytest.fixture
def start(firebuild: Firebuild, tmp_path: Path) -> Iterator[Start]:
    builds: list[Build] = []

    def start(
        settings: dict[str, Any],
        *options: str | Path,
        run: str = "echo made > /made",
        tag: str = "t/external:1",
    ) -> Build:
        context = tmp_path / "context"
        context.mkdir()
        (context / "Dockerfile").write_text(f"FROM host\nRUN {run}\n")
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps({"machine": {"external": settings}}))
        builds.append(
            Build(
                firebuild.popen(
                    *("rootfs", "--machine", "external", "--config", config, "--context", context),
                    *("--tag", tag, *options),
                )
            )
        )
        return builds[-1]

    yield start
    for build in builds:
        build.close()
    assert firebuild.leftovers() == []


@pytest.fixture
def watched(tmp_path: Path, tool: Tool) -> Iterator[WatchedFile]:
    watching = WatchedFile(tmp_path / "metadata.json", tool)
    yield watching
    watching.close()


def in_file(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"metadata": {"file": str(tmp_path / "metadata.json")}, **more}


def test_a_guest_finds_its_build_in_a_file_and_nothing_of_it_stays(
    start: Start, tool: Tool, watched: WatchedFile, tmp_path: Path
) -> None:
    build = start(in_file(tmp_path), "--progress", "rawjson", run="until [ -e /go ]; do sleep 0.1; done")
    watched.until_written()
    assert watched.modes == {0o600}
    tool.start()
    assert tool.wiped.wait(60)  # while the step runs
    assert SECRET not in (tmp_path / "metadata.json").read_text()
    (tool.root / "go").touch()
    assert tool.end() == 0
    status, out, error = build.end()
    assert (status, error) == (0, b"")
    assert SECRET.encode() not in out
    notices = [event for line in out.splitlines() if (event := json.loads(line))["event"] == "notice"]
    assert [(one["level"], one["message"].partition(";")[0]) for one in notices] == [
        ("info", f"the metadata are in the file {tmp_path}/metadata.json"),
        ("info", "all steps succeeded"),
    ]
    assert not (tmp_path / "metadata.json").exists()


def test_standard_output_carries_the_metadata_alone(start: Start, tool: Tool) -> None:
    build = start({"metadata": "stdout"}, "--progress", "rawjson")
    assert build.process.stdout is not None
    tool.update(json.loads(build.process.stdout.readline()))
    tool.start()
    changed = json.loads(build.process.stdout.readline())
    assert tool.end() == 0
    status, out, error = build.end()
    assert (status, out) == (0, b"")
    assert holds_build(tool.store.get(""))
    assert not holds_build(changed)
    assert changed["latest"]["meta-data"]["ImageTag"] == "t/external:1"
    assert SECRET.encode() not in error
    assert [json.loads(line)["event"] for line in error.splitlines()][-1] == "notice"


def test_a_firecracker_of_somebody_else_gets_them(start: Start, tool: Tool, tmp_path: Path) -> None:
    api = FirecrackerApiStandIn(tmp_path / "fc.sock", tool)
    try:
        build = start({"metadata": {"firecracker_socket": str(tmp_path / "fc.sock")}})
        assert eventually(lambda: api.calls), "the metadata are not written"
        tool.start()
        assert tool.end() == 0
        assert build.end()[0] == 0
        assert api.calls == ["PUT /mmds", "PATCH /mmds"]
        assert not holds_build(api.store.get(""))
    finally:
        api.close()


def test_the_guest_dials_what_is_advertised(
    start: Start, tool: Tool, watched: WatchedFile, tmp_path: Path
) -> None:
    build = start(in_file(tmp_path, bind="0.0.0.0", advertise="localhost"))
    watched.until_written()
    host, _, port = tool.store.get("/latest/meta-data/Bootstrap/HostPort").rpartition(":")
    assert (host, port.isdigit()) == ("localhost", True)
    tool.start()
    assert tool.end() == 0
    assert build.end()[0] == 0


@pytest.mark.needs("debugfs")
def test_the_image_is_what_the_machine_left_on_its_drive(
    start: Start, tool: Tool, watched: WatchedFile, tmp_path: Path
) -> None:
    drive = tmp_path / "drive.img"
    build = start(in_file(tmp_path, disk=str(drive)), "--output", f"tar,dest={tmp_path}/out.tar")
    watched.until_written()
    mount(drive)  # it is complete before anybody is told
    debugfs(drive, "write /etc/hostname made-by-the-machine")
    tool.start()
    assert tool.end() == 0
    unmount(drive)
    status, out, error = build.end()
    assert status == 0, error
    assert b"Built t/external:1" in out
    with tarfile.open(tmp_path / "out.tar") as tar:
        names = tar.getnames()
    assert "made-by-the-machine" in names
    assert any(name.endswith("bin/sh") for name in names)
    assert not drive.exists()


@pytest.mark.needs("debugfs")
@pytest.mark.parametrize("options", [[], pytest.param(["--keep-on-failure"], marks=pytest.mark.release)])
def test_a_machine_that_keeps_its_drive_leaves_no_image(
    start: Start, tool: Tool, watched: WatchedFile, tmp_path: Path, firebuild: Firebuild, options: list[str]
) -> None:
    drive = tmp_path / "drive.img"
    build = start(in_file(tmp_path, disk=str(drive), end_timeout="1s"), *options, tag="t/kept:1")
    watched.until_written()
    mount(drive)
    tool.start()
    assert tool.end() == 0
    status, out, error = build.end()
    assert status == 6
    assert b"still has its drive" in error
    assert drive.exists() == bool(options)
    assert (b"the machine's drive stays where it is" in out) == bool(options)
    assert not (tmp_path / "metadata.json").exists()
    assert "t/kept:1" not in firebuild("images", "list").stdout


def test_ctrl_c_takes_everything_back(start: Start, watched: WatchedFile, tmp_path: Path) -> None:
    build = start(in_file(tmp_path, disk=str(tmp_path / "drive.img")))
    watched.until_written()
    assert (tmp_path / "drive.img").exists()
    os.killpg(build.process.pid, signal.SIGINT)
    status, _, error = build.end()
    assert status == 130, error
    assert not (tmp_path / "metadata.json").exists()
    assert not (tmp_path / "drive.img").exists()


def test_a_killed_firebuild_leaves_neither_key_nor_drive(
    start: Start, watched: WatchedFile, tmp_path: Path, firebuild: Firebuild
) -> None:
    build = start(in_file(tmp_path, disk=str(tmp_path / "drive.img")))
    watched.until_written()
    build.process.kill()
    build.end()
    assert eventually(lambda: firebuild.leftovers() == []), firebuild.leftovers()
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "context", "tool"]


def test_a_guest_that_dies_is_lost(start: Start, tool: Tool, watched: WatchedFile, tmp_path: Path) -> None:
    build = start(in_file(tmp_path), run="sleep 1000")
    watched.until_written()
    tool.start()
    assert tool.wiped.wait(60)
    assert tool.guest is not None
    tool.guest.kill()
    status, _, error = build.end()
    assert status == 4, error
    assert not (tmp_path / "metadata.json").exists()


def test_a_guest_that_never_calls_is_lost(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREBUILD_BOOTSTRAP__INITIAL_TIMEOUT", "1s")
    status, _, error = start(in_file(tmp_path)).end()
    assert status == 4
    assert b"the guest did not call within 1 second" in error
    assert not (tmp_path / "metadata.json").exists()


@pytest.mark.parametrize(
    ("settings", "run", "words"),
    [
        ({"metadata": {"file": "/none/m.json"}}, "true", "/none is not a directory"),
        ({"disk": "/none/d.img"}, "true", "/none is not a directory that can be written to"),
        ({"metadata": {"firecracker_socket": "/none/s"}}, "true", "firecracker_socket: "),
        ({"bind": "192.0.2.1"}, "true", "machine.external.bind has to name an address"),
        ({}, "true\nFROM scratch\nCOPY --from=0 /x /x", "needs a machine for each of its stages"),
    ],
)
def test_what_can_not_work_is_said_before_anything_starts(
    start: Start, settings: dict[str, Any], run: str, words: str
) -> None:
    status, out, error = start(settings, run=run).end()
    assert status in (2, 6)
    assert words in error.decode()
    assert b"metadata are in" not in out + error
