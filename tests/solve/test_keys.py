"""What is in a key, and what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    ContextRef,
    Copy,
    Download,
    Files,
    GitTree,
    Graph,
    Heredoc,
    ImageRef,
    Network,
    Operation,
    Origin,
    Run,
    Scratch,
    SecretMount,
    Sharing,
    SshMount,
    Stage,
    StageRef,
    Step,
    TmpfsMount,
    TreeRef,
    Workdir,
)
from firebuild_bootstrap.errors import Location
from firebuild_bootstrap.lowering import Place
from firebuild_bootstrap.solve.keys import (
    SCRATCH_KEY,
    Input,
    StageKeys,
    base_key,
    inputs_of,
    keys_of,
    operation_parts,
)

PLATFORM = "linux/amd64"


class Reader:
    """Names everything by what it is called, unless told otherwise."""

    def __init__(self, **digests: str) -> None:
        self.digests = digests

    def image(self, reference: str, platform: str) -> str:
        return self.digests.get(reference, f"sha256:{reference}")

    def files(self, files: Files, copy: Copy) -> Input:
        return Input(self.digests.get(files.pattern, files.pattern), files.pattern)

    def bound(self, mount: BindMount) -> Input:
        return Input(self.digests.get(mount.source, mount.source), mount.source)

    def download(self, download: Download, place: Place) -> str:
        return self.digests.get("download", "sha256:0")

    def commit(self, tree: GitTree, place: Place) -> str:
        return self.digests.get("commit", "c0ffee")


def stage(index: int, base: TreeRef, *operations: Operation, line: int = 1) -> Stage:
    steps = tuple(Step(each, Origin(Location("Dockerfile", line), "TEXT")) for each in operations)
    return Stage(
        index=index,
        base=base,
        origin=Origin(Location("Dockerfile", line), "FROM"),
        platform=PLATFORM,
        steps=steps,
    )


def key(operation: Operation, **digests: str) -> str:
    graph = Graph(stages=(stage(0, ImageRef("debian"), operation),))
    return keys_of(graph, Reader(**digests))[0].key


RUN = Run(argv=("/bin/sh", "-c", "make"), env={"A": "1"}, args={"V": "1"}, workdir="/w", user="1:2")
COPY = Copy(sources=(Files("src"), Heredoc("EOF", "text")), destination="/app")


def test_the_form_of_a_key_does_not_change_by_accident() -> None:
    """A change here throws away everybody's cache: `_FORM` has to change with it, or it is a mistake."""
    run = replace(
        RUN,
        mounts=(
            BindMount("/b", StageRef(7), "/x", writable=True),
            CacheMount("/c", "go", Sharing.LOCKED, Scratch(), "/y", read_only=True, mode=0o700, uid=1, gid=2),
            TmpfsMount("/t", 5),
            SecretMount("token", "/run/secrets/token", "TOKEN", required=True),
            SshMount("default", "/s"),
        ),
        network=Network.NONE,
        script="echo",
    )
    assert operation_parts("p", run, (), PLATFORM).operation == (
        '{"args":{"V":"1"},"argv":["/bin/sh","-c","make"],"env":{"A":"1"},"mounts":['
        '{"target":"/b","type":"BindMount","writable":true},'
        '{"id":"go","target":"/c","type":"CacheMount"},'
        '{"size":5,"target":"/t","type":"TmpfsMount"},'
        '{"env":"TOKEN","gid":0,"id":"token","mode":256,"required":true,"target":"/run/secrets/token",'
        '"type":"SecretMount","uid":0},'
        '{"gid":0,"id":"default","mode":384,"required":false,"target":"/s","type":"SshMount","uid":0}'
        '],"network":"none","script":"echo","type":"Run","user":"1:2","workdir":"/w"}'
    )
    copy = replace(COPY, sources=(*COPY.sources, Download("https://u:p@h/f", "sha256:1"), GitTree("u")))
    assert operation_parts("p", copy, (), PLATFORM).operation == (
        '{"chmod":null,"chown":null,"destination":"/app","exclude":[],"into":false,"link":false,'
        '"parents":false,"sources":[{"type":"Files"},{"content":"text","name":"EOF","type":"Heredoc"},'
        '{"type":"Download"},{"submodules":true,"type":"GitTree"}],"type":"Copy","unpack":false,"workdir":"/"}'
    )
    assert operation_parts("p", Workdir(path="/w"), (), PLATFORM).operation == (
        '{"path":"/w","type":"Workdir","user":"0:0"}'
    )
    parts = operation_parts("p", Workdir(path="/w"), (Input("1"), Input("2")), PLATFORM)
    assert parts.key == "3a99088a84b04689358881dfd29d12b979fa59323d6260a1ee16ba94dd96503c"
    assert (
        base_key("sha256:1", PLATFORM) == "aa84313136ecf8b9827543d3d5ab014899cb03a314168998520e75aa63fb9a0c"
    )
    assert SCRATCH_KEY == "9057548cedfb5d89ffab67d486626c066da60b7eb552395ae693f6ec33574d59"


