"""Makes values of any shape out of a fuzzer's bytes, for documents that pass the first checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Bytes as a sequence of choices; when they are used up, every further one is the first.

    Args:
        data: of the fuzzer.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        """Whether there are bytes that nothing has used."""
        return self._at < len(self._data)

    def number(self, size: int = 1) -> int:
        """Return a number of `size` bytes."""
        return int.from_bytes(self.raw(size), "little")

    def below(self, most: int) -> int:
        """Return a number from 0 to `most` - 1."""
        return self.number((most.bit_length() + 7) // 8) % most

    def one(self, options: Sequence[T]) -> T:
        """Return one of `options`."""
        return options[self.below(len(options))]

    def raw(self, size: int) -> bytes:
        """Return `size` bytes, or what is left of them."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def bytes(self, most: int = 40) -> bytes:
        """Return some bytes, `most` at most."""
        return self.raw(self.below(most + 1))

    def text(self, most: int = 40) -> str:
        """Return some text, which may be no UTF-8."""
        return self.bytes(most).decode("utf-8", "surrogateescape")

    def value(self, depth: int = 3) -> object:
        """Return something that JSON can hold."""
        match self.below(9 if depth else 6):
            case 0:
                return None
            case 1:
                return bool(self.below(2))
            case 2:
                return self.number(4)
            case 3:
                return -self.number(9)
            case 4:
                return self.number(2) / 7
            case 5:
                return self.bytes(20).decode("latin-1")
            case 6:
                return [self.value(depth - 1) for _ in range(self.below(4))]
            case _:
                return {self.bytes(8).decode("latin-1"): self.value(depth - 1) for _ in range(self.below(4))}

    def damaged(self, document: object) -> object:
        """Return a document of JSON in which some members are others, are missing, or are new."""
        if self.below(12) == 1:
            return self.value()
        if isinstance(document, dict):
            kept = {key: self.damaged(value) for key, value in document.items() if self.below(30) != 1}
            return {**kept, self.text(8): self.value(1)} if self.below(30) == 1 else kept
        if isinstance(document, list):
            items = [self.damaged(value) for value in document if self.below(30) != 1]
            return items * 2 if self.below(30) == 1 else items
        return document
