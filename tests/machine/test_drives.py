"""The drives of virtual machines, and the layers that their guests send."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError, Interrupted, MachineError
from firebuild_bootstrap.image.drives import prune_snapshot_drives, snapshot_drives
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, StoredLayer
from firebuild_bootstrap.layers.tar import write_layer
from firebuild_bootstrap.layers.tree import upper_entries
from firebuild_bootstrap.machine.drives import Drives, SentLayers
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import IdMap
from firebuild_bootstrap.solve.cache_mounts import cache_mounts
from firebuild_bootstrap.wire import CacheMount

pytestmark = [pytest.mark.needs("userns")]


@pytest.fixture
def drives(workspace: Workspace, tmp_path: Path) -> Iterator[Callable[..., Drives]]:
    made: list[Drives] = []

    def make(**settings: Any) -> Drives:
        part = workspace.part(str(len(made)))
        made.append(Drives(part, caches=tmp_path / "caches", **{"size": 32 << 20, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def layers(workspace: Workspace, tmp_path: Path) -> list[Layer]:
    """A base, and a step that removes something of it."""
    base = tmp_path / "base.tar"
    with tarfile.open(base, "w") as tar:
        for name in ("etc/old", "etc/kept"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"old"))
    step = tmp_path / "step"
    (step / "fs/etc").mkdir(parents=True)
    os.mknod(step / "fs/etc/old", 0o020000, 0)
    (step / "fs/new").write_text("new")
    with closing(workspace.layer_trees()) as stored:
        stored.adopt("step", step)
    return [ArchiveLayer(base, "sha256:base"), StoredLayer("step")]


def listed(drive: Path, directory: str) -> set[str]:
    command = ["debugfs", "-R", f"ls -p {directory}", str(drive)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split("/")[5] for line in said.splitlines() if line.count("/") > 5} - {".", ".."}


def test_a_snapshot_is_written_once_and_is_forgotten_when_nobody_has_it(
    drives: Callable[..., Drives], layers: list[Layer], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    first, second = drives(), drives()
    first.prepare(layers)
    second.prepare(layers)
    assert first.snapshot == second.snapshot
    assert first.snapshot.stat().st_mode & 0o777 == 0o444
    assert (listed(first.snapshot, "/"), listed(first.snapshot, "/etc")) == ({"etc", "new"}, {"kept"})
    assert listed(first.scratch, "/") == set()
    assert first.scratch.stat().st_size == 32 << 20
    assert first.scratch.stat().st_blocks * 512 < 1 << 20
    [used] = snapshot_drives(home)
    assert (used.layers, used.in_use) == (2, True)
    assert prune_snapshot_drives(home) == []
    first.close()
    second.close()
    for number in range(10):  # old ones go by themselves
        empty = drives()
        empty.prepare([ArchiveLayer(layers[0].path, f"sha256:{number}")])  # type: ignore[union-attr]
        empty.close()
    assert len(snapshot_drives(home)) == 8
    assert not first.snapshot.exists()
    assert len(prune_snapshot_drives(home)) == 8
    assert not [*home.glob("drives/*/content/*")]


def test_a_layer_between_those_of_steps_is_on_the_scratch_drive_and_in_what_is_kept(
    drives: Callable[..., Drives], layers: list[Layer], workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "link/fs/etc").mkdir(parents=True)
    (tmp_path / "link/fs/etc/linked").write_text("between")
    with closing(workspace.layer_trees()) as stored:
        stored.adopt("link", tmp_path / "link")
    machine = drives()
    machine.prepare([*layers, StoredLayer("link", step=5)])
    assert (listed(machine.snapshot, "/etc"), listed(machine.scratch, "/")) == ({"kept"}, {"layers"})
    assert listed(machine.scratch, "/layers/between/5/etc") == {"linked"}
    machine.keep(tmp_path)
    with tarfile.open(tmp_path / "rootfs.tar") as tar:
        assert {name.strip("./") for name in tar.getnames()} == {"", "etc", "etc/kept", "etc/linked", "new"}
    with pytest.raises(InputError, match=r"the layers of 1 cached steps do not fit into .* of 1048576 bytes"):
        drives(size=1 << 20).prepare([*layers, StoredLayer("link", step=5)])


def test_a_cache_mount_has_a_drive_that_one_machine_has_at_a_time(
    drives: Callable[..., Drives], tmp_path: Path
) -> None:
    notes: list[str] = []
    mount = CacheMount(target="/c", id="deps")
    first, second, third = drives(), drives(notice=notes.append), drives()
    first.prepare([], [mount, CacheMount(target="/again", id="deps")])
    [cache] = first.caches
    assert listed(cache.path, "/") == {"lost+found"}
    third.prepare([], [CacheMount(target="/c", id="deps", sharing="private")])
    assert third.caches[0].path != cache.path
    waiting = threading.Thread(target=second.prepare, args=([], [mount]))
    waiting.start()
    while not notes:
        waiting.join(0.05)
    first.close()
    waiting.join(60)
    assert second.caches[0].path == cache.path
    assert notes == ["only one virtual machine at a time can have the cache mount 'deps'"]
    assert (cache.path.parent.parent / "id").read_text() == "deps"
    many = [CacheMount(target="/c", id=f"other{number}") for number in range(5)]
    [note] = drives().prepare([], many)
    assert note.startswith("a machine keeps 4 cache mounts; the others last as long as this stage")
    (tmp_path / "home/cache-mounts").mkdir()
    (tmp_path / "caches").rename(tmp_path / "home/cache-mounts/vm")
    found = {
        usage.path.relative_to(tmp_path / "home/cache-mounts/vm").parts[1]: usage
        for usage in cache_mounts(tmp_path / "home")
        if usage.id == "deps"
    }
    assert {name: usage.in_use for name, usage in found.items()} == {"0": True, "1": True}


def test_waiting_for_a_cache_ends_when_the_build_does(
    drives: Callable[..., Drives], tmp_path: Path, idmap: IdMap
) -> None:
    def check() -> None:
        raise Interrupted("enough")

    drives().prepare([], [CacheMount(target="/c", id="deps", sharing="locked")])
    with Workspace(tmp_path / "home", "another", idmap) as workspace:
        workspace.check = check
        other = Drives(workspace, caches=tmp_path / "caches", size=32 << 20)
        with pytest.raises(Interrupted):
            other.prepare([], [CacheMount(target="/c", id="deps", sharing="locked")])
        other.close()


def test_files_that_cannot_be_made_are_named(drives: Callable[..., Drives], tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("")
    with pytest.raises(MachineError, match="caches: File exists"):
        drives().prepare([], [CacheMount(target="/c", id="deps")])


# --- layers that are sent --------------------------------------------------------------------------


class Receiving:
    """A receiver, and what it gave."""

    def __init__(self, workspace: Workspace, limit: int = 1 << 20) -> None:
        self.given: dict[int, Path] = {}
        self.notes: list[str] = []
        self.sent = SentLayers(workspace, limit, self._taken, self.notes.append)

    def _taken(self, step: int, directory: Path) -> None:
        self.given[step] = directory

    def write(self, data: bytes) -> None:
        self.sent.write(1, bytes(data))


@pytest.fixture
def receiving(workspace: Workspace) -> Receiving:
    return Receiving(workspace)


def as_layer(upper: Path) -> bytes:
    out = io.BytesIO()
    write_layer(out, upper_entries(str(upper)))
    return out.getvalue()


@pytest.mark.root
def test_a_layer_comes_out_as_it_was_sent(receiving: Receiving, tmp_path: Path, workspace: Workspace) -> None:
    upper = tmp_path / "upper"
    (upper / "old").mkdir(parents=True)
    os.setxattr(upper / "old", "user.overlay.opaque", b"y")
    (upper / "old/file").write_text("new")
    os.link(upper / "old/file", upper / "again")
    os.mknod(upper / "gone", 0o020000, 0)
    os.mkfifo(upper / "pipe")
    os.chown(upper / "again", 7, 8)
    (upper / "again").chmod(0o4755)
    sent = as_layer(upper)
    for step in (3, 4):
        assert receiving.sent.wanted(step)
        for start in range(0, len(sent), 1000):
            receiving.sent.write(step, sent[start : start + 1000])
        receiving.sent.finished(step)
    assert list(receiving.given) == [3, 4]
    assert receiving.notes == []
    for directory in receiving.given.values():
        assert as_layer(directory / "fs") == sent
        assert not (directory / "altered").exists()
    assert [path.name for path in (workspace.path / "layers").iterdir()] == ["upper"]
    assert receiving.sent.trees == {step: found / "fs" for step, found in receiving.given.items()}


def test_a_layer_that_could_not_be_kept_as_it_was_is_marked(receiving: Receiving) -> None:
    device = info("dev-of-mine", tarfile.BLKTYPE, devmajor=7, devminor=1)
    receiving.write(archive((device, b"")))
    receiving.sent.finished(1)
    assert "device nodes of step 1 were left out" in receiving.notes[0]
    assert (receiving.given[1] / "altered").exists()  # `Cache.commit` looks for it


def test_a_guest_without_layers_is_not_asked_again(receiving: Receiving) -> None:
    receiving.sent.finished(1)
    assert not receiving.sent.wanted(2)
    assert receiving.given == {}


def test_a_guest_that_has_sent_layers_has_to_send_the_next(receiving: Receiving) -> None:
    receiving.write(archive((info("f"), b"x")))
    receiving.sent.finished(1)
    with pytest.raises(InputError, match="layers of other steps, but none of step 2"):
        receiving.sent.finished(2)
    assert list(receiving.given) == [1]


def test_a_layer_without_an_end_is_cut_off(receiving: Receiving) -> None:
    piece = bytes(1 << 18)
    with pytest.raises(InputError, match="more than 1048576 bytes as the layer of step 1"):
        for _ in range(5):
            receiving.write(piece)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, data in members:
            if member.size and not data:  # which it only says to have
                out.write(member.tobuf())
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def test_no_layer_gets_out_of_its_directory(receiving: Receiving, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    away = f"../../../../../..{outside}"
    hostile = (
        [(info(f"{away}/a"), b"x")],
        [(info(f"{outside}/a"), b"x")],
        [(info("l", tarfile.SYMTYPE, linkname=str(outside)), b""), (info("l/a"), b"x")],
        [(info("l", tarfile.SYMTYPE, linkname=str(outside)), b""), (info("l/.wh.precious"), b"")],
        [(info("l", tarfile.SYMTYPE, linkname=str(outside)), b""), (info("l/.wh..wh..opq"), b"")],
        [(info(f"{away}/.wh.precious"), b"")],
        [(info("h", tarfile.LNKTYPE, linkname=f"{away}/precious"), b"")],
        [(info("null", tarfile.CHRTYPE, devmajor=1, devminor=3), b"")],
        [(info("d", tarfile.DIRTYPE, pax_headers={"SCHILY.xattr.user.overlay.redirect": "/etc"}), b"")],
        [(info("d", tarfile.DIRTYPE, pax_headers={"SCHILY.xattr.security.selinux": "unconfined_t"}), b"")],
        [(info("d", tarfile.DIRTYPE, pax_headers={"SCHILY.xattr.user.firebuild.owner": "0:0:4000"}), b"")],
    )
    for step, members in enumerate(hostile):
        receiving.sent.write(step, archive(*members))
        try:
            receiving.sent.finished(step)
        except MachineError:
            subprocess.run(["rm", "-rf", *tmp_path.glob("home/builds/*/layers/unfinished")], check=True)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"precious": "precious"}
    for directory in receiving.given.values():
        found = [path for path in directory.rglob("*") if not path.is_symlink()]
        assert not [path for path in found if path.name == "null"]
        assert not [path for path in found if set(os.listxattr(path)) - {"user.overlay.opaque"}]
        assert not [path for path in found if path.is_file() and path.samefile(outside / "precious")]


@pytest.mark.parametrize(
    "data",
    [
        b"no archive at all" * 100,
        archive((info("f"), b"x" * 5000))[:3000],
        archive((info("f", size=1 << 50), b"")),
    ],
    ids=["noise", "cut", "huge"],
)
def test_a_layer_that_is_damaged_is_refused(receiving: Receiving, data: bytes) -> None:
    receiving.write(data)
    with pytest.raises(MachineError, match="could not unpack the layer of a step: the archive is damaged"):
        receiving.sent.finished(1)
    assert receiving.given == {}


def test_what_a_layer_loses_is_told(receiving: Receiving) -> None:
    receiving.write(archive((info("null", tarfile.CHRTYPE, devmajor=1, devminor=3), b"")))
    receiving.sent.finished(1)
    [note] = receiving.notes
    assert note == "1 device nodes of step 1 were left out, which a sandbox can't make: null"
