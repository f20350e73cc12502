"""The first step of a build: the plan, and the base that it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile import BuildPlan, DockerfileSource, make_plan
from firebuild_bootstrap.image.bases import Base, BaseStore
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.request import BuildRequest


@dataclass(frozen=True)
class Resolved:
    """What a build will do.

    Args:
        plan: its steps.
        base: what it starts from; None for scratch.
    """

    plan: BuildPlan
    base: Base | None

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
    plan = make_plan(
        request.source or DockerfileSource.read(request.dockerfile),
        context=context,
        bases=remembering,
        build_args=request.build_args,
        target=request.target,
        extra_labels=request.labels,
    )
    return Resolved(plan, remembering.found)


class _Remembering:
    """Resolves the base for the plan and keeps what was found."""

    def __init__(self, bases: BaseStore) -> None:
        self._bases = bases
        self.found: Base | None = None

    def resolve(self, reference: str) -> ImageConfig:
        self.found = self._bases.resolve(reference)
        return self.found.config
