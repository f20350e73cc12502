"""The live renderer on a terminal: a real one, and an emulated one whose screen can be read."""

from __future__ import annotations

import io
import os
import pty
import select
import threading
import time
from collections.abc import Callable, Iterator

import pyte
import pytest

from firebuild_bootstrap.events import (
    BuildFailed,
    Event,
    Notice,
    PhaseStarted,
    StepFinished,
    StepOutput,
    StepProgress,
    StepStarted,
    TaskFinished,
    TaskProgress,
    TaskStarted,
)
from firebuild_bootstrap.progress import TerminalRenderer
from firebuild_bootstrap.terminal import SafeStream, Screen, cells, fit

RUN = StepStarted(step=2, total=2, instruction="RUN make", line=2)
DONE = StepFinished(step=2, exit_code=0, seconds=1)


def output(data: bytes, stream: str = "stdout") -> StepOutput:
    return StepOutput(step=2, stream="stdout" if stream == "stdout" else "stderr", data=data)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


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
            renderer(StepOutput(step=2, stream="stdout", data=b"more\n"))
        with pytest.raises(OSError, match="Input/output error"):
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
    def __init__(self, terminal: Emulated, *, colours: bool = True) -> None:
        self.terminal = terminal
        self.now = 0.0
        self.renderer = TerminalRenderer(
            terminal, colours=colours, clock=lambda: self.now, size=terminal.size
        )

    def show(self, *events: Event) -> list[str]:
        for event in events:
            self.renderer(event)
        return self.terminal.lines()

    def later(self, seconds: float) -> list[str]:
        before = self.terminal.lines()
        self.now += seconds
        eventually(lambda: self.terminal.lines() != before)
        return self.terminal.lines()


@pytest.fixture
def watched() -> Iterator[Watched]:
    one = Watched(Emulated())
    yield one
    one.renderer.close()


def test_a_silent_step_is_one_line_with_a_running_clock(watched: Watched) -> None:
    assert watched.show(RUN) == ["[2/2] RUN make  0s, total 0s"]
    assert watched.later(65) == ["[2/2] RUN make  1m05s, total 1m05s"]
    assert watched.show(DONE, Notice(level="warning", message="careful")) == [
        "[2/2] RUN make  1.0s",
        "warning: careful",
    ]
    assert b"\x1b[1m[2/2] RUN make\x1b[0m\x1b[2m  1.0s\x1b[0m\n" in watched.terminal.raw


def test_a_header_longer_than_the_line_is_shown_once_and_cut(watched: Watched) -> None:
    long = StepStarted(step=2, total=2, instruction="RUN " + "long " * 50, line=2)
    assert watched.show(long) == ["[2/2] RUN long long long…  0s, total 0s"]
    assert watched.later(1) == ["[2/2] RUN long long long…  1s, total 1s"]
    assert watched.show(DONE) == ["[2/2] RUN long long long long lo…  1.0s"]


def test_characters_are_as_wide_as_they_are(watched: Watched) -> None:
    wide = StepStarted(step=2, total=2, instruction="RUN " + "日本e\u0301" * 20, line=2)
    (line,) = watched.show(wide)
    assert line.endswith("…  0s, total 0s")
    assert watched.later(1)[0].endswith("…  1s, total 1s")
    assert len(watched.terminal.lines()) == 1


def test_the_live_line_follows_the_size_of_the_terminal(watched: Watched) -> None:
    watched.show(RUN, output(b"one\n"))
    watched.terminal.screen.resize(8, 20)
    assert watched.later(1)[-1] == "[2/2] RUN make  1s"
    watched.terminal.screen.resize(8, 80)
    assert watched.later(1) == ["[2/2] RUN make", "one", "[2/2] RUN make  2s, total 2s"]
    watched.terminal.screen.resize(1, 80)
    watched.show(output(b"two\n"))
    assert watched.terminal.lines() == []


def test_output_scrolls_above_the_live_line(watched: Watched) -> None:
    live = "[2/2] RUN make  0s, total 0s"
    shown = watched.show(RUN, *(output(b"%d\n" % number) for number in range(100)))
    assert shown == ["93", "94", "95", "96", "97", "98", "99", live]
    watched.show(output(b"half"))
    assert watched.terminal.lines() == ["94", "95", "96", "97", "98", "99", "half", live]
    assert watched.show(output(b" a line\n"))[-2:] == ["half a line", live]
    assert watched.show(output(b"last"), DONE)[-2:] == ["last", "[2/2] done in 1.0s"]


