"""What a failed build leaves behind for those who ask for it."""

from __future__ import annotations

import json
import os
import tarfile
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from cli.library import Library
from firebuild_bootstrap.bootstrap_settings import BootstrapSettings
from firebuild_bootstrap.errors import BuildTimeout, InputError, Interrupted, StepFailed
from firebuild_bootstrap.events import BuildFailed, BuildStarted, Event, StepOutput
from firebuild_bootstrap.settings import BuildSettings

pytestmark = pytest.mark.needs("userns")
FAILING = "FROM host\nRUN echo one > /one\nRUN echo two > /two; exit 3\n"


def kept(library: Library, folder: Path) -> Path:
    [started] = library.of(BuildStarted)
    assert os.listdir(folder) == [started.build_id]
    return folder / started.build_id


def test_the_root_file_system_and_the_story_of_a_failed_build_are_kept(
    library: Library, tmp_path: Path
) -> None:
    with pytest.raises(StepFailed):
        library.build(FAILING, keep_failed=tmp_path / "deep/kept")
    folder = kept(library, tmp_path / "deep/kept")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(os.listdir(folder)) == ["console.log", "failure.json", "rootfs.tar"]
    with tarfile.open(folder / "rootfs.tar") as tar:
        assert {"one", "two"} <= set(tar.getnames())
        assert tar.getmember("one").uid == 0
    [failed] = library.of(BuildFailed)
    shown = json.loads((folder / "failure.json").read_text())
    assert {**shown, "time": None} == {**failed.as_json(), "time": None}
    assert shown["step"] == 3
    assert (folder / "console.log").read_text() == "vminit: the command exited with status 3\n"
    [notice] = library.notices()
    assert (notice.level, notice.message) == (
        "info",
        f"what is left of the failed build is kept in {folder}: console.log, failure.json, rootfs.tar",
    )


def test_a_kept_root_file_system_can_be_built_on(library: Library, tmp_path: Path) -> None:
    with pytest.raises(StepFailed):
        library.build(FAILING, keep_failed=tmp_path / "kept")
    library.home.bases.import_base("failed", kept(library, tmp_path / "kept") / "rootfs.tar")
    library.build("FROM failed\nRUN cat /one /two\n")
    said = b"".join(event.data for event in library.of(StepOutput))
    assert said.endswith(b"one\ntwo\n")


def test_a_build_that_takes_too_long_is_kept_too(library: Library, tmp_path: Path) -> None:
    settings = BuildSettings(bootstrap=BootstrapSettings(build_timeout=timedelta(seconds=1)))
    with pytest.raises(BuildTimeout):
        library.build("FROM host\nRUN sleep 100\n", keep_failed=tmp_path / "kept", settings=settings)
    assert json.loads((kept(library, tmp_path / "kept") / "failure.json").read_text())["exit_status"] == 5


def test_success_and_mistakes_leave_nothing(library: Library, tmp_path: Path) -> None:
    library.build("FROM scratch\n", keep_failed=tmp_path / "kept")
    with pytest.raises(InputError):
        library.build("FROM host\nCOPY missing /\n", keep_failed=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_an_interrupted_build_leaves_nothing(library: Library, tmp_path: Path) -> None:
    interrupted = threading.Event()

    def check() -> None:
        if interrupted.is_set():
            raise Interrupted("enough")

    def watch(event: Event) -> None:
        if isinstance(event, StepOutput):
            interrupted.set()

    library.home.check, library.watch = check, watch
    with pytest.raises(Interrupted):
        library.build("FROM host\nRUN echo now; sleep 100\n", keep_failed=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_an_interruption_while_it_is_kept_leaves_no_half_of_it(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firebuild_bootstrap.machine.local import LocalMachine

    def keep(_machine: LocalMachine, into: Path) -> tuple[str, ...]:
        (into / "rootfs.tar").write_bytes(b"half")
        raise Interrupted("enough")

    monkeypatch.setattr(LocalMachine, "keep", keep)
    with pytest.raises(Interrupted):
        library.build(FAILING, keep_failed=tmp_path / "kept")
    assert os.listdir(tmp_path / "kept") == []


def test_what_can_not_be_kept_does_not_hide_why_the_build_failed(library: Library, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StepFailed, match="exit code 3"):
        library.build(FAILING, keep_failed=tmp_path / "file")
    [notice] = library.notices()
    assert notice.level == "warning"
    assert notice.message.startswith("what is left of the failed build could not be kept: ")
    assert "Not a directory" in notice.message
