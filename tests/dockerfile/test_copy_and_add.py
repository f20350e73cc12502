"""What COPY and ADD tell the guest, and what they send."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dockerfile.planning import Plan
from firebuild_bootstrap.context import Entry
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.lowering import WireStep
from firebuild_bootstrap.wire import (
    CopyCommand,
)


def copy_of(step: WireStep) -> CopyCommand:
    assert isinstance(step.command, CopyCommand)
    return step.command


def sent(step: WireStep) -> list[Entry]:
    (resource,) = step.resources.values()
    return list(resource.entries())


def contents(step: WireStep) -> dict[str, bytes]:
    def read() -> Iterator[tuple[str, bytes]]:
        for entry in sent(step):
            if entry.open is not None:
                with entry.open() as file:
                    yield entry.path, file.read()

    return dict(read())


_DIGEST = "sha256:" + hashlib.sha256(b"").hexdigest()


def test_every_copy_has_a_source_of_its_own(plan: Plan) -> None:
    made = plan("FROM scratch\nCOPY f /a\nCOPY f /b\n", files={"f": "x"})
    assert [copy_of(step).source for step in made.steps] == ["step-2", "step-3"]


def test_copy_belongs_to_root_whatever_the_user(plan: Plan) -> None:
    command = copy_of(plan("FROM scratch\nUSER app\nWORKDIR /w\nCOPY f g\n", files={"f": ""}).steps[1])
    assert (command.user, command.chown, command.chmod) == ("0:0", None, None)
    assert (command.workdir, command.target, command.target_is_directory) == ("/w", "g", False)


@pytest.mark.parametrize(
    ("target", "directory"),
    [
        ("d/", True),
        ("/", True),
        (".", True),
        ("./", True),
        ("/a/.", True),
        ("d", False),
        ("/a.", False),
    ],
)
def test_the_destination_tells_whether_it_is_a_directory(plan: Plan, target: str, directory: bool) -> None:
    command = copy_of(plan(f"FROM scratch\nCOPY f {target}\n", files={"f": ""}).steps[0])
    assert (command.target, command.target_is_directory) == (target, directory)


@pytest.mark.parametrize(
    ("target", "cleaned", "directory"),
    [
        ("/a/../g", "/g", False),
        ("../../g", "/g", False),
        ("x/../g/", "/w/g/", True),
        ("/a/b/../..", "/", True),
        ("..", "/", True),
        ("/../../etc/", "/etc/", True),
        ("..x/f", "..x/f", False),
    ],
)
@pytest.mark.parametrize("keyword", ["COPY", "ADD"])
def test_a_destination_is_cleaned_before_any_link_is_followed(
    plan: Plan, keyword: str, target: str, cleaned: str, directory: bool
) -> None:
    made = plan(f"FROM scratch\nWORKDIR /w\n{keyword} f {target}\n", files={"f": ""})
    command = copy_of(made.steps[1])
    assert (command.target, command.target_is_directory) == (cleaned, directory)


@pytest.mark.parametrize("sources", ["known_host[s]", "*.none nowhere*/*"])
def test_patterns_that_match_nothing_copy_nothing_and_say_so(plan: Plan, sources: str) -> None:
    made = plan(f"FROM scratch\nCOPY {sources} /x/\nCOPY f /\nCOPY g /\n", files={"f": "1", "g": "2"})
    assert [step.number for step in made.steps] == [2, 3]
    assert [contents(step) for step in made.steps] == [{"f": b"1"}, {"g": b"2"}]
    (warning,) = made.warnings
    shown = ", ".join(repr(source) for source in sources.split())
    assert warning.message == f"nothing matches {shown}, so nothing is copied"
    assert warning.location == Location("Dockerfile", 2)


def test_with_parents_the_destination_is_made_and_it_is_said_that_nothing_matches(plan: Plan) -> None:
    made = plan("FROM scratch\nCOPY --parents *.none /x/\n", files={"f": "1"})
    assert [contents(step) for step in made.steps] == [{}]
    (warning,) = made.warnings
    assert warning.message == "nothing matches '*.none', so only the destination is made"


def test_an_empty_destination_is_the_working_directory(plan: Plan) -> None:
    command = copy_of(plan('FROM scratch\nCOPY ["f", ""]\n', files={"f": ""}).steps[0])
    assert (command.target, command.target_is_directory) == (".", True)


def test_names_with_spaces_may_be_quoted_or_in_json(plan: Plan) -> None:
    made = plan('FROM scratch\nCOPY ["a b", "/x y/"]\nCOPY "a b" a\\ b /d/\n', files={"a b": "content"})
    assert contents(made.steps[0]) == {"a b": b"content"}
    assert copy_of(made.steps[0]).target == "/x y/"
    assert [entry.path for entry in sent(made.steps[1])] == ["a b", "a b"]


@pytest.mark.parametrize("sources", ["a b", "*.txt", "a <<E"])
@pytest.mark.parametrize("keyword", ["COPY", "ADD"])
def test_several_sources_need_a_destination_that_ends_in_a_slash(
    plan: Plan, keyword: str, sources: str
) -> None:
    body = "\nE" if "<<" in sources else ""
    files = {"a": "", "b": "", "1.txt": "", "2.txt": ""}
    with pytest.raises(InputError) as caught:
        plan(f"FROM scratch\n\n{keyword} {sources} dest{body}\n", files=files)
    assert (
        caught.value.message
        == f"{keyword} of several sources needs a destination that ends in /, found 'dest'"
    )
    assert (caught.value.hint, caught.value.location) == ("write dest/", Location("Dockerfile", 3))
    assert len(sent(plan(f"FROM scratch\n{keyword} {sources} dest/{body}\n").steps[0])) == 2


def test_a_pattern_that_matches_one_file_may_be_renamed(plan: Plan) -> None:
    assert len(sent(plan("FROM scratch\nCOPY *.txt dest\n", files={"1.txt": ""}).steps[0])) == 1


@pytest.mark.parametrize("text", ["COPY a", "ADD a", "COPY"])
def test_a_copy_without_destination_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="expected a source and a destination") as caught:
        plan(f"FROM scratch\n{text}\n", files={"a": ""})
    assert caught.value.location == Location("Dockerfile", 2)


def test_a_missing_source_is_reported_with_its_line_and_the_nearest_names(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        plan("FROM scratch\nCOPY package.jsn .\n", files={"package.json": "", "other": ""})
    assert "'package.jsn' is not in the build context" in caught.value.message
    assert caught.value.location == Location("Dockerfile", 2)
    assert "package.json" in str(caught.value.hint)


def test_all_wrong_sources_are_reported_together(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        plan(
            "FROM scratch\nCOPY a\nRUN --mount=type=cache true\nADD --chmod=x b .\n"
            "STOPSIGNAL $unset\nCOPY c .\n"
        )
    assert caught.value.location == Location("Dockerfile", 2)
    hint = str(caught.value.hint)
    assert [f"also Dockerfile:{line}: " in hint for line in (3, 4, 5, 6)] == [True, True, True, False]


def test_all_missing_sources_are_reported_together(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        plan("FROM scratch\nCOPY a .\nCOPY f .\nADD b .\n", files={"f": ""})
    assert caught.value.message.startswith("'a' is not in the build context ")
    assert "also Dockerfile:4: 'b' is not in" in str(caught.value.hint)


def test_no_more_wrong_sources_are_looked_at_than_are_reported(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        plan("FROM scratch\n" + "COPY missing .\n" * 5000)
    assert str(caught.value.hint).count("also Dockerfile:") == 10


def test_heredocs_become_files(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nARG A=1\nCOPY <<one <<'two' <<-three f /d/\n"
        "$A \"$A\" '$A' \\$A\none\n$A\ntwo\n\t\ttab\n\tthree\n",
        files={"f": "file"},
    )
    assert contents(made.steps[0]) == {
        "one": b"1 \"1\" '1' $A\n",
        "two": b"$A\n",
        "three": b"tab\n",
        "f": b"file",
    }
    assert [entry.mode for entry in sent(made.steps[0])][:3] == [0o644] * 3
    assert made.steps[0].instruction == "COPY <<one <<'two' <<-three f /d/ …"


def test_a_heredoc_may_be_renamed_and_keeps_its_line_ends(plan: Plan) -> None:
    made = plan("FROM scratch\r\nADD <<E /etc/motd\r\nhi\r\nE\r\n")
    assert copy_of(made.steps[0]).target == "/etc/motd"
    assert contents(made.steps[0]) == {"E": b"hi\r\n"}


def test_a_failing_substitution_in_a_heredoc_is_an_error_without_the_whole_text(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        plan("FROM scratch\nCOPY <<E /f\nlong text ${\nE\n")
    assert "long text" not in caught.value.message
    assert caught.value.location == Location("Dockerfile", 2)


def test_a_heredoc_is_no_destination(plan: Plan) -> None:
    with pytest.raises(InputError, match="the destination can't be a heredoc"):
        plan("FROM scratch\nCOPY f <<E\nE\n", files={"f": ""})


def test_what_looks_like_a_heredoc_in_json_is_a_name(plan: Plan) -> None:
    made = plan('FROM scratch\nCOPY ["<<E", "<<F"]\n', files={"<<E": "x"})
    assert copy_of(made.steps[0]).target == "<<F"


@pytest.mark.parametrize(
    "mode", ["0", "644", "0755", "4755", "u=rwX,go=rX", "+x", "a-w,u+s", "g=u", "=", "u=rw-x"]
)
def test_modes_are_octal_or_symbolic(plan: Plan, mode: str) -> None:
    assert copy_of(plan(f"FROM scratch\nCOPY --chmod={mode} f /\n", files={"f": ""}).steps[0]).chmod == mode


def test_zeros_in_front_of_a_mode_say_nothing(plan: Plan) -> None:
    made = plan("FROM scratch\nCOPY --chmod=000755 f /\n", files={"f": ""})
    assert copy_of(made.steps[0]).chmod == "0755"


@pytest.mark.parametrize("mode", ["8", "10000", "0o755", "rwx", "u", "z+x", "u+x,", "755 "])
def test_a_wrong_mode_is_an_error(plan: Plan, mode: str) -> None:
    with pytest.raises(InputError, match="--chmod: expected an octal mode") as caught:
        plan(f'FROM scratch\nCOPY --chmod="{mode}" f /\n', files={"f": ""})
    assert caught.value.location == Location("Dockerfile", 2)


@pytest.mark.parametrize("owner", ["0", "1000:1000", "app", "app:staff", "1000:staff", "DOMAIN.user"])
def test_owners_are_names_or_numbers(plan: Plan, owner: str) -> None:
    assert copy_of(plan(f"FROM scratch\nADD --chown={owner} f /\n", files={"f": ""}).steps[0]).chown == owner


@pytest.mark.parametrize(
    ("owner", "meant"),
    [("1000:", "1000"), ("app:", "app"), (":1000", "0:1000"), (":staff", "0:staff"), (":", "0")],
)
def test_half_an_owner_is_what_buildkit_makes_of_it(plan: Plan, owner: str, meant: str) -> None:
    made = plan(f"FROM scratch\nCOPY --chown={owner} f /\n", files={"f": ""})
    assert copy_of(made.steps[0]).chown == meant


@pytest.mark.parametrize("value", ["", "$unset", '""'])
@pytest.mark.parametrize("flag", ["chown", "chmod"])
def test_an_empty_owner_or_mode_is_as_if_it_were_not_there_and_said(
    plan: Plan, flag: str, value: str
) -> None:
    made = plan(f"FROM scratch\nCOPY --{flag}={value} f /\n", files={"f": ""})
    assert (copy_of(made.steps[0]).chown, copy_of(made.steps[0]).chmod) == (None, None)
    (warning,) = made.warnings
    assert warning.message == f"COPY --{flag} is empty, which is as if it were not there"
    assert warning.location == Location("Dockerfile", 2)


@pytest.mark.parametrize("owner", ["a:b:c", "::", "'a b'"])
def test_a_wrong_owner_is_an_error(plan: Plan, owner: str) -> None:
    with pytest.raises(InputError, match="--chown: expected user or user:group"):
        plan(f"FROM scratch\nCOPY --chown={owner} f /\n", files={"f": ""})


@pytest.mark.parametrize(
    "line",
    [
        "COPY --chown=4294967295 f /",
        "ADD --chown=0:4294967296 f /",
        "USER 99999999999999999999:0",
        "USER a:4294967295",
    ],
)
def test_an_id_that_names_nobody_is_an_error_at_its_line(plan: Plan, line: str) -> None:
    with pytest.raises(InputError, match="an id is 4294967294 at most") as failed:
        plan(f"FROM scratch\n{line}\n", files={"f": ""})
    assert failed.value.location == Location("Dockerfile", 2)


def test_the_largest_id_is_taken(plan: Plan) -> None:
    made = plan("FROM scratch\nCOPY --chown=4294967294:04294967294 f /\nUSER 4294967294\n", files={"f": ""})
    assert copy_of(made.steps[0]).chown == "4294967294:04294967294"


def test_copy_can_not_download(plan: Plan) -> None:
    with pytest.raises(InputError, match="COPY can't download") as caught:
        plan("FROM scratch\nCOPY https://example.invalid/x /\n")
    assert caught.value.hint == "use ADD"


def test_other_protocols_are_errors(plan: Plan) -> None:
    with pytest.raises(InputError, match="expected http://, https://, git:// or ssh://, found 'ftp://'"):
        plan("FROM scratch\nADD ftp://host/f /\n")


def test_a_url_without_a_file_name_needs_one_in_the_destination(plan: Plan) -> None:
    with pytest.raises(InputError, match="has no file name"):
        plan("FROM scratch\nADD https://example.invalid/ /d/\n")


@pytest.mark.parametrize(
    "sources", ["f", "https://example.invalid/a https://example.invalid/b", "<<E /d/\nE\n#"]
)
def test_a_checksum_is_for_a_single_download_only(plan: Plan, sources: str) -> None:
    with pytest.raises(InputError, match="--checksum needs exactly one source, and that a URL") as caught:
        plan(f"FROM scratch\nADD --checksum={_DIGEST} {sources} /d/\n", files={"f": ""})
    assert caught.value.location == Location("Dockerfile", 2)


@pytest.mark.parametrize("text", ["", "sha256:abc", "md5:" + "0" * 32, _DIGEST.upper(), "0" * 64])
def test_a_malformed_checksum_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="--checksum: expected sha256:"):
        plan(f"FROM scratch\nADD --checksum={text} https://example.invalid/a /d/\n")


def test_an_archive_is_unpacked_by_add_and_not_by_copy(plan: Plan, context_dir: Path) -> None:
    (context_dir / "inside").write_text("x")
    with tarfile.open(context_dir / "a.tar", "w") as archive:
        archive.add(context_dir / "inside", "inside")
    made = plan("FROM scratch\nADD a.tar /d/\nCOPY a.tar /d/\n")
    added, copied = ([*sent(step)] for step in made.steps)
    assert [(entry.path, entry.from_directory) for entry in added] == [("inside", True)]
    assert added[0].owner is not None
    assert [(entry.path, entry.kind, entry.from_directory) for entry in copied] == [
        ("a.tar", tar.FILE, False)
    ]
