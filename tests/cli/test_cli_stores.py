"""`firebuild base` and `firebuild images`: what is kept, shown and removed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli
from firebuild_bootstrap.cli.screen import moment
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.store import ImageStore, StoredImage
from support import BIN

pytestmark = pytest.mark.needs("userns")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "etc").mkdir(parents=True)
    (root / "etc/motd").write_text("hello")
    return root


def test_no_other_user_can_write_to_a_store_whatever_the_umask(tmp_path: Path, tree: Path) -> None:
    command: list[str | Path] = [BIN / "firebuild", "base", "import", "tiny:3", tree]
    environ = {**os.environ, "FIREBUILD_HOME": str(tmp_path / "home")}
    subprocess.run(command, umask=0, env=environ, check=True, capture_output=True)
    made = [path for path in (tmp_path / "home", *(tmp_path / "home").rglob("*")) if not path.is_symlink()]
    assert len(made) > 5
    assert [path for path in made if path.stat().st_mode & 0o002] == []


def test_a_umask_that_takes_rights_from_its_own_user_keeps_nobody_from_the_store(
    tmp_path: Path, tree: Path
) -> None:
    command: list[str | Path] = [BIN / "firebuild", "base", "import", "tiny:3", tree]
    environ = {**os.environ, "FIREBUILD_HOME": str(tmp_path / "home")}
    subprocess.run(command, umask=0o777, env=environ, check=True, capture_output=True)
    made = [path for path in (tmp_path / "home").rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-28T20:04:00.123456789Z", "2026-11-28 20:04"),
        ("2026-11-28T01:04:00+02:00", "2026-11-27 23:04"),
        ("0001-01-01T00:00:00+14:00", "0001-01-01T00:0…"),
        ("yesterday", "yesterday"),
        ("\x1b[2J" + "x" * 40, "\\x1b[2Jxxxxxxxx…"),
    ],
)
def test_a_table_shows_times_of_any_image_in_one_width(text: str, shown: str) -> None:
    assert moment(text) == shown


def test_an_image_is_listed_inspected_and_removed(cli: Cli) -> None:
    assert cli("images", "list").out == "TAG  CREATED  SIZE  OUTPUTS\n"
    Path("Dockerfile").write_text("FROM scratch\nLABEL a=b\n")
    cli("rootfs", "--tag", "t/kept:1", "--output", "tar", "--output", "dir")
    header, row = cli("images", "list").out.splitlines()
    assert header.split() == ["TAG", "CREATED", "SIZE", "OUTPUTS"]
    assert re.fullmatch(r"t/kept:1  20\d\d-\d\d-\d\d \d\d:\d\d  .+  tar, dir", row)
    shown = json.loads(cli("images", "inspect", "t/kept:1").out)
    assert {output["type"]: Path(output["path"]).exists() for output in shown["outputs"]} == {
        "tar": True,
        "dir": True,
    }
    assert cli("images", "rm", "t/kept:1").out == "removed t/kept:1\n"
    missing = cli("images", "inspect", "t/kept:1", status=2).err
    assert missing == "error: there is no image t/kept:1\n  hint: images in the store: none yet\n"


@pytest.mark.parametrize("command", ["inspect", "history", "rm", "sbom"])
def test_a_base_that_is_taken_for_an_image_is_told(cli: Cli, tmp_path: Path, command: str) -> None:
    (tmp_path / "tree").mkdir()
    cli("base", "import", "debian:12", tmp_path / "tree")
    assert cli("images", command, "debian:12", status=2).err == (
        "error: debian:12 is a base, and not an image\n"
        "  hint: `FROM debian:12` builds an image on it; `firebuild base list` and `base rm` are for bases\n"
    )


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


def test_an_image_that_is_removed_while_it_is_exported_is_delivered_whole(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    held_form = Home.held_form

    @contextmanager
    def then_removed(home: Home, image: StoredImage, *arguments: Any, **options: Any) -> Iterator[Path]:
        with held_form(home, image, *arguments, **options) as made:
            remove(image)
            yield made

    def remove(image: StoredImage) -> None:
        other = ImageStore(cli.home, lambda: Home(cli.home).trees)
        other.remove(image.tag)
        other.sweep()

    cli("build", "-q", "-t", "t/a:1", ".")
    monkeypatch.setattr(Home, "held_form", then_removed)
    cli("images", "export", "t/a:1", "--output", f"tar,dest={tmp_path / 'a.tar'}")
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert "Dockerfile" in archive.getnames()
    assert cli("images", "list", "--json").out == "[]\n"

    hold = ImageStore.hold

    def held_and_removed(store: ImageStore, image: StoredImage) -> bool:
        done = hold(store, image)
        remove(image)
        return done

    monkeypatch.setattr(ImageStore, "hold", held_and_removed)
    assert cli("build", "-q", "-t", "t/a:1", ".").out.startswith("sha256:")
    cli("build", "-t", "t/a:1", "-o", "tar,dest=-", ".")
    assert cli("images", "list", "--json").out == "[]\n"


def test_images_are_pruned_by_age_label_and_number(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    for day, tag in enumerate(("t/old:1", "t/old:2", "t/old:3", "t/kept:1")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(day * 86400))
        cli("build", "-q", "-t", tag, "--label", f"day={day}", ".")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    cli("build", "-q", "-t", "t/new:1", ".")
    cli("build", "-q", ".")

    def wanted(*options: str) -> list[str]:
        lines = cli("images", "prune", "--dry-run", *options).out.splitlines()
        return [line.removeprefix("would remove ") for line in lines if "untagged" not in line]

    assert wanted() == []
    assert cli("images", "prune", "--dry-run").out.startswith("would remove untagged/")
    assert wanted("--all") == ["t/kept:1", "t/new:1", "t/old:1", "t/old:2", "t/old:3"]
    for until in ("24h", "2020-01-01", "2020-01-01T00:00:00Z", str(4 * 86400)):
        assert wanted("-a", "--filter", f"until={until}") == ["t/kept:1", "t/old:1", "t/old:2", "t/old:3"]
    assert wanted("-a", "--filter", f"until={86400}") == ["t/old:1", "t/old:2"]
    assert wanted("-a", "--filter", "label=day=2") == ["t/old:3"]
    assert wanted("-a", "--filter", "label=day", "--filter", "label!=day=2", "--keep", "1") == [
        "t/old:1", "t/old:2",
    ]  # fmt: skip
    assert wanted("-a", "--keep", "2") == ["t/old:1"]
    assert "--all would remove every image" in cli("images", "prune", "--all", status=2).err
    for mistake, message in {
        "until=x": "expected a duration",
        "dangling=1": "--filter: expected until=",
        "label": "",
    }.items():
        assert message in cli("images", "prune", "--filter", mistake, status=2).err
    assert "removed t/old:1\n" in cli("images", "prune", "-a", "--keep=2").out
    cli("images", "prune", "--all", "--force")
    assert cli("images", "list", "--json").out == "[]\n"
    assert cli("cache", "prune", "--filter", "until=1h", "--keep-storage", "1GiB", "-n").out == ""


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


def test_a_configuration_that_does_not_end_is_not_read_to_its_end(cli: Cli, tree: Path) -> None:
    done = cli("base", "import", "tiny", tree, "--image-config", "/dev/zero", status=2)
    assert "/dev/zero can't be read: it has more than 4194304 bytes" in done.err


def build(cli: Cli, *tags: str) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    cli("build", "-q", "--output", "tar", "--output", "dir", *(word for tag in tags for word in ("-t", tag)))


def test_lists_come_as_json_too(cli: Cli, tree: Path) -> None:
    build(cli, "t/one:1")
    cli("base", "import", "tiny", tree)
    [image] = json.loads(cli("images", "list", "--json").out)
    assert image == json.loads(cli("images", "inspect", "t/one:1").out)
    [base] = json.loads(cli("base", "list", "--json").out)
    assert (base["name"], Path(base["path"]).stat().st_size) == ("tiny:latest", base["size"])


def test_the_path_of_an_output_stays_when_the_image_is_built_again(cli: Cli) -> None:
    build(cli, "localhost:5000/a/b")
    tar, tree = cli("images", "path", "localhost:5000/a/b").out.splitlines()
    assert (Path(tar).is_file(), Path(tree, "Dockerfile").is_file()) == (True, True)
    build(cli, "localhost:5000/a/b")
    assert cli("images", "path", "localhost:5000/a/b", "--output", "dir").out == f"{tree}\n"
    assert Path(tree, "Dockerfile").is_file()


def test_a_form_is_written_when_its_path_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    cli("build", "-t", "web:1")
    assert cli("images", "list").out.splitlines()[1].endswith("  -")
    [image] = json.loads(cli("images", "list", "--json").out)
    assert (image["outputs"], len(image["layers"])) == ([], 1)
    ext4 = cli("images", "path", "web:1").out
    assert ext4 == f"{cli.home}/images/names/library/web/1/rootfs.ext4\n"
    assert cli("images", "path", "web:1").out == ext4
    tar = cli("images", "path", "web:1", "-o", "tar").out
    assert cli("images", "path", "web:1").out == ext4 + tar
    assert cli("images", "list").out.splitlines()[1].endswith("  ext4, tar")
    done = cli("images", "export", "web:1", "-o", "dir,dest=out", "-o", f"ext4,dest={tmp_path}/x,size=48MiB")
    assert done.out == f"{Path('out').absolute()}\n{tmp_path}/x\n"
    assert Path("out/Dockerfile").is_file()
    assert (tmp_path / "x").stat().st_size == 48 << 20
    assert cli("images", "export", "web:1", "-o", "type=tar").out == tar
    cli("images", "export", "web:1", "-o", "tar,dest=web.tar")
    assert Path("web.tar").read_bytes() == Path(tar.strip()).read_bytes()
    assert cli("images", "export", "web:1", "--output", "-").out.encode() == Path("web.tar").read_bytes()
    # What was already there is no place for a form, and no image is none.
    assert "it is a directory" in cli("images", "export", "web:1", "-o", "tar,dest=out", status=2).first
    assert "there is no image x" in cli("images", "export", "x", "-o", "tar", status=2).first
    assert "there is no image x" in cli("images", "path", "x", "-o", "tar", status=2).first
    cli("rootfs", "--tag", "other:1", "--progress", "plain")
    assert json.loads(cli("images", "inspect", "other:1").out)["outputs"][0]["type"] == "ext4"


def test_an_image_whose_layers_are_gone_is_still_described(cli: Cli) -> None:
    build(cli, "web:1")
    known = json.loads(cli("images", "inspect", "web:1").out)["id"]
    for name in (cli.home / "layers").glob("*/names/*"):
        name.unlink()
    image = json.loads(cli("images", "inspect", "web:1").out)
    assert image["id"] == known
    assert [output["type"] for output in image["outputs"]] == ["tar", "dir"]
    done = cli("images", "path", "web:1", "-o", "ext4", status=6)
    assert "the layer" in done.first
    cli("images", "rm", "web:1")


def test_several_are_removed_or_none(cli: Cli, tree: Path) -> None:
    for name in ("a", "b:1", "c"):
        build(cli, name)
        cli("base", "import", name, tree)
    assert "there is no image x:latest" in cli("images", "rm", "a", "x", "c", status=2).first
    assert "unknown base x:latest" in cli("base", "rm", "a", "x", "c", status=2).first
    assert cli("images", "rm", "a", "docker.io/library/a", "b:1").out == "removed a:latest\nremoved b:1\n"
    assert cli("base", "rm", "a", "library/b:1").out == "removed a\nremoved library/b:1\n"
    assert len(cli("images", "list").out.splitlines()) == len(cli("base", "list").out.splitlines()) == 2


def test_an_image_gets_one_more_name(cli: Cli) -> None:
    build(cli, "a:1", "a:2")
    build(cli, "b")
    assert cli("images", "tag", "a:1", "b").out == "a:1 is b:latest too\n"
    first, *others = json.loads(cli("images", "list", "--json").out)
    assert [first["tag"], *(image["tag"] for image in others)] == ["a:1", "a:2", "b:latest"]
    assert {image["build_id"] for image in others} == {first["build_id"]}
    assert len(os.listdir(cli.home / "images/content")) == 1
    assert cli("images", "tag", "x", "y", status=2).first == "error: there is no image x:latest"


def test_prune_removes_what_has_no_name_and_what_crashes_left(cli: Cli, tree: Path) -> None:
    build(cli, "kept")
    build(cli)
    cli("base", "import", "tiny", tree)
    for left in (
        "images/staging/dead",
        "bases/staging/dead",
        "images/content/dead",
        "builds/dead",
        "failed/b1",
    ):
        (cli.home / left).mkdir(parents=True)
        (cli.home / left / "file").write_bytes(bytes(100_000))
    would = cli("images", "prune", "--dry-run", "--failed").out.splitlines()
    assert would[0].startswith("would remove untagged/")
    assert would[1:] == [f"would remove {cli.home}/failed/b1"]
    lines = cli("images", "prune").out.splitlines()
    assert lines[0] == would[0].replace("would remove", "removed")
    assert lines[1].startswith("freed ")
    assert not list((cli.home / "removing").iterdir())  # not even a moment later
    assert not list(cli.home.glob("*/*/dead"))
    assert not (cli.home / "builds/dead").exists()
    assert (cli.home / "failed/b1").exists()
    assert cli("images", "prune", "--failed").out.startswith(f"removed {cli.home}/failed/b1\n")
    assert [image["tag"] for image in json.loads(cli("images", "list", "--json").out)] == ["kept:latest"]
    assert "tiny" in cli("base", "list").out
    assert cli("images", "prune").out == "freed 0 B\n"


def test_du_tells_what_each_takes_and_counts_what_is_shared_once(cli: Cli, tree: Path) -> None:
    build(cli, "a", "b")
    cli("base", "import", "tiny", tree)
    (cli.home / "failed/b1").mkdir(parents=True)
    os.truncate(cli.home / "images/names/library/a/latest/rootfs.tar", 1 << 30)  # a hole
    (cli.home / "qemu-kvm.json").write_text("{}")
    used = json.loads(cli("du", "--json").out)
    kinds = [(one["kind"], one["name"]) for one in used["entries"]]
    assert kinds == [
        ("image", "a:latest"), ("image", "b:latest"), ("base", "tiny:latest"), ("failed", "b1"),
        ("layers", "of images"),
        ("cache", "cache"), ("cache", "cache-mounts"), ("cache", "layers"), ("other", "qemu-kvm.json"),
    ]  # fmt: skip
    a, b, base = (one["bytes"] for one in used["entries"][:3])
    assert a == b
    assert a + base < used["bytes"] < 1 << 20
    table = cli("images", "du").out.splitlines()
    assert table[0].split() == ["KIND", "NAME", "SIZE"]
    assert table[-1].split()[:2] == ["total", str(cli.home)]


@pytest.mark.root
def test_a_tree_with_files_of_others_is_removed(cli: Cli) -> None:
    Path("tree/below").mkdir(parents=True)
    os.chown("tree/below", 100_123, 100_123)
    assert cli("rm-tree", "tree").out == f"removed {Path('tree').resolve()}\n"
    assert not Path("tree").exists()


@pytest.mark.parametrize(
    "command",
    [["images", "list"], ["images", "list", "--json"], ["base", "list"], ["du"], ["store", "check"]],
)
def test_a_list_that_could_not_read_the_store_is_no_success(cli: Cli, tree: Path, command: list[str]) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    cli("rootfs", "--tag", "registry.example/team/app:1", "--output", "tar")
    cli("base", "import", "tiny:1", tree)
    for files in (5, 6, 8, 24):
        limited = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", str(BIN / "firebuild"), *command]
        environ = {**os.environ, "FIREBUILD_HOME": str(cli.home)}
        done = subprocess.run(limited, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 6, done
        assert "open files" in done.stderr
        assert "images rm" not in done.stdout


def test_what_is_left_out_of_a_list_is_named_and_the_rest_is_shown(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    for tag in ("a:1", "b:1", "c:1"):
        cli("rootfs", "--tag", tag, "--output", "tar", "--no-cache")
    gone = (cli.home / "images/names/library/a/1").resolve()
    gone.rename(cli.home / "away")
    ((cli.home / "images/names/library/b/1").resolve() / "image.json").unlink()
    done = cli("images", "list", status=6)
    assert [line.split()[0] for line in done.out.splitlines()] == ["TAG", "c:1"]
    assert re.findall(r"warning: \S+?/images/(\S+?)(?: is damaged)?: (.*)", done.err)[0] == (
        "names/library/a/1",
        "its files are gone (remove it)",
    )
    assert "image.json is damaged: No such file or directory (remove b:1 and build it again)" in done.err
    assert "error: what is shown is not all: 2 records of the store can't be read" in done.err


def test_a_prune_names_the_records_that_it_could_not_read(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    for tag in ("a:1", "b:1"):
        cli("build", "-q", "--tag", tag, "--no-cache", ".")
    cli("build", "-q", "--no-cache", ".")
    untagged = next(cli.home.glob("images/names/untagged/*/latest")).resolve()
    damaged = (cli.home / "images/names/library/b/1").resolve() / "image.json"
    for record in (damaged, untagged / "image.json"):
        record.write_text("{")
    for command in (("images",), ("images", "--all", "--keep", "1"), ("cache",)):
        for dry in (("--dry-run",), ()):
            done = cli(command[0], "prune", *command[1:], *dry, status=6)
            assert f"warning: {damaged} is damaged: " in done.err
            assert "1 record of the store can't be read" in done.err or dry or command != ("images",)
            assert ("freed" in done.out) != bool(dry)
    assert not untagged.exists()
    assert damaged.exists(), "its name may be all that is left to tell what it was"
    cli("images", "rm", "b:1")
    for command in (("images",), ("images", "--all", "--keep", "1"), ("cache",)):
        assert "damaged" not in cli(command[0], "prune", *command[1:]).err


def test_a_damaged_record_of_a_step_is_told_by_the_cache_and_goes_with_its_layer(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    cli("build", "-q", "--tag", "a:1", ".")
    cli("images", "rm", "a:1")
    record = next(cli.home.glob("layers/*/cache/records/*"))
    record.write_text("{")
    done = cli("cache", "du", "--json", status=6)
    assert f"warning: {record} is damaged (`firebuild cache prune` removes it)" in done.err
    for verb, dry in (("would remove", ("--dry-run",)), ("removed", ())):
        lines = cli("cache", "prune", *dry).out.splitlines()
        assert lines[0] == f"{verb} record {record.name}, which is damaged"
        assert lines[1].startswith(f"{verb} step {record.name}, without a record (")
    assert lines[2] == f"freed {lines[1].rpartition('(')[2].rstrip(')')}"
    assert cli("cache", "prune").out == "freed 0 B\n"
    cli("cache", "du")


def test_a_run_of_which_nothing_is_known_is_named_and_repaired(cli: Cli) -> None:
    lost = cli.home / "runs" / "run-1"
    (cli.home / "runs" / "run-2").mkdir(parents=True)
    lost.mkdir()
    (lost / "run.json").write_text("{")
    for command in (("ps",), ("ps", "--all", "--json"), ("rm", "run-1")):
        done = cli(*command, status=6)
        assert f"{lost}/run.json is damaged" in done.err
        assert "store check --repair" in done.err
    assert len(cli("store", "check", status=6).out.splitlines()) == 2
    assert cli("store", "check", "--repair").out.count("is missing or damaged") == 2
    assert list((cli.home / "runs").glob("run-*")) == []
    assert cli("ps", "--all", "--json").out == "[]\n"


@pytest.mark.needs("root")
def test_what_only_another_user_may_enter_is_named_where_its_size_is_missing(cli: Cli) -> None:
    parts = ("runs/run-1", "builds/b", "cache-mounts/other", "cache-mounts/ours/id/0", "drives/a/content/id")
    closed = {cli.home / part for part in parts}
    for path in closed:
        path.mkdir(mode=0o700, parents=True)
        os.chown(path, 54321, 54321)
    less = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    environ = {**os.environ, "FIREBUILD_HOME": str(cli.home)}
    for command in (["du"], ["cache", "du"]):
        done = subprocess.run(
            [*less, BIN / "firebuild", *command],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 6, done
        named = re.findall(r"warning: (\S+) belongs to another user: its size is not known", done.stderr)
        assert sorted(map(Path, named)) == sorted(closed)
        assert "what is shown is not all: 5 records" in done.stderr
        assert "total" in done.stdout
