"""The guest of the emulated Firecracker: vminit in a sandbox of this host, on the content of the snapshot."""

from __future__ import annotations

import gzip
import subprocess
import threading
from pathlib import Path

from firebuild_bootstrap.guest.init_settings import InitError, InitSettings, Report, parse_command_line
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.mmds.emulator import MetadataEmulator
from firebuild_bootstrap.mmds.protocol import MmdsVersion
from firebuild_bootstrap.mmds.store import DataStore
from firebuild_bootstrap.sandbox import Bind, Sandbox, detect, find_runtime


class Guest:
    """One boot.

    Args:
        work: an empty directory.
        boot_args: the kernel's command line.
        initrd: the initramfs.
        snapshot: the root file system.
        scratch: an empty drive.
        store: the metadata; `version` and `release`, of Firecracker, say how they are served.
    """

    def __init__(
        self,
        work: Path,
        *,
        boot_args: str,
        initrd: Path,
        snapshot: Path,
        scratch: Path,
        store: DataStore,
        version: str,
        release: tuple[int, int],
    ) -> None:
        self._work = work
        self._boot_args = boot_args
        self._initrd = initrd
        self._snapshot = snapshot
        self._scratch = scratch
        self._sandbox = Sandbox(detect())
        self._trees = Trees(self._sandbox)
        self._emulator = MetadataEmulator(
            store, work / "mmds" / "mmds.sock", version=MmdsVersion(version), release=release
        )
        self._stopping = threading.Event()

    def run(self) -> Report:
        """Boot, and take part in the build."""
        try:
            settings = parse_command_line(self._boot_args)
        except InitError as error:
            return Report(error.status, message=error.message)
        if not gzip.decompress(self._initrd.read_bytes()).startswith(b"070701"):
            return Report("panic", message="Initramfs unpacking failed: invalid magic")
        if (settings.root, settings.scratch) != (
            "/dev/vda",
            "/dev/vdb",
        ) or "reboot=k" not in self._boot_args.split():
            return Report("internal", message="this guest knows /dev/vda, /dev/vdb and reboot=k only")
        self._mount()
        status = self._bootstrap(settings)
        text = (self._work / "vminit.log").read_text("utf-8", "replace").strip()
        self._unmount()
        last = text.splitlines()[-1].removeprefix("vminit: ") if text else ""
        return Report("success", 0) if status == 0 else Report("failed", status, last)

    def press_ctrl_alt_del(self) -> None:
        self._stopping.set()

    def _mount(self) -> None:
        for name in ("layers/lower/0", "layers/lower/1", "scratch"):
            (self._work / name).mkdir(parents=True)
        self._trees.pack_image(self._scratch, self._work / "scratch.tar")  # a file system, which is empty
        self._trees.pack_image(self._snapshot, self._work / "drive.tar")
        self._trees.unpack(self._work / "drive.tar", self._work / "layers/lower/1")

    def _bootstrap(self, settings: InitSettings) -> int:
        self._emulator.start()
        runtime = find_runtime()
        arguments = ["bootstrap", "--root", "/image", "--mmds", "unix:/run/firebuild/mmds.sock"]
        arguments += ["--mmds-timeout", f"{settings.mmds_timeout:g}"]
        arguments += ["--connect-timeout", f"{settings.connect_timeout:g}"]
        arguments += ["--layers", "/layers", "--scratch", "/run/scratch"]
        with open(self._work / "vminit.log", "wb") as log:
            vminit = self._sandbox.popen(
                runtime.module("firebuild_bootstrap.guest.main", *arguments),
                binds=[
                    *runtime.binds,
                    Bind(self._work / "layers", "/layers", read_only=False),
                    Bind(self._work / "scratch", "/run/scratch", read_only=False),
                    Bind(self._work / "mmds", "/run/firebuild"),
                ],
                env={**runtime.env, "GRPC_VERBOSITY": "NONE"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        while (status := vminit.wait(0.2)) is None:
            if self._stopping.is_set():
                vminit.terminate()  # again and again, because one that comes too early is lost
        vminit.kill()
        self._emulator.stop()
        return status

    def _unmount(self) -> None:
        self._trees.remove(self._work)
