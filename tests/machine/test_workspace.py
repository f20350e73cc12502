from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.machine import cleanup
from firebuild_bootstrap.machine.workspace import Workspace, sweep
from firebuild_bootstrap.sandbox import Host, IdMap, find_runtime
from firebuild_bootstrap.sandbox.idmap import single
from support import unique_seconds

pytestmark = pytest.mark.needs("bwrap")
AsTester = Callable[[str], str]

# A build that has files of other owners, a sandbox that ignores SIGTERM, and then dies in the given way.
BUILD = """
import os, signal, sys, time
from pathlib import Path
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import Bind, detect
home = Path(os.environ["HOME"], "store")
idmap = detect()
workspace = Workspace(home, "doomed", idmap)
binds = [*workspace.runtime.binds, Bind(workspace.path, "/w", read_only=False)]
script = "mkdir -p /w/a/b; touch /w/a/b/c; chown -R 77:77 /w/a; chmod 0 /w/a; echo ready; "
script += "trap '' TERM; sleep {marker}"
process = workspace.sandbox.popen(["sh", "-c", script], binds=binds, stdout=-1)
process.stdout.readline()
print(idmap.mode, (workspace.path / "a").stat().st_uid, home, flush=True)
{end}
"""


def build(end: str, marker: str = "7744") -> str:
    return BUILD.replace("{end}", end).replace("{marker}", marker)


def until_gone(builds: Path, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.listdir(builds) == ["lock"]:
            return True
        time.sleep(0.02)
    return False


def test_the_directories_of_builds_lie_apart_on_the_disk(tmp_path: Path, idmap: IdMap) -> None:
    def flags(path: Path) -> str:
        return subprocess.run(["lsattr", "-d", path], capture_output=True, text=True, check=False).stdout

    if "e" not in flags(tmp_path).partition(" ")[0]:
        pytest.skip("this file system is not ext4, or lsattr is missing")
    with Workspace(tmp_path, "b-1", idmap):
        assert "T" in flags(tmp_path / "builds").partition(" ")[0]


def test_the_directory_is_private_and_gone_afterwards(tmp_path: Path, idmap: IdMap) -> None:
    with Workspace(tmp_path, "b-1", idmap) as workspace:
        assert workspace.path == tmp_path / "builds/b-1"
        assert workspace.path.stat().st_mode & 0o777 == 0o700
        (workspace.path / "x/y").mkdir(parents=True)
    assert os.listdir(tmp_path / "builds") == ["lock"]
    workspace.close()


@pytest.mark.parametrize("build_id", ["", "..", "a/b", ".x", "a\n", "x" * 200])
def test_a_build_id_is_a_harmless_file_name(tmp_path: Path, idmap: IdMap, build_id: str) -> None:
    with pytest.raises(InputError, match="expected a build id"):
        Workspace(tmp_path, build_id, idmap)


def test_two_builds_of_one_id_do_not_share_a_directory(tmp_path: Path, idmap: IdMap) -> None:
    with Workspace(tmp_path, "b-1", idmap) as workspace:
        with pytest.raises(MachineError, match="can't be made: File exists"):
            Workspace(tmp_path, "b-1", idmap)
        assert workspace.path.is_dir()


def test_the_leftovers_of_a_dead_machine_are_removed_and_living_builds_kept(
    tmp_path: Path, idmap: IdMap
) -> None:
    (tmp_path / "builds/old/inner").mkdir(parents=True)
    with Workspace(tmp_path, "living", idmap) as living, Workspace(tmp_path, "next", idmap):
        assert living.path.is_dir()
        assert sorted(os.listdir(tmp_path / "builds")) == ["living", "lock", "next"]


def test_without_its_cleanup_the_build_removes_its_directory_itself(tmp_path: Path, idmap: IdMap) -> None:
    workspace = Workspace(tmp_path, "b-1", idmap)
    workspace._cleanup.kill()
    workspace._cleanup.wait()
    workspace.close()
    assert os.listdir(tmp_path / "builds") == ["lock"]


def test_without_python_there_is_no_workspace(
    tmp_path: Path, idmap: IdMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = find_runtime()
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(MachineError, match="/no/python can't be started: No such file"):
        Workspace(tmp_path, "b-1", idmap, runtime=runtime)


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "workspace.cleanup_pid"]
)
def test_however_a_build_dies_nothing_is_left(tmp_path: Path, end: str) -> None:
    env = {**os.environ, "HOME": str(tmp_path)}
    marker = unique_seconds()
    done = subprocess.run(
        [sys.executable, "-c", build(end, marker)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert str(tmp_path) in done.stdout, done.stderr
    assert until_gone(tmp_path / "store/builds")
    assert subprocess.run(["pgrep", "-f", f"sleep {marker}$"], check=False).returncode == 1


def test_the_interrupt_key_does_not_reach_the_cleanup(tmp_path: Path) -> None:
    end = "os.killpg(0, signal.SIGINT); time.sleep(60)"
    env = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", build(end)]
    subprocess.run(command, env=env, capture_output=True, check=False, start_new_session=True)
    assert until_gone(tmp_path / "store/builds")


# As a sandbox whose monitor was killed before it had mapped the ids: it waits forever, and dies with nobody.
STUCK = """
import os, signal, subprocess, time
from pathlib import Path
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import detect
home = Path(os.environ["HOME"], "store")
workspace = Workspace(home, "doomed", detect())
lifeline = workspace._lifeline
stuck = subprocess.Popen(["sleep", "7755"], pass_fds=[lifeline], start_new_session=True)
print(stuck.pid, home, flush=True)
{end}
"""


def ended(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if b"7755" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "workspace.close(); os._exit(0)"])
def test_a_process_that_keeps_the_lifeline_does_not_keep_the_directory(tmp_path: Path, end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK.replace("{end}", end)],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -9), done.stderr
    assert ended(int(done.stdout.split()[0]))
    assert until_gone(tmp_path / "store/builds")


