"""What is kept of detached runs: their output, bounded, and whether they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from firebuild_bootstrap import runs
from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.runs import Piece, Record, Runs, last_lines

RECORD = Record(
    id="r1",
    name="web",
    image="app",
    command=("serve",),
    driver="local",
    created="2026-11-29T03:00:00Z",
    ports=("127.0.0.1:8080->80/tcp",),
)
KEEPER = f"""
import sys, time
from pathlib import Path
from firebuild_bootstrap.runs import Record, Runs
with Runs(Path(sys.argv[1])).begin({RECORD!r}):
    print("up", flush=True)
    time.sleep(1000)
"""


def written(store: Path, *, tail: int | None = None) -> list[tuple[str, bytes]]:
    return [(piece.stream, piece.data) for piece in Runs(store).find("r1").output(tail=tail)]


def test_a_run_is_found_by_its_name_its_id_and_the_begin_of_it(tmp_path: Path) -> None:
    kept = Runs(tmp_path)
    assert kept.list() == []
    with kept.begin(RECORD), kept.begin(replace(RECORD, id="r22", name="", created="2026-11-29T04:00:00Z")):
        assert [run.record.id for run in kept.list()] == ["r22", "r1"]
        assert kept.find("web").record.id == kept.find("r1").record.id == "r1"
        assert kept.find("web").record.ports == RECORD.ports
        assert kept.find("r2").record.id == "r22"
        with pytest.raises(InputError, match=r"'r' is the start of several ids: r22, r1"):
            kept.find("r")
        with pytest.raises(InputError, match="there is no run 'x'"):
            kept.find("x")
        with (
            pytest.raises(InputError, match="the run r1 has the name web"),
            kept.begin(replace(RECORD, id="r3")),
        ):
            pass
        with pytest.raises(InputError, match="has not ended"):
            kept.find("r1").remove()
    kept.find("web").remove()
    assert [run.record.id for run in kept.list()] == ["r22"]
    with (
        pytest.raises(InputError, match="--name: expected letters"),
        kept.begin(replace(RECORD, name="../x")),
    ):
        pass


def test_output_is_kept_byte_for_byte_and_in_order(tmp_path: Path) -> None:
    every = bytes(range(256))
    with Runs(tmp_path).begin(RECORD) as writer:
        writer.write("stdout", every)
        writer.write("stderr", b"\n\xff")
        assert written(tmp_path) == [("stdout", every), ("stderr", b"\n\xff")]
        assert all(path.stat().st_mode & 0o77 == 0 for path in (tmp_path / "runs").rglob("*"))


def test_binary_output_takes_no_more_room_than_a_third_more_than_twice_its_size(tmp_path: Path) -> None:
    every = bytes(range(256)) * 256
    with Runs(tmp_path).begin(RECORD) as writer:
        writer.write("stdout", every)
    assert (tmp_path / "runs/r1/output").stat().st_size < 2.4 * len(every)
    assert written(tmp_path) == [("stdout", every)]


def test_a_run_with_the_longest_command_line_is_found(tmp_path: Path) -> None:
    command = ("/bin/echo", *("\udcff" * 131071 for _ in range(15)))  # bytes that are not UTF-8
    with Runs(tmp_path).begin(replace(RECORD, command=command)):
        assert Runs(tmp_path).find("web").record.command == command


def test_a_run_that_removes_itself_waits_for_those_who_want_its_end(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool, Runs(tmp_path).begin(RECORD) as writer:
        run = Runs(tmp_path).find("web")
        waiting = pool.submit(run.outcome)
        reading = pool.submit(lambda: list(run.output(follow=True)))
        with run.watched():
            writer.write("stdout", b"last\n")
            writer.end(5)
            removal = pool.submit(writer.remove)
            assert [piece.data for piece in reading.result(10)] == [b"last\n"]
            assert run.directory.exists()
        removal.result(10)
        assert not run.directory.exists()
    end = waiting.result(10)
    assert end is not None
    assert end.exit_code == 5
    with run.watched():  # what is gone can be asked for as well
        assert run.outcome() is None


def test_of_output_without_end_the_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LOG_BYTES", 1000)
    with Runs(tmp_path).begin(RECORD) as writer:
        run = Runs(tmp_path).find("r1")
        following = run.output(follow=True)
        writer.write("stdout", b"0\n")
        assert next(following).data == b"0\n"
        for number in range(1, 9):
            writer.write("stdout", b"%d\n" % number)
        assert [next(following).data for _ in range(8)] == [b"%d\n" % number for number in range(1, 9)]
        for number in range(9, 100):
            writer.write("stdout", b"%d\n" % number)
    size = sum(path.stat().st_size for path in run.directory.glob("output*"))
    assert size <= 2000
    kept = [int(data) for _, data in written(tmp_path)]
    assert kept == list(range(kept[0], 100))
    assert [data for _, data in written(tmp_path, tail=2)] == [b"98\n", b"99\n"]
    assert list(following)[-1].data == b"99\n"


def test_the_last_lines_are_those_of_the_reader_and_not_of_the_pieces() -> None:
    pieces = [Piece("t", "stdout", data) for data in (b"a\nb\nc", b"c", b"c\nd\n", b"")]
    assert [piece.data for piece in last_lines(iter(pieces), 2)] == [b"ccc\n", b"d\n"]
    mixed = [Piece("1", "stdout", b"a"), Piece("2", "stderr", b"b\n")]
    assert last_lines(iter(mixed), 5) == mixed
    assert last_lines(iter(mixed), 0) == []
    # What shows progress: one line, and it must not be copied for each of its pieces.
    progress = [Piece("t", "stdout", b"%d\r" % number * 1000) for number in range(300)]
    assert (
        len(last_lines(iter([*progress, Piece("t", "stdout", b"\n")]), 1)[0].data)
        == len(b"".join(piece.data for piece in progress)) + 1
    )


def test_a_full_disk_costs_output_and_says_so_when_there_is_room(tmp_path: Path) -> None:
    with Runs(tmp_path).begin(RECORD) as writer:
        output = tmp_path / "runs/r1/output"
        output.symlink_to("/dev/full")
        writer.write("stdout", b"lost")
        writer.write("stdout", b"too")
        writer.close()
        output.unlink()
        writer.write("stdout", b"kept")
        writer.end(3, "why")
    told = b"firebuild: 7 bytes of output could not be kept\n"
    assert written(tmp_path) == [("stderr", told), ("stdout", b"kept")]
    end = Runs(tmp_path).find("r1").end
    assert end is not None
    assert (end.exit_code, end.error) == (3, "why")


def test_what_was_damaged_or_is_foreign_is_passed_over(tmp_path: Path) -> None:
    with Runs(tmp_path).begin(RECORD) as writer:
        writer.write("stdout", b"whole\n")
    directory = tmp_path / "runs/r1"
    with open(directory / "output", "ab") as file:
        file.write(b'[1]\n{"time": 1}\nnot JSON\n{"half')
    assert written(tmp_path) == [("stdout", b"whole\n")]
    for name, text in (("a", ""), ("b", "[]"), ("c", '{"command": 1}'), ("d", '{"command": [], "more": 1}')):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_text(text)
    assert [run.record.id for run in Runs(tmp_path).list()] == ["r1"]
    (directory / "ended.json").write_text('{"other": 1}')
    assert Runs(tmp_path).find("r1").end is None


def test_a_store_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with (
        pytest.raises(MachineError, match=r"runs/r1 can't be made: ") as caught,
        Runs(tmp_path).begin(RECORD),
    ):
        pass
    assert "let this user write there" in str(caught.value)
    with pytest.raises(MachineError, match=r"runs can't be read: Not a directory"):
        Runs(tmp_path).list()


def test_a_run_whose_process_was_killed_has_ended_without_a_status(tmp_path: Path) -> None:
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, tmp_path], stdout=subprocess.PIPE)
    with keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"up\n"
        run = Runs(tmp_path).find("web")
        assert run.is_alive
        assert not run.wait(0)
        run.stop(0)  # this one does not heed the first, nor is it polite
    assert keeper.returncode == -signal.SIGTERM
    assert run.wait()
    assert run.end is None
    run.stop(0)


def test_a_process_of_another_host_is_left_alone(tmp_path: Path) -> None:
    with Runs(tmp_path).begin(RECORD):
        run = Runs(tmp_path).find("web")
        here = subprocess.Popen(["sleep", "1000"])
        try:
            # Its number is that of a process of this host, or of none; its time tells them apart.
            for record in (replace(run.record, pid=here.pid), replace(run.record, pid=2**22 + 1)):
                with pytest.raises(MachineError, match="is not on this host"):
                    runs.Run(run.directory, record).stop(0)
            assert here.poll() is None
        finally:
            here.kill()
            here.wait()
    assert run.record.pid == os.getpid()
