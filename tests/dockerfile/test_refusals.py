"""Flags and features that are refused."""

from __future__ import annotations

import pytest

from dockerfile.planning import Plan, Read
from firebuild_bootstrap.errors import InputError, Location


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RUN --security=insecure true", "RUN --security=insecure is not supported: every RUN is confined"),
        ("RUN --device=x true", "RUN --device is not supported: a build has no devices"),
        (
            "FROM --platform=windows/amd64 scratch",
            "FROM --platform=windows/amd64 is not supported: only images for Linux can be built",
        ),
        (
            "FROM --platform=linux/arm64 debian",
            "FROM --platform=linux/arm64 is not supported for images: the store has linux/amd64 only",
        ),
        (
            "FROM --platform=linux/arm64 scratch\nRUN true",
            "RUN in a stage for linux/arm64 is not supported: the machine can't execute that",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_at_its_line(read: Read, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(f"FROM scratch\n\n{text}\n")
    assert caught.value.message == message
    assert caught.value.location == Location("Dockerfile", 3 + text.count("\n"))


def test_all_that_cannot_be_done_is_said_at_once(read: Read) -> None:
    with pytest.raises(InputError) as caught:
        read(
            "FROM scratch AS unneeded\nRUN --device=x true\n"
            "FROM scratch\nRUN --security=insecure true\nCOPY --chmod=x a b\n"
        )
    assert caught.value.location == Location("Dockerfile", 2)
    hint = str(caught.value.hint)
    assert "also Dockerfile:4: RUN --security=insecure" in hint
    assert "also Dockerfile:5: --chmod" in hint


@pytest.mark.parametrize("text", ["COPY --link=false a b", "ADD --keep-git-dir=false a b"])
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
        ("COPY --link --link a b", "COPY --link is given twice", None),
        ("COPY --link=1 a b", "COPY --link: expected true or false, found '1'", None),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MAINTAINER", "MAINTAINER: expected a name"),
        ("ARG", "ARG: expected a name"),
        ("ARG =1", "ARG: expected a name before =, found '=1'"),
        ("STOPSIGNAL", "STOPSIGNAL: expected a value, found nothing"),
        ("EXPOSE [::x]:80:80", "is not an IP address"),
        ("EXPOSE 80-82:80-81", "the ranges differ in length"),
        ("EXPOSE 80/quic", "the protocol is tcp, udp or sctp"),
        ("ARG empty\nCOPY $empty /x", "a source is empty"),
        ("COPY --exclude=[ a /b", "COPY --exclude: the pattern '[' is malformed: "),
        ("ARG a=b\nENV x=${a/\\q/x}", "invalid pattern (\\q) in substitution: "),
    ],
)
def test_an_instruction_that_lacks_or_misspells_something_is_refused(
    read: Read, text: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(f"FROM scratch\n{text}\n")
    assert message in caught.value.message
