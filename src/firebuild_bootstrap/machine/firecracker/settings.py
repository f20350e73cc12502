"""The block `machine.firecracker` (docs/firecracker.md)."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from firebuild_bootstrap.bootstrap_settings import Address, ByteSize, ipv4
from firebuild_pki.config import Settings

_LIMIT = re.compile(r"[a-z0-9_.]+=[^=]+")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def _link_local(value: str) -> str:
    # RFC 3927, section 2.1: the first and the last 256 are reserved, and Firecracker refuses them.
    address = IPv4Address(ipv4(value))
    if not address.is_link_local or address.packed[2] in (0, 255):
        raise ValueError(
            "expected a link-local address, 169.254.1.0 to 169.254.254.255 such as 169.254.169.254, "
            f'found "{value}"'
        )
    return value


def _limit(value: str) -> str:
    # The jailer takes nothing else, and says so only when it is started.
    if _LIMIT.fullmatch(value) is None:
        raise ValueError(f'expected a limit such as memory.max=2G, with one "=", found "{value}"')
    return value


def _guest(value: str) -> str:
    if value == "dhcp":
        return value
    try:
        interface = IPv4Interface(value)
    except ValueError:
        interface = None
    if interface is None or "/" not in value:
        raise ValueError(f'expected dhcp, or an address such as 172.30.0.2/30, found "{value}"')
    return str(interface)


def _pool(value: str) -> str:
    try:
        network = IPv4Network(value)
    except ValueError as error:
        raise ValueError(f'expected a network such as 172.30.0.0/16, found "{value}": {error}') from None
    if network.prefixlen > 30:
        raise ValueError(f'expected a network of at least four addresses, found "{value}"')
    return str(network)


def _mac(value: str) -> str:
    if _MAC.fullmatch(value) is None or int(value[:2], 16) & 1:
        raise ValueError(
            f'expected the MAC address of one interface, such as 06:00:ac:1e:00:02, found "{value}"'
        )
    return value.lower()


def _device(value: str) -> str:
    if not 0 < len(value) < 16 or "/" in value or not value.isprintable() or " " in value:
        raise ValueError(f'expected the name of an interface (up to 15 letters), found "{value}"')
    return value


Device = Annotated[str, AfterValidator(_device)]


class JailerSettings(Settings):
    """The block `jailer`: Firecracker in a directory and under a user of its own. Needs root."""

    enabled: bool = False
    """Start Firecracker through the jailer."""
    program: str = "jailer"
    """The program, by its path or as it is found on PATH."""
    uid: Annotated[int, Field(ge=0)] | None = None
    """The user that Firecracker becomes."""
    gid: Annotated[int, Field(ge=0)] | None = None
    """The group that Firecracker becomes."""
    chroot_base: str = "/srv/jailer"
    """The directory of jails; this one's is <chroot_base>/<file name of firecracker>/<build-id>/root."""
    cgroups: tuple[Annotated[str, AfterValidator(_limit)], ...] = ()
    """Limits, each as FILE=VALUE: memory.max=2G."""
    cgroup_version: Literal[1, 2] = 2
    """The version of cgroups on this host."""

    @model_validator(mode="after")
    def _has_user(self) -> Self:
        if self.enabled and (self.uid is None or self.gid is None):
            raise ValueError("the jailer needs uid and gid: the user that Firecracker becomes")
        return self


class NetworkSettings(Settings):
    """The block `network`: without `tap` and `cni` each build gets a tap device of its own. Needs root."""

    tap: Device | None = None
    """An existing tap device that has no other user."""
    cni: str | None = None
    """A network of CNI, by its name."""
    pool: Annotated[str, AfterValidator(_pool)] = "172.30.0.0/16"
    """Addresses for the taps of our own; each takes four of them."""
    host: Address | None = None
    """Address of this host that the guest calls; by default that of the tap, its bridge, or the gateway."""
    guest: Annotated[str, AfterValidator(_guest)] | None = None
    """Address of the guest with its prefix length, or dhcp; by default what the tap or CNI say."""
    gateway: Address | None = None
    """Default route of the guest."""
    name_servers: Annotated[tuple[Address, ...], Field(max_length=2)] = ()
    """DNS servers of the guest."""
    mac: Annotated[str, AfterValidator(_mac)] | None = None
    """Address of the guest's interface; by default CNI's, or one made of its IP address."""
    cni_config: str = "/etc/cni/net.d"
    """Where networks of CNI are described."""
    cni_plugins: tuple[str, ...] = ("/opt/cni/bin",)
    """Where plugins of CNI are."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.tap is not None and self.cni is not None:
            raise ValueError("expected one of tap and cni, found both")
        return self


class RunningSettings(Settings):
    """The block `running`: a Firecracker that was started elsewhere and is not configured."""

    socket: str | None = None
    """Its API socket. It is used for this build, and ends with it."""
    root: str | None = None
    """Its root directory on this host, when it runs in a jail."""
    uid: Annotated[int, Field(ge=0)] | None = None
    """Its user, who will own the files that it gets; by default files stay yours."""
    gid: Annotated[int, Field(ge=0)] | None = None
    """Its group."""
    serial: str | None = None
    """A file on this host that holds what its guest writes to the serial console."""


class FirecrackerSettings(Settings):
    """The block `firecracker` of the section `machine`."""

    program: str = "firecracker"
    """The program, by its path or as it is found on PATH."""
    kernel: str | None = None
    """The kernel to boot, in the form that Firecracker boots (an uncompressed vmlinux on x86). Required."""
    kernel_modules: tuple[str, ...] = ()
    """Directories of its modules, when virtio and ext4 are not built in."""
    kernel_args: tuple[str, ...] = ()
    """More arguments for the kernel."""
    initrd_compression: Literal["none", "gzip", "lz4", "zstd"] = "gzip"
    """How the guest's initramfs is compressed; every kernel reads gzip. Without, a boot needs more memory."""
    vcpus: Annotated[int, Field(ge=1, le=32)] = 2
    """Processors of the machine."""
    memory: Annotated[ByteSize, Field(ge=128 << 20)] = 1 << 30
    """Memory of the machine."""
    smt: bool = False
    """Show processors as hyper-threads (x86 only)."""
    cpu_template: str | None = None
    """A CPU template of Firecracker, such as T2."""
    mmds_version: Literal["V1", "V2"] = "V2"
    """Version of the metadata service; V2 asks for session tokens."""
    mmds_address: Annotated[str, AfterValidator(_link_local)] = "169.254.169.254"
    """Address of the metadata service in the guest."""
    serial_log: str | None = None
    """A file for what Firecracker and its guest write, up to 16 MiB; an existing one is replaced."""
    network: NetworkSettings = NetworkSettings()
    """How the guest reaches this host."""
    jailer: JailerSettings = JailerSettings()
    """Start Firecracker through its jailer."""
    running: RunningSettings = RunningSettings()
    """Take a Firecracker that runs already."""

    @model_validator(mode="after")
    def _has_whole_cores(self) -> Self:
        if self.smt and self.vcpus % 2 and self.vcpus > 1:
            raise ValueError(f"with smt the number of vcpus has to be 1 or even, found {self.vcpus}")
        return self
