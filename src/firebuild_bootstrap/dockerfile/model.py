"""What a Dockerfile turns into: the steps to execute and the configuration of the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from firebuild_bootstrap.context.entries import Resource
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.wire import AnyCommand


@dataclass(frozen=True)
class DockerfileSource:
    """A Dockerfile's text, and what to call it in messages."""

    name: str
    text: str

    @classmethod
    def read(cls, path: Path) -> DockerfileSource:
        """Read a Dockerfile.

        Raises:
            InputError: it can't be read or is not UTF-8.
        """
        try:
            # Bytes, because reading as text would turn CRLF into LF inside heredocs.
            content = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"the Dockerfile can't be read: {error.strerror}",
                hint="name it with --dockerfile",
                location=Location(str(path)),
            ) from error
        return cls.decode(str(path), content)

    @classmethod
    def decode(cls, name: str, content: bytes) -> DockerfileSource:
        """Make a Dockerfile of what was read.

        Raises:
            InputError: it is not UTF-8.
        """
        try:
            return cls(name, content.decode("utf-8"))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise InputError("the Dockerfile is not UTF-8 text", location=Location(name, line)) from error


class BaseResolver(Protocol):
    """Finds base images."""

    def resolve(self, reference: str) -> ImageConfig:
        """Return the configuration of the image `reference`.

        Raises:
            InputError: there is no such image.
        """
        ...


@dataclass(frozen=True)
class Diagnostic:
    """Something in the Dockerfile that is probably not meant, but does not end the build."""

    location: Location
    message: str


@dataclass(frozen=True)
class Step:
    """Something the guest executes.

    Args:
        number: counts from 2; FROM is step 1.
        line: where its instruction starts; for an ONBUILD trigger of the base, the line of FROM.
        instruction: the instruction as written, on one line; bodies of heredocs are left out.
        command: what the guest is told.
        resource: what a COPY or ADD sends.
    """

    number: int
    line: int
    instruction: str
    command: AnyCommand
    resource: Resource | None = None


@dataclass(frozen=True)
class BuildPlan:
    """All that a build executes and what its image is like.

    Args:
        base: `scratch` or the reference of the base image.
        base_line: the line of FROM.
        steps: in order.
        config: the configuration of the finished image.
        warnings: what is probably not meant.
    """

    base: str
    base_line: int
    steps: tuple[Step, ...]
    config: ImageConfig
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def total(self) -> int:
        """The number of steps, FROM included."""
        return 1 + len(self.steps)
