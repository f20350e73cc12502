"""What `--output` says, standard output and files that commands write; errors say which of them failed."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from firebuild_bootstrap.cli.docker import translated_output
from firebuild_bootstrap.errors import InputError, OutputError
from firebuild_bootstrap.terminal import json_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.image.outputs import OutputSpec
    from firebuild_bootstrap.image.store import StoredImage

_STDOUT = 1
_STDERR = 2
_CLOSED = "standard output can't be written: it is closed"


class _Guarded(io.FileIO):
    closing = False
    lost: OutputError | None = None
    """What was written here went nowhere, because the caller has closed it."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EBADF:
                self.lost = OutputError(_CLOSED)
            elif not self.closing:
                raise self.refused(error) from error
            # It is reported, or will be; the buffers above give up what they hold.
            return memoryview(data).nbytes

    def refused(self, error: OSError) -> OutputError:
        gone = isinstance(error, BrokenPipeError)
        return OutputError(f"standard output can't be written: {error.strerror}", reader_gone=gone)


class _Stdout(io.TextIOWrapper):
    """Standard output for our own code: what a provider prints in its thread goes to standard error."""

    def write(self, text: str, /) -> int:
        if _is_foreign():
            return 0 if sys.stderr is None else sys.stderr.write(text)
        return super().write(text)

    @property
    def buffer(self) -> Any:
        return sys.stderr.buffer if _is_foreign() and sys.stderr is not None else super().buffer


def _is_foreign() -> bool:
    return getattr(threading.current_thread(), "runs_foreign_code", False)


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """Let `sys.stdout` raise `OutputError` where it can't be written, and write all of it in time.

    Python alone would find out at exit, too late to handle it, and click takes a broken pipe for a
    failed command. Where the caller has closed it, all is done before that is an error.

    In the block descriptor 1 is standard error: a library of a plugin, or a program that it starts, may write
    there, and standard output may carry JSON or an image.
    """
    _open_standard_descriptors()
    out = fcntl.fcntl(_STDOUT, fcntl.F_DUPFD_CLOEXEC, _STDERR + 1)
    os.dup2(_STDERR, _STDOUT)
    raw = _Guarded(out, "wb")
    before, original = sys.stdout, sys.__stdout__
    encoding, errors = (before.encoding, before.errors) if before else ("utf-8", "surrogateescape")
    ours = _Stdout(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=raw.isatty())
    sys.stdout = ours
    sys.__stdout__ = ours  # type: ignore[misc]  # shutil asks it for the width of the terminal
    try:
        yield
        ours.flush()
        if raw.lost is not None:
            raise raw.lost
    finally:
        raw.closing = True
        sys.stdout, sys.__stdout__ = before, original  # type: ignore[misc]
        os.dup2(out, _STDOUT)
        ours.close()


class _GuardedStderr(_Guarded):
    """Says once that it can't be written: what follows has no other place to go, the error included."""

    def refused(self, error: OSError) -> OutputError:
        self.closing = True
        return OutputError(f"standard error can't be written: {error.strerror}", reader_gone=True)


def guarded_stderr() -> TextIO | None:
    """Return standard error, for what is shown beside standard output, as a stream that raises `OutputError`.

    None where the caller has closed it.
    """
    return None if sys.stderr is None else _stderr(sys.stderr.encoding, sys.stderr.errors)


@cache
def _stderr(encoding: str, errors: str | None) -> TextIO:
    # Kept: renderers hold its buffer only, which would be closed with it.
    raw = _GuardedStderr(_STDERR, "wb", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors)


