"""Blobs of images by digest, as registries and archives hand them out: layers, configurations, manifests.

    <home>/blobs/sha256/<hex>       a blob, whole and verified; its readers hold a shared lock on it
    <home>/blobs/partial/<...>      one that is being written, under a lock; stays after a cut, to be resumed
    <home>/blobs/made/<hex>         which blob is the layer of that diff id, compressed here
    <home>/blobs/lock               held by a sweep, and by whoever makes a blob of what is written

A blob appears by a rename, once its length and its digest are right. So whoever is killed leaves a part that
the next writer goes on with, or that `sweep` removes. What is held or named by an image is never swept.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.content_store import (
    SPACE,
    allow_open_files,
    lock_file,
    place_of,
    sync,
    try_lock,
    unusable_store,
    write_whole,
)
from firebuild_bootstrap.layers.tar import write_all
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

DIGEST: Final = re.compile("sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
"""Those that can be verified (image-spec, descriptor.md, "Registered algorithms")."""
NOT_AS_ANNOUNCED: Final = "the sender is broken or hostile; nothing of it was kept"
_ALGORITHMS: Final = ("sha256", "sha512")
_PIECE: Final = 1024 * 1024
_PAUSE: Final = 0.05
_PARTIAL: Final = "partial"
_MADE: Final = "made"
_FORGOTTEN: Final = 7 * 24 * 3600.0  # seconds after which nobody resumes a cut download


class BlobError(InputError):
    """What was received is not the blob that was announced."""


class Described(Protocol):
    """What a writer has to know of a blob; `oci.Descriptor` is one."""

    @property
    def digest(self) -> str:
        """`sha256:…` or `sha512:…`."""
        ...

    @property
    def size(self) -> int:
        """Its length in bytes."""
        ...


class BlobWriter:
    """Takes the bytes of one blob, see `BlobStore.writer`.

    Args:
        blob: what it has to be in the end.
        part: its open part, whose lock the caller holds; -1 where the blob is there already.
        publish: makes a blob of the part, and returns its path.
        root: of the store.
    """

    def __init__(self, blob: Described, part: int, publish: Callable[[], Path], root: Path) -> None:
        self._blob = blob
        self._root = root
        self._part = part
        self._publish = publish
        self._algorithm = blob.digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self.offset = blob.size if part < 0 else self._resume()
        """Bytes that are there: what is written next belongs there."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be written."""
        return self.offset == self._blob.size

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes.

        Raises:
            BlobError: they are more than the blob has; nothing of it is kept.
            InputError, MachineError: the store can't be written.
        """
        rest = memoryview(data)
        if self.offset + len(rest) > self._blob.size:
            self.restart()
            raise BlobError(
                f"{self._blob.digest} is longer than {counted(self._blob.size, 'byte')}, as was announced",
                hint=NOT_AS_ANNOUNCED,
            )
        self._hash.update(rest)
        self.offset += len(rest)
        with _storing(self._root):
            write_all(self._part, rest)

    def restart(self) -> None:
        """Forget what is there: the source can't begin in the middle, or it was wrong."""
        if self._part >= 0:
            with _storing(self._root):
                os.ftruncate(self._part, 0)
                os.lseek(self._part, 0, os.SEEK_SET)
            self._hash = hashlib.new(self._algorithm)
            self.offset = 0

    def commit(self) -> Path:
        """Make it a blob of the store, held as by `BlobStore.hold`, and return its path.

        Raises:
            BlobError: its length or digest is not what was announced. A part that is only too short stays.
            InputError, MachineError: the store can't be written.
        """
        if not self.complete:
            raise BlobError(
                f"{self._blob.digest} has {counted(self.offset, 'byte')}, "
                f"and {self._blob.size} were announced",
                hint="it was cut off: try again",
            )
        if self._part >= 0 and (found := self._digest()) != self._blob.digest:
            self.restart()
            raise BlobError(
                f"expected a blob with the digest {self._blob.digest}, received one with {found}",
                hint=NOT_AS_ANNOUNCED,
            )
        with _storing(self._root):
            return self._publish()

    def _digest(self) -> str:
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def _resume(self) -> int:
        """Read what there is; what can't be the beginning of the blob is thrown away."""
        size = os.fstat(self._part).st_size
        if size <= self._blob.size:
            while piece := os.read(self._part, _PIECE):
                self._hash.update(piece)
            if size < self._blob.size or self._digest() == self._blob.digest:
                return size
        self.restart()
        return 0


