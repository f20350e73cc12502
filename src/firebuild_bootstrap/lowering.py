"""From a stage to what the wire carries: commands, and the resources that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from firebuild_bootstrap.context import Resource
from firebuild_bootstrap.context.entries import ContextResource
from firebuild_bootstrap.dockerfile.graph import (
    ContextRef,
    Copy,
    Diagnostic,
    Files,
    Graph,
    Run,
    Stage,
    Step,
    TreeRef,
    Workdir,
    canonical,
    trees_of,
)
from firebuild_bootstrap.dockerfile.operations import several_sources
from firebuild_bootstrap.errors import InputError, Problems
from firebuild_bootstrap.mounting import LoweredMounts, Trees, lower_mounts
from firebuild_bootstrap.secret import Secret
from firebuild_bootstrap.wire import AnyCommand, CopyCommand, RunCommand, WorkdirCommand


@dataclass(frozen=True)
class WireStep:
    """Something the guest executes.

    Args:
        number: of the step; FROM has the one before the first.
        line: where its instruction starts; for an ONBUILD trigger of the base, the line of FROM.
        instruction: as written, on one line; bodies of heredocs are left out.
        command: what the guest is told.
        resources: what it asks for, by name.
    """

    number: int
    line: int
    instruction: str
    command: AnyCommand
    resources: Mapping[str, Resource] = field(default_factory=dict)


Sent = Mapping[tuple[int, int], ContextResource]
"""What COPY and ADD send, by the index of their stage and their place in it."""
_NOTHING: Final[Sent] = MappingProxyType({})
_NO_RESOURCES: Final[Mapping[str, Resource]] = MappingProxyType({})
_NO_MOUNTS: Final = LoweredMounts()
_NO_SECRETS: Final[Mapping[str, Secret]] = MappingProxyType({})


def outside(graph: Graph, trees: Trees) -> tuple[Graph, Sent, tuple[Diagnostic, ...]]:
    """Find what is sent of all that is there before anything runs; remote files are downloaded.

    Args:
        graph: what there is to do.
        trees: opens build contexts.

    Returns:
        the graph without the steps that copy nothing (BuildKit makes no destination for them either), what
        its other steps send, and where the former were.

    Raises:
        InputError: a source can't be found, read or downloaded; all of them.
    """
    sent: dict[tuple[int, int], ContextResource] = {}
    empty: list[Diagnostic] = []
    problems = Problems()
    stages: list[Stage] = []
    for stage in graph.stages:
        steps: list[Step] = []
        for step in stage.steps:
            copy = step.operation
            if isinstance(copy, Copy) and isinstance(_tree(copy), ContextRef):
                with problems.collected():
                    found = _resource(step, copy, trees)
                    if not found.groups:
                        empty.append(_nothing_matches(step, copy))
                        continue
                    sent[stage.index, len(steps)] = found
            steps.append(step)
        stages.append(replace(stage, steps=tuple(steps)))
    problems.raise_all()
    return replace(graph, stages=tuple(stages)), sent, tuple(empty)


def _nothing_matches(step: Step, copy: Copy) -> Diagnostic:
    patterns = ", ".join(repr(one.pattern) for one in copy.sources if isinstance(one, Files))
    return Diagnostic(step.origin.location, f"nothing matches {patterns:.300}, so nothing is copied")


def lower(
    stage: Stage,
    trees: Trees,
    sent: Sent = _NOTHING,
    *,
    first: int = 2,
    skip: int = 0,
    secrets: Mapping[str, Secret] = _NO_SECRETS,
    identity: Callable[[TreeRef], str] = canonical,
) -> tuple[WireStep, ...]:
    """Turn a stage into what its guest executes.

    Args:
        stage: of a graph.
        trees: opens what files are taken from.
        sent: what was found before.
        first: the number of its first step.
        skip: how many steps are done already.
        secrets: what the user has given, by id.
        identity: names what a tree holds, for caches that begin with it.

    Raises:
        InputError: a source can't be found or read, or a required secret is not given; all of them.
    """
    steps: list[WireStep] = []
    problems = Problems()
    for place, step in enumerate(stage.steps[skip:], skip):
        number, location = first + place, step.origin.location
        with problems.collected():
            match step.operation:
                case Copy() as copy:
                    resource = sent.get((stage.index, place)) or _resource(step, copy, trees)
                    if resource.groups:  # BuildKit makes no destination either
                        steps.append(_lowered(step, number, {f"step-{number}": resource}))
                case Run() as run:
                    mounts = lower_mounts(run, number, trees, secrets, identity=identity, location=location)
                    steps.append(_lowered(step, number, mounts.resources, mounts))
                case Workdir():
                    steps.append(_lowered(step, number))
    problems.raise_all()
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
                args=run.args,
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
            )
    return WireStep(number, step.origin.location.line, step.origin.text, command, resources)


def _tree(copy: Copy) -> TreeRef:
    """Return the tree of all sources: --from is for all of an instruction."""
    return next(iter(trees_of(copy)), ContextRef())


def _resource(step: Step, copy: Copy, trees: Trees) -> ContextResource:
    try:
        return _found(step, copy, trees)
    except InputError as error:
        raise step.origin.trigger_error(error) from error


def _found(step: Step, copy: Copy, trees: Trees) -> ContextResource:
    location = step.origin.location
    unpack = None if copy.unpack is None and copy.keyword == "ADD" else bool(copy.unpack)
    resource = trees(_tree(copy)).resource(
        copy.sources, exclude=copy.exclude, parents=copy.parents, unpack=unpack, location=location
    )
    if not copy.into and not copy.parents and len(resource.groups) > 1:
        raise several_sources(
            lambda message, *, hint: InputError(message, hint=hint, location=location),
            copy.keyword,
            copy.destination,
        )
    return resource
