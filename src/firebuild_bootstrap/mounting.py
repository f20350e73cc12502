"""From the mounts of a RUN to what the wire carries: mounts of the protocol, and what they ask for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from firebuild_bootstrap import wire
from firebuild_bootstrap.context import FileTree, Resource
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    Files,
    Graph,
    ImageRef,
    Mount,
    Run,
    Scratch,
    SecretMount,
    SshMount,
    StageRef,
    TmpfsMount,
    TreeRef,
    canonical,
)
from firebuild_bootstrap.errors import InputError, Location, Problems
from firebuild_bootstrap.matching import has_wildcard
from firebuild_bootstrap.secret import Secret, SecretResource, missing

Trees = Callable[[TreeRef], FileTree]
"""Returns the files of a tree."""
_MODE = 0o7777


@dataclass(frozen=True)
class LoweredMounts:
    """The mounts of a RUN for its command.

    Args:
        mounts: of the command.
        resources: what they ask for, by name.
        env: variables that the command has besides: those of secrets that are not given are empty, as in
            BuildKit.
    """

    mounts: tuple[wire.Mount, ...] = ()
    resources: Mapping[str, Resource] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def lower_mounts(
    run: Run,
    number: int,
    trees: Trees,
    secrets: Mapping[str, Secret],
    *,
    identity: Callable[[TreeRef], str] = canonical,
    location: Location | None = None,
) -> LoweredMounts:
    """Turn the mounts of a RUN into those of its command.

    Args:
        run: the RUN.
        number: of its step.
        trees: opens what binds and caches take files from.
        secrets: what the user has given, by id.
        identity: names what a tree holds; a cache that begins with other files is another one.
        location: of the RUN, for errors.

    Raises:
        InputError: a source does not exist, a required secret is not given, or an SSH agent is required.
    """
    lowering = _Lowering(run, number, trees, secrets, identity, location)
    mounts = tuple(
        lowered
        for place, mount in enumerate(run.mounts, 1)
        if (lowered := lowering.one(mount, f"step-{number}-mount-{place}")) is not None
    )
    return LoweredMounts(mounts, lowering.resources, lowering.env)


def check_mounts(graph: Graph, trees: Trees, secrets: Mapping[str, Secret]) -> None:
    """Make sure of all mounts that do not need a stage to be finished.

    Args:
        graph: what there is to do.
        trees: opens build contexts.
        secrets: what the user has given, by id.

    Raises:
        InputError: what `lower_mounts` would raise; all of them.
    """
    problems = Problems()
    for step in (step for stage in graph.stages for step in stage.steps):
        if isinstance(run := step.operation, Run):
            known = tuple(mount for mount in run.mounts if not _is_from_elsewhere(mount))
            with problems.collected():
                lower_mounts(replace(run, mounts=known), 0, trees, secrets, location=step.origin.location)
    problems.raise_all()


def has_caches(graph: Graph) -> bool:
    """Tell whether a RUN has a cache mount."""
    steps = (step.operation for stage in graph.stages for step in stage.steps)
    return any(isinstance(mount, CacheMount) for run in steps if isinstance(run, Run) for mount in run.mounts)


def _is_from_elsewhere(mount: Mount) -> bool:
    return isinstance(mount, BindMount | CacheMount) and isinstance(mount.tree, ImageRef | StageRef)


@dataclass
class _Lowering:
    run: Run
    number: int
    trees: Trees
    secrets: Mapping[str, Secret]
    identity: Callable[[TreeRef], str]
    location: Location | None
    resources: dict[str, Resource] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def one(self, mount: Mount, name: str) -> wire.Mount | None:
        """Lower a mount, whose resource is called `name`; None for one without an effect."""
        if mount.target:
            try:
                wire.mount_target(self.run.workdir, mount.target)
            except wire.WireError as error:
                raise InputError(f"RUN --mount: {error}", location=self.location) from error
        match mount:
            case BindMount(target, tree, source, writable):
                self._send(name, tree, source)
                return wire.BindMount(target=target, resource=name, writable=writable)
            case CacheMount():
                return self._cache(mount, name)
            case TmpfsMount(target, size):
                return wire.TmpfsMount(target=target, size=size)
            case SecretMount():
                return self._secret(mount, name)
            case SshMount(required=required):
                if required:
                    raise InputError(
                        "RUN --mount=type=ssh is not supported yet: no SSH agent can be forwarded",
                        hint="clone into the build context before, or pass a key as a secret",
                        location=self.location,
                    )
                return None  # as BuildKit does where no agent is given

    def _send(self, name: str, tree: TreeRef, source: str) -> None:
        files = self.trees(tree)
        found = files.resource((Files(literal(source), tree),), location=self.location)
        if not found.groups:
            raise InputError(f"{source!r} is not in {files.label}", location=self.location)
        self.resources[name] = found

    def _cache(self, mount: CacheMount, name: str) -> wire.CacheMount:
        identifier = mount.id
        if isinstance(mount.tree, Scratch):
            name = ""
        else:
            identifier += f":{self.identity(mount.tree)}:{mount.source}"
            self._send(name, mount.tree, mount.source)
        return wire.CacheMount(
            target=mount.target,
            id=identifier,
            sharing=mount.sharing.value,
            resource=name,
            read_only=mount.read_only,
            mode=mount.mode & _MODE,
            uid=mount.uid,
            gid=mount.gid,
        )

    def _secret(self, mount: SecretMount, name: str) -> wire.SecretMount | None:
        secret = self.secrets.get(mount.id)
        if secret is None:
            if mount.required:
                raise missing(mount.id, self.location)
            if mount.env:
                self.env[mount.env] = ""
            return None
        self.resources[name] = SecretResource(mount.id, secret)
        return wire.SecretMount(
            resource=name,
            target=mount.target,
            env=mount.env,
            mode=mount.mode & _MODE,
            uid=mount.uid,
            gid=mount.gid,
        )


def literal(path: str) -> str:
    """Return the pattern that matches a path as it stands: the source of a mount is no pattern."""
    parts = path.split("/")
    first = next((index for index, part in enumerate(parts) if has_wildcard(part)), len(parts))
    return "/".join([*parts[:first], *(re.sub(r"([*?\[\\])", r"\\\1", part) for part in parts[first:])])
