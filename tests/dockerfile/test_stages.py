"""Stages: what refers to what, and what of it is needed."""

from __future__ import annotations

import pytest

from dockerfile.planning import Bases, Read
from firebuild_bootstrap.dockerfile.graph import (
    ContextRef,
    Copy,
    Files,
    Graph,
    ImageRef,
    Run,
    Scratch,
    Stage,
    StageRef,
    TreeRef,
    canonical,
)
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig


def runs(stage: Stage) -> list[Run]:
    return [step.operation for step in stage.steps if isinstance(step.operation, Run)]


def copied(graph: Graph) -> list[TreeRef]:
    copies = [step.operation for step in graph.target.steps if isinstance(step.operation, Copy)]
    return [source.tree for copy in copies for source in copy.sources if isinstance(source, Files)]


# --- what refers to what ---------------------------------------------------------------------------


def test_files_come_from_stages_by_name_and_index_and_from_images(read: Read, bases: Bases) -> None:
    bases.images = {"tools:1": ImageConfig()}
    graph = read(
        "FROM scratch AS Build\nFROM scratch\nFROM scratch\n"
        "COPY --from=bUILD a /\nCOPY --from=1 a /\nCOPY --from=tools:1 a /\n"
        "COPY --from=scratch a /\nCOPY --from= a /\n"
    )
    assert copied(graph) == [StageRef(0), StageRef(1), ImageRef("tools:1"), Scratch(), ContextRef()]
    assert [(stage.index, stage.name, stage.title) for stage in graph.stages] == [
        (0, "build", "build"),
        (1, "", "1"),
        (2, "", "2"),
    ]
    assert graph.stage(1) is graph.stages[1]
    assert list(graph.target.trees()) == [Scratch(), *copied(graph)]


@pytest.mark.parametrize(
    "needs",
    [
        "FROM s{0} AS s{1}\n",
        "FROM scratch AS s{1}\nCOPY --from=s{0} f /\n",
        "FROM scratch AS s{1}\nRUN --mount=type=bind,from=s{0},target=/m true\n",
    ],
)
@pytest.mark.parametrize("every_stage", [False, True])
def test_stages_need_one_another_in_a_row_of_a_bounded_length(
    read: Read, needs: str, every_stage: bool
) -> None:
    def text(count: int) -> str:
        return "FROM scratch AS s0\n" + "".join(needs.format(at, at + 1) for at in range(count))

    assert len(read(text(64), every_stage=every_stage).stages) == 65
    for count in (65, 3_000):
        with pytest.raises(InputError, match="more than 64 stages need one another in a row") as caught:
            read(text(count), every_stage=every_stage)
        assert caught.value.location is not None
        assert caught.value.location.line > 1


def test_a_stage_begins_where_an_earlier_one_ends(read: Read, bases: Bases) -> None:
    bases.images["debian"] = ImageConfig(env={"PATH": "/bin"}, cmd=("sh",), user="app")
    graph = read(
        "FROM debian AS one\nENV A=1\nWORKDIR /w\nLABEL a=b\nEXPOSE 80\nVOLUME /v\nCMD own\n"
        "FROM one\nENV B=2\nENTRYPOINT x\nRUN y\n"
    )
    one, two = graph.stages
    assert (one.base, two.base) == (ImageRef("debian"), StageRef(0))
    config = two.config
    assert config.env == {"PATH": "/bin", "A": "1", "B": "2"}
    assert (config.workdir, config.user, config.labels) == ("/w", "app", {"a": "b"})
    assert (config.exposed_ports, config.volumes) == (("80/tcp",), ("/v",))
    # The CMD is that of another stage, so it was written for another ENTRYPOINT.
    assert (config.cmd, one.config.cmd) == (None, ("/bin/sh", "-c", "own"))
    assert (runs(two)[0].workdir, runs(two)[0].user) == ("/w", "app")


