"""The stage being built: its configuration and variables between two instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from firebuild_bootstrap.context.build_context import BuildContext
from firebuild_bootstrap.dockerfile.syntax import Instruction
from firebuild_bootstrap.dockerfile.variables import Arguments, Expander
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.wire import DEFAULT_PATH

DEFAULT_SHELL: Final = ("/bin/sh", "-c")


@dataclass
class Stage:
    """What instructions read and change.

    Args:
        config: the image's configuration so far.
        arguments: the ARGs so far.
        context: the build context.
        escape: the escape character of the text that is being executed.
        cmd_is_own: a CMD of this build is in force, which ENTRYPOINT does not reset.
    """

    config: ImageConfig
    arguments: Arguments
    context: BuildContext
    escape: str = "\\"
    cmd_is_own: bool = False

    @classmethod
    def on(cls, base: ImageConfig, arguments: Arguments, context: BuildContext) -> Stage:
        """Begin a stage on a base image; its ONBUILD triggers are not inherited further.

        PATH is always set, so that ENV can extend it.
        """
        env = base.env if "PATH" in base.env else {"PATH": DEFAULT_PATH, **base.env}
        return cls(replace(base, env=env, workdir=base.workdir or "/", onbuild=()), arguments, context)

    def change(self, **members: Any) -> None:
        """Change members of the configuration."""
        self.config = replace(self.config, **members)

    def expander(self, instruction: Instruction) -> Expander:
        """Return what expands the words of `instruction`: ENV hides ARG."""
        return Expander(instruction, {**self.arguments.values, **self.config.env}, self.escape)

    @property
    def shell(self) -> tuple[str, ...]:
        """The command line that executes shell forms."""
        return self.config.shell or DEFAULT_SHELL

    def run_args(self) -> Mapping[str, str]:
        """Return the ARGs that a RUN sees, without those that ENV hides."""
        args = {**self.arguments.proxies(), **self.arguments.values}
        return {name: value for name, value in args.items() if name not in self.config.env}
