"""The metadata document: what a guest finds below `latest/meta-data`, every leaf a string.

Names and nesting are those that guests in the field read; see docs/mmds.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.mmds.store import STORE_LIMIT, size_of
from firebuild_bootstrap.values import dataclass
from firebuild_bootstrap.wire import BootstrapBlock, WireError

if TYPE_CHECKING:
    from firebuild_pki import TLSMaterial


_T = TypeVar("_T")


BOOTSTRAP_WIPE: Final[Mapping[str, Any]] = {"latest": {"meta-data": {"Bootstrap": None}}}
"""The merge patch that takes the credentials out of the metadata and leaves everything else."""


@dataclass(frozen=True, kw_only=True)
class MachineInfo:
    """What the machine is made of; `mem_mib` is in MiB, `vmlinux` names the kernel."""

    cpu: int = 0
    cpu_template: str = ""
    ht_enabled: bool = False
    kernel_args: str = ""
    mem_mib: int = 0
    vmlinux: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the `Machine` object."""
        return {
            "CPU": str(self.cpu),
            "CPUTemplate": self.cpu_template,
            "HTEnabled": "true" if self.ht_enabled else "false",
            "KernelArgs": self.kernel_args,
            "Mem": str(self.mem_mib),
            "VMLinux": self.vmlinux,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> MachineInfo:
        """Read the `Machine` object; what is absent keeps its default."""
        return cls(
            cpu=number_of(document, "CPU"),
            cpu_template=text_of(document, "CPUTemplate"),
            ht_enabled=text_of(document, "HTEnabled") == "true",
            kernel_args=text_of(document, "KernelArgs"),
            mem_mib=number_of(document, "Mem"),
            vmlinux=text_of(document, "VMLinux"),
        )


@dataclass(frozen=True, kw_only=True)
class DriveInfo:
    """One drive; `path_on_host` is the file behind it."""

    drive_id: str = ""
    is_read_only: bool = False
    is_root_device: bool = False
    part_uuid: str = ""
    path_on_host: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the object below the drive's id."""
        return {
            "DriveID": self.drive_id,
            "IsReadOnly": "true" if self.is_read_only else "false",
            "IsRootDevice": "true" if self.is_root_device else "false",
            "PartUUID": self.part_uuid,
            "PathOnHost": self.path_on_host,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DriveInfo:
        """Read the object; what is absent keeps its default."""
        return cls(
            drive_id=text_of(document, "DriveID"),
            is_read_only=text_of(document, "IsReadOnly") == "true",
            is_root_device=text_of(document, "IsRootDevice") == "true",
            part_uuid=text_of(document, "PartUUID"),
            path_on_host=text_of(document, "PathOnHost"),
        )


@dataclass(frozen=True, kw_only=True)
class InterfaceInfo:
    """One network interface; `name_servers` is a comma-separated list."""

    gateway: str = ""
    host_device_name: str = ""
    if_name: str = ""
    ip: str = ""
    ip_addr: str = ""
    ip_mask: str = ""
    ip_net: str = ""
    name_servers: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the object below the interface's MAC address."""
        return {wire_name: getattr(self, name) for name, wire_name in _INTERFACE_NAMES.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> InterfaceInfo:
        """Read the object; what is absent is empty."""
        return cls(**{name: text_of(document, wire_name) for name, wire_name in _INTERFACE_NAMES.items()})


_INTERFACE_NAMES: Final = {
    "gateway": "Gateway",
    "host_device_name": "HostDeviceName",
    "if_name": "IfName",
    "ip": "IP",
    "ip_addr": "IPAddr",
    "ip_mask": "IPMask",
    "ip_net": "IPNet",
    "name_servers": "NameServers",
}


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """The machine's network; `interfaces` is by MAC address."""

    cni_network_name: str = ""
    interfaces: Mapping[str, InterfaceInfo] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the `Network` object."""
        interfaces = {mac: interface.to_json() for mac, interface in self.interfaces.items()}
        return {"CniNetworkName": self.cni_network_name, "Interfaces": interfaces}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> NetworkInfo:
        """Read the `Network` object."""
        return cls(
            cni_network_name=text_of(document, "CniNetworkName"),
            interfaces=objects_of(document, "Interfaces", InterfaceInfo.from_json),
        )


@dataclass(frozen=True, kw_only=True)
class UserInfo:
    """A user to set up; `ssh_keys` holds authorised keys, one a line."""

    ssh_keys: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the object below the user's name."""
        return {"SSHKeys": self.ssh_keys}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> UserInfo:
        """Read the object."""
        return cls(ssh_keys=text_of(document, "SSHKeys"))


def text_of(document: Mapping[str, Any], name: str) -> str:
    """Return a member that is text, empty where it is absent."""
    value = document.get(name, "")
    if not isinstance(value, str):
        raise WireError(f"{name} of the metadata: expected a string, found {type(value).__name__}")
    return value


def number_of(document: Mapping[str, Any], name: str) -> int:
    """Return a member that is a whole number in text, 0 where it is absent."""
    found = text_of(document, name) or "0"
    if not (found.isascii() and found.isdigit()):
        raise WireError(f"{name} of the metadata: expected a whole number, found {found!r:.40}")
    return int(found)


def object_of(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a member that is an object, empty where it is absent."""
    value = document.get(name, {})
    if not isinstance(value, Mapping):
        raise WireError(f"{name} of the metadata: expected an object, found {type(value).__name__}")
    return value


def texts_of(document: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return a member that is an object of texts."""
    inner = object_of(document, name)
    return {key: text_of(inner, key) for key in inner}


def objects_of(
    document: Mapping[str, Any], name: str, read: Callable[[Mapping[str, Any]], _T]
) -> dict[str, _T]:
    """Return a member that is an object of objects, each of them read."""
    inner = object_of(document, name)
    return {key: read(object_of(inner, key)) for key in inner}


@dataclass(frozen=True, kw_only=True)
class MetadataDocument:
    """All metadata of one machine.

    Args:
        bootstrap: how the guest calls back; None for a machine that is started, not built.
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

    bootstrap: BootstrapBlock | None = None
    vmm_id: str = ""
    drives: Mapping[str, DriveInfo] = field(default_factory=dict)
    entrypoint_json: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    local_hostname: str = ""
    machine: MachineInfo = field(default_factory=MachineInfo)
    network: NetworkInfo = field(default_factory=NetworkInfo)
    image_tag: str = ""
    users: Mapping[str, UserInfo] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the whole document, `latest` at the top; `Bootstrap` is left out where there is none."""
        members: dict[str, Any] = {
            "VMMID": self.vmm_id,
            "Drives": {name: drive.to_json() for name, drive in self.drives.items()},
            "EntrypointJSON": self.entrypoint_json,
            "Env": dict(self.env),
            "LocalHostname": self.local_hostname,
            "Machine": self.machine.to_json(),
            "Network": self.network.to_json(),
            "ImageTag": self.image_tag,
            "Users": {name: user.to_json() for name, user in self.users.items()},
        }
        if self.bootstrap is not None:
            members["Bootstrap"] = self.bootstrap.as_json()
        return {"latest": {"meta-data": members}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> MetadataDocument:
        """Read what `to_json` wrote, or what another host wrote; unknown members are ignored.

        Raises:
            WireError: a member has the wrong type; the message names it, never its value.
        """
        found = object_of(object_of(document, "latest"), "meta-data")
        bootstrap = object_of(found, "Bootstrap")
        return cls(
            bootstrap=BootstrapBlock.from_json(bootstrap) if bootstrap else None,
            vmm_id=text_of(found, "VMMID"),
            drives=objects_of(found, "Drives", DriveInfo.from_json),
            entrypoint_json=text_of(found, "EntrypointJSON"),
            env=texts_of(found, "Env"),
            local_hostname=text_of(found, "LocalHostname"),
            machine=MachineInfo.from_json(object_of(found, "Machine")),
            network=NetworkInfo.from_json(object_of(found, "Network")),
            image_tag=text_of(found, "ImageTag"),
            users=objects_of(found, "Users", UserInfo.from_json),
        )

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
        sizes = {name: size_of(value) for name, value in document["latest"]["meta-data"].items()}
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"the metadata for the guest takes {size} bytes of JSON, and {limit} fit; "
            f"the largest member is {largest} with {sizes[largest]} bytes",
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
    """
    return BootstrapBlock(
        host_port=host_port,
        ca_chain=guest.trust_pem.decode("ascii"),
        cert=guest.certificate_chain_pem.decode("ascii"),
        key=guest.private_key_pem.decode("ascii"),
        server_name=guest.server_name,
        ping_interval=ping_interval,
        host_time=host_time,
    )
