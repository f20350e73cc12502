"""`firebuild store check`: whatever is damaged is found and named, with a remedy that works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.conftest import Cli
from image.layouts import Made, layer, packed
from support import Firebuild, await_end_of_processes

pytestmark = pytest.mark.needs("userns", "busybox")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store of an image that was built, one that was loaded, and a base."""
    directory = tmp_path_factory.mktemp("filled")
    firebuild, context = Firebuild(directory / "home"), directory / "context"
    made = Made([layer({"etc/": None, "etc/one": "1"})], {}, "acme/web:1")
    firebuild("images", "load", packed(made.layout(), directory / "in.tar"))
    (directory / "tree").mkdir()
    (directory / "tree/file").write_text("text")
    firebuild("base", "import", "tiny", directory / "tree")
    context.mkdir()
    shutil.copy("/bin/busybox", context / "busybox")
    (context / "Dockerfile").write_text("FROM tiny\nCOPY busybox /bin/sh\nRUN echo 1 > /one\n")
    firebuild("build", "-q", "-t", "app:1", "--output", "ext4", context)
    await_end_of_processes(directory / "home")
    return directory


@pytest.fixture
def store(cli: Cli, filled: Path) -> Cli:
    """A copy of it, beside its context."""
    subprocess.run(["cp", "-a", filled / "home", cli.home], check=True)
    for name in ("busybox", "Dockerfile"):
        shutil.copy(filled / "context" / name, name)
    return cli


def one(store: Cli, pattern: str) -> Path:
    [found] = store.home.glob(pattern)
    return found


def problems(store: Cli, *options: str, left: bool = True) -> list[str]:
    """The lines of a check, without the directory of the store and what differs from run to run."""
    done = store("store", "check", *options, status=6 if left else 0)
    text = done.out.replace(f"{store.home}/", "")
    return re.sub("[0-9a-f]{16}(-[0-9a-f]{16})?|sha256:[0-9a-f]{64}", "ID", text).splitlines()


SOUND = "2 images, 1 base, 3 blobs, 4 layers"


def test_a_store_is_sound_also_for_those_who_can_not_write_there(store: Cli) -> None:
    assert problems(store, left=False) == [f"sound: {SOUND}"]
    # The second time what the first has noted counts.
    assert problems(store, left=False) == [f"sound: {SOUND}"]
    assert problems(store, "--repair", left=False) == [f"sound: {SOUND}"]
    (store.home / "layers/1-another").mkdir()
    assert problems(store, left=False) == [
        "not checked: layers of the id mapping 1-another, which machine.ids may choose",
        f"sound: {SOUND}",
    ]


