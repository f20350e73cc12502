"""Writing certificates and keys: all of them or none, and never over something by accident."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from firebuild_bootstrap.errors import InputError


@dataclass(frozen=True, slots=True)
class PemFile:
    """A file to write, with its permissions."""

    name: str
    content: bytes = field(repr=False)
    mode: int


def refuse_existing(directory: Path, names: Iterable[str]) -> None:
    """Raise `InputError` if a file of these names exists."""
    found = [name for name in names if os.path.lexists(directory / name)]
    if found:
        verb = "exists" if len(found) == 1 else "exist"
        hint = "--force replaces; or choose another --out"
        raise InputError(f"{directory}: {', '.join(found)} {verb} already", hint=hint)


def write_files(directory: Path, files: Sequence[PemFile], *, replace: bool) -> None:
    """Write all files, or none.

    The directory is made with mode 0700 if it is missing. Each file gets its name only when all of
    them are complete on the disk.

    Args:
        directory: where to.
        files: what to write.
        replace: whether to replace files that exist.

    Raises:
        InputError: a file exists, or the directory cannot be written.
    """
    try:
        with _directory(directory), ExitStack() as staged:
            drafts = [(staged.enter_context(_draft(directory, one)), directory / one.name) for one in files]
            _publish(drafts, replace=replace)
    except FileExistsError as error:
        raise InputError(f"{error.filename2} exists already", hint="--force replaces") from error
    except OSError as error:
        raise InputError(f"{error.filename or directory} can't be written: {error.strerror}") from error


@contextmanager
def _directory(directory: Path) -> Iterator[None]:
    made = not directory.is_dir()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"expected a directory, but {error.filename} is none") from error
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                directory.rmdir()
        raise


@contextmanager
def _draft(directory: Path, file: PemFile) -> Iterator[Path]:
    path = directory / f".{file.name}.{secrets.token_hex(4)}"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode), "wb") as stream:
            os.fchmod(stream.fileno(), file.mode)
            stream.write(file.content)
            stream.flush()
            os.fsync(stream.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _publish(drafts: Sequence[tuple[Path, Path]], *, replace: bool) -> None:
    published: list[Path] = []
    try:
        for draft, path in drafts:
            if replace:
                os.replace(draft, path)
            else:
                os.link(draft, path)  # unlike a rename, fails if somebody was faster
                published.append(path)
    except BaseException:
        for path in published:
            path.unlink(missing_ok=True)
        raise
