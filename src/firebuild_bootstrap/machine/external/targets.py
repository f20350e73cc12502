"""Where the metadata of an external machine go: a file, standard output, or a Firecracker.

The document holds a private key. No error and no log quotes any part of it, nor an answer that might.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from firebuild_bootstrap.errors import MAKE_ROOM, InputError, MachineError, OutputError
from firebuild_bootstrap.machine.external.settings import MetadataTarget
from firebuild_bootstrap.machine.firecracker.api import ApiError, FirecrackerApi, MmdsApi
from firebuild_bootstrap.mmds import BOOTSTRAP_WIPE
from firebuild_bootstrap.mmds.store import STORE_LIMIT, compact_json, merge
from firebuild_pki.homes import absolute

Note = Callable[[Sequence[str]], None]
"""Writes down a command that cleans up after a build that could not do so itself."""


class OutsideFile:
    """A file that appears complete, and is removed as long as it is still the one that was made.

    Args:
        path: where it appears.
        note: told, before something is made, how to remove it.
    """

    def __init__(self, path: Path, note: Note = lambda _: None) -> None:
        self.path = path
        self._note = note
        self._made: tuple[int, int] | None = None

    def announce_part(self, part: Path) -> None:
        """Say that the file `part` is about to be filled, which will become this one."""
        self._note(["rm", "-f", "--", str(part)])

    def appear(self, part: Path, move: Callable[[Path, Path], None]) -> None:
        """Make the complete file `part` this one with `move`: a rename, or a link.

        Raises:
            OSError: it can't be moved there.
        """
        details = part.stat()
        self._note(["find", str(self.path), "-maxdepth", "0", "-inum", str(details.st_ino), "-delete"])
        move(part, self.path)
        self._made = details.st_dev, details.st_ino

    def stay(self) -> bool:
        """Let the file stay for good; whether it was there to be removed."""
        made, self._made = self._made, None
        return made is not None

    def remove(self) -> None:
        """Remove it, unless it was replaced. Raises nothing; idempotent."""
        made, self._made = self._made, None
        with suppress(OSError):
            details = self.path.lstat()
            if made == (details.st_dev, details.st_ino):
                os.unlink(self.path)


_TOO_LARGE: Final = 413


class Target(ABC):
    """A `MetadataWriter` that can be checked before, and taken back after the build."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Where the document is, for messages."""

    @abstractmethod
    def check(self) -> None:
        """Find out whether the document can be written; writes nothing.

        Raises:
            FirebuildError: it can't.
        """

    @abstractmethod
    def put(self, document: Mapping[str, Any]) -> None:
        """Write the document."""

    @abstractmethod
    def patch(self, merge_patch: Mapping[str, Any]) -> None:
        """Change what was written by a JSON merge patch (RFC 7396)."""

    def remove(self) -> None:  # noqa: B027 - what was read was read
        """Take back what can be taken back, the private key above all. Raises nothing; idempotent."""


def make_target(target: MetadataTarget, note: Note = lambda _: None) -> Target:
    """Return what the setting `machine.external.metadata` means.

    Args:
        note: see `OutsideFile`.
    """
    if target.file is not None:
        return FileTarget(absolute(target.file), note)
    if target.firecracker_socket is not None:
        return FirecrackerTarget(absolute(target.firecracker_socket))
    return StreamTarget()


class _WholeDocuments(Target):
    """Keeps the document, for targets that are only ever given a whole one."""

    def __init__(self) -> None:
        self._document: Any = None
        self._lock = threading.Lock()

    def put(self, document: Mapping[str, Any]) -> None:
        """Write the document."""
        with self._lock:
            self._replace(document)

    def patch(self, merge_patch: Mapping[str, Any]) -> None:
        """Write the whole document again, changed."""
        with self._lock:
            self._replace(merge(self._document, merge_patch))

    def _replace(self, document: Any) -> None:
        self._write(compact_json(document).encode() + b"\n")
        self._document = document

    @abstractmethod
    def _write(self, text: bytes) -> None: ...


