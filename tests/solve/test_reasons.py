"""Why a step is not cached."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from firebuild_bootstrap.dockerfile.graph import (
    Copy,
    Files,
    Heredoc,
    Network,
    Operation,
    Run,
    TmpfsMount,
    Workdir,
)
from firebuild_bootstrap.solve import reasons as module
from firebuild_bootstrap.solve.keys import Input, Parts, operation_parts
from firebuild_bootstrap.solve.reasons import LastBuild

RUN = Run(argv=("make",), args={"VERSION": "1"}, env={"A": "x"})
COPY = Copy(sources=(Files("src"), Heredoc("EOF", "text")), destination="/app")


def files(name: str, **contents: str) -> Input:
    """What a directory holds; `_` stands for `/` and `__` for the directory itself."""
    listed = {path.replace("__", "").replace("_", "/"): text for path, text in contents.items()}
    pairs = tuple((path, hashlib.sha256(text.encode()).digest()) for path, text in listed.items())
    return Input(hashlib.sha256(repr(pairs).encode()).hexdigest(), name, files=pairs)


def parts(operation: Operation, *inputs: Input, parent: str = "base", platform: str = "linux/amd64") -> Parts:
    return operation_parts(parent, operation, inputs, platform)


def why(home: Path, before: Parts, now: Parts, number: int = 1) -> str:
    last = LastBuild(home, "/src/Dockerfile")
    last.note("build", number, before)
    last.save()
    return LastBuild(home, "/src/Dockerfile").why("build", number, now, "debian:12")


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (RUN, "its result is not in the cache any more, or was never finished"),
        (replace(RUN, argv=("make", "all")), "the command changed"),
        (replace(RUN, script="make"), "the command changed"),
        (replace(RUN, args={"VERSION": "2"}), "build argument VERSION was 1 and is 2"),
        (replace(RUN, args={}), "build argument VERSION is gone; it was 1"),
        (replace(RUN, args={"B": "\x1b[1m" * 50, "VERSION": "1"}), "build argument B is new: "),
        (replace(RUN, env={"A": ""}), "variable A was x and is not set"),
        (replace(RUN, user="1:1"), "USER was 0:0 and is 1:1"),
        (replace(RUN, workdir="/w"), "WORKDIR was / and is /w"),
        (replace(RUN, network=Network.NONE), "--network was default and is none"),
        (replace(RUN, mounts=(TmpfsMount("/t"),)), "--mount changed"),
        (COPY, "another instruction was there"),
    ],
)
def test_the_first_difference_of_a_run_is_told(tmp_path: Path, now: Operation, reason: str) -> None:
    told = why(tmp_path, parts(RUN), parts(now))
    assert told.startswith(reason)
    assert "\x1b" not in told
    assert len(told) < 200


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (replace(COPY, destination="/srv"), "the destination was /app and is /srv"),
        (replace(COPY, chown="me"), "--chown was not set and is me"),
        (replace(COPY, link=True), "--link was not set and is set"),
        (replace(COPY, exclude=("*.o", "*.a")), "--exclude was not set and is *.o, *.a"),
        (replace(COPY, sources=(Files("src"), Heredoc("EOF", "t" * 5000))), "the heredoc EOF changed"),
        (replace(COPY, sources=(Files("src"),)), "the sources changed"),
    ],
)
def test_the_first_difference_of_a_copy_is_told(tmp_path: Path, now: Operation, reason: str) -> None:
    assert why(tmp_path, parts(COPY, files("src", __="")), parts(now, files("src", __=""))) == reason


BEFORE = files("src", __="", main="1", lib_a="1", lib_b="1")


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (files("src", __="", main="2", lib_a="1", lib_b="1"), "src/main changed"),
        (files("./src/", __="", main="1", lib_a="2", lib_b="1", new="1"), "src/lib/a changed, and 1 more"),
        (files("src", __="", main="1", lib_a="1", lib_b="1", lib_c="1"), "src/lib/c is new"),
        (files("src", __="", lib_a="1", lib_b="1"), "src/main is gone"),
        (files("s*", __="", main="2", lib_a="1", lib_b="1"), "main changed"),
        (files("src", __="0", main="1", lib_a="1", lib_b="1"), "src changed"),
        (Input("f" * 64, "src"), "src changed"),
    ],
)
def test_the_first_file_that_differs_is_told(tmp_path: Path, now: Input, reason: str) -> None:
    assert why(tmp_path, parts(COPY, BEFORE), parts(COPY, now)) == reason


def test_an_input_without_a_list_of_files_is_told_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (parts(COPY, Input(digit * 64, "stage /out")) for digit in "12")
    assert why(tmp_path, one, two) == "stage /out changed"
    monkeypatch.setattr(module, "_MAX_FILES", 1)
    changed = files("src", __="", main="2")
    assert why(tmp_path, parts(COPY, BEFORE), parts(COPY, changed)) == "src changed"
    listed = tmp_path / "cache" / "last" / "files"
    assert not list(listed.iterdir())
    for damaged in ("{", "[1]", "[[1]]"):
        (listed / BEFORE.digest).write_text(damaged)
        assert (
            LastBuild(tmp_path, "/src/Dockerfile").why("build", 1, parts(COPY, changed), "") == "src changed"
        )


def test_a_base_a_platform_and_what_comes_before_are_told(tmp_path: Path) -> None:
    assert why(tmp_path, parts(RUN), parts(RUN, parent="other"), 0) == "base debian:12 changed"
    assert why(tmp_path, parts(RUN), parts(RUN, parent="other")) == "what comes before it changed"
    arm = parts(RUN, platform="linux/arm64")
    assert why(tmp_path, parts(RUN), arm) == "the platform was linux/amd64 and is linux/arm64"


def test_a_step_that_no_build_had_was_never_built(tmp_path: Path) -> None:
    why(tmp_path, parts(RUN), parts(RUN))
    last = LastBuild(tmp_path, "/src/Dockerfile")
    assert last.why("build", 2, parts(RUN), "") == "never built before"
    assert LastBuild(tmp_path, "/other/Dockerfile").why("build", 1, parts(RUN), "") == "never built before"
    last.note("test", 0, parts(Workdir(path="/w")))
    last.save()
    again = LastBuild(tmp_path, "/src/Dockerfile")
    assert "not in the cache" in again.why("build", 1, parts(RUN), ""), "stages that were not built stay"


def test_what_can_not_be_read_or_written_is_done_without(tmp_path: Path) -> None:
    why(tmp_path, parts(RUN), parts(RUN))
    (path,) = (tmp_path / "cache" / "last").glob("*.json")
    for damaged, told in (("{", "never"), ("[]", "never"), (json.dumps({"build 1": {}}), "is not known")):
        path.write_text(damaged)
        assert told in LastBuild(tmp_path, "/src/Dockerfile").why("build", 1, parts(RUN), "")
    path.unlink()
    path.mkdir()
    last = LastBuild(tmp_path, "/src/Dockerfile")
    last.note("build", 1, parts(RUN))
    last.save()
    assert list((tmp_path / "cache" / "last").glob("*.json*")) == [path]


def test_only_so_many_dockerfiles_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_DOCKERFILES", 2)
    for number in range(4):
        last = LastBuild(tmp_path, f"/{number}")
        last.note("0", 0, parts(RUN))
        last.save()
    assert len(list((tmp_path / "cache" / "last").glob("*.json"))) == 2
    assert LastBuild(tmp_path, "/3").why("0", 0, parts(RUN), "") != "never built before"


def test_a_build_that_is_like_the_last_one_writes_nothing(tmp_path: Path) -> None:
    why(tmp_path, parts(RUN), parts(RUN))
    [file] = (tmp_path / "cache/last").glob("*.json")
    before = file.stat()
    why(tmp_path, parts(RUN), parts(RUN))
    assert file.stat().st_ino == before.st_ino
    assert file.stat().st_mtime_ns > before.st_mtime_ns, "it is not the next to be forgotten"
    why(tmp_path, parts(RUN), parts(RUN), number=2)
    assert file.stat().st_ino != before.st_ino