def test_arguments_of_a_stage_go_on_in_its_children_but_an_env_wins(read: Read) -> None:
    graph = read(
        "FROM scratch AS one\nENV BOTH=env\nARG BOTH=arg\nARG OWN=1\nRUN x\n"
        "FROM one\nRUN y\nARG OWN=2\nRUN z\n"
    )
    (first,), (second, third) = runs(graph.stages[0]), runs(graph.stages[1])
    assert first.args == {"BOTH": "arg", "OWN": "1"}
    assert (second.args, second.env["BOTH"]) == ({"OWN": "1"}, "env")
    assert third.args == {"OWN": "2"}
    assert "OWN" not in graph.target.config.env


def test_an_argument_before_from_is_for_from_and_for_stages_that_declare_it(read: Read, bases: Bases) -> None:
    bases.images = {"debian:12": ImageConfig(), "alpine:12": ImageConfig()}
    graph = read(
        "ARG V=12\nFROM debian:$V AS a\nRUN x\nFROM alpine:${V}\nARG V\nRUN y\nCOPY --from=a / /\n",
        build_args={"UNUSED": "1"},
    )
    assert [stage.base for stage in graph.stages] == [ImageRef("debian:12"), ImageRef("alpine:12")]
    assert [runs(stage)[0].args for stage in graph.stages] == [{}, {"V": "12"}]
    (warning,) = graph.warnings
    assert warning.message.startswith("the build argument UNUSED is not declared")


@pytest.mark.parametrize(
    ("target", "stage"), [(None, "last"), ("last", "last"), ("ONE", "one"), ("TWO", "two"), ("1", "two")]
)
def test_every_stage_is_told_the_target(read: Read, target: str | None, stage: str) -> None:
    text = "".join(f"FROM scratch AS {name}\nARG TARGETSTAGE\nRUN x\n" for name in ("one", "two", "last"))
    graph = read(text, target=target)
    assert (graph.target.name, runs(graph.target)[0].args) == (stage, {"TARGETSTAGE": target or "last"})


def test_of_two_stages_with_one_name_the_later_is_meant(read: Read) -> None:
    graph = read("FROM scratch AS a\nFROM a AS a\nFROM a\nCOPY --from=a x y\n")
    assert [stage.base for stage in graph.stages] == [Scratch(), StageRef(0), StageRef(1)]
    assert copied(graph) == [StageRef(1)]


# --- what is needed --------------------------------------------------------------------------------


def test_only_what_the_target_needs_is_read_and_resolved(read: Read, bases: Bases) -> None:
    bases.images["debian"] = ImageConfig()
    graph = read(
        "FROM nowhere AS unneeded\nARG GIVEN\nCOPY $unset /\n"
        "FROM debian AS base\nFROM base AS left\nFROM scratch AS right\nCOPY --from=left a b\n"
        "FROM nowhere\n",
        target="right",
        build_args={"GIVEN": "1"},
    )
    assert [stage.name for stage in graph.stages] == ["base", "left", "right"]
    assert bases.asked == ["debian"]
    assert graph.warnings == ()


@pytest.mark.parametrize(
    "text",
    [
        "COPY --wrong=1 a b",
        "COPY a",
        "RUN --mount=type=cache,from=$x,target=/c true",
        "RUN --network=wire true",
        "ONBUILD FROM x",
        "ENV --x A=1",
    ],
)
def test_what_is_not_needed_is_parsed(read: Read, text: str) -> None:
    with pytest.raises(InputError) as caught:
        read(f"FROM scratch\n{text}\nFROM scratch\n")
    assert caught.value.location == Location("Dockerfile", 2)


def test_an_image_is_asked_for_once(read: Read, bases: Bases) -> None:
    bases.images["debian"] = ImageConfig()
    read("FROM debian\nFROM debian\nCOPY --from=debian a b\nCOPY --from=0 a b\n")
    assert bases.asked == ["debian"]


