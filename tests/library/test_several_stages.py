"""Dockerfiles of several stages: what each takes from the others, and what goes wrong in them."""

from __future__ import annotations

import os
import re
import stat
import tarfile
from pathlib import Path

import pytest

from cli.library import Library
from firebuild_bootstrap.errors import InputError, StepFailed
from firebuild_bootstrap.events import BuildStarted, StageFinished, StageStarted, StepStarted
from firebuild_bootstrap.image.outputs import OutputType

pytestmark = pytest.mark.needs("userns")

SEVERAL = r"""
ARG FROM_OUTSIDE=outer
FROM host AS tools
ENV KEPT=yes
WORKDIR /out
RUN printf tool > tool && chmod 4755 tool && ln tool same && ln -s tool link
RUN mkdir deep && printf x > deep/x

FROM tools AS Extended
ARG FROM_OUTSIDE
RUN printf "$KEPT $FROM_OUTSIDE" > both

FROM host AS unused
RUN exit 9

FROM scratch
COPY --from=0 /out/tool /bin/tool
COPY --from=extended /out /all
COPY --from=tools --chown=3:4 /out/deep /deep/
COPY --from=host /bin/sh /from-an-image
COPY --from=1 /out/bot[h] /out/n*n /matched/
LABEL of=the-last
"""


def members(library: Library, image_path: Path | None) -> dict[str, tarfile.TarInfo]:
    assert image_path is not None
    with tarfile.open(image_path) as tar:
        return {member.name.rstrip("/"): member for member in tar}


@pytest.mark.needs("ids")
def test_a_stage_takes_files_from_stages_and_images(library: Library) -> None:
    image = library.build(SEVERAL)
    path = image.output(OutputType.TAR)
    found = members(library, path)
    assert path is not None
    with tarfile.open(path) as tar:
        both = tar.extractfile("all/both")
        assert both is not None
        assert both.read() == b"yes outer"
    assert found["bin/tool"].mode == 0o4755
    assert {"all/tool", "all/same", "all/link", "all/deep/x", "all/both", "matched/both"} <= found.keys()
    assert found["all/link"].linkname == "tool"
    assert (found["deep/x"].uid, found["deep/x"].gid) == (3, 4)
    assert found["from-an-image"].isreg()
    assert not any(name.startswith("out") for name in found)
    assert image.record.config.labels == {"of": "the-last"}
    assert image.record.base == "scratch"

    (started,) = library.of(BuildStarted)
    steps = library.of(StepStarted)
    assert [step.step for step in steps if step.instruction.startswith("FROM")] == [1, 5, 7]
    assert {step.total for step in steps} == {started.steps} == {12}
    assert {step.stage for step in steps} == {"tools", "extended", "3"}
    assert [event.stage for event in library.of(StageStarted)] == ["tools", "extended", "3"]
    assert [event.stage for event in library.of(StageFinished)] == ["tools", "extended", "3"]


def test_the_target_is_built_with_what_it_needs_and_nothing_else(library: Library) -> None:
    image = library.build(SEVERAL, target="extended")
    assert image.record.config.env["KEPT"] == "yes"
    assert image.record.base == "host"
    assert [event.stage for event in library.of(StageStarted)] == ["tools", "extended"]


def test_a_stage_without_steps_is_what_it_is_based_on_and_needs_no_machine(library: Library) -> None:
    text = """
FROM scratch AS made
WORKDIR /x
FROM made AS named
ENV A=b
FROM named AS again
FROM scratch AS last
COPY --from=again /x /y
WORKDIR /{}
FROM last
LABEL of=the-last
"""
    image = library.build(text.format("z"))
    assert {"x", "y", "z"} & members(library, image.output(OutputType.TAR)).keys() == {"y", "z"}
    assert image.record.config.labels == {"of": "the-last"}
    assert [event.stage for event in library.of(StageStarted)] == ["made", "last"]
    library.build(text.format("other"), no_cache=False)
    assert [event.stage for event in library.of(StageStarted)][2:] == ["last"]
    assert library.build(text, target="again", no_cache=False).record.config.env["A"] == "b"
    library.build(text.format("other"), no_cache=False, no_cache_stages=frozenset({"made"}))
    assert [event.stage for event in library.of(StageStarted)][3:] == ["made", "last"]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/bin/ech", "in '(usr/)?bin' there is: echo.*"),
        ("/bing", "in '.' there is: bin.*"),
        ("/bind/missing/x", "in 'bind' there is: a"),
        ("/bind/a/x", "in 'bind' there is: a"),
        ("/bind/b*/../c/d*", "in 'bind' there is: a"),
    ],
)
def test_a_file_that_a_stage_does_not_have_is_an_error_at_its_line_that_names_what_is_there(
    library: Library, path: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        library.build(
            f"FROM host AS one\nRUN mkdir /bind; >/bind/a\nFROM scratch\nCOPY --from=one {path} /x\n"
        )
    assert caught.value.message == f"{path!r} is not in the stage 'one'"
    assert caught.value.hint is not None
    assert re.fullmatch(hint, caught.value.hint)
    assert caught.value.location is not None
    assert caught.value.location.line == 4


def test_a_failing_stage_ends_the_others_and_is_the_one_that_is_told_of(
    library: Library, tmp_path: Path
) -> None:
    text = """
FROM host AS fails
RUN echo to the one who looks; exit 3
FROM host AS endless
RUN while :; do sleep 1; done
FROM scratch
COPY --from=fails /a /a
COPY --from=endless /b /b
"""
    with pytest.raises(StepFailed) as caught:
        library.build(text, keep_failed=tmp_path / "kept")
    assert caught.value.exit_code == 3
    assert "to the one who looks" in caught.value.message
    assert caught.value.location is not None
    assert caught.value.location.line == 3
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name.endswith("-fails")
    assert {"rootfs.tar", "failure.json"} <= set(os.listdir(kept))
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
