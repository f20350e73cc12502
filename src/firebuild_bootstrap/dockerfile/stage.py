"""The stage that is being read: its configuration and variables between two instructions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from firebuild_bootstrap.dockerfile.expansion import Budget
from firebuild_bootstrap.dockerfile.graph import Diagnostic, Step, TreeRef
from firebuild_bootstrap.dockerfile.lint import Lint
from firebuild_bootstrap.dockerfile.syntax import Instruction
from firebuild_bootstrap.dockerfile.variables import Expander, Variables
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.wire import DEFAULT_PATH

DEFAULT_SHELL: Final = ("/bin/sh", "-c")


class Trees(Protocol):
    """Finds what `COPY --from` and `RUN --mount=from=` name."""

    def named(self, instruction: Instruction, name: str) -> TreeRef:
        """Return the stage, context or image of that name.

        Raises:
            InputError: there is none, or it is a stage that comes later.
        """
        ...

    def numbered(self, instruction: Instruction, name: str) -> TreeRef:
        """Return the same; a number is the index of a stage.

        Raises:
            InputError: as for `named`.
        """
        ...


class Ports:
    """Ports that the image listens on, each once, in the order in which they were first named."""

    def __init__(self, ports: Iterable[str]) -> None:
        self._all = dict.fromkeys(ports)
        self._named: dict[str, bytearray] = {}

    def add(self, first: int, last: int, protocol: str) -> None:
        """Add a range; what is there already costs next to nothing, however often it is named."""
        named = self._named.setdefault(protocol, bytearray(65536))
        while (first := named.find(0, first, last + 1)) >= 0:
            named[first] = 1
            self._all[f"{first}/{protocol}"] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)


@dataclass
class StageState:
    """What instructions read and change.

    Args:
        config: the image's configuration so far, but for its variables and what has a member of its own
            here, because it grows with every instruction that names it.
        variables: ENV and ARG so far.
        trees: finds other stages and images.
        budget: what the variables of the Dockerfile may still put in.
        lint: told of what is probably not meant, by rules.
        platform: of the image, such as `linux/amd64`.
        foreign: no program of it can run on the machine.
        escape: the escape character of the text that is being read.
        cmd_is_own: a CMD of this stage is in force, which ENTRYPOINT does not reset.
        triggers: what ONBUILD of this stage adds to the configuration.
        steps: what to do so far.
        warnings: what is probably not meant, besides.
        workdir_is_own: a WORKDIR of this Dockerfile is in force, not only that of a base.
        once: instructions of which only the last counts.
    """

    config: ImageConfig
    variables: Variables
    trees: Trees
    budget: Budget
    lint: Lint
    platform: str
    foreign: bool = False
    escape: str = "\\"
    cmd_is_own: bool = False
    triggers: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    warnings: list[Diagnostic] = field(default_factory=list)
    workdir_is_own: bool = False
    once: dict[str, Instruction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = dict(self.config.labels)
        self.volumes = dict.fromkeys(self.config.volumes)
        self.ports = Ports(self.config.exposed_ports)

    def change(self, **members: Any) -> None:
        """Change members of the configuration."""
        self.config = replace(self.config, **members)

    def finished(self, extra_labels: Mapping[str, str]) -> ImageConfig:
        """Return the configuration of the image; `extra_labels` beat those of the Dockerfile."""
        return replace(
            self.config,
            env=dict(self.variables.env),
            labels={**self.labels, **extra_labels},
            volumes=tuple(self.volumes),
            exposed_ports=tuple(self.ports),
            onbuild=tuple(self.triggers),
        )

    def expander(self, instruction: Instruction) -> Expander:
        """Return what expands the words of `instruction` with the variables as they are."""

        def missing(names: Iterable[str]) -> None:
            names = [name for name in names if name not in self.variables.declared]
            self.lint.undefined(instruction, names, self.variables.values)

        return Expander(instruction, self.variables.values, self.escape, self.budget, missing)

    def warn(self, instruction: Instruction, message: str) -> None:
        """Say that something in an instruction is probably not meant."""
        self.warnings.append(Diagnostic(instruction.location, message))

    def require_native(self, instruction: Instruction) -> None:
        """Insist that programs of the stage can run on the machine.

        Raises:
            InputError: they are for another processor.
        """
        if self.foreign:
            raise instruction.error(
                f"RUN in a stage for {self.platform} is not supported: the machine can't execute that",
                hint="run it in a stage for $BUILDPLATFORM, and COPY --from that",
            )

    @property
    def shell(self) -> tuple[str, ...]:
        """The command line that executes shell forms."""
        return self.config.shell or DEFAULT_SHELL


def starting_config(base: ImageConfig) -> ImageConfig:
    """Return the configuration that a stage on `base` begins with.

    Its ONBUILD triggers are not inherited further, and PATH is always set, so that ENV can extend it.
    """
    env = base.env if "PATH" in base.env else {"PATH": DEFAULT_PATH, **base.env}
    return replace(base, env=env, workdir=base.workdir or "/", onbuild=())
