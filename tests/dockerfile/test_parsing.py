"""How the text of a Dockerfile is read."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dockerfile.planning import Bases, Plan, Planned
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.dockerfile.syntax import KEYWORDS
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.lowering import lower
from firebuild_bootstrap.wire import RunCommand


def test_a_dockerfile_without_end_is_refused_at_its_limit() -> None:
    with pytest.raises(InputError) as caught:
        DockerfileSource.read(Path("/dev/zero"))
    assert caught.value.message == "the Dockerfile is larger than 16 MiB"
    assert caught.value.location == Location("/dev/zero")


def test_an_instruction_is_continued_over_many_lines_but_not_over_any_number(plan: Plan) -> None:
    lines = "# a comment\n\n" + "word \\\n" * 20_000
    assert len(run_text(plan(f"FROM scratch\nRUN a \\\n{lines}z"))) > 100_000
    error = error_of(plan, "FROM scratch\nRUN true\nRUN a \\\n" + lines * 50 + "z")
    assert error.message.startswith("an instruction is continued over more than ")
    assert error.location == Location("Dockerfile", 3)
    heredoc = "# a comment\n" * 20_000 + "word \\\nword\n" * 100_000  # is joined by nobody
    assert plan(f"FROM scratch\nRUN <<E\n{heredoc}E\n").steps


def error_of(plan: Plan, text: str, **arguments: object) -> InputError:
    with pytest.raises(InputError) as caught:
        plan(text, **arguments)
    return caught.value


def run_text(plan: Planned) -> str:
    command = plan.steps[0].command
    assert isinstance(command, RunCommand)
    return command.argv[-1]


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# only a comment\n", "\ufeff", "# syntax=docker/dockerfile:1\n"]
)
def test_a_dockerfile_without_instructions_is_an_error(plan: Plan, text: str) -> None:
    error = error_of(plan, text)
    assert error.message == "the Dockerfile has no instructions"
    assert error.location == Location("Dockerfile")


def test_an_unknown_instruction_is_reported_with_its_line_and_the_nearest_spelling(plan: Plan) -> None:
    error = error_of(plan, "FROM scratch\n\nCOPPY a b\n")
    assert str(error) == "Dockerfile:3: unknown instruction: COPPY\n  hint: did you mean COPY?"


def test_a_line_that_looks_like_nothing_known_hints_at_a_missing_continuation(plan: Plan) -> None:
    assert "needs a \\ at its end" in str(error_of(plan, "FROM scratch\nRUN a &&\n  zzzzzzz b\n"))


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_instruction_without_operands_is_an_error_at_its_line(plan: Plan, keyword: str) -> None:
    error = error_of(plan, f"FROM scratch\n{keyword}\n" if keyword != "FROM" else "\nFROM\n")
    assert error.location == Location("Dockerfile", 2)


def test_instructions_may_be_written_in_lower_case(plan: Plan) -> None:
    made = plan("from scratch\nrun true\n")
    assert made.steps[0].instruction == "run true"
    assert made.steps[0].command.original == "RUN true"


def test_a_byte_order_mark_and_crlf_line_ends_do_not_matter(plan: Plan) -> None:
    made = plan("\ufeffFROM scratch\r\nENV A=1\r\nRUN one && \\\r\n  two\r\n")
    assert made.config.env["A"] == "1"
    assert run_text(made) == "one &&   two"


def test_the_escape_directive_changes_the_continuation_character(plan: Plan) -> None:
    made = plan("# escape=`\nFROM scratch\nENV A=c:\\x\nRUN one `\n two\n")
    assert made.config.env["A"] == "c:\\x"
    assert run_text(made) == "one  two"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# escape=x\nFROM scratch\n", "invalid escape token"),
        ("# escape=`\n# escape=`\nFROM scratch\n", "only one escape parser directive"),
    ],
)
def test_a_wrong_directive_is_an_error(plan: Plan, text: str, message: str) -> None:
    assert message in error_of(plan, text).message


def test_a_directive_after_the_top_is_a_comment(plan: Plan) -> None:
    assert run_text(plan("FROM scratch\n# escape=`\nRUN a \\\n b\n")) == "a  b"


def test_comments_and_empty_lines_inside_a_continuation_are_skipped_the_latter_with_a_warning(
    plan: Plan,
) -> None:
    made = plan("FROM scratch\nRUN a \\\n# comment\n\n  b\n")
    assert run_text(made) == "a   b"
    assert made.lints == [(5, "NoEmptyContinuation")]


def test_an_unterminated_heredoc_is_reported_where_it_begins(plan: Plan) -> None:
    error = error_of(plan, "FROM scratch\nRUN <<EOF\necho\n")
    assert (error.message, error.location) == ("unterminated heredoc", Location("Dockerfile", 2))
    assert error.hint is not None


@pytest.mark.parametrize("text", ["ENV A", "ENV A=1 b", "LABEL a=1 b"])
def test_a_pair_without_its_equals_sign_comes_with_how_to_write_it(plan: Plan, text: str) -> None:
    assert "name=value" in (error_of(plan, f"FROM scratch\n{text}\n").hint or "")


@pytest.mark.parametrize("text", ['CMD ["a\\u0000b"]', 'RUN ["\\ud800"]', "ENV A=\0", "RUN <<E\n\0\nE"])
def test_characters_that_no_program_can_take_are_errors(plan: Plan, text: str) -> None:
    error = error_of(plan, f"FROM scratch\n{text}\n")
    assert "NUL" in error.message
    assert error.location == Location("Dockerfile", 2)


def test_absurd_nesting_is_an_error_and_not_a_crash(plan: Plan) -> None:
    assert (
        "an instruction is nested too deeply"
        in error_of(plan, "FROM scratch\nRUN " + "[" * 100_000 + "\n").message
    )


def test_a_non_string_in_a_json_list_is_an_error(plan: Plan) -> None:
    error = error_of(plan, 'FROM scratch\nCMD ["a", 1]\n')
    assert (error.location, error.message) == (
        Location("Dockerfile", 2),
        "Only strings are supported in JSON arrays",
    )


def test_single_quotes_make_no_json_form(plan: Plan) -> None:
    made = plan("FROM scratch\nCMD ['a']\n")
    assert made.config.cmd == ("/bin/sh", "-c", "['a']")


def test_a_long_instruction_is_shown_by_its_first_line(plan: Plan) -> None:
    made = plan("FROM scratch\nRUN first && \\\n" + "  second && \\\n" * 30 + "  last\n")
    assert made.steps[0].instruction == "RUN first && …"
    assert "last" in run_text(made)


def test_a_very_long_line_is_cut(plan: Plan) -> None:
    made = plan("FROM scratch\nRUN " + "x" * 500 + "\n")
    assert made.steps[0].instruction == "RUN " + "x" * 156 + " …"
    assert len(run_text(made)) == 500


def test_short_instructions_are_shown_whole_with_heredocs_elided(plan: Plan) -> None:
    made = plan("FROM scratch\nRUN cat <<EOF\nbody\nEOF\n")
    assert made.steps[0].instruction == "RUN cat <<EOF …"


def test_a_dockerfile_is_read_from_disk_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_bytes(b"FROM scratch\r\n")
    assert DockerfileSource.read(path) == DockerfileSource(str(path), "FROM scratch\r\n")


def test_a_missing_dockerfile_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as caught:
        DockerfileSource.read(tmp_path / "nothing")
    assert caught.value.location == Location(str(tmp_path / "nothing"))


def test_a_dockerfile_in_another_encoding_is_reported_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_bytes(b"FROM scratch\nLABEL a=\xff\n")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        DockerfileSource.read(path)
    assert caught.value.location == Location(str(path), 2)
    assert "iconv -f latin1" in (caught.value.hint or "")
    path.write_text("FROM scratch\n", "utf-16")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        DockerfileSource.read(path)
    assert "iconv -f utf-16" in (caught.value.hint or "")


_WORDS = st.sampled_from(
    [
        *KEYWORDS,
        "scratch",
        " ",
        "\n",
        "\\\n",
        "$A",
        "${A:-",
        "}",
        '"',
        "'",
        "<<E",
        "E",
        "[",
        "]",
        "=",
        "--x=1",
        "/",
        ".",
        "a",
    ]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_WORDS | st.text(max_size=4), max_size=25))
def test_any_text_gives_a_plan_or_an_error_for_the_user(context_dir: Path, words: list[str]) -> None:
    text = "FROM scratch\n" + " ".join(words)
    with BuildContext(context_dir) as context, contextlib.suppress(InputError):
        graph = read_graph(DockerfileSource("Dockerfile", text), images=Bases())
        lower(graph.target, lambda _: context)
