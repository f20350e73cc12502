"""How a build looks to the person, or the program, that watches it."""

from __future__ import annotations

import io
import json
import re
import time
import tracemalloc
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

import pytest

from firebuild_bootstrap.cli.display import Boot, Progress, make_renderer, read_progress
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.events import (
    BuildFailed,
    BuildStarted,
    Event,
    GuestConnected,
    ImageStored,
    Notice,
    PeerRefused,
    PhaseStarted,
    StageFinished,
    StageStarted,
    StepFinished,
    StepOutput,
    StepStarted,
    TaskFinished,
    TaskProgress,
    Tasks,
    TaskStarted,
)
from firebuild_bootstrap.live import TerminalRenderer
from firebuild_bootstrap.progress import (
    JsonRenderer,
    PlainRenderer,
    human_time,
)
from firebuild_bootstrap.sizes import human_size
from firebuild_bootstrap.terminal import SafeOutput
from support import eventually


class Stream(io.StringIO):
    """A text stream, which may be a terminal."""

    def __init__(self, out: io.BytesIO, *, terminal: bool) -> None:
        super().__init__()
        self.out = out
        self.terminal = terminal

    @property
    def buffer(self) -> BinaryIO:
        return self.out

    def isatty(self) -> bool:
        return self.terminal


RUN = StepStarted(step=2, total=3, instruction="RUN make", line=4)


def shown(*events: Event) -> str:
    out = io.BytesIO()
    renderer = PlainRenderer(out)
    for event in events:
        renderer(event)
    renderer.close()
    return out.getvalue().decode()


def output(data: bytes) -> StepOutput:
    return StepOutput(step=2, stream="stdout", data=data)


def test_plain_lines_frame_the_output_of_each_step() -> None:
    done = StepFinished(step=2, exit_code=0, seconds=1.25)
    assert shown(RUN, output(b"a\nb\n"), done) == "[2/3] RUN make\na\nb\n[2/3] done in 1.2s\n"


def test_an_unfinished_line_is_ended_before_our_own() -> None:
    done = StepFinished(step=2, exit_code=2, seconds=0.04)
    expected = "[2/3] RUN make\nno newline\n[2/3] failed after 0.0s, exit code 2\n"
    assert shown(RUN, output(b"no newline"), done) == expected


def test_output_passes_through_byte_for_byte() -> None:
    out = io.BytesIO()
    renderer = PlainRenderer(out)
    pieces = [b"\xff\xfe\x00", b"\x1b[31mred\x1b[0m\r", b"50%\r100%\n"]
    for piece in pieces:
        renderer(output(piece))
    renderer.close()
    assert out.getvalue() == b"".join(pieces)


def test_the_end_names_path_size_and_digest() -> None:
    text = shown(
        BuildStarted(build_id="b1", tag="a/b:1", steps=3, base="scratch", ca_provider="embedded"),
        ImageStored(tag="a/b:1", path="/images/b", size=3 << 20, digest="sha256:00", seconds=2),
    )
    assert text.startswith("Building a/b:1 (build b1, CA embedded)\n")
    assert "  image   /images/b\n  size    3.0 MiB\n  digest  sha256:00\n" in text


def test_a_refused_peer_is_named() -> None:
    refused = PeerRefused(
        peer="127.0.0.1:9", reason="certificate has expired", subject="CN=x", fingerprint_sha256="ab"
    )
    assert shown(refused) == (
        "warning: refused a connection from 127.0.0.1:9: certificate has expired (subject CN=x, SHA-256 ab)\n"
    )


def test_events_for_programs_only_leave_no_plain_line() -> None:
    assert shown(PhaseStarted(phase=1, name="read")) == ""


def test_rawjson_is_one_object_a_line_with_base64_where_output_is_not_utf8() -> None:
    out = io.BytesIO()
    renderer = JsonRenderer(out)
    renderer(RUN)
    renderer(output(b"\xff\x00"))
    renderer(output("größe\n".encode()))
    renderer.close()
    start, first, binary, text = [json.loads(line) for line in out.getvalue().splitlines()]
    assert {"event": "stream-started", "schema": 1}.items() <= start.items()
    assert first["event"] == "step-started"
    assert first["instruction"] == "RUN make"
    assert binary["data_base64"] == "/wA="
    assert "data" not in binary
    assert text["data"] == "größe\n"


