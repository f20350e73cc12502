"""The way from a Dockerfile to a plan: stages, base, and one instruction after the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from firebuild_bootstrap.context.build_context import BuildContext
from firebuild_bootstrap.dockerfile import commands, metadata
from firebuild_bootstrap.dockerfile.expansion import Budget
from firebuild_bootstrap.dockerfile.flags import read_flags
from firebuild_bootstrap.dockerfile.model import BaseResolver, BuildPlan, Diagnostic, DockerfileSource, Step
from firebuild_bootstrap.dockerfile.stage import Stage
from firebuild_bootstrap.dockerfile.syntax import Instruction, ParsedDockerfile, parse, short
from firebuild_bootstrap.dockerfile.variables import (
    PROXY_ARGS,
    Expander,
    Variables,
    declare_args,
    host_platform,
    normal_platform,
    platform_args,
)
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig

_STAGE_NAME: Final = re.compile(r"[a-z][a-z0-9-_.]*")
_REPORTED_PROBLEMS: Final = 10
_NO_TRIGGERS: Final = ("FROM", "MAINTAINER", "ONBUILD")


def make_plan(
    dockerfile: DockerfileSource,
    *,
    context: BuildContext,
    bases: BaseResolver,
    build_args: Mapping[str, str | None] | None = None,
    target: str | None = None,
    extra_labels: Mapping[str, str] | None = None,
    platform: str | None = None,
) -> BuildPlan:
    """Work out what a build executes and what its image is like.

    Args:
        dockerfile: the text.
        context: where COPY and ADD find their files; remote files are downloaded now.
        bases: finds the base image; not asked about `scratch`.
        build_args: values for ARG; None is an argument without a value, which counts as not given.
        target: name or index of the stage to build, by default the last.
        extra_labels: labels for the image; they beat those of the Dockerfile.
        platform: what the machine is, for example `linux/amd64`; by default this host.

    Raises:
        InputError: something is wrong, or not supported yet; the location names the line. Where several
            COPY, ADD and RUN are wrong, the hint lists the others.
    """
    platform = platform or host_platform()
    given = build_args or {}
    parsed = parse(dockerfile)
    head, first, body = _split(parsed)
    budget = Budget()
    predefined = platform_args(platform, target or _stage_name(first) or "")
    known = {name: value for name in predefined if (value := given.get(name)) is not None}
    scope = Variables(given, {}, predefined | known)
    for instruction in head:
        declare_args(instruction, scope, Expander(instruction, scope.values, parsed.escape, budget))
    start = _read_from(first, Expander(first, scope.values, parsed.escape, budget), platform)
    _require_target(dockerfile, start, target)
    base = ImageConfig() if start.base == "scratch" else _resolve(first, bases, start.base)
    stage = Stage.on(base, given, scope.values, context, budget)
    work = _Work(stage)
    for trigger in base.onbuild:
        work.trigger(trigger, first, start.base)
    stage.escape = parsed.escape
    work.execute_all(body)
    unknown = _undeclared(given, scope.declared | stage.variables.declared | known.keys())
    return BuildPlan(
        base=start.base,
        base_line=first.location.line,
        steps=tuple(work.steps),
        config=stage.finished(extra_labels or {}),
        warnings=(
            *parsed.warnings,
            *stage.warnings,
            *(Diagnostic(Location(dockerfile.name), message) for message in unknown),
        ),
    )


@dataclass(frozen=True)
class _From:
    base: str
    name: str | None


@dataclass
class _Work:
    """Executes instructions on a stage and collects the steps, and what is wrong with them."""

    stage: Stage
    steps: list[Step] = field(default_factory=list)
    problems: list[InputError] = field(default_factory=list)

    def execute_all(self, instructions: Iterable[Instruction]) -> None:
        """Execute instructions; one error in a RUN, COPY or ADD does not hide those that come after it."""
        try:
            for instruction in instructions:
                self._execute(instruction)
                if len(self.problems) > _REPORTED_PROBLEMS:
                    break
        except InputError as error:
            self.problems.append(error)
        if self.problems:
            self._raise_problems()

    def _execute(self, instruction: Instruction) -> None:
        if instruction.keyword == "ONBUILD":
            raise instruction.error(
                "ONBUILD is not supported yet", hint="repeat the instruction in the child"
            )
        if metadata_handler := metadata.HANDLERS.get(instruction.keyword):
            if instruction.keyword != "HEALTHCHECK":
                read_flags(instruction, str)
            metadata_handler(self.stage, instruction)
            return
        try:
            found = commands.HANDLERS[instruction.keyword](self.stage, instruction, self._next)
        except InputError as error:
            if instruction.keyword == "WORKDIR":
                raise
            self.problems.append(error)
            return
        if found is not None:
            line, text = instruction.location.line, instruction.text
            self.steps.append(Step(self._next, line, text, *found))

    def trigger(self, text: str, origin: Instruction, base: str) -> None:
        """Execute one ONBUILD trigger of the base image."""
        source = DockerfileSource(origin.location.file, text)
        try:
            instructions = parse(source, origin.location).instructions
            if wrong := next((each for each in instructions if each.keyword in _NO_TRIGGERS), None):
                raise wrong.error(f"{wrong.keyword} can't be a trigger")
            self.execute_all(instructions)
        except InputError as error:
            raise InputError(
                f"in the ONBUILD trigger {text!r:.120} of {base}: {error.message}",
                hint=error.hint,
                location=origin.location,
            ) from error

    def _raise_problems(self) -> None:
        first, *others = self.problems
        if not others:
            raise first
        lines = [first.hint] if first.hint else []
        lines += [f"also {other.location}: {other.message}" for other in others[:_REPORTED_PROBLEMS]]
        raise InputError(first.message, hint="\n  ".join(lines) or None, location=first.location) from first

    @property
    def _next(self) -> int:
        return len(self.steps) + 2


def _split(parsed: ParsedDockerfile) -> tuple[list[Instruction], Instruction, list[Instruction]]:
    head: list[Instruction] = []
    stages: list[list[Instruction]] = []
    for instruction in parsed.instructions:
        if instruction.keyword == "FROM":
            stages.append([instruction])
        elif stages:
            stages[-1].append(instruction)
        elif instruction.keyword == "ARG":
            read_flags(instruction, str)
            head.append(instruction)
        else:
            raise instruction.error(
                f"{instruction.keyword} before FROM", hint="only ARG may stand before the first FROM"
            )
    if not stages:
        raise head[-1].error("the Dockerfile has no FROM", hint="name the base image, or FROM scratch")
    if len(stages) > 1:
        raise stages[1][0].error(
            "a second FROM (a multi-stage build) is not supported yet", hint="build one stage per Dockerfile"
        )
    return head, stages[0][0], stages[0][1:]


def _stage_name(instruction: Instruction) -> str | None:
    return instruction.args[2].lower() if len(instruction.args) == 3 else None


def _require_platform(instruction: Instruction, text: str, wanted: str, platform: str) -> None:
    if not wanted:
        raise instruction.error(
            f"FROM --platform={short(text)} expands to nothing",
            hint="declare the ARG before FROM, with a default",
        )
    try:
        normal = normal_platform(wanted, platform)
    except ValueError as error:
        raise instruction.error(
            f"FROM --platform: {short(wanted)!r} is no platform: {error}", hint=f"for example {platform}"
        ) from error
    if normal != platform:
        raise instruction.error(
            f"FROM --platform={short(wanted)} is not supported yet: this host builds {platform} only"
        )


def _read_from(instruction: Instruction, expander: Expander, platform: str) -> _From:
    # Nothing behind the equals sign is no flag; a variable that holds nothing is a mistake.
    if text := read_flags(instruction, str).get("platform"):
        _require_platform(instruction, text, expander.word(text), platform)
    match instruction.args:
        case (image,):
            name = None
        case (image, keyword, name) if keyword.upper() == "AS":
            if not _STAGE_NAME.fullmatch(name.lower()):
                raise instruction.error(
                    f"FROM: {short(name)!r} can't name a stage",
                    hint="a name begins with a letter; letters, digits, - _ and . follow",
                )
        case _:
            raise instruction.error("FROM: expected an image, or an image AS name")
    base = expander.word(image)
    if not base:
        raise instruction.error(
            f"FROM: {short(image)!r} expands to nothing", hint="declare the ARG before FROM, with a default"
        )
    return _From(base, name)


def _require_target(dockerfile: DockerfileSource, start: _From, target: str | None) -> None:
    if target is not None and target.lower() not in ("0", (start.name or "0").lower()):
        stages = f"0 ({start.name})" if start.name else "0 (without a name)"
        raise InputError(
            f"--target: there is no stage {target!r}",
            hint=f"the stages are: {stages}",
            location=Location(dockerfile.name),
        )


def _resolve(instruction: Instruction, bases: BaseResolver, reference: str) -> ImageConfig:
    try:
        return bases.resolve(reference)
    except InputError as error:
        if error.location is not None:
            raise
        raise instruction.error(error.message, hint=error.hint) from error


def _undeclared(given: Mapping[str, str | None], declared: Iterable[str]) -> list[str]:
    names = [name for name in given if name not in declared and name not in PROXY_ARGS]
    return [f"the build argument {name} is not declared by any ARG, so nothing uses it" for name in names]