@pytest.mark.needs("tester")
def test_nor_does_it_for_an_unprivileged_user(as_tester: AsTester) -> None:
    pid, home = as_tester(STUCK.replace("{end}", "os.kill(os.getpid(), signal.SIGKILL)")).split()
    assert ended(int(pid))
    assert until_gone(Path(home, "builds"))


@pytest.mark.needs("tester")
@pytest.mark.needs("newuidmap")
def test_an_unprivileged_build_leaves_nothing_of_its_subordinate_ids(as_tester: AsTester) -> None:
    mode, uid, home = as_tester(build("os.kill(os.getpid(), signal.SIGKILL)")).split()
    assert mode == "subids"
    assert int(uid) == 100_000 + 76
    assert until_gone(Path(home, "builds"))


@pytest.mark.needs("tester")
@pytest.mark.needs("newuidmap")
def test_an_unprivileged_user_builds_images_with_the_right_owners(as_tester: AsTester) -> None:
    script = textwrap.dedent("""
        import os, subprocess, tarfile
        from pathlib import Path
        from firebuild_bootstrap.image.bases import BaseStore
        from firebuild_bootstrap.image.layertrees import LayerTrees
        from firebuild_bootstrap.image.outputs import export_tree, parse_outputs
        from firebuild_bootstrap.image.store import ImageRecord, ImageStore
        from firebuild_bootstrap.image.trees import Trees
        from firebuild_bootstrap.image.layertrees import ArchiveLayer
        from firebuild_bootstrap.machine.local import LocalMachine
        from firebuild_bootstrap.machine.workspace import Workspace
        from firebuild_bootstrap.sandbox import Sandbox, detect
        home = Path(os.environ["HOME"], "store")
        idmap = detect()
        trees = Trees(Sandbox(idmap))
        base = BaseStore(home, lambda: trees).create_from_host("host")
        with tarfile.open(home / "x.tar", "w") as tar:
            for name, uid in (("app", 1000), ("stranger", 3_000_000)):
                info = tarfile.TarInfo(name)
                info.uid = info.gid = uid
                info.mode = 0o4755
                tar.addfile(info)
        machine = LocalMachine(Workspace(home, "b", idmap))
        archive = ArchiveLayer(home / "x.tar", "sha256:x")
        print(*machine.prepare([archive]), sep="|")
        store = ImageStore(home, lambda: trees)
        with store.stage() as staging:
            root = LayerTrees(home, trees).merged([archive])
            made = export_tree(trees, root, parse_outputs(["ext4", "tar", "dir"]), staging.path)
            record = ImageRecord(tag="a/b:1", build_id="b", created="c", firebuild_version="0", outputs=made)
            image = store.commit(staging, record)
        machine.close()
        with tarfile.open(image.directory / "rootfs.tar") as tar:
            print([(m.name, m.uid, oct(m.mode)) for m in tar if m.name != "."])
        request = ["/usr/sbin/debugfs", "-R", "stat /app", image.directory / "rootfs.ext4"]
        print("User:  1000" in subprocess.run(request, capture_output=True, text=True).stdout)
        print((image.directory / "rootfs/app").stat().st_uid)
        store.remove(image.tag)
        print(os.listdir(home / "images/content"), os.listdir(home / "builds"))
    """)
    notes, members, ext4, uid, left = as_tester(script).splitlines()
    assert "1 files of the base belong to root now" in notes
    assert "stranger (3000000:3000000)" in notes
    assert "lost their setuid" in notes
    assert members == "[('app', 1000, '0o4755'), ('stranger', 0, '0o755')]"
    assert ext4 == "True"
    assert uid == str(100_000 + 999)
    assert left == "[] ['lock']"