def test_a_progress_bar_stays_on_its_line(watched: Watched) -> None:
    live = "[2/2] RUN make  0s, total 0s"
    assert watched.show(RUN, output(b" 50%\r")) == ["[2/2] RUN make", " 50%", live]
    assert watched.show(output(b"100%\r")) == ["[2/2] RUN make", "100%", live]
    assert watched.show(output(b"done\n\tend\t.\r")) == ["[2/2] RUN make", "done", "        end     .", live]


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (b"more\n", ["x" * 40, "more"]),
        (b"\nnext\n", ["x" * 40, "next"]),
        (b"\x1b[0m\nnext\n", ["x" * 40, "next"]),
        (b"\r\nnext\n", ["x" * 40, "next"]),
        (b"\ry\n", ["y" + "x" * 39]),
        (b"\x1b[1m", ["x" * 40]),
        (b"y" * 45 + b"\n", ["x" * 40, "y" * 40, "y" * 5]),
    ],
)
def test_output_that_ends_in_the_last_column_goes_on_where_it_would(
    watched: Watched, then: bytes, expected: list[str]
) -> None:
    live = "[2/2] RUN make  0s, total 0s"
    watched.show(RUN, output(b"x" * 40))
    assert watched.show(output(then)) == ["[2/2] RUN make", *expected, live]
    assert watched.show(DONE) == ["[2/2] RUN make", *expected, "[2/2] done in 1.0s"]


def test_a_line_longer_than_the_terminal_goes_on_where_it_was(watched: Watched) -> None:
    live = "[2/2] RUN make  0s, total 0s"
    shown = watched.show(RUN, output(b"x" * 90))
    assert shown == ["[2/2] RUN make", "x" * 40, "x" * 40, "x" * 10, live]
    assert watched.show(output(b"yz"))[3:] == ["x" * 10 + "yz", live]


def test_an_unfinished_line_survives_a_narrower_terminal(watched: Watched) -> None:
    watched.show(RUN, output(b"x" * 30))
    watched.terminal.screen.resize(8, 20)
    watched.later(1)
    # This terminal cuts lines that get too long, where most would wrap them.
    assert watched.show(output(b"\nnext\n"), DONE)[1:] == ["x" * 19, "next", "[2/2] done in 1.0s"]


def test_a_wide_character_that_does_not_fit_goes_to_the_next_row(watched: Watched) -> None:
    watched.show(RUN, output(("x" * 39 + "日本").encode()))
    assert watched.show(DONE)[-1] == "[2/2] done in 1.0s"


def test_colours_of_the_guest_end_with_its_step_and_before_our_lines(watched: Watched) -> None:
    watched.show(RUN, output(b"\x1b[31mred\n"), Notice(level="info", message="ours"))
    raw = watched.terminal.raw
    assert b"\x1b[31mred\n" in raw
    assert b"\x1b[0minfo: ours\n" in raw
    watched.show(output(b"\x1b[32mgreen"), DONE)
    assert b"\x1b[32mgreen" in watched.terminal.raw
    assert b"\x1b[0m\n\x1b[2m[2/2] done" in watched.terminal.raw


def test_without_colours_our_own_lines_have_none() -> None:
    one = Watched(Emulated(), colours=False)
    one.show(RUN, output(b"\x1b[31mred\x1b[0m\n"), Notice(level="warning", message="w"), DONE)
    one.renderer.close()
    for code in (b"1", b"2", b"33"):
        assert b"\x1b[%sm" % code not in one.terminal.raw
    assert b"\x1b[31mred" in one.terminal.raw


def test_phases_and_tasks_show_their_time_and_bytes(watched: Watched) -> None:
    assert watched.show(PhaseStarted(phase=6, name="run the steps")) == []
    assert watched.later(2) == ["waiting for the guest  2s, total 2s"]
    watched.show(PhaseStarted(phase=7, name="store"), TaskStarted(task=1, name="writing", total_bytes=4096))
    watched.show(TaskProgress(task=1, bytes=1024))
    assert watched.later(1) == ["waiting for the guest: 2.0s", "writing  1.0 KiB of 4.0 KiB, 1s"]
    watched.terminal.screen.resize(8, 80)
    assert watched.later(1)[-1] == "writing  1.0 KiB of 4.0 KiB, 2s, total 4s"
    assert watched.show(TaskFinished(task=1, seconds=2, bytes=4096)) == [
        "waiting for the guest: 2.0s",
        "writing: 2.0s, 4.0 KiB",
        "storing the image  2s, total 4s",
    ]
    watched.show(TaskStarted(task=2, name="quick"), TaskFinished(task=2, seconds=0.1))
    assert "quick" not in "".join(watched.terminal.lines())


