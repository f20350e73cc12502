"""Building images with the installed command, on the base made of the host's own tools."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from support import REPO, Firebuild

pytestmark = [pytest.mark.needs("userns")]


def write(directory: Path, dockerfile: str) -> list[str | Path]:
    (directory / "Dockerfile").write_text(dockerfile)
    return ["--dockerfile", directory / "Dockerfile", "--context", directory]


def image_of(firebuild: Firebuild, tag: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(firebuild("images", "inspect", tag).stdout)
    return loaded


def tar_of(firebuild: Firebuild, tag: str) -> tarfile.TarFile:
    image = image_of(firebuild, tag)
    [output] = [output for output in image["outputs"] if output["type"] == "tar"]
    digest = hashlib.sha256(Path(output["path"]).read_bytes()).hexdigest()
    assert output["digest"] == f"sha256:{digest}"
    return tarfile.open(output["path"])


def content(archive: tarfile.TarFile, name: str) -> bytes:
    extracted = archive.extractfile(name)
    assert extracted is not None
    return extracted.read()


def test_the_example_builds_and_its_entrypoint_would_greet(firebuild: Firebuild) -> None:
    done = firebuild(
        "rootfs",
        *("--dockerfile", REPO / "examples/hello/Dockerfile", "--context", REPO / "examples/hello"),
        *("--tag", "demo/hello:1.0", "--build-arg", "GREETING=Ahoy", "--output", "tar"),
    )
    assert "[1/6] FROM host" in done.stdout
    assert "\nAhoy, microVM!\n" in done.stdout
    assert "digest  sha256:" in done.stdout
    image = image_of(firebuild, "demo/hello:1.0")
    config = image["config"]
    assert config["Entrypoint"] == ["/srv/app/greet"]
    assert config["Cmd"] == ["world"]
    assert "APP_HOME=/srv/app" in config["Env"]
    assert config["ExposedPorts"] == {"8080/tcp": {}}
    assert config["WorkingDir"] == "/srv/app"
    assert config["Labels"]["org.opencontainers.image.title"] == "hello"
    assert image["ca"]["provider"] == "embedded"
    with tar_of(firebuild, "demo/hello:1.0") as archive:
        names = archive.getnames()
        assert content(archive, "srv/app/var/greeting") == b"Ahoy, microVM!\n"
        assert content(archive, "etc/motd") == b"Ahoy from a microVM image built without SSH.\n"
        assert archive.getmember("srv/app/hello").linkname == "greet"
        assert not [name for name in names if name.endswith(".notes")]
    assert firebuild.leftovers() == []


def test_every_file_of_the_context_arrives_as_it_was(firebuild: Firebuild, context: Path) -> None:
    tree = context / "tree"
    (tree / "deep/er").mkdir(parents=True)
    (tree / "deep/er/script").write_bytes(b"#!/bin/sh\n")
    (tree / "deep/er/script").chmod(0o4755)
    (tree / "empty").mkdir(mode=0o2775)
    (tree / "empty").chmod(0o2775)
    (tree / "secret").write_bytes(b"\x00\xff" * 3)
    (tree / "secret").chmod(0o640)
    (tree / "link").symlink_to("deep/er/script")
    (tree / "dangling").symlink_to("/nowhere")
    (tree / "größe with space").write_text("x")
    big = os.urandom(1 << 20) * 9 + b"tail"
    (tree / "big").write_bytes(big)
    os.utime(tree / "secret", ns=(1_000_000_000_123_456_789, 1_000_000_000_123_456_789))
    arguments = write(context, "FROM scratch\nCOPY tree/ /srv/\nCOPY tree/secret /etc/renamed\n")
    firebuild("rootfs", *arguments, "--tag", "t/tree:1", "--output", "tar")
    with tar_of(firebuild, "t/tree:1") as archive:
        script = archive.getmember("srv/deep/er/script")
        assert script.mode == 0o4755
        assert archive.getmember("srv/empty").mode == 0o2775
        assert archive.getmember("srv/secret").mode == 0o640
        assert archive.getmember("srv/secret").mtime == pytest.approx(1_000_000_000.1234567)
        assert archive.getmember("srv/link").linkname == "deep/er/script"
        assert archive.getmember("srv/dangling").linkname == "/nowhere"
        assert content(archive, "srv/big") == big
        assert content(archive, "srv/größe with space") == b"x"
        assert content(archive, "etc/renamed") == b"\x00\xff" * 3
        assert {member.uid for member in archive} == {0}


def test_a_failing_run_shows_exit_code_line_and_last_output(firebuild: Firebuild, context: Path) -> None:
    arguments = write(
        context, "FROM host\n\nRUN true\nRUN --mount=type=secret,id=token echo almost there; exit 42\n"
    )
    done = firebuild("rootfs", *arguments, "--tag", "t/fails:1", status=1)
    assert "exit code 42" in done.stderr
    assert "Dockerfile:4" in done.stderr
    assert "almost there" in done.stderr
    assert "hint: where the step needs it, give --secret id=token,src=FILE" in done.stderr
    assert "t/fails" not in firebuild("images", "list").stdout
    assert firebuild.leftovers() == []


@pytest.mark.parametrize(
    ("dockerfile", "message"),
    [
        ("FROM nowhere\n", "Dockerfile:1"),
        ("FROM host\nRUNN true\n", "Dockerfile:2"),
        ("FROM host\nCOPY missing /\n", "Dockerfile:2"),
        ("FROM host\nRUN --mount=type=ssh,required true\n", "Dockerfile:2"),
        ("FROM host\nRUN --mount=type=secret,id=token,required true\n", "Dockerfile:2"),
        ("", "Dockerfile"),
    ],
)
def test_bad_input_names_file_and_line_and_starts_nothing(
    firebuild: Firebuild, context: Path, dockerfile: str, message: str
) -> None:
    done = firebuild("rootfs", *write(context, dockerfile), "--tag", "t/bad:1", status=2)
    assert message in done.stderr
    assert "[1/" not in done.stdout
    assert firebuild.leftovers() == []


def test_rm_rf_of_everything_harms_only_the_build(
    firebuild: Firebuild, context: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("still here")
    # rm cannot remove its own working directories; what counts is what it did elsewhere.
    arguments = write(context, "FROM host\nRUN rm -rf --no-preserve-root / 2>/dev/null || true\n")
    firebuild("rootfs", *arguments, "--tag", "t/rm:1", "--output", "tar")
    assert precious.read_text() == "still here"
    assert Path("/bin/sh").exists()
    assert (firebuild.home / "bases").exists()
    with tar_of(firebuild, "t/rm:1") as archive:
        assert not [name for name in archive.getnames() if name.startswith("bin/")]


def test_planted_links_lead_nowhere_outside_the_image(
    firebuild: Firebuild, context: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (context / "file").write_text("payload")
    dockerfile = (
        "FROM host\n"
        f"RUN ln -s {outside} /planted && ln -s / /top && ln -s ../../../../../../.. /up\n"
        "COPY file /planted/\n"
        "COPY file /top/from-top\n"
        f"COPY file /up{outside}/via-up\n"
        "WORKDIR /planted/work\n"
        "RUN echo ran > here\n"
    )
    firebuild("rootfs", *write(context, dockerfile), "--tag", "t/links:1", "--output", "tar")
    assert list(outside.iterdir()) == []
    with tar_of(firebuild, "t/links:1") as archive:
        names = archive.getnames()
        assert str(outside)[1:] + "/file" in names
        assert "from-top" in names
        assert str(outside)[1:] + "/via-up" in names
        assert str(outside)[1:] + "/work/here" in names


def test_run_steps_find_no_credentials(firebuild: Firebuild, context: Path) -> None:
    look = (
        "for p in /proc/[0-9]*; do tr '\\0' '\\n' < $p/environ; tr '\\0' ' ' < $p/cmdline; done;"
        " find / -xdev -name '*.sock' 2>/dev/null; ls -a /run /tmp"
    )
    arguments = write(context, f"FROM host\nRUN {look}\n")
    done = firebuild("rootfs", *arguments, "--tag", "t/look:1", "--output", "tar")
    for word in ("PRIVATE KEY", "BEGIN CERTIFICATE", "mmds", "vminit", "FIREBUILD"):
        assert word not in done.stdout.split("RUN for", 1)[1].split("\n", 1)[1]


def test_output_is_passed_on_byte_for_byte(firebuild: Firebuild, context: Path) -> None:
    arguments = write(context, "FROM host\nRUN printf '\\377\\000x\\rno newline'\n")
    with firebuild.popen("rootfs", *arguments, "--tag", "t/bytes:1", "--output", "tar") as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"\xff\x00x\rno newline\n[2/2] done" in out


def test_rawjson_is_one_event_a_line(firebuild: Firebuild, context: Path) -> None:
    arguments = write(context, "FROM host\nRUN echo hi\n")
    done = firebuild("rootfs", *arguments, "--tag", "t/json:1", "--output", "tar", "--progress", "rawjson")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert [event["phase"] for event in events if event["event"] == "phase-started"] == [*range(1, 8)]
    assert kinds.index("guest-connected") < kinds.index("step-output")
    assert {"step": 2, "data": "hi\n"}.items() <= events[kinds.index("step-output")].items()
    assert kinds[-1] == "image-stored"


def test_metadata_file_holds_what_inspect_shows(firebuild: Firebuild, context: Path, tmp_path: Path) -> None:
    arguments = write(context, "FROM scratch\nLABEL a=b\n")
    target = tmp_path / "meta.json"
    firebuild(
        "rootfs",
        *arguments,
        "--tag",
        "t/meta:1",
        "--output",
        "tar",
        "--label",
        "c=d",
        "--metadata-file",
        target,
    )
    written = json.loads(target.read_text())
    assert written.pop("attestations").keys() == {"provenance"}
    assert written == image_of(firebuild, "t/meta:1")
    assert written["config"]["Labels"] == {"a": "b", "c": "d"}


@pytest.mark.needs("e2fsck", "debugfs")
def test_the_ext4_image_is_clean_and_holds_owners(firebuild: Firebuild, context: Path) -> None:
    (context / "suid").write_text("x")
    (context / "suid").chmod(0o4750)
    arguments = write(context, "FROM host\nCOPY --chown=0:0 suid /usr/bin/suid\n")
    # mke2fs is found although Debian's users do not have its directory on their PATH.
    options = ("--tag", "t/ext4:1", "--output", "ext4")
    firebuild("rootfs", *arguments, *options, environ={"PATH": "/usr/bin:/bin"})
    [output] = image_of(firebuild, "t/ext4:1")["outputs"]
    subprocess.run(["e2fsck", "-fn", output["path"]], check=True, capture_output=True)
    shown = subprocess.run(
        ["debugfs", "-R", "stat /usr/bin/suid", output["path"]],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "Mode:  04750" in shown
    assert "User:     0   Group:     0" in shown


def test_instructions_mean_what_they_mean_to_buildkit(firebuild: Firebuild, context: Path) -> None:
    context.chmod(0o700)
    (context / "f").write_text("content")
    arguments = write(
        context,
        "FROM host\nENV V=upstream\nARG V\nRUN echo V is $V && mkdir -p /x/y && ln -s x/y /link\n"
        "COPY . /app\nCOPY f /link/../beside\nCOPY known_host[s] /nothing/\n"
        "EXPOSE 0 8080:80/UDP\nUSER $UNSET\n",
    )
    options = ("--tag", "t/buildkit:1", "--output", "tar", "--build-arg", "V=given")
    done = firebuild("rootfs", *arguments, *options)
    assert "\nV is given\n" in done.stdout
    for line, words in ((7, "so nothing is copied"), (9, "which means root")):
        assert f"Dockerfile:{line}: " in done.stderr + done.stdout
        assert words in done.stderr + done.stdout
    with tar_of(firebuild, "t/buildkit:1") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
        assert archive.getmember("app").mode == 0o755
        assert {"app/f", "beside"} <= names
        assert not {"x/beside", "nothing"} & names
    config = image_of(firebuild, "t/buildkit:1")["config"]
    assert sorted(config["ExposedPorts"]) == ["0/tcp", "80/udp"]
    assert "V=upstream" in config["Env"]


def test_a_hostile_ignore_file_takes_no_time(firebuild: Firebuild, context: Path) -> None:
    (context / ("a" * 120)).touch()
    (context / ".dockerignore").write_text("*a*a*a*a*a*a*a*a*a*a*a*a*b\n")
    arguments = write(context, "FROM host\nCOPY a* /\n")
    begin = time.monotonic()
    firebuild("rootfs", *arguments, "--tag", "t/stars:1", "--output", "tar")
    assert time.monotonic() - begin < 60


def test_an_image_can_be_removed(firebuild: Firebuild, context: Path) -> None:
    arguments = write(context, "FROM scratch\n")
    firebuild("rootfs", *arguments, "--tag", "t/gone:1", "--output", "tar")
    assert "t/gone:1" in firebuild("images", "list").stdout
    firebuild("images", "rm", "t/gone:1")
    assert "t/gone:1" not in firebuild("images", "list").stdout
    assert "t/gone:1" in firebuild("images", "rm", "t/gone:1", status=2).stderr


def test_the_ca_is_swapped_by_an_environment_variable(firebuild: Firebuild, context: Path) -> None:
    arguments = write(context, "FROM scratch\n")
    done = firebuild(
        "rootfs",
        *arguments,
        "--tag",
        "t/ca:1",
        environ={"FIREBUILD_CA__PROVIDER": "embeded"},
        status=2,
    )
    assert "embedded" in done.stderr


@pytest.mark.parametrize("kind", ["ml-dsa-44", "ml-dsa-87"])
def test_a_ca_that_quantum_computers_cannot_forge_builds_as_any_other(
    firebuild: Firebuild, context: Path, kind: str
) -> None:
    config = context.parent / "config.yaml"
    config.write_text(f"ca: {{embedded: {{key_type: {kind}}}}}\n")
    arguments = write(context, "FROM host\nRUN echo built\n")
    done = firebuild(
        "rootfs",
        *arguments,
        "--tag",
        f"pq/{kind}:1",
        "--no-cache",
        "--config",
        config,
        "--progress",
        "rawjson",
    )
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    (connected,) = [event for event in events if event.get("event") == "guest-connected"]
    assert (connected["tls_version"], connected["key_exchange"]) == ("TLSv1.3", "X25519MLKEM768")
    assert firebuild.leftovers() == []


@pytest.mark.needs("ids")
def test_a_build_needs_no_more_open_files_than_it_has_stages_for(
    firebuild: Firebuild, tmp_path: Path
) -> None:
    arguments = write(
        tmp_path, "FROM host AS one\nRUN touch /1\nFROM host\nCOPY --from=one /1 /\nRUN touch /2\n"
    )

    def build(files: int) -> subprocess.CompletedProcess[str]:
        limited = [
            "sh",
            "-c",
            'ulimit -n "$0"; exec "$@"',
            str(files),
            str(firebuild.program),
            "rootfs",
            "--no-cache",
        ]
        return subprocess.run(
            [*limited, "--tag", "few:1", *map(str, arguments)],
            env=firebuild.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    assert build(128).returncode == 0
    done = build(60)
    assert done.returncode == 6
    assert "error: this needs 64 open files, and this process may have 60\n" in done.stderr
    assert "raise the limit: `ulimit -Hn 512` as root" in done.stderr


def test_a_limit_of_addresses_in_which_grpc_aborts_is_said_in_words(
    firebuild: Firebuild, tmp_path: Path
) -> None:
    arguments = [
        "rootfs",
        "--no-cache",
        "--tag",
        "few:1",
        *map(str, write(tmp_path, "FROM host\nRUN touch /1\n")),
    ]
    vminit = ["bootstrap", "--mmds", "http://127.0.0.1:1"]
    for program, given, status, needed in (("firebuild", arguments, 6, 1024), ("vminit", vminit, 70, 512)):
        limited = ["sh", "-c", 'ulimit -v 400000; exec "$@"', "sh", str(firebuild.program.with_name(program))]
        done = subprocess.run(
            [*limited, *given],
            env=firebuild.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == status
        assert (
            "the limit of this process's address space (ulimit -v) is 390 MiB, "
            f"and gRPC needs {needed} MiB" in done.stderr
        )