def test_the_cleanup_removes_what_its_user_may_and_the_rest_in_the_id_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idmap: IdMap
) -> None:
    for number, pretended in enumerate((0, 1000)):
        doomed = tmp_path / f"builds{number}" / "doomed"
        (doomed / "x").mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda uid=pretended: uid)
            cleanup.remove(doomed, lambda: idmap)
        assert not doomed.exists()


def test_the_cleanup_waits_for_the_end_of_the_pipe(
    tmp_path: Path, idmap: IdMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = tmp_path / "doomed"
    doomed.mkdir()
    monkeypatch.setattr(
        sys, "argv", ["cleanup", str(doomed), json.dumps(idmap.as_json()), "x", str(os.getppid())]
    )
    read, write = os.pipe()
    thread = threading.Thread(target=cleanup.main, args=(read,))
    thread.start()
    thread.join(0.2)
    assert doomed.is_dir()
    os.close(write)
    thread.join(10)
    assert not doomed.exists()
    os.close(read)


def test_the_cleanup_ends_what_still_holds_the_pipe_when_firebuild_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cleanup, "_GRACE_SECONDS", 0.1)
    read, write = os.pipe()
    holder = subprocess.Popen(["sleep", "7755"], pass_fds=[write])
    os.close(write)
    cleanup.await_end(read, parent=os.getpid())
    assert holder.wait(10) == -signal.SIGKILL
    os.close(read)


def test_no_polite_signal_ends_the_cleanup_before_its_build(tmp_path: Path, idmap: IdMap) -> None:
    with Workspace(tmp_path, "b-1", idmap) as workspace:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            workspace._cleanup.send_signal(number)
        time.sleep(0.3)
        assert workspace._cleanup.poll() is None
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert os.listdir(tmp_path / "builds") == ["lock"]


def test_a_single_id_build_is_removed_too(tmp_path: Path) -> None:
    alone = replace(single(Host.current(), ""), note="")
    with Workspace(tmp_path, "b-1", alone) as workspace:
        (workspace.path / "locked/inner").mkdir(parents=True)
        (workspace.path / "locked").chmod(0)
    assert os.listdir(tmp_path / "builds") == ["lock"]


