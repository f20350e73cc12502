"""The stage that is being read: its variables and its configuration between two instructions.

https://docs.docker.com/reference/dockerfile/#environment-replacement and
https://docs.docker.com/reference/dockerfile/#arg
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, replace
from typing import Any, Final, Protocol

from firebuild_bootstrap.dockerfile.expansion import Budget, Expander, ExpansionError
from firebuild_bootstrap.dockerfile.graph import Diagnostic, Step, TreeRef
from firebuild_bootstrap.dockerfile.lint import Lint
from firebuild_bootstrap.dockerfile.syntax import Instruction, short
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.wire import DEFAULT_PATH
from firebuild_pki.values import dataclass

# Usable in RUN without an ARG, and never part of the image.
PROXY_ARGS: Final = frozenset(
    name
    for upper in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (upper, upper.lower())
)
DEFAULT_SHELL: Final = ("/bin/sh", "-c")
# What a variable or word that an instruction hands on to others counts in the budget, in characters.
_CARRIED: Final = 16


def platform_args(platform: str, stage: str) -> dict[str, str]:
    """Return the arguments predefined before FROM, for a build of `stage` on and for `platform`."""
    system, _, processor = platform.partition("/")
    architecture, _, variant = processor.partition("/")
    args = {"TARGETSTAGE": stage or "default"}
    for side in ("BUILD", "TARGET"):
        args[f"{side}PLATFORM"] = platform
        args[f"{side}OS"] = system
        args[f"{side}OSVERSION"] = ""
        args[f"{side}ARCH"] = architecture
        args[f"{side}VARIANT"] = variant
    return args


class Variables:
    """The variables of one scope in the order of its instructions: of ENV and ARG the later one wins.

    That is what BuildKit does, whose ARG puts its value where ENV puts it, whatever the reference says.

    Args:
        given: build arguments by name; None is one without a value, which counts as not given.
        inherited: what an ARG without a default gets: the ARGs before FROM.
        env: the variables to begin with: of the base image, or those that are predefined before FROM.
    """

    def __init__(
        self, given: Mapping[str, str | None], inherited: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        self._given = given
        self._inherited = inherited
        self._of_args: set[str] = set()
        self._environment: tuple[Mapping[str, str], Mapping[str, str]] | None = None
        self.env = dict(env)
        self.values = dict(env)
        self.declared: set[str] = set()

    def below(self, env: Mapping[str, str]) -> Variables:
        """Return the variables that a stage on top of this one begins with.

        What ARG declared goes on there, except where `env`, that of this stage's image, has the same name.

        Args:
            env: of the image.
        """
        variables = Variables(self._given, self._inherited, env)
        variables.declared |= self.declared
        variables._of_args |= self._of_args - env.keys()
        variables.values |= {name: self.values[name] for name in variables._of_args}
        return variables

    def set_env(self, pairs: Mapping[str, str]) -> None:
        """Execute an ENV."""
        self.env |= pairs
        self.values |= pairs
        self._of_args.difference_update(pairs)
        self._environment = None

    def declare(self, name: str, default: str | None, expand: Callable[[str], str]) -> None:
        """Execute an ARG: the build argument beats the default, which beats what is inherited.

        One that gets no value leaves a variable of the same name as it was.
        """
        value = self._given.get(name)
        if value is None:
            value = self._inherited.get(name) if default is None else expand(default)
        self.declared.add(name)
        if value is not None:
            self.values[name] = value
            self._of_args.add(name)
            self._environment = None

    @property
    def changed(self) -> bool:
        """Whether `environment` has to make what it returns."""
        return self._environment is None

    def environment(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return what a RUN sees: variables of ENV and, apart from them, of ARG."""
        if self._environment is None:
            self._environment = (
                {name: value for name, value in self.env.items() if name not in self._of_args},
                {name: self.values[name] for name in sorted(self._of_args)},
            )
        return self._environment

    def proxies(self) -> Mapping[str, str]:
        """Return the proxy arguments that were given, and that a RUN sees though nothing declares them."""
        return {
            name: value
            for name, value in self._given.items()
            if name in PROXY_ARGS and name not in self.values and value is not None
        }


def declare_args(instruction: Instruction, variables: Variables, expander: Expander) -> None:
    """Execute an ARG; a later declaration on the same line sees the earlier ones, as in BuildKit.

    Args:
        instruction: the ARG.
        variables: the scope that it adds to.
        expander: expands with the values of that scope.

    Raises:
        InputError: there is no name, or a default can't be expanded.
    """
    if not instruction.args:
        raise instruction.error("ARG: expected a name", hint="for example ARG VERSION=1.0")
    for word in instruction.args:
        name, equals, default = word.partition("=")
        name = expander.word(name)
        if not name:
            raise instruction.error(f"ARG: expected a name before =, found {short(word)!r}")
        variables.declare(name, default if equals else None, expander.word)


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


@dataclass(frozen=False)
class StageState:
    """What instructions read and change.

    Args:
        config: the image's configuration so far, but for its variables and what has a member of its own
            here, because it grows with every instruction that names it.
        variables: ENV and ARG so far.
        trees: finds other stages and images.
        budget: what the variables of the Dockerfile may still put in.
        lint: collects the warnings of build checks.
        platform: of the image, such as `linux/amd64`.
        foreign: no program of it can run on the machine.
        escape: the escape character of the text that is being read.
        cmd_is_own: a CMD of this stage is in force, which ENTRYPOINT does not reset.
        triggers: what ONBUILD of this stage adds to the configuration.
        steps: what to do so far.
        instructions: see `Stage`.
        warnings: those that belong to no build check.
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
    instructions: list[tuple[str, bool]] = field(default_factory=list)
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

    def carry(self, instruction: Instruction, count: int = 0, *, text: str = "") -> None:
        """Account for what an instruction has of those before it, which can be the more the more there are.

        Args:
            instruction: what gets it.
            count: its variables and words.
            text: what it repeats, such as the directory that a relative WORKDIR continues.

        Raises:
            InputError: those of the whole Dockerfile are too many.
        """
        try:
            self.budget.spend(_CARRIED * count + len(text))
        except ExpansionError as error:
            raise instruction.error(
                f"{instruction.keyword}: what the instructions of this Dockerfile have of those before them, "
                "variables above all, is too much altogether",
                hint="set fewer variables, or set them once and not between other instructions",
            ) from error

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