# --- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("FROM scratch AS a\nCOPY --from=a x y\n", 2, "the stage 'a' can't take files from itself"),
        ("FROM scratch\nCOPY --from=0 x y\n", 2, "the stage 0 can't take files from itself"),
        (
            "FROM scratch\nCOPY --from=b x y\nFROM scratch AS b\nCOPY --from=0 x y\n",
            2,
            "the stage 'b' comes after the stage 0, which takes files from it",
        ),
        ("FROM scratch\nCOPY --from=7 x y\n", 2, "there is no stage 7"),
        ("FROM scratch\nCOPY --from=-1 x y\n", 2, "there is no stage -1"),
        ("ARG n=a\nFROM scratch AS a\nFROM scratch\nCOPY --from=$n x y\n", 4, "COPY --from can't hold var"),
        ("FROM scratch AS builder\nFROM scratch\nCOPY --from=bulder x y\n", 3, "there is no image 'bulder'"),
        ("FROM later\nFROM scratch AS later\nCOPY --from=0 x y\n", 1, "there is no image 'later'"),
    ],
)
def test_what_cannot_be_had_is_an_error_at_its_line(read: Read, text: str, line: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text)
    assert message in caught.value.message
    assert caught.value.location == Location("Dockerfile", line)


def test_a_misspelt_stage_is_suggested(read: Read) -> None:
    with pytest.raises(InputError) as caught:
        read("FROM scratch AS builder\nFROM scratch\nCOPY --from=bulder x y\n")
    assert caught.value.hint == "did you mean builder?"


def test_the_mistakes_of_all_needed_stages_are_said_at_once(read: Read) -> None:
    with pytest.raises(InputError) as caught:
        read(
            "FROM scratch AS one\nCOPY --chmod=x a b\nFROM one AS two\nSTOPSIGNAL nothing\n"
            "FROM two\nRUN --network=x y\nFROM one\nCOPY --from=two a b\nADD a\n"
        )
    assert caught.value.location == Location("Dockerfile", 2)
    hint = str(caught.value.hint)
    assert [f"also Dockerfile:{line}: " in hint for line in (4, 6, 9)] == [True, True, True]


def test_no_more_mistakes_are_looked_for_than_are_shown(read: Read) -> None:
    with pytest.raises(InputError) as caught:
        read("FROM scratch\n" + "COPY a\n" * 100)
    assert str(caught.value.hint).count("also Dockerfile:") == 10


# --- platforms -------------------------------------------------------------------------------------


def test_a_stage_for_another_platform_can_do_all_but_run(read: Read) -> None:
    graph = read(
        "FROM --platform=$BUILDPLATFORM scratch AS build\nRUN cross\n"
        "FROM --platform=linux/arm64 scratch AS arm\nCOPY --from=build a b\nWORKDIR /w\n"
        "FROM --platform=linux/amd64 arm\nENV A=1\n"
    )
    assert [stage.platform for stage in graph.stages] == ["linux/amd64", "linux/arm64", "linux/arm64"]


# --- other contexts --------------------------------------------------------------------------------


def test_a_named_context_replaces_images_and_stages_of_its_name(read: Read, bases: Bases) -> None:
    bases.images["mirror:1"] = ImageConfig(env={"A": "1"})
    graph = read(
        "FROM docker.io/library/debian AS a\nRUN x\nFROM alpine:3 AS b\nRUN y\n"
        "FROM scratch\nCOPY --from=a x y\nCOPY --from=b x y\nCOPY --from=src x y\nCOPY --from=scratch x y\n",
        contexts={
            "debian": ImageRef("mirror:1"),
            "b": ContextRef("b"),
            "src": ContextRef("src"),
            "scratch": ContextRef("scratch"),
            "spare": ContextRef("spare"),
        },
    )
    first, second, _ = graph.stages
    assert (first.base, first.config.env["A"], len(first.steps)) == (ImageRef("mirror:1"), "1", 1)
    # All of the stage is replaced, not only what it begins with.
    (step,) = second.steps
    assert (second.base, step.operation) == (
        Scratch(),
        Copy(sources=(Files("/", ContextRef("b")),), destination="/", into=True),
    )
    assert copied(graph) == [StageRef(0), StageRef(1), ContextRef("src"), Scratch()]
    assert graph.unused_contexts == ("scratch", "spare")


