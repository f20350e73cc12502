"""The metadata of a microVM: sent to Firecracker's store, through the one path that it does not log."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from firebuild_bootstrap.machine.firecracker.api import SECRET_PATH, FirecrackerApi
from firebuild_bootstrap.mmds.store import STORE_LIMIT, DataStore


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
