"""Where the metadata go: complete documents, for nobody else's eyes, and taken back afterwards."""

from __future__ import annotations

import io
import json
import os
import pty
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.machine.external.settings import MetadataTarget
from firebuild_bootstrap.machine.external.targets import (
    FileTarget,
    FirecrackerTarget,
    StreamTarget,
    make_target,
)
from firebuild_bootstrap.mmds import BOOTSTRAP_WIPE
from machine_external.api import FirecrackerApiStandIn

KEY = "-----BEGIN PRIVATE KEY-----"
DOCUMENT = {"latest": {"meta-data": {"Bootstrap": {"Key": KEY}, "VMMID": "b1"}}}
WIPED = {"latest": {"meta-data": {"VMMID": "b1"}}}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FirecrackerApiStandIn]:
    made = FirecrackerApiStandIn(tmp_path / "fc.sock")
    yield made
    made.close()


def test_a_file_is_private_replaced_as_a_whole_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    path.write_text("old")
    path.chmod(0o644)
    target = FileTarget(path)
    target.check()
    target.put(DOCUMENT)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert json.loads(path.read_text()) == DOCUMENT
    with path.open() as reader:  # whoever reads it has one document or the other
        target.patch(BOOTSTRAP_WIPE)
        assert json.loads(reader.read()) == DOCUMENT
    assert json.loads(path.read_text()) == WIPED
    assert path.stat().st_mode & 0o7777 == 0o600
    assert os.listdir(tmp_path) == [path.name]
    for _ in range(2):
        target.remove()
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_replaced_by_somebody_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    target = FileTarget(path)
    target.remove()
    target.put(DOCUMENT)
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "other").rename(path)
    target.remove()
    assert path.read_text() == "theirs"


def test_a_file_that_can_not_be_written_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"machine\.external\.metadata\.file: .*none is not a directory"):
        FileTarget(tmp_path / "none/metadata.json").check()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "socket").symlink_to("/dev/null")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "socket"):
        with pytest.raises(InputError, match="expected a file or nothing, found something else at"):
            FileTarget(path).check()


def test_a_directory_without_the_right_to_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="no right to write in"):
        FileTarget(tmp_path / "metadata.json").check()


def test_a_failed_write_leaves_no_part_of_the_document(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    target = FileTarget(path)
    path.mkdir()  # after the check
    with pytest.raises(MachineError, match="the metadata can't be written to") as caught:
        target.put(DOCUMENT)
    assert KEY not in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]


def test_a_pipe_gets_one_document_a_line() -> None:
    out = io.BytesIO()
    target = StreamTarget(out)
    target.check()
    target.put(DOCUMENT)
    target.patch(BOOTSTRAP_WIPE)
    target.remove()
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [DOCUMENT, WIPED]


def test_a_terminal_is_refused() -> None:
    ends = pty.openpty()
    try:
        with (
            open(ends[1], "wb", closefd=False) as terminal,
            pytest.raises(InputError, match="would go to the terminal, and they hold a private key"),
        ):
            StreamTarget(terminal).check()
    finally:
        for end in ends:
            os.close(end)


def test_a_firecracker_gets_them_through_the_path_that_it_does_not_log(
    tmp_path: Path, api: FirecrackerApiStandIn
) -> None:
    target = FirecrackerTarget(tmp_path / "fc.sock")
    target.check()
    assert api.calls == []
    target.put(DOCUMENT)
    assert api.store.get("") == DOCUMENT
    target.patch(BOOTSTRAP_WIPE)
    assert api.store.get("") == WIPED
    target.remove()
    assert api.calls == ["PUT /mmds", "PATCH /mmds"]


def test_credentials_that_no_guest_took_are_taken_back_from_firecracker(
    tmp_path: Path, api: FirecrackerApiStandIn
) -> None:
    target = FirecrackerTarget(tmp_path / "fc.sock")
    target.put(DOCUMENT)
    target.patch({"latest": {"meta-data": {"ImageTag": "x"}}})
    for _ in range(2):
        target.remove()
    assert api.store.get("/latest/meta-data") == {"VMMID": "b1", "ImageTag": "x"}
    assert len(api.calls) == 3


def test_a_firecracker_that_has_gone_keeps_nothing(tmp_path: Path) -> None:
    api = FirecrackerApiStandIn(tmp_path / "fc.sock")
    target = FirecrackerTarget(tmp_path / "fc.sock")
    target.put(DOCUMENT)
    api.close()
    target.remove()


def test_a_store_that_is_too_small_is_named_and_nothing_is_quoted(tmp_path: Path) -> None:
    api = FirecrackerApiStandIn(tmp_path / "fc.sock", limit=60)
    target = FirecrackerTarget(tmp_path / "fc.sock")
    try:
        with pytest.raises(MachineError, match="do not fit into the Firecracker at") as caught:
            target.put(DOCUMENT)
        assert caught.value.hint == "start it with --mmds-size-limit 51200 or more"
        assert KEY not in f"{caught.value} {caught.value.__cause__}"
        with pytest.raises(MachineError, match="refused PATCH /mmds with status 400") as caught:
            target.patch({"key": KEY})
        assert KEY not in str(caught.value)
    finally:
        api.close()


def test_another_refusal_of_firecracker_is_passed_on(tmp_path: Path, api: FirecrackerApiStandIn) -> None:
    api.refuse = 400
    with pytest.raises(MachineError, match="refused PUT /mmds with status 400"):
        FirecrackerTarget(tmp_path / "fc.sock").put(DOCUMENT)


def test_where_no_firecracker_answers_nothing_is_sent(tmp_path: Path, api: FirecrackerApiStandIn) -> None:
    with pytest.raises(
        MachineError, match=r"machine\.external\.metadata\.firecracker_socket: .*none"
    ) as caught:
        FirecrackerTarget(tmp_path / "none").check()
    assert "--api-sock" in str(caught.value.hint)
    api.identity = {"name": "something else"}
    with pytest.raises(MachineError, match="is not a Firecracker") as caught:
        FirecrackerTarget(tmp_path / "fc.sock").check()
    assert "--api-sock" in str(caught.value.hint)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "dead"))
    listener.close()
    with pytest.raises(MachineError, match="Connection refused"):
        FirecrackerTarget(tmp_path / "dead").check()


@pytest.mark.parametrize(
    ("setting", "kind", "words"),
    [
        ("stdout", StreamTarget, "the first line of standard output"),
        ({"file": "/x/m.json"}, FileTarget, "the file /x/m.json"),
        ({"firecracker_socket": "/x/fc.sock"}, FirecrackerTarget, "the Firecracker at /x/fc.sock"),
    ],
)
def test_the_setting_says_which(setting: object, kind: type[object], words: str) -> None:
    target = make_target(MetadataTarget.model_validate(setting))
    assert isinstance(target, kind)
    assert target.description == words


def test_paths_may_be_relative_or_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for text, meant in (("m.json", tmp_path / "m.json"), ("~/m.json", tmp_path / "me/m.json")):
        assert make_target(MetadataTarget(file=text)).description == f"the file {meant}"


def test_without_a_stream_it_is_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    StreamTarget().put(WIPED)
    assert json.loads(capfdbinary.readouterr().out) == WIPED


def test_errors_are_firebuilds_own(tmp_path: Path) -> None:
    with pytest.raises(FirebuildError):
        FirecrackerTarget(tmp_path / "missing/fc.sock").put(DOCUMENT)
