"""Dockerfiles by chance, with what they copy: every instruction, flag and form (`chance.yaml`).

Most of them build. What firebuild does otherwise on purpose (`disagreements.yaml`) is left out where the text
shows it.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any, Final

import yaml

from oracle.corpus import HERE, Case

_WORDS: Final[dict[str, list[str]]] = yaml.safe_load((HERE / "chance.yaml").read_text())
_LINKS: Final = {"lnk": ("a", "d/x", "d"), "dl": ("d", "d/e", "f", "./d")}
_IN_ARCHIVES: Final = {
    "p": "P",
    "q/": "",
    "q/r": {"content": "R", "owner": "3:4", "mode": "640"},
    "s": {"link": "q"},
}
_NAMED: Final = ("app", "staff")  # of --chown, which --link can't find


class _Chance:
    """The choices of one case."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._files: dict[str, Any] = {}
        self._stages: list[str] = []
        self._empty: set[str] = set()  # the stages that are based on nothing, where nothing can run

    def case(self, name: str) -> Case:
        """Return it."""
        self._fill()
        lines = [f"ARG A={self._word()}", "ARG B", "ARG BASE=busybox"][: self._random.randrange(4)]
        for number in range(self._random.choice((1, 1, 1, 2, 2, 3))):
            lines += self._stage(f"s{number}")
        return Case(
            area="chance",
            name=name,
            dockerfile="\n".join(lines) + "\n",
            files=self._files,
            args={"A": "argument"} if self._often(0.2) else {},
            target=self._random.choice(("", "", *self._stages)),
        )

    def _often(self, share: float) -> bool:
        return self._random.random() < share

    def _one(self, kind: str) -> str:
        return self._random.choice(_WORDS[kind])

    def _word(self) -> str:
        return (
            self._one("words") if self._often(0.5) else self._one("expansions").format(self._one("variables"))
        )

    # --- the build context ----------------------------------------------------------------------

    def _fill(self) -> None:
        for name in _WORDS["names"]:
            if self._often(0.6):
                self._files[name] = self._file(name)
        if self._often(0.4):
            form = self._random.choice(("tar", "bz2", "xz"))
            self._files[f"t.{form}"] = {"archive": _IN_ARCHIVES, "form": form}
        if self._often(0.3):
            lines = self._random.sample(_WORDS["ignored"], self._random.randrange(1, 5))
            self._files[".dockerignore"] = "\n".join(lines) + "\n"

    def _file(self, name: str) -> dict[str, Any]:
        if name in _LINKS:
            return {"link": self._random.choice(_LINKS[name])}
        members: dict[str, Any] = {} if name.endswith("/") else {"content": f"content of {name}\n"}
        if self._often(0.3):
            members["mode"] = self._one("modes_of_files")
        if self._often(0.2):
            members["owner"] = self._one("owners_of_files")
        return members

    # --- the Dockerfile -------------------------------------------------------------------------

    def _stage(self, name: str) -> list[str]:
        bases = ("busybox", "busybox", "configured", "plain", "scratch", "${BASE:-busybox}", *self._stages)
        base = self._random.choice(bases)
        if base in {"scratch", *self._empty}:
            self._empty.add(name)
        lines = [f"FROM {base} AS {name}", "ARG U1=app"]
        if self._often(0.5):
            lines.append("ENV A=/a/b/a EMPTY=")
        for _ in range(self._random.randrange(1, 7)):
            line = self._instruction()
            if name not in self._empty or not line.startswith("RUN"):
                lines.append(line)
        self._stages.append(name)
        return lines

    def _instruction(self) -> str:
        share = self._random.random()
        if share < 0.45:
            return self._copy()
        if share < 0.65:
            return self._run()
        line = self._one("metadata")
        return line.format(*(self._word() for _ in range(line.count("{}"))))

    def _copy(self) -> str:
        keyword = self._random.choice(("COPY", "COPY", "COPY", "ADD"))
        if self._often(0.08):
            mark = self._random.choice(("E", "'E'"))
            return f"{keyword} <<{mark} /texts/\nline $A ${{B:-x}}\n\ttab\\$A\nE"
        flags = [
            f"--{flag}={self._one(kind)}"
            for flag, kind in (("chown", "owners"), ("chmod", "modes"))
            if self._often(0.4)
        ]
        if self._often(0.15):
            flags.append(f"--exclude={self._one('excluded')}")
        if self._often(0.15) and not any(name in flag for flag in flags for name in _NAMED):
            flags.append("--link")
        if keyword == "COPY" and self._stages and self._often(0.35):
            flags.append(f"--from={self._random.choice(self._stages)}")
            sources = [self._one("sources_in_stages") for _ in range(self._random.choice((1, 1, 2)))]
        else:
            if keyword == "COPY" and self._often(0.15):
                flags.append("--parents")
            sources = [self._source() for _ in range(self._random.choice((1, 1, 1, 2, 3)))]
        destination = self._one("destinations")
        if len(sources) > 1 or any(sign in sources[0] for sign in "*?["):
            destination = destination.rstrip("/") + "/"
        words = [*sources, destination]
        self._random.shuffle(flags)
        return " ".join([keyword, *flags, *([json.dumps(words)] if self._often(0.1) else words)])

    def _source(self) -> str:
        there = [name for name in self._files if name != ".dockerignore"]
        return self._random.choice(there) if there and self._often(0.6) else self._one("sources")

    def _run(self) -> str:
        command, mount = self._one("commands"), ""
        if self._often(0.25):
            mount = f"--mount={self._one('mounts')} ".format(self._random.choice(["busybox", *self._stages]))
        share = self._random.random()
        if share < 0.1:
            return f"RUN {mount}{json.dumps(['sh', '-c', command])}"
        if share < 0.2:
            return f"RUN {mount}<<E\n{command}\necho $A '$B' >/tmp/here\nE"
        if share < 0.3:
            command = command.replace(" && ", " && \\\n  # a comment\n  ")
        return f"RUN {mount}{command}"


def by_chance(seed: int) -> Case:
    """Return the case of a seed, the same each time."""
    return _Chance(seed).case(f"chance-{seed}")