def test_auto_is_live_on_a_terminal_and_plain_in_a_pipe() -> None:
    def chosen(mode: Progress, terminal: bool, **environ: str) -> type:
        stream = Stream(io.BytesIO(), terminal=terminal)
        with closing(make_renderer(mode, stream, environ=environ)) as renderer:
            return type(renderer)

    assert chosen("auto", True, TERM="xterm") is TerminalRenderer
    assert chosen("tty", True, TERM="xterm") is TerminalRenderer
    assert chosen("auto", True, TERM="dumb") is PlainRenderer
    assert chosen("auto", True) is PlainRenderer
    assert chosen("auto", False, TERM="xterm") is PlainRenderer
    assert chosen("plain", True, TERM="xterm") is PlainRenderer
    assert chosen("rawjson", True) is JsonRenderer
    with pytest.raises(InputError, match="--progress tty: the output is not a terminal"):
        chosen("tty", False, TERM="xterm")


def test_quiet_or_a_closed_stream_shows_nothing() -> None:
    out = io.BytesIO()
    for renderer in (make_renderer("quiet", Stream(out, terminal=True)), make_renderer("auto", None)):
        renderer(RUN)
        renderer.pause()
        renderer.resume()
        renderer.abandon()
        renderer.close()
    assert out.getvalue() == b""


def test_the_environment_says_how_a_build_is_shown_where_no_option_does() -> None:
    buildkit = {"BUILDKIT_PROGRESS": "plain"}
    assert read_progress(None, {}, quiet=False) == "auto"
    assert read_progress(None, buildkit, quiet=False) == "plain"
    assert read_progress(None, {"BUILDKIT_PROGRESS": " plain\n"}, quiet=False) == "plain"
    assert read_progress("auto", buildkit, quiet=False) == "auto"
    assert read_progress(None, buildkit, quiet=True) == "quiet"
    with pytest.raises(InputError, match="--quiet and --progress plain can't be used together"):
        read_progress("plain", {}, quiet=True)
    with pytest.raises(InputError, match=r"BUILDKIT_PROGRESS: expected auto, plain, .* found 'fancy'"):
        read_progress(None, {"BUILDKIT_PROGRESS": "fancy"}, quiet=False)


EVIL = "a\x1b]0;title\x07\nb\x9b2J\u202ec" + "x" * 100_000


@pytest.mark.parametrize(
    "event",
    [
        BuildStarted(build_id="b1", tag=EVIL, steps=1, base="scratch", ca_provider=EVIL),
        PhaseStarted(phase=9, name=EVIL),
        TaskStarted(task=1, name=EVIL),
        StepStarted(step=1, total=1, instruction=EVIL, line=1),
        Notice(level="warning", message=EVIL),
        Notice(level="info", message=EVIL),
        PeerRefused(peer=EVIL, reason=EVIL, subject=EVIL, fingerprint_sha256=EVIL),
        ImageStored(tag=EVIL, path=EVIL, size=1, digest=EVIL, seconds=1),
    ],
    ids=lambda event: f"{event.type}",
)
def test_untrusted_text_comes_out_escaped_and_cut(event: Event) -> None:
    for mode in ("plain", "auto"):
        for terminal in (True, False):
            out, now = io.BytesIO(), [0.0]
            clock = partial(now.__getitem__, 0)
            live = TerminalRenderer(out, colours=False, clock=clock, tick=3600)
            plain = PlainRenderer(out, screen=SafeOutput() if terminal else None, clock=clock)
            renderer = live if mode == "auto" else plain
            renderer(event)
            now[0] = 5.0
            renderer(Notice(level="info", message="later"))
            live.draw()
            live.close()
            plain.close()
            text = re.sub(r"\r|\x1b\[(J|K|\d+A)", "", out.getvalue().decode())
            assert "\x1b" not in text
            assert all(line.isprintable() for line in text.split("\n"))
            assert len(text) < 20_000


def test_rawjson_is_ascii_on_a_terminal_and_survives_names_that_are_no_utf8() -> None:
    for terminal in (True, False):
        out = io.BytesIO()
        renderer = make_renderer("rawjson", Stream(out, terminal=terminal))
        renderer(Notice(level="info", message="\x9b2J\udcff"))
        renderer.close()
        renderer.abandon()
        assert json.loads(out.getvalue().splitlines()[1])["message"] == "\x9b2J\udcff"
        assert out.getvalue().isascii()


def test_output_on_a_plain_terminal_cannot_take_it_over() -> None:
    out = io.BytesIO()
    with closing(make_renderer("plain", Stream(out, terminal=True), environ={"TERM": "xterm"})) as renderer:
        renderer(RUN)
        renderer(output(b"\x1b[31mred\x1b[2Jx\x1b"))
        renderer(StepFinished(step=2, exit_code=0, seconds=1))
        renderer.abandon()
    assert out.getvalue() == b"[2/3] RUN make\n\x1b[31mred\\x1b[2Jx\\x1b\n[2/3] done in 1.0s\n"


def test_a_dumb_terminal_gets_no_colours_at_all() -> None:
    out = io.BytesIO()
    with closing(make_renderer("auto", Stream(out, terminal=True), environ={"TERM": "dumb"})) as renderer:
        renderer(output(b"\x1b[31mred\x1b[0m\n"))
    assert out.getvalue() == b"red\n"


