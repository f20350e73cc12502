"""`firebuild build`: what people type who come from docker."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cli.conftest import Cli, nothing_is_left
from firebuild_bootstrap.cli import given as given_module
from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.dockerfile.lint import MOST_SHOWN
from firebuild_bootstrap.dockerfile.syntax import MOST_TEXT
from firebuild_bootstrap.image.platforms import host_platform
from support import serving_files

pytestmark = pytest.mark.needs("userns")

DOCS = Path(__file__).parents[2] / "docs/from-docker.md"
SCRATCH = "FROM scratch\nCOPY . /\n"
TAR = ("--output", "tar")

# All of `docker build` and `docker buildx build` of Docker 29 and before, one value of each.
ONE_OF_EACH = """
--add-host=a:1.2.3.4 --allow=network.host --annotation=a=b --attest=type=sbom --build-arg=A=b
--build-context=a=. --builder=b --cache-from=type=local,src=none --cache-to=type=local,dest=made
--call=check --cgroup-parent=/a --check
--compress --cpu-period=1 --cpu-quota=1 --cpu-shares=1 --cpuset-cpus=0 --cpuset-mems=0 --debug
--disable-content-trust --file=Dockerfile --force-rm --iidfile=iid --isolation=hyperv --label=a=b --load
--memory=1g --memory-swap=2g --metadata-file=meta --network=host --no-cache --no-cache-filter=a
--output=type=tar --platform={platform} --policy=x --print=outline --progress=plain --provenance --pull
--push=false --quiet --rm --sbom --secret=id=a,src=b --security-opt=x --shm-size=1g --squash --ssh=default=key
--stream --tag=t/x --target=0 --ulimit=nofile=1
"""
REFUSED = """
--add-host --allow --annotation --builder --cgroup-parent
--cpu-period --cpu-quota --cpu-shares --cpuset-cpus --cpuset-mems --debug --disable-content-trust --isolation
--memory --memory-swap --network --policy --print --security-opt
--shm-size --stream --ulimit
"""


def archive(**files: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name.replace("__", "."))
            content = text.encode()
            entry.size = len(content)
            entry.uid, entry.mode = 4321, 0o600
            if text.startswith("->"):
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, text[2:], 0
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def files(cli: Cli, tag: str) -> list[str]:
    with tarfile.open(cli("images", "path", tag, "--output", "tar").out.strip()) as tar:
        return sorted(member.name for member in tar if member.isfile())


def test_the_words_that_docker_s_users_have_in_their_fingers(cli: Cli) -> None:
    Path("Dockerfile").write_text(SCRATCH)
    done = cli(
        "build", "-t", "hello:1.0", "-t", "localhost:5000/a/b", "--no-cache", "--rm=true", "--load", "."
    )
    assert done.out.startswith("Building hello:1.0 (build b")
    tags = [image["tag"] for image in json.loads(cli("images", "list", "--json").out)]
    assert tags == ["hello:1.0", "localhost:5000/a/b:latest"]
    assert cli("build").out.startswith("Building untagged/")
    Path("there").mkdir()
    Path("there/other").write_text("FROM scratch\nLABEL a=b\n")
    cli("build", "-t", "there", "-f", "there/other", "--target", "0", "--platform", host_platform(), "there")
    assert json.loads(cli("images", "inspect", "there").out)["config"]["Labels"] == {"a": "b"}


def test_flags_never_take_the_context_for_their_value(cli: Cli) -> None:
    Path("there").mkdir()
    Path("there/Dockerfile").write_text("FROM scratch\nLABEL found=there\n")
    cli("build", "-t", "t/1", "--keep-on-failure", "there")
    cli("build", "-t", "t/2", "--no-cache", "there")
    cli("build", "-t", "t/3", "--push=false", "--pull=0", "--provenance=false", "--", "there")
    assert cli("build", "--rm=maybe", "there", status=2).first == (
        "error: --rm: expected true or false, found 'maybe'"
    )


def test_build_and_rootfs_take_the_same_options(cli: Cli) -> None:
    build, rootfs = (
        {name for one in app.commands[name].params for name in one.opts} for name in ("build", "rootfs")
    )
    assert build - rootfs == {"path"}
    assert rootfs <= build


@pytest.mark.parametrize("option", ONE_OF_EACH.split(), ids=lambda option: option.partition("=")[0])
def test_every_option_of_docker_is_done_or_answered_by_its_name(cli: Cli, option: str) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    Path("b").write_text("a secret")
    Path("key").write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    )
    name = option.partition("=")[0]
    option = option.format(platform=host_platform())
    if name not in REFUSED.split():
        cli("build", option, *(TAR if name != "--output" else ()), ".")
    else:
        done = cli("build", option, ".", status=2)
        assert done.first == f"error: {name} is an option of docker build that firebuild does not have"
        assert "\n  hint: " in done.err
        assert nothing_is_left(cli)
    assert f"`{name}`" in DOCS.read_text()


@pytest.mark.parametrize(
    ("option", "name"), [("-m=1g", "--memory"), ("-c1", "--cpu-shares"), ("-D", "--debug")]
)
def test_short_options_are_answered_too(cli: Cli, option: str, name: str) -> None:
    assert cli("build", option, ".", status=2).first.startswith(f"error: {name} is an option of docker build")


def test_a_secret_that_is_not_understood_is_not_shown(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch")
    done = cli("build", "--secret", "type=env,id=PASSWORD=hunter2", str(tmp_path), status=2)
    assert done.first == "error: option --secret number 1: it has no id, or one with an equals sign"
    assert "hunter2" not in done.err


def test_no_option_is_taken_for_one_that_is_refused(cli: Cli) -> None:
    assert "Did you mean" not in cli("build", "--allows", ".", status=2).err
    assert "'--output'" in cli("build", "--outputs", "x", ".", status=2).err


def test_what_asks_for_the_default_is_accepted(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    cli("build", "--network", "default", "--isolation=default", "--squash", "-q", *TAR, ".")


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (command, hint)
        for commands, hint in {
            "exec start create": "firebuild run",
            "kill": "firebuild stop --time 0",
            "attach": "firebuild logs --follow",
            "port": "firebuild ps",
            "container restart pause unpause top": "no containers",
            "stats rename update diff cp commit network volume compose": "no containers",
            "swarm stack service node checkpoint": "no containers",
            "bake": "--target STAGE",
            "secret": "firebuild build --secret",
            "scout": "firebuild images sbom",
            "init": "a Dockerfile is yours to write",
            "login logout": "logins of docker and podman count",
            "search manifest trust": "there are pull and push",
            "export": "firebuild images export",
            "import": "firebuild base import",
            "events": "rawjson",
            "info version context": "",
            "buildx builder": "firebuild build",
            "system": "firebuild du",
        }.items()
        for command in commands.split()
    ],
)
def test_every_command_of_docker_is_answered_by_its_name(cli: Cli, command: str, hint: str) -> None:
    done = cli(command, "anything", status=2)
    assert done.first == f"error: there is no `firebuild {command}`, as in `docker {command}`"
    assert hint in done.err.split("\n", 1)[1]


def test_commands_that_are_called_otherwise_here_work(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    cli("buildx", "build", "-t", "a", *TAR, ".")
    cli("image", "build", "-t", "b", *TAR, ".")
    cli("tag", "a", "c:1")
    cli("image", "tag", "a", "d")
    assert cli("container", "ls", "--all").out == cli("ps", "-a").out
    assert [row.split()[0] for row in cli("images", "ls").out.splitlines()[1:]] == [
        "a:latest", "b:latest", "c:1", "d:latest",
    ]  # fmt: skip
    assert cli("image", "ls").out == cli("images").out == cli("images", "list").out
    assert json.loads(cli("inspect", "c:1").out)["tag"] == "c:1"
    assert cli("rmi", "-f", "a", "b").out == "removed a:latest\nremoved b:latest\n"
    assert cli("image", "rm", "c:1").out == "removed c:1\n"
    assert "d:latest" in cli("system", "df").out
    assert cli("system", "prune", "-f").out.startswith("freed ")
    assert cli("image", "trust", "d", status=2).first == (
        "error: there is no `firebuild trust`, as in `docker image trust`"
    )
    assert cli("base", "ls").out.startswith("NAME")
    assert cli("frobnicate", status=2).first == "error: no such command 'frobnicate'"


# --- what is built -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compress",
    [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress],
    ids=lambda one: one.__module__,
)
def test_an_archive_from_standard_input_is_the_context(
    cli: Cli, stdin: Callable[[bytes], None], compress: Callable[[bytes], bytes]
) -> None:
    stdin(compress(archive(Dockerfile=SCRATCH, one="1", two="2", __dockerignore="two\n")))
    cli("build", "-t", "t", *TAR, "-")
    assert files(cli, "t") == [".dockerignore", "Dockerfile", "one"]
    stdin(compress(archive(Dockerfile=SCRATCH, four="4") + b"what tar and docker pass over"))
    cli("build", "-t", "t", *TAR, "-")
    assert files(cli, "t") == ["Dockerfile", "four"]
    assert nothing_is_left(cli)


def test_the_dockerfile_may_be_any_file_of_the_archive(cli: Cli, stdin: Callable[[bytes], None]) -> None:
    web = {"web/Dockerfile": SCRATCH, "web/Dockerfile.dockerignore": "two", "one": "1", "two": "2"}
    stdin(archive(**web))
    cli("build", "-t", "t", *TAR, "-f", "web/Dockerfile", "-")
    assert "two" not in files(cli, "t")
    stdin(archive(**web, link="->web"))
    cli("rootfs", "-t", "t", *TAR, "-f", "/link/../link/Dockerfile", "--context", "-")
    stdin(archive(**web))
    done = cli("build", "-f", "none", "-", status=2)
    assert done.first == "error: none: the Dockerfile can't be read: No such file or directory"
    assert "name its path in the build context on standard input" in done.err
    assert nothing_is_left(cli)


def test_anything_else_from_standard_input_is_a_dockerfile(cli: Cli, stdin: Callable[[bytes], None]) -> None:
    Path("here").touch()
    stdin(b"FROM scratch\nCOPY . /copied/\n")
    cli("build", "-t", "t", *TAR, "-")
    assert files(cli, "t") == []
    stdin(SCRATCH.encode())
    cli("build", "-t", "t", *TAR, "-f", "-", ".")
    assert files(cli, "t") == ["here"]
    stdin(SCRATCH.encode())
    cli("rootfs", "-t", "t", *TAR, "--dockerfile", "-")
    stdin(b"FROM scratch\nRUNN x\n")
    assert cli("build", "-", status=2).first.startswith("error: -:2: ")
    stdin(b"FROM scratch\nRUN true\n")
    assert cli("build", *TAR, "-", status=1).first.startswith("error: -:2: step 2/2 failed")
    assert nothing_is_left(cli)


def test_what_is_not_in_a_context_from_standard_input_is_told_without_where_it_was_unpacked(
    cli: Cli, stdin: Callable[[bytes], None]
) -> None:
    stdin(archive(Dockerfile="FROM scratch\nCOPY two /\n", one="1"))
    done = cli("build", "-", status=2)
    assert done.first == "error: Dockerfile:2: 'two' is not in the build context on standard input"
    assert "in '.' there is: Dockerfile, one" in done.err
    stdin(b"FROM scratch\nCOPY two /\n")
    done = cli("build", "-", status=2)
    assert done.first.startswith("error: -:2: 'two' is not in the build context, which is empty where the ")
    assert "`firebuild build -f - DIRECTORY`" in done.err
    assert nothing_is_left(cli)


def test_a_dockerfile_may_be_written_small_where_there_is_no_other(
    cli: Cli, stdin: Callable[[bytes], None], tmp_path: Path
) -> None:
    """As BuildKit has it, and as nobody notices whose file system does not tell the two apart."""
    (web := tmp_path / "web").mkdir()
    (web / "dockerfile").write_text(SCRATCH)
    (web / "dockerfile.dockerignore").write_text("two\n")
    (web / "two").touch()
    for arguments in ([str(web)], ["-f", str(web / "Dockerfile"), str(web)]):
        cli("build", "-t", "t", *TAR, *arguments)
        assert files(cli, "t") == ["dockerfile", "dockerfile.dockerignore"]
    (web / "Dockerfile").write_text(SCRATCH + "LABEL large=\n")
    cli("build", "-t", "t", *TAR, str(web))
    assert "two" in files(cli, "t")
    stdin(archive(**{"web/dockerfile": SCRATCH + "COPY none /\n"}))
    done = cli("build", "-f", "web/Dockerfile", "-", status=2)
    assert done.first.startswith("error: web/dockerfile:3: 'none' is not in")
    done = cli("build", "-f", "dockerfile", str(web), status=2)
    assert done.first == "error: dockerfile: the Dockerfile can't be read: No such file or directory"
    assert f"relative to the current directory: --file {web}/dockerfile" in done.err
    (web / "dockerfile").unlink()
    (web / "Dockerfile").rename(web / "Containerfile")
    done = cli("build", str(web), status=2)
    assert done.first.endswith("Dockerfile: the Dockerfile can't be read: No such file or directory")
    assert f"{web}/Containerfile is there" in done.err


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", ["-"], "error: -: the Dockerfile is empty"),
        (b"", ["-f", "-", "."], "error: -: the Dockerfile is empty"),
        (b"\xff", ["-f", "-", "."], "error: -:1: the Dockerfile is not UTF-8 text"),
        (archive(Dockerfile=SCRATCH)[:1024] + b"x", ["-"], "error: the build context on standard"),
        (gzip.compress(b"x", mtime=0), ["-"], "error: standard input holds neither a tar archive nor a"),
        (b"FROM scratch\n", ["-f", "x", "-"], "error: --file x names a file of the archive"),
        (b"FROM scratch\n", ["-f", "-", "-"], "error: the build context and the Dockerfile can't"),
        (archive(Dockerfile=SCRATCH, x="x" * 9000)[:4096], ["-"], "error: the build context on standard"),
        (gzip.compress(archive(x=SCRATCH), mtime=0)[:-9], ["-"], "error: the build context on standard"),
        (archive(Dockerfile="->/etc/passwd"), ["-"], "error: Dockerfile: the Dockerfile can't be read: "),
        (archive(Dockerfile="->Dockerfile"), ["-"], "error: Dockerfile: the Dockerfile can't be read: "),
        (archive(Dockerfile=SCRATCH, __dockerignore="->/etc/passwd"), ["-"], "error: .dockerignore of "),
        (archive(**{"../x": "", "Dockerfile": SCRATCH}), ["-"], "error: the build context on standard"),
    ],
)  # fmt: skip
def test_what_is_neither_is_one_message(
    cli: Cli, stdin: Callable[[bytes], None], content: bytes, arguments: list[str], message: str
) -> None:
    stdin(content)
    done = cli("build", *arguments, status=2)
    assert done.first.startswith(message)
    assert "\n  hint: " in done.err
    assert "root:" not in done.err
    assert nothing_is_left(cli)


def test_a_directory_called_dockerfile_in_the_archive_is_none(
    cli: Cli, stdin: Callable[[bytes], None]
) -> None:
    stdin(archive(**{"Dockerfile/x": ""}))
    assert cli("build", "-", status=2).first == "error: Dockerfile: the Dockerfile is not a regular file"


def test_links_of_an_archive_lead_nowhere_on_this_host(
    cli: Cli, stdin: Callable[[bytes], None], tmp_path: Path
) -> None:
    stdin(archive(**{"l": f"->{tmp_path}", "l/planted": "x", "Dockerfile": SCRATCH}))
    with suppress(AssertionError):  # whether it replaces the link or refuses it is the worker's to say
        cli("build", "-q", *TAR, "-")
    assert not (tmp_path / "planted").exists()


def test_a_dockerfile_in_an_archive_is_not_cut_where_it_is_too_large(
    cli: Cli, stdin: Callable[[bytes], None]
) -> None:
    stdin(gzip.compress(archive(Dockerfile=SCRATCH + "#" * MOST_TEXT)))
    refused = cli("build", "-", status=2)
    assert refused.first == "error: Dockerfile: the Dockerfile is larger than 16 MiB"
    assert "hint: put large texts into files that COPY sends" in refused.err


def test_standard_input_is_read_up_to_a_limit(
    cli: Cli, stdin: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_module, "_CONTEXT_LIMIT", 2 << 20)
    monkeypatch.setattr(given_module, "MOST_TEXT", 1 << 20)
    stdin(archive(Dockerfile=SCRATCH, large="x" * (3 << 20)))
    refused = cli("build", "-", status=2)
    assert "on standard input is larger than 2 MiB" in refused.first
    assert "hint: unpack it, and name the directory" in refused.err
    stdin(gzip.compress(archive(Dockerfile=SCRATCH, large="x" * (3 << 20))))
    assert "on standard input is larger than 2 MiB unpacked" in cli("build", "-", status=2).first
    stdin(b"#" * (1536 << 10))
    assert "neither a tar archive nor a Dockerfile" in cli("build", "-", status=2).first
    stdin(b"PK\x03\x04\x14\x00\x00\x00")  # a zip archive
    assert "neither a tar archive nor a Dockerfile" in cli("build", "-", status=2).first
    stdin(b"#" * (1536 << 10))
    assert (
        "the Dockerfile on standard input is larger than 1 MiB"
        in cli("build", "-f", "-", ".", status=2).first
    )
    assert nothing_is_left(cli)


def test_a_signal_ends_the_wait_for_standard_input(cli: Cli) -> None:
    command = [sys.executable, "-c", "from firebuild_bootstrap.cli import main; main()", "build", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    staging = cli.home / "images/staging"
    while not (staging.exists() and os.listdir(staging)):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert os.listdir(staging) == []


def test_a_directory_as_standard_input_can_not_be_read(cli: Cli) -> None:
    saved, directory = os.dup(0), os.open(".", os.O_RDONLY)
    os.dup2(directory, 0)
    try:
        assert cli("build", "-", status=2).first == "error: standard input can't be read: Is a directory"
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(directory)


def test_a_store_in_the_build_context_is_told_unless_it_is_ignored(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    assert cli("build", *TAR, tmp_path).out.splitlines()[0] == (
        f"warning: the store {tmp_path}/home is in the build context, and COPY takes it for a part of that: "
        "add home to .dockerignore, or set FIREBUILD_HOME to another directory"
    )
    (tmp_path / ".dockerignore").write_text("home\n")
    assert "the store" not in cli("build", *TAR, tmp_path).out


def test_devices_of_an_archive_are_left_out_with_a_warning(cli: Cli, stdin: Callable[[bytes], None]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        device = tarfile.TarInfo("null")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
        dockerfile = tarfile.TarInfo("Dockerfile")
        dockerfile.size = len(SCRATCH)
        tar.addfile(dockerfile, io.BytesIO(SCRATCH.encode()))
    stdin(out.getvalue())
    done = cli("build", "-q", *TAR, "-")
    assert done.err == "warning: device nodes of the build context were left out: 1, for example 'null'\n"


def test_the_context_is_given_once(cli: Cli) -> None:
    twice = cli("build", "--context", "a", "b", status=2).err
    assert twice.startswith("error: the build context is given twice: b and --context a\n  hint: leave one")
    Path("x.git").mkdir()
    Path("x.git/Dockerfile").write_text("FROM scratch\n")
    cli("build", "-q", *TAR, "x.git")


# --- what comes out ------------------------------------------------------------------------------


def test_a_tar_goes_to_standard_output_and_progress_beside_it(cli: Cli) -> None:
    Path("Dockerfile").write_text(SCRATCH)
    for output in ("-", "type=tar,dest=-", "tar,dest=-"):
        command = [
            sys.executable,
            "-c",
            "from firebuild_bootstrap.cli import main; main()",
            "build",
            "-o",
            output,
        ]
        done = subprocess.run(command, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            assert "Dockerfile" in tar.getnames()
        assert b"Built untagged/" in done.stderr


def test_docker_s_ways_to_name_outputs(cli: Cli) -> None:
    Path("Dockerfile").write_text(SCRATCH)
    cli("build", "-q", "-o", "out/")
    cli("build", "-q", "-o", "type=local,dest=other", "-o", "dest=x.tar,type=tar")
    cli("build", "-q", "-o", "a=b")
    assert (Path("out/Dockerfile").exists(), Path("other/Dockerfile").exists()) == (True, True)
    assert (Path("x.tar").is_file(), Path("a=b").is_dir()) == (True, True)
    done = cli("build", "-q", "-o", "out", status=2)
    assert "expected a new or empty directory" in done.first
    assert f"`firebuild rm-tree {Path('out').absolute()}` removes this one" in done.err
    assert cli("rm-tree", "out", "other").out == (
        f"removed {Path('out').resolve()}\nremoved {Path('other').resolve()}\n"
    )
    cli("build", "-q", "-o", "out")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["type=image"], "there is no output of the type image"),
        (["type=docker"], "--output docker: it is not kept"),
        (["oci"], "--output oci: it is not kept"),
        (["type=registry"], "an image without a tag can't be pushed"),
        (["type=registry,dest=x"], "a registry has no dest"),
        (["type=cacheonly"], "there is no output of the type cacheonly"),
        (["type=cpio"], "found the type 'cpio'"),
        (["dest=x,mode=3"], "found the type 'dest=x'"),
        (["type=local,dest=-"], "only files can go to standard output"),
        (["tar,dest=-,dest=x"], "only files can go to standard output"),
        (["tar,dest=-", "ext4,dest=-"], "one output only can go to standard output"),
    ],
)
def test_other_outputs_are_refused(cli: Cli, outputs: list[str], message: str) -> None:
    options = [word for output in outputs for word in ("-o", output)]
    assert message in cli("build", *options, status=2).first


def test_quiet_prints_the_id_alone(cli: Cli) -> None:
    Path("Dockerfile").write_text(SCRATCH)
    done = cli("build", "-q", "-t", "t", *TAR, "--iidfile", "iid", "--metadata-file", "metadata")
    image = json.loads(cli("images", "inspect", "t").out)
    assert done.out == f"{image['id']}\n"
    assert Path("iid").read_text() == image["id"]
    metadata = json.loads(Path("metadata").read_text())
    assert metadata.pop("attestations")["provenance"].startswith("sha256:")
    assert metadata == image
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", cli("build", "--progress", "quiet", *TAR).out)
    assert cli("build", "-q", "--progress", "plain", status=2).first == (
        "error: --quiet and --progress plain can't be used together"
    )
    assert cli("build", "--progress", "tty", *TAR, status=2).first == (
        "error: --progress tty: the output is not a terminal"
    )


def on_a_terminal(*arguments: str) -> tuple[int, str]:
    """Run the command with a terminal as its standard output; what it says there and beside it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from firebuild_bootstrap.cli import main; main()", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.STDOUT)
    os.close(theirs)
    said = b""
    with suppress(OSError):  # EIO: everyone else has closed it
        while piece := os.read(ours, 4096):
            said += piece
    os.close(ours)
    return process.wait(60), said.decode()


