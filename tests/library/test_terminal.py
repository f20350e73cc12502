"""The live renderer on a terminal: a real one, and an emulated one whose screen can be read."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyte
import pytest

from firebuild_bootstrap.errors import ExitStatus
from firebuild_bootstrap.events import (
    BuildFailed,
    BuildStarted,
    Event,
    ImageStored,
    Notice,
    PhaseStarted,
    StepCached,
    StepFinished,
    StepOutput,
    StepProgress,
    StepStarted,
    TaskFinished,
    TaskProgress,
    TaskStarted,
)
from firebuild_bootstrap.live import Log, TerminalRenderer
from firebuild_bootstrap.polling import readable
from firebuild_bootstrap.terminal import SafeOutput, SafeStream, Screen, cells, fit
from support import eventually

RUN = StepStarted(step=2, total=2, instruction="RUN make", line=2)
DONE = StepFinished(step=2, exit_code=0, seconds=1)


def output(data: bytes, stream: str = "stdout") -> StepOutput:
    return StepOutput(step=2, stream="stdout" if stream == "stdout" else "stderr", data=data)


def clocks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_terminal_that_goes_away_stops_the_clock_and_fails_the_next_event(
    capfd: pytest.CaptureFixture[str],
) -> None:
    user, program = pty.openpty()
    with os.fdopen(program, "wb", buffering=0) as out:
        renderer = TerminalRenderer(out)
        renderer(RUN)
        os.close(user)
        assert eventually(lambda: clocks() == [])
        with pytest.raises(OSError, match="Input/output error"):
            renderer(DONE)
        renderer.close()
    assert capfd.readouterr().err == ""


class Emulated(io.BytesIO):
    """A terminal of so many columns and rows, with a driver that returns the carriage at newlines."""

    def __init__(self, columns: int = 40, rows: int = 8) -> None:
        super().__init__()
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.raw += data
        self.stream.feed(data.replace(b"\n", b"\r\n"))
        return len(data)

    def size(self) -> tuple[int, int]:
        return self.screen.columns, self.screen.lines

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]


class Watched:
    def __init__(self, terminal: Emulated, **options: Any) -> None:
        self.terminal = terminal
        self.now = 0.0
        self.renderer = TerminalRenderer(
            terminal, clock=lambda: self.now, size=terminal.size, tick=3600, **options
        )

    def show(self, *events: Event) -> list[str]:
        for event in events:
            self.renderer(event)
        self.renderer.draw()
        return self.terminal.lines()

    def later(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.show()


@pytest.fixture
def watched() -> Iterator[Watched]:
    one = Watched(Emulated())
    yield one
    one.renderer.close()


def started(step: int, stage: str = "", text: str = "RUN make") -> StepStarted:
    return StepStarted(step=step, total=9, instruction=text, line=step, stage=stage)


def test_a_running_step_has_a_clock_and_a_finished_one_its_seconds(watched: Watched) -> None:
    assert watched.show(RUN) == ["[2/2] RUN make  0s"]
    assert watched.later(65) == ["[2/2] RUN make  1m05s"]
    assert watched.show(DONE, Notice(level="warning", message="careful")) == [
        "[2/2] RUN make  1.0s",
        "warning: careful",
    ]
    assert b"\x1b[1m[2/2] RUN make\x1b[0m\x1b[2m  1.0s\x1b[0m\r\n" in watched.terminal.raw


def test_stages_side_by_side_have_their_rows_their_output_and_a_sum(watched: Watched) -> None:
    plan = BuildStarted(build_id="b", tag="t", steps=9, base="scratch", ca_provider="embedded")
    hit = StepCached(step=1, total=9, instruction="RUN " + "long " * 20, line=1, stage="a", origin="r")
    watched.show(plan, hit, started(2, "a"), started(7, "b", "RUN test"))
    assert watched.show(StepOutput(step=7, stream="stderr", data=b"one\ntwo")) == [
        "Building t (build b, CA embedded)",
        "[a 1/9] RUN long long l…  CACHED from r",
        "[a 2/9] RUN make  0s",
        "[b 7/9] RUN test  0s",
        "  one",
        "  two",
        "total 0s, 1 of 9 steps, 1 cached",
    ]
    assert watched.show(StepFinished(step=7, exit_code=0, seconds=2))[2:] == [
        "[b 7/9] RUN test  2.0s",
        "[a 2/9] RUN make  0s",
        "total 0s, 2 of 9 steps, 1 cached",
    ]


def test_output_shares_the_rows_that_are_left_and_its_end_is_what_shows(watched: Watched) -> None:
    watched.show(started(1, "a"), started(2, "b"))
    pieces = [StepOutput(step=step, stream="stdout", data=b"%d\n" % n) for n in range(99) for step in (1, 2)]
    assert watched.show(*pieces) == [
        "[a 1/9] RUN make  0s",
        *("  97", "  98"),
        "[b 2/9] RUN make  0s",
        *("  97", "  98"),
        "total 0s",
    ]
    watched.terminal.screen.resize(24, 40)
    assert [line for line in watched.show() if line.startswith("  ")] == [f"  {n}" for n in range(93, 99)] * 2


def test_more_goes_on_than_the_terminal_has_rows(watched: Watched) -> None:
    steps = [started(step, f"s{step}") for step in range(1, 7)]
    tasks = [TaskStarted(task=task, name=f"pulling {task}") for task in range(1, 4)]
    watched.show(*steps, *tasks)
    assert watched.later(1) == [
        *(f"[s{n} {n}/9] RUN make  1s" for n in range(1, 6)),
        "and 4 more",
        "total 1s",
    ]
    for rows, shown in (
        (4, ["[s1 1/9] RUN make  1s", "and 8 more", "total 1s"]),
        (3, ["[s1 1/9] RUN make  1s", "total 1s"]),
        (2, ["[s1 1/9] RUN make  1s"]),
        (1, []),
    ):
        small = Watched(Emulated(rows=rows))
        small.show(*steps, *tasks)
        assert small.later(1) == shown
        small.renderer.close()


def test_the_block_follows_the_size_of_the_terminal_at_once(watched: Watched) -> None:
    watched.show(RUN, output("größe 日本語日本語日本語日本語日本語日本語\n".encode()))
    assert watched.later(1) == ["[2/2] RUN make  1s", "  größe 日本語日本語日本語日本語日本語…"]
    watched.terminal.screen.resize(8, 16)
    assert watched.show() == ["[2/2] RUN …  1s", "  größe 日本語…"]
    watched.terminal.screen.resize(8, 80)
    assert watched.show()[0] == "[2/2] RUN make  1s"
    watched.terminal.screen.resize(8, 5)
    assert watched.show() == ["[2/…", "  g…"]


def test_a_progress_bar_shows_where_it_is(watched: Watched) -> None:
    assert watched.show(RUN, output(b"\x1b[32m 50%\x1b[0m\r")) == ["[2/2] RUN make  0s", "   50%"]
    assert watched.show(output(b"100%\r\n\tend\r")) == ["[2/2] RUN make  0s", "  100%", "          end"]


def test_lines_that_stay_push_the_block_down_and_nothing_is_left_of_it(watched: Watched) -> None:
    watched.show(RUN, output(b"one\ntwo\nthree\n"))
    notices = [Notice(level="info", message=f"n{number}") for number in range(20)]
    assert watched.show(*notices) == [
        *(f"info: n{number}" for number in range(16, 20)),
        *("[2/2] RUN make  0s", "  one", "  two", "  three"),
    ]
    assert watched.show(DONE) == [*(f"info: n{number}" for number in range(16, 20)), "[2/2] RUN make  1.0s"]


def test_phases_and_tasks_show_their_time_and_bytes(watched: Watched) -> None:
    assert watched.show(PhaseStarted(phase=6, name="run the steps")) == []
    assert watched.later(2) == ["waiting for the guest  2s"]
    watched.show(PhaseStarted(phase=7, name="store"), TaskStarted(task=1, name="writing", total_bytes=4096))
    watched.show(TaskProgress(task=1, bytes=1024), TaskProgress(task=8, bytes=1))
    assert watched.later(1) == ["waiting for the guest: 2.0s", "writing  1.0 KiB of 4.0 KiB, 1s"]
    assert watched.show(TaskFinished(task=1, seconds=2, bytes=4096), TaskFinished(task=8, seconds=2)) == [
        "waiting for the guest: 2.0s",
        "writing: 2.0s, 4.0 KiB",
        "storing the image  1s",
    ]
    watched.show(TaskStarted(task=2, name="quick"), TaskFinished(task=2, seconds=0.1))
    assert "quick" not in "".join(watched.terminal.lines())


def test_a_task_that_has_ended_is_gone_before_the_command_says_more(watched: Watched) -> None:
    watched.show(TaskStarted(task=1, name="pulling"))
    assert watched.later(0.5) == ["pulling  0s"]
    watched.renderer(TaskFinished(task=1, seconds=0.5))
    assert watched.terminal.lines() == []


def test_a_copy_shows_what_was_sent_while_it_lasts_and_in_the_end(watched: Watched) -> None:
    sent = StepProgress(step=2, bytes=2048), StepProgress(step=7, bytes=1)
    assert watched.show(RUN, *sent) == ["[2/2] RUN make  2.0 KiB, 0s"]
    assert watched.show(DONE) == ["[2/2] RUN make  2.0 KiB, 1.0s"]


def test_the_end_says_how_much_of_it_was_cached(watched: Watched) -> None:
    plan = BuildStarted(build_id="b", tag="t", steps=3, base="scratch", ca_provider="embedded")
    hit = StepCached(step=2, total=3, instruction="RUN a", line=1)
    stored = ImageStored(tag="t", path="/i", size=1, digest="sha256:0", seconds=2)
    assert watched.show(plan, hit, started(3), StepFinished(step=3, exit_code=0, seconds=1), stored)[3:] == [
        "Built t in 2.0s, 2 of 3 steps cached",
        "  image   /i",
        "  size    1 B",
        "  digest  sha256:0",
    ]
    assert watched.show(Notice(level="info", message="pushed"))[-1] == "info: pushed"


FAILED = BuildFailed(
    exit_status=ExitStatus.STEP_FAILED, error="StepFailed", message="late", step=2, exit_code=3
)


def test_all_that_a_failed_step_wrote_comes_last_and_harmless(watched: Watched) -> None:
    watched.terminal.screen.resize(24, 60)
    watched.show(started(1, "a"), RUN, *(output(b"%d\n" % number) for number in range(9)))
    watched.show(output(b"\x1b[31mred\x1b[2J\xff", "stderr"))
    watched.show(Notice(level="warning", message="something is left out here", step=2))
    lines = watched.show(StepFinished(step=2, exit_code=3, seconds=1), output(b"too late"), FAILED)
    assert lines == [
        "[a 1/9] RUN make  stopped after 0.0s",
        "[2/2] RUN make",
        *map(str, range(9)),
        r"red\x1b[2J\xff",
        "warning: something is left out here",
        "[2/2] failed after 1.0s, exit code 3",
    ]
    assert watched.later(3)[-1] == "cleaning up  3s"
    watched.renderer.close()
    assert watched.terminal.lines() == lines


def test_a_build_that_ends_without_a_failed_step_shows_what_its_running_ones_wrote(watched: Watched) -> None:
    late = BuildFailed(exit_status=ExitStatus.TIMEOUT, error="BuildTimeout", message="late")
    watched.show(RUN, started(1, "b"), output(b"waiting for a lock"))
    assert watched.show(late) == [
        "[2/2] RUN make",
        "waiting for a lock",
        "[2/2] stopped after 0.0s",
        "[b 1/9] RUN make",
        "[b 1/9] stopped after 0.0s",
    ]


def test_an_interrupted_build_says_what_it_has_stopped(watched: Watched) -> None:
    ended = BuildFailed(exit_status=ExitStatus.INTERRUPTED, error="Interrupted", message="SIGINT")
    assert watched.show(RUN, output(b"much\n"), ended) == ["[2/2] RUN make  stopped after 0.0s"]


def test_without_colours_there_are_none_of_the_guest_either() -> None:
    one = Watched(Emulated(), colours=False)
    one.show(RUN, output(b"\x1b[31mred\x1b[0m\n"), Notice(level="warning", message="w"))
    one.show(StepFinished(step=2, exit_code=3, seconds=1), FAILED)
    one.renderer.close()
    assert "red" in one.terminal.lines()
    assert b"m" not in re.findall(rb"\x1b\[[\d;]*([a-zA-Z])", one.terminal.raw)


def test_a_shell_gets_the_terminal_below_what_the_failed_step_wrote(watched: Watched) -> None:
    watched.show(started(1, "a"), RUN, output(b"error: x\n"), StepFinished(step=2, exit_code=3, seconds=1))
    watched.renderer.pause()
    before = watched.terminal.raw
    shown = ["[2/2] RUN make", "error: x", "[2/2] failed after 1.0s, exit code 3"]
    assert watched.terminal.lines() == shown
    watched.renderer(Notice(level="info", message="later"))
    assert watched.terminal.raw == before
    watched.renderer.resume()
    assert watched.show(FAILED) == [*shown, "info: later", "[a 1/9] RUN make  stopped after 0.0s"]


def test_much_output_costs_no_memory_and_hides_no_error(tmp_path: Path) -> None:
    out = io.BytesIO()
    many = output((b"x" * 79 + b"\n") * 8192)
    renderer = TerminalRenderer(out, tick=3600, directory=tmp_path)
    tracemalloc.start()
    for event in (RUN, output(b"error: the first\n"), *[many] * 16, output(b"error: the last\n")):
        renderer(event)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20
    assert list(tmp_path.iterdir()) == []
    renderer(StepFinished(step=2, exit_code=3, seconds=1))
    renderer(FAILED)
    renderer.close()
    shown = out.getvalue()
    assert b"error: the first\n" + many.data * 16 + b"error: the last\n" in shown


def test_a_full_disk_leaves_the_end_of_the_output() -> None:
    log = Log(None, colours=True)
    log.write("stdout", b"first\n")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("os.pwrite", side_effect=full):
        log.write("stdout", b"second\n")
    log.write("stdout", b"last")
    lost = b"\n(the rest could not be kept: No space left on device; this is the end of it)\n"
    assert b"".join(log.pieces()) == b"first\n" + lost + b"first\nsecond\nlast\n"
    log.close()


def test_a_sudden_end_leaves_no_block_and_a_visible_cursor() -> None:
    user, program = pty.openpty()
    with os.fdopen(program, "wb", buffering=0) as out, os.fdopen(user, "rb", buffering=0) as reader:
        renderer = TerminalRenderer(out, tick=3600)
        renderer(Notice(level="info", message="before"))
        renderer(RUN)
        renderer(output(b"unfinished"))
        renderer.draw()
        renderer.abandon()
        screen = pyte.Screen(80, 24)
        shown = all_of(reader)
        pyte.ByteStream(screen).feed(shown)
        assert [line.rstrip() for line in screen.display if line.strip()] == ["info: before"]
        assert b"unfinished" in shown
        assert screen.cursor.x == 0
        assert b"\x1b[?25l" not in shown
        renderer.close()
        all_of(reader)


def all_of(reader: io.FileIO) -> bytes:
    """What has been written; a terminal hands it out in pieces."""
    shown = b""
    while readable(reader, seconds=0.5):
        shown += reader.read(4096)
    return shown


# --- what passes to a terminal ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain\ttext\r\n", "plain\ttext\r\n"),
        ("größe 日本 a\u0301\u00a0\u3000.".encode(), "größe 日本 a\u0301\u00a0\u3000."),
        (
            b"\x1b[1;31mred\x1b[m \x1b[38;5;7mx\x1b[38:2::1:2:3m",
            "\x1b[1;31mred\x1b[m \x1b[38;5;7mx\x1b[38:2::1:2:3m",
        ),
        (b"\x1b[2J\x1b[H\x1b[6n\x1b[?25l\x1b[>4;1m", r"\x1b[2J\x1b[H\x1b[6n\x1b[?25l\x1b[>4;1m"),
        (b"\x1b]0;title\x07\x1b]52;c;aGk=\x1b\\", r"\x1b]0;title\x07\x1b]52;c;aGk=\x1b" + "\\"),
        (
            b"\x1bc\x1bP+q\x1b\\\x05\x08\x0b\x0c\x0e\x7f\x00",
            r"\x1bc\x1bP+q\x1b" + "\\" + r"\x05\x08\x0b\x0c\x0e\x7f\x00",
        ),
        (b"\x9b2J\xc2\x9b2J\xff", r"\x9b2J\x9b2J\xff"),
        ("\u202eabc\u2028\u200b".encode(), r"\u202eabc\u2028\u200b"),
        (b"\x1b[" + b"1" * 70 + b"m", r"\x1b[" + "1" * 70 + "m"),
        (b"end\x1b[3", r"end\x1b[3"),
        (b"end\xe6\x97", r"end\xe6\x97"),
    ],
)
def test_only_text_and_colours_reach_the_terminal_however_they_are_cut(data: bytes, shown: str) -> None:
    whole = SafeStream()
    assert whole.feed(data, final=True) == shown
    for cut in range(len(data) + 1):
        stream = SafeStream()
        assert stream.feed(data[:cut]) + stream.feed(data[cut:]) + stream.feed(b"", final=True) == shown
    bytewise = SafeStream()
    pieces = [bytewise.feed(data[index : index + 1]) for index in range(len(data))]
    assert "".join(pieces) + bytewise.feed(b"", final=True) == shown


def test_two_streams_are_cut_independently() -> None:
    both = SafeOutput()
    pieces = [
        ("stdout", b"\xe6\x97"),
        ("stderr", b"err \x1b[3"),
        ("stdout", b"\xa5\n"),
        ("stderr", b"1mred\n"),
    ]
    shown = [both.feed("stdout" if stream == "stdout" else "stderr", data) for stream, data in pieces]
    assert "".join(shown) == "err 日\n\x1b[31mred\n"
    both.feed("stdout", b"\xe6")
    assert both.finish() == r"\xe6"


def test_texts_are_cut_to_cells() -> None:
    assert cells("日本e\u0301") == 5
    assert fit("日本語", 5) == "日本…"
    assert fit("日本語", 4) == "日…"
    assert fit("abc", 3) == "abc"
    assert fit("abcd", 3) == "ab…"
    assert fit("abcd", 0) == ""


def test_a_block_that_did_not_change_is_not_drawn_again() -> None:
    terminal = Emulated()
    screen = Screen(terminal, terminal.size)
    screen.show(["live"])
    before = terminal.raw
    screen.show(["live"])
    assert terminal.raw == before
    screen.show([])
    assert terminal.lines() == []
