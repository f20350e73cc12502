"""RUN with an old guest does what it does with ours, and writes the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, StepFailed
from legacy.house import House, gnu, install
from support import ending_of

pytestmark = [pytest.mark.needs("bwrap"), pytest.mark.needs("busybox")]

AWKWARD = r"""
ENV A=one QUOTED="it's \"here\" and $A" EMPTY="" DOLLAR='$A ${A} $$'
ARG A=hidden B=two
ARG PATHLIKE=/x:$PATH
RUN echo "$A $B" '$A $B' \$A "$QUOTED" "$EMPTY" "$DOLLAR" $(echo sub) `echo back` $?
RUN echo ${A%e} "$((1 + 2))" $PATHLIKE ${UNKNOWN:-default}
RUN env
RUN ["/bin/echo", "$A", "two words", "it's", "\\", "-n"]
RUN ["env"]
SHELL ["/bin/sh", "-ec"]
RUN false || true; x=$(printf 'a\tb'); echo "$x"
SHELL ["/bin/echo", "shell:"]
RUN echo $A '$B'
"""


def test_variables_quotes_and_forms_are_left_to_the_shell(house: House) -> None:
    new, old = house.both(AWKWARD)
    for step in range(2, 9):
        assert sorted(old.output(step).splitlines()) == sorted(new.output(step).splitlines())
    assert b"LEAKED" not in old.output(4)


WRITTEN = r"""
RUN <<END
echo one
echo '$HOME'
END
RUN <<'END'
#!/bin/sh -e
echo two $#
echo "$HOME" it\'s
END
RUN cat <<END ; echo after
in $HOME
END
RUN umask; cat; pwd; echo err >&2
RUN printf 'no end of line'
RUN printf 'one\ntwo'; printf 'three\n' >&2; printf 'four'
RUN printf '\001'; printf '\002\001'
RUN printf 'ümlaut\n\n\n  spaces  '
RUN head -c 300000 /dev/zero | tr '\0' x
RUN i=0; while [ $i -lt 9000 ]; do echo ✔━━━; i=$((i + 1)); done > /t; cat /t; cat /t >&2
RUN printf 'a\377b\000c\n'; printf '\377' >&2
RUN head -c 200000 /bin/busybox
WORKDIR /w
RUN pwd > here; touch 'a b'; mkdir d
RUN ls -la | head -1; ls
ENV 'a b'=c
RUN env | head -c 0
ENV PATH=/nowhere
RUN ["/bin/echo", "x"]
ENV HOME=/h
RUN echo $HOME $PATH
"""


def test_output_is_the_same_byte_for_byte_whatever_it_is(house: House) -> None:
    """Text or not: reads of 32 KiB cut characters of three bytes in two."""
    new, old = house.both(WRITTEN)
    assert len(new.steps) == 2 * 18
    for step in range(2, 20):
        for stream in ("stdout", "stderr"):
            assert old.output(step, stream) == new.output(step, stream), step


@pytest.mark.parametrize("coded", [True, False])
def test_a_guest_that_trims_what_it_passes_on_gets_its_line_ends_back(house: House, coded: bool) -> None:
    def change(image: Path) -> None:
        gnu(image)
        for name in ("sleep", *(("base64", "dd") if coded else ())):
            install(name, image)

    house.change_image = change
    _, old = house.both("RUN echo one; sleep 0.2; echo two; echo three >&2\nRUN echo four", trims=True)
    assert (old.output(2), old.output(2, "stderr"), old.output(3)) == (b"one\ntwo\n", b"three\n", b"four\n")


# --- users --------------------------------------------------------------------------------------------


def without_su(image: Path) -> None:
    (image / "bin/su").unlink()


@pytest.mark.root
@pytest.mark.parametrize("tool", ["setpriv", "chroot", "su"])
def test_run_is_the_user_that_it_should_be(house: House, tool: str) -> None:
    def change(image: Path) -> None:
        if tool != "su":
            without_su(image)
            install(tool, image)

    house.change_image = change
    dockerfile = (
        "WORKDIR /home/app\nUSER app\nRUN id; pwd; echo $HOME; id > /tmp-not || echo denied\n"
        "USER 1000\nRUN id -u; id -g; id -G; echo $HOME\nUSER root\nRUN id -u; echo $HOME\n"
    )
    if tool != "su":
        dockerfile += "USER app:staff\nRUN id; id -G\nUSER 4711:10\nRUN id; echo $HOME\n"
        dockerfile += "USER 4711\nRUN id -G; touch /x || :"
    new, old = house.both(dockerfile)
    for step in range(2, 9):
        assert old.output(step) == new.output(step)


@pytest.mark.root
@pytest.mark.parametrize("user", ["nobody-knows", "app:strangers"])
def test_a_user_that_does_not_exist_fails_the_step(house: House, user: str) -> None:
    house.change_image = lambda image: install("setpriv", image)
    dockerfile = f"RUN true\nUSER {user}\nRUN id"
    new, old = house.new(dockerfile), house.old(dockerfile)
    assert isinstance(old.outcome.error, StepFailed)
    assert (old.outcome.message, old.outcome.step) == (new.outcome.message, 3)


@pytest.mark.root
def test_su_does_not_know_a_number_without_a_name(house: House) -> None:
    outcome = house.old("USER 4711\nRUN id").outcome
    assert outcome.step == 2
    assert outcome.message.startswith("USER 4711: the image has nothing that becomes this user")


@pytest.mark.parametrize("user", ["app:staff", "app"])
def test_no_way_to_become_a_user_fails_the_build_before_any_step(house: House, user: str) -> None:
    if user == "app":
        house.change_image = without_su
    result = house.old(f"RUN touch /ran\nUSER {user}\nRUN id")
    assert isinstance(result.outcome.error, InputError)
    assert "install setpriv (util-linux) or chroot (coreutils)" in result.outcome.message
    assert result.steps == []
    assert not (result.image / "ran").exists()


# --- failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 3", 3), ('["/bin/false-not-there"]', 127), ('["/etc"]', 126), ("kill -9 $$", 137)],
)
def test_a_run_that_fails_ends_the_build_with_its_own_status(house: House, command: str, code: int) -> None:
    result = house.old(f"RUN true\nRUN echo before; true\nRUN {command}\nRUN touch /ran")
    error = result.outcome.error
    assert isinstance(error, StepFailed)
    assert (error.step, error.exit_code, result.outcome.reason) == (4, code, "command")
    assert error.message == f"the command exited with status {code}"
    assert result.steps[-2:] == [("started", 4, 4), ("finished", 4, code)]
    assert not (result.image / "ran").exists()


def test_a_guest_that_does_not_notice_a_failure_does_not_get_far(house: House) -> None:
    for rest in ("\nRUN touch /ran", "\nCOPY a /ran", ""):
        house.file("a")
        result = house.old(f"RUN exit 7{rest}", ignores_failures=True)
        error = result.outcome.error
        assert isinstance(error, StepFailed)
        assert (error.step, error.exit_code) == (2, 7)
        assert result.steps == [("started", 2, 2), ("finished", 2, 7)]


def test_output_arrives_while_the_step_runs(house: House) -> None:
    house.on_output = (house.directory / "image-1/go").touch
    result = house.old("RUN printf first; until [ -e /go ]; do sleep 0.05; done; printf second")
    assert (ending_of(result.outcome), result.output(2)) == ("success", b"firstsecond")


def test_a_command_that_ends_its_own_shell_fails_the_step(house: House) -> None:
    outcome = house.old("RUN kill -9 $PPID; sleep 1").outcome
    assert (outcome.step, outcome.reason) == (2, "command")


@pytest.mark.parametrize("broken", [False, True])
def test_output_that_is_no_text_and_can_not_be_made_text_ends_the_build(house: House, broken: bool) -> None:
    def change(image: Path) -> None:
        gnu(image)
        if broken:
            install("dd", image)
            (image / "bin/base64").write_text("#!/bin/sh\necho usage\n")
            (image / "bin/base64").chmod(0o755)

    house.change_image = change
    result = house.old(r"RUN printf 'a\377b'")
    error = result.outcome.error
    assert isinstance(error, StepFailed)
    assert error.hint is not None
    assert "not UTF-8" in error.hint


@pytest.mark.parametrize("dockerfile", ["RUN true", "COPY a /a"])
def test_an_image_without_a_shell_is_refused_before_any_step(house: House, dockerfile: str) -> None:
    house.file("a")
    house.change_image = lambda image: (image / "bin/busybox").unlink()
    result = house.old(dockerfile)
    assert isinstance(result.outcome.error, InputError)
    assert "needs a shell in it, /bin/sh: fork/exec /bin/sh: No such file" in result.outcome.message
    assert result.steps == []


def test_too_long_a_command_is_refused_before_any_step(house: House) -> None:
    result = house.old(f"RUN true\nRUN : {'x' * 128 * 1024}")
    assert isinstance(result.outcome.error, InputError)
    assert "step 3 is longer than" in result.outcome.message
    assert result.steps == []


def test_a_program_whose_name_looks_like_an_assignment_is_refused_before_any_step(house: House) -> None:
    result = house.old('RUN true\nRUN ["a=b", "c"]')
    assert isinstance(result.outcome.error, InputError)
    assert "step 3 runs 'a=b'" in result.outcome.message
    assert result.steps == []
