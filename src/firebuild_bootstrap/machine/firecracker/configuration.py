"""What a microVM is made of, as requests in the order in which Firecracker wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from firebuild_bootstrap.machine.firecracker.api import ApiError, FirecrackerApi
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.values import dataclass

# Ids are letters, digits and underscores.
_INTERFACE: Final = "eth0"
_MIB: Final = 1 << 20

Request = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Configuration:
    """One microVM.

    Args:
        settings: processors, memory, the metadata service.
        kernel: the kernel, as Firecracker sees it, like all paths here.
        initrd: the initramfs.
        boot_args: the kernel's command line.
        snapshot: the first drive, read-only.
        drives: the others.
        tap: the host's end of the network interface.
        mac: address of the guest's end.
    """

    settings: FirecrackerSettings
    kernel: str
    initrd: str
    boot_args: str
    snapshot: str
    drives: Sequence[str]
    tap: str
    mac: str

    def requests(self) -> Iterator[Request]:
        """Yield all before the metadata and the start, in order: the metadata service needs its interface."""
        yield "/machine-config", self._machine()
        yield (
            "/boot-source",
            {"kernel_image_path": self.kernel, "initrd_path": self.initrd, "boot_args": self.boot_args},
        )
        for number, path in enumerate((self.snapshot, *self.drives)):
            name = f"drive{number}"
            body = {
                "drive_id": name,
                # The initramfs is. Beside another root, a kernel that can't unpack it boots the image.
                "is_root_device": False,
                "path_on_host": path,
                "is_read_only": number == 0,
                # The guest's flushes need not reach the disk: what is kept is a cache.
                "cache_type": "Unsafe",
            }
            yield f"/drives/{name}", body
        yield (
            f"/network-interfaces/{_INTERFACE}",
            {"iface_id": _INTERFACE, "host_dev_name": self.tap, "guest_mac": self.mac},
        )
        yield (
            "/mmds/config",
            {
                "network_interfaces": [_INTERFACE],
                "version": self.settings.mmds_version,
                "ipv4_address": self.settings.mmds_address,
            },
        )

    def _machine(self) -> dict[str, Any]:
        machine: dict[str, Any] = {
            "vcpu_count": self.settings.vcpus,
            "mem_size_mib": self.settings.memory // _MIB,
            "smt": self.settings.smt,
        }
        if self.settings.cpu_template is not None:
            machine["cpu_template"] = self.settings.cpu_template
        return machine


def configure(api: FirecrackerApi, configuration: Configuration) -> None:
    """Send everything that has to be known before the metadata and the start.

    Raises:
        ApiError: Firecracker refused something.
    """
    for path, body in configuration.requests():
        try:
            api.put(path, body)
        except ApiError as error:
            raise ApiError(error.message, status=error.status, hint=_hint(path, error)) from error


def start(api: FirecrackerApi) -> None:
    """Let the microVM boot.

    Raises:
        ApiError: Firecracker could not start it.
    """
    api.put("/actions", {"action_type": "InstanceStart"})


def ask_to_end(api: FirecrackerApi) -> None:
    """Press Ctrl-Alt-Del, on which the initramfs ends vminit and then the machine (x86 only).

    Raises:
        ApiError: Firecracker can't, or has ended.
    """
    api.put("/actions", {"action_type": "SendCtrlAltDel"})


def _hint(path: str, error: ApiError) -> str | None:
    if path.startswith("/network-interfaces"):
        return "is the tap device used by another machine? may Firecracker's user open it (ip tuntap … user)?"
    return error.hint
