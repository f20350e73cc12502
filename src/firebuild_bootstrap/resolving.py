"""The first step of a build: what there is to do, and what it starts from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from firebuild_bootstrap.context import BuildContext, FileTree, Resource
from firebuild_bootstrap.context.snapshot import SnapshotRoot
from firebuild_bootstrap.context.tree import excluded_sources, load_rules
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.dockerfile.graph import (
    ContextRef,
    Diagnostic,
    Graph,
    ImageRef,
    Stage,
    StageRef,
    TreeRef,
)
from firebuild_bootstrap.dockerfile.lint import Lint
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.events import StepInfo
from firebuild_bootstrap.image.bases import Base, BaseStore
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.layertrees import Layer
from firebuild_bootstrap.lowering import Beginning, Sent, check_runs, lower, outside
from firebuild_bootstrap.request import BuildRequest, Secret
from firebuild_bootstrap.wire import AnyCommand, CacheMount, RunCommand
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.sshagent import SshAgent

Archives = Callable[[TreeRef], Path | None]
"""Returns the archive of an image or of a finished stage; None where it is empty."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the guest of one session has to do.

    Args:
        title: what to call the stage; empty where the build has one only.
        base: the layers of what it starts from, the lowest first; none for an empty root.
        start: its FROM, as a step.
        commands: in order.
        resources: what they ask for, by name.
        agents: the user's SSH agents, by the ids in the mounts of the commands.
        steps: number, line and text of each command.
        total: steps of the whole build.
        absent: by the number of a step, how to give what its mounts would take and the user has not given.
    """

    title: str = ""
    base: Sequence[Layer]
    start: StepInfo
    commands: tuple[AnyCommand, ...] = ()
    resources: Mapping[str, Resource] = field(default_factory=dict)
    agents: Mapping[str, SshAgent] = field(default_factory=dict)
    steps: tuple[StepInfo, ...] = ()
    total: int
    absent: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def caches(self) -> tuple[CacheMount, ...]:
        """The cache mounts of all RUNs."""
        runs = (command for command in self.commands if isinstance(command, RunCommand))
        return tuple(mount for run in runs for mount in run.mounts if isinstance(mount, CacheMount))


@dataclass(frozen=True)
class Resolved:
    """What a build will do.

    Args:
        graph: what the Dockerfile says.
        bases: the images that it names, by their references as written.
        contexts: the build contexts by name, the main one without.
        sent: what the COPY and ADD send whose files are there before anything runs, by stage and step.
        secrets: what the user has given, by id.
        agents: the same of SSH agents.
        dockerfile: the text that it was read from.
        warnings: of build checks and others.
    """

    graph: Graph
    bases: Mapping[str, Base]
    contexts: Mapping[str, BuildContext]
    sent: Sent
    secrets: Mapping[str, Secret]
    dockerfile: DockerfileSource
    agents: Mapping[str, SshAgent] = field(default_factory=dict)
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def total(self) -> int:
        """The number of steps of all stages, each FROM included."""
        return sum(1 + len(stage.steps) for stage in self.graph.stages)

    @property
    def bottom(self) -> TreeRef:
        """The tree at the very bottom of the image."""
        return self.graph.bottom(self.graph.target)

    @property
    def base(self) -> Base | None:
        """The image at the bottom; None where there is none."""
        return self.bases[self.bottom.reference] if isinstance(self.bottom, ImageRef) else None

    @property
    def reference(self) -> str:
        """The base as it is written."""
        return self.bottom.reference if isinstance(self.bottom, ImageRef) else "scratch"

    @property
    def base_name(self) -> str:
        """The base by its full name."""
        return self.base.name if self.base else "scratch"

    def number(self, stage: Stage) -> int:
        """Return the number of a stage's FROM; its steps have those after it."""
        before = self.graph.stages[: self.graph.stages.index(stage)]
        return 1 + sum(1 + len(each.steps) for each in before)

    def title(self, stage: Stage) -> str:
        """Return what to call a stage where there are several; an empty text where it is the only one."""
        return stage.title if len(self.graph.stages) > 1 else ""

    def work(
        self,
        stage: Stage,
        base: Sequence[Layer],
        archives: Archives,
        cleanup: ExitStack,
        *,
        beginning: Beginning,
        done: Collection[int] = (),
    ) -> Work:
        """Return what the guest of a stage has to do.

        Args:
            stage: of the graph; every stage that it refers to is done.
            base: the layers that it begins on.
            archives: finds what is done, and the images.
            cleanup: lets go of them.
            beginning: of its cache mounts.
            done: places of its steps that `base` holds.

        Raises:
            InputError: a file that it wants of another stage or image is not there.
            MachineError: an archive can't be read.
        """
        number = self.number(stage)
        steps = lower(
            stage,
            lambda tree: self._files(tree, archives, cleanup),
            self.sent,
            first=number + 1,
            done=done,
            secrets=self.secrets,
            agents=self.agents,
            beginning=beginning,
        )
        return Work(
            title=self.title(stage),
            base=base,
            start=StepInfo(number, stage.origin.location.line, stage.origin.text),
            commands=tuple(step.command for step in steps),
            resources={name: resource for step in steps for name, resource in step.resources.items()},
            agents=self.agents,
            steps=tuple(StepInfo(step.number, step.line, step.instruction) for step in steps),
            total=self.total,
            absent={step.number: step.absent for step in steps},
        )

    def _files(self, tree: TreeRef, archives: Archives, cleanup: ExitStack) -> FileTree:
        match tree:
            case ContextRef(name):
                return self.contexts[name]
            case StageRef(index):
                label = f"the stage {self.graph.stage(index).title!r}"
            case ImageRef(reference):
                label = f"the image {reference}"
            case _:
                label = "scratch"
        return cleanup.enter_context(FileTree(SnapshotRoot(archives(tree)), label))


