from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.guest.overlay import mount_layers
from firebuild_bootstrap.image.bases import Base
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerTrees, StoredLayer
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.machine.base import GuestOptions, Machine, MachineExit
from firebuild_bootstrap.machine.console import BoundedLog
from firebuild_bootstrap.machine.local import LocalMachine
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import Host, IdMap, Sandbox
from firebuild_bootstrap.sandbox.idmap import single
from support import privately

pytestmark = pytest.mark.needs("bwrap")
NO_BOOTSTRAP: dict[str, object] = {"latest": {"meta-data": {}}}
# Nobody listens there: vminit tries until its time is up.
UNREACHABLE = {
    "latest": {
        "meta-data": {
            "Bootstrap": {
                "HostPort": "127.0.0.1:9", "CAChain": "x", "Cert": "x", "Key": "x", "ServerName": "x",
            }
        }
    }
}  # fmt: skip


def whole(base: Base) -> list[ArchiveLayer]:
    return [ArchiveLayer(base.archive, base.digest)]


def processes_mentioning(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in words and entry.name != str(os.getpid()):
            found.append(words)
    return found


def test_the_local_machine_is_a_machine(machine: LocalMachine) -> None:
    as_machine: Machine = machine
    assert as_machine.poll() is None
    assert as_machine.stop() is None
    assert as_machine.wait(0) is None


def test_the_base_becomes_the_root(machine: LocalMachine, host_base: Base, idmap: IdMap) -> None:
    assert machine.prepare(whole(host_base)) == ((idmap.note,) if idmap.note else ())
    assert machine.tree().digest == host_base.digest


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, 0)


