"""Images in and out as files, with the tools that others use: skopeo and umoci; `e2e` has buildah."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from image.layouts import Made, described, layer, packed, written

from .conftest import Cli

pytestmark = pytest.mark.needs("bwrap", "busybox")
DOCKERFILE = """
FROM acme/web:1
MAINTAINER somebody
RUN rm /etc/one && echo new > /etc/new
ENV C=d
"""


def made() -> Made:
    """Return an image that commands can be run in."""
    files = {"bin/": None, "bin/sh": Path("/bin/busybox").read_bytes(), "etc/": None, "etc/one": "1"}
    bottom = layer(files, links={"bin/rm": "bin/sh", "bin/true": "bin/sh"})
    top = layer({"etc/two": "2"})
    return Made([bottom, top], {"Env": ["PATH=/bin", "A=b"], "Cmd": ["sh"], "StopTimeout": 7}, "acme/web:1")


def run(*arguments: str | Path) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as opened:
        return {each.name: opened.extractfile(each).read() for each in opened if each.isfile()}  # type: ignore[union-attr]


def document(files: dict[str, bytes], digest: str) -> Any:
    return json.loads(files[f"blobs/{digest.replace(':', '/')}"])


@pytest.fixture
def built(cli: Cli, tmp_path: Path) -> Path:
    """Build an image on one that was loaded, and write it in both forms."""
    image = made()
    cli("images", "load", packed(image.layout(), tmp_path / "in.tar"))
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    outputs = [f"--output=type={kind},dest={tmp_path / f'{kind}.tar'}" for kind in ("oci", "docker")]
    cli("build", "-q", "-t", "app:1", *outputs, tmp_path)
    return tmp_path


@pytest.mark.needs("skopeo", "umoci")
def test_the_tools_of_others_read_what_is_written(built: Path, cli: Cli) -> None:
    files = read(built / "oci.tar")
    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "1"
    manifest = document(files, entry["digest"])
    config = document(files, manifest["config"]["digest"])
    # What was loaded is there as it came.
    assert manifest["layers"][:2] == made().manifest["layers"]
    assert config["config"]["StopTimeout"] == 7
    assert config["config"]["Env"] == ["PATH=/bin", "A=b", "C=d"]
    assert len(config["rootfs"]["diff_ids"]) == 3
    *said, maintainer, run_, env = config["history"]
    assert ["empty_layer" in each for each in (*said, maintainer, run_, env)] == [False] * 2 + [
        True,
        False,
        True,
    ]
    assert run_ == {"created": config["created"], "created_by": DOCKERFILE.splitlines()[3]}
    assert env == {"created": config["created"], "created_by": "ENV C=d", "empty_layer": True}
    assert config["author"] == "somebody"
    assert manifest["config"]["digest"] == json.loads(cli("images", "inspect", "app:1").out)["id"]
    for source in (f"oci-archive:{built}/oci.tar", f"docker-archive:{built}/docker.tar:app:1"):
        raw = run("skopeo", "inspect", "--config", "--raw", source)
        assert described(raw.encode(), "")["digest"] == manifest["config"]["digest"]
        found = json.loads(raw)
        assert found["rootfs"] == config["rootfs"]
    layout = f"oci:{built}/layout:1"
    run("skopeo", "--insecure-policy", "copy", f"oci-archive:{built}/oci.tar", layout)
    run("umoci", "unpack", "--rootless", "--image", f"{built}/layout:1", built / "bundle")
    etc = built / "bundle/rootfs/etc"
    assert {each.name: each.read_text() for each in etc.iterdir()} == {"new": "new\n", "two": "2"}


@pytest.mark.needs("skopeo", "umoci", "ids")
def test_what_the_tools_of_others_write_is_read(tmp_path: Path, cli: Cli) -> None:
    source = (
        f"oci:{written(made().layout(**{'org.opencontainers.image.ref.name': '1'}), tmp_path / 'made')}:1"
    )
    for form in ("docker-archive:{}/skopeo.tar:acme/web:1", "oci-archive:{}/oci.tar:acme/web:1"):
        run("skopeo", "--insecure-policy", "copy", source, form.format(tmp_path))
    assert "loaded acme/web:1 (docker archive)" in cli("images", "load", tmp_path / "skopeo.tar").out
    assert "loaded acme/web:1 (OCI image layout)" in cli("images", "load", tmp_path / "oci.tar").out
    run("umoci", "config", "--image", f"{tmp_path}/made:1", "--tag", "2", "--config.user", "7")
    assert "named:2" in cli("images", "load", "-t", "named:2", "--", tmp_path / "oci.tar").out
    (tmp_path / "Dockerfile").write_text("FROM other\nRUN true\n")
    layout = f"--build-context=other=oci-layout://{tmp_path}/made"
    cli("build", "-q", "-t", "on:1", layout + ":2", tmp_path)
    assert json.loads(cli("images", "inspect", "on:1").out)["config"]["User"] == "7"
    refused = cli("build", layout, tmp_path, status=2)
    assert "has 2 images, and one is wanted" in refused.err
    assert "tags there are 1, 2" in refused.err
    assert "has 0 images called 9" in cli("build", layout + ":9", tmp_path, status=2).err
    (tmp_path / "empty").mkdir()
    no_layout = cli("build", f"--build-context=other=oci-layout://{tmp_path}/empty", tmp_path, status=2)
    assert "is not an OCI image layout" in no_layout.err


def test_images_are_saved_and_loaded_again(built: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("images", "save", "app:1", "acme/web:1", "-o", built / "both.tar")
    entries = json.loads(read(built / "both.tar")["manifest.json"])
    assert [entry["RepoTags"] for entry in entries] == [["app:1"], ["acme/web:1"]]
    identity = json.loads(cli("images", "inspect", "acme/web:1").out)["id"]
    assert identity == described(made().config_data, "")["digest"]
    own = json.loads(cli("images", "inspect", "app:1").out)["id"]
    assert (
        cli("images", "export", "app:1", "-o", f"oci,dest={built / 'again.tar'}").out.strip().endswith("tar")
    )
    assert (built / "again.tar").read_bytes() == (built / "oci.tar").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    # What is built again is the same file, also on standard output.
    again = cli("build", "-q", "-t", "app:1", f"--output=type=oci,dest={built / 'third.tar'}", built)
    assert again.out.strip() == cli("build", "-q", built).out.strip() == own
    assert (built / "third.tar").read_bytes() == (built / "oci.tar").read_bytes()
    cli("images", "rm", "app:1", "acme/web:1")
    out = cli("images", "load", built / "both.tar").out
    assert "loaded app:1 (OCI image layout)" in out
    assert json.loads(cli("images", "inspect", "acme/web:1").out)["id"] == identity
    # Whoever gets the image calls it as its builder did.
    assert json.loads(cli("images", "inspect", "app:1").out)["id"] == own
    steps = json.loads(cli("images", "history", "--json", "app:1").out)
    assert [step["created_by"].split(" ")[0] for step in steps] == [
        *("FROM", "FROM", "MAINTAINER", "RUN", "ENV"),
    ]
    assert "RUN rm /etc/one" in cli("history", "app:1").out
    cli("images", "rm", "app:1", "acme/web:1")
    cli("cache", "prune", "--all", "--force")
    cli("images", "prune")
    blobs = cli.home / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == [blobs / "lock"]


def facts(cli: Cli, tag: str) -> dict[str, Any]:
    """Return what is known of an image beside what is in it and where that came from."""
    record = json.loads(cli("images", "inspect", tag).out)
    provenance = json.loads(cli("images", "provenance", tag).out)["predicate"]
    kept = {key: record[key] for key in ("id", "build_id", "created", "base", "ca", "firebuild_version")}
    return kept | {
        "epoch": record.get("source_date_epoch"),
        "forms": [form["digest"] for form in record["outputs"]],
        "provenance": provenance["runDetails"]["metadata"]["invocationId"],
    }


def test_an_image_that_comes_from_outside_again_keeps_what_is_known_of_its_build(
    built: Path, cli: Cli
) -> None:
    cli.setenv("SOURCE_DATE_EPOCH", "1700000000")
    cli("build", "-q", "-t", "app:1", f"--output=oci,dest={built / 'zstd.tar'},compression=zstd", built)
    cli("images", "export", "app:1", "-o", "tar")
    cli("images", "save", "app:1", "-o", built / "saved.tar")
    known = facts(cli, "app:1")
    assert known["base"]["reference"] == "acme/web:1"
    assert known["build_id"] == known["provenance"]
    assert (known["epoch"], len(known["forms"])) == (1700000000, 1)
    manifests = [
        json.loads(read(built / name)["index.json"])["manifests"][0]["digest"]
        for name in ("saved.tar", "zstd.tar")
    ]
    # In the same form, once more, in other blobs, and together with a name that it did not have.
    for archive in ("saved.tar", "saved.tar", "zstd.tar", "saved.tar"):
        cli("images", "load", "-t", "app:1", built / archive)
        assert facts(cli, "app:1") == known
    cli("images", "load", "-t", "more:1", built / "zstd.tar")
    assert facts(cli, "more:1") == known
    source = json.loads(cli("images", "inspect", "more:1").out)["source"]
    assert source["origin"].endswith("zstd.tar")
    (built / "Dockerfile").write_text("FROM app\n")
    for digest in manifests:
        layout = f"--build-context=app=docker-image://app@{digest}"
        cli("build", "-q", "--no-cache", layout, built)
    cli("store", "check")
    # Another image has its name and nothing else of it.
    cli("images", "load", "-t", "app:1", packed(made().layout(), built / "web.tar"))
    other = json.loads(cli("images", "inspect", "app:1").out)
    assert (other["build_id"], other["outputs"], "source_date_epoch" in other) == ("", [], False)
    assert "has no provenance" in cli("images", "provenance", "app:1", status=2).err


def test_a_build_with_the_result_of_an_image_from_outside_adds_what_it_knows(built: Path, cli: Cli) -> None:
    cli("images", "save", "app:1", "-o", built / "saved.tar")
    cli("images", "rm", "app:1")
    cli("images", "load", built / "saved.tar")
    outside = json.loads(cli("images", "inspect", "app:1").out)
    assert (outside["build_id"], outside["base"]["reference"]) == ("", "")
    cli("build", "-q", "-t", "app:1", built)
    record, known = json.loads(cli("images", "inspect", "app:1").out), facts(cli, "app:1")
    assert known["build_id"] == known["provenance"]
    assert known["base"]["reference"] == "acme/web:1"
    assert (record["source"], record["id"]) == (outside["source"], outside["id"])
    # What is the same is left as it is, and a name more has all that the others have.
    cli("build", "-q", "-t", "more:1", "-t", "app:1", built)
    assert facts(cli, "app:1") == facts(cli, "more:1") == known
    # A blob that is lost is not needed for a build.
    blob = record["layers"][-1]["blob"]["digest"].removeprefix("sha256:")
    (cli.home / "blobs/sha256" / blob).unlink()
    cli("build", "-q", "-t", "app:1", built)
    again = json.loads(cli("images", "inspect", "app:1").out)
    assert (again["id"], "source" in again) == (record["id"], False)


def test_an_archive_goes_to_standard_output(built: Path, cli: Cli) -> None:
    environ = {**os.environ, "FIREBUILD_HOME": str(cli.home)}
    firebuild = [str(Path(sys.executable).parent / "firebuild")]
    for command in (
        ["build", "-q", "-t", "app:1", "-o", "type=oci,dest=-", str(built)],
        ["images", "save", "app:1", "--format", "oci"],
        ["images", "export", "app:1", "--output", "type=oci,dest=-"],
    ):
        done = subprocess.run([*firebuild, *command], capture_output=True, check=True, env=environ)
        assert done.stdout == (built / "oci.tar").read_bytes()
    for load in (["images", "load", "-"], ["images", "load"], ["load"]):
        piped = subprocess.run(
            [*firebuild, *load, "--name", "piped"],
            input=(built / "docker.tar").read_bytes(),
            capture_output=True,
            check=True,
            env=environ,
        )
        assert b"loaded piped:latest" in piped.stdout


def test_load_takes_its_file_as_docker_does(built: Path, cli: Cli) -> None:
    assert "loaded app:1" in cli("load", "-i", built / "docker.tar").out
    assert "loaded named:1" in cli("images", "load", "--input", built / "oci.tar", "-t", "named:1").out
    refused = cli("load", "-i", built / "docker.tar", built / "oci.tar", status=2)
    assert refused.err == "error: SOURCE and --input can't be used together\n"
    master, terminal = os.openpty()
    firebuild = [str(Path(sys.executable).parent / "firebuild"), "load"]
    environ = {**os.environ, "FIREBUILD_HOME": str(cli.home)}
    done = subprocess.run(firebuild, stdin=terminal, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard input is a terminal\n  hint: name a ")
    os.close(terminal)
    os.close(master)


def test_a_root_file_system_becomes_a_base(cli: Cli, tmp_path: Path) -> None:
    root = packed({"etc/passwd": b"root"}, tmp_path / "root.tar")
    assert "has no name" in cli("images", "load", root, status=2).err
    assert "loaded plain:latest (root file system)" in cli("images", "load", root, "--name", "plain").out
    (tmp_path / "Dockerfile").write_text("FROM plain\nENV A=b\n")
    for name in ("one.tar", "two.tar"):
        cli("build", "-q", "-t", "on:1", f"--output=oci,dest={tmp_path / name}", tmp_path)
    files = read(tmp_path / "one.tar")
    manifest = document(files, json.loads(files["index.json"])["manifests"][0]["digest"])
    base = json.loads(cli("base", "list", "--json").out)[0]
    (diff_id,) = document(files, manifest["config"]["digest"])["rootfs"]["diff_ids"]
    blob = files[f"blobs/{manifest['layers'][0]['digest'].replace(':', '/')}"]
    assert described(gzip.decompress(blob), "")["digest"] == diff_id == base["digest"]
    assert files == read(tmp_path / "two.tar")


def test_what_can_t_be_loaded_is_named_wherever_it_comes_from(cli: Cli, tmp_path: Path) -> None:
    firebuild = [str(Path(sys.executable).parent / "firebuild"), "images", "load", "--name", "x"]
    environ = {**os.environ, "FIREBUILD_HOME": str(cli.home)}
    empty = b'{"manifests": []}'
    for name, files, why in (
        (
            "none.tar",
            {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": empty},
            ": there is no",
        ),
        ("files.tar", {}, " is an archive without files"),
        (
            "old.tar",
            {"repositories": b"{}", "1/layer.tar": b""},
            " is an image as `docker save` wrote it before",
        ),
    ):
        source = packed(files, tmp_path / name)
        refused = cli("images", "load", source, "--name", "x", status=2).err
        assert refused.startswith(f"error: {source}{why}")
        if name == "old.tar":
            assert "`docker load` takes it" in refused
            assert cli("base", "import", "x", source, status=2).err == refused
        done = subprocess.run(
            firebuild, input=source.read_bytes(), capture_output=True, env=environ, check=False
        )
        assert done.returncode == 2
        assert done.stderr.decode().startswith(f"error: standard input{why}")
    cut = (tmp_path / "old.tar").read_bytes()[:700]
    done = subprocess.run(firebuild, input=cut, capture_output=True, env=environ, check=False)
    assert done.stderr.startswith(b"error: standard input is damaged: ")


@pytest.mark.needs("skopeo")
def test_layers_go_out_as_they_are_asked_for_and_the_image_is_the_same(built: Path, cli: Cli) -> None:
    identity = json.loads(cli("images", "inspect", "app:1").out)["id"]
    ways = {"plain": "uncompressed", "zstd": "zstd,compression-level=1", "all": "zstd,force-compression=true"}
    outputs = [f"--output=type=oci,dest={built / name},compression={how}" for name, how in ways.items()]
    cli("images", "export", "app:1", *outputs)
    found = {}
    for name in ("oci.tar", *ways):
        files = read(built / name)
        manifest = document(files, json.loads(files["index.json"])["manifests"][0]["digest"])
        assert manifest["config"]["digest"] == identity
        found[name] = [layer["mediaType"].rpartition(".")[2] for layer in manifest["layers"]]
        run(
            "skopeo", "--insecure-policy", "copy", f"oci-archive:{built / name}", f"oci:{built}/{name}-read:1"
        )
    theirs = [layer["mediaType"].rpartition(".")[2] for layer in made().manifest["layers"]]
    assert found == {
        "oci.tar": [*theirs, "tar+gzip"],
        "plain": [*theirs, "tar"],
        "zstd": [*theirs, "tar+zstd"],
        "all": ["tar+zstd"] * 3,
    }
    # An image from outside, too, is what it was, in other blobs.
    cli(
        "images",
        "export",
        "acme/web:1",
        f"--output=oci,dest={built / 'web'},compression=zstd,force-compression=true",
    )
    cli("images", "export", "acme/web:1", f"--output=oci,dest={built / 'web0'},compression=zstd")
    files = read(built / "web")
    manifest = document(files, json.loads(files["index.json"])["manifests"][0]["digest"])
    assert manifest["config"]["digest"] == made().manifest["config"]["digest"]
    digest = described(json.dumps(made().manifest).encode(), "")["digest"]
    assert json.loads(read(built / "web0")["index.json"])["manifests"][0]["digest"] == digest
    # One that was changed is not passed on.
    (blob,) = (cli.home / "blobs/sha256").glob(made().manifest["layers"][0]["digest"].removeprefix("sha256:"))
    blob.write_bytes(gzip.compress(b"other"))
    refused = cli(
        *("images", "export", "acme/web:1"),
        f"--output=oci,dest={built / 'bad'},compression=uncompressed,force-compression=true",
        status=6,
    )
    assert "was modified after it was stored" in refused.err
    assert not [*built.glob("bad*"), *built.glob(".*.partial")]
    refused = cli("images", "export", "app:1", "--output=registry", status=2)
    assert "`firebuild images push`" in refused.err


def test_a_form_with_layers_has_to_go_somewhere(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    assert "add dest=FILE" in cli("build", "--output", "oci", tmp_path, status=2).err


def test_a_load_that_is_killed_leaves_a_sound_store(tmp_path: Path, cli: Cli) -> None:
    data = packed(made().docker(), tmp_path / "in.tar").read_bytes()
    firebuild = [str(Path(sys.executable).parent / "firebuild"), "images", "load", str(tmp_path / "in.tar")]
    environ = {**os.environ, "FIREBUILD_HOME": str(cli.home)}
    # It is killed as soon as the first file of each kind is there.
    for pattern in ("blobs/partial/*", "blobs/sha256/*", "layers/*/staging/*/*", "layers/*/names/*"):
        process = subprocess.Popen(
            firebuild, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not list(cli.home.glob(pattern)):
            pass
        process.kill()
        process.wait()
        cli("store", "check")
    assert "loaded acme/web:1" in cli("images", "load", tmp_path / "in.tar").out
    assert (tmp_path / "in.tar").read_bytes() == data
    cli("store", "check")
    cli("images", "rm", "acme/web:1")
    cli("cache", "prune", "--all", "--force")
    cli("images", "prune")
    assert list(cli.home.glob("blobs/*/*")) == []


@pytest.mark.needs("root")
def test_what_is_there_already_can_be_had_from_a_store_that_is_read_only(cli: Cli, tmp_path: Path) -> None:
    source = packed(Made([layer({"etc/": None, "etc/one": "1"})]).docker(), tmp_path / "in.tar")
    cli("images", "load", source)
    cli("images", "export", "made:1", "-o", "tar")
    firebuild = Path(sys.executable).with_name("firebuild")
    script = f"""
        mount --bind {cli.home} {cli.home} && mount -o remount,bind,ro {cli.home} || exit 99
        for command in "save made:1 -o saved.tar" "export made:1 -o oci,dest=oci.tar" \\
            "export made:1 -o tar,dest=rootfs.tar" "export made:1 -o ext4,dest=rootfs.ext4"; do
            {firebuild} images $command > /dev/null; echo "${{command##*[=/ ]}} $?"
        done
    """
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "FIREBUILD_HOME": str(cli.home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["saved.tar 0", "oci.tar 0", "rootfs.tar 0", "rootfs.ext4 6"]
    assert "the form can't be stored: Read-only file system" in done.stderr
    assert {path.name for path in tmp_path.glob("*.tar")} == {"in.tar", "saved.tar", "oci.tar", "rootfs.tar"}
