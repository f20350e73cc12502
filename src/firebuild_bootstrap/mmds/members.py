"""The members of the metadata document that are objects, and how members are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from firebuild_bootstrap.wire import WireError

_T = TypeVar("_T")


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
