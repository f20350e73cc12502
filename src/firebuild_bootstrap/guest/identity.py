"""Who the machine is, in files that its command finds: certificate, key and trust (docs/identity.md).

The directory is a tmpfs of vminit's, and the command has a read-only mount of it. A symbolic link leads to
the files of the last certificate; replacing the link replaces all three at one moment, and whoever has opened
the directory behind it goes on seeing three that belong together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers.root import remove_directory

from . import kernel
from .errors import GuestError, ProtocolError, StepError
from .mounts import MountPoint
from .stop import Stop

_POLL_SECONDS = 0.1
_CURRENT, _NEXT = "..data", "..next"
_FILES = ("cert.pem", "key.pem", "ca.pem")
_TMPFS = "mode=755,size=4m"


class Said(NamedTuple):
    """What the host says: certificate `number` is in the metadata, to be requested, or here as a chain."""

    number: int
    chain: str = ""
    trust: str = ""


class Answer(Protocol):
    """Takes what the guest says of a certificate: a request, that its files are there, or why not."""

    def __call__(self, number: int, *, csr: bytes = b"", error: str = "") -> None:
        """Take the answer to certificate `number`: a CSR in PEM, why it failed, or success with neither."""
        ...


class Channel:
    """What the host says, from the thread that reads the session to the one that acts on it.

    Only the last counts: a host that got no answer has gone on to the next certificate, and the metadata have
    that one alone. A guest that stood still for long finds several such words at once.

    Args:
        answer: see there; may wait.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._changed = threading.Condition()
        self._said: Said | None = None

    def put(self, said: Said) -> None:
        """Take what the host says, in the place of what has not been taken yet."""
        with self._changed:
            self._said = said
            self._changed.notify()

    def get(self, stop: Stop, ended: threading.Event | None = None) -> Said | None:
        """Wait for what it says; None when `ended` is set.

        Raises:
            GuestError: the reason of `stop`.
        """
        while ended is None or not ended.is_set():
            stop.check()
            with self._changed:
                if self._changed.wait_for(lambda: self._said, _POLL_SECONDS):
                    said, self._said = self._said, None
                    return said
        return None


class Files:
    """The files; each write replaces all of them.

    Args:
        directory: an empty one.
        owner: user and group of the files.
        mode: of the file of the key; the others can be read by all.
    """

    def __init__(self, directory: str, owner: tuple[int, int], mode: int) -> None:
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._owner = owner
        self._mode = mode
        self._kept: list[str] = []

    def write(self, number: int, chain: str, key: bytes, trust: str) -> None:
        """Write the files of certificate `number`; those of the one before the last are removed.

        Raises:
            OSError: they can't be written, and nothing has changed.
        """
        name = f"..{number}"
        try:
            os.mkdir(name, 0o755, dir_fd=self._directory)
            self._fill(name, (chain.encode(), key, trust.encode()))
            os.symlink(name, _NEXT, dir_fd=self._directory)
            os.rename(_NEXT, _CURRENT, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            if name not in self._kept:
                self._remove(name)
            raise
        if not self._kept:
            for each in _FILES:
                os.symlink(f"{_CURRENT}/{each}", each, dir_fd=self._directory)
        self._kept.append(name)
        while len(self._kept) > 2:
            self._remove(self._kept.pop(0))

    def _fill(self, name: str, contents: tuple[bytes, ...]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        for each, content in zip(_FILES, contents, strict=True):
            descriptor = os.open(f"{name}/{each}", flags, 0o600, dir_fd=self._directory)
            with open(descriptor, "wb") as file:
                file.write(content)
                os.fchown(descriptor, *self._owner)
                os.fchmod(descriptor, self._mode if each == "key.pem" else 0o444)

    def _remove(self, name: str) -> None:
        remove_directory(name, self._directory)

    def close(self) -> None:
        """Release the directory."""
        os.close(self._directory)


class Renewal:
    """Keeps the files up to date while the command runs.

    Args:
        wanted: what the host wants.
        files: where to.
        channel: what host and guest say to each other about it.
        stop: ends every wait.
        metadata: reads the metadata.
    """

    def __init__(
        self,
        wanted: wire.IdentityFiles,
        files: Files,
        channel: Channel,
        stop: Stop,
        *,
        metadata: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._wanted = wanted
        self._files = files
        self._channel = channel
        self._metadata = metadata
        self._stop = stop
        self._key = b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="identity", daemon=True)

    def begin(self, document: Mapping[str, Any]) -> None:
        """Have the files of the first certificate there.

        Args:
            document: the metadata, as the guest found them at its start.

        Raises:
            GuestError: they can't be issued.
        """
        if not self._wanted.csr:
            self._take(Said(1), document)
            return
        self._request(1)
        said = self._channel.get(self._stop)
        if said is None or said.number != 1 or not said.chain:
            raise ProtocolError("the server did not answer the request for a certificate")
        self._take(said, {})
        self._channel.answer(1)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Replace the files as the host says, in a thread, until the block ends."""
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()

    def _follow(self) -> None:
        try:
            while said := self._channel.get(self._stop, self._ended):
                self._renew(said)
        except GuestError as error:  # an answer that can't be sent: the session is at its end
            self._stop.set(error)

    def _renew(self, said: Said) -> None:
        try:
            if self._wanted.csr and not said.chain:
                self._request(said.number)
                return
            self._take(said, {} if self._wanted.csr else self._metadata())
        except (GuestError, OSError) as error:
            self._stop.check()
            self._channel.answer(said.number, error=str(error))
            return
        self._channel.answer(said.number)

    def _request(self, number: int) -> None:
        from .csr import make_request

        self._key, csr = make_request(self._wanted.names)
        self._channel.answer(number, csr=csr)

    def _take(self, said: Said, document: Mapping[str, Any]) -> None:
        if self._wanted.csr:
            key, self._key = self._key, b""
            if not key:
                raise ProtocolError("the server sent a certificate that was not requested")
            self._files.write(said.number, said.chain, key, said.trust)
            return
        try:
            block = wire.IdentityBlock.from_json(document.get("Identity"))
        except wire.WireError as error:
            raise ProtocolError(str(error)) from error
        if block.number != said.number:
            raise ProtocolError(f"the metadata have certificate {block.number} instead of {said.number}")
        self._files.write(block.number, block.cert, block.key.encode(), block.ca)


@contextmanager
def identity_files(
    wanted: wire.IdentityFiles,
    directory: str,
    owner: tuple[int, int],
    begin: Callable[[Files], Renewal],
) -> Iterator[MountPoint]:
    """Keep the files in memory until the block ends, and yield what mounts them for the command.

    Args:
        wanted: what the host wants.
        directory: an empty one that no RUN sees.
        owner: user and group of the files.
        begin: has the first certificate written.

    Raises:
        StepError: they can't be written.
        GuestError: as `Renewal.begin`.
    """
    with ExitStack() as stack:
        try:
            kernel.mount_unswapped(directory, _TMPFS)
            stack.callback(kernel.detach, directory)
            files = Files(directory, owner, wanted.mode)
            stack.callback(files.close)
            renewal = begin(files)
        except OSError as error:
            raise StepError(f"{wire.IDENTITY_DIRECTORY}: {error.strerror or error}") from error
        stack.enter_context(renewal.following())
        yield MountPoint(wire.IDENTITY_DIRECTORY, directory, read_only=True)
