"""The section `machine`: where a build runs. The blocks of the drivers are described beside each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from firebuild_bootstrap.bootstrap_settings import ByteSize
from firebuild_bootstrap.machine.external.settings import ExternalSettings
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.machine.qemu.settings import QemuSettings
from firebuild_pki.config import Settings


class LocalSettings(Settings):
    """The block `local` of the section `machine`."""

    network: Literal["host", "user"] = "host"
    """Network of RUN steps: this host's, or user: IPv4 to all but its loopback and link-local addresses."""


class MachineSettings(Settings):
    """The section `machine`: where the build runs."""

    driver: Literal["local", "qemu", "firecracker", "external"] = "local"
    """local: a sandbox on this host. qemu, firecracker: a microVM. external: started by your own tool."""
    ids: Literal["auto", "full", "subids", "single"] = "auto"
    """User ids in the sandbox: all (root only), those of /etc/subuid, one, or the best that works."""
    at_once: Annotated[int, Field(ge=1, le=64)] = 2
    """How many machines a build may have at once, for stages that do not need each other."""
    disk_size: Annotated[ByteSize, Field(ge=1 << 20)] | None = None
    """Size of the drive for what steps change in a virtual machine, 16 GiB by default; docs/external.md."""
    local: LocalSettings = LocalSettings()
    """Settings of the driver local."""
    qemu: QemuSettings = QemuSettings()
    """Settings of the driver qemu."""
    firecracker: FirecrackerSettings = FirecrackerSettings()
    """Settings of the driver firecracker."""
    external: ExternalSettings = ExternalSettings()
    """Settings of the driver external."""
