"""What the mounts of a RUN become on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from context.conftest import HERE
from firebuild_bootstrap import wire
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    ContextRef,
    Mount,
    Run,
    SecretMount,
    Sharing,
    SshMount,
    TmpfsMount,
)
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.lowering import LoweredMounts, lower_mounts
from firebuild_bootstrap.request import Secret, agent_option, secret_option


@pytest.fixture
def context(root: Path) -> Iterator[BuildContext]:
    for name in ("empty", "dir/sub", "[x]"):
        (root / name).mkdir(parents=True)
    (root / "dir/f").write_text("f")
    (root / "[x]/a*\\b").write_text("odd")
    (root / "x").write_text("matches [x]")
    with BuildContext(root) as context:
        yield context


def lowered(context: BuildContext, *mounts: Mount, **given: Any) -> LoweredMounts:
    run = Run(argv=("x",), mounts=mounts, workdir="/w")
    return lower_mounts(run, 7, lambda _: context, given.pop("secrets", {}), location=HERE, **given)


def paths(found: LoweredMounts, name: str) -> list[tuple[str, bool]]:
    return [(entry.path, entry.from_directory) for entry in found.resources[name].entries()]


def test_binds_send_a_directory_with_what_is_in_it_or_one_file(context: BuildContext) -> None:
    sources = ("/", "/dir", "/empty", "/dir/f", "/[x]", "/[x]/a*\\b")
    found = lowered(context, *(BindMount(f"/{index}", source=source) for index, source in enumerate(sources)))
    assert found.mounts == tuple(
        wire.BindMount(target=f"/{index}", resource=f"step-7-mount-{index + 1}")
        for index in range(len(sources))
    )
    assert ("dir/f", True) in paths(found, "step-7-mount-1")
    assert [paths(found, f"step-7-mount-{number}") for number in range(2, 7)] == [
        [("", True), ("f", True), ("sub", True)],
        [("", True)],
        [("f", False)],
        [("", True), ("a*\\b", True)],
        [("a*\\b", False)],
    ]


@pytest.mark.parametrize("source", ["/none", "/n*ne"])
def test_a_bind_of_what_is_not_there_is_told_with_its_place(context: BuildContext, source: str) -> None:
    with pytest.raises(InputError, match="is not in the build context") as caught:
        lowered(context, BindMount("/a", source=source))
    assert caught.value.location == HERE


def test_a_cache_that_begins_with_files_is_another_one_for_other_files(context: BuildContext) -> None:
    empty = CacheMount("/c", "id", Sharing.LOCKED, read_only=True, mode=0o41777, uid=1, gid=2)
    filled = CacheMount("/d", "id", tree=ContextRef(), source="/dir")
    found = lowered(context, empty, filled, beginning=lambda mount: f"abc of {mount.source}")
    assert found.mounts == (
        wire.CacheMount(target="/c", id="id", sharing="locked", read_only=True, mode=0o1777, uid=1, gid=2),
        wire.CacheMount(target="/d", id="id:abc of /dir", resource="step-7-mount-2"),
    )
    assert paths(found, "step-7-mount-2")[0] == ("", True)


def test_a_secret_is_sent_where_it_is_given_and_required_only_then(context: BuildContext) -> None:
    given = SecretMount("s", "/s", "S", mode=0o100440, uid=3, gid=4)
    found = lowered(
        context,
        given,
        SecretMount("none", "/n"),
        SecretMount("none", env="N"),
        TmpfsMount("/t", 9),
        SshMount("none", "/none"),
        SshMount(target="/agent", mode=0o100620, uid=5, gid=6),
        agents={"default"},
        secrets={"s": Secret(b"hunter2")},
    )
    assert found.mounts == (
        wire.SecretMount(resource="step-7-mount-1", target="/s", env="S", mode=0o440, uid=3, gid=4),
        wire.TmpfsMount(target="/t", size=9),
        wire.SshMount(target="/agent", id="default", mode=0o620, uid=5, gid=6),
    )
    assert found.env == {"N": "", "SSH_AUTH_SOCK": "/none"}
    assert found.absent == (secret_option("none"), secret_option("none"), agent_option("none"))
    assert "hunter2" not in repr(found)
    for mount in (SecretMount("none", "/n", required=True), SshMount(target="/agent", required=True)):
        with pytest.raises(InputError) as caught:
            lowered(context, mount)
        assert caught.value.location == HERE


@pytest.mark.parametrize("kind", ["env", "args"])
def test_a_variable_of_the_dockerfile_wins_over_the_socket_of_an_agent(
    context: BuildContext, kind: str
) -> None:
    variables: dict[str, Any] = {kind: {"SSH_AUTH_SOCK": "mine"}}
    run = Run(argv=("x",), mounts=(SshMount(target="/agent"),), **variables)
    assert lower_mounts(run, 7, lambda _: context, {}, agents={"default"}).env == {}


@pytest.mark.parametrize("target", ["/proc/x", "/dev"])
def test_a_target_that_a_run_needs_as_it_is_is_refused_with_its_place(
    context: BuildContext, target: str
) -> None:
    with pytest.raises(InputError, match=f"RUN --mount: nothing can be mounted on '{target}'") as caught:
        lowered(context, TmpfsMount(target))
    assert caught.value.location == HERE
