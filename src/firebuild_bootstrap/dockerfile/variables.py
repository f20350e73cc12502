"""Variables: what ARG declares, and how the words of an instruction are expanded.

https://docs.docker.com/reference/dockerfile/#environment-replacement and
https://docs.docker.com/reference/dockerfile/#arg
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from e2b_dockerfile_utils import ShellLex

from firebuild_bootstrap.dockerfile.syntax import Instruction

# Usable in RUN without an ARG, and never part of the image.
PROXY_ARGS: Final = frozenset(
    name
    for upper in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (upper, upper.lower())
)
_PROCESSORS: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
    "i686": "386",
}


def host_platform(machine: str | None = None) -> str:
    """Return the platform of this host as Docker writes it, for example `linux/amd64`.

    Args:
        machine: the processor as `uname -m` names it, by default this host's.
    """
    machine = machine or os.uname().machine
    return f"linux/{_PROCESSORS.get(machine, machine)}"


def normal_platform(text: str, host: str) -> str:
    """Return a platform as `host_platform` writes it; a missing half is the host's."""
    words = text.lower().split("/")
    system = words.pop(0) if words[0] == "linux" or len(words) > 1 else "linux"
    processor = "/".join(words) or host.partition("/")[2]
    processor = {"arm64/v8": "arm64", "arm": "arm/v7"}.get(processor, processor)
    return f"{system}/{_PROCESSORS.get(processor, processor)}"


def platform_args(platform: str) -> dict[str, str]:
    """Return the arguments that Docker predefines before FROM, for a build on and for `platform`."""
    system, _, processor = platform.partition("/")
    architecture, _, variant = processor.partition("/")
    args = {}
    for side in ("BUILD", "TARGET"):
        args[f"{side}PLATFORM"] = platform
        args[f"{side}OS"] = system
        args[f"{side}ARCH"] = architecture
        args[f"{side}VARIANT"] = variant
    return args


class Expander:
    """Expands variables in the words of one instruction, all with the same values.

    Every method raises `InputError` if a substitution is malformed or `${name:?message}` finds nothing.

    Args:
        instruction: whose words they are; errors point at it.
        values: the variables as they are before the instruction.
        escape: the escape character of the Dockerfile.
    """

    def __init__(self, instruction: Instruction, values: Mapping[str, str], escape: str) -> None:
        self._instruction = instruction
        self._values = values
        self._escape = escape

    def word(self, text: str) -> str:
        """Return `text` as one word: quotes removed, variables replaced."""
        try:
            return self._lexer(self._escape).process_word(text)
        except ValueError as error:
            raise self._instruction.error(str(error)) from error

    def words(self, text: str) -> list[str]:
        """Return `text` as words: what an unquoted variable holds is split at white space."""
        try:
            return self._lexer(self._escape).process_words(text)
        except ValueError as error:
            raise self._instruction.error(str(error)) from error

    def body(self, text: str) -> str:
        """Return the body of a heredoc: variables replaced, quotes left alone."""
        try:
            # Always a backslash, whatever the escape directive says: heredocs follow the shell.
            return self._lexer("\\", keep_quotes=True).process_word(text)
        except ValueError as error:
            raise self._instruction.error(f"in a heredoc: {_reason(error)}") from error

    def _lexer(self, escape: str, *, keep_quotes: bool = False) -> ShellLex:
        return ShellLex(escape, env=self._values, skip_unset_env=False, skip_process_quotes=keep_quotes)


def _reason(error: ValueError) -> str:
    # The lexer repeats the whole text, which is too much of a heredoc.
    return str(error).rpartition(": ")[2]


class Arguments:
    """The ARGs declared so far in one scope.

    Args:
        given: build arguments by name; None is one without a value, which counts as not given.
        inherited: what a declaration without a default gets: the ARGs before FROM.
    """

    def __init__(self, given: Mapping[str, str | None], inherited: Mapping[str, str]) -> None:
        self._given = given
        self._inherited = inherited
        self.values: dict[str, str] = {}
        self.declared: set[str] = set()

    def declare(self, name: str, default: str | None) -> None:
        """Declare one: the build argument beats the default, which beats what is inherited."""
        self.declared.add(name)
        candidates = (self._given.get(name), default, self._inherited.get(name))
        value = next((candidate for candidate in candidates if candidate is not None), None)
        if value is not None:
            self.values[name] = value

    def proxies(self) -> dict[str, str]:
        """Return the proxy arguments that were given: every RUN gets them, declared or not."""
        return {
            name: value for name, value in self._given.items() if name in PROXY_ARGS and value is not None
        }


def declare_args(instruction: Instruction, arguments: Arguments, env: Mapping[str, str], escape: str) -> None:
    """Execute an ARG; a later declaration on the same line sees the earlier ones, as in BuildKit.

    Args:
        instruction: the ARG.
        arguments: the scope that it adds to.
        env: variables that hide ARGs of the same name.
        escape: the escape character of the Dockerfile.

    Raises:
        InputError: there is no name, or a default can't be expanded.
    """
    if not instruction.args:
        raise instruction.error("ARG: expected a name", hint="for example ARG VERSION=1.0")
    for word in instruction.args:
        expander = Expander(instruction, {**arguments.values, **env}, escape)
        name, equals, default = word.partition("=")
        name = expander.word(name)
        if not name:
            raise instruction.error(f"ARG: expected a name before =, found {word!r}")
        arguments.declare(name, expander.word(default) if equals else None)
