from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image import hostbase
from firebuild_bootstrap.image.bases import BaseStore, Pull, PullPolicy
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import CONFIG, MANIFEST, Descriptor
from firebuild_bootstrap.image.outputs import Artifact, OutputType
from firebuild_bootstrap.image.store import ImageRecord, ImageSource, ImageStore, StoredImage
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.sandbox import Bind, Link

pytestmark = pytest.mark.needs("bwrap")
MakeTar = Callable[..., Path]
NOON = datetime(2030, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
def images(tmp_path: Path, trees: Trees) -> Iterator[ImageStore]:
    store = ImageStore(tmp_path / "home", lambda: trees)
    yield store
    store.close()


@pytest.fixture
def bases(tmp_path: Path, trees: Trees, images: ImageStore) -> Iterator[BaseStore]:
    store = BaseStore(tmp_path / "home", lambda: trees, images=images, clock=lambda: NOON)
    yield store
    store.close()


RECORD = ImageRecord(
    tag="app:1", build_id="b-1", created="2030-01-01T00:00:00+00:00", firebuild_version="0.1.0", layers=()
)


def commit(images: ImageStore, tag: str, outputs: dict[OutputType, bytes], *also: str) -> StoredImage:
    with images.stage() as staging:
        artifacts = []
        for kind, content in outputs.items():
            (staging.path / kind.file_name).write_bytes(content)
            artifacts.append(Artifact(kind, kind.file_name, len(content), "sha256:" + "0" * 64))
        record = ImageRecord(
            tag=tag,
            build_id="b-1",
            created="2030-01-01T00:00:00+00:00",
            firebuild_version="0.1.0",
            base="debian:12",
            base_digest="sha256:1",
            ca_provider="embedded",
            issuer_fingerprint="ab" * 32,
            config=ImageConfig(user="app", cmd=("run",)),
            outputs=tuple(artifacts),
            also_tagged=also,
        )
        return images.commit(staging, record)


def test_an_image_is_found_again_with_all_that_is_known_about_it(images: ImageStore) -> None:
    stored = commit(images, "acme/web:1", {OutputType.EXT4: b"image", OutputType.TAR: b"tar"})
    found = images.inspect(Reference("acme/web", "1"))
    assert found == stored
    document = json.loads((found.directory / "image.json").read_text())
    assert document["config"] == {"User": "app", "Cmd": ["run"], "WorkingDir": "/"}
    assert document["ca"] == {"provider": "embedded", "issuer_fingerprint_sha256": "ab" * 32}
    path = found.output(OutputType.EXT4)
    assert path is not None
    assert path.read_bytes() == b"image"
    assert found.output(OutputType.DIR) is None
    assert ImageRecord.from_json(document) == stored.record


def test_images_are_listed_and_removed_by_tag(images: ImageStore) -> None:
    assert images.list() == []
    commit(images, "b/b:2", {OutputType.TAR: b""})
    commit(images, "a/a:1", {OutputType.TAR: b""})
    assert [str(image.tag) for image in images.list()] == ["a/a:1", "b/b:2"]
    removed = images.inspect(Reference("a/a", "1"))
    images.remove(removed.tag)
    assert not removed.directory.exists()
    assert [str(image.tag) for image in images.list()] == ["b/b:2"]
    with pytest.raises(InputError, match="there is no image a/a:1") as caught:
        images.remove(Reference("a/a", "1"))
    assert caught.value.hint == "images in the store: b/b:2"


def test_no_tag_leads_out_of_the_store(images: ImageStore) -> None:
    with images.stage() as staging, pytest.raises(InputError, match="expected a name with an optional tag"):
        images.commit(staging, ImageRecord(tag="../x:1", build_id="b", created="c", firebuild_version="0"))


def test_an_image_that_can_not_be_written_leaves_the_older_one(images: ImageStore) -> None:
    commit(images, "a/a:1", {OutputType.TAR: b"old"})
    with images.stage() as staging:
        (staging.path / "image.json").mkdir()
        record = ImageRecord(tag="a/a:1", build_id="b", created="c", firebuild_version="0")
        with pytest.raises(MachineError, match="could not be stored: Is a directory"):
            images.commit(staging, record)
    path = images.inspect(Reference("a/a", "1")).output(OutputType.TAR)
    assert path is not None
    assert path.read_bytes() == b"old"


def test_a_damaged_image_is_an_error_with_the_way_out(images: ImageStore) -> None:
    stored = commit(images, "a/a:1", {})
    (stored.directory / "image.json").write_text("{}")
    with pytest.raises(MachineError, match=r"image\.json is damaged") as caught:
        images.inspect(stored.tag)
    assert caught.value.hint == "remove a/a:1 and build it again"


def test_an_image_removed_while_the_list_is_made_is_skipped(
    images: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(images, "a/a:1", {})
    monkeypatch.setattr(images._contents, "names", lambda: [("a", "a", "1"), ("b", "b", "2")])
    assert [str(image.tag) for image in images.list()] == ["a/a:1"]
    images.sweep()


NAMES = [
    "hello", "acme/web", "acme/team/web", "localhost/web", "docker.io/localhost/web", "localhost:5000/web",
    "localhost:5000/acme/web", "[::1]:5000/web", "A.example/web", "a.example/web", "library/a/b", "a/b",
]  # fmt: skip


@pytest.mark.parametrize("tag", ["1", "V1", "v1", "t" * 128])
def test_every_name_is_an_image_and_a_base_of_its_own(
    images: ImageStore, bases: BaseStore, make_tar: MakeTar, tag: str
) -> None:
    names = [*NAMES, "x" * 255, "a.example/" + "/".join(["y" * 40] * 5)]
    archive = make_tar("one")
    for number, name in enumerate(names):
        commit(images, f"{name}:{tag}", {OutputType.TAR: str(number).encode()})
        bases.import_base(f"{name}:{tag}", archive, ImageConfig(user=str(number)))
    assert sorted(map(str, images.names())) == sorted(f"{name}:{tag}" for name in names)
    assert sorted(base.name for base in bases.list()) == sorted(f"{name}:{tag}" for name in names)
    for number, name in enumerate(names):
        path = images.inspect(Reference.parse(f"{name}:{tag}")).output(OutputType.TAR)
        assert path is not None
        assert path.read_bytes() == str(number).encode()
        assert bases.resolve(f"{name}:{tag}").config.user == str(number)
        images.remove(Reference.parse(f"{name}:{tag}"))
        bases.remove(f"{name}:{tag}")
    assert (images.list(), bases.list()) == ([], [])


def test_an_image_is_found_under_every_spelling_and_listed_under_the_one_that_built_it(
    images: ImageStore, bases: BaseStore, make_tar: MakeTar
) -> None:
    commit(images, "hello:1", {OutputType.TAR: b"old"})
    commit(images, "docker.io/library/hello:1", {OutputType.TAR: b"new"})
    assert [str(image.tag) for image in images.list()] == ["docker.io/library/hello:1"]
    path = images.inspect(Reference.parse("library/hello:1")).output(OutputType.TAR)
    assert path is not None
    assert path.read_bytes() == b"new"
    assert bases.resolve("docker.io/hello:1").archive.read_bytes() == b"new"
    bases.import_base("library/hello", make_tar("one"))
    assert bases.resolve("hello").name == "library/hello:latest"


def test_stores_of_earlier_versions_keep_working(
    images: ImageStore, bases: BaseStore, make_tar: MakeTar, tmp_path: Path
) -> None:
    """Names were `org/name:version` for images, and had no spellings; where links are has not changed."""
    for store, old, new in [
        ("images", "docker.io/hello", "library/hello"),
        ("bases", "library+debian", "debian"),
        ("bases", "docker.io+acme+web", "acme+web"),
    ]:
        name = new.replace("+", "/")
        if store == "images":
            commit(images, f"{name}:1", {OutputType.TAR: b"old"})
        else:
            bases.import_base(f"{name}:1", make_tar("one"))
        names = tmp_path / "home" / store / "names"
        (names / old).parent.mkdir(exist_ok=True)
        (names / new).rename(names / old)
        target = os.readlink(names / old / "1")
        assert (names / old / target).exists()
    assert (
        images.inspect(Reference.parse("hello:1")).location
        == tmp_path / "home/images/names/docker.io/hello/1"
    )
    commit(images, "hello:1", {OutputType.TAR: b"new"})  # takes the place of the older one
    path = images.inspect(Reference.parse("docker.io/hello:1")).output(OutputType.TAR)
    assert path is not None
    assert path.read_bytes() == b"new"
    assert len(images.list()) == 1
    assert bases.resolve("debian:1").name == "debian:1"
    bases.remove("acme/web:1")
    assert [base.name for base in bases.list()] == ["debian:1"]


def test_one_image_can_have_several_names(images: ImageStore) -> None:
    commit(images, "a/a:1", {OutputType.TAR: b"x"}, "hello", "reg.example/a:2")
    assert [str(image.tag) for image in images.list()] == ["a/a:1", "hello:latest", "reg.example/a:2"]
    assert images.inspect(Reference.parse("hello")).record.tag == "hello:latest"
    images.tag(Reference.parse("hello"), Reference.parse("other:3"))
    images.remove(Reference.parse("a/a:1"))
    found = images.inspect(Reference.parse("other:3"))
    assert (str(found.tag), found.record.also_tagged) == ("other:3", ())
    with pytest.raises(InputError, match="there is no image a/a:1"):
        images.tag(Reference.parse("a/a:1"), Reference.parse("x"))


def test_a_record_with_a_name_that_is_none_is_damaged(images: ImageStore) -> None:
    stored = commit(images, "a/a:1", {})
    record = stored.directory / "image.json"
    record.write_text(record.read_text().replace("a/a:1", "../.."))
    with pytest.raises(MachineError, match=r"image\.json is damaged"):
        images.inspect(stored.tag)


@pytest.mark.root
def test_an_image_with_foreign_owners_is_removed(images: ImageStore, trees: Trees) -> None:
    with images.stage() as staging:
        (staging.path / "rootfs/dir").mkdir(parents=True)
        os.chown(staging.path / "rootfs/dir", 1234, 1234)
        record = ImageRecord(tag="a/a:1", build_id="b", created="c", firebuild_version="0")
        stored = images.commit(staging, record)
    images.remove(stored.tag)
    assert not stored.directory.exists()


def test_a_compressed_archive_becomes_a_base(bases: BaseStore, make_tar: MakeTar, tmp_path: Path) -> None:
    plain = make_tar("etc/", ("etc/hostname", b"x")).read_bytes()
    (tmp_path / "x.tgz").write_bytes(gzip.compress(plain))
    base = bases.import_base("my/debian:12", tmp_path / "x.tgz", ImageConfig(env={"A": "1"}))
    assert base.archive.read_bytes() == plain
    assert (base.name, base.size, base.imported) == ("my/debian:12", len(plain), "2030-01-02T12:00:00+00:00")
    assert bases.resolve("my/debian:12") == base
    assert bases.list() == [base]
    assert bases.resolve("my/debian:12").config.env == {"A": "1"}
    assert bases.resolve(f"my/debian:12@{base.digest}") == base
    with pytest.raises(InputError, match="has the digest sha256:"):
        bases.resolve("my/debian:12@sha256:" + "0" * 64)


def test_a_directory_becomes_a_base_called_latest(bases: BaseStore, rich_tree: Path, trees: Trees) -> None:
    base = bases.import_base("rich", rich_tree)
    assert base.name == "rich:latest"
    again = rich_tree.parent / "again"
    again.mkdir()
    trees.unpack(bases.resolve("rich").archive, again)
    assert trees.summary(again, times=True) == trees.summary(rich_tree, times=True)


def test_a_base_is_replaced_and_removed(bases: BaseStore, make_tar: MakeTar) -> None:
    bases.import_base("b", make_tar("one"))
    second = bases.import_base("b", make_tar("two"))
    assert bases.resolve("b").digest == second.digest
    bases.remove("b")
    bases.import_base("c", make_tar("one"))
    with pytest.raises(InputError, match="unknown base b:latest") as caught:
        bases.remove("b")
    assert caught.value.hint == "did you mean c:latest? known are c:latest"


def test_a_wrong_source_is_an_error_and_leaves_nothing(
    bases: BaseStore, tmp_path: Path, make_tar: MakeTar
) -> None:
    with pytest.raises(InputError, match="missing does not exist"):
        bases.import_base("b", tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="text is damaged"):
        bases.import_base("b", tmp_path / "text")
    with pytest.raises(InputError, match="a name with an optional tag"):
        bases.import_base("b@sha256:" + "0" * 64, make_tar("one"))
    with pytest.raises(MachineError, match="/proc/self/mem could not be copied into the store"):
        bases.import_base("b", Path("/proc/self/mem"))
    assert bases.list() == []
    assert os.listdir(tmp_path / "home/bases/staging") == []


def test_an_unknown_base_shows_the_nearest_name_and_how_to_import(
    bases: BaseStore, images: ImageStore, make_tar: MakeTar
) -> None:
    with pytest.raises(InputError, match="unknown base or image debian:latest") as caught:
        bases.resolve("debian")
    assert caught.value.hint == (
        "there are none yet; build it, or import it with `firebuild base import debian DIRECTORY-OR-TAR`"
    )
    bases.import_base("debian:12", make_tar("one"))
    commit(images, "acme/web:1", {OutputType.TAR: b""})
    with pytest.raises(InputError, match="unknown base or image debain:12") as caught:
        bases.resolve("debain:12")
    assert caught.value.hint == (
        "did you mean debian:12? known are debian:12, acme/web:1; "
        "build it, or import it with `firebuild base import debain:12 DIRECTORY-OR-TAR`"
    )


def test_an_image_of_an_earlier_version_with_a_tar_output_is_a_base(
    bases: BaseStore, images: ImageStore
) -> None:
    commit(images, "acme/web:1", {OutputType.TAR: b"tar", OutputType.EXT4: b"image"})
    base = bases.resolve("acme/web:1")
    assert base.archive.read_bytes() == b"tar"
    assert base.config.user == "app"
    commit(images, "acme/db:1", {OutputType.EXT4: b"image"})
    with pytest.raises(
        InputError, match="acme/db:1 is of an earlier version and has no tar output"
    ) as caught:
        bases.resolve("acme/db:1")
    assert caught.value.hint == "build it again"
    with pytest.raises(InputError, match="the image acme/web:1 has the digest sha256:0"):
        bases.resolve(f"acme/web:1@sha256:{'1' * 64}")
    with pytest.raises(InputError, match="unknown base or image a/b/c"):
        bases.resolve("a/b/c")
    with pytest.raises(InputError, match="unknown base or image acme/web:2"):
        bases.resolve("acme/web:2")


def test_a_store_without_images_works_too(tmp_path: Path, trees: Trees, make_tar: MakeTar) -> None:
    alone = BaseStore(tmp_path / "alone", lambda: trees)
    assert alone.import_base("b", make_tar("one")).imported
    with pytest.raises(InputError, match="unknown base or image a/b"):
        alone.resolve("a/b")
    alone.close()


def test_a_damaged_base_is_an_error_with_the_way_out(bases: BaseStore, make_tar: MakeTar) -> None:
    base = bases.import_base("b", make_tar("one"))
    (base.archive.parent / "base.json").write_text("[]")
    with pytest.raises(MachineError, match=r"base\.json is damaged") as caught:
        bases.resolve("b")
    assert caught.value.hint == "import the base again"


def test_the_host_itself_makes_a_base_whose_tools_run(bases: BaseStore, trees: Trees, tmp_path: Path) -> None:
    base = bases.create_from_host("host")
    # The same files have the same digest, whenever they were collected.
    assert bases.create_from_host("again").digest == base.digest
    assert base.config.cmd == ("/bin/sh",)
    root = tmp_path / "root"
    root.mkdir()
    trees.unpack(base.archive, root)
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    binds = [Bind(root / "usr", "/usr"), Bind(root / "etc", "/etc")]
    links = [Link(f"usr/{name}", f"/{name}") for name in ("bin", "sbin", "lib", "lib64")]
    script = "id -un; echo a b | awk '{print $2}'; seq 3 | grep -c .; tar --version >/dev/null; ls /usr/bin"
    done = trees.sandbox.run(["/bin/sh", "-euc", script], binds=[*binds, *links])
    assert done.stderr == b""
    assert done.stdout.split()[:3] == [b"root", b"b", b"3"]
    assert (
        os.listdir(base.archive.parent) == ["base.json", "rootfs.tar"]
        or len(os.listdir(base.archive.parent)) == 2
    )


def test_a_host_without_a_shell_or_ldd_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(MachineError, match="no shell was found"):
        hostbase.make_host_tree(tmp_path / "tree", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="ldd was not found"):
        hostbase.make_host_tree(tmp_path / "tree")


def test_an_ldd_that_never_stops_talking_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    ldd = tmp_path / "bin/ldd"
    ldd.write_text("#!/bin/sh\nexec yes\n")
    ldd.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ldd.parent}:/usr/bin:/bin")
    (tmp_path / "root").mkdir()
    with pytest.raises(MachineError, match=r"^ldd failed: it wrote more than 1048576 bytes$"):
        hostbase.make_host_tree(tmp_path / "root")


def test_libraries_go_where_their_programs_look_for_them() -> None:
    assert hostbase._inside("/lib/x86_64-linux-gnu/libc.so.6") == "usr/lib/x86_64-linux-gnu/libc.so.6"
    assert hostbase._inside("/opt/lib/libx.so") == "opt/lib/libx.so"
    found = hostbase._libraries(["/bin/sh"])
    assert any("libc.so" in path or "musl" in path for path in found)
    assert subprocess.run(["test", "-e", found[0]], check=True).returncode == 0


def test_a_directory_with_an_oci_layout_is_no_root_directory(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    (layout / "blobs/sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text("{}")
    bases = BaseStore(tmp_path / "home", lambda: pytest.fail("nothing is packed"))
    with pytest.raises(InputError, match="is an OCI image layout") as caught:
        bases.import_base("x", layout)
    assert "firebuild images load" in str(caught.value.hint)
    assert bases.list() == []


def test_a_registry_is_asked_only_for_what_is_not_there(tmp_path: Path, trees: Trees) -> None:
    images = ImageStore(tmp_path / "home", lambda: trees)
    asked: list[str] = []

    def pull(wanted: Reference) -> StoredImage | None:
        asked.append(str(wanted))
        if wanted.familiar == "nowhere":
            return None
        digest = wanted.digest or f"sha256:{'1' * 64}"
        source = ImageSource(Descriptor(MANIFEST, digest, 1), Descriptor(CONFIG, f"sha256:{'2' * 64}", 1))
        with images.stage() as staging:
            record = replace(RECORD, tag=str(replace(wanted, digest="")))
            images.commit(staging, replace(record, source=replace(source, pulled=True)))
        return images.find(replace(wanted, digest=""), hold=True)

    def store(policy: PullPolicy, pull: Pull | None = pull) -> BaseStore:
        return BaseStore(tmp_path / "home", lambda: trees, images=images, pull=pull, policy=policy)

    with pytest.raises(InputError, match="unknown base or image alpine:3"):
        store(PullPolicy.NEVER).resolve("alpine:3")
    with pytest.raises(InputError, match="unknown base or image nowhere:latest"):
        store(PullPolicy.MISSING).resolve("nowhere")
    assert asked == ["nowhere:latest"]
    for policy in (PullPolicy.MISSING, PullPolicy.MISSING, PullPolicy.NEVER, PullPolicy.ALWAYS):
        assert store(policy).resolve("alpine:3").name == "alpine:3"
    assert asked[1:] == ["alpine:3", "alpine:3"]
    # By a digest that is there nothing is pulled, whatever its tag; by another one it is.
    assert store(PullPolicy.ALWAYS).resolve(f"alpine@sha256:{'1' * 64}").name == "alpine:3"
    assert len(asked) == 3
    store(PullPolicy.MISSING).resolve(f"alpine:3@sha256:{'3' * 64}")
    assert asked[3:] == [f"alpine:3@sha256:{'3' * 64}"]
    with pytest.raises(InputError, match="expected sha256:444"):
        store(PullPolicy.NEVER).resolve(f"alpine:3@sha256:{'4' * 64}")
    images.close()


def test_what_was_built_here_is_never_pulled(tmp_path: Path, trees: Trees) -> None:
    images = ImageStore(tmp_path / "home", lambda: trees)
    with images.stage() as staging:
        images.commit(staging, replace(RECORD, tag="app:1"))
    bases = BaseStore(
        tmp_path / "home",
        lambda: trees,
        images=images,
        pull=lambda wanted: pytest.fail(f"{wanted} is asked for"),
        policy=PullPolicy.ALWAYS,
    )
    assert bases.resolve("app:1").name == "app:1"
    bases.close()
