"""The base, the stage, and the configuration of the finished image."""

from __future__ import annotations

import pytest

from dockerfile.planning import Bases, Plan
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import Healthcheck, ImageConfig
from firebuild_bootstrap.wire import DEFAULT_PATH, RunCommand

FULL = ImageConfig(
    env={"PATH": "/bin", "A": "1"},
    entrypoint=("/entry",),
    cmd=("arg",),
    workdir="/srv",
    user="app",
    shell=("/bin/ash", "-c"),
    labels={"a": "base", "b": "base"},
    exposed_ports=("80/tcp",),
    volumes=("/data",),
    stop_signal="SIGQUIT",
    healthcheck=Healthcheck(("CMD", "check")),
    author="somebody",
)


def test_everything_is_inherited_from_the_base(plan: Plan, bases: Bases) -> None:
    bases.images["base:1"] = FULL
    made = plan("FROM base:1\n")
    assert made.config == FULL
    assert (made.base, made.steps, made.total) == ("base:1", (), 1)


def test_inherited_values_take_effect_in_steps(plan: Plan, bases: Bases) -> None:
    bases.images["base:1"] = FULL
    made = plan("FROM base:1\nRUN x\nWORKDIR sub\nLABEL c=$A\n")
    assert (made.steps[0].command.user, made.steps[0].command.workdir) == ("app", "/srv")
    command = made.steps[0].command
    assert isinstance(command, RunCommand)
    assert command.argv == ("/bin/ash", "-c", "x")
    assert made.config.workdir == "/srv/sub"
    assert made.config.labels == {"a": "base", "b": "base", "c": "1"}


def test_a_base_without_path_or_directory_gets_the_defaults(plan: Plan, bases: Bases) -> None:
    bases.images["b"] = ImageConfig(env={"A": "1"}, workdir="")
    made = plan("FROM b\n")
    assert (made.config.env, made.config.workdir) == ({"PATH": DEFAULT_PATH, "A": "1"}, "/")


def test_scratch_has_only_a_path_and_is_never_looked_up(plan: Plan, bases: Bases) -> None:
    assert plan("FROM scratch\n").config == ImageConfig(env={"PATH": DEFAULT_PATH})
    assert bases.asked == []


def test_entrypoint_resets_a_cmd_of_the_base(plan: Plan, bases: Bases) -> None:
    bases.images["b"] = FULL
    made = plan('FROM b\nENTRYPOINT ["/new"]\n')
    assert (made.config.entrypoint, made.config.cmd) == (("/new",), None)


@pytest.mark.parametrize("order", ['CMD ["own"]\nENTRYPOINT ["/new"]', 'ENTRYPOINT ["/new"]\nCMD ["own"]'])
def test_entrypoint_keeps_a_cmd_of_this_dockerfile(plan: Plan, bases: Bases, order: str) -> None:
    bases.images["b"] = FULL
    made = plan(f"FROM b\n{order}\n")
    assert (made.config.entrypoint, made.config.cmd) == (("/new",), ("own",))


def test_cmd_keeps_the_entrypoint_of_the_base(plan: Plan, bases: Bases) -> None:
    bases.images["b"] = FULL
    made = plan('FROM b\nCMD ["own"]\n')
    assert (made.config.entrypoint, made.config.cmd) == (("/entry",), ("own",))


def test_empty_lists_clear_cmd_and_entrypoint(plan: Plan, bases: Bases) -> None:
    bases.images["b"] = FULL
    made = plan("FROM b\nENTRYPOINT []\nCMD []\n")
    assert (made.config.entrypoint, made.config.cmd) == (None, None)


def test_shell_forms_get_the_shell_of_their_place(plan: Plan) -> None:
    made = plan('FROM scratch\nENTRYPOINT one $A\nSHELL ["/bin/bash", "-c"]\nCMD two\n')
    assert made.config.entrypoint == ("/bin/sh", "-c", "one $A")
    assert made.config.cmd == ("/bin/bash", "-c", "two")
    assert made.config.shell == ("/bin/bash", "-c")


@pytest.mark.parametrize("text", ["SHELL /bin/bash -c", "SHELL []", "SHELL"])
def test_shell_needs_the_json_form(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="SHELL: expected the JSON form") as caught:
        plan(f"FROM scratch\n{text}\n")
    assert caught.value.location == Location("Dockerfile", 2)


def test_labels_of_the_command_line_beat_all_others(plan: Plan, bases: Bases) -> None:
    bases.images["b"] = FULL
    made = plan("FROM b\nLABEL a=own c=own\n", extra_labels={"c": "line", "d": "line"})
    assert made.config.labels == {"a": "own", "b": "base", "c": "line", "d": "line"}


def test_the_author_is_taken_literally(plan: Plan) -> None:
    assert plan("FROM scratch\nMAINTAINER A $B <c@d>\n").config.author == "A $B <c@d>"


