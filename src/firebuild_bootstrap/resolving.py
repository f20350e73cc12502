"""The first step of a build: the plan, and the base that it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.dockerfile.graph import Diagnostic, ImageRef
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.bases import Base, BaseStore
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.lowering import LoweredStage, lower, require_simple
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.wire import MAX_MESSAGE_BYTES, encode_command


@dataclass(frozen=True)
class Resolved:
    """What a build will do.

    Args:
        plan: its steps.
        base: what it starts from; None for scratch.
        warnings: what is probably not meant.
    """

    plan: LoweredStage
    base: Base | None
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def reference(self) -> str:
        """The base as it is written."""
        base = self.plan.stage.base
        return base.reference if isinstance(base, ImageRef) else "scratch"

    @property
    def base_name(self) -> str:
        """The base by its full name."""
        return self.base.name if self.base else "scratch"


def resolve(request: BuildRequest, context: BuildContext, bases: BaseStore) -> Resolved:
    """Read the Dockerfile and find everything that it names.

    Raises:
        InputError: a mistake, with file and line.
    """
    remembering = _Remembering(bases)
    graph = read_graph(
        request.source or DockerfileSource.read(request.dockerfile),
        images=remembering,
        build_args=request.build_args,
        target=request.target,
        extra_labels=request.labels,
    )
    plan = lower(require_simple(graph), lambda _: context)
    _check_size(plan, str(request.dockerfile))
    return Resolved(plan, remembering.found, (*graph.warnings, *plan.warnings))


def _check_size(plan: LoweredStage, dockerfile: str) -> None:
    # Each is a string of the answer to `Commands`: its tag and its length take up to six bytes more.
    size = sum(len(encode_command(step.command).encode()) + 6 for step in plan.steps)
    if size > MAX_MESSAGE_BYTES:
        raise InputError(
            f"the steps take {size} bytes, and all together may take {MAX_MESSAGE_BYTES}",
            hint="put long scripts and texts into files, and COPY them",
            location=Location(dockerfile),
        )


class _Remembering:
    """Resolves the base for the plan and keeps what was found."""

    def __init__(self, bases: BaseStore) -> None:
        self._bases = bases
        self.found: Base | None = None

    def resolve(self, reference: str) -> ImageConfig:
        self.found = self._bases.resolve(reference)
        return self.found.config