def stdout_to_show() -> TextIO | None:
    """Return standard output for what is only shown while something is done.

    None where the caller has closed it, who wants to see nothing.
    """
    with suppress(io.UnsupportedOperation):  # whoever runs the command in their process has put a text there
        if fcntl.fcntl(sys.stdout.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return None
    return sys.stdout


def check_stdout(on_a_terminal: InputError) -> None:
    """Refuse to write a file to standard output where nothing is done with it.

    Args:
        on_a_terminal: the error where it is a terminal.

    Raises:
        InputError: that one.
        OutputError: the caller has closed it.
    """
    if sys.stdout.isatty():
        raise on_a_terminal
    if stdout_to_show() is None:
        raise OutputError(_CLOSED)


@contextmanager
def wanted_whole() -> Iterator[None]:
    """Tell of every failure to write standard output in the block, also that its reader has gone.

    What is cut there is of no use, and whoever reads the terminal sees only the end of the reader.
    """
    try:
        yield
    except OutputError as error:
        raise OutputError(error.message) from error


def _open_standard_descriptors() -> None:
    """Keep files that are opened later from becoming a standard stream that the caller has closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Nothing can be written to standard output then, which `stdout_to_show` finds.
            os.open(os.devnull, os.O_RDONLY if descriptor == _STDOUT else os.O_RDWR)


def read_outputs(texts: Sequence[str], *, paths: bool) -> tuple[tuple[OutputSpec, ...], OutputSpec | None]:
    """Read all `--output`, in our form or Docker's.

    Args:
        texts: as they are given.
        paths: whether a word that is not a type is the path of a directory.

    Returns:
        the outputs, and the one of them that goes to standard output.

    Raises:
        InputError: one has another form, or can't go to standard output.
        OutputError: as `check_stdout`.
    """
    from firebuild_bootstrap.image.outputs import OutputType, parse_outputs

    translated = [translated_output(text, paths=paths) for text in texts]
    specs = parse_outputs([text for text, _ in translated])
    to_stdout = [spec for spec, (_, stdout) in zip(specs, translated, strict=True) if stdout]
    for spec in to_stdout:
        if spec.type in (OutputType.DIR, OutputType.REGISTRY) or spec.dest is not None:
            raise InputError("--output: only files can go to standard output, and dest=- is their only dest")
    for spec in specs:
        kept = not spec.type.has_layers or spec.type is OutputType.REGISTRY
        if not kept and spec.dest is None and spec not in to_stdout:
            raise InputError(f"--output {spec.type.value}: it is not kept", hint="add dest=FILE, or dest=-")
    if len(to_stdout) > 1:
        raise InputError("--output: one output only can go to standard output")
    if to_stdout:
        check_stdout(
            InputError(
                "--output: an image would go to the terminal", hint="redirect standard output, or name a file"
            )
        )
    return specs, to_stdout[0] if to_stdout else None


def check_paths(specs: Sequence[OutputSpec]) -> None:
    """Refuse destinations that can't be written, before anything is done for them.

    Raises:
        InputError: it says which and why.
    """
    from firebuild_bootstrap.cli.paths import check_writable
    from firebuild_bootstrap.image.outputs import check_destinations

    for spec in specs:
        if spec.dest is not None:
            check_writable(spec.dest, "--output dest=")
    check_destinations(specs)


def send(images: Sequence[tuple[Sequence[Reference], StoredImage]], spec: OutputSpec, home: Home) -> None:
    """Write an output to standard output.

    Args:
        images: as `Outgoing.write` takes them; a single one where `spec` is a form without layers, which has
            been written.
        spec: which output.
        home: where they are.

    Raises:
        OutputError: it can't be written, or its reader has gone.
        InputError, MachineError: as `Outgoing.write`.
    """
    with wanted_whole():
        if spec.type.has_layers:
            home.outgoing.write(images, sys.stdout.buffer, spec)
        else:
            ((_, image),) = images
            with open(image.directory / spec.type.file_name, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()


def image_document(image: StoredImage, identity: str = "") -> dict[str, Any]:
    """Return the image's record, with the absolute paths of its outputs and its id, if that is known."""
    document = {**({"id": identity} if identity else {}), **image.record.as_json()}
    for output in document["outputs"]:
        output["path"] = str(image.location / output["path"])
    return document


def as_text(document: Any) -> str:
    """Return a document as the command prints it."""
    return json_text(document, indent=2) + "\n"


def print_json(document: Any) -> None:
    """Print a document on standard output, in UTF-8 whatever the locale says (RFC 8259, section 8.1)."""
    click.echo(as_text(document).encode(), nl=False)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there completely or as it was before.

    Raises:
        InputError: it can't be written.
    """
    with replaced(path) as file:
        file.write(text.encode())


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Give a file to fill, which takes the place of `path` in one step at the end of the block.

    Raises:
        InputError: it can't be written.
    """
    try:
        # Its name is short, or a long one of the file would be too long with anything added to it.
        descriptor, partial = tempfile.mkstemp(prefix=".firebuild-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from error
