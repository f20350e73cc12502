"""BuildKit's build checks, by their names: what works in a Dockerfile and is probably a mistake.

https://docs.docker.com/reference/build-checks/; when a rule speaks was seen with BuildKit itself. A directive
`# check=skip=RULE,…;error=true` at the top holds for all of a Dockerfile, a comment of that form above an
instruction for that one.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field
from typing import Final

from firebuild_bootstrap.dockerfile.graph import Diagnostic
from firebuild_bootstrap.dockerfile.syntax import DIRECTIVE, Instruction, ParsedDockerfile, guess
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.sizes import parse_bool
from firebuild_pki.values import dataclass

MOST_SHOWN: Final = 1000
"""Warnings that are shown of one Dockerfile; of more only the number is."""
_SECRET: Final = re.compile(
    "(?:_|^)(?:apikey|auth|credentials?|key|password|pword|passwd|secret|token)(?:_|$)", re.IGNORECASE
)
_NO_SECRET: Final = re.compile("(?:_|^)(?:public|file|version)(?:_|$)", re.IGNORECASE)
# These are asked for with `experimental=`.
_EXPERIMENTAL: Final = frozenset({"InvalidDefinitionDescription"})
_RESERVED: Final = ("context", "scratch")
_ONLY_THE_LAST: Final = ("CMD", "ENTRYPOINT", "HEALTHCHECK")


@dataclass(frozen=True)
class Options:
    """What a `check` directive says.

    Args:
        skip: rules that are silent; `all` for all of them.
        error: a warning is an error.
        experimental: rules that are silent otherwise.
    """

    skip: frozenset[str] = frozenset()
    error: bool = False
    experimental: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Options:
        """Read `skip=RULE,…;error=BOOL;experimental=RULE,…`.

        Raises:
            ValueError: it is anything else.
        """
        values: dict[str, str] = {}
        for option in text.split(";"):
            name, equals, value = option.partition("=")
            if not equals or name.strip() not in ("skip", "error", "experimental"):
                raise ValueError(
                    f"expected skip=RULE,…;error=true;experimental=RULE,…, found {option.strip()!r:.80}"
                )
            values[name.strip()] = value
        error = parse_bool(values.get("error", "false").strip())
        if error is None:
            raise ValueError(f"error: expected true or false, found {values['error'].strip()!r:.80}")
        return cls(_names(values.get("skip", "")), error, _names(values.get("experimental", "")))

    def silences(self, rule: str) -> bool:
        """Tell whether a rule says nothing."""
        if not self.skip.isdisjoint((rule, "all")):
            return True
        return rule in _EXPERIMENTAL and self.experimental.isdisjoint((rule, "all"))


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def shown(warnings: Sequence[Diagnostic]) -> Iterator[str]:
    """Yield what to show of warnings: each of them, or the first ones and how many there are besides."""
    yield from map(str, warnings[:MOST_SHOWN])
    if (rest := len(warnings) - MOST_SHOWN) > 0:
        yield f"{rest} more warnings are not shown: there are {len(warnings)} in all"


@dataclass(frozen=False)
class Lint:
    """Collects warnings.

    Args:
        ignored: whether a source of COPY is left out of the build context; None if that is not known.
        options: of the whole Dockerfile.
        found: the warnings.
    """

    ignored: Callable[[str], bool] | None = None
    options: Options = field(default_factory=Options)
    found: list[Diagnostic] = field(default_factory=list)

    def obey(self, parsed: ParsedDockerfile, file: str) -> None:
        """Do what the Dockerfile's directive says.

        Raises:
            InputError: it is malformed.
        """
        for line, text in enumerate(parsed.head, 1):
            directive = DIRECTIVE.fullmatch(text)
            if not directive:
                break
            if directive[1].lower() == "check":
                try:
                    self.options = Options.parse(directive[2])
                except ValueError as error:
                    raise InputError(f"# check: {error}", location=Location(file, line)) from error

    def report(
        self, rule: str, at: Instruction | Location, message: str, *, everywhere: bool = False
    ) -> None:
        """Warn, unless the rule is to be silent.

        Args:
            rule: its name.
            at: the instruction.
            message: what is wrong.
            everywhere: comments above the instruction have no say.
        """
        if self.options.silences(rule):
            return
        if isinstance(at, Instruction):
            if not everywhere and _silenced(at.comments, rule):
                return
            at = at.location
        self.found.append(Diagnostic(at, message, rule))

    def raise_for_error(self) -> None:
        """End the build if there are warnings, and the Dockerfile wants that.

        Raises:
            InputError: so it is.
        """
        if not self.options.error or not self.found:
            return
        rules = ", ".join(dict.fromkeys(warning.rule for warning in self.found))
        raise InputError(
            f"check=error=true, and these rules are broken: {rules}",
            hint="\n  ".join(f"{each.location}: {each.rule}: {each.message}" for each in self.found[:10]),
            location=self.found[0].location,
        )

    # --- one instruction ------------------------------------------------------------------------

    def undefined(self, instruction: Instruction, names: Iterable[str], known: Iterable[str]) -> None:
        """Warn of variables that nothing sets, in an instruction of a stage."""
        for name in names:
            near = guess(f"${name}", [f"${each}" for each in known])
            what = f"usage of the undefined variable ${name}"
            self.report("UndefinedVar", instruction, f"{what} ({near})" if near else what)

    def secrets(self, instruction: Instruction, names: Iterable[str]) -> None:
        """Warn of names of ARG and ENV that sound as if they held a secret."""
        for name in names:
            if _SECRET.search(name) and not _NO_SECRET.search(name):
                self.report(
                    "SecretsUsedInArgOrEnv",
                    instruction,
                    f"{instruction.keyword} {name!r:.80} stays in the image or its history: "
                    "use RUN --mount=type=secret for sensitive data",
                )

    def pairs(self, instruction: Instruction) -> None:
        """Warn of `ENV name value`."""
        keyword = instruction.keyword
        if instruction.args[2:3] == ("",):
            self.report(
                "LegacyKeyValueFormat",
                instruction,
                f"write {keyword} key=value instead of {keyword} key value",
            )

    def port(self, instruction: Instruction, word: str) -> None:
        """Warn of a port of EXPOSE that says more than Docker reads, or says it oddly."""
        ports, _, protocol = word.partition("/")
        if protocol != protocol.lower():
            self.report(
                "ExposeProtoCasing", instruction, f"the protocol of {word!r:.80} should be lower case"
            )
        if ":" in ports:
            self.report(
                "ExposeInvalidFormat",
                instruction,
                f"{word!r:.80} names an address or a port of the host, which EXPOSE does not publish",
            )

    def shell_form(self, instruction: Instruction) -> None:
        """Warn of a CMD or ENTRYPOINT that a shell executes, which gets the signals instead of it."""
        self.report(
            "JSONArgsRecommended",
            instruction,
            f"{instruction.keyword} should be a JSON array, so that signals reach the program and no shell",
        )

    def repeated(self, instruction: Instruction, before: dict[str, Instruction]) -> None:
        """Warn of an instruction of which only the last in a stage counts."""
        keyword = instruction.keyword
        if keyword not in _ONLY_THE_LAST:
            return
        if keyword in before:
            message = f"a later {keyword} in the same stage replaces this one"
            self.report("MultipleInstructionsDisallowed", before[keyword], message)
        before[keyword] = instruction

    def workdir(self, instruction: Instruction, path: str) -> None:
        """Warn of a relative WORKDIR whose beginning only the base knows."""
        self.report(
            "WorkdirRelativePath",
            instruction,
            f"where {path!r:.80} is depends on the WORKDIR of the base image",
        )

    def source(self, instruction: Instruction, pattern: str) -> None:
        """Warn of a source that the ignore file leaves out."""
        path = posixpath.normpath(pattern)
        if self.ignored is not None and self.ignored(path):
            self.report(
                "CopyIgnoredFile",
                instruction,
                f"{instruction.keyword} of {path!r:.80}: .dockerignore excludes it",
            )

    # --- the whole ------------------------------------------------------------------------------

    def names(self, stages: Iterable[tuple[Instruction, str]]) -> None:
        """Look at how stages are called: each FROM, and its name in lower case."""
        seen: set[str] = set()
        for start, name in stages:
            if not name:
                continue
            written, keyword, _as = start.args[2], _word(start), start.args[1]
            if written != name:
                self.report("StageNameCasing", start, f"the stage name {written!r:.80} should be lower case")
            cased = {keyword.lower(): _as.lower(), keyword.upper(): _as.upper()}.get(keyword, _as)
            if _as != cased:
                self.report("FromAsCasing", start, f"{_as!r} and {keyword!r} should be of one case")
            if name in _RESERVED:
                message = f"the stage name {name!r} is a word with a meaning of its own"
                self.report("ReservedStageName", start, message, everywhere=True)
            if name in seen:
                message = f"the stage name {name!r:.80} is used twice"
                self.report("DuplicateStageName", start, message, everywhere=True)
            seen.add(name)

    def casing(self, instructions: Sequence[Instruction]) -> None:
        """Look whether keywords are written in one way, that of most of them."""
        words = [_word(each) for each in instructions]
        counted = Counter(word == word.lower() for word in words if word in (word.lower(), word.upper()))
        lower = counted[True] > counted[False]
        for word, instruction in zip(words, instructions, strict=True):
            if word != (word.lower() if lower else word.upper()):
                case = "lower case" if lower else "upper case"
                message = f"{word} should be in {case}, as most instructions here"
                self.report("ConsistentInstructionCasing", instruction, message, everywhere=True)

    def maintainers(self, instructions: Iterable[Instruction]) -> None:
        """Warn of MAINTAINER."""
        for instruction in instructions:
            if instruction.keyword == "MAINTAINER":
                message = "MAINTAINER is deprecated: use LABEL org.opencontainers.image.authors=…"
                self.report("MaintainerDeprecated", instruction, message)

    def description(self, instruction: Instruction, names: Sequence[str]) -> None:
        """Look at the comment above a stage or argument, which may be its description."""
        words = instruction.comments[-1].split(" ") if instruction.comments else [""]
        if names and words[0] and words[0] not in names:
            example = names[0] if len(names) == 1 else "<arg_key>"
            self.report(
                "InvalidDefinitionDescription",
                instruction,
                f"the comment above {instruction.keyword} should be `# {example} <description>`, "
                "or have a line of `#` below it",
            )


def _word(instruction: Instruction) -> str:
    return instruction.text[: len(instruction.keyword)]


def _silenced(comments: Iterable[str], rule: str) -> bool:
    for comment in comments:
        directive = DIRECTIVE.fullmatch(f"#{comment}")
        if directive and directive[1].lower() == "check":
            try:
                options = Options.parse(directive[2])
            except ValueError:  # a comment like any other
                continue
            if not options.skip.isdisjoint((rule, "all")):
                return True
    return False
