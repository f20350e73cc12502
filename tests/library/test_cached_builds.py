"""What earlier builds have done is not done again, and is what it would be if it were."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from cli.library import Library
from firebuild_bootstrap.errors import MachineError, StepFailed
from firebuild_bootstrap.events import Event, PhaseStarted, StepCached, StepStarted
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputType
from firebuild_bootstrap.image.store import StoredImage
from firebuild_bootstrap.solve.results import Making

pytestmark = pytest.mark.needs("userns")

TWO_STAGES = """
FROM host AS tools
COPY source /source
RUN cp /source /made && rm /bin/ls
FROM host
COPY --from=tools /made /made
ARG VERSION=1
RUN echo $VERSION > /version
"""


@pytest.fixture
def cached(own_library: Library) -> Library:
    """Builds that use the cache of a store of their own."""
    return own_library


def build(
    library: Library, text: str = TWO_STAGES, **options: object
) -> tuple[StoredImage, list[int], list[int]]:
    """Build, and return the image, the steps that were executed, and those that were not."""
    library.events.clear()
    image = library.build(text, **{"no_cache": False, **options})
    executed = [event.step for event in library.of(StepStarted)]
    return image, executed, [event.step for event in library.of(StepCached)]


def content(image: StoredImage, name: str) -> str:
    path = image.output(OutputType.TAR)
    assert path is not None
    with tarfile.open(path) as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read().decode().strip()


@pytest.mark.parametrize("last", ["", "RUN echo 2 > /after\n", "COPY --from=tools /made /after\n"])
def test_a_step_whose_pattern_finds_nothing_in_a_stage_takes_nothing_from_the_others(
    cached: Library, last: str
) -> None:
    text = (
        "FROM host AS tools\nRUN echo 2 > /made\n"
        "FROM host\nRUN echo 1 > /before\nCOPY --from=tools /nothing* /x/\n" + last
    )
    image, executed, _ = build(cached, text)
    assert content(image, "before") == "1"
    if last:
        assert content(image, "after") == "2"
    again, executed, _ = build(cached, text)
    assert (executed, content(again, "before")) == ([], "1")


def test_an_image_is_never_made_without_a_layer_that_did_not_come_back(
    cached: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Making.commit

    def forgetful(self: Making, number: int, directory: Path) -> Path | None:
        return commit(self, number, directory) if number == 2 else None

    monkeypatch.setattr(Making, "commit", forgetful)
    with pytest.raises(MachineError, match="1 layers of the stage 0 did not come back"):
        build(cached, "FROM host\nRUN echo 1 > /one\nRUN echo 2 > /two\n")


def test_a_build_that_is_cached_whole_starts_nothing_and_is_the_same(cached: Library) -> None:
    first, executed, _ = build(cached)
    assert executed == [1, 2, 3, 4, 5, 6]
    again, executed, found = build(cached)
    assert (executed, found) == ([], [2, 3, 5, 6])
    assert [event.phase for event in cached.of(PhaseStarted)] == [1, 7]
    assert again.record.outputs == first.record.outputs
    assert again.record.config == first.record.config
    # Another form of the same image needs no machine either.
    (cached.context / "source").touch()
    image, executed, _ = build(cached, outputs=["dir"])
    assert executed == []
    directory = image.output(OutputType.DIR)
    assert directory is not None
    assert (directory / "made").read_text() == "one"


def test_what_has_changed_is_executed_and_what_comes_before_it_is_not(cached: Library) -> None:
    build(cached)
    image, executed, found = build(cached, build_args={"VERSION": "2"}, explain_cache=True)
    assert (executed, found) == ([4, 6], [2, 3, 5])
    assert content(image, "version") == "2"
    told = [event.message for event in cached.notices() if event.message.startswith("not cached")]
    assert told == ["not cached: RUN echo $VERSION > /version: build argument VERSION was 1 and is 2"]
    status = (cached.context / "source").stat()
    (cached.context / "source").write_text("two")
    os.utime(
        cached.context / "source", ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # its size is the same, too
    image, executed, found = build(cached)
    assert (executed, found) == ([1, 2, 3, 4, 5, 6], [])
    assert content(image, "made") == "two"
    (cached.context / "source").write_text("one")
    assert build(cached)[1] == []


def test_the_steps_before_one_that_fails_are_kept(cached: Library) -> None:
    text = "FROM host\nRUN echo first > /first\nRUN test -n '' || exit 7\n"
    with pytest.raises(StepFailed):
        build(cached, text)
    image, executed, found = build(cached, text.replace("exit 7", "true"))
    assert (executed, found) == ([1, 3], [2])
    assert content(image, "first") == "first"


def test_what_is_asked_for_is_executed_anew_with_all_that_is_made_of_it(cached: Library) -> None:
    build(cached)
    _, executed, found = build(cached, no_cache_stages=frozenset({"tools"}))
    assert (executed, found) == ([1, 2, 3, 4, 5, 6], [])
    _, executed, found = build(cached, no_cache_stages=frozenset({"1"}))
    assert (executed, found) == ([4, 5, 6], [2, 3])
    assert build(cached, no_cache=True)[1] == [1, 2, 3, 4, 5, 6]
    assert build(cached)[1] == []


def test_a_file_that_changes_while_it_is_sent_is_not_cached(cached: Library) -> None:
    def change(event: Event) -> None:
        if isinstance(event, StepStarted) and event.step == 2:
            (cached.context / "source").write_text("new")

    cached.watch = change
    text = "FROM scratch\nCOPY source /source\n"
    build(cached, text)
    assert any("changed while they were sent: not cached" in event.message for event in cached.notices())
    cached.watch = lambda _: None
    image, executed, _ = build(cached, text)
    assert executed == [1, 2]
    assert content(image, "source") == "new"


def test_what_another_stage_takes_of_a_file_that_changed_is_not_cached_either(cached: Library) -> None:
    def change(event: Event) -> None:
        if isinstance(event, StepStarted) and event.step == 2:
            (cached.context / "source").write_text("new")

    cached.watch = change
    text = "FROM scratch AS sent\nCOPY source /source\nFROM scratch\nCOPY --from=sent /source /taken\n"
    (cached.context / "source").write_text("old")
    build(cached, text)
    cached.watch = lambda _: None
    (cached.context / "source").write_text("old")
    image, executed, _ = build(cached, text)
    assert (content(image, "taken"), executed) == ("old", [1, 2, 3, 4])


def test_a_stage_of_the_cache_can_be_built_on_and_copied_from(cached: Library) -> None:
    build(cached, target="tools")
    image, executed, found = build(
        cached, TWO_STAGES.replace("FROM host\nCOPY", "FROM tools\nRUN test ! -e /bin/ls\nCOPY")
    )
    assert (executed, found) == ([4, 5, 6, 7], [2, 3])
    assert content(image, "made") == "one"
    path = image.output(OutputType.TAR)
    assert path is not None
    with tarfile.open(path) as tar:
        assert "bin/ls" not in {name.removeprefix("./").removeprefix("usr/") for name in tar.getnames()}


def test_an_image_that_would_be_the_same_is_left_as_it_is(cached: Library, tmp_path: Path) -> None:
    first, _, _ = build(cached)
    path = first.output(OutputType.TAR)
    assert path is not None
    original = path.read_bytes()
    again, _, _ = build(cached, outputs=[f"tar,dest={tmp_path}/delivered.tar"])
    assert again.directory == first.directory
    assert (tmp_path / "delivered.tar").read_bytes() == original
    # Another configuration, name or form is another image, and so is a file that somebody has written to.
    assert build(cached, TWO_STAGES + "LABEL a=b\n")[0].record.config.labels == {"a": "b"}
    second, _, _ = build(cached)
    assert second.directory != first.directory
    assert build(cached, also_tagged=(Reference.parse("other:1"),))[0].directory != second.directory
    third, _, _ = build(cached)
    touched = third.output(OutputType.TAR)
    assert touched is not None
    with open(touched, "r+b") as file:
        file.write(b"booted")
    fourth, _, _ = build(cached)
    path = fourth.output(OutputType.TAR)
    assert path is not None
    assert path.read_bytes() == original
    (fourth.directory / "image.json").write_text("{")
    assert build(cached)[0].record.config == first.record.config


LINKED = """
FROM host AS tools
RUN echo tool > /tool
FROM host
ARG VERSION=1
RUN mkdir -p /opt && echo $VERSION > /opt/version && chmod 700 /opt
COPY --link --chown=7:8 source /opt/app/
COPY --link --from=tools /tool /opt/
RUN cat /opt/version /opt/app/source /opt/tool > /all
COPY --link source /last
"""


@pytest.mark.needs("ids")
def test_copies_with_link_are_not_made_again_when_something_before_them_changes(cached: Library) -> None:
    image, executed, done = build(cached, LINKED)
    assert executed == [1, 2, 3, 4, 5, 6, 7, 8]
    assert content(image, "all") == "1\nonetool"
    again, executed, done = build(cached, LINKED, build_args={"VERSION": "2"})
    # The stage of the tool is not needed either.
    assert (executed, done) == ([3, 4, 7], [2, 5, 6, 8])
    assert content(again, "all") == "2\nonetool"
    assert mode(again, "opt") == 0o755
    assert build(cached, LINKED, build_args={"VERSION": "2"})[1:] == ([], [2, 4, 5, 6, 7, 8])
    # Every key leads to what lies on one another: the first build is still there, too.
    first, executed, _ = build(cached, LINKED)
    assert executed == []
    assert content(first, "all") == "1\nonetool"
    lines = LINKED.splitlines(keepends=True)
    on_nothing, executed, _ = build(cached, "".join((*lines[:3], "FROM scratch\n", *lines[6:8])))
    assert executed == []
    assert content(on_nothing, "opt/app/source") == "one"
    (cached.context / "source").write_text("two")
    changed, executed, done = build(cached, LINKED)
    assert (executed, done) == ([3, 5, 7, 8], [2, 4, 6])
    assert content(changed, "all") == "1\ntwotool"
    # A source that is made anew is another one, whatever it holds.
    _, executed, done = build(cached, LINKED, no_cache_stages=frozenset({"tools"}))
    assert (executed, done) == ([1, 2, 3, 6, 7], [4, 5, 8])


def mode(image: StoredImage, name: str) -> int:
    path = image.output(OutputType.TAR)
    assert path is not None
    with tarfile.open(path) as tar:
        return tar.getmember(name).mode