class FileTarget(_WholeDocuments):
    """A file of mode 0600 that is replaced as a whole, so that no reader sees a part of a document."""

    def __init__(self, path: Path, note: Note = lambda _: None) -> None:
        super().__init__()
        self._path = path
        self._file = OutsideFile(path, note)

    @property
    def description(self) -> str:
        """See `Target.description`."""
        return f"the file {self._path}"

    def check(self) -> None:
        """See `Target.check`."""
        where = "machine.external.metadata.file"
        if not self._path.parent.is_dir():
            raise InputError(f"{where}: {self._path.parent} is not a directory", hint="make it first")
        if not os.access(self._path.parent, os.W_OK):
            raise InputError(
                f"{where}: no right to write in {self._path.parent}", hint="let this user write there"
            )
        if os.path.lexists(self._path) and not stat.S_ISREG(self._path.lstat().st_mode):
            raise InputError(
                f"{where}: expected a file or nothing, found something else at {self._path}",
                hint="a pipe can take the metadata from standard output: metadata: stdout",
            )

    def remove(self) -> None:
        """Remove the file, unless it was replaced."""
        with self._lock:
            self._file.remove()

    def _write(self, text: bytes) -> None:
        try:
            descriptor, fresh = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:  # mode 0600 from the start
                    self._file.announce_part(Path(fresh))
                    file.write(text)
                self._file.appear(Path(fresh), os.replace)
            except BaseException:
                os.unlink(fresh)
                raise
        except OSError as error:
            raise MachineError(
                f"the metadata can't be written to {self._path}: {error.strerror}",
                hint=MAKE_ROOM,
            ) from error


class StreamTarget(_WholeDocuments):
    """A pipe: one document a line, and the last line is what holds.

    Args:
        out: the pipe; None for standard output as it is when it is first written.
    """

    def __init__(self, out: BinaryIO | None = None) -> None:
        super().__init__()
        self._given = out

    @property
    def description(self) -> str:
        """See `Target.description`."""
        return "the first line of standard output"

    def check(self) -> None:
        """Refuse a terminal, whose memory is long; see `Target.check`."""
        if self._out.isatty():
            raise InputError(
                "the metadata for the guest would go to the terminal, and they hold a private key",
                hint="give the output to the program that serves the metadata (firebuild rootfs … | it), "
                "or set machine.external.metadata to {file: PATH} or {firecracker_socket: PATH}",
            )

    @property
    def _out(self) -> BinaryIO:
        return self._given or sys.stdout.buffer

    def _write(self, text: bytes) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OutputError as error:  # without them no guest comes: it is told where the reader has gone, too
            raise OutputError(error.message) from error


class FirecrackerTarget(Target):
    """The metadata store of a Firecracker that was started elsewhere."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._api = FirecrackerApi(path)
        self._service = MmdsApi(self._api)
        self._holds_key = False

    @property
    def description(self) -> str:
        """See `Target.description`."""
        return f"the Firecracker at {self._path}"

    def check(self) -> None:
        """Ask Firecracker how it is; see `Target.check`."""
        try:
            found = self._api.get("/")
        except ApiError as error:
            raise MachineError(
                f"machine.external.metadata.firecracker_socket: {error.message}",
                hint="it is what Firecracker got as --api-sock; start Firecracker before the build",
            ) from error
        if "state" not in found:
            raise MachineError(
                f"machine.external.metadata.firecracker_socket: {self._path} is not a Firecracker",
                hint="it is what Firecracker got as --api-sock, not the vsock or the log",
            )

    def put(self, document: Mapping[str, Any]) -> None:
        """Write the document."""
        self._holds_key = True
        try:
            self._service.put(document)
        except ApiError as error:
            if error.status != _TOO_LARGE:
                raise
            raise MachineError(
                f"the metadata do not fit into the Firecracker at {self._path}",
                hint=f"start it with --mmds-size-limit {STORE_LIMIT} or more",
            ) from error

    def patch(self, merge_patch: Mapping[str, Any]) -> None:
        """Change what was written."""
        self._service.patch(merge_patch)
        self._holds_key = self._holds_key and merge_patch != BOOTSTRAP_WIPE

    def remove(self) -> None:
        """Take the credentials out, where they still are and Firecracker still is."""
        if self._holds_key:
            with suppress(MachineError):
                self.patch(BOOTSTRAP_WIPE)