def plain_with_clock() -> tuple[io.BytesIO, PlainRenderer, list[float]]:
    out, now = io.BytesIO(), [0.0]
    return out, PlainRenderer(out, clock=lambda: now[0]), now


def test_a_pipe_is_told_of_what_takes_more_than_a_second_while_it_lasts() -> None:
    out, renderer, now = plain_with_clock()
    with closing(renderer):
        renderer(PhaseStarted(phase=7, name="store the image"))
        renderer(TaskStarted(task=1, name="unpacking", total_bytes=2048))
        now[0] = 0.9
        time.sleep(0.5)
        assert out.getvalue() == b""
        now[0] = 1.0
        assert eventually(lambda: out.getvalue() == "unpacking (2.0 KiB) …\n".encode())
        renderer(TaskProgress(task=1, bytes=1024))
        renderer(TaskFinished(task=1, seconds=2.5))
        assert out.getvalue().endswith(b"\nunpacking: 2.5s, 2.0 KiB\n")
        renderer(TaskStarted(task=2, name="quick"))
        renderer(TaskProgress(task=7, bytes=1))
        renderer(TaskFinished(task=2, seconds=0.5))
        renderer(TaskFinished(task=2, seconds=9))
        assert b"quick" not in out.getvalue()
        now[0] = 5.0
        assert eventually(lambda: out.getvalue().endswith("storing the image …\n".encode()))


def test_a_pipe_is_told_how_long_a_phase_took() -> None:
    out, renderer, now = plain_with_clock()
    with closing(renderer):
        renderer(PhaseStarted(phase=6, name="run the steps"))
        now[0] = 3.0
        renderer(GuestConnected(peer="p", tls_version="TLSv1.3"))
    assert out.getvalue().endswith(b"waiting for the guest: 3.0s\n")


def test_times_of_a_clock_are_short() -> None:
    assert [human_time(n) for n in (-1, 0.9, 59.9, 65, 7205)] == ["0s", "0s", "59s", "1m05s", "2h00m"]


def test_work_is_told_from_begin_to_end_with_its_bytes() -> None:
    told: list[Event] = []
    counts = iter((5, 10))

    def measure() -> int:
        try:
            return next(counts)
        except StopIteration:
            raise FileNotFoundError from None

    tasks = Tasks(told.append)
    with tasks.task("writing", total=10, measure=measure):
        assert eventually(lambda: len(told) == 3)
    with pytest.raises(ValueError, match="it failed"), tasks.task("failing"):
        raise ValueError("it failed")
    kinds = [(type(event), getattr(event, "task", 0), getattr(event, "bytes", 0)) for event in told]
    assert kinds[:3] == [(TaskStarted, 1, 0), (TaskProgress, 1, 5), (TaskProgress, 1, 10)]
    assert kinds[3:] == [(TaskFinished, 1, 0), (TaskStarted, 2, 0), (TaskFinished, 2, 0)]


def test_a_receiver_that_fails_does_not_end_the_work_by_the_measuring_thread() -> None:
    failures = []

    def receive(event: Event) -> None:
        if isinstance(event, TaskProgress):
            failures.append(event)
            raise OSError("gone")

    with Tasks(receive).task("writing", measure=lambda: 1):
        assert eventually(lambda: len(failures) == 1)
        time.sleep(0.7)
    assert len(failures) == 1


