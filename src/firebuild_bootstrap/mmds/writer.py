"""The seam between a build and wherever its metadata is served from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


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
