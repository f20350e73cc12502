"""Build checks: which rule speaks at which line.

`lints.json` holds what BuildKit v0.34.2 says to each Dockerfile, asked with `--opt requestid=frontend.lint`.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dockerfile.planning import Bases, Read
from firebuild_bootstrap.context.tree import IgnoreRules, excluded_sources
from firebuild_bootstrap.dockerfile.lint import Lint
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig

_CASES = json.loads((Path(__file__).parent / "lints.json").read_text())
_RULES = {
    "StageNameCasing",
    "FromAsCasing",
    "NoEmptyContinuation",
    "ConsistentInstructionCasing",
    "DuplicateStageName",
    "ReservedStageName",
    "JSONArgsRecommended",
    "MaintainerDeprecated",
    "UndefinedArgInFrom",
    "WorkdirRelativePath",
    "UndefinedVar",
    "MultipleInstructionsDisallowed",
    "LegacyKeyValueFormat",
    "RedundantTargetPlatform",
    "SecretsUsedInArgOrEnv",
    "InvalidDefaultArgInFrom",
    "FromPlatformFlagConstDisallowed",
    "CopyIgnoredFile",
    "InvalidDefinitionDescription",
    "ExposeProtoCasing",
    "ExposeInvalidFormat",
}


@pytest.mark.parametrize("case", _CASES, ids=[case["dockerfile"][:60] for case in _CASES])
def test_the_rules_speak_where_they_do_in_buildkit(read: Read, bases: Bases, case: dict[str, Any]) -> None:
    bases.images |= {f"busybox:{tag}": ImageConfig() for tag in ("1", "latest")}
    bases.images["busybox:"] = ImageConfig()
    lint = Lint(excluded_sources(IgnoreRules(case.get("ignore", ""))))
    # Some of them are mistakes besides.
    with contextlib.suppress(InputError):
        read(
            case["dockerfile"],
            build_args=case.get("args"),
            target=case.get("target"),
            every_stage="target" not in case,
            lint=lint,
        )
    assert sorted([each.location.line, each.rule] for each in lint.found) == case["warnings"]


def test_the_record_knows_every_rule() -> None:
    assert Counter(rule for case in _CASES for _, rule in case["warnings"]).keys() == _RULES


def test_a_warning_says_what_to_do_and_which_rule_it_is(read: Read) -> None:
    graph = read("FROM scratch\nENV NAME=x\nLABEL a=$NAMES\n")
    (warning,) = graph.warnings
    assert str(warning) == (
        "Dockerfile:3: UndefinedVar: usage of the undefined variable $NAMES (did you mean $NAME?)"
    )


def test_warnings_come_in_the_order_of_lines(read: Read) -> None:
    graph = read("FROM scratch AS B\nUSER $x\nCMD y\n", build_args={"UNUSED": "1"})
    assert [(each.location.line, each.rule) for each in graph.warnings] == [
        (1, "StageNameCasing"),
        (2, "UndefinedVar"),
        (2, ""),
        (3, "JSONArgsRecommended"),
        (0, ""),
    ]


def test_warnings_are_errors_where_the_dockerfile_says_so(read: Read) -> None:
    with pytest.raises(InputError) as caught:
        read("# check=error=true;skip=FromAsCasing\nFROM scratch as a\nCMD x\nENTRYPOINT y\nENV a b\n")
    assert (
        caught.value.message
        == "check=error=true, and these rules are broken: JSONArgsRecommended, LegacyKeyValueFormat"
    )
    assert caught.value.location == Location("Dockerfile", 3)
    assert "Dockerfile:5: LegacyKeyValueFormat: write ENV key=value" in str(caught.value.hint)
    assert read("# check=error=true\nFROM scratch\n").warnings == ()


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        ("nonsense", "expected skip=RULE,…;error=true;experimental=RULE,…, found 'nonsense'"),
        ("colour=red", "expected skip=RULE,…;error=true;experimental=RULE,…, found 'colour=red'"),
        ("skip=a;error=maybe", "error: expected true or false, found 'maybe'"),
    ],
)
def test_a_malformed_directive_is_an_error(read: Read, directive: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(f"# syntax=docker/dockerfile:1\n# check={directive}\nFROM scratch\n")
    assert caught.value.message == f"# check: {message}"
    assert caught.value.location == Location("Dockerfile", 2)


def test_mistakes_come_before_warnings(read: Read) -> None:
    with pytest.raises(InputError, match="no image 'nowhere'"):
        read("# check=error=true\nFROM scratch\nCMD x\nFROM nowhere\n", every_stage=True)


def test_every_stage_is_read_on_request_and_the_target_stays_it(read: Read) -> None:
    graph = read("FROM scratch AS a\nFROM scratch AS b\nCMD x\n", target="a", every_stage=True)
    assert [stage.name for stage in graph.stages] == ["a"]
    assert [each.rule for each in graph.warnings] == ["JSONArgsRecommended"]
