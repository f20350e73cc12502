"""The driver `local`: vminit in a sandbox on this host, the root file system an overlay of directories.

Where the kernel or the file system allows no overlay, it is one directory with a copy of the base, and vminit
finds what a step has changed by comparing.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.layertrees import TREE, ArchiveLayer, Layer, LayerTrees, StoredLayer, chain_key
from firebuild_bootstrap.image.outputs import OutputType
from firebuild_bootstrap.image.trees import MAKE_ROOM, Tree, Trees, tree_of
from firebuild_bootstrap.listening import format_address, listen
from firebuild_bootstrap.machine.base import (
    GuestOptions,
    Listening,
    Machine,
    MachineExit,
    PublishedPort,
)
from firebuild_bootstrap.machine.console import BoundedLog, keep_console
from firebuild_bootstrap.machine.usernet import UserNetwork, resolv_conf
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.mmds.emulator import MetadataEmulator
from firebuild_bootstrap.mmds.store import DataStore
from firebuild_bootstrap.sandbox import Bind, SandboxProcess
from firebuild_bootstrap.wire import CacheMount

BETTER_STORE: Final = "a store on ext4, XFS or Btrfs does (the setting store.path, or FIREBUILD_HOME)"
"""What to do about a file system that can't hold layers."""

_GUEST: Final = "firebuild_bootstrap.guest.main"
_SOCKET: Final = "mmds.sock"
_LOG_SECONDS: Final = 2.0
_AHEAD_SECONDS: Final = 3600.0
# As guest/overlay.py has it.
_LAYERS: Final = "/layers"
_SCRATCH: Final = "/run/scratch"
_CACHES: Final = "/run/caches"
_RESOLV_CONF: Final = Path("/etc/resolv.conf")


