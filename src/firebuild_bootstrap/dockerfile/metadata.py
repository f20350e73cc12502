"""Instructions that only change the image's configuration.

https://docs.docker.com/reference/dockerfile/ and, for the result, the OCI image specification (config.md).
"""

from __future__ import annotations

import ipaddress
import re
import signal
from collections.abc import Callable, Mapping
from typing import Final

from firebuild_bootstrap.dockerfile.stage import StageState, declare_args
from firebuild_bootstrap.dockerfile.syntax import DockerfileSource, Instruction, parse, read_flags, short
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import Healthcheck
from firebuild_bootstrap.wire import MAX_ID, WireError, parse_duration

_NO_TRIGGERS: Final = ("FROM", "MAINTAINER", "ONBUILD")
_PORT: Final = re.compile(r"\+?0*\d{1,5}", re.ASCII)
_REAL_TIME: Final = re.compile(r"RT(MIN(\+\d{1,2})?|MAX(-\d{1,2})?)", re.ASCII)


def one_word(stage: StageState, instruction: Instruction) -> str:
    """Return the only operand, expanded; it may expand to nothing.

    Raises:
        InputError: there is none.
    """
    if not instruction.args:
        raise instruction.error(f"{instruction.keyword}: expected a value, found nothing")
    return stage.expander(instruction).word(" ".join(instruction.args))


def _pairs(stage: StageState, instruction: Instruction) -> dict[str, str]:
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


def _arg(stage: StageState, instruction: Instruction) -> None:
    stage.lint.secrets(instruction, (word.partition("=")[0] for word in instruction.args))
    declare_args(instruction, stage.variables, stage.expander(instruction))


def _env(stage: StageState, instruction: Instruction) -> None:
    pairs = _pairs(stage, instruction)
    if odd := next((name for name in pairs if "=" in name), None):
        raise instruction.error(f"ENV: {short(odd)!r} is not the name of a variable")
    stage.lint.pairs(instruction)
    stage.lint.secrets(instruction, pairs)
    stage.variables.set_env(pairs)


def _label(stage: StageState, instruction: Instruction) -> None:
    stage.labels |= _pairs(stage, instruction)
    stage.lint.pairs(instruction)


def _maintainer(stage: StageState, instruction: Instruction) -> None:
    if not instruction.args:
        raise instruction.error("MAINTAINER: expected a name")
    stage.change(author=instruction.args[0])


def _user(stage: StageState, instruction: Instruction) -> None:
    user = one_word(stage, instruction)
    if not user:
        stage.warn(instruction, f"USER {instruction.operands} expands to nothing, which means root")
    require_ids(instruction, "USER", user)
    stage.change(user=user)


def require_ids(instruction: Instruction, what: str, text: str) -> None:
    """Make sure of the numbers in `user:group`, which name nobody where they are too large.

    Raises:
        InputError: one is above 4294967294; one more means "leave it" (chown(2)).
    """
    for part in text.split(":"):
        digits = part.lstrip("0")
        if part.isascii() and part.isdecimal() and (len(digits) > 10 or int(digits or "0") > MAX_ID):
            raise instruction.error(
                f"{what} {short(text)}: an id is {MAX_ID} at most", hint="take a smaller one"
            )


def command_line(stage: StageState, instruction: Instruction) -> tuple[str, ...]:
    """Return the JSON form as it stands, or the shell form with the shell in front.

    Raises:
        InputError: there are no operands.
    """
    if not instruction.args and not instruction.json:
        raise instruction.error(f"{instruction.keyword}: expected a command")
    return instruction.args if instruction.json else (*stage.shell, instruction.args[0])


def _recommend_json(stage: StageState, instruction: Instruction) -> None:
    # Whoever chose a shell wants it.
    if not instruction.json and not stage.config.shell:
        stage.lint.shell_form(instruction)


def _cmd(stage: StageState, instruction: Instruction) -> None:
    _recommend_json(stage, instruction)
    stage.change(cmd=command_line(stage, instruction) or None)
    stage.cmd_is_own = True


def _entrypoint(stage: StageState, instruction: Instruction) -> None:
    _recommend_json(stage, instruction)
    stage.change(entrypoint=command_line(stage, instruction) or None)
    # A CMD of the base was written for the base's ENTRYPOINT.
    if not stage.cmd_is_own:
        stage.change(cmd=None)


def _shell(stage: StageState, instruction: Instruction) -> None:
    if not instruction.json or not instruction.args:
        raise instruction.error("SHELL: expected the JSON form", hint='for example SHELL ["/bin/bash", "-c"]')
    stage.change(shell=instruction.args)


def _expose(stage: StageState, instruction: Instruction) -> None:
    if not instruction.args:
        raise instruction.error("EXPOSE: expected a port")
    expander = stage.expander(instruction)
    words = [word for text in instruction.args for word in expander.words(text)]
    if not words:
        stage.warn(instruction, f"EXPOSE {instruction.operands} expands to nothing and exposes nothing")
    for word in words:
        stage.lint.port(instruction, word)
        try:
            stage.ports.add(*_ports(word))
        except ValueError as error:
            raise instruction.error(
                f"EXPOSE: expected a port, found {short(word)!r}: {error}",
                hint="for example 80, 53/udp or 8000-8010",
            ) from error


