"""Content on its way to the guest, checked while it is read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Protocol

from firebuild_bootstrap.errors import InputError, Location

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def changed(name: str, how: str, location: Location | None) -> InputError:
    """Return the error for content that is not what was announced."""
    return InputError(
        f"{name} changed while it was being sent: {how}",
        hint="let nothing write to the build context during a build",
        location=location,
    )


def ended_early(missing: int, size: int) -> str:
    """Say that content was shorter than announced."""
    return f"it ended {missing} bytes before its {size} bytes"


def has_grown(size: int) -> str:
    """Say that content was longer than announced."""
    return f"it has grown beyond its {size} bytes"


def unreadable(name: str, error: Exception, location: Location | None) -> InputError:
    """Return the error for content that can't be read."""
    return InputError(f"{name} can't be read: {error}", location=location)


class Readable(Protocol):
    """Anything that content can be read from."""

    def read(self, size: int, /) -> bytes | None:
        """Return at most `size` bytes, none at the end."""
        ...

    def close(self) -> None:
        """Let go of the content."""
        ...


class SizedReader(io.RawIOBase):
    """Reads exactly as many bytes as were announced, and fails where the content has more or fewer.

    Args:
        content: where the bytes come from; closed with the reader.
        size: how many bytes were announced.
        name: what to call the content in messages.
        location: the instruction that sends it.
        broken: exceptions of `content` that mean that it is damaged or can't be read.
    """

    def __init__(
        self,
        content: Readable,
        size: int,
        *,
        name: str,
        location: Location | None,
        broken: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        super().__init__()
        self._content = content
        self._missing = size
        self._size = size
        self._name = name
        self._location = location
        self._broken = broken
        self._probed = False

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill `buffer`; the end is reported only after the size has been found right.

        Raises:
            InputError: the content has changed its size, is damaged or can't be read.
        """
        view = memoryview(buffer).cast("B")
        data = self._read(min(len(view), self._missing)) if self._missing else b""
        if self._missing and not data:
            raise self._changed(ended_early(self._missing, self._size))
        view[: len(data)] = data
        self._missing -= len(data)
        if not self._missing and not self._probed:
            self._probed = True
            if self._read(1):
                raise self._changed(has_grown(self._size))
        return len(data)

    def close(self) -> None:
        """Close the content as well."""
        if not self.closed:
            self._content.close()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            return self._content.read(size) or b""
        except self._broken as error:
            raise unreadable(self._name, error, self._location) from error

    def _changed(self, how: str) -> InputError:
        return changed(self._name, how, self._location)


def checked(
    content: Readable,
    size: int,
    *,
    name: str,
    location: Location | None,
    broken: tuple[type[Exception], ...] = (OSError,),
) -> io.BufferedReader:
    """Return `content` as a buffered file that insists on `size` bytes; see `SizedReader`."""
    return io.BufferedReader(
        SizedReader(content, size, name=name, location=location, broken=broken), buffer_size=256 * 1024
    )
