"""What a Dockerfile says to do, as values: no file is opened for them, and none is a message of the wire.

A graph is the same for the same text, arguments and base configurations, on every machine. `canonical` gives
the form of an operation that cache keys are made of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_pki.values import dataclass

# --- trees that files come from -----------------------------------------------------------------


@dataclass(frozen=True)
class ContextRef:
    """A build context: the main one, or with a `name` that of `--build-context NAME=…`."""

    name: str = ""


@dataclass(frozen=True)
class StageRef:
    """The result of an earlier stage of the same Dockerfile, by its index."""

    index: int


@dataclass(frozen=True)
class ImageRef:
    """An image by its reference, as it is written, for the platform of the build."""

    reference: str


@dataclass(frozen=True)
class Scratch:
    """The empty tree."""


TreeRef = ContextRef | StageRef | ImageRef | Scratch

# --- what a COPY or ADD sends --------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """What a path or pattern matches in a tree; relative to its root, links resolved inside it."""

    pattern: str
    tree: TreeRef = ContextRef()


@dataclass(frozen=True)
class Heredoc:
    """A file whose content stands in the Dockerfile, variables expanded."""

    name: str
    content: str


@dataclass(frozen=True)
class Download:
    """What a URL delivers; `checksum` is `ALGORITHM:hex` or empty."""

    url: str = field(repr=False)  # it may hold a login
    checksum: str = ""


@dataclass(frozen=True)
class GitTree:
    """A directory of a git repository.

    Args:
        url: what `git fetch` takes.
        ref: branch, tag or commit; empty for the default branch.
        subdirectory: in the repository; empty for all of it.
        keep_git_dir: with its `.git`.
        checksum: the commit that `ref` has to be, or the beginning of its name; empty for any.
        submodules: with what its submodules hold.
    """

    url: str = field(repr=False)  # it may hold a login
    ref: str = ""
    subdirectory: str = ""
    keep_git_dir: bool = False
    checksum: str = ""
    submodules: bool = True


FileSet = Files | Heredoc | Download | GitTree

# --- what a RUN has besides the image ------------------------------------------------------------


class Sharing(StrEnum):
    """How builds that run at the same time share a cache mount."""

    SHARED = "shared"
    PRIVATE = "private"
    LOCKED = "locked"


@dataclass(frozen=True)
class BindMount:
    """A directory or file of a tree; what is written to it (if `writable`) is thrown away."""

    target: str
    tree: TreeRef = ContextRef()
    source: str = "/"
    writable: bool = False


@dataclass(frozen=True)
class CacheMount:
    """A directory that outlives the build; where it is new, it begins as `source` of `tree`."""

    target: str
    id: str
    sharing: Sharing = Sharing.SHARED
    tree: TreeRef = Scratch()
    source: str = "/"
    read_only: bool = False
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class TmpfsMount:
    """An empty directory in memory; `size` in bytes, 0 for no limit of its own."""

    target: str
    size: int = 0


@dataclass(frozen=True)
class SecretMount:
    """A secret of the user as a file at `target`, in the variable `env`, or both; empty for none of it.

    A secret that is not given is an error if `required`, else nothing is there.
    """

    id: str
    target: str = ""
    env: str = ""
    required: bool = False
    mode: int = 0o400
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class SshMount:
    """A socket of an SSH agent of the user, at `target`; SSH_AUTH_SOCK names the first."""

    id: str = "default"
    target: str = ""
    required: bool = False
    mode: int = 0o600
    uid: int = 0
    gid: int = 0


Mount = BindMount | CacheMount | TmpfsMount | SecretMount | SshMount


class Network(StrEnum):
    """What a RUN reaches."""

    DEFAULT = "default"
    NONE = "none"
    HOST = "host"


# --- operations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where an operation stands in the Dockerfile: its place, and its text on one line.

    Args:
        location: for an ONBUILD trigger of a base that of FROM.
        text: without the bodies of heredocs.
        base: the image or stage whose ONBUILD trigger it is; empty if it is not one.
    """

    location: Location
    text: str
    base: str = ""

    def trigger_error(self, error: InputError) -> InputError:
        """Return what is wrong with the operation as an error that says so if it is a trigger."""
        if not self.base:
            return error
        message = f"in the ONBUILD trigger {self.text!r:.120} of {self.base}: {error.message}"
        return InputError(message, hint=error.hint, location=self.location)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Execute `argv`, or the file `script` where that is not None, as `user` in `workdir`.

    `env` holds variables of ENV, `args` those of ARG; where both name one, `env` wins. `proxies` holds build
    arguments that every RUN sees without an ARG: how it gets at the network, not what it finds there.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, str] = field(default_factory=dict)
    proxies: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    script: str | None = None
    mounts: tuple[Mount, ...] = ()
    network: Network = Network.DEFAULT


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Put files into the image.

    Args:
        sources: in the order in which they are written.
        destination: as it is written, relative to `workdir` if it is relative.
        into: the destination is a directory even where nothing is there yet (it ends in `/` or `.`).
        chown: `user[:group]` by name or number; None for 0:0, or what an archive says.
        chmod: octal or symbolic; None for that of the files.
        link: its layer is made on the empty tree, and then lies on what is there, unseen: links in the
            destination are replaced, and its directories created afresh. The destination is absolute then.
        parents: the directories of a source's path are made below the destination.
        exclude: patterns of what is left out, relative to the root of the sources.
        unpack: archives are sent as their members; None for the rule of the instruction: ADD does that with
            those of a context, not with downloads, and COPY with none.
        keyword: ADD or COPY, for messages.
    """

    sources: tuple[FileSet, ...]
    destination: str
    workdir: str = "/"
    into: bool = False
    chown: str | None = None
    chmod: str | None = None
    link: bool = False
    parents: bool = False
    exclude: tuple[str, ...] = ()
    unpack: bool | None = None
    keyword: str = "COPY"


@dataclass(frozen=True, kw_only=True)
class Workdir:
    """Make the directory `path` if it is not there; it belongs to `user` then."""

    path: str
    user: str = "0:0"


Operation = Run | Copy | Workdir


@dataclass(frozen=True)
class Step:
    """An operation and where it stands; its origin is beside it, because no cache key may depend on it."""

    operation: Operation
    origin: Origin


# --- the graph -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnostic:
    """Something in the Dockerfile that is probably not meant, but does not end the build.

    Args:
        location: where.
        message: what, and what to do.
        rule: the name of the lint rule, as BuildKit calls it, where it has one.
    """

    location: Location
    message: str
    rule: str = ""

    def __str__(self) -> str:
        """Render as `file:line: rule: message`."""
        return ": ".join(filter(None, (str(self.location), self.rule, self.message)))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Args:
        index: its place among the FROMs of the Dockerfile, from 0.
        name: what AS calls it, in lower case; empty without one.
        base: what it starts from; one that starts from a context begins with a COPY of it into nothing.
        origin: its FROM, with the name of the base as it is after expansion.
        platform: `linux/amd64`; that of its base and of what runs in it.
        steps: in order.
        instructions: all after its FROM, in order: the text of each, and whether it is a step.
        config: of the image that it is.
    """

    index: int
    name: str = ""
    base: TreeRef
    origin: Origin
    platform: str
    steps: tuple[Step, ...] = ()
    instructions: tuple[tuple[str, bool], ...] = ()
    config: ImageConfig = field(default_factory=ImageConfig)

    @property
    def title(self) -> str:
        """What to call it: its name, or its index."""
        return self.name or str(self.index)

    def trees(self) -> Iterator[TreeRef]:
        """Yield every tree that it needs, its base first; some more than once."""
        yield self.base
        for step in self.steps:
            yield from trees_of(step.operation)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What a build has to do.

    Args:
        stages: those that the target needs, itself last; a stage comes after all that it refers to.
        warnings: of build checks and others.
        unused_contexts: names of named contexts that nothing of it takes anything from.
    """

    stages: tuple[Stage, ...]
    warnings: tuple[Diagnostic, ...] = ()
    unused_contexts: tuple[str, ...] = ()

    @property
    def target(self) -> Stage:
        """The stage that becomes the image."""
        return self.stages[-1]

    def stage(self, index: int) -> Stage:
        """Return the stage with that index in the Dockerfile."""
        return next(stage for stage in self.stages if stage.index == index)

    def chain(self, stage: Stage) -> tuple[Stage, ...]:
        """Return a stage, and before it those that it lies on, the lowest first."""
        found = [stage]
        while isinstance(base := found[-1].base, StageRef):
            found.append(self.stage(base.index))
        return tuple(reversed(found))

    def bottom(self, stage: Stage) -> TreeRef:
        """Return what the first of the stages below a stage starts from, or it itself."""
        return self.chain(stage)[0].base


def trees_of(operation: Operation) -> Iterator[TreeRef]:
    """Yield every tree that an operation takes files from."""
    match operation:
        case Run(mounts=mounts):
            yield from (mount.tree for mount in mounts if isinstance(mount, BindMount | CacheMount))
        case Copy(sources=sources):
            yield from (source.tree for source in sources if isinstance(source, Files))
        case Workdir():
            pass


def canonical(value: Any, omitted: Mapping[type, frozenset[str]] = MappingProxyType({})) -> str:
    """Return the one form of an operation, mount or file set.

    It is JSON with sorted keys, where the type of a value is its member `type`.

    Args:
        value: made of the types of this module.
        omitted: members to leave out, by the type of their value; cache keys leave some out.
    """
    return json.dumps(_plain(value, omitted), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _plain(value: Any, omitted: Mapping[type, frozenset[str]]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        without = omitted.get(type(value), frozenset())
        names = (each.name for each in dataclasses.fields(value) if each.name not in without)
        members = {name: _plain(getattr(value, name), omitted) for name in names}
        return {"type": type(value).__name__, **members}
    if isinstance(value, Mapping):
        return {str(name): _plain(member, omitted) for name, member in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(member, omitted) for member in value]
    return value