def test_a_terminal_shows_progress_and_no_image(cli: Cli) -> None:
    Path("Dockerfile").write_text(SCRATCH)
    status, said = on_a_terminal("build", "--progress", "tty", "-t", "t", *TAR)
    assert (status, "Built t:latest" in said, "\x1b[" in said) == (0, True, True)
    status, said = on_a_terminal("build", "-o", "-")
    assert (status, "error: --output: an image would go to the terminal" in said.replace("\x1b[0m", "")) == (
        2,
        True,
    )


def test_standard_output_carries_one_thing_only(cli: Cli) -> None:
    Path("Dockerfile").write_text(SCRATCH)
    cli.setenv("FIREBUILD_MACHINE__DRIVER", "external")
    assert "standard output already carries the metadata" in cli("build", "-o", "-", status=2).first


def test_another_platform_is_refused(cli: Cli) -> None:
    done = cli("build", "--platform", f"{host_platform()},linux/s390x", status=2)
    assert done.first.startswith("error: --platform linux/s390x is not supported yet: this host builds ")


def test_the_help_names_no_option_that_does_nothing(cli: Cli) -> None:
    shown = cli("build", "--help").out
    assert "--add-host" not in shown
    assert "--force-rm" not in shown
    for word in ("local|qemu|firecracker|external", "size", "2GiB", "embedded"):
        assert word in " ".join(shown.split())
    assert all(
        one.hidden or one.help for one in app.commands["build"].params if isinstance(one, click.Option)
    )


