"""What a build takes in from outside, as parts of its keys; no file is read that was read before.

The digest of a file's content is remembered under what stat(2) says of the file. A later write changes its
times, unless it happens within the same tick of the file system's clock as the one before; therefore nothing
is remembered of files that were changed just before they were read, as in git's index
(https://git-scm.com/docs/racy-git).

That rests on the ctime, which nobody can set, being the kernel's. On file systems that have none of their own
(squashfs, EROFS, ISO 9660, vfat, sshfs, an ext4 image made with fixed times) it is what the file was given,
and another image in the place of the first has the same device, inodes and times. They keep whole seconds, as
the kernel's clock hardly ever does: of a file with such a ctime nothing is remembered.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Final

from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.context.entries import SPECIAL, Entry, Group, attributes_of, kind_name
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    ContextRef,
    Copy,
    Download,
    Files,
    GitTree,
    Operation,
    Run,
)
from firebuild_bootstrap.image.bases import Base
from firebuild_bootstrap.image.content_store import forget_oldest, write_whole
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.lowering import Place, Sent, literal
from firebuild_bootstrap.solve.keys import Input, Parts, inputs_of

_MAGIC: Final = b"firebuild stat index 2\n"
_STATUS: Final = struct.Struct("<QQQQQL")
_DIGEST: Final = 32
_RECORD: Final = _STATUS.size + _DIGEST
_MAX_ENTRIES: Final = 500_000  # 40 MB: every build reads the whole index
_MAX_INDEXES: Final = 64
_CHUNK: Final = 1 << 20
_EMPTY: Final = hashlib.sha256().digest()
_SECOND_NS: Final = 1_000_000_000
_TICK_NS: Final = 50_000_000  # the kernel stamps files with a clock of at least a hundred ticks a second


class Inputs:
    """Reads what comes from outside; an `InputReader`.

    Args:
        bases: the images that the Dockerfile names, by their references.
        contexts: the build contexts by name.
        sent: what was fetched for COPY and ADD.
        directory: where digests of files are kept between builds.
        check: called again and again while files are read; what it raises ends that.
    """

    def __init__(
        self,
        bases: Mapping[str, Base],
        contexts: Mapping[str, BuildContext],
        sent: Sent,
        directory: Path,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self._bases = bases
        self._contexts = contexts
        self._sent = sent
        self._indexes = {name: StatIndex(directory, context.root) for name, context in contexts.items()}
        self._nothing = StatIndex(None, Path("/"))

    def save(self) -> None:
        """Keep what was learnt about files for later builds."""
        for index in self._indexes.values():
            index.save()

    def image(self, reference: str, platform: str) -> str:  # noqa: ARG002 - all are of this host's
        """Return the digest of an image."""
        return self._bases[reference].digest

    def files(self, files: Files, copy: Copy) -> Input:
        """Return what a source of a COPY matches in a build context."""
        return self._digest(files, files.pattern, copy)

    def bound(self, mount: BindMount) -> Input:
        """Return what a RUN sees of a build context."""
        return self._digest(Files(literal(mount.source), mount.tree), mount.source)

    def download(self, download: Download, place: Place) -> str:
        """Return the digest of what was downloaded for a step."""
        # Also of an archive that is unpacked: what it holds does not tell all of its bytes.
        return " ".join(group.digest for group in self._fetched(download, place))

    def commit(self, tree: GitTree, place: Place) -> str:
        """Return the digest of what was fetched for a step: with its files it is as good as the commit's."""
        groups = self._fetched(tree, place)
        entries: Iterable[Entry] = chain.from_iterable(group.entries() for group in groups)
        if tree.keep_git_dir:
            entries = (entry for entry in entries if _is_of_commit(entry.path))
        return digest_of(entries, self._nothing, check=self._check).digest

    def _fetched(self, source: Download | GitTree, place: Place) -> Iterator[Group]:
        """Yield what a step has of a source; another one may have left something out, or come later."""
        return (group for group in self._sent[place].groups if group.source == source)

    def unchanged(self, operation: Operation, parts: Parts) -> bool:
        """Tell whether the files that an operation took are still those that its key was made of."""
        match operation:
            case Copy(sources=sources):
                taken = [each for each in sources if isinstance(each, Files)]
                now = {self.files(each, operation).digest for each in taken if _of_context(each)}
            case Run():
                bound = [each for each in inputs_of(operation) if isinstance(each, BindMount)]
                now = {self.bound(each).digest for each in bound if _of_context(each)}
            case _:
                return True
        return now <= {each.digest for each in parts.inputs}

    def _digest(self, files: Files, name: str, copy: Copy | None = None) -> Input:
        context = files.tree.name if isinstance(files.tree, ContextRef) else ""
        resource = self._contexts[context].resource(
            (files,),
            exclude=copy.exclude if copy is not None else (),
            parents=copy.parents if copy is not None else False,
            check=False,
        )
        return digest_of(resource.entries(), self._indexes[context], name, check=self._check)