@pytest.fixture
def read_only(store: Cli) -> Iterator[None]:
    subprocess.run(["mount", "--bind", store.home, store.home], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", store.home], check=True)
    yield
    await_end_of_processes(store.home)
    subprocess.run(["umount", "--lazy", store.home], check=True)


@pytest.mark.root
@pytest.mark.usefixtures("read_only")
def test_a_store_on_a_read_only_file_system_is_checked(store: Cli) -> None:
    assert problems(store, left=False) == [f"sound: {SOUND}"]
    assert "read-only" in store("store", "check", "--repair", status=2).err


@pytest.fixture
def small_disk(cli: Cli) -> Iterator[None]:
    cli.home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", cli.home], check=True)
    yield
    await_end_of_processes(cli.home)
    subprocess.run(["umount", "--lazy", cli.home], check=True)


@pytest.mark.root
@pytest.mark.usefixtures("small_disk")
def test_a_disk_that_is_full_ends_a_command_and_harms_nothing(cli: Cli, tmp_path: Path) -> None:
    shutil.copy("/bin/busybox", "sh")
    Path("large").write_bytes(os.urandom(3_000_000))
    Path("Dockerfile").write_text("FROM scratch\nCOPY sh /bin/sh\nCOPY large /\n")
    cli("build", "-q", "-t", "app:1", ".")
    saved = tmp_path / "app.tar"
    full = "No space left on device"
    for form in ("tar", "ext4", "dir", f"oci,dest={saved}"):
        done = cli("images", "export", "app:1", "--output", form, status=6)
        assert full in done.err
        assert "hint: `firebuild du` shows what the store takes" in done.err
        assert problems(cli, left=False)[0].startswith("sound: 1 image, ")
    assert not saved.exists()
    Path("more").write_text("FROM app:1\nCOPY large /again\n")
    assert full in cli("build", "-t", "app:2", "-f", "more", ".", status=1).err
    assert full in cli("base", "import", "tree", ".", status=6).err
    assert problems(cli, left=False)[0].startswith("sound: 1 image, 0 bases, ")
    cli("images", "rm", "app:1")
    cli("cache", "prune", "--all")
    cli("images", "prune")
    Path("large").write_bytes(b"small")
    cli("build", "-q", "-t", "app:2", "--output", f"oci,dest={saved}", ".")
    assert problems(cli, left=False)[0].startswith("sound: 1 image, ")


def test_what_is_of_no_use_is_repaired_and_the_next_build_makes_it_again(store: Cli) -> None:
    problems(store, left=False)
    form = one(store, "images/content/*/rootfs.ext4")
    times = form.stat()
    with open(form, "r+b") as file:
        file.seek(100_000)
        file.write(b"changed")
    os.utime(form, ns=(times.st_atime_ns, times.st_mtime_ns))
    record = next(iter(store.home.glob("layers/*/cache/records/*")))
    record.write_text("{")
    found = [
        "image app:1: images/content/ID/rootfs.ext4 is damaged: "
        "--repair has it written again when it is asked for",
        f"layers/{record.parents[2].name[:-16]}ID/cache/records/ID is damaged: --repair removes it",
    ]
    assert problems(store) == found
    assert problems(store, "--repair", left=False) == [
        *(f"repaired: {line}" for line in found),
        f"repaired: {SOUND}",
    ]
    assert problems(store, left=False) == [f"sound: {SOUND}"]
    digest = json.loads(store("images", "inspect", "app:1").out)["outputs"]
    assert digest == [], "nothing is said about a form that is not what it was"
    store("build", "-q", "-t", "app:1", "--output", "ext4", ".")
    assert problems(store, left=False)[0].startswith("sound")


def test_a_layer_that_somebody_has_changed_is_removed_and_built_again(store: Cli) -> None:
    problems(store, left=False)
    one(store, "layers/*/content/*/layer/fs/one").write_text("2")
    found = "the layer ID was modified after it was stored: --repair removes it, unless a build uses it"
    assert problems(store) == [f"{found}; then build app:1 again"]
    assert problems(store, "--repair") == [f"repaired: {found}; then build app:1 again"]
    missing = "image app:1: its layer ID is missing: `firebuild images rm app:1`, and build, load or pull it"
    assert problems(store) == [f"{missing} again"]
    assert "is not in the store" in store("images", "path", "app:1", "-o", "tar", status=6).err
    store("build", "-q", "-t", "app:1", ".")
    assert problems(store, left=False)[0].startswith("sound")
    await_end_of_processes(store.home)
    assert one(store, "layers/*/content/*/layer/fs/one").read_text() == "1\n"


def test_blobs_and_what_is_unpacked_of_them_come_again_from_where_they_came(store: Cli, filled: Path) -> None:
    problems(store, left=False)
    image = json.loads(store("images", "inspect", "acme/web:1").out)
    blob = store.home / "blobs" / image["layers"][0]["blob"]["digest"].replace(":", "/")
    good = blob.read_bytes()
    one(store, "layers/*/content/*/layer/fs/etc/one").write_text("2")
    blob.write_bytes(good[:-9])
    found = [
        "blobs/sha256/IDIDIDID: its bytes have the digest ID: "
        "--repair removes it; then load or pull its images again",
        "the layer ID was modified after it was stored: --repair removes it, unless a build uses it",
    ]
    assert problems(store) == found
    # A build that comes to the blob first says what is wrong.
    layer_tree = one(store, "layers/*/content/*/layer/fs/etc/one").parents[3]
    (store.home / "layers" / layer_tree.parents[1].name / "names" / image["layers"][0]["key"]).unlink()
    Path("on").write_text("FROM acme/web:1\nLABEL a=b\n")
    done = store("build", "-f", "on", "--output", "tar", ".", status=6)
    assert f"{blob} was modified after it was stored, or the disk is failing" in done.err
    assert "store check --repair" in done.err
    assert problems(store, "--repair")[0] == f"repaired: {found[0]}"
    assert problems(store) == ["image acme/web:1: its blob ID is missing: load or pull it again"]
    store("images", "load", filled / "in.tar")
    assert blob.read_bytes() == good
    store("build", "-f", "on", "--output", "tar", ".")
    assert problems(store, left=False)[0].startswith("sound")


def test_records_of_images_and_bases_are_named_and_hide_no_others(store: Cli) -> None:
    base = one(store, "bases/content/*")
    with open(base / "rootfs.tar", "r+b") as file:
        file.seek(300)
        file.write(b"changed")
    changed = "is missing, or was modified after it was stored"
    assert problems(store) == [
        f"bases/content/ID/rootfs.tar {changed}: `firebuild base rm tiny:latest`, and import it again",
        # The same file under another name.
        f"image app:1: images/content/ID/base.tar {changed}: `firebuild images rm app:1`, and build, load or "
        "pull it again",
    ]
    (base / "base.json").write_text("{")
    (base / "rootfs.tar").unlink()
    app = one(store, "images/names/library/app/1").resolve()
    web = one(store, "images/names/acme/web/1").resolve()
    (app / "sbom.json").write_text("{")
    (app / "provenance.json").write_text("[]")
    assert [line for line in problems(store) if line.startswith("image app:1")][1:] == [
        f"image app:1: images/content/ID/{name}.json is damaged: --repair removes it"
        for name in ("provenance", "sbom")
    ]
    image = (app / "image.json").read_text()
    (app / "image.json").write_text("[]")
    shutil.rmtree(web)
    lines = problems(store)
    assert [line.split(": ")[0] for line in lines] == [
        "bases/content/ID/base.json is damaged",
        "image acme/web:1",
        "images/content/ID/image.json is damaged",
    ]
    assert lines[0].endswith("`firebuild base rm tiny:latest`, and import it again")
    assert lines[2].endswith("`firebuild images rm app:1`, and build, load or pull it again")
    for command in (("images", "list"), ("du",), ("base", "list")):
        done = store(*command, status=6)
        assert "is damaged" in done.err
        assert "what is shown is not all" in done.err
    for size in ("1e999", "1" + "0" * 400):
        (app / "image.json").write_text(re.sub('"size": *[0-9]+', f'"size": {size}', image))
        assert [line.split(": ")[0] for line in problems(store)][
            2
        ] == "images/content/ID/image.json is damaged"
        assert "is damaged" in store("images", "list", status=6).err
    store("images", "rm", "app:1", "acme/web:1")
    store("base", "rm", "tiny:latest")
    assert problems(store, left=False)[0].startswith("sound: 0 images, 0 bases, ")


def test_what_can_not_be_read_is_said(store: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = next(iter(store.home.glob("blobs/sha256/*")))
    blob.unlink()
    blob.mkdir()
    archive = one(store, "bases/content/*/rootfs.tar")
    archive.unlink()
    archive.mkdir()
    form = one(store, "images/content/*/base.tar")
    form.unlink()
    form.mkdir()
    unpacked = one(store, "layers/*/content/*/layer/fs/one")
    (unpacked.parent / ".wh.odd").touch()
    (store.home / "drives/1-x/names").mkdir(parents=True)
    (store.home / "drives/1-x/names/gone").symlink_to("../content/gone")
    lines = problems(store)
    assert [line[:26] for line in lines] == [
        "blobs/sha256/IDIDIDID: Is ",
        "bases/content/ID/rootfs.ta",
        "images/content/ID/base.tar",
        "layer ID: could not read a",
        "drive gone: its files are ",
    ]
    assert all("so it can't be checked: do that as the user" in line for line in lines[:3])
    assert "--repair removes it, unless a build uses it" in lines[3]
    repaired = problems(store, "--repair")
    assert [line.startswith("repaired: ") for line in repaired] == [False, False, False, True, True]
    assert "drive gone" not in "".join(problems(store))
    shutil.rmtree(store.home / "bases")
    monkeypatch.setenv("FIREBUILD_MACHINE__IDS", "full" if os.geteuid() else "subids")
    assert any(line.startswith("not checked: layers, because machine.ids") for line in problems(store))


def test_a_base_whose_files_are_gone_is_named(store: Cli) -> None:
    shutil.rmtree(one(store, "bases/content/*"))
    assert problems(store) == [
        "base tiny:latest: its files are gone: `firebuild base rm tiny:latest`, and import it again"
    ]