# --- --check and --build-context -------------------------------------------------------------------


def test_check_says_what_is_probably_not_meant_and_builds_nothing(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch as a\nCMD x\nFROM scratch\nCOPY ignored sub/f /\n")
    Path(".dockerignore").write_text("ignored\nsub\n")
    done = cli("build", "--check", ".")
    assert [line.split(": ")[:2] for line in done.out.splitlines()[:-1]] == [
        ["Dockerfile:1", "FromAsCasing"],
        ["Dockerfile:2", "JSONArgsRecommended"],
        ["Dockerfile:4", "CopyIgnoredFile"],
        ["Dockerfile:4", "CopyIgnoredFile"],
    ]
    assert done.out.splitlines()[-1] == "check complete, 4 warnings found"
    # Only what a target needs is read with one.
    assert cli("rootfs", "--check", "--target", "a").out.splitlines()[-1].startswith("check complete, 2 ")
    Path("Dockerfile").write_text("FROM scratch\n")
    assert cli("build", "--call=check", ".").out == "check complete, no warnings found\n"
    assert cli("build", "--check", "--build-context", "spare=.", ".").out.splitlines() == [
        "Dockerfile: the build context spare is named by no FROM and no --from",
        "check complete, 1 warning found",
    ]
    assert json.loads(cli("images", "list", "--json").out) == []
    assert nothing_is_left(cli)


def test_of_many_warnings_the_first_are_shown_and_all_are_counted(cli: Cli) -> None:
    labels = "".join(f"LABEL a{number} b\n" for number in range(MOST_SHOWN + 500))
    Path("Dockerfile").write_text("FROM scratch\n" + labels)
    *warnings, rest, count = cli("build", "--check", ".").out.splitlines()
    assert len(warnings) == MOST_SHOWN
    assert all("LegacyKeyValueFormat" in warning for warning in warnings)
    assert rest == f"500 more warnings are not shown: there are {MOST_SHOWN + 500} in all"
    assert count == f"check complete, {MOST_SHOWN + 500} warnings found"
    done = cli("build", "--progress", "plain", ".")
    assert (done.out + done.err).count("LegacyKeyValueFormat") == MOST_SHOWN
    assert "500 more warnings are not shown" in done.out + done.err


def test_check_shows_warnings_before_the_mistake(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCMD x\nFROM nowhere\nRUN --network=x y\n")
    done = cli("build", "--check", ".", status=2)
    assert done.out.startswith("Dockerfile:2: JSONArgsRecommended: ")
    assert done.first.startswith("error: Dockerfile:3: unknown base or image nowhere")
    Path("Dockerfile").write_text("# check=error=true\nFROM scratch\nCMD x\n")
    for words in (("--check",), TAR):
        done = cli("build", *words, ".", status=2)
        assert done.first.endswith("check=error=true, and these rules are broken: JSONArgsRecommended")


def test_a_build_shows_warnings_with_their_rules_and_goes_on(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCMD x\n")
    done = cli("build", *TAR, "--progress", "plain", ".")
    assert "Dockerfile:2: JSONArgsRecommended: CMD should be a JSON array" in done.out


def test_a_name_is_missing_without_check(cli: Cli) -> None:
    assert "missing option '--tag'" in cli("rootfs", status=2).err


def test_other_contexts_stand_for_images_and_stages(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nLABEL from=base\nCOPY Dockerfile /base\n")
    cli("build", "-t", "base:1", *TAR, ".")
    Path("other/d").mkdir(parents=True)
    Path("other/a").write_text("a")
    Path("other/d/b").write_text("b")
    Path("other/left-out").write_text("")
    Path("other/.dockerignore").write_text("left-out\n.dockerignore\n")
    Path("Dockerfile").write_text(
        "FROM nowhere.example/tool AS stage\nRUN never\n"
        "FROM debian\nCOPY --from=stage d /d/\nCOPY --from=files a /a\n"
    )
    contexts = ("stage=other", "debian=docker-image://base:1", "files=./other")
    cli("build", "-t", "t", *TAR, *(f"--build-context={each}" for each in contexts), ".")
    assert files(cli, "t") == ["a", "base", "d/b"]
    assert json.loads(cli("images", "inspect", "t").out)["config"]["Labels"] == {"from": "base"}
    Path("Dockerfile").write_text("FROM whole\nLABEL a=b\n")
    cli("build", "-t", "w", *TAR, "--build-context", "whole=other", ".")
    assert files(cli, "w") == ["a", "d/b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "--build-context x: expected NAME=DIR, NAME=docker-image://IMAGE, NAME=oci-layout://"),
        ("=x", "--build-context: expected NAME=VALUE, found no name before ="),
        ("x=docker-image://A B", "--build-context x: an image"),
        (
            "x=https://me:s3cret@host/x.tar",
            "--build-context x: https://host/x.tar is neither a directory nor",
        ),
        ("x=oci-layout://missing", "missing can't be read"),
        ("x=https://host/x.git?colour=red", "the query 'colour' of a git URL is not known"),
        ("x=nowhere", "build context nowhere: expected a directory"),
    ],
)
def test_a_wrong_context_is_an_error(cli: Cli, value: str, message: str) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    done = cli("build", "--build-context", value, *TAR, ".", status=2)
    assert message in done.err
    assert "s3cret" not in done.err
    assert nothing_is_left(cli)


@pytest.mark.needs("userns")
def test_what_only_cached_steps_need_is_not_asked_for(host_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "context").mkdir()
    arguments = ("build", "-q", "-t", "needs", tmp_path / "context")
    with serving_files(tmp_path) as address:
        (tmp_path / "context/Dockerfile").write_text(
            f"FROM host\nADD --checksum=sha256:{hashlib.sha256(b'content').hexdigest()} "
            f"http://{address}/file /file\n"
            "RUN --mount=type=secret,id=token,required test -s /run/secrets/token\n"
        )
        host_cli(*arguments, "--secret", f"id=token,src={tmp_path}/file")
    host_cli(*arguments)
    failed = host_cli(*arguments, "--no-cache", status=2)
    assert "can't be downloaded" in failed.err
    assert "the secret token is required" in failed.err


@pytest.mark.needs("userns")
def test_a_dockerfile_of_more_steps_than_layers_can_be_mounted_builds_and_an_image_of_them_is_a_base(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    stages = ["FROM scratch AS below", "COPY file /0/file", *(f"WORKDIR /{n}" for n in range(1, 250))]
    stages += ["FROM below", "COPY --from=below /0 /again", *["COPY file /249/"] * 20]

    def built(tag: str, *lines: str) -> set[str]:
        (tmp_path / "Dockerfile").write_text("\n".join(lines))
        cli("build", tmp_path, "-t", tag, "--output", f"type=tar,dest={tmp_path}/{tag}.tar")
        with tarfile.open(tmp_path / f"{tag}.tar") as tar:
            return {name.strip("./") for name in tar.getnames()}

    names = {"", "0/file", "again", "again/file", "249/file", *map(str, range(250))}
    assert built("many", *stages) == names
    stages = ["FROM many", "COPY --from=many /249 /more", "COPY file /249/last"]
    assert built("more", *stages) == names | {"more", "more/file", "249/last"}
    kept = [[json.loads(cli("cache", "du", "--json").out)["entries"], cli("cache", "prune")][0] for _ in "12"]
    assert [len(rows) for rows in kept] == [274, 273]
    assert [sum("FROM folded:" in str(row) for row in rows) for rows in kept] == [1, 0]