class BlobStore:
    """Blobs by digest, below `home`/blobs; several processes share them.

    Args:
        home: the directory of the store; it need not exist yet.
        named: returns the digests of the blobs that images need.
        check: called again and again while another process is waited for; may raise.
    """

    def __init__(
        self,
        home: Path,
        *,
        named: Callable[[], frozenset[str]] = frozenset,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = home / "blobs"
        self._named = named
        self._check = check
        self._held: dict[str, int] = {}

    def close(self) -> None:
        """Let go of all blobs that are held."""
        while self._held:
            os.close(self._held.popitem()[1])

    def path(self, digest: str) -> Path:
        """Return where a blob is or would be; nobody holds it for that.

        Raises:
            InputError: `digest` is none that can be verified.
        """
        if DIGEST.fullmatch(digest) is None:
            raise InputError(
                f"expected a digest such as sha256:…, found {digest!r:.200}",
                hint="sha256 and sha512 can be verified, with lower-case digits",
            )
        algorithm, _, digits = digest.partition(":")
        return self.root / algorithm / digits

    def hold(self, digest: str) -> Path | None:
        """Return the path of a blob that is there; it stays until `close`, whoever sweeps.

        Raises:
            InputError: as `path`, or it may not be read.
            MachineError: it can't be read.
        """
        path = self.path(digest)
        if digest in self._held:
            return path
        allow_open_files(2 * len(self._held))
        with _storing(self.root):
            descriptor = _opened(path, os.O_RDONLY)
            if descriptor is None:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # a sweep has it for a moment at most
            if not _is_at(descriptor, path):  # and has removed it
                os.close(descriptor)
                return None
            self._held[digest] = descriptor
            return path

    def required(self, digest: str) -> Path:
        """Return the path of a blob as `hold` does.

        Raises:
            MachineError: it is not there.
        """
        path = self.hold(digest)
        if path is None:
            raise MachineError(
                f"{self.path(digest)}: the blob is not there, and an image needs it",
                hint="pull or load the image again",
            )
        return path

    def read(self, digest: str, most: int) -> bytes:
        """Return the content of a small blob, which is held.

        Raises:
            MachineError: it is not there, or its bytes are not those of its digest.
            InputError: it has more than `most` bytes.
        """
        path = self.required(digest)
        with _storing(self.root), open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise InputError(f"{digest} has more than the {counted(most, 'byte')} that are allowed")
        if digest_of(data, digest.partition(":")[0]) != digest:
            raise MachineError(
                f"{path} was modified after it was stored", hint="remove it and load the image again"
            )
        return data

    @contextmanager
    def writer(self, blob: Described) -> Iterator[BlobWriter]:
        """Write a blob. Another process that writes the same is waited for.

        A block that raises, or does not commit, keeps what was written, and the next writer begins there: see
        `BlobWriter.offset`. Where the blob is there already, that is its whole length.

        Raises:
            InputError: the digest is malformed, or nobody may write in the store.
            MachineError: the store can't be written.
        """
        target = self.path(blob.digest)
        if self.hold(blob.digest) is not None:
            yield BlobWriter(blob, -1, lambda: target, self.root)
            return
        path = self._part(blob.digest)
        descriptor = self._locked_part(path)
        try:
            if self.hold(blob.digest) is not None:  # whoever was waited for has made it
                os.unlink(path)
                yield BlobWriter(blob, -1, lambda: target, self.root)
                return
            writer = BlobWriter(
                blob, descriptor, lambda: self._publish(blob.digest, descriptor, path), self.root
            )
            yield writer
        finally:
            with suppress(OSError):
                if _is_at(descriptor, path) and not os.fstat(descriptor).st_size:
                    os.unlink(path)
            os.close(descriptor)

    def make_room(self, blobs: Sequence[Described]) -> None:
        """See to it that so many blobs can be held, and that there is room for what is missing of them.

        Raises:
            MachineError: the disk has less free space, or this process may not open so many files.
        """
        allow_open_files(2 * len(blobs))
        missing = sum(self._missing(blob) for blob in {blob.digest: blob for blob in blobs}.values())
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        disk = os.statvfs(there)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and missing > free:  # some file systems do not say what they have
            raise MachineError(
                f"the layers that are missing have {missing:,} bytes, "
                f"and the disk of {there} has {free:,} free",
                hint=SPACE,
            )

    def _missing(self, blob: Described) -> int:
        for path in (self.path(blob.digest), self._part(blob.digest)):
            with suppress(FileNotFoundError):
                return max(blob.size - path.stat().st_size, 0)
        return blob.size

    def _part(self, digest: str) -> Path:
        return self.root / _PARTIAL / digest.replace(":", "-")

    def add(self, data: bytes) -> str:
        """Keep a small blob, which is held, and return its digest.

        Raises:
            InputError, MachineError: as `writer`.
        """
        blob = _Small(digest_of(data), len(data))
        with self.writer(blob) as writer:
            writer.write(data[writer.offset :])
            writer.commit()
        return blob.digest

    @contextmanager
    def making(self) -> Iterator[Path]:
        """Give an empty file to fill, on the file system of the store; removed unless it is adopted.

        Raises:
            InputError, MachineError: as `writer`.
        """
        path = self.root / _PARTIAL / f"new-{secrets.token_hex(8)}"
        with _storing(self.root):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(0o600, exist_ok=False)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def adopt(self, path: Path, digest: str) -> Path:
        """Make a blob of a file of `making`, whose digest whoever wrote it has computed.

        Returns:
            its path; it is held.

        Raises:
            InputError, MachineError: as `writer`.
        """
        if (there := self.hold(digest)) is not None:
            return there
        with _storing(self.root):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                return self._publish(digest, descriptor, path)
            finally:
                os.close(descriptor)

    def made_of(self, diff_id: str, form: str) -> tuple[str, int] | None:
        """Return digest and size of the blob that `note_made` was told of, which is held; None for none."""
        made = self._noted(f"{self.path(diff_id).name}.{form}")
        return made if made is not None and self.hold(made[0]) is not None else None

    def _noted(self, name: str) -> tuple[str, int] | None:
        try:
            digest, size = (self.root / _MADE / name).read_text("ascii").split()
            return (digest, int(size)) if self.path(digest).exists() else None
        except (FileNotFoundError, IsADirectoryError, ValueError, InputError):
            return None  # a loss of power has spoiled it, or it never was there

    def note_made(self, diff_id: str, form: str, digest: str, size: int) -> None:
        """Remember which blob is the layer of a diff id in a form; that of the last call counts.

        Args:
            diff_id: of the layer.
            form: how it is compressed, as a part of a file name.
            digest: of the blob.
            size: its bytes.
        """
        with _storing(self.root):
            (self.root / _MADE).mkdir(mode=0o700, exist_ok=True)
            note = self.root / _MADE / f"{self.path(diff_id).name}.{form}"
            write_whole(note, f"{digest} {size}".encode())

    def digests(self) -> list[str]:
        """Return the digests of all blobs, sorted."""
        found = (f"{kind}:{digits}" for kind in _ALGORITHMS for digits in _names(self.root / kind))
        return sorted(filter(DIGEST.fullmatch, found))

    def sweep(self) -> int:
        """Remove blobs that no image names and nobody holds, and parts that nobody has resumed for a week.

        Returns:
            the bytes that this frees.

        Raises:
            InputError, MachineError: the store can't be written.
        """
        if not self.root.is_dir():
            return 0
        with _storing(self.root), lock_file(self.root / "lock"), ExitStack() as cleanup:
            freed = self._sweep_blobs(cleanup) + self._sweep_parts(cleanup)
            for name in _names(self.root / _MADE):
                if self._noted(name) is None:
                    (self.root / _MADE / name).unlink()
        return freed

    def _sweep_blobs(self, cleanup: ExitStack) -> int:
        locked: dict[str, int] = {}
        for digest in self.digests():
            if (descriptor := _locked(self.path(digest), cleanup)) is not None:
                locked[digest] = descriptor
        # An image names its blobs before those who made it let go of them: what nobody holds is named by now,
        # if at all.
        unnamed = locked.keys() - self._named()
        for digest in unnamed:
            self.path(digest).unlink()
        return sum(os.fstat(locked[digest]).st_size for digest in unnamed)

    def _sweep_parts(self, cleanup: ExitStack) -> int:
        freed = 0
        for name in _names(self.root / _PARTIAL):
            path = self.root / _PARTIAL / name
            descriptor = _locked(path, cleanup)
            if descriptor is not None and os.fstat(descriptor).st_mtime < time.time() - _FORGOTTEN:
                freed += os.fstat(descriptor).st_size
                path.unlink()
        return freed

    def _locked_part(self, path: Path) -> int:
        """Return the open part at `path`, with its lock, once nobody else has it."""
        with _storing(self.root):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            with _storing(self.root):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                while not (locked := try_lock(descriptor)) and _is_at(descriptor, path):
                    self._check()
                    time.sleep(_PAUSE)
                if locked and _is_at(descriptor, path):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # whoever was waited for has made a blob of it, or removed it

    def _publish(self, digest: str, descriptor: int, part: Path) -> Path:
        target = self.path(digest)
        os.fsync(descriptor)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with lock_file(self.root / "lock", fcntl.LOCK_SH):
            os.rename(part, target)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._held[digest] = os.dup(descriptor)  # which shares the lock
        sync(target.parent)
        return target


@dataclass(frozen=True)
class _Small:
    digest: str
    size: int


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of some bytes, `sha256:…`."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@contextmanager
def _storing(root: Path) -> Iterator[None]:
    """Tell errors of the store from those of a source of data, which may be OSError as well."""
    try:
        yield
    except OSError as error:
        raise unusable_store(f"{place_of(error, root)}: the store can't be used", error) from error


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _opened(path: Path, flags: int) -> int | None:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _locked(path: Path, cleanup: ExitStack) -> int | None:
    """Return the open file at `path` with an exclusive lock; None where it is gone, or somebody holds it."""
    descriptor = _opened(path, os.O_RDONLY)
    if descriptor is None:
        return None
    cleanup.callback(os.close, descriptor)
    return descriptor if try_lock(descriptor) else None
