"""Instructions that only change the image's configuration.

https://docs.docker.com/reference/dockerfile/ and, for the result, the OCI image specification (config.md).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from typing import Final

from firebuild_bootstrap.dockerfile.flags import read_flags
from firebuild_bootstrap.dockerfile.stage import Stage
from firebuild_bootstrap.dockerfile.syntax import Instruction
from firebuild_bootstrap.dockerfile.variables import declare_args
from firebuild_bootstrap.image.config import Healthcheck
from firebuild_bootstrap.wire import WireError, parse_duration

_PORTS: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.ASCII)
_REAL_TIME: Final = re.compile(r"RT(MIN(\+\d{1,2})?|MAX(-\d{1,2})?)", re.ASCII)


def one_word(stage: Stage, instruction: Instruction) -> str:
    """Return the only operand, expanded.

    Raises:
        InputError: there is none, or it expands to nothing.
    """
    text = stage.expander(instruction).word(" ".join(instruction.args))
    if not text:
        raise instruction.error(f"{instruction.keyword}: expected a value, found nothing")
    return text


def _pairs(stage: Stage, instruction: Instruction) -> dict[str, str]:
    expander = stage.expander(instruction)
    if not instruction.args:
        raise instruction.error(f"{instruction.keyword}: expected name=value")
    pairs = {}
    # The parser gives name, value and separator of each pair.
    for name, value in zip(instruction.args[::3], instruction.args[1::3], strict=True):
        expanded = expander.word(name)
        if not expanded:
            raise instruction.error(f"{instruction.keyword}: a name is empty")
        pairs[expanded] = expander.word(value)
    return pairs


def _arg(stage: Stage, instruction: Instruction) -> None:
    declare_args(instruction, stage.arguments, stage.config.env, stage.escape)


def _env(stage: Stage, instruction: Instruction) -> None:
    pairs = _pairs(stage, instruction)
    if odd := next((name for name in pairs if "=" in name), None):
        raise instruction.error(f"ENV: {odd!r} is no name of a variable")
    stage.change(env={**stage.config.env, **pairs})


def _label(stage: Stage, instruction: Instruction) -> None:
    stage.change(labels={**stage.config.labels, **_pairs(stage, instruction)})


def _maintainer(stage: Stage, instruction: Instruction) -> None:
    if not instruction.args:
        raise instruction.error("MAINTAINER: expected a name")
    stage.change(author=instruction.args[0])


def _user(stage: Stage, instruction: Instruction) -> None:
    stage.change(user=one_word(stage, instruction))


def command_line(stage: Stage, instruction: Instruction) -> tuple[str, ...]:
    """Return the JSON form as it stands, or the shell form with the shell in front.

    Raises:
        InputError: there are no operands.
    """
    if not instruction.args and not instruction.json:
        raise instruction.error(f"{instruction.keyword}: expected a command")
    return instruction.args if instruction.json else (*stage.shell, instruction.args[0])


def _cmd(stage: Stage, instruction: Instruction) -> None:
    stage.change(cmd=command_line(stage, instruction) or None)
    stage.cmd_is_own = True


def _entrypoint(stage: Stage, instruction: Instruction) -> None:
    stage.change(entrypoint=command_line(stage, instruction) or None)
    # A CMD of the base was written for the base's ENTRYPOINT.
    if not stage.cmd_is_own:
        stage.change(cmd=None)


def _shell(stage: Stage, instruction: Instruction) -> None:
    if not instruction.json or not instruction.args:
        raise instruction.error("SHELL: expected the JSON form", hint='for example SHELL ["/bin/bash", "-c"]')
    stage.change(shell=instruction.args)


def _expose(stage: Stage, instruction: Instruction) -> None:
    expander = stage.expander(instruction)
    words = [word for text in instruction.args for word in expander.words(text)]
    if not words:
        raise instruction.error("EXPOSE: expected a port")
    ports = [port for word in words for port in _ports(instruction, word)]
    stage.change(exposed_ports=tuple(dict.fromkeys((*stage.config.exposed_ports, *ports))))


def _ports(instruction: Instruction, word: str) -> Iterator[str]:
    match = _PORTS.fullmatch(word.lower())
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else 0
    if not match or not 1 <= first <= last <= 65535:
        raise instruction.error(
            f"EXPOSE: expected a port from 1 to 65535, found {word!r}",
            hint="for example 80, 53/udp or 8000-8010",
        )
    return (f"{port}/{match[3] or 'tcp'}" for port in range(first, last + 1))


def _volume(stage: Stage, instruction: Instruction) -> None:
    volumes = [stage.expander(instruction).word(text) for text in instruction.args]
    if not volumes or not all(volumes):
        raise instruction.error("VOLUME: expected a path, found nothing")
    stage.change(volumes=tuple(dict.fromkeys((*stage.config.volumes, *volumes))))


def _stop_signal(stage: Stage, instruction: Instruction) -> None:
    text = one_word(stage, instruction)
    name = text.upper().removeprefix("SIG")
    number = int(name) if name.isdecimal() and len(name) < 4 else 0
    if not (1 <= number <= 64 or f"SIG{name}" in signal.Signals.__members__ or _REAL_TIME.fullmatch(name)):
        raise instruction.error(f"STOPSIGNAL: expected a signal such as SIGTERM or 15, found {text!r}")
    stage.change(stop_signal=text)


def _healthcheck(stage: Stage, instruction: Instruction) -> None:
    flags = read_flags(instruction, stage.expander(instruction).word)
    kind, *rest = instruction.args or ("",)
    if kind.upper() == "NONE" and not rest:
        stage.change(healthcheck=Healthcheck(("NONE",)))
        return
    if kind.upper() != "CMD" or not rest:
        raise instruction.error(
            "HEALTHCHECK: expected CMD and a command, or NONE alone",
            hint="for example HEALTHCHECK CMD curl -f localhost",
        )

    def nanoseconds(name: str) -> int:
        text = flags.get(name, "0")
        try:
            value = round(parse_duration(text) * 1_000_000_000)
        except WireError as error:
            raise instruction.error(f"HEALTHCHECK --{name}: {error}") from error
        if 0 < value < 1_000_000:
            raise instruction.error(f"HEALTHCHECK --{name}: expected 1ms or more, found {text}")
        return value

    retries = flags.get("retries", "0")
    if not re.fullmatch(r"\d{1,9}", retries, re.ASCII):
        raise instruction.error(f"HEALTHCHECK --retries: expected a whole number, found {retries!r}")
    stage.change(
        healthcheck=Healthcheck(
            test=("CMD" if instruction.json else "CMD-SHELL", *rest),
            interval_ns=nanoseconds("interval"),
            timeout_ns=nanoseconds("timeout"),
            start_period_ns=nanoseconds("start-period"),
            start_interval_ns=nanoseconds("start-interval"),
            retries=int(retries),
        )
    )


Handler = Callable[[Stage, Instruction], None]
HANDLERS: Final[dict[str, Handler]] = {
    "ARG": _arg,
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "MAINTAINER": _maintainer,
    "SHELL": _shell,
    "STOPSIGNAL": _stop_signal,
    "USER": _user,
    "VOLUME": _volume,
}
