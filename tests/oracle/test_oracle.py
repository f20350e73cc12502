"""firebuild makes of the cases what BuildKit makes of them, but for what `disagreements.yaml` lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from firebuild_bootstrap.errors import FirebuildError
from firebuild_bootstrap.home import Home
from oracle import ours
from oracle.corpus import HERE, Case, cases, recorded
from oracle.tree import without_base

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "busybox")]

LISTED: Mapping[str, Any] = yaml.safe_load((HERE / "disagreements.yaml").read_text())
# What is decided, and what has been found and is not yet mended, with the reason.
DIFFERENT: Mapping[str, str] = LISTED["decisions"] | LISTED["faults"]
RECORDS = recorded()
AGREEING = [case for case in cases() if case.name not in DIFFERENT]


def named(chosen: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in chosen])


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = ours.home(tmp_path_factory.mktemp("oracle"))
    yield home
    home.close()


def config_of(case: Case, directory: Path) -> dict[str, Any]:
    """Plan a case."""
    case.lay(directory)
    with case.serving(directory) as args:
        return ours.plan(case, directory, args)


def tree_of(case: Case, directory: Path, store: Home) -> dict[str, str]:
    """Build a case."""
    case.lay(directory)
    with case.serving(directory) as args:
        return without_base(ours.build(case, directory, args, store), times=case.times)


def outcome_of(case: Case, directory: Path, store: Home) -> dict[str, Any]:
    """Plan a case and build it, if it has to be."""
    try:
        config = config_of(case, directory)
        return {"config": config, "tree": tree_of(case, directory / "built", store) if is_built(case) else {}}
    except FirebuildError as error:
        return {"refused": str(error)}


def is_built(case: Case) -> bool:
    """Tell whether it takes a build to see what becomes of a case: it has files, or fails over them."""
    return bool(RECORDS[case.name].get("tree", "refused" in RECORDS[case.name]))


def agrees(outcome: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    if "refused" in record:
        return "refused" in outcome
    return all(outcome.get(part) == record[part] for part in ("config", "tree"))


def test_every_case_has_a_name_of_its_own_and_a_record() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    assert set(names) == RECORDS.keys()


@named([case for case in cases() if "config" in RECORDS[case.name] and case.name not in DIFFERENT])
def test_the_configuration_is_that_of_buildkit(case: Case, tmp_path: Path) -> None:
    assert config_of(case, tmp_path) == RECORDS[case.name]["config"]


@named([case for case in AGREEING if RECORDS[case.name].get("tree")])
def test_the_files_are_those_of_buildkit(case: Case, tmp_path: Path, store: Home) -> None:
    assert tree_of(case, tmp_path, store) == RECORDS[case.name]["tree"]


@named([case for case in AGREEING if "refused" in RECORDS[case.name]])
def test_what_buildkit_refuses_is_refused(case: Case, tmp_path: Path, store: Home) -> None:
    assert "refused" in outcome_of(case, tmp_path, store)


@named([case for case in cases() if case.name in DIFFERENT])
def test_a_listed_difference_is_one(case: Case, tmp_path: Path, store: Home) -> None:
    assert not agrees(outcome_of(case, tmp_path, store), RECORDS[case.name])


def test_every_entry_of_the_list_is_about_something() -> None:
    assert {case.name for case in cases()} >= DIFFERENT.keys()
