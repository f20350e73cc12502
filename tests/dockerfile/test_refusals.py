"""Flags and features that are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from firebuild_bootstrap.dockerfile import BuildPlan
from firebuild_bootstrap.errors import InputError, Location

Plan = Callable[..., BuildPlan]


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/a/b.git",
        "https://github.com/a/b.git#v1",
        "https://github.com/a/b.git/",
        "https://me:s3cret@github.com/a/b.git?key=s3cret",
        "git@github.com:a/b.git",
        "git://host/a",
        "ssh://git@host/a",
    ],
)
def test_git_repositories_are_not_supported_yet(plan: Plan, url: str) -> None:
    with pytest.raises(InputError, match="git repository is not supported yet") as caught:
        plan(f"FROM scratch\nADD {url} /src/\n")
    assert caught.value.location == Location("Dockerfile", 2)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("RUN --mount=type=cache,target=/c true", "RUN --mount"),
        ("RUN --network=none true", "RUN --network"),
        ("RUN --security=insecure true", "RUN --security"),
        ("RUN --device=x true", "RUN --device"),
        ("COPY --from=builder a b", "COPY --from"),
        ("COPY --parents a b/", "COPY --parents"),
        ("COPY --exclude=*.md . /", "COPY --exclude"),
        ("COPY --link a b", "COPY --link"),
        ("ADD --link=true a b", "ADD --link"),
        ("ADD --keep-git-dir=true a b", "ADD --keep-git-dir"),
        ("ADD --unpack a b", "ADD --unpack"),
        ("ONBUILD RUN true", "ONBUILD"),
        ("FROM scratch", "a second FROM (a multi-stage build)"),
    ],
)
def test_what_is_not_supported_yet_is_refused_at_its_line(plan: Plan, text: str, what: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f"FROM scratch\n\n{text}\n", files={"a": ""})
    assert caught.value.message == f"{what} is not supported yet"
    assert caught.value.location == Location("Dockerfile", 3)


@pytest.mark.parametrize("text", ["COPY --link=false a b", "ADD --keep-git-dir=false --unpack=FALSE a b"])
def test_a_switch_that_is_off_changes_nothing(plan: Plan, text: str) -> None:
    assert len(plan(f"FROM scratch\n{text}\n", files={"a": ""}).steps) == 1


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("COPY --chwon=1 a b", "unknown flag --chwon of COPY", "did you mean --chown?"),
        ("FROM --zzz scratch", "unknown flag --zzz of FROM", "FROM knows --platform"),
        ("ENV --x A=1", "unknown flag --x of ENV", "ENV has no flags"),
        ("CMD --x", "unknown flag --x of CMD", "CMD has no flags"),
        ("COPY --chown=1 --chown=2 a b", "COPY --chown is given twice", None),
        ("COPY --chown a b", "COPY --chown: expected a value: --chown=…", None),
        ("HEALTHCHECK --every=1s CMD x", "unknown flag --every of HEALTHCHECK", None),
    ],
)
def test_an_unknown_or_repeated_flag_is_an_error(
    plan: Plan, text: str, message: str, hint: str | None
) -> None:
    begin = "\n" if text.startswith("FROM") else "FROM scratch\n"
    with pytest.raises(InputError) as caught:
        plan(f"{begin}{text}\n", files={"a": ""})
    assert (caught.value.message, caught.value.location) == (message, Location("Dockerfile", 2))
    if hint:
        assert caught.value.hint == hint


def test_an_arg_before_from_has_no_flags_either(plan: Plan) -> None:
    with pytest.raises(InputError, match="unknown flag --x of ARG"):
        plan("ARG --x A=1\nFROM scratch\n")
