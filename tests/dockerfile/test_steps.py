"""What the guest is told to execute."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from firebuild_bootstrap.context import Entry, EntryKind
from firebuild_bootstrap.dockerfile import BuildPlan, Step
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.wire import (
    DEFAULT_PATH,
    CopyCommand,
    RunCommand,
    WorkdirCommand,
    decode_command,
    encode_command,
)

Plan = Callable[..., BuildPlan]


class Bases(Protocol):
    images: dict[str, ImageConfig]


def run_of(step: Step) -> RunCommand:
    assert isinstance(step.command, RunCommand)
    return step.command


def copy_of(step: Step) -> CopyCommand:
    assert isinstance(step.command, CopyCommand)
    return step.command


def sent(step: Step) -> list[Entry]:
    assert step.resource is not None
    return list(step.resource.entries())


def contents(step: Step) -> dict[str, bytes]:
    def read() -> Iterator[tuple[str, bytes]]:
        for entry in sent(step):
            if entry.open is not None:
                with entry.open() as file:
                    yield entry.path, file.read()

    return dict(read())


def test_steps_count_from_two_and_only_what_the_guest_executes_counts(plan: Plan) -> None:
    made = plan(
        "# a\nFROM scratch\nENV A=1\nRUN one\nLABEL b=2\nWORKDIR /w\nCOPY f .\nRUN two\n", files={"f": ""}
    )
    assert [(step.number, step.line, step.instruction) for step in made.steps] == [
        (2, 4, "RUN one"),
        (3, 6, "WORKDIR /w"),
        (4, 7, "COPY f ."),
        (5, 8, "RUN two"),
    ]
    assert [step.command.step for step in made.steps] == [2, 3, 4, 5]
    assert (made.total, made.base, made.base_line) == (5, "scratch", 2)


def test_every_command_survives_the_wire(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nRUN a\nRUN <<E\n#!/bin/sh\nE\nUSER u:g\nWORKDIR w\n"
        "COPY --chown=1 --chmod=u+x f d/\nADD f g\n",
        files={"f": ""},
    )
    for step in made.steps:
        assert decode_command(encode_command(step.command)) == step.command


# --- RUN --------------------------------------------------------------------------------------------


def test_run_has_the_environment_user_directory_and_shell_of_its_place(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nRUN one\nENV A=1\nUSER app\nWORKDIR /w\n"
        'SHELL ["/bin/bash", "-ec"]\nRUN two "x  y"\nENV B=2\n'
    )
    first, second = run_of(made.steps[0]), run_of(made.steps[2])
    assert (first.argv, first.env) == (("/bin/sh", "-c", "one"), {"PATH": DEFAULT_PATH})
    assert (first.user, first.workdir) == ("0:0", "/")
    assert second.argv == ("/bin/bash", "-ec", 'two "x  y"')
    assert second.env == {"PATH": DEFAULT_PATH, "A": "1"}
    assert (second.user, second.workdir) == ("app", "/w")


def test_the_default_path_yields_to_one_of_the_image(plan: Plan) -> None:
    assert (
        run_of(plan("FROM scratch\nENV PATH=/opt:$PATH\nRUN x\n").steps[0]).env["PATH"]
        == f"/opt:{DEFAULT_PATH}"
    )


def test_the_json_form_is_executed_as_it_stands(plan: Plan) -> None:
    made = plan('FROM scratch\nRUN ["/bin/echo", "$HOME", "a b"]\n')
    assert run_of(made.steps[0]).argv == ("/bin/echo", "$HOME", "a b")


@pytest.mark.parametrize("text", ["RUN", "RUN []"])
def test_a_run_of_nothing_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="RUN: expected a command"):
        plan(f"FROM scratch\n{text}\n")


def test_a_heredoc_is_text_for_the_shell(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN <<EOF\necho $A\n\techo b\nEOF\n").steps[0])
    assert command.argv == ("/bin/sh", "-c", "echo $A\n\techo b\n")
    assert command.script is None


def test_a_heredoc_with_an_interpreter_is_a_script(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN <<EOF\n#!/usr/bin/python3\nprint($A)\nEOF\n").steps[0])
    assert command.script == "#!/usr/bin/python3\nprint($A)\n"
    assert command.argv[-1] == command.script


def test_a_dash_strips_leading_tabs_from_a_heredoc(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN <<-EOF\n\t\techo a\n\t  echo b\n\tEOF\n").steps[0])
    assert command.argv[-1] == "echo a\n  echo b\n"


def test_heredocs_of_a_command_are_left_to_the_shell(plan: Plan) -> None:
    text = "cat <<A - <<'B'\none $x\nA\ntwo $x\nB\n"
    command = run_of(plan(f"FROM scratch\nRUN {text}RUN next\n").steps[0])
    assert command.argv == ("/bin/sh", "-c", text)
    assert command.script is None


def test_a_heredoc_for_a_program_is_no_script_even_with_an_interpreter_line(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN cat <<A\n#!/bin/sh\nA\n").steps[0])
    assert (command.script, command.argv[-1]) == (None, "cat <<A\n#!/bin/sh\nA\n")


def test_crlf_does_not_reach_the_shell_through_a_heredoc(plan: Plan) -> None:
    made = plan(
        "FROM scratch\r\nRUN <<EOF\r\nif true; then\r\n echo\r\nfi\r\nEOF\r\nRUN cat <<E\r\nx\r\nE\r\n"
    )
    assert run_of(made.steps[0]).argv[-1] == "if true; then\n echo\nfi\n"
    assert run_of(made.steps[1]).argv[-1] == "cat <<E\nx\nE\n"


# --- WORKDIR ----------------------------------------------------------------------------------------


def test_workdirs_chain_and_belong_to_the_user_of_their_place(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nWORKDIR a\nUSER u\nWORKDIR b/../c/\nWORKDIR /x//y\nWORKDIR //z\nWORKDIR ../../..\n"
    )
    assert [step.command for step in made.steps[:2]] == [
        WorkdirCommand(step=2, original="WORKDIR a", workdir="/a", user="0:0"),
        WorkdirCommand(step=3, original="WORKDIR b/../c/", workdir="/a/c", user="u"),
    ]
    assert [step.command.workdir for step in made.steps[2:]] == ["/x/y", "/z", "/"]
    assert made.config.workdir == "/"


@pytest.mark.parametrize("text", ["WORKDIR", "WORKDIR $unset", 'WORKDIR ""'])
def test_an_empty_workdir_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="WORKDIR: expected a value"):
        plan(f"FROM scratch\n{text}\n")


# --- COPY and ADD -----------------------------------------------------------------------------------


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
        ("..", True),
        ("/a/.", True),
        ("d", False),
        ("/a.", False),
    ],
)
def test_the_destination_tells_whether_it_is_a_directory(plan: Plan, target: str, directory: bool) -> None:
    command = copy_of(plan(f"FROM scratch\nCOPY f {target}\n", files={"f": ""}).steps[0])
    assert (command.target, command.target_is_directory) == (target, directory)


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
            "FROM scratch\nCOPY a .\nRUN --mount=type=cache,target=/x true\nADD b .\nUSER $unset\nCOPY c .\n"
        )
    assert caught.value.location == Location("Dockerfile", 2)
    hint = str(caught.value.hint)
    assert [f"also Dockerfile:{line}: " in hint for line in (3, 4, 5, 6)] == [True, True, True, False]


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


@pytest.mark.parametrize("mode", ["", "8", "10000", "0o755", "rwx", "u", "z+x", "u+x,", "755 "])
def test_a_wrong_mode_is_an_error(plan: Plan, mode: str) -> None:
    with pytest.raises(InputError, match="--chmod: expected an octal mode") as caught:
        plan(f'FROM scratch\nCOPY --chmod="{mode}" f /\n', files={"f": ""})
    assert caught.value.location == Location("Dockerfile", 2)


@pytest.mark.parametrize("owner", ["0", "1000:1000", "app", "app:staff", "1000:staff", "DOMAIN.user"])
def test_owners_are_names_or_numbers(plan: Plan, owner: str) -> None:
    assert copy_of(plan(f"FROM scratch\nADD --chown={owner} f /\n", files={"f": ""}).steps[0]).chown == owner


@pytest.mark.parametrize("owner", ["", ":", "a:", ":b", "a:b:c", "$unset"])
def test_a_wrong_owner_is_an_error(plan: Plan, owner: str) -> None:
    with pytest.raises(InputError, match="--chown: expected user or user:group"):
        plan(f"FROM scratch\nCOPY --chown={owner} f /\n", files={"f": ""})


def test_copy_can_not_download(plan: Plan) -> None:
    with pytest.raises(InputError, match="COPY can't download") as caught:
        plan("FROM scratch\nCOPY https://example.invalid/x /\n")
    assert caught.value.hint == "use ADD"


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


def test_other_protocols_are_errors(plan: Plan) -> None:
    with pytest.raises(InputError, match="expected http:// or https://"):
        plan("FROM scratch\nADD ftp://host/f /\n")


def test_a_url_without_a_file_name_needs_one_in_the_destination(plan: Plan) -> None:
    with pytest.raises(InputError, match="has no file name"):
        plan("FROM scratch\nADD https://example.invalid/ /d/\n")


_DIGEST = "sha256:" + hashlib.sha256(b"").hexdigest()


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
    made = plan("FROM scratch\nADD a.tar /d/\nCOPY a.tar /d/\nADD --chown=5 a.tar /d/\n")
    added, copied, owned = ([*sent(step)] for step in made.steps)
    assert [(entry.path, entry.from_directory) for entry in added] == [("inside", True)]
    assert added[0].owner is not None
    assert [(entry.path, entry.kind, entry.from_directory) for entry in copied] == [
        ("a.tar", EntryKind.FILE, False)
    ]
    assert owned[0].owner is None


# --- refusals ---------------------------------------------------------------------------------------


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


# --- ONBUILD triggers of the base -------------------------------------------------------------------


def test_the_triggers_of_the_base_are_executed_right_after_from(plan: Plan, bases: Bases) -> None:
    bases.images["parent"] = ImageConfig(onbuild=("COPY f /app/", "ENV A=1", "ARG V=2", "RUN make $V"))
    made = plan("ARG V=9\n\nFROM parent\nRUN own\n", files={"f": "x"}, build_args={"V": "3"})
    assert [(step.number, step.line, step.instruction) for step in made.steps] == [
        (2, 3, "COPY f /app/"),
        (3, 3, "RUN make $V"),
        (4, 4, "RUN own"),
    ]
    assert run_of(made.steps[1]).args == {"V": "3"}
    assert (made.config.env["A"], made.config.onbuild) == ("1", ())


@pytest.mark.parametrize(
    "trigger", ["COPY missing /", "FROM x", "ONBUILD RUN x", "MAINTAINER m", "NOTHING", "", "WORKDIR $u"]
)
def test_a_failing_trigger_is_reported_at_from_and_by_its_text(
    plan: Plan, bases: Bases, trigger: str
) -> None:
    bases.images["parent"] = ImageConfig(onbuild=(trigger,))
    with pytest.raises(InputError) as caught:
        plan("\nFROM parent\n")
    assert caught.value.message.startswith(f"in the ONBUILD trigger {trigger!r} of parent: ")
    assert caught.value.location == Location("Dockerfile", 2)


def test_triggers_are_read_with_a_backslash_whatever_the_dockerfile_says(plan: Plan, bases: Bases) -> None:
    bases.images["parent"] = ImageConfig(onbuild=("LABEL a=x\\ y",))
    made = plan("# escape=`\nFROM parent\nLABEL b=x` y\n")
    assert made.config.labels == {"a": "x y", "b": "x y"}
