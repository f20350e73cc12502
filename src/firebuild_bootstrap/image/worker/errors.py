"""What a worker tells its caller when it cannot do its work."""

from __future__ import annotations


class TreeError(Exception):
    """A tree or archive is not as it should be.

    Args:
        message: what was expected and found.
        hint: what to do about it.
        asked: the user asked for something that can't be; otherwise the machine could not do it.
    """

    def __init__(self, message: str, hint: str = "", *, asked: bool = False) -> None:
        super().__init__(message)
        self.asked = asked
        self.message = message
        self.hint = hint
