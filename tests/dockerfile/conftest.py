"""A build context to plan in, and a base image to plan on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dockerfile.planning import Bases, Plan, Planned, Read
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile import DockerfileSource, Graph, read_graph
from firebuild_bootstrap.lowering import lower, outside


@pytest.fixture
def bases() -> Bases:
    return Bases()


@pytest.fixture
def read(bases: Bases) -> Read:
    """Read a Dockerfile into a graph."""

    def graph(text: str, **options: Any) -> Graph:
        options = {"platform": "linux/amd64", **options}
        return read_graph(DockerfileSource("Dockerfile", text), images=bases, **options)

    return graph


@pytest.fixture
def context_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "context"
    directory.mkdir()
    return directory


@pytest.fixture
def plan(context_dir: Path, read: Read) -> Iterator[Plan]:
    """Read a Dockerfile and lower its target; `files` are put into the build context before."""
    contexts: list[BuildContext] = []

    def make(text: str, *, files: Mapping[str, str] | None = None, **options: Any) -> Planned:
        for name, content in (files or {}).items():
            path = context_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        context = BuildContext(context_dir)
        contexts.append(context)
        graph, sent, empty = outside(read(text, **options), lambda _: context)
        steps = lower(graph.target, lambda _: context, sent)
        return Planned(graph, steps, (*graph.warnings, *empty))

    yield make
    for context in contexts:
        context.close()
