"""The metadata document: what a guest finds below `latest/meta-data`, every leaf a string.

Names and nesting are those that guests in the field read; see docs/mmds.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.mmds.members import (
    DriveInfo,
    MachineInfo,
    NetworkInfo,
    UserInfo,
    object_of,
    objects_of,
    text_of,
    texts_of,
)
from firebuild_bootstrap.mmds.store import STORE_LIMIT, size_of
from firebuild_bootstrap.wire import BootstrapBlock

if TYPE_CHECKING:
    from firebuild_pki import TLSMaterial

BOOTSTRAP_WIPE: Final[Mapping[str, Any]] = {"latest": {"meta-data": {"Bootstrap": None}}}
"""The merge patch that takes the credentials out of the metadata and leaves everything else."""


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
