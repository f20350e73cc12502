"""The metadata store, with the limit and the merge rule of Firecracker's, and the seam to write to one."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Mapping
from typing import Any, Final, Protocol

from firebuild_bootstrap.errors import MachineError
from firebuild_pki.display import counted

# Firecracker's default (`--mmds-size-limit`, falling back to `--http-api-max-payload-size`).
STORE_LIMIT: Final = 51_200


class StoreError(MachineError):
    """The store refused a write; `status` is what Firecracker's API would answer."""

    def __init__(self, message: str, *, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class ResourceNotFound(LookupError):
    """Nothing is stored at the path."""


def compact_json(value: object) -> str:
    """Write JSON without spaces and with sorted keys, the form in which Firecracker counts and sends it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)


def size_of(value: object) -> int:
    """Return the bytes that `value` takes in a store."""
    return len(compact_json(value).encode())


def merge(target: Any, patch: Any) -> Any:
    """Return `target` with the JSON merge patch applied; neither argument is changed (RFC 7396)."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


class DataStore:
    """One machine's metadata in memory; every method may be called from any thread.

    Args:
        limit: bytes of compact JSON that fit.
    """

    def __init__(self, limit: int = STORE_LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._value: Any = None
        self._initialised = False

    def put(self, document: Any) -> None:
        """Replace everything with `document`.

        Raises:
            StoreError: status 413, it is larger than the limit; 400, it is not JSON.
        """
        self._check(document)
        with self._lock:
            self._value, self._initialised = copy.deepcopy(document), True

    def patch(self, merge_patch: Any) -> None:
        """Apply a JSON merge patch.

        Raises:
            StoreError: status 400, nothing was put before, or it is not JSON; 413, the result is larger than
                the limit.
        """
        with self._lock:
            if not self._initialised:
                raise StoreError(
                    "the metadata store holds nothing that could be patched",
                    status=400,
                    hint="put a document first",
                )
            merged = merge(self._value, merge_patch)
            self._check(merged)
            self._value = merged

    def get(self, pointer: str) -> Any:
        """Return the value at a JSON pointer (RFC 6901); the empty pointer is the whole document.

        Raises:
            ResourceNotFound: there is nothing.
        """
        if pointer and not pointer.startswith("/"):
            raise ResourceNotFound(pointer)
        with self._lock:
            value = self._value if self._initialised else {}
        for token in pointer.split("/")[1:]:
            value = _member(value, token.replace("~1", "/").replace("~0", "~"), pointer)
        return value

    def _check(self, value: Any) -> None:
        try:
            size = size_of(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise StoreError(f"the metadata is not JSON: {type(error).__name__}", status=400) from None
        if size > self._limit:
            raise StoreError(
                f"the metadata takes {counted(size, 'byte')}, and the store holds {self._limit}", status=413
            )


def _member(value: Any, token: str, pointer: str) -> Any:
    if isinstance(value, Mapping) and token in value:
        return value[token]
    # RFC 6901, section 4: an index has no leading zeros and no sign.
    is_index = token.isascii() and token.isdigit() and str(int(token)) == token
    if isinstance(value, list) and is_index and int(token) < len(value):
        return value[int(token)]
    raise ResourceNotFound(pointer)


class MetadataWriter(Protocol):
    """Puts metadata where the guest of one machine reads it: an emulator's store or Firecracker's API."""

    def put(self, document: Mapping[str, Any]) -> None:
        """Replace everything.

        Raises:
            MachineError: the store refused the document or cannot be reached.
        """
        ...

    def patch(self, merge_patch: Mapping[str, Any]) -> None:
        """Apply a JSON merge patch (RFC 7396): null removes a member.

        Raises:
            MachineError: nothing was put before, the result is too large, or the store cannot be reached.
        """
        ...


class HeldMetadata:
    """A `MetadataWriter` that keeps what is put until there is a service, and passes changes on then."""

    def __init__(self) -> None:
        self._store = DataStore()
        self._service: MetadataWriter | None = None
        self._lock = threading.Lock()

    def put(self, document: Mapping[str, Any]) -> None:
        """Replace everything; see `MetadataWriter.put`.

        Raises:
            StoreError: it is larger than the limit; nothing was sent.
        """
        with self._lock:
            self._store.put(document)
            if self._service is not None:
                self._service.put(document)

    def patch(self, merge_patch: Mapping[str, Any]) -> None:
        """Apply a JSON merge patch; see `MetadataWriter.patch`.

        Raises:
            StoreError: nothing was put, or the result is larger than the limit; nothing was sent.
        """
        with self._lock:
            self._store.patch(merge_patch)
            if self._service is not None:
                self._service.patch(merge_patch)

    def connect(self, service: MetadataWriter) -> None:
        """Put what there is into the service of a machine.

        Raises:
            MachineError: it was refused.
        """
        with self._lock:
            self._service = service
            if document := self._store.get(""):
                service.put(document)