def takes_files(operation: Operation) -> bool:
    """Whether an operation takes files of a build context, which may change while it is executed."""
    match operation:
        case Copy(sources=sources):
            return any(isinstance(each, Files) and _of_context(each) for each in sources)
        case Run():
            return any(isinstance(each, BindMount) and _of_context(each) for each in inputs_of(operation))
    return False


def _is_of_commit(path: str) -> bool:
    """Whether a file tells of a commit. Of `.git` only HEAD does: the index has times and inodes."""
    return ".git" not in path.split("/")[:-1] or path.endswith(".git/HEAD")


def _of_context(taken: Files | BindMount) -> bool:
    return isinstance(taken.tree, ContextRef)


# --- digests of files -----------------------------------------------------------------------------


class StatIndex:
    """Digests of the files in one directory tree, kept between builds.

    Several builds may use it at once: each writes all that it knows, and the last one's is kept. A damaged
    file of it counts as none.

    Args:
        directory: where indexes are kept; None keeps nothing.
        root: the tree.
        clock_ns: nanoseconds since 1970.
    """

    def __init__(
        self, directory: Path | None, root: Path, *, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
        self._path = directory / name if directory is not None else None
        self._clock_ns = clock_ns
        self._known = self._load()
        self._used: dict[bytes, bytes] = {}
        self._changed = False

    def digest(
        self,
        status: os.stat_result,
        opened: Callable[[], int],
        check: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Return the SHA-256 of a regular file's content and extended attributes; it is read if need be.

        Args:
            status: of the file, as it was found.
            opened: opens it for reading and returns the descriptor.
            check: called at each piece that is read; what it raises ends that.
        """
        key = _packed(status)
        digest = self._known.get(key) if _is_telling(status) else None
        if digest is None:
            began = self._clock_ns()
            descriptor = opened()
            try:
                key = _packed(before := os.fstat(descriptor))
                digest = _with(attributes_of(descriptor), _content(descriptor, check))
                settled = _packed(os.fstat(descriptor)) == key and not _racy(before, began)
            finally:
                os.close(descriptor)
            if not settled:
                return digest
            self._known[key] = digest
            self._changed = True
        self._used[key] = digest
        return digest

    def save(self) -> None:
        """Keep what was learnt; a disk that is full or read-only keeps nothing."""
        if self._path is None or not self._changed:
            return
        kept = {**self._used, **{key: value for key, value in self._known.items() if key not in self._used}}
        # What no build has asked for in a while is at the end: files that are gone, most likely.
        limit = min(max(2 * len(self._used), 50_000), _MAX_ENTRIES)
        content = _MAGIC + b"".join(key + value for key, value in list(kept.items())[:limit])
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path, content + hashlib.sha256(content).digest())
            self._changed = False
            forget_oldest(self._path.parent, _MAX_INDEXES)

    def _load(self) -> dict[bytes, bytes]:
        if self._path is None:
            return {}
        try:
            data = self._path.read_bytes()
        except OSError:
            return {}
        content, checksum = data[:-_DIGEST], data[-_DIGEST:]
        whole = content.startswith(_MAGIC) and hashlib.sha256(content).digest() == checksum
        if not whole or (len(content) - len(_MAGIC)) % _RECORD:
            return {}
        with suppress(OSError):
            os.utime(self._path)  # `forget_oldest` goes by it
        records = range(len(_MAGIC), len(content), _RECORD)
        split = _STATUS.size
        return {content[at : at + split]: content[at + split : at + _RECORD] for at in records}


def digest_of(
    entries: Iterable[Entry], index: StatIndex, name: str = "", *, check: Callable[[], None] = lambda: None
) -> Input:
    """Return the digest of what a COPY sends, of which `name` is what to call it; `check` may end that.

    What counts of each entry: its path, whether it is a file of its own or part of a directory, type, mode,
    link text, owner if it brings one, number of a device, extended attributes, and content. Times do not, nor
    the order in which a directory has them.

    Raises:
        InputError: a file can't be read.
    """
    whole = hashlib.sha256()
    files: list[tuple[str, bytes]] = []
    for entry in entries:
        check()
        content = _EMPTY
        if entry.kind == tar.FILE:
            content = _of_file(entry, index, check)
        if entry.attributes is not None:
            content = _with(entry.attributes, content)
        owner = "" if entry.owner is None else f"{entry.owner[0]}:{entry.owner[1]}"
        # No member holds a NUL, and their number is always the same.
        kind = f"{kind_name(entry.kind)}\0{entry.from_directory:d}\0{entry.mode:o}\0{owner}"
        text = f"{entry.path}\0{kind}\0{entry.link_target}\0"
        if entry.kind in SPECIAL:
            text += "{}:{}\0".format(*entry.device)
        line = hashlib.sha256(text.encode() + content).digest()
        whole.update(line)
        files.append((entry.path, line))
    return Input(whole.hexdigest(), name, files=tuple(files))


def _of_file(entry: Entry, index: StatIndex, check: Callable[[], None]) -> bytes:
    if entry.file is not None:
        return index.digest(entry.file.status, entry.file.descriptor, check)
    assert entry.open is not None, "every regular file has a content"  # noqa: S101
    content = hashlib.sha256()
    with entry.open() as file:
        while piece := file.read(_CHUNK):
            check()
            content.update(piece)
    return content.digest()


def _with(attributes: Mapping[str, bytes], content: bytes) -> bytes:
    if not attributes:
        return content
    pieces = [content]
    for name, value in sorted(attributes.items()):
        pieces += [os.fsencode(name), b"\0", len(value).to_bytes(8, "big"), value]
    return hashlib.sha256(b"".join(pieces)).digest()


def _content(descriptor: int, check: Callable[[], None]) -> bytes:
    content = hashlib.sha256()
    while piece := os.read(descriptor, _CHUNK):
        check()
        content.update(piece)
    return content.digest()


def _packed(status: os.stat_result) -> bytes:
    # Masked: times before 1970 are negative, and those after 2554 have more than 64 bits.
    return _STATUS.pack(
        status.st_ino,
        status.st_dev,
        status.st_size,
        status.st_mtime_ns & 0xFFFF_FFFF_FFFF_FFFF,
        status.st_ctime_ns & 0xFFFF_FFFF_FFFF_FFFF,
        status.st_mode,
    )


def _is_telling(status: os.stat_result) -> bool:
    """Whether a file's ctime is that of its last change, and so another one after each change."""
    return status.st_ctime_ns % _SECOND_NS != 0


def _racy(status: os.stat_result, began: int) -> bool:
    """Whether a change after the reading that began then could leave a file with the same times."""
    return not _is_telling(status) or max(status.st_mtime_ns, status.st_ctime_ns) >= began - _TICK_NS
