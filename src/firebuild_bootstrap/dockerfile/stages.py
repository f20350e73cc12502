"""From a Dockerfile to a graph: stages, their bases, and one instruction after the other.

What refers to what follows BuildKit (dockerfile2llb/convert.go): a name of FROM is looked for among the
stages before it, one of --from among all of them; only what the target needs is read in full.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from typing import Final, Protocol

from firebuild_bootstrap.dockerfile import metadata, operations
from firebuild_bootstrap.dockerfile.expansion import Budget, Expander, Lexer
from firebuild_bootstrap.dockerfile.graph import (
    ContextRef,
    Copy,
    Diagnostic,
    Files,
    Graph,
    ImageRef,
    Origin,
    Scratch,
    Stage,
    StageRef,
    Step,
    TreeRef,
)
from firebuild_bootstrap.dockerfile.lint import Lint
from firebuild_bootstrap.dockerfile.mounts import check_run
from firebuild_bootstrap.dockerfile.stage import (
    PROXY_ARGS,
    StageState,
    Variables,
    declare_args,
    platform_args,
    starting_config,
)
from firebuild_bootstrap.dockerfile.syntax import (
    DockerfileSource,
    Instruction,
    ParsedDockerfile,
    guess,
    parse,
    read_flags,
    short,
)
from firebuild_bootstrap.errors import InputError, InputErrors, Location
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.platforms import host_platform, normal_platform
from firebuild_pki.values import dataclass

# Reading one reads those that it needs; so do all who walk from a stage to those.
_MOST_NESTED: Final = 64
_STAGE_NAME: Final = re.compile(r"[a-z][a-z0-9-_.]*")


class BaseResolver(Protocol):
    """Finds images."""

    def resolve(self, reference: str) -> ImageConfig:
        """Return the configuration of the image `reference`.

        Raises:
            InputError: there is no such image.
        """
        ...


def read_graph(
    dockerfile: DockerfileSource,
    *,
    images: BaseResolver,
    build_args: Mapping[str, str | None] | None = None,
    target: str | None = None,
    extra_labels: Mapping[str, str] | None = None,
    platform: str | None = None,
    contexts: Mapping[str, ContextRef | ImageRef] | None = None,
    lint: Lint | None = None,
    every_stage: bool = False,
) -> Graph:
    """Work out what a build has to do.

    Args:
        dockerfile: the text.
        images: finds bases and what COPY --from and mounts take from; not asked about `scratch`.
        build_args: values for ARG; None is an argument without a value, which counts as not given.
        target: name or index of the stage to build, by default the last.
        extra_labels: labels for the image; they beat those of the Dockerfile.
        platform: what the machine is, for example `linux/amd64`; by default this host.
        contexts: what stands for an image or stage of that name, wherever it is named (`--build-context`).
        lint: collects the warnings of build checks, for a caller that wants them beside an error.
        every_stage: read those that the target does not need as well, for their mistakes.

    Raises:
        InputError: something is wrong, or can't be done; the location names the line. Where several lines
            are wrong, the hint lists the others.
    """
    parsed = parse(dockerfile)
    lint = lint or Lint()
    lint.obey(parsed, dockerfile.name)
    reading = _Reading(
        dockerfile,
        parsed,
        images=images,
        given=build_args or {},
        target=target,
        platform=platform or host_platform(),
        contexts={_context_key(name): tree for name, tree in (contexts or {}).items()},
        lint=lint,
    )
    graph = reading.graph(extra_labels or {}, every_stage=every_stage)
    unused = tuple(name for name in contexts or {} if _context_key(name) not in reading.taken)
    return replace(graph, unused_contexts=unused)


@dataclass(frozen=False)
class _Block:
    """A FROM and what follows it, before and after it is read.

    Args:
        index: which FROM it is, from 0.
        start: the FROM.
        body: all after it.
        name: of AS, in lower case.
        base: what it starts from.
        base_name: the same as it is written, with its variables replaced.
        platform: what --platform asks for; empty for what the base is.
        replaced: a named context stands for all of it.
        nested: how many stages are between it and one that needs none.
        state: what came of it, once it is read.
        broken: reading it was given up, so nothing can be said about what builds on it.
    """

    index: int
    start: Instruction
    body: list[Instruction]
    name: str = ""
    base: TreeRef = field(default_factory=Scratch)
    base_name: str = ""
    platform: str = ""
    replaced: bool = False
    nested: int = 0
    state: StageState | None = None
    broken: bool = False

    @property
    def title(self) -> str:
        return repr(self.name) if self.name else str(self.index)


class _Reading:
    """One way from a text to a graph; it is also what finds the trees that instructions name."""

    def __init__(
        self,
        dockerfile: DockerfileSource,
        parsed: ParsedDockerfile,
        *,
        images: BaseResolver,
        given: Mapping[str, str | None],
        target: str | None,
        platform: str,
        contexts: Mapping[str, ContextRef | ImageRef],
        lint: Lint,
    ) -> None:
        self._dockerfile = dockerfile
        self._parsed = parsed
        self._images = images
        self._given = given
        self._platform = platform
        self._contexts = contexts
        self.taken: set[str] = set()
        """What of them is used."""
        self._lint = lint
        self._budget = Budget()
        self._errors = InputErrors()
        self._configs: dict[str, ImageConfig] = {}
        self._names: dict[str, _Block] = {}
        self._current: _Block | None = None
        self._deep = 0
        head, self._blocks = _split(parsed)
        predefined = platform_args(platform, target or _name_of(self._blocks[-1].start))
        self._known = {name: value for name in predefined if (value := given.get(name)) is not None}
        self._scope = self._global_scope(head, given, predefined | self._known)
        for block in self._blocks:
            with self._errors.collected():
                self._begin(block)
        self._look(head, predefined | self._known)
        self._errors.raise_all()
        self._target = self._find_target(target)

    def _global_scope(
        self, head: Iterable[Instruction], given: Mapping[str, str | None], predefined: Mapping[str, str]
    ) -> Variables:
        scope = Variables(given, {}, predefined)
        for instruction in head:
            declare_args(instruction, scope, self._expander(instruction, scope.values))
        return scope

    def _expander(self, instruction: Instruction, values: Mapping[str, str]) -> Expander:
        return Expander(instruction, values, self._parsed.escape, self._budget)

    def _look(self, head: Sequence[Instruction], predefined: Mapping[str, str]) -> None:
        """Look for what needs no instruction of a stage to be executed."""
        lint = self._lint
        for warning in self._parsed.warnings:
            lint.report(warning.rule, warning.location, warning.message)
        starts = [block.start for block in self._blocks if len(block.start.args) in (1, 3)]
        inside = [instruction for block in self._blocks for instruction in (block.start, *block.body)]
        lint.names((start, _name_of(start)) for start in starts)
        lint.casing(inside)
        lint.maintainers(inside)
        for instruction in (*head, *inside):
            if instruction.keyword == "ARG":
                lint.description(instruction, [word.partition("=")[0] for word in instruction.args])
        for start in starts:
            lint.description(start, list(filter(None, [_name_of(start)])))
        # Whether a name is one without any build argument; mistakes show elsewhere.
        with suppress(InputError):
            scope = self._global_scope(head, {}, predefined)
            for start in starts:
                base = self._expander(start, scope.values).word(start.args[0])
                try:
                    Reference.parse(base)
                except InputError:
                    message = f"{start.args[0]!r:.80} is not the name of an image without build arguments"
                    lint.report("InvalidDefaultArgInFrom", start, message, everywhere=True)

    def graph(self, extra_labels: Mapping[str, str], *, every_stage: bool) -> Graph:
        """Read what the target needs, look at the rest, and return the graph."""
        wanted = self._blocks if every_stage else [self._target]
        for block in wanted:
            with self._errors.collected():
                self._read(block)
        for block in self._blocks:
            if block.state is None and not block.broken:
                self._look_at(block)
        self._errors.raise_all()
        self._lint.raise_for_error()
        needed = [block for block in self._blocks if block.state is not None]
        while needed[-1] is not self._target:
            needed.pop()
        declared = self._scope.declared | self._known.keys()
        for block in self._blocks:
            declared |= block.state.variables.declared if block.state else _declared(block.body)
        warnings = [*self._lint.found, *(each for block in self._blocks for each in _warnings(block))]
        here = Location(self._dockerfile.name)
        unused = (Diagnostic(here, message) for message in _undeclared(self._given, declared))
        return Graph(
            stages=tuple(_stage(block, extra_labels if block is self._target else {}) for block in needed),
            warnings=(*sorted(warnings, key=lambda each: each.location.line), *unused),
        )

    # --- trees that instructions name -----------------------------------------------------------

    def named(self, instruction: Instruction, name: str) -> TreeRef:
        """See `Trees.named`."""
        block = self._names.get(name.lower())
        return self._image(instruction, name) if block is None else self._earlier(instruction, block)

    def numbered(self, instruction: Instruction, name: str) -> TreeRef:
        """See `Trees.numbered`."""
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", name):
            return self.named(instruction, name)
        if not 0 <= int(name) < len(self._blocks):
            raise instruction.error(f"there is no stage {name}", hint=_stages(self._blocks))
        return self._earlier(instruction, self._blocks[int(name)])

    def _earlier(self, instruction: Instruction, block: _Block) -> TreeRef:
        current = self._current
        assert current is not None  # only what is being read names anything  # noqa: S101
        if block.index == current.index:
            raise instruction.error(
                f"circular dependency: the stage {block.title} can't take files from itself",
                hint="a path without --from is one of the build context; RUN cp copies inside the stage",
            )
        if block.index > current.index:
            raise instruction.error(
                f"the stage {block.title} comes after the stage {current.title}, which takes files from it",
                hint=f"move it up, before line {current.start.location.line}",
            )
        self._need(instruction, current, block)
        return StageRef(block.index)

    def _need(self, instruction: Instruction, block: _Block, needed: _Block) -> None:
        """Read a stage that another needs, and all that that one needs."""

        def too_deep() -> InputError:
            message = f"more than {_MOST_NESTED} stages need one another in a row"
            return instruction.error(message, hint="merge some of them")

        if self._deep == _MOST_NESTED:
            raise too_deep()
        self._deep += 1
        try:
            self._read(needed)
        finally:
            self._deep -= 1
        block.nested = max(block.nested, needed.nested + 1)
        if block.nested > _MOST_NESTED and needed.state is not None:
            raise too_deep()

    def _image(self, instruction: Instruction, name: str) -> TreeRef:
        if name == "scratch":
            return Scratch()
        tree = self._context(name) or ImageRef(name)
        if isinstance(tree, ImageRef):
            self._config(instruction, tree.reference)
        return tree

    def _context(self, name: str) -> ContextRef | ImageRef | None:
        if name in ("scratch", "context"):
            return None
        self.taken.add(key := _context_key(name))
        return self._contexts.get(key)

    def _config(self, instruction: Instruction, reference: str) -> ImageConfig:
        if reference not in self._configs:
            try:
                self._configs[reference] = self._images.resolve(reference)
            except InputError as error:
                if error.location is not None:
                    raise
                hint = self._meant(instruction, reference) or error.hint
                raise instruction.error(error.message, hint=hint) from error
        return self._configs[reference]

    def _meant(self, instruction: Instruction, name: str) -> str | None:
        """Return a hint for a name that is not an image."""
        line = instruction.location.line
        later = self._names.get(name.lower())
        if later is not None and later.start.location.line > line:
            return f"FROM knows the stages before it: move the stage {later.title} up, before line {line}"
        # A stage is not what its own FROM means.
        stages = [block.name for block in self._blocks if block.name and block.start is not instruction]
        return guess(name, [*stages, *(key.removesuffix(":latest") for key in self._contexts)])

    # --- FROM -----------------------------------------------------------------------------------

    def _begin(self, block: _Block) -> None:
        instruction = block.start
        expander = self._expander(instruction, self._scope.values)
        # An empty value counts as no flag; a variable that expands to nothing is an error.
        if text := read_flags(instruction).values.get("platform"):
            wanted, looked_up = expander.looked_up(text)
            block.platform = _platform(instruction, text, wanted, self._platform)
            self._look_at_platform(instruction, text, looked_up, block.platform)
        match instruction.args:
            case (image,):
                pass
            case (image, keyword, name) if keyword.upper() == "AS":
                block.name = name.lower()
                if not _STAGE_NAME.fullmatch(block.name):
                    raise instruction.error(
                        f"FROM: {short(name)!r} can't name a stage",
                        hint="a name begins with a letter; letters, digits, - _ and . follow",
                    )
            case _:
                raise instruction.error("FROM: expected an image, or an image AS name")
        base, looked_up = expander.looked_up(image)
        self._look_at_arguments(instruction, looked_up)
        if not base:
            raise instruction.error(
                f"FROM: {short(image)!r} expands to nothing",
                hint="declare the ARG before FROM, with a default",
            )
        block.base_name = base
        if block.name and (tree := self._context(block.name)) is not None:
            block.base, block.replaced = tree, True
        elif earlier := self._names.get(base.lower()):
            block.base = StageRef(earlier.index)
        elif base != "scratch":
            block.base = self._context(base) or ImageRef(base)
        if block.name:
            self._names[block.name] = block

    def _look_at_arguments(self, instruction: Instruction, looked_up: Lexer) -> None:
        known = self._scope.values.keys() | self._scope.declared
        for name in looked_up.missing:
            if name not in known:
                near = guess(name, sorted(known))
                message = f"the argument {name} is not declared before the first FROM"
                self._lint.report(
                    "UndefinedArgInFrom", instruction, f"{message} ({near})" if near else message
                )

    def _look_at_platform(self, instruction: Instruction, text: str, looked_up: Lexer, platform: str) -> None:
        self._look_at_arguments(instruction, looked_up)
        if list(looked_up.found) == ["TARGETPLATFORM"] and not looked_up.missing:
            if platform == self._platform:
                message = f"{text} is the platform of a stage in any case"
                self._lint.report("RedundantTargetPlatform", instruction, message)
        elif not (looked_up.found or looked_up.missing):
            system, architecture = platform.split("/")[:2]
            name = _name_of(instruction)
            if system not in name and architecture not in name:
                message = f"--platform={text:.80} is constant: a build for another platform gets it as well"
                self._lint.report("FromPlatformFlagConstDisallowed", instruction, message)

    def _find_target(self, target: str | None) -> _Block:
        if target is None:
            return self._blocks[-1]
        if found := self._names.get(target.lower()):
            return found
        if re.fullmatch("[0-9]{1,9}", target) and int(target) < len(self._blocks):
            return self._blocks[int(target)]
        raise InputError(
            f"--target: there is no stage {target!r}",
            hint=_stages(self._blocks),
            location=Location(self._dockerfile.name),
        )

    # --- what follows FROM ----------------------------------------------------------------------

    def _read(self, block: _Block) -> None:
        """Read a stage, after those that it needs; errors of its instructions are collected.

        Raises:
            InputError: its base can't be found or pulled.
        """
        if block.state is not None or block.broken:
            return
        # Until it is read to its end, nothing can build on it.
        block.broken = True
        parent = self._blocks[block.base.index] if isinstance(block.base, StageRef) else None
        if parent is not None:
            self._need(block.start, block, parent)
            if parent.state is None:
                return
        before, self._current = self._current, block
        try:
            state, triggers, base = self._start(block, parent.state if parent else None)
            if isinstance(block.base, ContextRef):
                everything = Copy(sources=(Files("/", block.base),), destination="/", into=True)
                origin = Origin(block.start.location, f"COPY --from={block.base.name} / /")
                state.steps.append(Step(everything, origin))
                state.instructions.append((origin.text, True))
            whole = self._execute_triggers(state, triggers, block.start, base)
            state.escape = self._parsed.escape
            whole = whole and self._execute_all(state, [] if block.replaced else block.body)
            if whole:
                block.state, block.broken = state, False
        finally:
            self._current = before

    def _start(self, block: _Block, parent: StageState | None) -> tuple[StageState, tuple[str, ...], str]:
        """Return the state that a stage begins with, the triggers of its base, and the name of that."""
        instruction = block.start
        if parent is not None:
            config = parent.finished({})
            variables = parent.variables.below(starting_config(config).env)
            platform, name = parent.platform, f"the stage {self._blocks_title(block)}"
        else:
            platform = block.platform or self._platform
            config, name = ImageConfig(), ""
            if isinstance(block.base, ImageRef):
                self._require_stored(instruction, platform)
                name = block.base.reference
                config = self._config(instruction, name)
            variables = Variables(self._given, self._scope.values, starting_config(config).env)
        state = StageState(
            starting_config(config),
            variables,
            self,
            self._budget,
            self._lint,
            platform=platform,
            foreign=platform != self._platform,
            workdir_is_own=parent is not None and parent.workdir_is_own,
        )
        state.carry(instruction, len(variables.values) + len(state.labels) + len(state.volumes))
        return state, () if block.replaced else config.onbuild, name

    def _blocks_title(self, block: _Block) -> str:
        assert isinstance(block.base, StageRef)  # noqa: S101
        return self._blocks[block.base.index].title

    def _require_stored(self, instruction: Instruction, platform: str) -> None:
        if platform != self._platform:
            raise instruction.error(
                f"FROM --platform={platform} is not supported for images: "
                f"the store has {self._platform} only",
                hint="FROM scratch and stages that only COPY can be for another platform",
            )

    def _execute_triggers(
        self, state: StageState, triggers: Iterable[str], start: Instruction, base: str
    ) -> bool:
        for text in triggers:
            errors = InputErrors()
            with errors.collected():
                instruction, state.escape = metadata.read_trigger(text, start.location)
                self._execute(state, instruction, base)
            for error in errors.found:
                self._errors.add(Origin(start.location, text, base).trigger_error(error))
            if errors.found:
                return False
        return True

    def _execute_all(self, state: StageState, instructions: Iterable[Instruction]) -> bool:
        """Execute instructions, and return whether the state after them is known.

        An error in a RUN, COPY or ADD does not hide those that come after it; one in an instruction that
        others depend on does.
        """
        for instruction in instructions:
            if self._errors.enough:
                return False
            ends = instruction.keyword not in ("RUN", "COPY", "ADD")
            with self._errors.collected() as before:
                self._execute(state, instruction)
            if ends and self._errors.more_than(before):
                return False
        return True

    @staticmethod
    def _execute(state: StageState, instruction: Instruction, base: str = "") -> None:
        if handler := metadata.HANDLERS.get(instruction.keyword):
            if instruction.keyword != "HEALTHCHECK":
                read_flags(instruction)
            state.lint.repeated(instruction, state.once)
            handler(state, instruction)
            state.instructions.append((instruction.text, False))
            return
        operation = operations.HANDLERS[instruction.keyword](state, instruction)
        state.steps.append(Step(operation, Origin(instruction.location, instruction.text, base)))
        state.instructions.append((instruction.text, True))

    def _look_at(self, block: _Block) -> None:
        """Check what can be checked of a stage that is not needed."""
        for instruction in block.body:
            with self._errors.collected():
                flags = read_flags(instruction)
                match instruction.keyword:
                    case "RUN":
                        check_run(instruction, flags)
                    case "COPY" | "ADD":
                        operations.check_copy(instruction)
                    case "ONBUILD":
                        metadata.check_onbuild(instruction)
                    case _:
                        pass


def _split(parsed: ParsedDockerfile) -> tuple[list[Instruction], list[_Block]]:
    head: list[Instruction] = []
    blocks: list[_Block] = []
    for instruction in parsed.instructions:
        if instruction.keyword == "FROM":
            blocks.append(_Block(len(blocks), instruction, []))
        elif blocks:
            blocks[-1].body.append(instruction)
        elif instruction.keyword == "ARG":
            read_flags(instruction)
            head.append(instruction)
        else:
            raise instruction.error(
                f"{instruction.keyword} before FROM", hint="only ARG may stand before the first FROM"
            )
    if not blocks:
        raise head[-1].error("the Dockerfile has no FROM", hint="name the base image, or FROM scratch")
    return head, blocks


def _platform(instruction: Instruction, text: str, wanted: str, host: str) -> str:
    if not wanted:
        raise instruction.error(
            f"FROM --platform={short(text)} expands to nothing",
            hint="declare the ARG before FROM, with a default",
        )
    try:
        platform = normal_platform(wanted, host)
    except ValueError as error:
        raise instruction.error(
            f"FROM --platform: {short(wanted)!r} is not a platform: {error}", hint=f"for example {host}"
        ) from error
    if not platform.startswith("linux/"):
        raise instruction.error(
            f"FROM --platform={short(wanted)} is not supported: only images for Linux can be built"
        )
    return platform


def _stage(block: _Block, extra_labels: Mapping[str, str]) -> Stage:
    state = block.state
    assert state is not None  # only those that are read  # noqa: S101
    return Stage(
        index=block.index,
        name=block.name,
        base=Scratch() if isinstance(block.base, ContextRef) else block.base,
        origin=Origin(block.start.location, f"FROM {block.base_name}"),
        platform=state.platform,
        steps=tuple(state.steps),
        instructions=tuple(state.instructions),
        config=state.finished(extra_labels),
    )


def _name_of(start: Instruction) -> str:
    return start.args[2].lower() if len(start.args) == 3 else ""


def _warnings(block: _Block) -> Iterable[Diagnostic]:
    return block.state.warnings if block.state is not None else ()


def _stages(blocks: list[_Block]) -> str:
    titles = (f"{block.index} ({block.name or 'without a name'})" for block in blocks)
    return f"the stages are: {', '.join(titles)}"


def _context_key(name: str) -> str:
    """Return a name so that two spellings of one image are the same, as BuildKit does (dockerui)."""
    try:
        reference = Reference.parse(name)
    except InputError:
        return name
    return str(Reference(reference.familiar, reference.tag, reference.digest))


def _declared(instructions: Iterable[Instruction]) -> set[str]:
    return {
        word.partition("=")[0]
        for instruction in instructions
        if instruction.keyword == "ARG"
        for word in instruction.args
    }


def _undeclared(given: Mapping[str, str | None], declared: Iterable[str]) -> list[str]:
    names = [name for name in given if name not in declared and name not in PROXY_ARGS]
    return [f"the build argument {name} is not declared by any ARG, so nothing uses it" for name in names]
