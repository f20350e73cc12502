"""Looking for secrets where they must not be: in files, in archives, and in what processes show."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final

from firebuild_bootstrap.layers.compression import compression_of, decompressed
from firebuild_bootstrap.layers.reader import DamagedArchive
from firebuild_pki.conformance.spilling import encodings
from support import family

KEY: Final = "a private key"
TOKEN: Final = "a token of Vault"
# What every key of P-256 begins with, before its 32 bytes: PKCS#8 with and without the public key (RFC 5208),
# and SEC1 (RFC 5915).
_P256: Final = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
KEY_STARTS: Final = (
    b"PRIVATE KEY-----",
    _P256 + bytes.fromhex("046d306b0201010420"),
    _P256 + bytes.fromhex("042730250201010420"),
    bytes.fromhex("30770201010420"),
)
# Of OpenBao and Vault: service, batch and recovery tokens, with the prefixes of old and of now.
_TOKEN: Final = re.compile(rb"(?<![\w.])(?:hv)?s\.(?=[A-Za-z]*\d)[A-Za-z0-9]{24,}(?![\w.])")
_SQUASHFS: Final = b"hsqs"
_PIECE: Final = 4 << 20
_TICKS_NS: Final = 100_000_000
_OVERLAP: Final = 1024
"""Bytes; no secret is as long in any form."""


@dataclass(frozen=True, order=True)
class Found:
    """A secret in a place; neither says what the secret is."""

    what: str
    how: str
    where: str


@dataclass(frozen=True)
class Allowed:
    """Where a secret may be.

    Args:
        what: its name.
        path: matches the whole path.
        mode: that the file has to have; None for any.
    """

    what: str
    path: str
    mode: int | None = 0o600

    def holds(self, found: Found, path: Path, mode: int) -> bool:
        """Tell whether a find is one that may be."""
        fits = found.what == self.what and re.fullmatch(self.path, str(path)) is not None
        return fits and self.mode in (None, mode)


class Search:
    """Knows the secrets, in all forms in which they could be written.

    Args:
        secrets: by their names; each has 8 bytes at least.
    """

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        self._needles: list[tuple[str, str, bytes]] = []
        self._clean = set[bytes]()
        self._unchanged = set[tuple[str, int, int, int, int]]()
        for what, secret in (*secrets.items(), *((KEY, start) for start in KEY_STARTS)):
            forms = {secret: "as it is", secret.hex().upper().encode(): "hexadecimal digits"}
            forms |= {text.encode(): how for how, text in encodings(secret)}
            self._needles += [(what, how, form) for form, how in forms.items()]
        assert max(len(form) for _, _, form in self._needles) <= _OVERLAP

    def data(self, data: bytes, where: str) -> set[Found]:
        """Look into some bytes."""
        digest = hashlib.sha256(data).digest()
        if digest in self._clean:
            return set()
        found = {Found(what, how, where) for what, how, form in self._needles if form in data}
        if _TOKEN.search(data):
            found.add(Found(TOKEN, "as it is", where))
        if not found:
            self._clean.add(digest)
        return found

    def stream(self, file: IO[bytes], where: str) -> set[Found]:
        """Look into a file, into what it is decompressed, and into the members of an archive.

        Args:
            file: can seek.
            where: its name.
        """
        found, before = set[Found](), b""
        head = file.read(512)
        file.seek(0)
        while piece := file.read(_PIECE):
            if piece.count(0) < len(piece):
                found |= self.data(before + piece, where)
            before = piece[-_OVERLAP:]
        file.seek(0)
        with suppress(DamagedArchive, tarfile.TarError, EOFError):  # it is being written
            if head.startswith(_SQUASHFS):
                found |= self._unsquashed(file, where)
            elif head[257:262] == b"ustar":
                found |= self._members(file, where)
            elif compression_of(io.BufferedReader(io.BytesIO(head))):
                whole = decompressed(io.BufferedReader(io.BytesIO(file.read())))
                found |= self.stream(io.BytesIO(whole.read()), f"{where}, decompressed")
        return found

    def _unsquashed(self, file: IO[bytes], where: str) -> set[Found]:
        """Look into a squashfs, whose files are compressed; in an EROFS or ext4 they lie as they are."""
        with tempfile.TemporaryDirectory() as directory:
            image, tree = Path(directory, "image"), Path(directory, "tree")
            with image.open("wb") as copy:
                shutil.copyfileobj(file, copy)
            command = ["unsquashfs", "-quiet", "-no-progress", "-dest", str(tree), str(image)]
            subprocess.run(command, capture_output=True, check=False)  # one that is being written fails
            return {replace(each, where=f"{where}, in it {each.where}") for each in self.tree(tree)}

    def _members(self, file: IO[bytes], where: str) -> set[Found]:
        found = set[Found]()
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile() and (inner := archive.extractfile(member)):
                    found |= self.stream(inner, f"{where}, its member {member.name}")
        return found

    def file(self, path: Path) -> set[Found]:
        """Look into a file, its name, its extended attributes, or the text of a link."""
        found = self.data(os.fsencode(path.name), f"the name {path}")
        with suppress(OSError):  # it has gone
            about = path.lstat()
            now = (str(path), about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
            if now in self._unchanged:
                return found
            for name in os.listxattr(path, follow_symlinks=False):
                value = os.getxattr(path, name, follow_symlinks=False)
                found |= self.data(value, f"the attribute {name} of {path}")
            if path.is_symlink():
                found |= self.data(os.fsencode(path.readlink()), f"the link {path}")
            elif path.is_file():
                with open(path, "rb") as file:
                    found |= self.stream(file, str(path))
            # Two writes may have one time, which the kernel counts in ticks.
            if not found and time.time_ns() - about.st_ctime_ns > _TICKS_NS:
                self._unchanged.add(now)
        return found

    def tree(self, directory: Path, allowed: Iterable[Allowed] = ()) -> set[Found]:
        """Look into all that is in a directory, but for what may be there."""
        found = set[Found]()
        for path in walk(directory):
            with suppress(FileNotFoundError):
                mode = stat.S_IMODE(path.lstat().st_mode)
                here = self.file(path)
                found |= {each for each in here if not any(one.holds(each, path, mode) for one in allowed)}
        return found


def walk(directory: Path) -> Iterator[Path]:
    """Yield all that is below a directory, which may change meanwhile."""
    for folder, folders, names in os.walk(directory):
        for name in (*folders, *names):
            yield Path(folder, name)


@dataclass
class Watch:
    """Looks again and again at all processes that a command starts, while the block runs.

    Args:
        search: what for.
        pid: of the command.
        known: secrets that the user has put into the environment, which its children may have.
        inside: secrets that may be in the environment of processes in a sandbox.
    """

    search: Search
    pid: int
    known: frozenset[str]
    inside: frozenset[str]
    found: set[Found] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    """The processes that were looked at."""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._family = {self.pid}
        self._outside = os.readlink("/proc/self/ns/pid")
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        """Look at all of them once."""
        self._family |= family(self._family)
        for pid in self._family:
            with suppress(OSError):  # it has ended
                self._process(Path("/proc", str(pid)))
                self.seen.add(pid)

    def living(self) -> list[str]:
        """Name those that have not ended."""
        found = []
        for pid in family(self._family):
            with suppress(OSError):
                if words := Path("/proc", str(pid), "cmdline").read_bytes():  # it is no zombie
                    found.append(words.replace(b"\0", b" ").decode("utf-8", "backslashreplace"))
        return found

    def _process(self, process: Path) -> None:
        words = (process / "cmdline").read_bytes()
        name = (process / "comm").read_text().strip()
        self.found |= self.search.data(words, f"the arguments of {name}")
        sandboxed = (process / "ns/pid").readlink() != Path(self._outside)
        may = self.inside if sandboxed else self.known
        there = self.search.data((process / "environ").read_bytes(), f"the environment of {name}")
        self.found |= {each for each in there if each.what not in may}
        for number in (process / "fd").iterdir():
            link = os.readlink(number)
            if link.startswith("/") and link.endswith(" (deleted)") and not link.startswith("/memfd:"):
                with open(number, "rb") as file:
                    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        self.found |= self.search.stream(file, f"the unnamed file {link} of {name}")
