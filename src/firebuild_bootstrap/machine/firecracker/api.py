"""A client of Firecracker's API: HTTP/1.1 with JSON over a UNIX socket (firecracker.yaml of Firecracker)."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.mmds.store import STORE_LIMIT, DataStore, compact_json

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
        timeout: seconds for one request.
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

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, *, accept: int) -> bytes:
        text = None if body is None else compact_json(body).encode()
        connection = _Connection(self.path, self._timeout)
        try:
            connection.request(method, path, text, _headers(text))
            with connection.getresponse() as response:
                answer = response.read(_MAX_ANSWER)
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
    except (ValueError, TypeError, KeyError, RecursionError):
        words = answer.decode("utf-8", "replace")
    text = " ".join(str(words).split())[:500]
    if secret and any(mark in text for mark in ("PRIVATE KEY", "BEGIN ")):
        return "(its words are left out: they quote the metadata)"
    return text or "without a word"


class FirecrackerMetadata:
    """A `MetadataWriter`; what is put before Firecracker runs is kept until `connect`.

    Args:
        limit: bytes of compact JSON that Firecracker's store holds.
    """

    def __init__(self, limit: int = STORE_LIMIT) -> None:
        self._store = DataStore(limit)
        self._api: FirecrackerApi | None = None
        self._lock = threading.Lock()

    def put(self, document: Mapping[str, Any]) -> None:
        """Replace everything; see `MetadataWriter.put`.

        Raises:
            StoreError: it is larger than the limit; nothing was sent.
            ApiError: Firecracker refused it.
        """
        with self._lock:
            self._store.put(document)
            if self._api is not None:
                self._api.put(SECRET_PATH, document)

    def patch(self, merge_patch: Mapping[str, Any]) -> None:
        """Apply a JSON merge patch; see `MetadataWriter.patch`.

        Raises:
            StoreError: nothing was put, or the result is larger than the limit; nothing was sent.
            ApiError: Firecracker refused it.
        """
        with self._lock:
            self._store.patch(merge_patch)
            if self._api is not None:
                self._api.patch(SECRET_PATH, merge_patch)

    def connect(self, api: FirecrackerApi) -> None:
        """Send what was put to a Firecracker that has started and takes metadata.

        Raises:
            ApiError: Firecracker refused it.
        """
        with self._lock:
            self._api = api
            document = self._store.get("")
            if document:
                api.put(SECRET_PATH, document)