def contents(tree: Path) -> dict[str, str]:
    """The files below a directory, with what is in them."""
    return {
        str(path.relative_to(tree)): path.read_text()
        for path in sorted(tree.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def unpacked(archive: ArchiveLayer, into: Path) -> dict[str, str]:
    into.mkdir()
    subprocess.run(["tar", "-xf", archive.path, "-C", into], check=True)
    return contents(into)


def archive_of(path: Path, **files: str) -> ArchiveLayer:
    with tarfile.open(path, "w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("_", "/"))
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return ArchiveLayer(path, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")


@pytest.fixture
def below(tmp_path: Path, idmap: IdMap) -> list[Layer]:
    """A base, a layer of an image and a step that is kept unpacked, each with another change."""
    step = tmp_path / "step"
    (step / "fs/dir").mkdir(parents=True)
    (step / "fs/dir/three").write_text("3")
    whiteout(step / "fs/dir/one")
    store = LayerTrees(tmp_path, Trees(Sandbox(idmap)))
    store.adopt("sha256:step", step)
    store.close()
    return [
        archive_of(tmp_path / "base.tar", dir_one="1", dir_two="2", gone="0"),
        archive_of(tmp_path / "image.tar", **{".wh.gone": "", "dir_two": "two"}),
        StoredLayer("sha256:step"),
    ]


MERGED = {"dir/two": "two", "dir/three": "3"}


def test_a_root_of_several_layers_is_their_merged_view(
    machine: LocalMachine, below: list[Layer], tmp_path: Path, idmap: IdMap
) -> None:
    assert machine.prepare(below) == ((idmap.note,) if idmap.note else ())
    assert machine.layers() == ()
    assert unpacked(machine.tree(), tmp_path / "out") == MERGED


def test_the_steps_of_a_machine_are_what_the_next_one_starts_from(
    machine: LocalMachine, below: list[Layer], tmp_path: Path, idmap: IdMap
) -> None:
    machine.prepare(below)
    layers = tmp_path / "builds/build-1/layers"
    for place, name in (("upper/10", "ten"), ("upper/9", "nine"), ("unfinished", "eleven")):
        (layers / place / "fs").mkdir(parents=True)
        (layers / place / "fs" / name).write_text(name)
    whiteout(layers / "upper/10/fs/nine")
    steps = machine.layers()
    assert [layer.step for layer in steps] == [9, 10]
    (tmp_path / "kept").mkdir()
    assert machine.keep(tmp_path / "kept") == ()
    with tarfile.open(tmp_path / "kept/rootfs.tar") as tar:
        names = set(tar.getnames())
    assert names == {".", "dir", "dir/two", "dir/three", "ten", "eleven"}
    with closing(LayerTrees(tmp_path, Trees(Sandbox(idmap)))) as store:
        for layer in steps:
            store.adopt(f"sha256:{layer.step}", layer.directory)
        following = LocalMachine(Workspace(tmp_path, "build-2", idmap))
        following.prepare([*below, StoredLayer("sha256:9"), StoredLayer("sha256:10")])
    assert not following.layers()
    assert unpacked(following.tree(), tmp_path / "out") == {**MERGED, "ten": "ten"}
    following.close()


def test_a_layer_that_is_not_there_is_named(machine: LocalMachine) -> None:
    with pytest.raises(MachineError, match="the layer sha256:none is not in the store"):
        machine.prepare([StoredLayer("sha256:none")])


@pytest.mark.root
@pytest.mark.needs("root", "debugfs")
def test_without_overlays_layers_are_written_over_each_other(
    below: list[Layer], tmp_path: Path, idmap: IdMap
) -> None:
    for name in ("lower/0", "lower/1", "upper", "work", "refusing"):
        (tmp_path / name).mkdir(parents=True)
    notes: list[str] = []

    def copy() -> None:
        # An overlay can't have its upper directory on another one.
        mount_layers(str(tmp_path), ["lower/0", "lower/1"], str(tmp_path / "refusing"), "upper", "work")
        machine = LocalMachine(Workspace(tmp_path / "refusing", "build-1", idmap))
        notes.extend(machine.prepare(below[:2]))
        assert machine.layers() == ()
        shutil.copy(machine.tree().path, tmp_path / "whole.tar")
        machine.close()

    privately(copy)
    whole = unpacked(ArchiveLayer(tmp_path / "whole.tar", ""), tmp_path / "rootfs")
    assert whole == {"dir/one": "1", "dir/two": "two"}
    [told] = [note for note in notes if note != idmap.note]
    assert told.startswith(f"the base is copied for this build, because {tmp_path}/refusing/builds/build-1")
    assert "allows no overlay: " in told


def test_scratch_is_an_empty_root(machine: LocalMachine, tmp_path: Path) -> None:
    machine.prepare([])
    assert unpacked(machine.tree(), tmp_path / "out") == {}


def test_preparing_twice_is_an_error(machine: LocalMachine) -> None:
    machine.prepare([])
    with pytest.raises(MachineError, match="layers: File exists"):
        machine.prepare([])


def test_vminit_reads_its_metadata_and_its_last_words_are_kept(machine: LocalMachine) -> None:
    machine.prepare([])
    machine.metadata.put(NO_BOOTSTRAP)
    machine.start()
    ended = machine.wait(30)
    assert ended is not None
    assert ended.code != 0
    assert ended.description == f"vminit ended with status {ended.code}"
    assert "no Bootstrap block" in ended.log
    assert machine.poll() == ended


def test_a_running_machine_is_not_read_and_stops_when_asked(machine: LocalMachine) -> None:
    machine.prepare([])
    machine.metadata.put(UNREACHABLE)
    machine.start(GuestOptions(connect_timeout=60))
    assert machine.poll() is None
    with pytest.raises(MachineError, match="can't be read while vminit runs"):
        machine.tree()
    began = time.monotonic()
    ended = machine.stop(grace=3)
    assert ended is not None
    assert time.monotonic() - began < 8
    assert machine.stop() == ended


def test_closing_ends_the_machine_and_removes_everything(
    tmp_path: Path, idmap: IdMap, host_base: Base
) -> None:
    machine = LocalMachine(Workspace(tmp_path, "build-1", idmap))
    machine.prepare(whole(host_base))
    machine.metadata.put(UNREACHABLE)
    machine.start()
    assert processes_mentioning(f"{tmp_path}/builds/build-1/layers")
    machine.close()
    machine.close()
    assert os.listdir(tmp_path / "builds") == ["lock"]
    # The cleanup process removes the directory in the background.
    end = time.monotonic() + 30
    while processes_mentioning(f"{tmp_path}/builds/build-1") and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_mentioning(f"{tmp_path}/builds/build-1") == []


def test_with_one_id_the_user_is_told_what_that_means(tmp_path: Path, host_base: Base) -> None:
    alone = single(Host.current(), "install uidmap")
    machine = LocalMachine(Workspace(tmp_path, "build-1", alone))
    [note] = machine.prepare(whole(host_base))
    assert note.startswith("files can be given to root only: chown to other users needs")
    machine.close()


def test_what_a_base_loses_is_said_in_words() -> None:
    assert UnpackReport(members=5).notes() == ()
    examples = {"foreign": ["a (7:7)", "b (7:7)", "c (7:7)"], "stripped": ["a"], "devices": ["d"]}
    report = UnpackReport(foreign=4, stripped=1, devices=1, attributes=1, examples=examples)
    foreign, stripped, devices, attributes = report.notes()
    assert foreign.startswith("4 files of the base belong to root now")
    assert foreign.endswith("a (7:7), b (7:7), c (7:7), …")
    assert stripped.startswith("1 of them lost their setuid or setgid bit")
    assert devices.endswith(": d")
    assert attributes.startswith("1 extended attributes")


def test_an_end_by_a_signal_is_described_by_its_name() -> None:
    assert MachineExit(128 + signal.SIGKILL).description == "vminit was ended by SIGKILL"
    assert MachineExit(128 + 99).description == "vminit was ended by signal 99"
    assert MachineExit(0).signal is None


def test_the_log_keeps_the_end_and_starts_with_a_whole_line() -> None:
    read, write = os.pipe()
    log = BoundedLog(os.fdopen(read, "rb"), limit=100)
    with os.fdopen(write, "wb") as writer:
        writer.write(b"".join(b"line %d\n" % number for number in range(1000)))
    log.finish(5)
    text = log.text()
    assert text.endswith("line 998\nline 999\n")
    assert text.startswith("line 9")
    assert len(text) <= 100
