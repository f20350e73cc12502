"""The stage being built: its configuration and variables between two instructions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from firebuild_bootstrap.context.build_context import BuildContext
from firebuild_bootstrap.dockerfile.expansion import Budget
from firebuild_bootstrap.dockerfile.model import Diagnostic
from firebuild_bootstrap.dockerfile.syntax import Instruction
from firebuild_bootstrap.dockerfile.variables import Expander, Variables
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.wire import DEFAULT_PATH

DEFAULT_SHELL: Final = ("/bin/sh", "-c")


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
class Stage:
    """What instructions read and change.

    Args:
        config: the image's configuration so far, but for its variables and what has a member of its own
            here, because it grows with every instruction that names it.
        variables: ENV and ARG so far.
        context: the build context.
        budget: what the variables of the Dockerfile may still put in.
        escape: the escape character of the text that is being executed.
        cmd_is_own: a CMD of this build is in force, which ENTRYPOINT does not reset.
        warnings: what is probably not meant.
    """

    config: ImageConfig
    variables: Variables
    context: BuildContext
    budget: Budget
    escape: str = "\\"
    cmd_is_own: bool = False
    warnings: list[Diagnostic] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.labels = dict(self.config.labels)
        self.volumes = dict.fromkeys(self.config.volumes)
        self.ports = Ports(self.config.exposed_ports)

    @classmethod
    def on(
        cls,
        base: ImageConfig,
        given: Mapping[str, str | None],
        inherited: Mapping[str, str],
        context: BuildContext,
        budget: Budget,
    ) -> Stage:
        """Begin a stage on a base image; its ONBUILD triggers are not inherited further.

        PATH is always set, so that ENV can extend it.

        Args:
            base: the configuration of the base image.
            given: build arguments by name.
            inherited: the ARGs before FROM.
            context: the build context.
            budget: what the variables of the Dockerfile may still put in.
        """
        env = base.env if "PATH" in base.env else {"PATH": DEFAULT_PATH, **base.env}
        config = replace(base, workdir=base.workdir or "/", onbuild=())
        return cls(config, Variables(given, inherited, env), context, budget)

    def change(self, **members: Any) -> None:
        """Change members of the configuration."""
        self.config = replace(self.config, **members)

    def finished(self, extra_labels: Mapping[str, str]) -> ImageConfig:
        """Return the configuration of the image; `extra_labels` beat those of the Dockerfile."""
        return replace(
            self.config,
            env=self.variables.env,
            labels={**self.labels, **extra_labels},
            volumes=tuple(self.volumes),
            exposed_ports=tuple(self.ports),
        )

    def expander(self, instruction: Instruction) -> Expander:
        """Return what expands the words of `instruction` with the variables as they are."""
        return Expander(instruction, self.variables.values, self.escape, self.budget)

    def warn(self, instruction: Instruction, message: str) -> None:
        """Say that something in an instruction is probably not meant."""
        self.warnings.append(Diagnostic(instruction.location, message))

    @property
    def shell(self) -> tuple[str, ...]:
        """The command line that executes shell forms."""
        return self.config.shell or DEFAULT_SHELL