def test_sizes_are_written_with_binary_units() -> None:
    assert [human_size(n) for n in (0, 1023, 1024, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def stage_step(step: int, stage: str, text: str) -> list[Event]:
    return [
        StepStarted(step=step, total=6, instruction=text, line=step, stage=stage),
        StepOutput(step=step, stream="stdout", data=f"{text} says this\n".encode()),
        StepFinished(step=step, exit_code=0, seconds=0.1),
    ]


def test_stages_side_by_side_are_shown_one_after_the_other() -> None:
    first, second, third = (
        StageStarted(stage=name, step=step) for name, step in (("a", 1), ("b", 3), ("c", 5))
    )
    a1, a2 = stage_step(1, "a", "FROM x"), stage_step(2, "a", "RUN one")
    b1, b2 = stage_step(3, "b", "FROM y"), stage_step(4, "b", "RUN two")
    c1, c2 = stage_step(5, "c", "FROM z"), stage_step(6, "c", "RUN three")
    b_ended, a_ended = StageFinished(stage="b", step=3), StageFinished(stage="a", step=1)
    events = [first, *a1, second, *b1, a2[0], *b2, b_ended, third, c1[0], a2[1], *c1[1:], a2[2], a_ended, *c2]
    expected = []
    for step, stage, text in (
        (1, "a", "FROM x"),
        (2, "a", "RUN one"),
        (3, "b", "FROM y"),
        (4, "b", "RUN two"),
        (5, "c", "FROM z"),
        (6, "c", "RUN three"),
    ):
        number = f"[{stage} {step}/6]"
        expected += [f"{number} {text}", f"{text} says this", f"{number} done in 0.1s"]
    assert shown(*events).splitlines() == expected


def test_a_stage_that_fails_out_of_its_turn_is_shown_with_what_it_wrote() -> None:
    b = [
        StepStarted(step=4, total=6, instruction="RUN two", line=4, stage="b"),
        StepOutput(step=4, stream="stderr", data=b"no such thing\n"),
        StepFinished(step=4, exit_code=7, seconds=0.1),
    ]
    failed = BuildFailed(exit_status=1, error="StepFailed", message="step 4", step=4, exit_code=7)
    started = [StageStarted(stage="a", step=1), StageStarted(stage="b", step=3)]
    text = shown(*started, *stage_step(1, "a", "FROM x")[:2], *b, failed)
    assert text.splitlines() == [
        "[a 1/6] FROM x",
        "FROM x says this",
        "[b 4/6] RUN two",
        "no such thing",
        "[b 4/6] failed after 0.1s, exit code 7",
    ]


def test_a_build_that_ends_for_another_reason_shows_what_all_stages_wrote() -> None:
    late = BuildFailed(exit_status=5, error="BuildTimeout", message="late")
    begun = [
        StageStarted(stage="a", step=1),
        StageStarted(stage="b", step=3),
        StageStarted(stage="c", step=5),
    ]
    text = shown(
        *begun,
        *(event for n, name in ((1, "a"), (4, "b"), (6, "c")) for event in stage_step(n, name, name)),
        late,
    )
    assert [line for line in text.splitlines() if "says" in line] == [
        "a says this",
        "b says this",
        "c says this",
    ]


def test_a_stage_that_waits_for_its_turn_keeps_its_output_outside_of_memory(tmp_path: Path) -> None:
    out = io.BytesIO()
    piece = b"x" * 79 + b"\n"
    many = StepOutput(step=4, stream="stdout", data=piece * 8192)
    words = [StepOutput(step=4, stream="stderr", data=data) for data in (b"error: one\n", b"error: two\n")]
    began = [StageStarted(stage="a", step=1), StageStarted(stage="b", step=3), *stage_step(4, "b", "RUN")[:1]]
    renderer = PlainRenderer(out, directory=tmp_path)
    tracemalloc.start()
    for event in (*began, words[0], *[many] * 16, *words):
        renderer(event)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 20
    assert list(tmp_path.iterdir()) == []
    with patch("os.pwrite", side_effect=OSError("disk full")):
        renderer(many)
    renderer(StageFinished(stage="a", step=1))
    renderer.close()
    assert out.getvalue() == b"[b 4/6] RUN\n" + b"".join(
        (words[0].data, many.data * 16, words[0].data, words[1].data, many.data)
    )


def test_a_word_about_the_output_of_a_step_waits_for_its_turn_with_it() -> None:
    began = [StageStarted(stage="a", step=1), StageStarted(stage="b", step=3), *stage_step(4, "b", "RUN")[:1]]
    left_out = Notice(level="warning", message="left out", step=4)
    assert shown(
        *began, left_out, *stage_step(1, "a", "FROM"), StageFinished(stage="a", step=1)
    ).splitlines() == [
        "[a 1/6] FROM",
        "FROM says this",
        "[a 1/6] done in 0.1s",
        "[b 4/6] RUN",
        "warning: left out",
    ]


def test_a_boot_is_shown_on_a_terminal_until_the_command_has_it() -> None:
    out, told = io.BytesIO(), list[Event]()
    with patch.dict("os.environ", {"TERM": "xterm"}):
        boot = Boot("starting a machine", Stream(out, terminal=True), told.append)
    with boot.tasks.task("pulling"):
        boot(Notice(level="warning", message="odd"))
        boot(Notice(level="info", message="certificate"))
    boot(RUN)
    before = out.getvalue()
    boot(output(b"hello\n"))
    boot.close()
    assert [event.type for event in told] == ["step-started", "step-output"]
    assert b"warning: odd" in before
    assert b"certificate" not in before
    assert out.getvalue() == before
    assert out.getvalue().endswith(b"\r\n")


def test_a_boot_beside_a_pipe_leaves_all_to_the_command() -> None:
    told: list[Event] = []
    for stream in (Stream(io.BytesIO(), terminal=False), None):
        with closing(Boot("starting a machine", stream, told.append)) as boot:
            boot(output(b"hello\n"))
    assert [event.type for event in told] == ["task-started", "step-output"] * 2
