"""`firebuild base` and `firebuild images`: what is kept, shown and removed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from cli.conftest import Cli

pytestmark = pytest.mark.needs("userns")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "etc").mkdir(parents=True)
    (root / "etc/motd").write_text("hello")
    return root


def test_a_directory_becomes_a_base_that_is_listed_and_removed(cli: Cli, tree: Path) -> None:
    kept = cli("base", "import", "tiny:3", tree).out
    name, size, unit, digest = kept.split()
    assert (name, unit) == ("tiny:3", "KiB")
    header, row = cli("base", "list").out.splitlines()
    assert header.split() == ["NAME", "IMPORTED", "SIZE", "DIGEST"]
    assert row.split()[0] == "tiny:3"
    assert row.endswith(digest)
    assert row.index(size) == header.index("SIZE")
    assert cli("base", "rm", "tiny:3").out == "removed tiny:3\n"
    assert cli("base", "list").out == "NAME  IMPORTED  SIZE  DIGEST\n"


def test_a_tar_archive_becomes_a_base_with_the_configuration_that_comes_with_it(cli: Cli, tree: Path) -> None:
    with tarfile.open("tree.tar.gz", "w:gz") as archive:
        archive.add(tree, ".")
    Path("config.json").write_text(json.dumps({"config": {"Env": ["A=b"], "Cmd": ["/init"]}}))
    cli("base", "import", "tiny", "tree.tar.gz", "--image-config", "config.json")
    Path("Dockerfile").write_text("FROM tiny\n")
    cli("rootfs", "--tag", "t/derived:1", "--output", "tar", "--progress", "plain")
    image = json.loads(cli("images", "inspect", "t/derived:1").out)
    assert "A=b" in image["config"]["Env"]
    assert image["config"]["Cmd"] == ["/init"]
    assert image["base"]["reference"] == "tiny"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Env": 3}', "config.json: Env of the image configuration: expected a list of strings, found 3"),
        ("[1]", "config.json: expected a JSON object, found [1]"),
        ("{", "config.json: expected JSON: "),
        (b"\xff", "config.json: expected JSON: "),
    ],
)
def test_a_wrong_image_configuration_is_named_with_its_file(
    cli: Cli, tree: Path, content: str | bytes, message: str
) -> None:
    Path("config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = cli("base", "import", "tiny", tree, "--image-config", "config.json", status=2)
    assert done.err.startswith(f"error: {message}")
    assert not (cli.home / "bases/names/tiny").exists()


def test_an_image_configuration_that_is_not_there_is_bad_input(cli: Cli, tree: Path) -> None:
    done = cli("base", "import", "tiny", tree, "--image-config", "none.json", status=2)
    assert done.err == "error: none.json can't be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "tiny", "none.tar"], "error: invalid value for 'PATH': Path 'none.tar' does not exist"),
        (["import", "Tiny", "."], "error: expected a name with an optional tag, found 'Tiny'"),
        (["rm", "tiny"], "error: unknown base tiny:latest"),
        (["rm", "a b"], "error: expected a name with an optional tag, found 'a b'"),
        (["from-host", "UPPER"], "error: expected a name with an optional tag, found 'UPPER'"),
    ],
)
def test_mistakes_with_bases_are_bad_input_with_a_hint(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("base", *arguments, status=2)
    assert done.err.startswith(message)
    assert "\n  hint: " in done.err


def test_a_base_of_the_host_has_the_name_host_unless_told_otherwise(cli: Cli) -> None:
    assert cli("base", "from-host").out.startswith("host:latest  ")


def test_a_file_that_is_no_archive_is_refused(cli: Cli) -> None:
    Path("notes.txt").write_text("not a tar archive")
    assert cli("base", "import", "tiny", "notes.txt", status=2).err.startswith("error: notes.txt is damaged")


def test_an_image_is_listed_inspected_and_removed(cli: Cli) -> None:
    assert cli("images", "list").out == "TAG  CREATED  SIZE  OUTPUTS\n"
    Path("Dockerfile").write_text("FROM scratch\nLABEL a=b\n")
    cli("rootfs", "--tag", "t/kept:1", "--output", "tar", "--output", "dir")
    header, row = cli("images", "list").out.splitlines()
    assert header.split() == ["TAG", "CREATED", "SIZE", "OUTPUTS"]
    assert row.startswith("t/kept:1  2")
    assert row.endswith("tar, dir")
    shown = json.loads(cli("images", "inspect", "t/kept:1").out)
    assert {output["type"]: Path(output["path"]).exists() for output in shown["outputs"]} == {
        "tar": True,
        "dir": True,
    }
    assert cli("images", "rm", "t/kept:1").out == "removed t/kept:1\n"
    missing = cli("images", "inspect", "t/kept:1", status=2).err
    assert missing == "error: there is no image t/kept:1\n  hint: images in the store: none yet\n"


@pytest.mark.parametrize("command", ["inspect", "rm"])
@pytest.mark.parametrize("tag", ["Kept", "t/Kept:1", "t/kept:1/2", "t/kept@sha256:0", ""])
def test_a_tag_of_another_form_is_shown_with_the_form_it_should_have(
    cli: Cli, command: str, tag: str
) -> None:
    done = cli("images", command, tag, status=2)
    assert done.first == f"error: expected a name with an optional tag, found {tag!r}"
    assert "\n  hint: " in done.err


def test_an_image_with_a_damaged_record_is_named_with_the_remedy(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    cli("rootfs", "--tag", "t/damaged:1", "--output", "tar")
    [record] = (cli.home / "images/content").glob("*/image.json")
    record.write_text("{")
    done = cli("images", "inspect", "t/damaged:1", status=6)
    assert "image.json is damaged" in done.err
    assert "hint: remove t/damaged:1 and build it again" in done.err
    cli("images", "rm", "t/damaged:1")


def test_the_store_is_where_the_settings_say(cli: Cli, tree: Path, tmp_path: Path) -> None:
    Path("firebuild.yaml").write_text(f"store: {{path: {tmp_path / 'elsewhere'}}}\n")
    cli("base", "import", "tiny", tree, "--config", "firebuild.yaml")
    assert (tmp_path / "elsewhere/bases").is_dir()
    assert not cli.home.exists()


def test_a_home_that_is_a_file_is_bad_input_with_the_remedy(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cli.setenv("FIREBUILD_HOME", tmp_path / "file")
    done = cli("base", "import", "tiny", ".", status=2)
    assert "the store can't be written: Not a directory" in done.err
    assert "set FIREBUILD_HOME to another directory" in done.err
    Path("firebuild.yaml").write_text(f"store: {{path: {tmp_path / 'file'}}}\n")
    done = cli("base", "import", "tiny", ".", "--config", "firebuild.yaml", status=2)
    assert "set store.path to another directory" in done.err
