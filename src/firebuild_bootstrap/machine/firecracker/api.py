"""A client of Firecracker's API: HTTP/1.1 with JSON over a UNIX socket (firecracker.yaml of Firecracker)."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MALFORMED, MachineError
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.mmds.store import compact_json
from firebuild_pki.connections import BoundedResponse
from firebuild_pki.values import dataclass

# The one path whose bodies Firecracker never writes to its log.
SECRET_PATH: Final = "/mmds"  # noqa: S105 - a path
_SECONDS: Final = 10.0
_PAUSE: Final = 0.02
_MAX_ANSWER: Final = 1 << 20


class ApiError(MachineError):
    """Firecracker refused a request or did not answer; `status` is its HTTP status, 0 without an answer."""

    def __init__(self, message: str, *, status: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class FirecrackerApi:
    """The API of one Firecracker; each request has a connection of its own.

    Args:
        path: the socket; it may be longer than the 107 bytes of a socket address.
        timeout: seconds to connect, and for the head and the body of an answer.
    """

    def __init__(self, path: Path, *, timeout: float = _SECONDS) -> None:
        self.path = path
        self._timeout = timeout

    def get(self, path: str) -> dict[str, Any]:
        """Return the object at `path`.

        Raises:
            ApiError: Firecracker refused, did not answer, or sent no object.
        """
        text = self._call("GET", path, None, accept=200)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ApiError(f"Firecracker answered GET {path} with something that is not a JSON object")
        return answer

    def put(self, path: str, body: Mapping[str, Any]) -> None:
        """Send `body` to `path`; as `patch` otherwise."""
        self._call("PUT", path, body, accept=204)

    def patch(self, path: str, body: Mapping[str, Any]) -> None:
        """Send `body`, which no error quotes, to `path`.

        Raises:
            ApiError: Firecracker refused or did not answer.
        """
        self._call("PATCH", path, body, accept=204)

    def await_ready(self, seconds: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until Firecracker answers.

        Args:
            check: called again and again; what it raises ends the wait.

        Raises:
            ApiError: it did not within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while True:
            check()
            try:
                self.get("/")
            except ApiError as error:
                if error.status or time.monotonic() >= deadline:
                    raise
            else:
                return
            time.sleep(_PAUSE)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        """Return the body, which has as long as the head had; a socket's timeout is for each byte."""
        deadline = time.monotonic() + self._timeout
        body = bytearray()
        while piece := response.read1(_MAX_ANSWER):
            body += piece
            if len(body) > _MAX_ANSWER:
                raise http.client.HTTPException(f"its answer has more than {_MAX_ANSWER} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"its answer did not end within {self._timeout:g} seconds")
        return bytes(body)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, *, accept: int) -> bytes:
        text = None if body is None else compact_json(body).encode()
        connection = _Connection(self.path, self._timeout)
        try:
            connection.request(method, path, text, _headers(text))
            with connection.getresponse() as response:
                answer = self._body(response)
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(
                f"Firecracker at {self.path} did not answer {method} {path}: {_reason(error)}",
                hint="look at what it said; a build's Firecracker has no other client",
            ) from error
        finally:
            connection.close()
        if response.status != accept:
            fault = _fault(answer, secret=path == SECRET_PATH)
            raise ApiError(
                f"Firecracker refused {method} {path} with status {response.status}: {fault}",
                status=response.status,
            )
        return answer


class _Connection(http.client.HTTPConnection):
    response_class = BoundedResponse

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = connect(self._path, self.timeout)


def connect(path: Path, timeout: float | None) -> socket.socket:
    """Connect to a UNIX socket, through its directory, so that its path may have any length.

    Raises:
        OSError: there is no listener.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(timeout)
            link.connect(f"/proc/self/fd/{directory}/{path.name}")
        except BaseException:
            link.close()
            raise
        return link
    finally:
        os.close(directory)


def is_socket(path: Path) -> bool:
    """Tell whether there is a socket at `path`."""
    with suppress(OSError):
        return stat.S_ISSOCK(path.stat().st_mode)
    return False


def _headers(body: bytes | None) -> dict[str, str]:
    headers = {"Accept": "application/json"}
    return headers if body is None else {**headers, "Content-Type": "application/json"}


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _fault(answer: bytes, *, secret: bool) -> str:
    """Return Firecracker's own words; where a body was secret, only those that cannot quote it."""
    try:
        words = json.loads(answer)["fault_message"]
    except MALFORMED:
        words = answer.decode("utf-8", "replace")
    text = " ".join(str(words).split())[:500]
    if secret and any(mark in text for mark in ("PRIVATE KEY", "BEGIN ")):
        return "(its answer is not shown: it quotes the metadata)"
    return text or "without a word"


class MmdsApi:
    """A `MetadataWriter` to the metadata service of a Firecracker that has started.

    Args:
        api: its API.
    """

    def __init__(self, api: FirecrackerApi) -> None:
        self._api = api

    def put(self, document: Mapping[str, Any]) -> None:
        """Replace everything; see `MetadataWriter.put`."""
        self._api.put(SECRET_PATH, document)

    def patch(self, merge_patch: Mapping[str, Any]) -> None:
        """Apply a JSON merge patch; see `MetadataWriter.patch`."""
        self._api.patch(SECRET_PATH, merge_patch)


# --- what a microVM is made of --------------------------------------------------------------------

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
        yield "/machine-config", machine_config(self.settings)
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


def machine_config(settings: FirecrackerSettings) -> dict[str, Any]:
    """Return the processors and the memory of a microVM, as Firecracker takes them."""
    machine: dict[str, Any] = {
        "vcpu_count": settings.vcpus,
        "mem_size_mib": settings.memory // _MIB,
        "smt": settings.smt,
    }
    if settings.cpu_template is not None:
        machine["cpu_template"] = settings.cpu_template
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
