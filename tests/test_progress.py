"""How a build looks to the person, or the program, that watches it."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path

from firebuild_bootstrap.events import (
    BuildStarted,
    Event,
    ImageStored,
    Notice,
    PeerRefused,
    PhaseStarted,
    StepFinished,
    StepOutput,
    StepStarted,
)
from firebuild_bootstrap.progress import (
    JsonRenderer,
    PlainRenderer,
    TerminalRenderer,
    human_size,
    make_renderer,
)

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
    first, binary, text = [json.loads(line) for line in out.getvalue().splitlines()]
    assert first["event"] == "step-started"
    assert first["instruction"] == "RUN make"
    assert binary["data_base64"] == "/wA="
    assert "data" not in binary
    assert text["data"] == "größe\n"


def test_auto_is_live_on_a_terminal_and_plain_in_a_pipe() -> None:
    live = make_renderer("auto", io.BytesIO(), terminal=True)
    live.close()
    assert isinstance(live, TerminalRenderer)
    assert not isinstance(make_renderer("auto", io.BytesIO(), terminal=False), TerminalRenderer)
    assert not isinstance(make_renderer("plain", io.BytesIO(), terminal=True), TerminalRenderer)
    assert isinstance(make_renderer("rawjson", io.BytesIO(), terminal=True), JsonRenderer)


def test_the_terminal_shows_a_running_clock_until_output_comes() -> None:
    out = io.BytesIO()
    renderer = TerminalRenderer(out)
    renderer(RUN)
    deadline = time.monotonic() + 10
    while b"s\x1b[0m" not in out.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"0s" in out.getvalue() or b"1s" in out.getvalue()
    renderer(output(b"hello\n"))
    renderer(StepFinished(step=2, exit_code=0, seconds=1.0))
    renderer.close()
    assert out.getvalue().endswith(b"\nhello\n\x1b[2m[2/3] done in 1.0s\x1b[0m\n")


def test_a_silent_step_stays_on_one_terminal_line() -> None:
    out = io.BytesIO()
    renderer = TerminalRenderer(out)
    renderer(RUN)
    renderer(StepFinished(step=2, exit_code=0, seconds=0.5))
    renderer(Notice(level="warning", message="careful"))
    renderer.close()
    last_lines = out.getvalue().decode().split("\n")
    assert last_lines[0].endswith("\x1b[1m[2/3] RUN make\x1b[0m \x1b[2m0.5s\x1b[0m")
    assert last_lines[1] == "\x1b[33mwarning: careful\x1b[0m"


def test_sizes_are_written_with_binary_units() -> None:
    assert [human_size(n) for n in (0, 1023, 1024, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_every_event_and_field_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs/events.md").read_text()
    for kind in Event.__subclasses__():
        _, found, section = text.partition(f"## `{kind.type}`\n")
        assert found, kind.type
        section = section.partition("\n## ")[0]
        fields = {entry.name for entry in dataclasses.fields(kind)} - {"time"}
        assert {name for name in fields if f"| `{name}` |" not in section} == set(), kind.type