def resolve(
    request: BuildRequest,
    contexts: Mapping[str, BuildContext],
    bases: BaseStore,
    *,
    check: bool = True,
) -> Resolved:
    """Read the Dockerfile and find everything that it names.

    Args:
        request: what to build.
        contexts: the build contexts by name, the main one without.
        bases: finds images.
        check: look at all files that are sent, so that what can't be is found now, with its line.

    Raises:
        InputError: a mistake, with file and line.
    """
    found = _Found(bases)
    source = request.source or DockerfileSource.read(request.dockerfile)
    graph = _read(request, source, found, Lint(contexts[""].excluded))

    def outside_trees(tree: TreeRef) -> BuildContext:
        return contexts[tree.name if isinstance(tree, ContextRef) else ""]

    graph, sent, empty = outside(graph, outside_trees, check=check)
    check_runs(graph, outside_trees, request.secrets, request.agents)
    return Resolved(
        graph,
        found.bases,
        contexts,
        sent,
        request.secrets,
        source,
        request.agents,
        (*graph.warnings, *empty),
    )


def check(request: BuildRequest, bases: BaseStore) -> tuple[tuple[Diagnostic, ...], InputError | None]:
    """Read the Dockerfile, and build nothing.

    Returns:
        what is probably not meant, in any stage if the request names none; and what would end the build.

    Raises:
        InputError: the ignore file can't be read.
    """
    lint = Lint(excluded_sources(load_rules(request.context, request.dockerfile)))
    try:
        source = request.source or DockerfileSource.read(request.dockerfile)
        graph = _read(request, source, _Found(bases), lint, every_stage=request.target is None)
    except InputError as error:
        return tuple(sorted(lint.found, key=lambda each: each.location.line)), error
    here = Location(str(request.dockerfile))
    unused = (f"the build context {name} is named by no FROM and no --from" for name in graph.unused_contexts)
    return (*graph.warnings, *(Diagnostic(here, message) for message in unused)), None


def _read(
    request: BuildRequest, source: DockerfileSource, images: _Found, lint: Lint, *, every_stage: bool = False
) -> Graph:
    return read_graph(
        source,
        images=images,
        build_args=request.build_args,
        target=request.target,
        extra_labels=request.labels,
        contexts={
            name: source if isinstance(source, ImageRef) else ContextRef(name)
            for name, source in request.build_contexts.items()
        },
        lint=lint,
        every_stage=every_stage,
    )


class _Found:
    """Resolves images for the graph and keeps what was found."""

    def __init__(self, bases: BaseStore) -> None:
        self._store = bases
        self.bases: dict[str, Base] = {}

    def resolve(self, reference: str) -> ImageConfig:
        base = self.bases.get(reference) or self._store.resolve(reference)
        self.bases[reference] = base
        return base.config
