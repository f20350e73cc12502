"""From a stage to what its guest executes: steps of the wire with their mounts, and the files for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import field, replace
from types import MappingProxyType
from typing import Final

from firebuild_bootstrap import wire
from firebuild_bootstrap.context import FileTree, Resource
from firebuild_bootstrap.context.entries import ContextResource
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    ContextRef,
    Copy,
    Diagnostic,
    Files,
    Graph,
    ImageRef,
    Mount,
    Run,
    Scratch,
    SecretMount,
    SshMount,
    Stage,
    StageRef,
    Step,
    TmpfsMount,
    TreeRef,
    Workdir,
    canonical,
    trees_of,
)
from firebuild_bootstrap.dockerfile.operations import several_sources
from firebuild_bootstrap.errors import InputError, InputErrors, Location
from firebuild_bootstrap.matching import has_wildcard
from firebuild_bootstrap.request import (
    Secret,
    SecretResource,
    agent_option,
    missing_agent,
    missing_secret,
    secret_option,
)
from firebuild_bootstrap.wire import MAX_MESSAGE_BYTES, AnyCommand, CopyCommand, RunCommand, WorkdirCommand
from firebuild_pki.values import dataclass

Trees = Callable[[TreeRef], FileTree]
"""Returns the files of a tree."""
Beginning = Callable[[CacheMount], str]
"""Names the files that a cache mount with `from` begins with; one that begins with others is another."""
_MODE = 0o7777


@dataclass(frozen=True)
class WireStep:
    """Something the guest executes.

    Args:
        number: of the step; FROM has the one before the first.
        line: where its instruction starts; for an ONBUILD trigger of the base, the line of FROM.
        instruction: as written, on one line; bodies of heredocs are left out.
        command: for the guest.
        resources: what it asks for, by name.
        absent: as of `LoweredMounts`.
    """

    number: int
    line: int
    instruction: str
    command: AnyCommand
    resources: Mapping[str, Resource] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoweredMounts:
    """The mounts of a RUN for its command.

    Args:
        mounts: of the command.
        resources: what they ask for, by name.
        env: variables that the command has besides: those of secrets that are not given are empty, and
            SSH_AUTH_SOCK names the first ssh mount even if there is no agent, as in BuildKit.
        absent: how to give the secrets and agents that it would take and the user has not given.
    """

    mounts: tuple[wire.Mount, ...] = ()
    resources: Mapping[str, Resource] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


Place = tuple[int, int]
"""Of a step: the index of its stage, and which one it is there."""
Sent = Mapping[Place, ContextResource]
"""What COPY and ADD send."""
_NOTHING: Final[Sent] = MappingProxyType({})
_NO_RESOURCES: Final[Mapping[str, Resource]] = MappingProxyType({})
_NO_MOUNTS: Final = LoweredMounts()
_NO_SECRETS: Final[Mapping[str, Secret]] = MappingProxyType({})


def outside(graph: Graph, trees: Trees, *, check: bool = True) -> tuple[Graph, Sent, tuple[Diagnostic, ...]]:
    """Find what is sent of all that is there before anything runs; remote files are downloaded.

    Args:
        graph: what there is to do.
        trees: opens build contexts.
        check: look at all files, so that what can't be sent is found before anything starts.

    Returns:
        the graph without the steps that copy nothing (BuildKit makes no destination for them either, unless
        they keep --parents), what its other steps send, and where patterns matched nothing.

    Raises:
        InputError: a source can't be found, read or downloaded; all of them.
    """
    sent: dict[tuple[int, int], ContextResource] = {}
    empty: list[Diagnostic] = []
    errors = InputErrors()
    stages: list[Stage] = []
    for stage in graph.stages:
        steps: list[Step] = []
        kept: list[bool] = []
        for step in stage.steps:
            copy = step.operation
            kept.append(True)
            if isinstance(copy, Copy) and isinstance(_tree(copy), ContextRef):
                with errors.collected():
                    found = _resource(step, copy, trees, check=check)
                    if not found.groups:
                        empty.append(_nothing_matches(step, copy, "nothing is copied"))
                        kept[-1] = False
                        continue
                    if copy.parents and not any(entry.path for entry in found.entries()):
                        empty.append(_nothing_matches(step, copy, "only the destination is made"))
                    sent[stage.index, len(steps)] = found
            steps.append(step)
        left = iter(kept)
        instructions = tuple((text, is_step and next(left)) for text, is_step in stage.instructions)
        stages.append(replace(stage, steps=tuple(steps), instructions=instructions))
    errors.raise_all()
    return replace(graph, stages=tuple(stages)), sent, tuple(empty)


def _nothing_matches(step: Step, copy: Copy, therefore: str) -> Diagnostic:
    patterns = ", ".join(repr(one.pattern) for one in copy.sources if isinstance(one, Files))
    return Diagnostic(step.origin.location, f"nothing matches {patterns:.300}, so {therefore}")


def _as_written(mount: CacheMount) -> str:
    return f"{canonical(mount.tree)}:{mount.source}"


def lower(
    stage: Stage,
    trees: Trees,
    sent: Sent = _NOTHING,
    *,
    first: int = 2,
    done: Collection[int] = (),
    secrets: Mapping[str, Secret] = _NO_SECRETS,
    agents: Collection[str] = (),
    beginning: Beginning = _as_written,
) -> tuple[WireStep, ...]:
    """Turn a stage into what its guest executes.

    Args:
        stage: of a graph.
        trees: opens what files are taken from.
        sent: what was found before.
        first: the number of its first step.
        done: places of the steps that need not be executed.
        secrets: what the user has given, by id.
        agents: ids of the SSH agents that the user has given.
        beginning: of its cache mounts.

    Raises:
        InputError: a source can't be found or read, or a required secret or agent is not given; all of them.
    """
    steps: list[WireStep] = []
    errors = InputErrors()
    for place, step in enumerate(stage.steps):
        number, location = first + place, step.origin.location
        if place in done:
            continue
        with errors.collected():
            match step.operation:
                case Copy() as copy:
                    # Patterns may find nothing in a stage: it is a step all the same, with an empty layer.
                    resource = sent.get((stage.index, place)) or _resource(step, copy, trees)
                    steps.append(_lowered(step, number, {f"step-{number}": resource}))
                case Run() as run:
                    mounts = lower_mounts(
                        run, number, trees, secrets, agents=agents, beginning=beginning, location=location
                    )
                    steps.append(_lowered(step, number, mounts.resources, mounts))
                case Workdir():
                    steps.append(_lowered(step, number))
    errors.raise_all()
    return tuple(steps)


def _lowered(
    step: Step,
    number: int,
    resources: Mapping[str, Resource] = _NO_RESOURCES,
    mounts: LoweredMounts = _NO_MOUNTS,
) -> WireStep:
    # Guests dispatch by the keyword in upper case.
    keyword, space, operands = step.origin.text.partition(" ")
    original = f"{keyword.upper()}{space}{operands.strip()}"
    command: AnyCommand
    match step.operation:
        case Run() as run:
            command = RunCommand(
                step=number,
                original=original,
                workdir=run.workdir,
                user=run.user,
                argv=run.argv,
                env={**run.env, **mounts.env},
                args={**run.proxies, **run.args},
                script=run.script,
                mounts=mounts.mounts,
                network=run.network.value,
            )
        case Workdir(path=path, user=user):
            command = WorkdirCommand(step=number, original=original, workdir=path, user=user)
        case Copy() as copy:
            command = CopyCommand(
                step=number,
                original=original,
                workdir=copy.workdir,
                source=f"step-{number}",
                target=copy.destination,
                target_is_directory=copy.into,
                chown=copy.chown,
                chmod=copy.chmod,
                link=copy.link,
            )
    return WireStep(number, step.origin.location.line, step.origin.text, command, resources, mounts.absent)


def _tree(copy: Copy) -> TreeRef:
    """Return the tree of all sources: --from is for all of an instruction."""
    return next(iter(trees_of(copy)), ContextRef())


def _resource(step: Step, copy: Copy, trees: Trees, *, check: bool = True) -> ContextResource:
    try:
        return _found(step, copy, trees, check=check)
    except InputError as error:
        raise step.origin.trigger_error(error) from error


def _found(step: Step, copy: Copy, trees: Trees, *, check: bool) -> ContextResource:
    location = step.origin.location
    unpack = None if copy.unpack is None and copy.keyword == "ADD" else bool(copy.unpack)
    resource = trees(_tree(copy)).resource(
        copy.sources,
        exclude=copy.exclude,
        parents=copy.parents,
        unpack=unpack,
        check=check,
        location=location,
    )
    if not copy.into and not copy.parents and len(resource.groups) > 1:
        raise several_sources(copy.keyword, copy.destination, location)
    return resource


def lower_mounts(
    run: Run,
    number: int,
    trees: Trees,
    secrets: Mapping[str, Secret],
    *,
    agents: Collection[str] = (),
    beginning: Beginning = _as_written,
    location: Location | None = None,
) -> LoweredMounts:
    """Turn the mounts of a RUN into those of its command.

    Args:
        run: the RUN.
        number: of its step.
        trees: opens what binds and caches take files from.
        secrets: what the user has given, by id.
        agents: ids of the SSH agents that the user has given.
        beginning: of its cache mounts.
        location: of the RUN, for errors.

    Raises:
        InputError: a source does not exist, or a required secret or agent is not given.
    """
    lowering = _Lowering(run, number, trees, secrets, agents, beginning, location)
    mounts = tuple(
        lowered
        for place, mount in enumerate(run.mounts, 1)
        if (lowered := lowering.one(mount, f"step-{number}-mount-{place}")) is not None
    )
    return LoweredMounts(mounts, lowering.resources, lowering.env, tuple(lowering.absent))


def check_runs(
    graph: Graph, trees: Trees, secrets: Mapping[str, Secret], agents: Collection[str] = ()
) -> None:
    """Make sure of all that a RUN needs and that no stage has to be finished for; of secrets see `prepare`.

    Args:
        graph: what there is to do.
        trees: opens build contexts.
        secrets: what the user has given, by id.
        agents: ids of the SSH agents that the user has given.

    Raises:
        InputError: what `lower_mounts` would raise, or one is longer than a message can be; all of them.
    """
    errors = InputErrors()
    for step in (step for stage in graph.stages for step in stage.steps):
        if isinstance(run := step.operation, Run):
            with errors.collected():
                _check_size(step, run)
            known = tuple(
                mount
                for mount in run.mounts
                if not _is_from_elsewhere(mount) and _missing(mount, secrets, agents) is None
            )
            with errors.collected():
                lower_mounts(
                    replace(run, mounts=known),
                    0,
                    trees,
                    secrets,
                    agents=agents,
                    location=step.origin.location,
                )
    errors.raise_all()


def _check_size(step: Step, run: Run) -> None:
    # The form of keys has all of its texts, as the message has them.
    size = len(canonical(run).encode(errors="replace"))
    if size > MAX_MESSAGE_BYTES:
        raise InputError(
            f"a RUN with its variables may take {MAX_MESSAGE_BYTES} bytes, and this one takes {size}",
            hint="COPY a script and run that",
            location=step.origin.location,
        )


def prepare(
    steps: Iterable[tuple[Step, ContextResource | None]],
    secrets: Mapping[str, Secret],
    agents: Collection[str] = (),
) -> None:
    """Get what only steps need that are executed, before anything starts: secrets, agents and downloads.

    Args:
        steps: those that are not cached, each with what it sends if that is known.
        secrets: what the user has given, by id.
        agents: ids of the SSH agents that the user has given.

    Raises:
        InputError: a required secret or agent is not given, or a download fails; all of them.
    """
    errors = InputErrors()
    for step, sent in steps:
        location = step.origin.location
        mounts = step.operation.mounts if isinstance(step.operation, Run) else ()
        with errors.collected():
            for mount in mounts:
                if (missing := _missing(mount, secrets, agents, location)) is not None:
                    raise missing
            for group in sent.groups if sent is not None else ():
                if group.fetch is not None:
                    group.fetch()
    errors.raise_all()


def has_caches(graph: Graph) -> bool:
    """Tell whether a RUN has a cache mount."""
    steps = (step.operation for stage in graph.stages for step in stage.steps)
    return any(isinstance(mount, CacheMount) for run in steps if isinstance(run, Run) for mount in run.mounts)


def _is_from_elsewhere(mount: Mount) -> bool:
    return isinstance(mount, BindMount | CacheMount) and isinstance(mount.tree, ImageRef | StageRef)


def _missing(
    mount: Mount, secrets: Mapping[str, Secret], agents: Collection[str], location: Location | None = None
) -> InputError | None:
    """Return the error for a mount that requires what the user has not given."""
    match mount:
        case SecretMount(required=True) if mount.id not in secrets:
            return missing_secret(mount.id, location)
        case SshMount(required=True) if mount.id not in agents:
            return missing_agent(mount.id, location)
        case _:
            return None


@dataclass(frozen=False)
class _Lowering:
    """A RUN that is lowered, and what its mounts need."""

    run: Run
    number: int
    trees: Trees
    secrets: Mapping[str, Secret]
    agents: Collection[str]
    beginning: Beginning
    location: Location | None
    resources: dict[str, Resource] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def one(self, mount: Mount, name: str) -> wire.Mount | None:
        """Lower a mount, whose resource is called `name`; None for one without an effect."""
        if mount.target:
            try:
                wire.mount_target(self.run.workdir, mount.target)
            except wire.WireError as error:
                raise InputError(f"RUN --mount: {error}", location=self.location) from error
        if (missing := _missing(mount, self.secrets, self.agents, self.location)) is not None:
            raise missing
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
            case SshMount():
                return self._agent(mount)

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
            identifier += f":{self.beginning(mount)}"
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
            if mount.env:
                self.env[mount.env] = ""
            self.absent.append(secret_option(mount.id))
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

    def _agent(self, mount: SshMount) -> wire.SshMount | None:
        if "SSH_AUTH_SOCK" not in {*self.run.env, *self.run.args}:
            self.env.setdefault("SSH_AUTH_SOCK", mount.target)
        if mount.id not in self.agents:
            self.absent.append(agent_option(mount.id))
            return None
        return wire.SshMount(
            target=mount.target, id=mount.id, mode=mount.mode & _MODE, uid=mount.uid, gid=mount.gid
        )


def literal(path: str) -> str:
    """Return the pattern that matches a path as it stands: the source of a mount is not a pattern."""
    parts = path.split("/")
    first = next((index for index, part in enumerate(parts) if has_wildcard(part)), len(parts))
    return "/".join([*parts[:first], *(re.sub(r"([*?\[\\])", r"\\\1", part) for part in parts[first:])])
