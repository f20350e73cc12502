"""RUN --mount on the driver `local`: everything real but the Dockerfile."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cli.watching import Watch
from firebuild_bootstrap import wire
from firebuild_bootstrap.context.entries import Entry, Resource
from firebuild_bootstrap.events import Event, StepOutput
from firebuild_bootstrap.image.bases import Base
from firebuild_bootstrap.image.layertrees import ArchiveLayer
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.machine.local import LocalMachine
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.mmds import MetadataDocument, bootstrap_block
from firebuild_bootstrap.request import Secret, SecretResource
from firebuild_bootstrap.sandbox import IdMap
from firebuild_bootstrap.service import BootstrapServer, Outcome
from firebuild_pki import open_authority
from support import ending_of

pytestmark = pytest.mark.needs("bwrap")
NEEDLE = b"hunter2-%d" % 5317  # not as it stands, because this file is sent


@dataclass
class Tree:
    """A directory with one file, and the file by itself."""

    single: bool = False

    def entries(self) -> Iterator[Entry]:
        if not self.single:
            yield Entry("tree", "", tar.DIRECTORY, 0o755, 0, from_directory=True)
        yield Entry(
            "tree/f",
            "f",
            tar.FILE,
            0o644,
            0,
            from_directory=not self.single,
            size=Path(__file__).stat().st_size,
            open=lambda: io.BytesIO(Path(__file__).read_bytes()),
        )


@dataclass
class Builds:
    """Builds in one store, one after the other or at the same time."""

    home: Path
    idmap: IdMap
    base: Base
    events: list[Event] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def build(
        self,
        name: str,
        commands: Sequence[wire.AnyCommand],
        resources: dict[str, Resource],
        *,
        keep: Path | None = None,
    ) -> Outcome:
        workspace = Workspace(self.home, name, self.idmap)
        machine = LocalMachine(workspace, caches=self.home / "cache-mounts")
        try:
            with open_authority(build_id=name) as authority:
                guest = authority.issue_guest()
                server = BootstrapServer(
                    commands=commands,
                    resources=resources,
                    server_material=authority.issue_server(),
                    guest_material=guest,
                    events=self.events.append,
                    runtime_directory=workspace.path,
                )
                listening = machine.listen()
                with server:
                    server.start(listening.listener)
                    block = bootstrap_block(
                        guest, host_port=listening.host_port, ping_interval=5, host_time=0
                    )
                    machine.metadata.put(MetadataDocument(bootstrap=block, vmm_id=name).to_json())
                    machine.prepare([ArchiveLayer(self.base.archive, self.base.digest)])
                    machine.start()
                    outcome = server.wait(60)
                    assert outcome is not None
            ended = machine.wait(20)
            assert ended is not None
            self.told += [ended.log, repr(outcome), repr(commands), repr(resources)]
            if keep is not None:
                machine.keep(keep)
            self.layers = {
                str(path.relative_to(layer.directory))
                for layer in machine.layers()
                for path in layer.directory.rglob("*")
            }
        finally:
            machine.close()
        return outcome

    @property
    def output(self) -> str:
        pieces = [event.data for event in self.events if isinstance(event, StepOutput)]
        return b"".join(pieces).decode()


@pytest.fixture
def builds(tmp_path: Path, idmap: IdMap, host_base: Base) -> Builds:
    return Builds(tmp_path / "home", idmap, host_base)


def run(shell: str, *mounts: wire.Mount, step: int = 2, user: str = "0:0") -> wire.RunCommand:
    return wire.RunCommand(
        step=step, original=f"RUN {shell}", argv=("/bin/sh", "-c", shell), mounts=mounts, user=user
    )


ALL = (
    wire.BindMount(target="/in", resource="step-2-mount-1"),
    wire.BindMount(target="/srv/one", resource="step-2-mount-2", writable=True),
    wire.CacheMount(target="/c", id="c", sharing="locked", mode=0o1777),
    wire.TmpfsMount(target="/t"),
    wire.SecretMount(resource="step-2-mount-5", target="/run/secrets/s", env="S"),
)
RESOURCES: dict[str, Resource] = {
    "step-2-mount-1": Tree(),
    "step-2-mount-2": Tree(single=True),
    "step-2-mount-5": SecretResource("s", Secret(NEEDLE)),
}


@pytest.mark.parametrize("fails", [False, True])
def test_a_secret_is_nowhere_but_in_its_run(builds: Builds, tmp_path: Path, fails: bool) -> None:
    """Neither in the store, the image, what a failed build keeps, nor in events, logs and arguments."""
    kept = tmp_path / "kept"
    kept.mkdir()
    shell = (
        'cmp /in/f /srv/one && test "$S" = "$(cat /run/secrets/s)" && echo same >> /c/log &&'
        " echo x > /t/x && echo y > /srv/one && printf %s canary-5317 > /kept-file; cat /c/log"
    )
    watch = Watch([builds.home, kept])
    watch.expect("secret", NEEDLE)
    watch.expect("canary", b"canary-5317")
    with watch.running():
        outcome = builds.build(
            "b1", [run(f"{shell}; exit {int(fails)}", *ALL)], RESOURCES, keep=kept if fails else None
        )
    assert (ending_of(outcome) == "success", builds.output) == (not fails, "same\n")
    # It looks where it should.
    assert "file" in watch.places("canary")
    # The environment of the command itself is where the secret has to be, like in any builder.
    assert watch.places("secret") <= {"environ"}
    told = [*builds.told, *(repr(event) + str(event.as_json()) for event in builds.events)]
    assert not [text for text in told if NEEDLE.decode() in text or repr(NEEDLE)[2:-1] in text]
    assert fails or builds.layers == {"fs/kept-file", "fs"}
    assert (kept / "rootfs.tar").exists() is fails
    (cache,) = (builds.home / "cache-mounts").glob("*/*/0/data")
    assert (cache / "log").read_bytes() == b"same\n"
    assert (builds.home / "cache-mounts").stat().st_mode & 0o777 == 0o700


def test_a_cache_outlives_its_build_and_is_shared_by_builds_at_once(builds: Builds) -> None:
    """Two builds that add to one number under a lock lose nothing."""
    shell = "n=$(cat /c/n 2>/dev/null || echo 0); sleep 0.1; echo $((n + 1)) > /c/n"
    mount = wire.CacheMount(target="/c", id="n", sharing="locked")
    commands = [run(shell, mount, step=step) for step in (2, 3)]
    ended: list[str] = []
    threads = [
        threading.Thread(target=lambda name=name: ended.append(ending_of(builds.build(name, commands, {}))))
        for name in ("b1", "b2")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["success"] * 2
    builds.build("b3", [run("cat /c/n", mount)], {})
    assert builds.output == "4\n"
