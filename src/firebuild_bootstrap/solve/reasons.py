"""Why a step is not cached: what it was made of in the last build of the same Dockerfile, and what differs.

    <home>/cache/last/<Dockerfile>.json     the parts of each step's key
    <home>/cache/last/files/<digest>        paths and digests of the files that a COPY sent

It only explains: what can't be read or written is done without.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MALFORMED
from firebuild_bootstrap.image.content_store import forget_oldest, write_whole
from firebuild_bootstrap.matching import has_wildcard
from firebuild_bootstrap.solve.keys import Input, Parts
from firebuild_pki.display import one_line

_MAX_DOCKERFILES: Final = 100
_MAX_FILE_SETS: Final = 100
_MAX_FILES: Final = 50_000
_MAX_TEXT: Final = 200
_SHOWN: Final = 60

# What the members of an operation are in a Dockerfile.
_NAMES: Final = {
    "user": "USER",
    "workdir": "WORKDIR",
    "destination": "the destination",
    "path": "the path",
    "into": "a slash at the end of the destination",
    "network": "--network",
    "chown": "--chown",
    "chmod": "--chmod",
    "link": "--link",
    "parents": "--parents",
    "exclude": "--exclude",
    "unpack": "--unpack",
}
_VARIABLES: Final = {"args": "build argument", "env": "variable"}

_Step = dict[str, Any]


class LastBuild:
    """The parts of the keys of the last build of a Dockerfile, and those of this build for the next one.

    Args:
        home: the store.
        dockerfile: what tells this Dockerfile from others: its absolute path, or all of it.
    """

    def __init__(self, home: Path, dockerfile: str) -> None:
        self._root = home / "cache" / "last"
        self._path = (
            self._root / f"{hashlib.sha256(dockerfile.encode(errors='replace')).hexdigest()[:32]}.json"
        )
        self._before = self._load()
        self._now: dict[str, _Step] = {}
        self._files: dict[str, tuple[tuple[str, bytes], ...]] = {}

    def note(self, stage: str, number: int, parts: Parts) -> None:
        """Remember a step for the next build.

        Args:
            stage: the name of its stage, or its index.
            number: its place in the stage.
            parts: what its key is made of.
        """
        self._now[f"{stage} {number}"] = _plain(parts)
        self._files.update({each.digest: each.files for each in parts.inputs if each.files})

    def why(self, stage: str, number: int, parts: Parts, base: str) -> str:
        """Return why the first step of a stage that is not cached is not.

        Args:
            stage: the name of its stage, or its index.
            number: its place in the stage.
            parts: what its key is made of.
            base: what its stage starts from.
        """
        before = self._before.get(f"{stage} {number}")
        if before is None:
            return "never built before"
        try:
            return next(self._differences(before, parts, base if number == 0 else ""))
        except StopIteration:
            return "its result is not in the cache any more, or was never finished"
        except MALFORMED:  # not written by us
            return "what it was made of the last time is not known"

    def save(self) -> None:
        """Write what `note` was told, over what the last build left; steps of other stages stay."""
        try:
            now = {**self._before, **self._now}
            if now == self._before:
                self._path.touch()  # the least recently built Dockerfile is forgotten first
                return
            (self._root / "files").mkdir(mode=0o700, parents=True, exist_ok=True)
            for digest, files in self._files.items():
                path = self._root / "files" / digest
                if len(files) <= _MAX_FILES and not path.exists():
                    listing = [[name, content[:8].hex()] for name, content in files]
                    write_whole(path, json.dumps(listing).encode())
            write_whole(self._path, json.dumps(now).encode())
            forget_oldest(self._root, _MAX_DOCKERFILES)
            forget_oldest(self._root / "files", _MAX_FILE_SETS)
        except OSError:
            return

    def _load(self) -> dict[str, _Step]:
        try:
            document = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return document if isinstance(document, dict) else {}

    def _differences(self, before: _Step, parts: Parts, base: str) -> Iterator[str]:
        now = _plain(parts)
        if before["platform"] != now["platform"]:
            yield f"the platform was {_shown(before['platform'])} and is {now['platform']}"
        yield from _of_operations(before["operation"], now["operation"])
        for (digest, name), new in zip(before["inputs"], parts.inputs, strict=False):
            if digest != new.digest:
                yield self._of_files(digest, new) or f"{_shown(new.name or name)} changed"
        if before["parent"] != now["parent"]:
            yield f"base {_shown(base)} changed" if base else "what comes before it changed"

    def _of_files(self, digest: str, now: Input) -> str:
        """Return which files are others now, or an empty text if that is not known."""
        try:
            before = dict(json.loads((self._root / "files" / f"{int(digest, 16):064x}").read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return ""
        if not now.files:
            return ""
        after = {path: content[:8].hex() for path, content in now.files}
        changed = [path for path in after if path in before and after[path] != before[path]]
        new = [path for path in after if path not in before]
        gone = [path for path in before if path not in after]
        where = now.name if "" in after and not has_wildcard(now.name) else ""
        for paths, what in ((changed, "changed"), (new, "is new"), (gone, "is gone")):
            if paths:
                others = len(changed) + len(new) + len(gone) - 1
                more = f", and {others} more" if others else ""
                return f"{_shown(posixpath.normpath(posixpath.join(where, paths[0])))} {what}{more}"
        return ""


def _of_operations(before: _Step, now: _Step) -> Iterator[str]:
    if before["type"] != now["type"]:
        yield "another instruction was there"
        return
    if any(before.get(name) != now.get(name) for name in ("argv", "script")):
        yield "the command changed"
    for member, what in _VARIABLES.items():
        yield from _of_variables(what, before.get(member, {}), now.get(member, {}))
    for member, what in _NAMES.items():
        if before.get(member) != now.get(member):
            yield f"{what} was {_shown(before.get(member))} and is {_shown(now.get(member))}"
    for old, new in zip(before.get("sources", ()), now.get("sources", ()), strict=False):
        if old != new and old["type"] == new["type"] == "Heredoc":
            yield f"the heredoc {_shown(new['name'])} changed"
    for member, what in (("sources", "the sources"), ("mounts", "--mount")):
        if before.get(member) != now.get(member):
            yield f"{what} changed"


def _of_variables(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        match before.get(name), now.get(name):
            case None, new:
                yield f"{what} {_shown(name)} is new: {_shown(new)}"
            case old, None:
                yield f"{what} {_shown(name)} is gone; it was {_shown(old)}"
            case old, new if old != new:
                yield f"{what} {_shown(name)} was {_shown(old)} and is {_shown(new)}"


def _plain(parts: Parts) -> _Step:
    return {
        "platform": parts.platform,
        "parent": parts.parent,
        "operation": _short(json.loads(parts.operation)),
        "inputs": [[each.digest, each.name] for each in parts.inputs],
    }


def _short(value: Any) -> Any:
    """Return the same with digests in place of long texts."""
    match value:
        case dict():
            return {name: _short(member) for name, member in value.items()}
        case list():
            return [_short(member) for member in value]
        case str() if len(value) > _MAX_TEXT:
            return f"{value[:_SHOWN]}… ({hashlib.sha256(value.encode(errors='replace')).hexdigest()[:16]})"
    return value


def _shown(value: Any) -> str:
    match value:
        case None | "" | [] | False:
            return "not set"
        case True:
            return "set"
        case list():
            return one_line(", ".join(map(str, value)), _SHOWN)
    return one_line(str(value), _SHOWN)
