"""The metadata document: what a guest finds below `latest/meta-data`, every leaf a string.

Names and nesting are those that guests in the field read; see docs/mmds.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.mmds.store import STORE_LIMIT, size_of
from firebuild_bootstrap.wire import BootstrapBlock, IdentityBlock
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_pki import TLSMaterial


BOOTSTRAP_WIPE: Final[Mapping[str, Any]] = {"latest": {"meta-data": {"Bootstrap": None}}}
"""The merge patch that takes the credentials out of the metadata and leaves everything else."""

IDENTITY_WIPE: Final[Mapping[str, Any]] = {"latest": {"meta-data": {"Identity": None}}}
"""The same for who the machine is, with its key."""


class _Members:
    """An object of the document: the fields of a dataclass, under the names in their metadata."""

    def to_json(self: Any) -> dict[str, Any]:
        """Return the object; numbers and truth values are strings, too."""
        return {entry.metadata["name"]: _leaf(getattr(self, entry.name)) for entry in fields(self)}


def _leaf(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _leaf(member) for name, member in value.items()}
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, BootstrapBlock | IdentityBlock):
        return value.as_json()
    return value.to_json() if isinstance(value, _Members) else str(value)


@dataclass(frozen=True, kw_only=True)
class MachineInfo(_Members):
    """The object `Machine`: what the machine is made of; `mem_mib` is in MiB, `vmlinux` names the kernel."""

    cpu: int = field(default=0, metadata={"name": "CPU"})
    cpu_template: str = field(default="", metadata={"name": "CPUTemplate"})
    ht_enabled: bool = field(default=False, metadata={"name": "HTEnabled"})
    kernel_args: str = field(default="", metadata={"name": "KernelArgs"})
    mem_mib: int = field(default=0, metadata={"name": "Mem"})
    vmlinux: str = field(default="", metadata={"name": "VMLinux"})


@dataclass(frozen=True, kw_only=True)
class DriveInfo(_Members):
    """One drive, by its id; `path_on_host` is the file behind it."""

    drive_id: str = field(default="", metadata={"name": "DriveID"})
    is_read_only: bool = field(default=False, metadata={"name": "IsReadOnly"})
    is_root_device: bool = field(default=False, metadata={"name": "IsRootDevice"})
    part_uuid: str = field(default="", metadata={"name": "PartUUID"})
    path_on_host: str = field(default="", metadata={"name": "PathOnHost"})


@dataclass(frozen=True, kw_only=True)
class InterfaceInfo(_Members):
    """One network interface, by its MAC address; `name_servers` is a comma-separated list."""

    gateway: str = field(default="", metadata={"name": "Gateway"})
    host_device_name: str = field(default="", metadata={"name": "HostDeviceName"})
    if_name: str = field(default="", metadata={"name": "IfName"})
    ip: str = field(default="", metadata={"name": "IP"})
    ip_addr: str = field(default="", metadata={"name": "IPAddr"})
    ip_mask: str = field(default="", metadata={"name": "IPMask"})
    ip_net: str = field(default="", metadata={"name": "IPNet"})
    name_servers: str = field(default="", metadata={"name": "NameServers"})


@dataclass(frozen=True, kw_only=True)
class NetworkInfo(_Members):
    """The object `Network`; `interfaces` is by MAC address."""

    cni_network_name: str = field(default="", metadata={"name": "CniNetworkName"})
    interfaces: Mapping[str, InterfaceInfo] = field(default_factory=dict, metadata={"name": "Interfaces"})


@dataclass(frozen=True, kw_only=True)
class UserInfo(_Members):
    """A user to set up, by name; `ssh_keys` holds authorised keys, one a line."""

    ssh_keys: str = field(default="", metadata={"name": "SSHKeys"})


@dataclass(frozen=True, kw_only=True)
class MetadataDocument(_Members):
    """All metadata of one machine.

    Args:
        bootstrap: how the guest calls back; None for a machine that is started, not built.
        identity: who the machine is; None for one that has no identity, or makes its own key.
        vmm_id: the machine's own id.
        drives: drive id to what it is.
        entrypoint_json: ENTRYPOINT and CMD of the image as JSON.
        env: environment of the entrypoint.
        local_hostname: host name to set.
        machine: processors, memory, kernel.
        network: interfaces and their addresses.
        image_tag: tag of the image.
        users: users by name.
    """

    bootstrap: BootstrapBlock | None = field(default=None, metadata={"name": "Bootstrap"})
    identity: IdentityBlock | None = field(default=None, metadata={"name": "Identity"})
    vmm_id: str = field(default="", metadata={"name": "VMMID"})
    drives: Mapping[str, DriveInfo] = field(default_factory=dict, metadata={"name": "Drives"})
    entrypoint_json: str = field(default="", metadata={"name": "EntrypointJSON"})
    env: Mapping[str, str] = field(default_factory=dict, repr=False, metadata={"name": "Env"})
    local_hostname: str = field(default="", metadata={"name": "LocalHostname"})
    machine: MachineInfo = field(default_factory=MachineInfo, metadata={"name": "Machine"})
    network: NetworkInfo = field(default_factory=NetworkInfo, metadata={"name": "Network"})
    image_tag: str = field(default="", metadata={"name": "ImageTag"})
    users: Mapping[str, UserInfo] = field(default_factory=dict, metadata={"name": "Users"})

    def to_json(self) -> dict[str, Any]:
        """Return the whole document, `latest` at the top; `Bootstrap` and `Identity` where there are such."""
        members = super().to_json()
        for name, block in (("Bootstrap", self.bootstrap), ("Identity", self.identity)):
            if block is None:
                del members[name]
        return {"latest": {"meta-data": members}}

    def check_size(self, limit: int = STORE_LIMIT) -> None:
        """Make sure that the document fits into the metadata service before it is sent there.

        Args:
            limit: bytes of compact JSON, 51,200 unless Firecracker was started with another limit.

        Raises:
            InputError: it does not; the message names the largest member.
        """
        document = self.to_json()
        size = size_of(document)
        if size <= limit:
            return
        members = document["latest"]["meta-data"]
        members |= {f"Bootstrap.{name}": value for name, value in members.pop("Bootstrap", {}).items()}
        sizes = {name: size_of(value) for name, value in members.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"the metadata for the guest takes {counted(size, 'byte')} of JSON, and {limit} fit; "
            f"the largest member is {largest} with {counted(sizes[largest], 'byte')}",
            hint=f"make {largest} smaller",
        )


def bootstrap_block(
    guest: TLSMaterial,
    *,
    host_port: str,
    ping_interval: float = 5.0,
    host_time: float | None = None,
) -> BootstrapBlock:
    """Build the block that tells a guest where to call and with which credentials.

    Args:
        guest: the material that was issued to this build's guest; its `server_name` is the only name that
            the guest accepts.
        host_port: where the bootstrap server listens, as the guest reaches it.
        ping_interval: seconds between the guest's signs of life.
        host_time: the host's clock in seconds since 1970, for machines without one.

    Raises:
        InputError: the guest's certificate chain is longer than a gRPC server can take.
    """
    from firebuild_pki import GUEST_CHAIN_HINT, guest_chain_problem

    if problem := guest_chain_problem(guest):
        raise InputError(problem, hint=GUEST_CHAIN_HINT)
    return BootstrapBlock(
        host_port=host_port,
        ca_chain=guest.trust_pem.decode("ascii"),
        cert=guest.certificate_chain_pem.decode("ascii"),
        key=guest.private_key_pem.decode("ascii"),
        server_name=guest.server_name,
        ping_interval=ping_interval,
        host_time=host_time,
    )