class LocalMachine(Machine):
    """A `Machine` in a sandbox: its own processes, host names and mounts, but the host's kernel and network.

    Args:
        workspace: the build's directory; it is closed with the machine.
        bind: address of this host that the guest calls, which shares this host's network.
        caches: directory of cache mounts, one below it for each id mapping; None for such as last as long as
            the machine.
        network: what connects RUN steps, which have a network of their own then; None has them in this
            host's. It is closed with the machine.
    """

    def __init__(
        self,
        workspace: BuildDirectory,
        *,
        bind: str = "127.0.0.1",
        caches: Path | None = None,
        network: UserNetwork | None = None,
    ) -> None:
        super().__init__(workspace)
        self._network = network
        self._bind = bind
        self._scratch = workspace.path / "scratch"
        self._caches = self._scratch / "caches"
        if caches is not None:
            self._caches = caches / workspace.sandbox.idmap.key
        self._trees = workspace.trees()
        self._stored = workspace.layer_trees()
        self._work = workspace.path / "layers"
        # What the steps start from, the lowest first; None where the root is one directory.
        self._lower: tuple[Path, ...] | None = None
        self._between: dict[int, Path] = {}
        self._root = workspace.path / "rootfs"
        self.metadata: DataStore = DataStore()
        self._emulator = MetadataEmulator(self.metadata, workspace.path / "mmds" / _SOCKET)
        self._process: SandboxProcess | None = None
        self._notes: tuple[str, ...] | None = None
        self._log: BoundedLog | None = None

    def publish(self, ports: Sequence[PublishedPort]) -> None:
        """Refuse; see `Machine.publish`."""
        if ports and self._network is not None:
            raise InputError(
                "--publish: nothing leads into the network of the command (machine.local.network: user)",
                hint="without that a command of local listens on this host itself; qemu publishes ports",
            )
        super().publish(ports)

    def listen(self) -> Listening:
        """Open a port on this host; see `Machine.listen`."""
        listener = listen(self._bind)
        return Listening(listener, format_address(listener.getsockname()))

    def start_ahead(self, layers: Sequence[Layer]) -> None:
        """Start vminit before there are metadata, which it waits for, if nothing has to be unpacked.

        Its start takes as long as that of the server and of the authority, and goes on beside them.

        Args:
            layers: what `prepare` will be called with.

        Raises:
            MachineError: it can't be started.
        """
        if self._is_unpacked(layers) and not self._stored.overlay_problem(self._workspace.path):
            self._notes = self._prepare(layers)
            _make(self._workspace.path / "mmds", mode=0o700)
            self._emulator.listen()
            # Whatever a provider of certificates takes. vminit ends with its sandbox.
            self.start(GuestOptions(mmds_timeout=_AHEAD_SECONDS))

    def _is_unpacked(self, layers: Sequence[Layer]) -> bool:
        below = ""
        for layer in layers:
            below = layer.key if isinstance(layer, StoredLayer) else chain_key(below, layer.digest)
            if self._stored.hold(below) is None:
                return False
        return True

    def prepare(
        self,
        layers: Sequence[Layer],
        caches: Sequence[CacheMount] = (),  # noqa: ARG002 - its guest sees the directory of all
    ) -> tuple[str, ...]:
        """Find or unpack what is to be mounted and begin to serve metadata; see `Machine.prepare`."""
        notes = self._prepare(layers) if self._notes is None else self._notes
        self._emulator.start()
        return notes

    def _prepare(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        note = self._workspace.sandbox.idmap.note
        problem = self._stored.overlay_problem(self._workspace.path)
        notes = self._copy(layers, problem) if problem else self._stack(layers)
        _make(self._scratch)
        try:
            # Programs in it may have the rights of their owners: no other user may get there.
            self._caches.parent.mkdir(mode=0o700, exist_ok=True)
            self._caches.parent.chmod(0o700)
            self._caches.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise MachineError(f"{self._caches}: {error.strerror}") from error
        return (*((note,) if note else ()), *notes)

    def _stack(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        _make(self._work, self._work / "lower")
        for layer in layers:
            if isinstance(layer, StoredLayer) and layer.step:
                self._between[layer.step] = self._stored.required(layer.key)
        start = [layer for layer in layers if not (isinstance(layer, StoredLayer) and layer.step)]
        trees, reports = self._stored.stack(start)
        # The kernel wants two lower directories where there is no upper one, as when the root is read.
        lower = (self._stored.empty(), *trees)
        for number in range(len(lower)):
            _make(self._work / "lower" / str(number))
        if self._between:
            _make(self._work / "between", *(self._work / "between" / str(step) for step in self._between))
        self._lower = lower
        return tuple(note for report in reports for note in report.notes())

    def _copy(self, layers: Sequence[Layer], problem: str) -> tuple[str, ...]:
        where = self._workspace.path
        notes = [f"the base is copied for this build, because {where} allows no overlay: {problem}"]
        _make(self._root, self._work)
        if uncached := self._trees.copies_problem(self._work):
            notes.append(
                f"no step of this build is kept in the cache, because {where} takes nothing that could "
                f"mean that a file was removed: {uncached}; {BETTER_STORE}"
            )
        return (*notes, *_fill(self._trees, self._stored, layers, self._root))

    def start(self, options: GuestOptions = GuestOptions()) -> None:  # noqa: B008 - frozen
        """Start vminit in the sandbox, unless that was done ahead; see `Machine.start`."""
        if self._process is not None:
            return
        runtime = self._workspace.runtime
        _make(self._workspace.path / "mmds", mode=0o700)
        arguments = ["bootstrap", "--root", "/image", "--mmds", f"unix:/run/firebuild/{_SOCKET}"]
        arguments += ["--mmds-timeout", f"{options.mmds_timeout:g}"]
        arguments += ["--connect-timeout", f"{options.connect_timeout:g}"]
        arguments += ["--scratch", _SCRATCH, "--caches", _CACHES, "--layers", _LAYERS]
        own: list[Bind] = []
        handed: list[int] = []
        if self._network is not None:
            arguments += ["--uplink", str(self._network.guest_end)]
            own.append(self._resolv_conf())
            handed.append(self._network.guest_end)
        root = [Bind(self._work, _LAYERS, read_only=False)]
        root += [Bind(tree, f"{_LAYERS}/lower/{number}") for number, tree in enumerate(self._lower or ())]
        root += [Bind(tree, f"{_LAYERS}/between/{step}") for step, tree in self._between.items()]
        root += [Bind(self._root, "/image", read_only=False)] if self._lower is None else []
        self._process = self._workspace.sandbox.popen(
            runtime.module(_GUEST, *arguments),
            binds=[
                *runtime.binds,
                *own,
                *root,
                Bind(self._workspace.path / "mmds", "/run/firebuild"),
                Bind(self._scratch, _SCRATCH, read_only=False),
                Bind(self._caches, _CACHES, read_only=False),
            ],
            # gRPC's core writes to stderr by itself; what matters vminit says in its own words.
            env={**runtime.env, "GRPC_VERBOSITY": "NONE"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=handed,
        )
        if self._network is not None:
            self._network.begun()
        if self._process.stdout is not None:
            self._log = BoundedLog(self._process.stdout)

    def _resolv_conf(self) -> Bind:
        """Write the file for RUN steps with a network of their own, over that of this host."""
        written = self._workspace.path / "resolv.conf"
        try:
            host = _RESOLV_CONF.read_text("utf-8", "replace") if _RESOLV_CONF.exists() else ""
            written.write_text(resolv_conf(host), "utf-8")
        except OSError as error:
            raise MachineError(f"{error.filename}: {error.strerror}") from error
        return Bind(written, str(_RESOLV_CONF))

    def wait(self, timeout: float | None = None) -> MachineExit | None:
        """Wait up to `timeout` seconds for the end; see `Machine.wait`."""
        code = None if self._process is None else self._process.wait(timeout)
        if code is None or self._log is None:
            return None
        self._log.finish(_LOG_SECONDS)
        return MachineExit(code, self._log.text())

    def stop(self, grace: float = 5.0) -> MachineExit | None:
        """Send SIGTERM to vminit, and SIGKILL to the whole sandbox after `grace` seconds."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(grace)
        self._process.kill()
        return self.wait()

    def tree(self) -> ArchiveLayer:
        """Pack the root file system; see `Machine.tree`."""
        if self._process is not None and self._process.poll() is None:
            raise MachineError("the root file system can't be read while vminit runs")
        path = self._workspace.path / OutputType.TAR.file_name
        return ArchiveLayer(path, self._trees.pack(self._tree(), path).digest)

    def _tree(self) -> Tree:
        """Return the root file system as it is: all layers, that of an unfinished step included."""
        if self._lower is None:
            return self._root
        made = {layer.step: layer.directory / TREE for layer in self.layers()} | self._between
        if ((unfinished := self._work / "unfinished") / TREE).is_dir():
            made[max(made, default=0) + 1] = unfinished / TREE
        return tree_of((*self._lower, *(made[step] for step in sorted(made))))

    def keep(self, into: Path) -> tuple[str, ...]:
        """Keep the root file system as a tar archive, with its owners; see `Machine.keep`."""
        if self._lower is not None or self._root.exists():
            self._trees.pack(self._tree(), into / OutputType.TAR.file_name)
        if self._log is not None:
            keep_console(self._log.text(), into)
        return ()

    def no_room(self) -> str:
        """Say where the root file system lies, and how to make room there; see `Machine.no_room`."""
        return f"if the disk of {self._workspace.path} is full: {MAKE_ROOM}"

    def no_network(self) -> str:
        """Say whose network it is; see `Machine.no_network`."""
        if self._network is not None:
            return self._network.problem() or (
                "a RUN reaches what this host reaches by IPv4, but for its loopback and link-local addresses "
                "(machine.local.network: user): does the name resolve here, and is the server elsewhere?"
            )
        return "a RUN has the network and the /etc/resolv.conf of this host: does the name resolve here?"

    def no_port(self) -> str:
        """Say whose ports they are; see `Machine.no_port`."""
        if self._network is not None:
            return ""
        return (
            "a RUN has the ports of this host: those below 1024 are its root's, and others may be in use. "
            "`RUN --network=none` has a loopback of its own, and a virtual machine a network"
        )

    def no_device(self) -> str:
        """Say where device nodes come from; see `Machine.no_device`."""
        return (
            "a sandbox can't make device nodes, and images have none: a RUN has a /dev of its own, "
            "and a machine that of its kernel. Leave it out, or let it fail: `|| true`"
        )

    def close(self) -> None:
        """Stop and remove everything; see `Machine.close`."""
        try:
            self.stop(grace=0)
            self._emulator.stop()
            if self._network is not None:
                self._network.close()
        finally:
            self._stored.close()
            self._workspace.close()


def _fill(trees: Trees, stored: LayerTrees, layers: Sequence[Layer], root: Path) -> tuple[str, ...]:
    """Write `layers`, the lowest first, over each other into the empty directory `root`; return notes."""
    notes = list[str]()
    for layer in layers:
        match layer:
            case ArchiveLayer(path):
                notes += trees.unpack(path, root, whiteouts=True).notes()
            case StoredLayer(key):
                trees.copy(stored.required(key), root, layer=True)
    return tuple(notes)


def _make(*directories: Path, mode: int = 0o755) -> None:
    for directory in directories:
        try:
            directory.mkdir(mode=mode, exist_ok=mode == 0o700)
        except OSError as error:
            raise MachineError(f"{directory}: {error.strerror}") from error
