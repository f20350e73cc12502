"""`build_image`: what it returns, what it tells, and how each kind of failure looks."""

from __future__ import annotations

import os
import re
import signal
import tarfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from cli.library import Library
from cli.processes import guests
from firebuild_bootstrap.bootstrap_settings import BootstrapSettings
from firebuild_bootstrap.errors import (
    BuildTimeout,
    FirebuildError,
    GuestLost,
    InputError,
    Interrupted,
    MachineError,
    StepFailed,
)
from firebuild_bootstrap.events import (
    BuildFailed,
    BuildStarted,
    Event,
    GuestConnected,
    ImageStored,
    Notice,
    PhaseStarted,
    StageFinished,
    StageStarted,
    StepFinished,
    StepOutput,
    StepProgress,
    StepStarted,
    TaskFinished,
    TaskProgress,
    TaskStarted,
)
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputType
from firebuild_bootstrap.settings import BuildSettings
from firebuild_pki import CAError, CASettings, Note, NoteLevel, SettingsError
from firebuild_pki.providers.embedded import EmbeddedProvider
from support import writable_memory

pytestmark = pytest.mark.needs("userns")


def limits(**members: timedelta | int) -> BuildSettings:
    return BuildSettings(bootstrap=BootstrapSettings.model_validate(members))


def test_a_build_returns_the_stored_image_and_tells_its_story_in_order(library: Library) -> None:
    image = library.build("FROM host\nRUN echo hello >&2\nENV A=b\n", labels={"l": "v"}, tag="t/story:1")
    archive = image.output(OutputType.TAR)
    assert archive is not None
    with tarfile.open(archive) as tar:
        assert "bin/sh" in tar.getnames() or "usr/bin/sh" in tar.getnames()
    assert image.record.config.env["A"] == "b"
    assert image.record.config.labels["l"] == "v"
    assert library.home.images.inspect(Reference.parse("t/story:1")).record == image.record
    beside = (Notice, TaskStarted, TaskProgress, TaskFinished)
    kinds = [type(event) for event in library.events if not isinstance(event, beside)]
    assert kinds == [
        *(PhaseStarted, BuildStarted, PhaseStarted, StageStarted, PhaseStarted, PhaseStarted, PhaseStarted),
        *(StepStarted, StepFinished, PhaseStarted, GuestConnected),
        *(StepStarted, StepOutput, StepFinished, StageFinished, PhaseStarted, ImageStored),
    ]
    assert [event.name for event in library.of(TaskStarted)] == [
        *("unpacking the root file system", "stopping the machine", "writing rootfs.tar", "storing the image")
    ]
    assert [event.task for event in library.of(TaskFinished)] == [1, 2, 3, 4]
    assert library.of(TaskFinished)[2].bytes > 0
    [started], [connected], [stored] = (
        library.of(BuildStarted),
        library.of(GuestConnected),
        library.of(ImageStored),
    )
    assert (started.steps, started.base, started.ca_provider) == (2, "host:latest", "embedded")
    assert connected.tls_version.startswith("TLS")
    assert (stored.tag, stored.path, stored.digest) == (
        "t/story:1",
        str(archive),
        image.record.outputs[0].digest,
    )
    assert [event.data for event in library.of(StepOutput)] == [b"hello\n"]


