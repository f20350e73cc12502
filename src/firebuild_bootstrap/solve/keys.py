"""Keys: names of results that are known before anything runs.

The key of an operation is the SHA-256 of the key of what it runs on, its canonical form, the digests of its
inputs, and the platform. Two operations with one key have results that are as good as each other, whichever
Dockerfile they stand in. What counts is what BuildKit counts (solver/llbsolver/ops of moby/buildkit):

- of files: names, types, permission bits, contents and the texts of links; not times, owners, nor the paths
  by which they were named;
- of a secret or SSH agent: what the instruction says; never the secret;
- of a cache mount: its id, its target, and what it begins with; not what is in it;
- all variables that a RUN sees, those of ARG included, but for proxies that no ARG declares;
- of what an operation runs on: nothing for COPY --link, whose layer is made apart (`Parts.linked`).

Lines, comments, names and indices of stages do not, nor the keyword, but for this: ADD unpacks archives.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit

from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    ContextRef,
    Copy,
    Download,
    Files,
    GitTree,
    Graph,
    Heredoc,
    ImageRef,
    Operation,
    Run,
    Scratch,
    Stage,
    StageRef,
    Step,
    TreeRef,
    canonical,
)
from firebuild_bootstrap.dockerfile.operations import split_login
from firebuild_bootstrap.lowering import Place
from firebuild_pki.values import dataclass

_FORM: Final = "firebuild-3"
"""Has to change when the same operation comes to have another result."""

SCRATCH_KEY: Final = hashlib.sha256(f"{_FORM} scratch".encode()).hexdigest()
"""The key of the empty tree."""

# Members that are in no key: a digest of what they name is, or they change nothing of the result.
_OMITTED: Final[Mapping[type, frozenset[str]]] = {
    Run: frozenset({"proxies"}),
    Copy: frozenset({"keyword"}),
    Files: frozenset({"pattern", "tree"}),
    Download: frozenset({"url", "checksum"}),
    GitTree: frozenset({"url", "ref", "subdirectory", "keep_git_dir", "checksum"}),
    BindMount: frozenset({"tree", "source"}),
    CacheMount: frozenset({"sharing", "tree", "source", "read_only", "mode", "uid", "gid"}),
}


@dataclass(frozen=True)
class Input:
    """Something that an operation takes in besides the image that it changes.

    Args:
        digest: of what counts of it.
        name: what to call it when it is the reason why something is not cached; in no key.
        stage: key of the stage whose result it is a part of; empty for none. In no key, as `digest` has it.
        files: path and digest of each file, where they are known, to tell which one changed; in no key.
    """

    digest: str
    name: str = ""
    stage: str = ""
    files: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Parts:
    """All that a key is made of.

    Args:
        parent: key of what the operation runs on.
        operation: its canonical form.
        inputs: in the order of `inputs_of`.
        platform: such as `linux/amd64`.
        linked: its layer is made on the empty tree, and then lies on whatever comes before it.
    """

    parent: str
    operation: str
    inputs: tuple[Input, ...]
    platform: str
    linked: bool = False

    @cached_property
    def key(self) -> str:
        """The key, as 64 hexadecimal digits."""
        return _digest(
            "step", self.parent, self.operation, self.platform, *(one.digest for one in self.inputs)
        )

    def on(self, below: str) -> str:
        """Return the key of what there is afterwards where `below` is the key of what was there before."""
        return _digest("link", below, self.key) if self.linked else self.key


@dataclass(frozen=True)
class StageKeys:
    """The keys of a stage.

    Args:
        base: the key of what it starts from: a base, the empty tree, or an earlier stage.
        steps: of each step of it what its key is made of.
        chain: the same of all operations from the base to the last step, those of earlier stages included.
        key: of its result.
    """

    base: str
    steps: tuple[Parts, ...]
    chain: tuple[Parts, ...]
    key: str


class InputReader(Protocol):
    """Looks at what comes from outside. Each method raises InputError if it is not there."""

    def image(self, reference: str, platform: str) -> str:
        """Return the digest of an image or base."""
        ...

    def files(self, files: Files, copy: Copy) -> Input:
        """Return what `files` matches in a build context."""
        ...

    def bound(self, mount: BindMount) -> Input:
        """Return what a RUN sees of a build context."""
        ...

    def download(self, download: Download, place: Place) -> str:
        """Return the digest of what a URL without a checksum delivered to a step."""
        ...

    def commit(self, tree: GitTree, place: Place) -> str:
        """Return what tells the commit of which a step has the files of a git repository."""
        ...


def base_key(digest: str, platform: str) -> str:
    """Return the key of a base or image with that digest (`image.bases.Base.digest`)."""
    return _digest("base", digest, platform)


def operation_parts(parent: str, operation: Operation, inputs: Iterable[Input], platform: str) -> Parts:
    """Return what the key of an operation is made of; `inputs` are in the order of `inputs_of`."""
    linked = isinstance(operation, Copy) and operation.link
    if isinstance(operation, Copy):
        operation = _plain(operation)
    parent = SCRATCH_KEY if linked else parent
    return Parts(parent, canonical(operation, _OMITTED), tuple(inputs), platform, linked)


def _plain(copy: Copy) -> Copy:
    """Return a copy in the one form of all that say the same."""
    if copy.unpack is None and copy.keyword == "COPY":
        copy = replace(copy, unpack=False)  # which is what None means for it, and not for ADD
    if copy.chmod is not None and copy.chmod.isdecimal():
        copy = replace(copy, chmod=f"{int(copy.chmod, 8):o}")
    # `into` tells of a slash at the end.
    return replace(copy, destination=_clean(posixpath.join(copy.workdir, copy.destination)), workdir="/")


def inputs_of(operation: Operation) -> Iterator[Files | Download | GitTree | BindMount]:
    """Yield what has a digest of its own in the key of an operation, in order."""
    match operation:
        case Run(mounts=mounts):
            for mount in mounts:
                match mount:
                    case BindMount():
                        yield mount
                    case CacheMount(tree=tree) if not isinstance(tree, Scratch):
                        yield BindMount(mount.target, tree, mount.source)
        case Copy(sources=sources):
            yield from (source for source in sources if not isinstance(source, Heredoc))


def keys_of(graph: Graph, reader: InputReader) -> dict[int, StageKeys]:
    """Return the keys of all stages, by their indices.

    Nothing is looked at twice that two operations take from outside, if `reader` sees to it.

    Raises:
        InputError: something is not there.
    """
    return _Keys(reader).of(graph)


class _Keys:
    def __init__(self, reader: InputReader) -> None:
        self._reader = reader
        self._stages: dict[int, StageKeys] = {}

    def of(self, graph: Graph) -> dict[int, StageKeys]:
        for stage in graph.stages:
            self._stages[stage.index] = self._stage(stage)
        return self._stages

    def _stage(self, stage: Stage) -> StageKeys:
        base, _ = self._tree(stage.base, stage.platform)
        below = self._stages[stage.base.index].chain if isinstance(stage.base, StageRef) else ()
        parts: list[Parts] = []
        key = base
        for place, step in enumerate(stage.steps):
            inputs = self._inputs(step, stage.platform, (stage.index, place))
            parts.append(operation_parts(key, step.operation, inputs, stage.platform))
            key = parts[-1].on(key)
        return StageKeys(base, tuple(parts), (*below, *parts), key)

    def _tree(self, tree: TreeRef, platform: str) -> tuple[str, str]:
        """Return the key of a tree, and what to call it."""
        match tree:
            case StageRef(index):
                return self._stages[index].key, "stage"
            case ImageRef(reference):
                return base_key(self._reader.image(reference, platform), platform), reference
            case ContextRef(name):
                raise ValueError(f"the context {name!r} has no key")
            case Scratch():
                return SCRATCH_KEY, "scratch"

    def _inputs(self, step: Step, platform: str, place: Place) -> Iterator[Input]:
        for found in inputs_of(step.operation):
            match found:
                case Files(tree=ContextRef()) if isinstance(step.operation, Copy):
                    yield self._reader.files(found, step.operation)
                case BindMount(tree=ContextRef()):
                    yield self._reader.bound(found)
                case Files(path, tree) if isinstance(step.operation, Copy) and step.operation.parents:
                    yield self._inside(tree, path, platform)  # as it is written: what `/./` divides counts
                case Files(path, tree) | BindMount(tree=tree, source=path):
                    yield self._inside(tree, _clean(path), platform)
                case Download():
                    yield self._download(found, place)
                case GitTree():
                    yield _git(found, self._reader.commit(found, place))

    def _inside(self, tree: TreeRef, path: str, platform: str) -> Input:
        key, name = self._tree(tree, platform)
        stage = key if isinstance(tree, StageRef) else ""
        return Input(_digest("tree", key, path), f"{name} {path}", stage)

    def _download(self, download: Download, place: Place) -> Input:
        # The name decides what the file is called in a directory. The rest of the URL may be a password.
        name = posixpath.basename(unquote(urlsplit(download.url).path))
        checksum = download.checksum or self._reader.download(download, place)
        return Input(_digest("download", checksum.lower(), name), name or "the download")


def _git(tree: GitTree, commit: str) -> Input:
    # `.git` says from where they came: `config` the URL, `refs` the branch.
    kept = (split_login(tree.url)[0], tree.ref) if tree.keep_git_dir else ("",)
    digest = _digest("git", commit, _clean(tree.subdirectory), str(tree.keep_git_dir), *kept)
    return Input(digest, f"commit {commit[:12]}")


def _clean(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))  # two slashes at the beginning would stay (POSIX)


def _digest(*members: str) -> str:
    # As JSON, so that no two lists of members look the same. A surrogate stands for a byte that is not UTF-8.
    text = json.dumps([_FORM, *members], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
