"""What the tests of Dockerfiles look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from firebuild_bootstrap.dockerfile import Diagnostic, Graph
from firebuild_bootstrap.dockerfile.graph import ImageRef
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.lowering import WireStep


@dataclass
class Bases:
    """Base images by reference."""

    images: dict[str, ImageConfig] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def resolve(self, reference: str) -> ImageConfig:
        self.asked.append(reference)
        if reference not in self.images:
            raise InputError(f"there is no image {reference!r}", hint="import it first")
        return self.images[reference]


@dataclass(frozen=True)
class Planned:
    """A Dockerfile as a graph, and its target as the steps of a guest."""

    graph: Graph
    steps: tuple[WireStep, ...]
    found: tuple[Diagnostic, ...]

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        return tuple(each for each in self.found if not each.rule)

    @property
    def lints(self) -> list[tuple[int, str]]:
        return [(each.location.line, each.rule) for each in self.found if each.rule]

    @property
    def config(self) -> ImageConfig:
        return self.graph.target.config

    @property
    def base(self) -> str:
        base = self.graph.target.base
        return base.reference if isinstance(base, ImageRef) else "scratch"

    @property
    def base_line(self) -> int:
        return self.graph.target.origin.location.line

    @property
    def total(self) -> int:
        return 1 + len(self.steps)


Plan = Callable[..., Planned]
Read = Callable[..., Graph]