@pytest.mark.parametrize(
    "changed",
    [
        replace(RUN, argv=("/bin/sh", "-c", "make all")),
        replace(RUN, env={"A": "2"}),
        replace(RUN, args={"V": "2"}),
        replace(RUN, args={**RUN.args, "HTTPS_PROXY": "http://proxy"}),
        replace(RUN, env={}, args={"A": "1", "V": "1"}),
        replace(RUN, workdir="/"),
        replace(RUN, user="0:0"),
        replace(RUN, script="x"),
        replace(RUN, network=Network.NONE),
        replace(RUN, mounts=(TmpfsMount("/t"),)),
        replace(RUN, mounts=(CacheMount("/t", "id"),)),
        replace(RUN, mounts=(SecretMount("id"),)),
        replace(COPY, destination="/srv"),
        replace(COPY, into=True),
        replace(COPY, chown="1"),
        replace(COPY, chmod="755"),
        replace(COPY, link=True),
        replace(COPY, parents=True),
        replace(COPY, exclude=("*.o",)),
        replace(COPY, unpack=True),
        replace(COPY, keyword="ADD"),  # it unpacks archives
        replace(COPY, destination="app", workdir="/w"),
        replace(COPY, sources=(Files("src"), Heredoc("EOF", "text2"))),
        replace(COPY, sources=(Heredoc("EOF", "text"), Files("src"))),
    ],
)
def test_whatever_changes_the_result_changes_the_key(changed: Operation) -> None:
    assert key(changed) != key(RUN if isinstance(changed, Run) else COPY)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (replace(COPY, keyword="ADD", unpack=False), COPY),
        (replace(COPY, workdir="/w"), COPY),
        (replace(COPY, destination="../app/", workdir="/w"), COPY),
        (replace(COPY, destination="//app"), COPY),
        (replace(COPY, chmod="0644"), replace(COPY, chmod="644")),
        (replace(COPY, keyword="ADD", unpack=True), replace(COPY, unpack=True)),
        (replace(COPY, sources=(Files("a", ContextRef("other")),)), replace(COPY, sources=(Files("a"),))),
        (replace(RUN, proxies={"HTTPS_PROXY": "http://me:pass@proxy"}), RUN),
        (
            replace(RUN, mounts=(CacheMount("/c", "go", Sharing.LOCKED, mode=0o700),)),
            replace(RUN, mounts=(CacheMount("/c", "go"),)),
        ),
        (
            Copy(sources=(Download("https://a/x/f", "sha256:AB"),), destination="/"),
            Copy(sources=(Download("http://me:pass@b/f?token", "sha256:ab"),), destination="/"),
        ),
        (
            Copy(sources=(GitTree("https://a", "main"),), destination="/"),
            Copy(sources=(GitTree("https://b", "v1", checksum="c0ff"),), destination="/"),
        ),
    ],
)  # fmt: skip
def test_whatever_leads_to_the_same_result_has_the_same_key(one: Operation, other: Operation) -> None:
    assert key(one) == key(other)


def test_an_input_counts_by_its_content() -> None:
    run = replace(RUN, mounts=(BindMount("/b", ContextRef(), "/src"),))
    download = Copy(sources=(Download("https://h/f"),), destination="/")
    git = Copy(sources=(GitTree("https://h"),), destination="/")
    assert key(COPY) != key(COPY, src="changed")
    assert key(run) != key(run, **{"/src": "changed"})
    assert key(download) != key(download, download="sha256:1")
    assert key(git) != key(git, commit="beef")
    assert key(RUN) != key(RUN, debian="sha256:other")
    # What git writes into `.git` depends on the URL, and so does the name of a download.
    urls = ("a", "b", "https://one:1@h/a.git", "https://two:2@h/a.git")
    kept = [Copy(sources=(GitTree(url, keep_git_dir=True),), destination="/") for url in urls]
    named = [Copy(sources=(Download(f"https://h/{name}"),), destination="/") for name in ("a", "b")]
    assert key(kept[0]) != key(kept[1])
    assert key(kept[2]) == key(kept[3])  # git writes no login
    assert key(replace(git, sources=(GitTree("a", "v1", keep_git_dir=True),))) != key(kept[0])  # but `refs`
    assert key(named[0]) != key(named[1])
    assert key(replace(git, sources=(GitTree("u", subdirectory="a/"),))) != key(git)


def test_the_platform_counts() -> None:
    arm = replace(stage(0, ImageRef("debian"), RUN), platform="linux/arm64")
    assert keys_of(Graph(stages=(arm,)), Reader())[0].key != key(RUN)


def keys(*stages: Stage) -> dict[int, StageKeys]:
    return keys_of(Graph(stages=stages), Reader())


