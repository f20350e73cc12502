"""A build context to plan in, and a base image to plan on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile import BuildPlan, DockerfileSource, make_plan
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.config import ImageConfig


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


Plan = Callable[..., BuildPlan]


@pytest.fixture
def bases() -> Bases:
    return Bases()


@pytest.fixture
def context_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "context"
    directory.mkdir()
    return directory


@pytest.fixture
def plan(context_dir: Path, bases: Bases) -> Iterator[Plan]:
    """Plan a Dockerfile; `files` are put into the build context before."""
    contexts: list[BuildContext] = []

    def make(
        text: str,
        *,
        files: Mapping[str, str] | None = None,
        build_args: Mapping[str, str | None] | None = None,
        target: str | None = None,
        extra_labels: Mapping[str, str] | None = None,
        platform: str = "linux/amd64",
    ) -> BuildPlan:
        for name, content in (files or {}).items():
            path = context_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        context = BuildContext(context_dir)
        contexts.append(context)
        return make_plan(
            DockerfileSource("Dockerfile", text),
            context=context,
            bases=bases,
            build_args=build_args,
            target=target,
            extra_labels=extra_labels,
            platform=platform,
        )

    yield make
    for context in contexts:
        context.close()
