"""What a worker tells its caller when it cannot do its work."""

from __future__ import annotations


class TreeError(Exception):
    """A tree or archive is not as it should be.

    Args:
        message: what was expected and found.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
