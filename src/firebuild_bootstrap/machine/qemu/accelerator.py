"""Whether a machine really runs under KVM here.

/dev/kvm may exist, open and make virtual processors on hosts where no guest ever runs, such as some nested
ones. So it counts only after a kernel was seen to start under it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.image.content_store import write_whole
from firebuild_bootstrap.image.layertrees import boot_id
from firebuild_bootstrap.machine.console import BoundedLog
from firebuild_bootstrap.machine.kvm import KVM, how_to_open
from firebuild_bootstrap.machine.qemu.command import Accelerator, Hardware, Program, bare_command
from firebuild_bootstrap.machine.qemu.namespace import HandedFile, MachineNamespace, path_of
from firebuild_bootstrap.sandbox import Runtime, Sandbox
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

# The kernel finds no root file system there, so this is the last that it does.
_MARKER: Final = "Kernel panic - not syncing: VFS:"
_ARGUMENTS: Final = "console=ttyS0 reboot=t panic=-1"
_MEMORY: Final = 128 << 20
_SECONDS: Final = 10.0
_PAUSE: Final = 0.05
# What failed may have been a busy moment.
_FAILURE_SECONDS: Final = 3600.0


@dataclass(frozen=True)
class Trial:
    """Boots a kernel with nothing else to see whether it starts.

    Args:
        sandbox: for QEMU.
        runtime: the Python that starts it.
        program: QEMU.
        kernel: an image.
        seconds: how long a start may take.
        device: KVM's.
    """

    sandbox: Sandbox
    runtime: Runtime
    program: Program
    kernel: Path
    seconds: float = _SECONDS
    device: Path = KVM

    def boot(self, accelerator: Accelerator, *extra: str) -> str:
        """Return what went wrong, empty when the kernel started.

        Args:
            extra: more arguments for the kernel.

        Raises:
            MachineError: QEMU could not be started at all.
        """
        append = " ".join((_ARGUMENTS, *extra))
        command = bare_command(self.program, Hardware(accelerator, _MEMORY), path_of(0), append)
        namespace = MachineNamespace(self.sandbox, self.runtime, binds=self.program.binds)
        try:
            log = BoundedLog(namespace.output)
            devices = [self.device] if accelerator is Accelerator.KVM else []
            namespace.run(command, [HandedFile(self.kernel)], devices)
            return self._watch(namespace, log)
        finally:
            namespace.close()

    def _watch(self, namespace: MachineNamespace, log: BoundedLog) -> str:
        deadline = time.monotonic() + self.seconds
        while namespace.process.wait(_PAUSE) is None:
            if time.monotonic() > deadline:
                return f"a kernel did not start within {counted(self.seconds, 'second')}"
        log.finish(1)
        if _MARKER in log.text():
            return ""
        words = log.text().strip().splitlines()
        return words[-1] if words else f"QEMU ended with status {namespace.process.poll()}"


def choose(trial: Trial, memory: Path, *, clock: Callable[[], float] = time.time) -> tuple[Accelerator, str]:
    """Return KVM where a kernel starts under it, else TCG and why.

    Args:
        trial: how to try it.
        memory: a file that keeps the result until the host restarts, or for an hour when it failed.
        clock: seconds since 1970.

    Raises:
        MachineError: QEMU could not be started at all.
    """
    device = trial.device
    if not device.exists():
        return Accelerator.TCG, f"there is no {device}"
    if not os.access(device, os.R_OK | os.W_OK):
        return Accelerator.TCG, f"this user may not use {device}: {how_to_open(device)}"
    key = _key(trial)
    known = _recall(memory).get(key)
    if known is None or (known["problem"] and clock() - known["at"] > _FAILURE_SECONDS):
        known = {"problem": trial.boot(Accelerator.KVM), "at": clock()}
        _remember(memory, key, known)
    problem = str(known["problem"])
    return (Accelerator.TCG, f"not under {device}: {problem}") if problem else (Accelerator.KVM, "")


def _key(trial: Trial) -> str:
    """Name all that the result depends on."""
    times = [path.stat().st_mtime_ns for path in (trial.program.path, trial.kernel)]
    return f"{boot_id()} {trial.program.path} {trial.kernel} {times}"


def _recall(memory: Path) -> dict[str, Any]:
    try:
        found = json.loads(memory.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(memory: Path, key: str, known: dict[str, Any]) -> None:
    """Keep one result; that of another start of the host is of no use any more."""
    with suppress(OSError):  # it is found out again then
        write_whole(memory, json.dumps({key: known}).encode())