@pytest.mark.parametrize("line", ["COPY --from=lib a b", "RUN --mount=from=lib,target=/l x"])
def test_an_image_that_stands_for_a_name_has_to_exist(read: Read, bases: Bases, line: str) -> None:
    bases.images["known"] = ImageConfig()
    text = f"FROM scratch\n{line}\n"
    assert ImageRef("known") in read(text, contexts={"lib": ImageRef("known")}).target.trees()
    with pytest.raises(InputError, match="unknown"):
        read(text, contexts={"lib": ImageRef("unknown")})


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "FROM b AS a\nFROM a AS b\n",
            "FROM knows the stages before it: move the stage 'b' up, before line 1",
        ),
        ("FROM scratch\nCOPY --from=lib a b\n", "did you mean lbi?"),
        ("FROM aa AS aa\n", "import it first"),
    ],
)
def test_a_name_that_is_no_image_is_explained(read: Read, text: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text, contexts={"lbi": ContextRef("lbi")})
    assert caught.value.hint == hint


# --- the form for keys -----------------------------------------------------------------------------


def test_the_canonical_form_is_the_same_however_the_input_is_ordered(read: Read) -> None:
    text = (
        "ARG X\nFROM scratch AS a\nARG X\nARG Y=2\nENV B=1 A=2\nLABEL b=1 a=2\n"
        "RUN --mount=type=cache,id=c,target=/c --mount=type=secret,id=s,env=S make\n"
        "COPY --exclude=x --chmod=u=rwX . /d/\nCOPY <<E /f\ntext\nE\n"
    )
    forms = {
        canonical(read(text, build_args=dict(pairs)))
        for pairs in ([("X", "1"), ("Y", "3")], [("Y", "3"), ("X", "1")])
    }
    (form,) = forms
    # No clock, no directory of this host: written down here once, it is the same on every machine.
    assert canonical(read(text, build_args={"X": "1", "Y": "3"}).target.steps[0].operation) == (
        '{"args":{"X":"1","Y":"3"},"argv":["/bin/sh","-c","make"],'
        '"env":{"A":"2","B":"1","PATH":"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},'
        '"mounts":[{"gid":0,"id":"c","mode":493,"read_only":false,"sharing":"shared","source":"/","target":"/c",'
        '"tree":{"type":"Scratch"},"type":"CacheMount","uid":0},'
        '{"env":"S","gid":0,"id":"s","mode":256,"required":false,"target":"","type":"SecretMount","uid":0}],'
        '"network":"default","proxies":{},"script":null,"type":"Run","user":"0:0","workdir":"/"}'
    )
    assert "/tmp" not in form


def test_a_proxy_is_a_build_argument_like_any_other_where_an_arg_declares_it(read: Read) -> None:
    for declared in ("", "ARG HTTP_PROXY\n"):
        given = {"HTTP_PROXY": "http://proxy"}
        run = read(f"FROM scratch\n{declared}RUN make\n", build_args=given).target.steps[0].operation
        assert isinstance(run, Run)
        assert (run.args, run.proxies) == ((given, {}) if declared else ({}, given))


def test_a_key_depends_on_what_is_done_and_not_on_where_it_stands(read: Read) -> None:
    texts = ("FROM scratch\nCOPY a b\n", "# a comment\n\nFROM scratch\n\ncopy   a \\\n  b\n")
    one, two = (read(text).target.steps[0].operation for text in texts)
    assert canonical(one) == canonical(two)