def _ports(word: str) -> tuple[int, int, str]:
    """Read `[[address:][host port]:]ports[/protocol]`; address and port of the host say nothing to an image.

    The rules are those of BuildKit (convert_expose.go), and before it of go-connections' nat.ParsePortSpec.

    Raises:
        ValueError: it is malformed; the message says why.
    """
    *ahead, ports = word.split(":")
    host_ports = ahead.pop() if ahead else ""
    address = ":".join(ahead)
    ports, _, protocol = ports.partition("/")
    if protocol.lower() not in ("", "tcp", "udp", "sctp"):
        raise ValueError("the protocol is tcp, udp or sctp")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    if address and ("%" in address or not _is_address(address)):
        raise ValueError(f"{address!r} is not an IP address")
    first, last = _port_range(ports)
    if host_ports:
        begin, end = _port_range(host_ports)
        if last != first and end - begin != last - first:
            raise ValueError("the ranges differ in length")
    return first, last, protocol.lower() or "tcp"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _port_range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    begin = _port(first)
    end = _port(last) if dash else begin
    if end < begin:
        raise ValueError("the range runs backwards")
    return begin, end


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or (number := int(text)) > 65535:
        raise ValueError("a port is a number from 0 to 65535")
    return number


def _volume(stage: StageState, instruction: Instruction) -> None:
    expander = stage.expander(instruction)
    volumes = [expander.word(text.strip()) for text in instruction.args]
    if not volumes or not all(volumes):
        raise instruction.error("VOLUME: expected a path, found nothing")
    stage.volumes |= dict.fromkeys(volumes)


def _stop_signal(stage: StageState, instruction: Instruction) -> None:
    text = one_word(stage, instruction)
    name = text.upper().removeprefix("SIG")
    number = int(name) if name.isdecimal() and len(name) < 4 else 0
    if not (1 <= number <= 64 or f"SIG{name}" in signal.Signals.__members__ or _REAL_TIME.fullmatch(name)):
        raise instruction.error(f"STOPSIGNAL: expected a signal such as SIGTERM or 15, found {short(text)!r}")
    stage.change(stop_signal=text)


def _healthcheck(stage: StageState, instruction: Instruction) -> None:
    expander = stage.expander(instruction)
    flags = {name: expander.word(text) for name, text in read_flags(instruction).values.items()}
    kind, *rest = instruction.args or ("",)
    if kind.upper() == "NONE" and not rest:
        stage.change(healthcheck=Healthcheck(("NONE",)))
        return
    if kind.upper() != "CMD" or not rest:
        raise instruction.error(
            "HEALTHCHECK: expected CMD and a command, or NONE alone",
            hint="for example HEALTHCHECK CMD curl -f localhost",
        )

    stage.change(
        healthcheck=Healthcheck(
            ("CMD" if instruction.json else "CMD-SHELL", *rest),
            **read_health_flags(flags, lambda text: instruction.error(f"HEALTHCHECK --{text}")),
        )
    )


def read_health_flags(flags: Mapping[str, str], error: Callable[[str], InputError]) -> dict[str, int]:
    """Read the flags of HEALTHCHECK into members of a `Healthcheck`.

    Args:
        flags: their values by their names without dashes.
        error: makes the error of a message that begins with the name of the flag.

    Raises:
        InputError: a value is not a duration or a number.
    """

    def nanoseconds(name: str) -> int:
        text = flags.get(name, "0")
        try:
            value = round(parse_duration(text) * 1_000_000_000)
        except WireError as wrong:
            raise error(f"{name}: {wrong}") from wrong
        if 0 < value < 1_000_000:
            raise error(f"{name}: expected 1ms or more, found {text}")
        return value

    retries = flags.get("retries", "0")
    if not re.fullmatch(r"\d{1,9}", retries, re.ASCII):
        raise error(f"retries: expected a whole number, found {retries!r:.100}")
    return {
        "interval_ns": nanoseconds("interval"),
        "timeout_ns": nanoseconds("timeout"),
        "start_period_ns": nanoseconds("start-period"),
        "start_interval_ns": nanoseconds("start-interval"),
        "retries": int(retries),
    }


def _onbuild(stage: StageState, instruction: Instruction) -> None:
    check_onbuild(instruction)
    text = instruction.args[0]
    stage.triggers.append(text)
    try:
        read_flags(read_trigger(text, instruction.location)[0])
    except InputError as error:
        # BuildKit keeps it without a look at it; it is the child that fails.
        stage.warn(instruction, f"no image can be built on this one: ONBUILD {short(text)}: {error.message}")


def check_onbuild(instruction: Instruction) -> None:
    """Look at the keyword that an ONBUILD holds.

    Raises:
        InputError: there is none, or one that can't be a trigger.
    """
    keyword = instruction.args[0].partition(" ")[0].upper()
    if not keyword:
        raise instruction.error("ONBUILD: expected an instruction", hint="for example ONBUILD COPY . /app")
    if keyword in _NO_TRIGGERS:
        raise instruction.error(f"{keyword} can't be a trigger")


def read_trigger(text: str, at: Location) -> tuple[Instruction, str]:
    """Return the instruction of an ONBUILD, and the escape character that is in force in it.

    Raises:
        InputError: it is malformed, or can't be a trigger; the location is `at`.
    """
    parsed = parse(DockerfileSource(at.file, text), at)
    instruction, *others = parsed.instructions
    if others:
        raise instruction.error("a trigger is a single instruction")
    if instruction.keyword in _NO_TRIGGERS:
        raise instruction.error(f"{instruction.keyword} can't be a trigger")
    return instruction, parsed.escape


Handler = Callable[[StageState, Instruction], None]
HANDLERS: Final[dict[str, Handler]] = {
    "ARG": _arg,
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "MAINTAINER": _maintainer,
    "ONBUILD": _onbuild,
    "SHELL": _shell,
    "STOPSIGNAL": _stop_signal,
    "USER": _user,
    "VOLUME": _volume,
}