def test_a_stage_counts_by_its_key_and_never_by_its_index_or_line() -> None:
    take = Copy(sources=(Files("/out", StageRef(0)),), destination="/")
    moved = replace(take, sources=(Files("out/", StageRef(3)),))
    run = replace(RUN, mounts=(BindMount("/b", StageRef(0)),))
    moved_run = replace(RUN, mounts=(BindMount("/b", StageRef(3)),))
    before = keys(stage(0, ImageRef("go"), RUN), stage(1, Scratch(), take, run))
    after = keys(
        stage(2, ImageRef("node"), RUN, line=4),
        stage(3, ImageRef("go"), RUN, line=8),
        stage(4, Scratch(), moved, moved_run, line=9),
    )
    assert after[4].key == before[1].key
    assert before[1].steps[0].inputs[0].stage == before[0].key
    changed = keys(stage(0, ImageRef("go"), replace(RUN, user="0")), stage(1, Scratch(), take, run))
    assert changed[1].key != before[1].key


def test_what_a_cache_mount_begins_with_counts() -> None:
    run = replace(RUN, mounts=(CacheMount("/c", "go", tree=ImageRef("go"), source="/x"),))
    assert key(run) != key(run, go="sha256:other")
    assert key(run) != key(replace(RUN, mounts=(CacheMount("/c", "go"),)))
    named = replace(RUN, mounts=(CacheMount("/c", "go", tree=ContextRef("files"), source="/x"),))
    assert key(named) != key(named, **{"/x": "changed"})


def test_where_the_kept_directories_begin_counts() -> None:
    def taken(path: str) -> str:
        copy = Copy(sources=(Files(path, StageRef(0)),), destination="/", parents=True)
        return keys(stage(0, ImageRef("go")), stage(1, Scratch(), copy))[1].key

    assert len({taken("/a/./b/c"), taken("/a/b/./c"), taken("/a/b/c")}) == 3


def test_a_chain_goes_through_the_stages_below() -> None:
    found = keys(
        stage(0, ImageRef("debian"), RUN, COPY),
        stage(1, StageRef(0), Workdir(path="/w")),
        stage(2, StageRef(1)),
        stage(3, Scratch(), COPY),
    )
    assert found[1].chain == (*found[0].steps, *found[1].steps)
    assert found[2].chain == found[1].chain
    assert found[2].key == found[1].key
    assert found[3].base == SCRATCH_KEY
    assert keys(stage(0, ImageRef("debian")))[0].chain == ()
    assert [each.key for each in found[3].chain] == [found[3].key]


def test_a_copy_with_link_has_the_same_key_on_everything_and_what_comes_next_has_not() -> None:
    link = replace(COPY, link=True)
    one = keys(stage(0, ImageRef("debian"), link, link, RUN))[0]
    other = keys(stage(0, ImageRef("other"), RUN, link, link, RUN))[0]
    alone = keys(stage(0, Scratch(), link))[0]
    assert {each.key for each in (*one.steps[:2], *other.steps[1:3])} == {alone.steps[0].key}
    assert one.steps[2].key != other.steps[3].key
    # Once more of it is not the same as once: another layer may have been between them.
    ends = [keys(stage(0, Scratch(), *[link] * count))[0].key for count in range(4)]
    assert len({*ends, *(each.key for each in alone.steps)}) == 5
    assert key(link) != key(COPY)


def test_a_context_is_no_base() -> None:
    with pytest.raises(ValueError, match="context"):
        keys(stage(0, ContextRef("x")))


texts = st.text(max_size=5)
runs = st.builds(
    Run,
    argv=st.lists(texts, max_size=3).map(tuple),
    env=st.dictionaries(texts, texts, max_size=3),
    args=st.dictionaries(texts, texts, max_size=2),
    mounts=st.lists(st.builds(CacheMount, target=texts, id=texts), max_size=2).map(tuple),
)
copies = st.builds(
    Copy,
    sources=st.lists(st.builds(Files, texts) | st.builds(Heredoc, texts, texts), max_size=3).map(tuple),
    destination=texts,
    exclude=st.lists(texts, max_size=2).map(tuple),
)


@given(runs | copies, runs | copies, st.lists(texts, max_size=2), st.lists(texts, max_size=2))
def test_different_operations_have_different_keys(
    one: Any, other: Any, first: list[str], second: list[str]
) -> None:
    def of(operation: Any, digests: list[str]) -> tuple[str, str]:
        parts = operation_parts("p", operation, map(Input, digests), PLATFORM)
        return parts.operation, parts.key

    (form, key_of_one), (other_form, key_of_other) = of(one, first), of(other, second)
    assert (key_of_one == key_of_other) == (form == other_form and first == second)
    assert len(list(inputs_of(one))) == sum(isinstance(each, Files) for each in getattr(one, "sources", ()))
    if isinstance(one, Run):
        turned = replace(one, env=dict(reversed(list(one.env.items()))))
        assert of(turned, first)[1] == key_of_one
