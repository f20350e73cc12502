"""`firebuild rootfs` and its options, on real builds."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.conftest import Cli
from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.cli.output import write_atomically
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image import outputs
from firebuild_bootstrap.sandbox import detect
from support import REPO

pytestmark = pytest.mark.needs("userns")

TAR = ("--output", "tar")


def dockerfile(text: str, path: Path = Path("Dockerfile")) -> None:
    path.write_text(text)


def image(cli: Cli, tag: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(cli("images", "inspect", tag).out)
    return loaded


def test_a_build_in_the_current_directory_needs_a_tag_only(cli: Cli) -> None:
    dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    done = cli("rootfs", "--tag", "t/least:1")
    assert done.err == ""
    assert done.out.startswith("Building t/least:1 (build b")
    assert "[2/2] COPY Dockerfile /\n[2/2] done in " in done.out
    [output] = image(cli, "t/least:1")["outputs"]
    assert output["type"] == "ext4"
    assert cli.leftovers() == []


def test_all_options_together(host_cli: Cli, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "file").write_text("of the context")
    build = tmp_path / "build.dockerfile"
    dockerfile(
        "FROM host AS first\nARG GIVEN\nARG TAKEN\nARG NEITHER=default\nCOPY file /\n"
        'RUN echo "$GIVEN, $TAKEN, $NEITHER." > /said\n',
        build,
    )
    host_cli.setenv("TAKEN", "from the environment")
    host_cli.setenv("SOURCE_DATE_EPOCH", "1700000000")
    tar, tree = tmp_path / "out.tar", tmp_path / "tree"
    done = host_cli(
        "rootfs",
        *("--dockerfile", build, "--context", context, "--tag", "t/all:1", "--target", "first"),
        *("--build-arg", "GIVEN=a=b", "--build-arg", "TAKEN", "--build-arg", "NEITHER"),
        *("--label", "one=1", "--label", "two"),
        *("--output", f"tar,dest={tar}", "--output", f"dir,dest={tree}"),
        *("--progress", "plain", "--ca", "embedded", "--metadata-file", "meta.json"),
    )
    assert (tree / "said").read_text() == "a=b, from the environment, default.\n"
    assert (tree / "file").read_text() == "of the context"
    assert (tree / "said").stat().st_mtime == 1_700_000_000
    assert tar.stat().st_size > 10_000
    shown = image(host_cli, "t/all:1")
    assert shown["config"]["Labels"] == {"one": "1", "two": ""}
    written = json.loads(Path("meta.json").read_text())
    assert written.pop("attestations").keys() == {"provenance"}
    assert written == shown
    assert Path("meta.json").stat().st_mode & 0o777 == 0o644
    assert "\x1b" not in done.out
    assert sorted(os.listdir()) == ["meta.json"]


@pytest.mark.parametrize("option", ["--keep-on-failure", "--keep-on-failure=mine/deep"])
def test_a_failed_build_is_kept_in_the_store_or_where_it_is_wanted(host_cli: Cli, option: str) -> None:
    dockerfile("FROM host\nRUN exit 9\n")
    done = host_cli("rootfs", option, "--tag", "t/kept:1", status=1)
    [folder] = (host_cli.home / "failed" if "=" not in option else Path("mine/deep").absolute()).iterdir()
    assert f"failed build is kept in {folder}: " in done.out
    # A console on which nothing was said is not kept.
    assert "failure.json, rootfs.tar\n" in done.out
    assert (folder / "rootfs.tar").exists()


def test_rawjson_prints_events_and_nothing_else(cli: Cli) -> None:
    dockerfile("FROM scratch\nARG USED\nWORKDIR /srv\n")
    out = cli("rootfs", "--tag", "t/json:1", *TAR, "--progress", "rawjson", "--build-arg", "UNUSED=1").out
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["phase"] for event in events if event["event"] == "phase-started"] == [*range(1, 8)]
    notices = [event["message"] for event in events if event["event"] == "notice"]
    [notice] = [message for message in notices if message != detect().note]
    assert "UNUSED is not declared by any ARG" in notice
    assert events[-1]["event"] == "image-stored"
    assert events[-1]["tag"] == "t/json:1"


def test_a_failed_build_ends_rawjson_with_its_reason(cli: Cli) -> None:
    dockerfile("FROM scratch\nRUN true\n")
    done = cli("rootfs", "--tag", "t/json:2", *TAR, "--progress", "rawjson", status=1)
    last = json.loads(done.out.splitlines()[-1])
    assert {"event": "build-failed", "exit_status": 1, "error": "StepFailed", "exit_code": 127}.items() <= (
        last.items()
    )


def test_a_shell_that_is_missing_is_called_missing(cli: Cli) -> None:
    dockerfile("FROM scratch\nRUN true\n")
    assert cli("rootfs", "--tag", "t/shell:1", *TAR, status=1).err == (
        "error: Dockerfile:2: step 2/2 failed with exit code 127: a command, or the shell to run it, "
        "is not in the image (/bin/sh: not found)\n  RUN true\n"
    )


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "Dockerfile"),
        ("FROM scratch\nRUNN true\n", [], "error: Dockerfile:2: "),
        ("FROM nowhere\n", [], "error: Dockerfile:1: unknown base or image nowhere:latest"),
        ("FROM scratch\nCOPY missing /\n", [], "error: Dockerfile:2: "),
        ("FROM scratch\n", ["--tag", "T"], "error: expected a name with an optional tag, found 'T'"),
        ("FROM scratch\n", ["--dockerfile", "none"], "error: none: the Dockerfile can't be read: No such"),
        ("FROM scratch\n", ["--dockerfile", "."], "error: .: the Dockerfile can't be read: Is a directory"),
        ("FROM scratch\n", ["--context", "none"], "error: build context none: expected a directory"),
        ("FROM scratch\n", ["--context", "Dockerfile"], "error: build context Dockerfile: expected a dir"),
        ("FROM scratch\n", ["--target", "none"], "error: Dockerfile: --target: there is no stage 'none'"),
        ("FROM scratch\n", ["--build-arg", "=x"], "error: --build-arg: expected NAME=VALUE"),
        ("FROM scratch\n", ["--label", "=x"], "error: --label: expected NAME=VALUE"),
        (
            "FROM scratch\n",
            ["--output", "cpio"],
            "error: --output cpio: expected ext4, erofs, squashfs, tar, dir, oci, docker or registry",
        ),
        ("FROM scratch\n", ["--output", "tar,dest="], "error: --output tar,dest=: expected "),
        ("FROM scratch\n", ["--output", "tar,dest=none/x"], "error: --output dest="),
        ("FROM scratch\n", ["--output", "dir,dest=."], "error: --output dest="),
        (
            "FROM scratch\n",
            ["--output", "ext4,size=big"],
            "error: --output ext4,size=big: expected a size",
        ),
        ("FROM scratch\n", ["--output", "tar", "--output", "tar"], "error: --output tar is given twice"),
        (
            "FROM scratch\n",
            ["--metadata-file", "none/x"],
            "error: none/x can't be written: none is not a dir",
        ),
        ("FROM scratch\n", ["--metadata-file", "."], "error: invalid value for '--metadata-file'"),
        ("FROM scratch\n", ["--progress", "fancy"], "error: invalid value for '--progress': 'fancy'"),
        ("FROM scratch\n", ["--ca", "valut"], "error: command line: ca.provider: no installed provider is"),
        ("FROM scratch\n", ["--config", "none"], "error: none: cannot read the file: No such file"),
        ("FROM scratch\n", ["extra"], "error: got unexpected extra argument (extra)"),
    ],
)
def test_bad_input_is_one_message_with_status_2_and_leaves_nothing(
    cli: Cli, text: str, arguments: list[str], message: str
) -> None:
    dockerfile(text)
    done = cli("rootfs", "--tag", "t/bad:1", *arguments, status=2)
    assert message in done.first
    assert done.err.count("error:") == 1
    assert "[1/" not in done.out
    assert cli.leftovers() == []
    assert "t/bad" not in cli("images", "list").out


def test_a_metadata_file_where_nobody_may_write_is_refused_before_the_build(cli: Cli) -> None:
    dockerfile("FROM scratch\n")
    done = cli("rootfs", "--tag", "t/bad:1", "--metadata-file", "/proc/self/meta.json", status=2)
    assert done.err == (
        "error: /proc/self/meta.json can't be written: no right to write in /proc/self\n"
        "  hint: name a file in a directory of yours\n"
    )
    assert done.out == ""


def test_a_metadata_file_is_there_completely_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "in-the-way").mkdir()
    (tmp_path / "in-the-way/file").touch()
    with pytest.raises(InputError, match="in-the-way can't be written: Is a directory"):
        write_atomically(tmp_path / "in-the-way", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["in-the-way"]
    with pytest.raises(InputError, match="can't be written: No such file or directory"):
        write_atomically(tmp_path / "none/file", "text")


def test_an_id_mapping_that_this_user_cannot_have_is_a_machine_error(cli: Cli) -> None:
    dockerfile("FROM scratch\n")
    cli.setenv("FIREBUILD_MACHINE__IDS", "subids" if os.geteuid() == 0 else "full")
    done = cli("rootfs", "--tag", "t/ids:1", *TAR, status=6)
    assert done.err.startswith("error: machine.ids is ")
    assert "\n  hint: " in done.err


def test_one_id_is_enough_for_a_build(cli: Cli) -> None:
    dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    cli.setenv("FIREBUILD_MACHINE__IDS", "single")
    cli("rootfs", "--tag", "t/ids:1", *TAR)


def test_a_home_that_cannot_be_made_is_bad_input(cli: Cli, tmp_path: Path) -> None:
    dockerfile("FROM scratch\n")
    (tmp_path / "file").touch()
    cli.setenv("FIREBUILD_HOME", tmp_path / "file")
    done = cli("rootfs", "--tag", "t/home:1", *TAR, status=2)
    assert "file: the store can't be written: Not a directory" in done.err


def test_a_time_limit_has_a_status_of_its_own(host_cli: Cli) -> None:
    dockerfile("FROM host\nRUN sleep 60\n")
    host_cli.setenv("FIREBUILD_BOOTSTRAP__BUILD_TIMEOUT", "1s")
    done = host_cli("rootfs", "--tag", "t/slow:1", *TAR, status=5)
    assert "longer than 1 second" in done.err
    assert host_cli.leftovers() == []


def test_it_runs_under_click_s_own_runner_too(cli: Cli) -> None:
    dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    done = CliRunner().invoke(app, ["rootfs", "--tag", "t/runner:1", *TAR], catch_exceptions=False)
    assert done.exit_code == 0
    assert "Built t/runner:1 in " in done.output


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["rootfs"],
        ["base"],
        *(["base", name] for name in ("import", "from-host", "list", "rm")),
        ["images"],
        *(["images", name] for name in ("list", "inspect", "rm")),
        ["config"],
        *(["config", name] for name in ("check", "schema", "show")),
    ],
)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(command: list[str], option: str) -> None:
    done = CliRunner().invoke(app, [*command, option], prog_name="firebuild")
    assert done.exit_code == 0
    assert done.output.startswith("Usage: " + " ".join(["firebuild", *command]))
    assert len(done.output.split("\n\n")[1].strip()) > 15


def test_without_an_option_the_dockerfile_of_the_context_is_built(cli: Cli) -> None:
    Path("there").mkdir()
    Path("there/Dockerfile").write_text("FROM scratch\nLABEL found=there\n")
    cli("rootfs", "--context", "there", "--tag", "t/default:1", "--output", "tar")
    assert '"found": "there"' in cli("images", "inspect", "t/default:1").out


def test_a_missing_dockerfile_is_named_with_its_path(cli: Cli) -> None:
    Path("empty").mkdir()
    done = cli("rootfs", "--context", "empty", "--tag", "t/default:2", status=2)
    assert "empty/Dockerfile: the Dockerfile can't be read: No such file" in done.first


def test_a_program_that_the_outputs_need_is_looked_for_before_anything_starts(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = outputs.PROGRAMS_PATH
    monkeypatch.setattr(outputs, "PROGRAMS_PATH", str(tmp_path))
    dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    for form, program, package in (
        ("erofs", "mkfs.erofs", "erofs-utils"),
        ("squashfs", "sqfstar", "squashfs-tools"),
    ):
        done = cli("rootfs", "--tag", "t/lost:1", "--output", form, status=6)
        assert f"--output {form} needs the program {program}, which is not in {tmp_path}" in done.err
        assert f"install the package {package}; no other directories are searched" in done.err
        assert done.out == ""
        if form == "erofs":
            page = (REPO / "docs/troubleshooting.md").read_text("utf-8")
            assert done.err.replace(str(tmp_path), usual).strip() in page
    assert cli("rootfs", "--tag", "t/kept:1").err == ""


def test_an_image_that_does_not_fit_into_its_size_is_an_error_with_the_size_that_it_needs(cli: Cli) -> None:
    dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    done = cli("rootfs", "--tag", "t/small:1", "--output", "ext4,size=1MiB", status=2)
    assert re.search(r"--output ext4: the files need size=\d+MiB, found size=1024KiB", done.err)
    assert cli.leftovers() == []