def test_a_task_inside_a_step_is_shown_beside_its_header(watched: Watched) -> None:
    watched.terminal.screen.resize(8, 80)
    assert watched.show(RUN, TaskStarted(task=1, name="unpacking")) == [
        "[2/2] RUN make  unpacking, 0s, total 0s"
    ]
    assert watched.show(TaskFinished(task=1, seconds=9), DONE) == ["[2/2] RUN make  1.0s"]


def test_a_copy_shows_what_was_sent(watched: Watched) -> None:
    watched.terminal.screen.resize(8, 80)
    assert watched.show(RUN, StepProgress(step=2, bytes=2048), StepProgress(step=7, bytes=1)) == [
        "[2/2] RUN make  2.0 KiB, 0s, total 0s"
    ]


def test_a_failure_ends_the_live_line_and_leaves_the_step(watched: Watched) -> None:
    failed = BuildFailed(exit_status=5, error="BuildTimeout", message="late")
    assert watched.show(RUN, output(b"")) == ["[2/2] RUN make  0s, total 0s"]
    assert watched.show(failed) == ["[2/2] RUN make"]
    assert watched.later(3) == ["[2/2] RUN make", "cleaning up  3s, total 3s"]
    watched.renderer.close()
    assert watched.terminal.lines() == ["[2/2] RUN make"]


def test_a_failed_step_says_so_below_its_header(watched: Watched) -> None:
    failed = StepFinished(step=2, exit_code=3, seconds=1)
    assert watched.show(RUN, failed) == ["[2/2] RUN make", "[2/2] failed after 1.0s, exit code 3"]
    assert watched.show(StepFinished(step=9, exit_code=0, seconds=1))[-1] == "done in 1.0s"


def test_a_sudden_end_leaves_no_live_line_and_a_visible_cursor() -> None:
    for begun in (b"", b"unfinished"):
        user, program = pty.openpty()
        with os.fdopen(program, "wb", buffering=0) as out, os.fdopen(user, "rb", buffering=0) as reader:
            renderer = TerminalRenderer(out)
            renderer(RUN)
            if begun:
                renderer(output(begun))
            renderer.abandon()
            screen = pyte.Screen(80, 24)
            shown = all_of(reader)
            pyte.ByteStream(screen).feed(shown)
            lines = [line.rstrip() for line in screen.display if line.strip()]
            assert lines == (["[2/2] RUN make", "unfinished"] if begun else [])
            assert screen.cursor.x == 0
            assert b"\x1b[?25l" not in shown
            renderer.close()
            all_of(reader)


def all_of(reader: io.FileIO) -> bytes:
    """What has been written; a terminal hands it out in pieces."""
    shown = b""
    while select.select([reader], [], [], 0.5)[0]:
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


def test_two_streams_are_cut_independently(watched: Watched) -> None:
    watched.show(RUN, output(b"\xe6\x97"), output(b"err \x1b[3", "stderr"), output(b"\xa5\n"))
    watched.show(output(b"1mred\n", "stderr"), DONE)
    assert watched.terminal.lines() == ["[2/2] RUN make", "err 日", "red", "[2/2] done in 1.0s"]


def test_texts_are_cut_to_cells() -> None:
    assert cells("日本e\u0301") == 5
    assert fit("日本語", 5) == "日本…"
    assert fit("日本語", 4) == "日…"
    assert fit("abc", 3) == "abc"
    assert fit("abcd", 3) == "ab…"
    assert fit("abcd", 0) == ""


def test_a_live_line_that_did_not_change_is_not_drawn_again() -> None:
    terminal = Emulated()
    screen = Screen(terminal, terminal.size)
    screen.live("live")
    before = terminal.raw
    screen.live("live")
    assert terminal.raw == before
    screen.live("")
    assert terminal.lines() == []
