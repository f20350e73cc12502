"""How Firecracker's API answers, without sockets and machines: the rules of its documentation, strictly."""

from __future__ import annotations

import ipaddress
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from firebuild_bootstrap.mmds.store import DataStore, StoreError, compact_json

Answer = tuple[int, bytes]
_ID = re.compile(r"[A-Za-z0-9_]+")
_NOT_AFTER = "The requested operation is not supported after starting the microVM."
_NOT_BEFORE = "The requested operation is not supported before starting the microVM."

# Member: type, and whether it has to be there.
_FIELDS: dict[str, dict[str, tuple[type | tuple[type, ...], bool]]] = {
    "machine-config": {
        "vcpu_count": (int, True),
        "mem_size_mib": (int, True),
        "smt": (bool, False),
        "track_dirty_pages": (bool, False),
        "cpu_template": (str, False),
        "huge_pages": (str, False),
    },
    "boot-source": {
        "kernel_image_path": (str, True),
        "boot_args": (str, False),
        "initrd_path": (str, False),
    },
    "drives": {
        "drive_id": (str, True),
        "is_root_device": (bool, True),
        "path_on_host": (str, False),
        "is_read_only": (bool, False),
        "partuuid": (str, False),
        "cache_type": (str, False),
        "io_engine": (str, False),
        "rate_limiter": (dict, False),
        "socket": (str, False),
    },
    "network-interfaces": {
        "iface_id": (str, True),
        "host_dev_name": (str, True),
        "guest_mac": (str, False),
        "rx_rate_limiter": (dict, False),
        "tx_rate_limiter": (dict, False),
    },
    "mmds/config": {
        "network_interfaces": (list, True),
        "version": (str, False),
        "ipv4_address": (str, False),
        "imds_compat": (bool, False),
    },
    "actions": {"action_type": (str, True)},
}
_WORDS: dict[str, tuple[str, ...]] = {
    "cache_type": ("Unsafe", "Writeback"),
    "io_engine": ("Sync", "Async"),
    "version": ("V1", "V2"),
    "cpu_template": ("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"),
    "huge_pages": ("None", "2M"),
    "action_type": ("FlushMetrics", "InstanceStart", "SendCtrlAltDel"),
}


