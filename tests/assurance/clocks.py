"""Clocks that jump: that of this host; a sandbox keeps the kernel's, so that the two ends disagree then."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from assurance.commands import Ended, Place
from assurance.trials import Effort, trial
from components import FAKETIME

JUMPS: Final = {"an hour": 3600, "a day": 86_400, "a year": 366 * 86_400}
DATES: Final = ("certificate", "valid", "clock", "expire", "time")


class Clock:
    """The wall clock of commands; their monotonic clock goes on.

    Args:
        file: says how far it is off, in seconds.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)
        self.environ = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: int) -> None:
        """Set it ahead, or back."""
        fresh = self._file.with_suffix(".fresh")
        fresh.write_text(f"{seconds:+d}")
        fresh.rename(self._file)


class Jumps:
    """Commands of one store, and what has to be there after each.

    Args:
        effort: counts them.
    """

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self._place = place = Place(effort.directory)
        self._clock = Clock(effort.directory / "clock")
        steps = "RUN sleep 0.3; echo 1 > /one"
        file, context = (
            place.dockerfile("Dockerfile", steps, "RUN sleep 0.3; echo 2 > /two"),
            str(place.context),
        )
        build = ("build", "-q", "-f", file, context)
        run = ("run", "--machine", "local")
        identity = ("--identity", "web.example", "--identity-ttl", "2s")
        out = str(effort.directory / "issued")
        self.works: dict[str, tuple[str, ...]] = {
            "build": (*build, "--no-cache"),
            "cached build": build,
            "run with an identity": (*run, *identity, "app:1", "/bin/sh", "-c", "sleep 3; cat /two"),
            "run": (*run, "app:1", "/bin/cat", "/two"),
            "cache prune": ("cache", "prune"),
            "cache prune --older-than": ("cache", "prune", "--older-than", "100000h"),
            "images prune": ("images", "prune"),
            "images list": ("images", "list"),
            "ca issue": ("ca", "issue", "--server", "b1", "--guest", "b1", "--out", out),
            "ca check": ("ca", "check"),
            "store check": ("store", "check"),
        }
        place.run(*build, "-t", "app:1")
        place.run(*self.works["run with an identity"])
        self._ca = self._kept()

    def _kept(self) -> bytes:
        return (self._place.home / "identities/ca.pem").read_bytes()

    def jump(self, name: str, far: str, way: int) -> None:
        """Run a command whose clock jumps, at its start or in the midst."""
        moment = self._effort.chance.choice([0, self._effort.chance.random() * 3])
        subprocess.run(["rm", "-rf", self._effort.directory / "issued"], check=True)
        self._clock.jump(0 if moment else way * JUMPS[far])
        started = self._place.start(*self.works[name], environ=self._clock.environ)
        if moment:
            with suppress(subprocess.TimeoutExpired):
                started.process.wait(moment)
            self._clock.jump(way * JUMPS[far])
        how = self._judge(name, started.end())
        self._clock.jump(0)
        self._effort.counts[f"{name}, {far} {'ahead' if way > 0 else 'back'}: {how}"] += 1
        self._nothing_is_lost()

    def _judge(self, name: str, ended: Ended) -> str:
        if name == "ca check" and ended.status:  # its table says which row failed
            assert "not ready" in ended.out, str(ended)
            return "failed in words"
        ended.in_words()
        if ended.status == 0:
            assert not name.startswith("run") or ended.out == "2\n", str(ended)
            return "succeeded"
        assert any(word in ended.err for word in DATES), str(ended)
        assert name not in ("images list", "store check", "cached build", "cache prune", "images prune"), str(
            ended
        )
        return "failed in words"

    def _nothing_is_lost(self) -> None:
        """With the clock as it should be, all is there, and works."""
        if self._kept() != self._ca:  # a clock that is ahead makes one, and the former comes back
            self._place.run(*self.works["run with an identity"])
        assert self._kept() == self._ca, "the CA of identities is another one"
        self._place.run("images", "inspect", "app:1")
        self._place.sound()
        assert self._place.run("run", "--machine", "local", "app:1", "/bin/cat", "/two") == "2\n"


@trial(
    "clocks",
    "commands of this host whose clock is, or jumps, an hour, a day or a year ahead or back",
    seconds=300,
    in_suite=False,  # the library that moves the clock makes system calls fail now and then (EINVAL)
    needs=("busybox", "userns", "faketime"),
)
def clocks(effort: Effort) -> None:
    """Have the clock jump in all commands in turn."""
    jumps = Jumps(effort)
    while effort.goes_on():
        for name in effort.shuffled(jumps.works):
            far, way = effort.chance.choice(list(JUMPS)), effort.chance.choice([1, -1])
            effort.attempt(f"jump in {name}", partial(jumps.jump, name, far, way))
