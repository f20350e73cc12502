"""A `firecracker` whose machines are real ones, under QEMU in software: the API is the emulated one.

Has to run in a network namespace of its own, where 172.16.0.1 is an address of the host.
"""

from __future__ import annotations

import os
import re
import subprocess

from firebuild_bootstrap.initramfs import EMULATED
from firebuild_bootstrap.mmds import MetadataEmulator
from firebuild_bootstrap.mmds.protocol import MmdsVersion
from machine_firecracker import fc_program

_NETWORK = "user,id=n0,net=169.254.0.0/16,host=169.254.169.254"
# QEMU's own network passes on everything that is sent to this gateway.
_IP = "ip=169.254.0.15::169.254.169.254:255.255.0.0"


class QemuEmulator(fc_program.Emulator):
    """Boots what the API was told about."""

    def _boot(self) -> None:
        self.answered.wait()
        [drive] = self.api.drives.values()
        boot, machine = self.api.boot, self.api.machine
        version = MmdsVersion(self.api.mmds["version"])
        MetadataEmulator(self.api.store, ("127.0.0.1", 80), version=version).start()
        arguments = re.sub(r"\bip=\S+", _IP, boot["boot_args"]).replace("reboot=k", "reboot=t")
        command = [
            *("qemu-system-x86_64", "-M", "microvm,rtc=on", "-accel", "tcg", "-cpu", "max"),
            *("-m", str(machine["mem_size_mib"]), "-nodefaults", "-display", "none", "-serial", "stdio"),
            *("-no-reboot", "-kernel", boot["kernel_image_path"], "-initrd", boot["initrd_path"]),
            *("-append", " ".join([arguments, *EMULATED])),
            *("-netdev", _NETWORK, "-device", "virtio-net-device,netdev=n0"),
            *("-drive", f"file={drive['path_on_host']},format=raw,if=none,id=d0"),
            *("-device", "virtio-blk-device,drive=d0"),
        ]
        os._exit(subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode)


if __name__ == "__main__":
    fc_program.Emulator = QemuEmulator  # type: ignore[misc]
    fc_program.main()