def test_a_copy_tells_how_much_was_sent(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firebuild_bootstrap.service.stream._PROGRESS_SECONDS", 0)
    (library.context / "file").write_bytes(bytes(range(256)) * 20_000)
    library.build("FROM scratch\nCOPY file /\n")
    told = library.of(StepProgress)
    assert {event.step for event in told} == {2}
    assert 5_120_000 <= told[-1].bytes < 5_130_000  # headers travel with the content


def test_no_events_need_be_received(library: Library) -> None:
    library.watch = lambda _: None
    assert library.build("FROM scratch\n").record.base == "scratch"


def test_warnings_of_the_dockerfile_become_notices(library: Library) -> None:
    library.build("FROM scratch\nARG KNOWN\n", build_args={"KNOWN": "1", "UNKNOWN": "2"})
    [notice] = [event for event in library.notices() if "UNKNOWN" in event.message]
    assert notice.level == "warning"
    assert notice.message.startswith(str(library.context / "Dockerfile"))
    assert "2" not in notice.message.rpartition("UNKNOWN")[2]
    assert not [event for event in library.notices() if " KNOWN" in event.message]


def test_a_failed_copy_is_told_with_its_line_and_what_is_in_the_way(library: Library) -> None:
    (library.context / "file").touch()
    with pytest.raises(StepFailed) as caught:
        library.build("FROM scratch\nCOPY file /etc/motd\n\nCOPY file /etc/motd/file\n")
    assert str(caught.value) == (
        f"{library.context / 'Dockerfile'}:4: step 3/3 failed "
        "(/etc/motd/file: a file is where a directory is needed)\n  COPY file /etc/motd/file"
    )
    assert (caught.value.step, caught.value.exit_code) == (3, None)
    [failed] = library.of(BuildFailed)
    assert (failed.exit_status, failed.step, failed.exit_code) == (1, 3, None)
    assert failed.message == str(caught.value)


@pytest.mark.parametrize(
    ("command", "words", "exit_code"),
    [
        ("echo first; echo last >&2; exit 3", "with exit code 3\n", 3),
        ("touch /f; /f", "with exit code 126: a command could not be executed\n", 126),
        ("missing", "with exit code 127: a command, or the shell to run it, is not in the image\n", 127),
        ('["none"]', "is not in the image (none: not found in PATH=", 127),
        ("kill -9 $$", "with exit code 137: SIGKILL\n", 137),
        ("exit 255", "with exit code 255\n", 255),
    ],
)
def test_a_failed_run_is_told_with_its_exit_code_in_words(
    library: Library, command: str, words: str, exit_code: int
) -> None:
    with pytest.raises(StepFailed) as caught:
        library.build(f"FROM host\nRUN {command}\n")
    assert "Dockerfile:2: step 2/2 failed with exit code " in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.exit_code == exit_code
    if exit_code == 3:
        assert str(caught.value).endswith("\n  its last output:\n    first\n    last")


def test_an_older_image_survives_a_failed_build(library: Library) -> None:
    before = library.build("FROM scratch\nLABEL is=old\n", tag="t/older:1")
    with pytest.raises(StepFailed):
        library.build("FROM scratch\nLABEL is=new\nRUN true\n", tag="t/older:1")
    after = library.home.images.inspect(Reference.parse("t/older:1"))
    assert after.record == before.record
    archive = after.output(OutputType.TAR)
    assert archive is not None
    assert archive.exists()


def holds_a_key(pid: int) -> bool:
    """Whether a private key is in the memory of a process that it can write."""
    pattern = re.compile(rb"PRIVATE KEY-----(\n|\\n)[A-Za-z0-9+/]{40}")
    return any(pattern.search(part) for part in writable_memory(pid))


@pytest.mark.root
def test_the_processes_that_start_a_run_never_held_the_guests_key(library: Library) -> None:
    found: list[bool] = []

    def look(event: Event) -> None:
        if isinstance(event, StepOutput):
            found.extend(map(holds_a_key, guests()))

    library.watch = look
    library.build("FROM host\nRUN echo ready; sleep 1\n", tag="t/key:1")
    assert sorted(found) == [False] * (len(found) - 1) + [True]
    assert len(found) >= 3  # vminit, the launcher and a helper


def test_a_guest_that_is_killed_is_lost(library: Library) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, StepOutput):
            for pid in guests():
                with suppress(ProcessLookupError):  # its launcher dies with it
                    os.kill(pid, signal.SIGKILL)

    library.watch = kill
    with pytest.raises(GuestLost) as caught:
        library.build("FROM host\nRUN echo ready; sleep 100\n", tag="t/lost:1")
    assert "the guest ended before it reported success or failure: " in str(caught.value)
    [failed] = library.of(BuildFailed)
    assert (failed.exit_status, failed.error) == (4, "GuestLost")
    assert guests() == []


