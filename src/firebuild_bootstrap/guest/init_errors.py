"""What keeps the init of a machine from doing its work."""

from __future__ import annotations


class InitError(Exception):
    """A stage of the init failed.

    Args:
        status: which one; the word of the report (docs/initramfs.md).
        message: what was expected and what was found.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