def test_ports_are_ranges_with_a_protocol_and_appear_once(plan: Plan, bases: Bases) -> None:
    bases.images["b"] = FULL
    made = plan("FROM b\nEXPOSE 80 53/UDP 8000-8002/tcp\nEXPOSE 8001 9/sctp\n")
    assert made.config.exposed_ports == ("80/tcp", "53/udp", "8000/tcp", "8001/tcp", "8002/tcp", "9/sctp")


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("0", "0/tcp"),
        ("80/TCP", "80/tcp"),
        ("80/", "80/tcp"),
        ("00080", "80/tcp"),
        ("+80", "80/tcp"),
        ("5-5", "5/tcp"),
        ("8080:80", "80/tcp"),
        (":80", "80/tcp"),
        ("8080-8081:80-81/udp", "80/udp 81/udp"),
        ("8080-8090:80", "80/tcp"),
        ("127.0.0.1::80", "80/tcp"),
        ("127.0.0.1:8080:80", "80/tcp"),
        ("[::1]:8080:80", "80/tcp"),
        ("::1:8080:80", "80/tcp"),
        ("$unset", ""),
    ],
)
def test_ports_are_written_as_buildkit_reads_them(plan: Plan, text: str, ports: str) -> None:
    made = plan(f"FROM scratch\nEXPOSE {text}\n")
    assert made.config.exposed_ports == tuple(ports.split())
    assert len(made.warnings) == (not ports)


@pytest.mark.parametrize(
    "port",
    [
        *("65536", "100000", "9" * 5000, "x", "80/x", "80/tcp/udp", "90-80", "-1", "80-", "1-2-3", "/tcp"),
        *("\uff11", "x:80", "80:", "127.0.0.1:80", "300.0.0.1::80", "[::1:80:80", "fe80::1%eth0:1:2"),
        *("1-2:80-90", "a:b:c:80"),
    ],
)
def test_a_wrong_port_is_an_error(plan: Plan, port: str) -> None:
    with pytest.raises(InputError, match="EXPOSE: expected a port, found") as caught:
        plan(f"FROM scratch\nEXPOSE {port}\n")
    assert caught.value.location == Location("Dockerfile", 2)
    assert len(caught.value.message) < 300


def test_an_expose_of_nothing_is_an_error(plan: Plan) -> None:
    with pytest.raises(InputError, match="EXPOSE: expected a port"):
        plan("FROM scratch\nEXPOSE\n")


@pytest.mark.parametrize("text", ["$unset", '""', "${unset}"])
def test_a_user_that_expands_to_nothing_is_root_and_said(plan: Plan, text: str) -> None:
    made = plan(f"FROM scratch\nUSER 1000\nUSER {text}\nRUN true\n")
    command = made.steps[0].command
    assert (made.config.user, command.user) == ("", "0:0")
    assert [(each.location.line, each.message) for each in made.warnings] == [
        (3, f"USER {text} expands to nothing, which means root")
    ]


def test_a_user_of_nothing_is_an_error(plan: Plan) -> None:
    with pytest.raises(InputError, match="USER: expected a value, found nothing"):
        plan("FROM scratch\nUSER\n")


def test_volumes_are_words_or_json_and_appear_once(plan: Plan) -> None:
    made = plan('FROM scratch\nVOLUME /a "/b"\nVOLUME ["/c d", "/a"]\n')
    assert made.config.volumes == ("/a", "/b", "/c d")


@pytest.mark.parametrize("text", ["VOLUME []", "VOLUME $unset", 'VOLUME ["/a", ""]'])
def test_an_empty_volume_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="VOLUME: expected a path"):
        plan(f"FROM scratch\n{text}\n")


@pytest.mark.parametrize("name", ["SIGTERM", "term", "9", "64", "SIGRTMIN", "RTMIN+3", "SIGRTMAX-1"])
def test_stop_signals_are_kept_as_written(plan: Plan, name: str) -> None:
    assert plan(f"FROM scratch\nSTOPSIGNAL {name}\n").config.stop_signal == name


@pytest.mark.parametrize("name", ["SIGNOTHING", "0", "65", "SIG", "99999", "RTMIN+", "²"])
def test_a_wrong_stop_signal_is_an_error(plan: Plan, name: str) -> None:
    with pytest.raises(InputError, match="STOPSIGNAL: expected a signal"):
        plan(f"FROM scratch\nSTOPSIGNAL {name}\n")


def test_a_healthcheck_with_all_its_flags(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nENV t=3s\nHEALTHCHECK --interval=1m30s --timeout=$t --start-period=500ms "
        "--start-interval=1h --retries=4 CMD curl -f $H || exit 1\n"
    )
    assert made.config.healthcheck == Healthcheck(
        ("CMD-SHELL", "curl -f $H || exit 1"), 90 * 10**9, 3 * 10**9, 5 * 10**8, 3600 * 10**9, 4
    )


def test_a_healthcheck_in_json_form_and_the_last_one_wins(plan: Plan) -> None:
    made = plan('FROM scratch\nHEALTHCHECK --retries=9 CMD x\nHEALTHCHECK cmd ["curl", "$H"]\n')
    assert made.config.healthcheck == Healthcheck(("CMD", "curl", "$H"))


