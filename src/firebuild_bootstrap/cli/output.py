"""Standard output, with errors that are distinguishable from those of any other file."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from firebuild_bootstrap.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDOUT = 1


class _Guarded(io.FileIO):
    closing = False

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.closing:  # it was reported; the buffers above give up what they hold
                return memoryview(data).nbytes
            raise OutputError(
                f"standard output can't be written: {error.strerror}",
                reader_gone=isinstance(error, BrokenPipeError),
            ) from error


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """Let `sys.stdout` raise `OutputError` where it can't be written, and write all of it in time.

    Python alone would find out at exit, too late to handle it, and click takes a broken pipe for a
    failed command.
    """
    _open_standard_descriptors()
    raw = _Guarded(_STDOUT, "wb", closefd=False)
    before = sys.stdout
    encoding, errors = (before.encoding, before.errors) if before else ("utf-8", "surrogateescape")
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=raw.isatty()
    )
    try:
        yield
        sys.stdout.flush()
    finally:
        raw.closing = True
        sys.stdout = before


def _open_standard_descriptors() -> None:
    """Keep files that are opened later from becoming a standard stream that the caller has closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