def in_time(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def removing(home: Path) -> list[str]:
    return os.listdir(home / "removing") if (home / "removing").exists() else []


def stopped_while_removing(home: Path, idmap: IdMap, files: int) -> Workspace | None:
    workspace = Workspace(home, "b-1", idmap)
    for number in range(files):
        os.mknod(workspace.path / f"{number}")
    cleanup = workspace._cleanup

    def stop() -> None:
        in_time(lambda: removing(home) or cleanup.poll() is not None)
        cleanup.send_signal(signal.SIGSTOP)

    stopper = threading.Thread(target=stop)
    stopper.start()
    workspace.close()
    stopper.join()
    return workspace if removing(home) else None


@pytest.fixture
def half_removed(tmp_path: Path, idmap: IdMap) -> Iterator[Workspace]:
    """A closed build with much to remove, whose cleanup was stopped in the middle of it."""
    sizes = (1000, 3000, 10_000, 30_000)
    workspace = next(filter(None, (stopped_while_removing(tmp_path, idmap, size) for size in sizes)))
    yield workspace
    workspace._cleanup.kill()


def test_nobody_waits_for_the_removal_of_a_large_tree(tmp_path: Path, half_removed: Workspace) -> None:
    assert os.listdir(tmp_path / "builds") == ["lock"]
    assert len(removing(tmp_path)) == 1
    half_removed._cleanup.send_signal(signal.SIGCONT)
    assert in_time(lambda: removing(tmp_path) == [])


def test_an_id_can_be_used_again_while_its_last_build_is_being_removed(
    tmp_path: Path, half_removed: Workspace, idmap: IdMap
) -> None:
    with Workspace(tmp_path, "b-1", idmap) as again:
        assert os.listdir(again.path) == []
        assert len(removing(tmp_path)) == 1


@pytest.mark.parametrize("way", ["the next build", "any command"])
def test_what_a_dead_cleanup_left_is_removed_by(
    tmp_path: Path, half_removed: Workspace, idmap: IdMap, way: str
) -> None:
    sweep(tmp_path)
    assert len(removing(tmp_path)) == 1  # its cleanup process lives
    half_removed._cleanup.kill()
    if way == "the next build":
        in_time(lambda: half_removed._cleanup.poll() is not None)
        Workspace(tmp_path, "b-2", idmap).close()
    else:
        (tmp_path / "builds/b-9").mkdir()
        in_time(lambda: half_removed._cleanup.poll() is not None)
        sweep(tmp_path)
    assert in_time(lambda: removing(tmp_path) == [])
    assert in_time(lambda: os.listdir(tmp_path / "builds") == ["lock"])


def test_a_build_whose_cleanup_was_killed_is_not_taken_for_dead(tmp_path: Path, idmap: IdMap) -> None:
    with Workspace(tmp_path, "b-1", idmap) as workspace:
        workspace._cleanup.kill()
        workspace._cleanup.wait()
        sweep(tmp_path)
        with Workspace(tmp_path, "b-2", idmap):
            assert workspace.path.is_dir()


def test_a_directory_that_cannot_be_moved_is_removed_where_it_is(tmp_path: Path, idmap: IdMap) -> None:
    (tmp_path / "removing").touch()
    with Workspace(tmp_path, "b-1", idmap) as workspace:
        (workspace.path / "file").touch()
    assert os.listdir(tmp_path / "builds") == ["lock"]


def test_a_killed_build_of_1500_nested_directories_leaves_nothing(tmp_path: Path) -> None:
    end = "[(os.mkdir('d'), os.chdir('d')) for _ in range(os.chdir(workspace.path) or 1500)]"
    end += "; os.kill(os.getpid(), signal.SIGKILL)"
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", build(end)], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = tmp_path / "store"
    assert until_gone(store / "builds")
    assert in_time(lambda: removing(store) == [])


def test_sweeping_a_store_with_nothing_in_it_does_nothing(tmp_path: Path) -> None:
    sweep(tmp_path)
    cleanup.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


def test_sweeping_removes_both_what_is_moved_away_and_what_is_not_yet(tmp_path: Path) -> None:
    for name in ("builds/b-1/x", "removing/b-2.0/x"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "builds/file").touch()
    cleanup.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path / "builds")) == ["file", "lock"]
    assert removing(tmp_path) == []


def test_the_cleanup_sweeps_when_it_is_given_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "removing/b-2.0").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["cleanup", str(tmp_path)])
    cleanup.main()
    assert removing(tmp_path) == []
