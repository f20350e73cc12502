"""Somebody's tool for machines: takes metadata from wherever they were written and runs a guest with them."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from firebuild_bootstrap.mmds import DataStore, MetadataEmulator
from firebuild_bootstrap.sandbox import Bind, Sandbox, SandboxProcess, detect, find_runtime
from guest.build import make_image
from support import eventually


def holds_build(document: Any) -> bool:
    return "Bootstrap" in document.get("latest", {}).get("meta-data", {})


class Tool:
    """Runs vminit on a small root file system, with metadata that the test keeps up to date."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.root = make_image(directory / "root")
        self.store = DataStore()
        self.wiped = threading.Event()
        self._emulator = MetadataEmulator(self.store, directory / "mmds/mmds.sock")
        self._socket = directory / "mmds"
        self.guest: SandboxProcess | None = None

    def update(self, document: Any) -> None:
        """Take over what firebuild wrote last."""
        self.store.put(document)
        if not holds_build(document):
            self.wiped.set()

    def start(self) -> None:
        self._emulator.start()
        runtime = find_runtime()
        self.guest = Sandbox(detect()).popen(
            runtime.module(
                "firebuild_bootstrap.guest.main",
                *("bootstrap", "--root", "/image", "--mmds", "unix:/run/firebuild/mmds.sock"),
            ),
            binds=[
                *runtime.binds,
                Bind(self._socket, "/run/firebuild"),
                Bind(self.root, "/image", read_only=False),
            ],
            env={**runtime.env, "GRPC_VERBOSITY": "NONE"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> int:
        """Wait for the guest's own end."""
        assert self.guest is not None
        status = self.guest.wait(60)
        assert status is not None
        return status

    def close(self) -> None:
        if self.guest is not None:
            self.guest.kill()
        self._emulator.stop()


class WatchedFile:
    """A file that firebuild replaces, followed on a thread as a tool would."""

    def __init__(self, path: Path, tool: Tool) -> None:
        self._path = path
        self._tool = tool
        self.modes: set[int] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def until_written(self) -> None:
        assert eventually(lambda: self.modes), f"{self._path} is not written"

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _follow(self) -> None:
        last = b""
        while not self._stopping.wait(0.01):
            try:
                with self._path.open("rb") as file:
                    mode, text = self._path.stat().st_mode & 0o7777, file.read()
            except FileNotFoundError:
                continue
            if text != last:
                last = text
                self._tool.update(json.loads(text))
                self.modes.add(mode)


def debugfs(drive: Path, *commands: str) -> None:
    """Do to a drive what a kernel would have done."""
    script = "\n".join(commands)
    subprocess.run(
        ["debugfs", "-w", "-f", "/dev/stdin", drive], input=script.encode(), check=True, capture_output=True
    )


def mount(drive: Path) -> None:
    """Leave the marks of a mounted file system."""
    debugfs(drive, "ssv mnt_count 1", "ssv mtime 20260101000000", "feature needs_recovery")


def unmount(drive: Path) -> None:
    debugfs(drive, "feature -needs_recovery")
