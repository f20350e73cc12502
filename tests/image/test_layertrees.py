"""Layers kept unpacked: made once, shared, atomic, and removed when nobody wants them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.events import Tasks, TaskStarted
from firebuild_bootstrap.guest.overlay import mount_layers
from firebuild_bootstrap.image import layertrees
from firebuild_bootstrap.image.layertrees import (
    ArchiveLayer,
    Layer,
    LayerTrees,
    StoredLayer,
    chain_key,
    making,
)
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.image.worker.__main__ import answer, overlay_problem
from firebuild_bootstrap.machine import cleanup
from firebuild_bootstrap.sandbox import Host, Sandbox, detect
from firebuild_bootstrap.sandbox.idmap import single
from layers.trees import MakeTar, member
from support import privately

pytestmark = pytest.mark.needs("bwrap")
Open = Callable[[], LayerTrees]


@pytest.fixture
def stored(tmp_path: Path, trees: Trees) -> Iterator[Open]:
    """Open the store of one home as another build would."""
    opened: list[LayerTrees] = []

    def another() -> LayerTrees:
        opened.append(LayerTrees(tmp_path / "home", trees))
        return opened[-1]

    yield another
    for each in opened:
        each.close()


def settle(store: LayerTrees) -> None:
    """Do what cleanup processes do at their end."""
    cleanup.settle(store.home, store.root.name, detect)


def contents(store: LayerTrees, folder: str = "content") -> list[str]:
    return os.listdir(store.root / folder)


def layer(directory: Path, name: str = "file") -> Path:
    """What a step leaves behind."""
    (directory / "fs").mkdir(parents=True)
    (directory / "fs" / name).write_text(name)
    return directory


def test_an_archive_is_unpacked_once_for_all_builds_and_what_it_lost_is_said_to_each(
    tmp_path: Path, make_tar: MakeTar, trees: Trees
) -> None:
    archive = make_tar(
        "etc/", ("etc/file", b"content"), member("sda", tarfile.BLKTYPE), member("x", uid=2**31)
    )
    tasks: list[str] = []

    def heard(event: object) -> None:
        if isinstance(event, TaskStarted):
            tasks.append(event.name)

    told = Trees(trees.sandbox, tasks=Tasks(heard))
    results = []

    def build() -> None:
        with_own = LayerTrees(tmp_path, told)
        results.append(with_own.unpacked(archive, "sha256:1"))
        with_own.close()

    builds = [threading.Thread(target=build) for _ in range(3)]
    for each in builds:
        each.start()
    for each in builds:
        each.join()
    assert tasks.count("unpacking the root file system") == 1
    assert len({tree for tree, _ in results}) == 1
    assert (results[0][0] / "etc/file").read_bytes() == b"content"
    assert [(report.members, report.devices) for _, report in results] == [(3, 1)] * 3
    assert results[2][1].examples["devices"] == ["sda"]
    store = LayerTrees(tmp_path, told)
    assert len(contents(store)) == 1
    assert contents(store, "staging") == []


def test_a_layer_above_others_becomes_what_it_changes(
    tmp_path: Path, make_tar: MakeTar, stored: Open
) -> None:
    base = make_tar("dir/", ("dir/old", b"old"), ("dir/kept", b""), ("gone", b""), path=tmp_path / "base.tar")
    above = make_tar("dir/", "dir/.wh.old", ".wh.gone", ("new", b"new"), path=tmp_path / "above.tar")
    (tmp_path / "empty").mkdir()
    store = stored()
    below, _ = store.unpacked(base, "sha256:base")
    key = chain_key("sha256:base", "sha256:above")
    tree, report = store.unpacked(above, key, [tmp_path / "empty", below])
    assert report.members == 2
    assert sorted(os.listdir(tree)) == ["dir", "gone", "new"]
    assert (tree / "gone").is_char_device()
    assert os.listdir(tree.parent) == ["fs"]
    assert chain_key("", "sha256:base") == "sha256:base"
    assert len(key) == 71


def test_a_whiteout_in_a_base_removes_nothing_and_is_no_file(make_tar: MakeTar, stored: Open) -> None:
    tree, report = stored().unpacked(make_tar("dir/", "dir/.wh.old", ("new", b"new")), "sha256:base")
    assert report.members == 2
    assert (os.listdir(tree / "dir"), sorted(os.listdir(tree))) == ([], ["dir", "new"])


def test_the_lowest_of_many_layers_are_kept_merged_and_the_view_is_the_same(
    tmp_path: Path, make_tar: MakeTar, stored: Open, trees: Trees, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = (
        ("dir/", ("dir/old", b"old"), ("dir/kept", b""), ("gone", b"")),
        ("dir/", "dir/.wh.old", ".wh.gone", ("new", b"new")),
        (("gone", b"again"),),
        (".wh.dir", ("last", b"")),
    )
    layers: list[Layer] = [
        ArchiveLayer(make_tar(*members, path=tmp_path / f"{number}.tar"), f"sha256:{number}")
        for number, members in enumerate(archives)
    ]
    store = stored()
    store.adopt("step", layer(tmp_path / "step"))
    layers.append(StoredLayer("step"))

    def view(store: LayerTrees) -> set[str]:
        (tmp_path / "view.tar").unlink(missing_ok=True)
        trees.pack(store.merged(layers), tmp_path / "view.tar")
        with tarfile.open(tmp_path / "view.tar") as tar:
            return {f"{each.name.strip('./')} {each.size}" for each in tar}

    seen = view(store)
    assert seen == {" 0", "gone 5", "new 3", "last 0", "file 4"}
    kept = len(contents(store))
    monkeypatch.setattr(layertrees, "_FOLDED", 1)
    assert view(store) == seen
    assert len(contents(store)) == kept + 1, "only what was not unpacked needs what is below it"
    assert len(store.stack(layers)[0]) == 2
    assert len(store.stack(layers)[1]) == 4
    store.close()
    for key in set(store.keys()) - {"step"}:
        store.discard(key)
    assert view(stored()) == seen
    assert view(stored()) == seen
    kinds = [key.partition(":")[0] for key in sorted(store.keys())]
    assert kinds == ["folded"] * 2 + ["sha256"] * 4 + ["step"]


def test_a_step_is_adopted_under_its_key_and_the_first_one_stays(tmp_path: Path, stored: Open) -> None:
    store = stored()
    first = store.adopt("sha256:step", layer(tmp_path / "one"))
    again = stored().adopt("sha256:step", layer(tmp_path / "two", "other"))
    assert first == again
    assert os.listdir(first) == ["file"]
    assert not (tmp_path / "one").exists()
    assert stored().required("sha256:step") == first
    assert (first.parent.parent.stat().st_mode & 0o777) == 0o700, "set-user-ID programs are nobody else's"


def test_a_tree_is_measured_once(tmp_path: Path, stored: Open) -> None:
    store = stored()
    directory = layer(tmp_path / "one")
    (directory / "fs/file").write_bytes(bytes(10_000))
    os.link(directory / "fs/file", directory / "fs/again")
    tree = store.adopt("sha256:step", directory)
    size = store.size("sha256:step")
    assert size == (tree / "file").stat().st_blocks * 512
    (tree / "more").write_bytes(bytes(100_000))
    assert stored().size("sha256:step") == size
    assert store.size("sha256:missing") == 0


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".hidden", "x" * 300])
def test_a_key_is_a_file_name(stored: Open, key: str) -> None:
    with pytest.raises(InputError, match="expected the key of a layer"):
        stored().hold(key)


def test_a_missing_layer_is_named(stored: Open) -> None:
    with pytest.raises(
        MachineError, match=r"the layer sha256:none is not .*\n  hint: `firebuild store check`"
    ):
        stored().required("sha256:none")


def test_what_a_build_holds_outlives_its_key(tmp_path: Path, stored: Open) -> None:
    using, pruning = stored(), stored()
    tree = using.adopt("sha256:step", layer(tmp_path / "one"))
    assert pruning.discard("sha256:step")
    assert not pruning.discard("sha256:step")
    assert (tree / "file").exists()
    assert pruning.hold("sha256:step") is None
    using.close()
    settle(pruning)
    assert contents(pruning) == []


def test_keys_tell_when_they_were_used_last(tmp_path: Path, stored: Open) -> None:
    store = stored()
    for name in ("old", "new"):
        content = store.adopt(f"sha256:{name}", layer(tmp_path / name)).parent.parent
        os.utime(content, (1000, 1000))
    store.required("sha256:new")
    keys = stored().keys()
    assert sorted(keys) == ["sha256:new", "sha256:old"]
    assert keys["sha256:old"] == 1000
    assert keys["sha256:new"] > 1000


def test_another_id_mapping_has_trees_of_its_own(tmp_path: Path) -> None:
    everybody, alone = detect(), single(Host.current(), "for the test")
    roots = {LayerTrees(tmp_path, Trees(Sandbox(idmap))).root for idmap in (everybody, alone)}
    assert len(roots) == (1 if everybody.mode == alone.mode else 2)
    assert all(root.parent == tmp_path / "layers" for root in roots)


def test_a_build_that_is_killed_leaves_nothing_half_made(
    tmp_path: Path, stored: Open, make_tar: MakeTar
) -> None:
    archive = make_tar(*((f"file{number}", b"x" * 1000) for number in range(100)))
    content = archive.read_bytes()
    archive.unlink()
    os.mkfifo(archive)  # so that the build gets no further than it should
    script = (
        "import sys; from pathlib import Path\n"
        "from firebuild_bootstrap.image.layertrees import LayerTrees\n"
        "from firebuild_bootstrap.image.trees import Trees\n"
        "from firebuild_bootstrap.sandbox import Sandbox, detect\n"
        "LayerTrees(Path(sys.argv[1]), Trees(Sandbox(detect()))).unpacked(Path(sys.argv[2]), 'sha256:1')\n"
    )
    store = stored()
    store.root.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "home", archive])
    with suppress(BrokenPipeError), open(archive, "wb") as pipe:
        pipe.write(content[: len(content) // 2])
        pipe.flush()
        while not list(store.root.glob("staging/*/layer/fs/file1")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        while True:  # until its worker has ended, too, which the kernel sees to a moment later
            pipe.write(bytes(1 << 16))
    assert store.hold("sha256:1") is None
    settle(store)
    assert contents(store, "staging") == []
    archive.unlink()
    archive.write_bytes(content)
    tree, _ = store.unpacked(archive, "sha256:1")
    assert len(os.listdir(tree)) == 100


def test_after_a_power_failure_only_what_was_on_the_disk_is_believed(
    tmp_path: Path, stored: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored()
    before.adopt("sha256:safe", layer(tmp_path / "one"))
    settle(before)
    settle(before)  # nothing is new
    before.adopt("sha256:lost", layer(tmp_path / "two"))
    before.close()
    boot = tmp_path / "boot_id"
    boot.write_text("another boot\n")
    monkeypatch.setattr(layertrees, "_BOOT_ID", boot)
    after = stored()
    assert after.hold("sha256:lost") is None
    assert after.hold("sha256:safe") is not None
    assert list(after.keys()) == ["sha256:safe"]
    monkeypatch.setattr(layertrees, "_BOOT_ID", tmp_path / "none")
    assert stored().hold("sha256:safe") is not None
    (after.path("sha256:safe").parents[1] / "layer.json").write_text("{")
    assert stored().hold("sha256:safe") is None, "a damaged entry is none"


def test_settling_a_store_that_is_not_there_makes_none(tmp_path: Path, stored: Open) -> None:
    settle(stored())
    assert not (tmp_path / "home").exists()


def test_waiting_for_another_build_ends_when_it_is_asked_to(
    tmp_path: Path, trees: Trees, make_tar: MakeTar
) -> None:
    class Asked(Exception):
        pass

    def check() -> None:
        raise Asked

    first, second = LayerTrees(tmp_path, trees), LayerTrees(tmp_path, trees, check=check)
    with making(first.root, "sha256:1", Tasks(), "x"), pytest.raises(Asked):
        second.unpacked(make_tar("dir/"), "sha256:1")


def test_whether_overlays_work_is_tried_once(tmp_path: Path, trees: Trees, stored: Open) -> None:
    asked = []

    class Counting(Trees):
        def overlay_problem(self, directory: Path) -> str:
            asked.append(directory)
            return super().overlay_problem(directory)

    for _build in range(2):
        store = LayerTrees(tmp_path / "home", Counting(trees.sandbox))
        assert store.overlay_problem(tmp_path) == ""
    assert asked == [tmp_path]
    known = json.loads((store.root / "overlay.json").read_text())
    assert known["problem"] == ""
    (store.root / "overlay.json").write_text("{")
    assert store.overlay_problem(tmp_path) == ""
    assert len(asked) == 2
    assert [name for name in os.listdir(tmp_path) if name.startswith("overlay-")] == []


@pytest.mark.root
@pytest.mark.needs("root")
def test_an_overlay_that_does_not_work_is_no_secret(tmp_path: Path) -> None:
    for name in ("lower/0", "lower/1", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    said = []

    def ask() -> None:
        said.append(overlay_problem(str(tmp_path)))
        mount_layers(str(tmp_path), ["lower/0", "lower/1"], str(tmp_path / "merged"), "upper", "work")
        said.append(overlay_problem(str(tmp_path / "merged")))

    privately(ask)
    works, refused = said
    assert works == ""
    assert refused.startswith("mount overlay on ")
    assert os.listdir(tmp_path / "upper") == []


@pytest.mark.root
@pytest.mark.needs("root")
def test_the_worker_reads_and_changes_what_layers_are_together(tmp_path: Path, make_tar: MakeTar) -> None:
    for name in ("layers/0", "layers/1", "upper"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "layers/1/old").touch()
    archive = make_tar(("new", b"content"), ".wh.old")
    replies = []

    def work() -> None:
        stack = {"layers": str(tmp_path / "layers"), "mount": str(tmp_path / "mount")}
        request = {"operation": "unpack", "archive": str(archive), "root": stack["mount"], "whiteouts": True}
        replies.append(answer({**request, **stack, "upper": str(tmp_path / "upper")}))
        os.rename(tmp_path / "upper/fs", tmp_path / "layers/2")
        stack["mount"] = str(tmp_path / "merged")
        target = str(tmp_path / "layer.tar")
        replies.append(answer({"operation": "pack", "root": stack["mount"], "archive": target, **stack}))

    privately(work)
    assert [reply.get("error") for reply in replies] == [None, None]
    assert os.listdir(tmp_path / "upper") == []
    with tarfile.open(tmp_path / "layer.tar") as tar:
        assert tar.getnames() == [".", "new"]