class Fault(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Host:
    """What the API asks of its surroundings; each returns a complaint, or nothing."""

    open_file: Callable[[str, bool], str] = lambda _path, _writable: ""
    open_tap: Callable[[str], str] = lambda _name: ""
    start: Callable[[], str] = lambda: ""
    ctrl_alt_del: Callable[[], str] = lambda: ""


@dataclass
class Api:
    """One Firecracker's state."""

    host: Host = field(default_factory=Host)
    release: str = "1.13.1"
    machine_id: str = "anonymous-instance"
    state: str = "Not started"
    machine: dict[str, Any] = field(default_factory=lambda: {"vcpu_count": 1, "mem_size_mib": 128})
    boot: dict[str, Any] = field(default_factory=dict)
    drives: dict[str, dict[str, Any]] = field(default_factory=dict)
    interfaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    mmds: dict[str, Any] = field(default_factory=dict)
    store: DataStore = field(default_factory=DataStore)
    log: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def respond(self, method: str, path: str, body: bytes) -> Answer:
        """Answer one request, and log it as Firecracker does: bodies too, but for the path /mmds."""
        shown = "" if path == "/mmds" else body.decode("utf-8", "replace")
        self.log.append(f"{method} {path} {shown}")
        with self.lock:
            try:
                found = self._respond(method, path, body)
            except Fault as error:
                return error.status, compact_json({"fault_message": str(error)}).encode()
        return (204, b"") if found is None else (200, compact_json(found).encode())

    def _respond(self, method: str, path: str, body: bytes) -> Mapping[str, Any] | None:
        if method == "GET":
            return self._get(path)
        if path == "/mmds" and method in ("PUT", "PATCH"):
            self._mmds_data(method, _json(body))
            return None
        kind, _, name = path.removeprefix("/").partition("/")
        known = {"machine-config", "boot-source", "actions"} if not name else {"drives", "network-interfaces"}
        if path == "/mmds/config":
            kind = "mmds/config"
        elif kind not in known:
            raise Fault(f"Invalid request method and/or path: {method} {path}.")
        if method != "PUT":
            raise Fault(f"Invalid request method and/or path: {method} {path}.")
        document = _checked(kind, _json(body))
        if kind == "actions":
            self._action(document["action_type"])
            return None
        if self.state != "Not started":
            raise Fault(_NOT_AFTER)
        {
            "machine-config": self._put_machine,
            "boot-source": self._put_boot,
            "drives": self._put_drive,
            "network-interfaces": self._put_interface,
            "mmds/config": self._put_mmds,
        }[kind](document, name)
        return None

    def _get(self, path: str) -> Mapping[str, Any]:
        match path:
            case "/":
                return {
                    "app_name": "Firecracker",
                    "id": self.machine_id,
                    "state": self.state,
                    "vmm_version": self.release,
                }
            case "/version":
                return {"firecracker_version": self.release}
            case "/machine-config":
                return self.machine
            case "/vm/config":
                return {
                    "boot-source": self.boot,
                    "drives": list(self.drives.values()),
                    "machine-config": self.machine,
                    "mmds-config": self.mmds,
                    "network-interfaces": list(self.interfaces.values()),
                }
            case "/mmds":
                found: Mapping[str, Any] = self.store.get("")
                return found
        raise Fault(f"Invalid request method and/or path: GET {path}.")

    def _mmds_data(self, method: str, document: Any) -> None:
        try:
            (self.store.put if method == "PUT" else self.store.patch)(document)
        except StoreError as error:
            raise Fault(error.message, error.status) from error

    def _put_machine(self, document: dict[str, Any], _name: str) -> None:
        vcpus = document["vcpu_count"]
        if not 1 <= vcpus <= 32:
            raise Fault("The vCPU number is invalid! The vCPU number can only be 1 to 32.")
        if document.get("smt") and vcpus > 1 and vcpus % 2:
            raise Fault("The vCPU number has to be 1 or even with SMT.")
        if document["mem_size_mib"] < 1:
            raise Fault("The memory size (MiB) is invalid.")
        self.machine = document

    def _put_boot(self, document: dict[str, Any], _name: str) -> None:
        for key in ("kernel_image_path", "initrd_path"):
            if key in document and (complaint := self.host.open_file(document[key], False)):
                raise Fault(f"Boot source error: the file of {key} cannot be opened: {complaint}")
        self.boot = document

    def _put_drive(self, document: dict[str, Any], name: str) -> None:
        _same_id(document["drive_id"], name)
        if "path_on_host" not in document or "is_read_only" not in document:
            raise Fault("Running method expected different backend.")
        others = [one for key, one in self.drives.items() if key != name and one["is_root_device"]]
        if document["is_root_device"] and others:
            raise Fault("A root block device already exists!")
        complaint = self.host.open_file(document["path_on_host"], not document["is_read_only"])
        if complaint:
            raise Fault(f"Unable to create the virtio block device: {complaint}")
        self.drives[name] = document

    def _put_interface(self, document: dict[str, Any], name: str) -> None:
        _same_id(document["iface_id"], name)
        mac = document.get("guest_mac")
        if mac is not None and re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", mac) is None:
            raise Fault("The guest MAC address is invalid.")
        taken = [one.get("guest_mac") for key, one in self.interfaces.items() if key != name]
        if mac is not None and mac in taken:
            raise Fault(f"The MAC address is already in use: {mac}")
        if complaint := self.host.open_tap(document["host_dev_name"]):
            raise Fault(f"Could not create the network device: Open tap device failed: {complaint}")
        self.interfaces[name] = document

    def _put_mmds(self, document: dict[str, Any], _name: str) -> None:
        wanted = document["network_interfaces"]
        if not wanted or not all(one in self.interfaces for one in wanted):
            raise Fault("The list of network interface IDs that allow forwarding MMDS requests is invalid.")
        address = document.get("ipv4_address", "169.254.169.254")
        try:
            found = ipaddress.IPv4Address(address)
            if not found.is_link_local or found.packed[2] in (0, 255):
                raise ValueError(address)
        except ValueError:
            raise Fault("The MMDS IPv4 address is not link local.") from None
        if "imds_compat" in document and numbers(self.release) < (1, 13):
            raise Fault("unknown field `imds_compat`")
        self.mmds = {"version": "V1", "ipv4_address": "169.254.169.254", **document}

    def _action(self, action: str) -> None:
        if action == "InstanceStart":
            if self.state != "Not started":
                raise Fault(_NOT_AFTER)
            if not self.boot:
                raise Fault("Cannot start microvm without kernel configuration.")
            if complaint := self.host.start():
                raise Fault(complaint)
            self.state = "Running"
            return
        if self.state == "Not started":
            raise Fault(_NOT_BEFORE)
        if action == "SendCtrlAltDel" and (complaint := self.host.ctrl_alt_del()):
            raise Fault(complaint)


def numbers(release: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor, *_ = release.split(".")
    return int(major), int(minor)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise Fault(f"An error occurred when deserializing the json body of a request: {error}.") from error


def _checked(kind: str, document: Any) -> dict[str, Any]:
    fields = _FIELDS[kind]
    if not isinstance(document, dict):
        raise Fault("An error occurred when deserializing the json body of a request: invalid type.")
    for key, value in document.items():
        if key not in fields:
            raise Fault(f"An error occurred when deserializing the json body: unknown field `{key}`.")
        wanted = fields[key][0]
        right = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
        if not right or (key in _WORDS and value not in _WORDS[key]):
            raise Fault(f"An error occurred when deserializing the json body: invalid value for `{key}`.")
    for key, (_, needed) in fields.items():
        if needed and key not in document:
            raise Fault(f"An error occurred when deserializing the json body: missing field `{key}`.")
    return document


def _same_id(in_body: str, in_path: str) -> None:
    if _ID.fullmatch(in_path) is None:
        raise Fault("API Resource IDs can only contain alphanumeric characters and underscores.")
    if in_body != in_path:
        raise Fault("The id from the path does not match the id from the body!")
