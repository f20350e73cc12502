"""From a stage to what the wire carries: commands, and the resources that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from firebuild_bootstrap.context import FileTree, Resource
from firebuild_bootstrap.context.sources import ContextResource
from firebuild_bootstrap.dockerfile.graph import (
    ContextRef,
    Copy,
    Diagnostic,
    Files,
    GitTree,
    Graph,
    Network,
    Run,
    Stage,
    Step,
    TreeRef,
    Workdir,
    trees_of,
)
from firebuild_bootstrap.dockerfile.operations import several_sources
from firebuild_bootstrap.errors import InputError, Problems
from firebuild_bootstrap.wire import AnyCommand, CopyCommand, RunCommand, WorkdirCommand


@dataclass(frozen=True)
class WireStep:
    """Something the guest executes.

    Args:
        number: of the step; FROM has the one before the first.
        line: where its instruction starts; for an ONBUILD trigger of the base, the line of FROM.
        instruction: as written, on one line; bodies of heredocs are left out.
        command: what the guest is told.
        resource: what a COPY or ADD sends.
    """

    number: int
    line: int
    instruction: str
    command: AnyCommand
    resource: Resource | None = None


@dataclass(frozen=True)
class LoweredStage:
    """One stage as steps.

    Args:
        stage: what it was.
        steps: what its guest executes, in order.
        warnings: what turned out to be of no effect.
    """

    stage: Stage
    steps: tuple[WireStep, ...]
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def total(self) -> int:
        """The number of steps, FROM included."""
        return 1 + len(self.steps)


Trees = Callable[[TreeRef], FileTree]
"""Returns the files of a tree."""


def lower(stage: Stage, trees: Trees, *, first: int = 2) -> LoweredStage:
    """Turn a stage into what its guest executes; remote files are downloaded.

    Args:
        stage: of a graph.
        trees: opens what COPY takes files from; ContextRef() is the main build context.
        first: the number of its first step.

    Raises:
        InputError: a source can't be found, read or downloaded; all of them, as in a Dockerfile.
    """
    steps: list[WireStep] = []
    warnings: list[Diagnostic] = []
    problems = Problems()
    for step in stage.steps:
        if problems.enough:
            break
        with problems.collected():
            number = first + len(steps)
            try:
                found = _lowered(step, number, trees, warnings)
            except InputError as error:
                raise step.origin.trigger_error(error) from error
            if found is not None:
                origin = step.origin
                steps.append(WireStep(number, origin.location.line, origin.text, *found))
    problems.raise_all()
    return LoweredStage(stage, tuple(steps), tuple(warnings))


def _lowered(
    step: Step, number: int, trees: Trees, warnings: list[Diagnostic]
) -> tuple[AnyCommand, Resource | None] | None:
    # Guests dispatch by the keyword in upper case.
    keyword, space, operands = step.origin.text.partition(" ")
    original = f"{keyword.upper()}{space}{operands.strip()}"
    match step.operation:
        case Run() as run:
            return RunCommand(
                step=number,
                original=original,
                workdir=run.workdir,
                user=run.user,
                argv=run.argv,
                env=run.env,
                args=run.args,
                script=run.script,
            ), None
        case Workdir(path=path, user=user):
            return WorkdirCommand(step=number, original=original, workdir=path, user=user), None
        case Copy() as copy:
            # --from is for all sources of an instruction.
            tree = trees(next(trees_of(copy), ContextRef()))
            resource = _resource(step, copy, tree)
            if not resource.groups:
                patterns = ", ".join(repr(one.pattern) for one in copy.sources if isinstance(one, Files))
                warnings.append(
                    Diagnostic(
                        step.origin.location,
                        f"nothing in {tree.label} matches {patterns:.300}, so nothing is copied",
                    )
                )
                # BuildKit makes no destination either.
                return None
            return CopyCommand(
                step=number,
                original=original,
                workdir=copy.workdir,
                source=f"step-{number}",
                target=copy.destination,
                target_is_directory=copy.into,
                chown=copy.chown,
                chmod=copy.chmod,
                keyword=copy.keyword,
            ), resource


def _resource(step: Step, copy: Copy, tree: FileTree) -> ContextResource:
    location = step.origin.location
    unpack = None if copy.unpack is None and copy.keyword == "ADD" else bool(copy.unpack)
    resource = tree.resource(
        copy.sources, exclude=copy.exclude, parents=copy.parents, unpack=unpack, location=location
    )
    if not copy.into and not copy.parents and len(resource.groups) > 1:
        raise several_sources(
            lambda message, *, hint: InputError(message, hint=hint, location=location),
            copy.keyword,
            copy.destination,
        )
    return resource


# --- what the conductor cannot do yet ------------------------------------------------------------

_NOT_YET: Final = "is not supported yet"


def require_simple(graph: Graph) -> Stage:
    """Return the only stage of a graph that one guest can build from the build context alone.

    Raises:
        InputError: there is more in it; all such lines.
    """
    problems = Problems()
    for stage in graph.stages[:-1]:
        problems.add(InputError(f"a build of several stages {_NOT_YET}", location=stage.origin.location))
    for step in graph.target.steps:
        for what in _beyond(step):
            problems.add(InputError(f"{what} {_NOT_YET}", location=step.origin.location))
    problems.raise_all()
    return graph.target


def _beyond(step: Step) -> Iterator[str]:
    match step.operation:
        case Run(mounts=mounts, network=network):
            if mounts:
                yield "RUN --mount"
            if network is not Network.DEFAULT:
                yield "RUN --network"
        case Copy(sources=sources, link=link, keyword=keyword) as copy:
            if any(tree != ContextRef() for tree in trees_of(copy)):
                yield "COPY --from"
            if link:
                yield f"{keyword} --link"
            if any(isinstance(source, GitTree) for source in sources):
                yield "ADD from a git repository"
        case Workdir():
            pass