def test_a_healthcheck_of_the_base_can_be_switched_off(plan: Plan, bases: Bases) -> None:
    bases.images["b"] = FULL
    assert plan("FROM b\nHEALTHCHECK NONE\n").config.healthcheck == Healthcheck(("NONE",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CMD", "expected CMD and a command"),
        ("CMD []", "expected CMD and a command"),
        ("NONE x", "expected CMD and a command"),
        ("curl x", "expected CMD and a command"),
        ("--interval=5 CMD x", "--interval: expected a duration"),
        ("--interval=-5s CMD x", "--interval: expected a duration"),
        ("--timeout=1us CMD x", "--timeout: expected 1ms or more"),
        ("--retries=x CMD x", "--retries: expected a whole number"),
        ("--retries=-1 CMD x", "--retries: expected a whole number"),
    ],
)
def test_a_wrong_healthcheck_is_an_error(plan: Plan, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f"FROM scratch\nHEALTHCHECK {text}\n")
    assert message in caught.value.message
    assert caught.value.location == Location("Dockerfile", 2)


# --- FROM -------------------------------------------------------------------------------------------


def test_an_unknown_base_is_reported_at_from(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        plan("ARG V=1\nFROM alpine:$V AS base\n")
    assert str(caught.value) == "Dockerfile:2: there is no image 'alpine:1'\n  hint: import it first"


def test_a_location_of_the_resolver_is_kept() -> None:
    class Store:
        def resolve(self, reference: str) -> ImageConfig:
            raise InputError("broken", location=Location("store.json", 7))

    with pytest.raises(InputError, match=r"store\.json:7: broken"):
        read_graph(DockerfileSource("Dockerfile", "FROM x\n"), images=Store())


@pytest.mark.parametrize("text", ["FROM a b", "FROM a AS", "FROM a AS b c", "FROM a TO b"])
def test_a_malformed_from_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="FROM: expected an image, or an image AS name"):
        plan(f"{text}\n")


@pytest.mark.parametrize("name", ["0", "-a", "a/b", "ä"])
def test_a_malformed_stage_name_is_an_error(plan: Plan, name: str) -> None:
    with pytest.raises(InputError, match="can't name a stage"):
        plan(f"FROM scratch AS {name}\n")


def test_a_base_that_expands_to_nothing_is_an_error(plan: Plan) -> None:
    with pytest.raises(InputError, match=r"'\$BASE' expands to nothing") as caught:
        plan("ARG BASE\nFROM $BASE\n")
    assert caught.value.location == Location("Dockerfile", 2)


def test_a_dockerfile_without_from_is_an_error(plan: Plan) -> None:
    with pytest.raises(InputError, match="the Dockerfile has no FROM"):
        plan("ARG A=1\n")


def test_only_arg_may_stand_before_from(plan: Plan) -> None:
    with pytest.raises(InputError, match="RUN before FROM") as caught:
        plan("ARG A\nRUN true\nFROM scratch\n")
    assert caught.value.location == Location("Dockerfile", 2)


@pytest.mark.parametrize("wanted", ["linux/amd64", "amd64", "$TARGETPLATFORM"])
def test_the_hosts_own_platform_may_be_asked_for(plan: Plan, wanted: str) -> None:
    assert plan(f"FROM --platform={wanted} scratch\n").base == "scratch"


@pytest.mark.parametrize("text", ["$unset", "${unset:-}"])
def test_a_platform_that_expands_to_nothing_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f"\nFROM --platform={text} scratch\n")
    assert caught.value.message == f"FROM --platform={text} expands to nothing"
    assert caught.value.location == Location("Dockerfile", 2)


def test_a_platform_that_is_left_out_behind_its_equals_sign_is_this_hosts(plan: Plan) -> None:
    assert plan("FROM --platform= scratch\n").base == "scratch"


@pytest.mark.parametrize(
    "text", ["nonsense", "linux/", "/amd64", "linux//v8", "linux/a/b/c", "*/amd64", "linux/am*64", "li nux"]
)
def test_what_is_no_platform_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f'FROM --platform="{text}" scratch\n')
    assert f"{text!r} is not a platform" in caught.value.message
    assert caught.value.location == Location("Dockerfile", 1)


@pytest.mark.parametrize("target", [None, "0", "Final", "final"])
def test_the_only_stage_has_a_name_and_an_index(plan: Plan, target: str | None) -> None:
    assert plan("FROM scratch AS Final\n", target=target).total == 1


@pytest.mark.parametrize(
    ("text", "stages"), [("FROM scratch AS Final\n", "0 (final)"), ("FROM scratch\n", "0 (without a name)")]
)
def test_an_unknown_target_lists_the_stages(plan: Plan, text: str, stages: str) -> None:
    with pytest.raises(InputError, match="no stage 'other'") as caught:
        plan(text, target="other")
    assert caught.value.hint == f"the stages are: {stages}"
