from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.bases import Base
from firebuild_bootstrap.image.outputs import OutputType, parse_outputs
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.machine.base import ArchiveLayer, GuestOptions, Machine, MachineExit
from firebuild_bootstrap.machine.local import LocalMachine
from firebuild_bootstrap.machine.log import BoundedLog
from firebuild_bootstrap.machine.rootfs import unpack_notes
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import Host, IdMap, Sandbox
from firebuild_bootstrap.sandbox.idmap import single

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


@pytest.mark.needs("mke2fs")
def test_the_base_becomes_the_root_and_is_exported_in_every_form(
    machine: LocalMachine, host_base: Base, tmp_path: Path, idmap: IdMap
) -> None:
    assert machine.prepare(whole(host_base)) == ((idmap.note,) if idmap.note else ())
    into = tmp_path / "out"
    into.mkdir()
    made = {
        artifact.type: artifact for artifact in machine.export(parse_outputs(["ext4", "tar", "dir"]), into)
    }
    assert sorted(os.listdir(into)) == ["rootfs", "rootfs.ext4", "rootfs.tar"]
    assert made[OutputType.TAR].digest == host_base.digest
    assert made[OutputType.EXT4].size == (into / "rootfs.ext4").stat().st_size
    summary = Trees(Sandbox(idmap)).summary(into / "rootfs")
    assert (made[OutputType.DIR].size, made[OutputType.DIR].digest) == (summary.size, summary.digest)


def test_scratch_is_an_empty_root(machine: LocalMachine, tmp_path: Path) -> None:
    machine.prepare([])
    [artifact] = machine.export(parse_outputs(["dir"]), tmp_path)
    assert os.listdir(tmp_path / artifact.path) == []


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


def test_a_running_machine_is_not_exported_and_stops_when_asked(
    machine: LocalMachine, tmp_path: Path
) -> None:
    machine.prepare([])
    machine.metadata.put(UNREACHABLE)
    machine.start(GuestOptions(connect_timeout=60))
    assert machine.poll() is None
    with pytest.raises(MachineError, match="can't be exported while vminit runs"):
        machine.export(parse_outputs([]), tmp_path)
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
    assert note.startswith("files in the image can belong to root only: chown to other users needs")
    machine.close()


def test_what_a_base_loses_is_said_in_words() -> None:
    assert unpack_notes(UnpackReport(members=5)) == ()
    examples = {"foreign": ["a (7:7)", "b (7:7)", "c (7:7)"], "stripped": ["a"], "devices": ["d"]}
    report = UnpackReport(foreign=4, stripped=1, devices=1, attributes=1, examples=examples)
    foreign, stripped, devices, attributes = unpack_notes(report)
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


@pytest.mark.root
@pytest.mark.needs("mke2fs")
def test_the_epoch_makes_outputs_reproducible(tmp_path: Path, idmap: IdMap, host_base: Base) -> None:
    digests = []
    for name in ("one", "two"):
        machine = LocalMachine(Workspace(tmp_path, name, idmap), epoch=1_000_000_000)
        machine.prepare(whole(host_base))
        (tmp_path / "out" / name).mkdir(parents=True)
        made = machine.export(parse_outputs(["tar", "ext4,size=64MiB"]), tmp_path / "out" / name)
        digests.append([artifact.digest for artifact in made])
        machine.close()
    assert digests[0] == digests[1]