def test_a_guest_that_gives_up_after_a_step_ends_the_build_with_its_words(library: Library) -> None:
    def ask_to_end(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 2:
            for pid in guests():
                os.kill(pid, signal.SIGTERM)

    library.watch = ask_to_end
    with pytest.raises(StepFailed) as caught:
        library.build("FROM host\nRUN true\nRUN sleep 30\n")
    assert caught.value.__cause__ is None  # not itself, either: that chain would have no end
    [failed] = library.of(BuildFailed)
    assert (failed.exit_status, failed.message) == (1, str(caught.value))
    assert failed.step in (0, 3)  # between the steps, or at the begin of the next
    assert guests() == []


def test_events_come_one_at_a_time(library: Library) -> None:
    inside = threading.Lock()
    together: list[Event] = []

    def slow(event: Event) -> None:
        if not inside.acquire(blocking=False):
            together.append(event)
            return
        if isinstance(event, PhaseStarted) and event.phase == 6:  # now the guest calls the server's threads
            time.sleep(1.5)
        inside.release()

    library.watch = slow
    library.build("FROM host\nRUN true\n")
    assert together == []


def test_a_failure_is_told_before_the_clean_up(library: Library) -> None:
    left: list[list[str]] = []

    def look(event: Event) -> None:
        if isinstance(event, BuildFailed):
            left.append(library.leftovers())

    library.watch = look
    with pytest.raises(StepFailed):
        library.build("FROM host\nRUN false\n")
    assert len(left) == 1
    assert len(left[0]) == 1


def test_outputs_that_take_too_long_are_ended_too(library: Library) -> None:
    def wait(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == 7:
            time.sleep(12)

    library.watch = wait
    short = limits(build_timeout=timedelta(seconds=6), initial_timeout=timedelta(seconds=6))
    with pytest.raises(BuildTimeout, match=r"the build and its outputs took longer than 12 seconds"):
        library.build("FROM host\nRUN true\n", settings=short, tag="t/late:1")
    assert library.home.images.find(Reference.parse("t/late:1")) is None


def test_a_build_that_takes_too_long_is_ended(library: Library) -> None:
    with pytest.raises(BuildTimeout, match="longer than 1 second"):
        library.build("FROM host\nRUN sleep 100\n", settings=limits(build_timeout=timedelta(seconds=1)))
    assert guests() == []


def test_bad_input_ends_in_the_first_phase(library: Library) -> None:
    for dockerfile in ("FROM scratch\nCOPY none /\n", "FROM none\n", "", "RUN true\n"):
        with pytest.raises(InputError):
            library.build(dockerfile)
    assert {event.phase for event in library.of(PhaseStarted)} == {1}
    assert {event.exit_status for event in library.of(BuildFailed)} == {2}


def test_an_output_that_cannot_be_written_is_found_before_the_build(library: Library, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        library.build("FROM scratch\n", outputs=[f"tar,dest={tmp_path}/none/out.tar"])
    assert {event.phase for event in library.of(PhaseStarted)} == {1}


def test_an_output_that_gets_in_the_way_during_the_build_keeps_the_image_out_of_the_store(
    library: Library, tmp_path: Path
) -> None:
    def obstruct(event: Event) -> None:
        if isinstance(event, GuestConnected):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/mine").touch()

    library.watch = obstruct
    with pytest.raises(InputError, match="expected a new or empty directory"):
        library.build("FROM scratch\n", tag="t/obstructed:1", outputs=[f"dir,dest={tmp_path}/out"])
    assert library.home.images.find(Reference.parse("t/obstructed:1")) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_certificate_authority_that_ends_before_the_build_stops_it(library: Library) -> None:
    ca = CASettings.model_validate({"embedded": {"ca_lifetime": "1m"}})
    with pytest.raises(CAError, match="but the build may need it until") as caught:
        library.build("FROM scratch\n", settings=BuildSettings(ca=ca))
    assert not isinstance(caught.value, SettingsError)
    assert {event.exit_status for event in library.of(BuildFailed)} == {3}


def test_remarks_of_the_certificate_authority_are_notices(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    remarks = [Note("all is well", level=NoteLevel.OK), Note("it expires in a week", hint="renew it")]
    monkeypatch.setattr(EmbeddedProvider, "check", lambda self: remarks)
    library.build("FROM scratch\n", tag="t/remarks:1")
    assert [event.message for event in library.notices()] == ["it expires in a week (hint: renew it)"]


@pytest.mark.parametrize("phase", [1, 3, 5, 7])
def test_check_ends_a_build_wherever_it_is(library: Library, host_home: Path, phase: int) -> None:
    def check() -> None:
        if [event.phase for event in library.of(PhaseStarted)][-1:] == [phase]:
            raise Interrupted("enough")

    library.home = Home(host_home, check=check)
    with pytest.raises(Interrupted, match="enough"):
        library.build("FROM host\nRUN true\n", tag="t/interrupted:1")
    [failed] = library.of(BuildFailed)
    assert (failed.exit_status, failed.error) == (130, "Interrupted")
    assert library.home.images.find(Reference.parse("t/interrupted:1")) is None


def test_an_interruption_explains_the_failure_that_it_caused(library: Library, host_home: Path) -> None:
    interrupted: list[bool] = []

    def check() -> None:
        if interrupted:
            raise Interrupted("enough")

    def interrupt(event: Event) -> None:
        if isinstance(event, BuildStarted):
            interrupted.append(True)
            raise OSError("broken by the same signal")

    library.home = Home(host_home, check=check)
    library.watch = interrupt
    with pytest.raises(Interrupted, match="enough"):
        library.build("FROM scratch\n")


@pytest.mark.parametrize("kind", [PhaseStarted, GuestConnected, StepOutput, ImageStored])
def test_a_receiver_that_fails_ends_the_build_and_leaves_nothing(library: Library, kind: type[Event]) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, kind):
            raise OSError("receiver is broken")

    library.watch = fail
    with pytest.raises((OSError, FirebuildError), match="receiver is broken"):
        library.build("FROM host\nRUN echo hello\n")
    assert guests() == []


def test_a_receiver_that_fails_at_the_end_does_not_hide_why_the_build_did(library: Library) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, BuildFailed):
            raise OSError("receiver is broken")

    library.watch = fail
    with pytest.raises(InputError, match="unknown base or image"):
        library.build("FROM none\n")


def test_a_home_that_cannot_be_made_is_a_machine_error(library: Library, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before, library.home = library.home, Home(tmp_path / "file")
    with pytest.raises(MachineError, match="the build's directory can't be made"):
        library.build("FROM scratch\n")
    library.home = before
