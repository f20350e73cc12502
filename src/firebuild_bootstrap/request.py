"""What a user asks a build for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from firebuild_bootstrap.dockerfile import DockerfileSource
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputSpec


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build.

    Args:
        dockerfile: path of the Dockerfile; beside it `<name>.dockerignore` may lie.
        source: the Dockerfile itself and what to call it in messages, if it is not to be read from that path.
        context: directory that COPY and ADD read from.
        tag: what to store the image as.
        also_tagged: more names to store it under.
        build_args: values for ARG; None is a name without a value.
        labels: added to the image, over those of the Dockerfile.
        target: stage to build, by name or index; None for the last.
        outputs: what to make of the root file system.
        keep_failed: where a failed build keeps what is left of it, in a directory named by its build id; None
            keeps nothing.
    """

    dockerfile: Path
    source: DockerfileSource | None = None
    context: Path
    tag: Reference
    also_tagged: tuple[Reference, ...] = ()
    build_args: Mapping[str, str | None] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    outputs: tuple[OutputSpec, ...]
    keep_failed: Path | None = None
