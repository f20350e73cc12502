"""Builds at once."""

from __future__ import annotations

import json
import signal
import tarfile
from pathlib import Path

from assurance.commands import Place, Started
from assurance.trials import Effort, trial


class Round:
    """Builds of one store that run at the same time.

    Args:
        place: with the store.
        effort: counts them.
        number: of this round; no other has the same steps.
        each: how many builds of each of the three kinds.
    """

    def __init__(self, place: Place, effort: Effort, number: int, each: int) -> None:
        self._place = place
        self._effort = effort
        self._args = ("--build-arg", f"ROUND={number}")
        self._each = range(each)

    def _build(self, file: str, tag: str, who: int) -> Started:
        path, context = self._place.context / file, str(self._place.context)
        who_arg = ("--build-arg", f"WHO={who}")
        return self._place.start("build", "-q", "-f", str(path), "-t", tag, *self._args, *who_arg, context)

    def run(self) -> None:
        """Start all, cancel some, and look at what is there at the end."""
        same = [self._build("Same", f"same-{who}:1", 0) for who in self._each]
        one = [self._build("Who", "one:1", who) for who in self._each]
        other = [self._build("Who", f"other-{who}:1", who + 100) for who in self._each]
        cancelled = [build for build in other if self._effort.chance.random() < 0.5]
        for build in cancelled:
            self._cancel(build)
        ended = {build: build.end() for build in (*same, *one, *other)}
        for build in (*same, *one, *other):
            if build in cancelled:
                assert ended[build].status in (0, 130, -signal.SIGKILL), str(ended[build])
                assert "Traceback" not in ended[build].err, str(ended[build])
            else:
                assert ended[build].in_words().status == 0, str(ended[build])
        self._same({ended[build].out.strip() for build in same})
        self._whole("one:1", set(self._each))
        for who, build in enumerate(other):
            if ended[build].status == 0:
                self._whole(f"other-{who}:1", {who + 100})
        self._place.sound()
        self._effort.counts["build at the same time as others"] += len(ended) - len(cancelled)
        self._effort.counts["build cancelled beside others"] += len(cancelled)

    def _cancel(self, build: Started) -> None:
        try:
            build.process.wait(self._effort.chance.random() * 3)
        except Exception:
            number = self._effort.chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
            build.interrupt(number)

    def _same(self, ids: set[str]) -> None:
        """What several made of one Dockerfile is equal, and the next finds all of it."""
        assert len(ids) == 1, ids
        path = str(self._place.context / "Same")
        words = ("build", "-f", path, "--progress", "rawjson", *self._args, "--build-arg", "WHO=0")
        events = [json.loads(line) for line in self._place.run(*words, str(self._place.context)).splitlines()]
        assert [event for event in events if event["event"] == "session-started"] == [], events
        cached = sum(event["event"] == "step-cached" for event in events)
        assert cached == 5, events

    def _whole(self, tag: str, expected: set[int]) -> None:
        """The files, the configuration and the provenance of an image are those of one build."""
        archive = Path(self._place.directory / "out.tar")
        self._place.run("images", "export", tag, "-o", f"tar,dest={archive}")
        with tarfile.open(archive) as tar:
            file = tar.extractfile("who")
            assert file is not None
            who = int(file.read())
        archive.unlink()
        assert who in expected, (tag, who)
        assert f'"who": "{who}"' in self._place.run("images", "inspect", tag), (tag, who)
        stated = self._place.run("images", "provenance", tag)
        assert f'"WHO": "{who}"' in json.dumps(json.loads(stated)), (tag, who, stated)


@trial(
    "builds-at-once",
    "12 builds of one store at once: four of one Dockerfile, four to one tag, some cancelled",
    seconds=300,
    needs=("busybox", "userns"),
)
def builds(effort: Effort) -> None:
    """Run rounds of twelve builds; of six, where there is little time."""
    place = Place(effort.directory)
    place.dockerfile("Same", "ARG ROUND WHO", "RUN echo $ROUND > /round", "RUN sleep 0.2; echo 2 > /two")
    place.dockerfile("Who", "ARG ROUND WHO", "LABEL who=$WHO", "RUN sleep 0.1; echo $WHO > /who")
    # What all begin with is there: of what is made at once, keys lead to one chain only.
    place.run("build", "-q", "-f", place.dockerfile("Tools"), str(place.context))
    number = 0
    while effort.goes_on():
        number += 1
        effort.attempt("round", Round(place, effort, number, 4 if effort.seconds >= 60 else 2).run)
