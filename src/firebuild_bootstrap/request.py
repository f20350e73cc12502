"""What a user asks a build for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from firebuild_bootstrap.dockerfile import DockerfileSource
from firebuild_bootstrap.dockerfile.graph import GitTree, ImageRef
from firebuild_bootstrap.errors import UNUSABLE_TEXT, InputError
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputSpec
from firebuild_bootstrap.secret import Secret
from firebuild_pki.display import one_line

BuildContextSource = Path | ImageRef | GitTree
"""A directory, an image, or a repository."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build.

    Args:
        dockerfile: path of the Dockerfile; beside it `<name>.dockerignore` may lie.
        source: the Dockerfile itself and what to call it in messages, if it is not to be read from that path.
        context: directory that COPY and ADD read from.
        build_contexts: what stands for images and stages of these names.
        tag: what to store the image as.
        also_tagged: more names to store it under.
        build_args: values for ARG; None is a name without a value.
        secrets: of the user by id, for RUN --mount=type=secret.
        labels: added to the image, over those of the Dockerfile.
        target: stage to build, by name or index; None for the last.
        outputs: the forms to write at once; without any the image alone is stored.
        no_cache: execute each step, whatever the cache has; what comes of it replaces that.
        no_cache_stages: the same for these stages, by name or index.
        explain_cache: report why steps are not cached.
        epoch: seconds since 1970: no file of the outputs is younger, nor is the image (SOURCE_DATE_EPOCH);
            None for the real times.
        keep_failed: where a failed build keeps what is left of it, in a directory named by its build id; None
            keeps nothing.

    Raises:
        InputError: a text of them contains a NUL, or what is no Unicode text. Values are not shown: they may
            be secrets.
    """

    dockerfile: Path
    source: DockerfileSource | None = None
    context: Path
    build_contexts: Mapping[str, BuildContextSource] = field(default_factory=dict)
    tag: Reference
    also_tagged: tuple[Reference, ...] = ()
    build_args: Mapping[str, str | None] = field(default_factory=dict)
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    outputs: tuple[OutputSpec, ...]
    no_cache: bool = False
    no_cache_stages: frozenset[str] = frozenset()
    explain_cache: bool = False
    epoch: int | None = None
    keep_failed: Path | None = None

    def __post_init__(self) -> None:
        """Check the texts."""
        for text in (self.target or "", *self.no_cache_stages):
            self._check("the name of a stage", text)
        for what, pairs in (("the build argument", self.build_args), ("the label", self.labels)):
            for name, value in pairs.items():
                self._check(f"the name of {what}", name)
                self._check(f"the value of {what} {one_line(name, 80)}", value or "")

    @property
    def dockerfile_name(self) -> Path:
        """What to call the Dockerfile in messages."""
        return self.dockerfile if self.source is None else Path(self.source.name)

    @staticmethod
    def _check(what: str, text: str) -> None:
        if UNUSABLE_TEXT.search(text):
            raise InputError(f"{what} contains a NUL, or bytes that are no UTF-8")
