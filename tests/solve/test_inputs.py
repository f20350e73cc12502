"""What a build takes from its context, and whether that is still what it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.context import BuildContext, build_context
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    Copy,
    Files,
    Heredoc,
    Operation,
    Run,
    Scratch,
    StageRef,
    Workdir,
)
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.solve.inputs import Inputs
from firebuild_bootstrap.solve.keys import Parts, inputs_of, operation_parts

COPY = Copy(sources=(Files("src"), Heredoc("EOF", "text")), destination="/app")
RUN = Run(argv=("make",), mounts=(BindMount("/b", source="/src"), BindMount("/c", StageRef(0), "/src")))


def parts_of(operation: Operation, inputs: Inputs) -> Parts:
    found = []
    for each in inputs_of(operation):
        if isinstance(each, Files) and isinstance(operation, Copy):
            found.append(inputs.files(each, operation))
        elif isinstance(each, BindMount) and not isinstance(each.tree, StageRef):
            found.append(inputs.bound(each))
    return operation_parts("p", operation, found, "linux/amd64")


@pytest.mark.parametrize("operation", [COPY, RUN])
def test_files_that_change_after_the_key_was_made_are_noticed(tmp_path: Path, operation: Operation) -> None:
    """Otherwise the key of what was there leads to a result of what came instead."""
    context = tmp_path / "context"
    (context / "src").mkdir(parents=True)
    (context / "src" / "file").write_text("before")
    with BuildContext(context) as files:
        inputs = Inputs({}, {"": files}, {}, tmp_path / "stat")
        parts = parts_of(operation, inputs)
        assert inputs.unchanged(operation, parts)
        (context / "src" / "file").write_text("behind")
        assert not inputs.unchanged(operation, parts)


def test_what_takes_nothing_from_a_context_is_unchanged(tmp_path: Path) -> None:
    with BuildContext(tmp_path) as files:
        inputs = Inputs({}, {"": files}, {}, tmp_path / "stat")
        for operation in (
            Workdir(path="/w"),
            replace(COPY, sources=(Files("/gone", Scratch()),)),
            replace(RUN, mounts=RUN.mounts[1:]),
        ):
            assert inputs.unchanged(operation, operation_parts("p", operation, (), "linux/amd64"))


@pytest.mark.parametrize("parents", [False, True])
def test_a_context_is_walked_once_for_a_build_and_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, parents: bool
) -> None:
    context = tmp_path / "context"
    for name in ("src/deep", "src/other"):
        (context / name).mkdir(parents=True)
    (context / "src/deep/link").symlink_to("nothing")
    copy = replace(COPY, exclude=("other",), parents=parents)
    source = Files("src")
    walks = []
    walk = build_context._directory_entries

    def counted(*arguments: Any) -> Iterator[Entry]:
        walks.append(arguments)
        yield from walk(*arguments)

    monkeypatch.setattr(build_context, "_directory_entries", counted)
    with BuildContext(context) as files:
        # As a build does it, which looks for what can't be sent only where the key can't be made.
        sent = files.resource((source,), exclude=copy.exclude, parents=parents, check=False)
        inputs = Inputs({}, {"": files}, {(0, 0): sent}, tmp_path / "stat")
        plain = inputs.files(source, copy)
        assert len(walks) == 1
        assert inputs.files(source, copy) == plain
        shutil.rmtree(context / "src")
        with pytest.raises(InputError, match="is not in the build context"):
            inputs.files(source, copy)
