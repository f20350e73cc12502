"""Standard input as the build context or the Dockerfile: `firebuild build -`, `-f -`.

As in Docker, the content decides: a tar archive (plain, gzip, bzip2, xz or zstd) is a context,
anything else a Dockerfile with an empty one. The archive is untrusted: it is unpacked by the worker that
also unpacks bases, in a sandbox that sees nothing but the directory it fills.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import click

from firebuild_bootstrap.context.archive import is_archive
from firebuild_bootstrap.context.entries import ContextPlace
from firebuild_bootstrap.context.root import ContextRoot
from firebuild_bootstrap.dockerfile import DockerfileSource
from firebuild_bootstrap.dockerfile.syntax import MOST_TEXT
from firebuild_bootstrap.errors import InputError, Location, MachineError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.archives import decompress
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.sandbox import Host, Sandbox
from firebuild_bootstrap.sandbox.idmap import IdMode, single
from firebuild_bootstrap.values import dataclass
from firebuild_pki.display import one_line

_CONTEXT_LIMIT: Final = 16 << 30
_PIECE: Final = 1 << 20
_BLOCK: Final = 512
_POLL_SECONDS: Final = 0.2
_STDIN: Final = 0
_STDIN_NAME: Final = "-"
_DOCKERFILE: Final = "Dockerfile"
_ON_STDIN: Final = ContextPlace(" on standard input")
_NONE: Final = ContextPlace(
    ", which is empty where the Dockerfile comes from standard input",
    "`firebuild build -f - DIRECTORY` reads a Dockerfile from there for a directory",
)


@dataclass(frozen=True)
class Given:
    """What is built: as in `BuildRequest`."""

    context: Path
    dockerfile: Path
    source: DockerfileSource | None = None
    context_place: ContextPlace | None = None


@contextmanager
def given(context: str, dockerfile: str | None, home: Home) -> Iterator[Given]:
    """Read what standard input holds, if anything of the build is to come from there.

    Args:
        context: a directory, or `-`.
        dockerfile: a file, `-`, or None for `Dockerfile` in the context; with a context from standard input,
            a path in it.
        home: where an archive is unpacked; nothing of it is left behind.

    Raises:
        InputError: it holds neither an archive nor a Dockerfile, or both are asked for.
        Interrupted: `home.check` raised it.
    """
    if context != _STDIN_NAME:
        directory = Path(context)
        if dockerfile == _STDIN_NAME:
            text = b"".join(_pieces(home.check, MOST_TEXT, "the Dockerfile"))
            yield Given(directory, Path(_STDIN_NAME), _source(text))
        else:
            path = str(directory / _DOCKERFILE) if dockerfile is None else dockerfile
            yield Given(directory, Path(next(filter(os.path.lexists, _spellings(path)), path)))
        return
    if dockerfile == _STDIN_NAME:
        raise InputError(
            "the build context and the Dockerfile can't both come from standard input",
            hint="put the Dockerfile into the archive, and name it with --file, or leave --file - out",
        )
    with home.images.stage() as staging:
        unpacked = staging.path / "context"
        unpacked.mkdir(mode=0o700)
        kept = staging.path / "stdin"
        with open(kept, "wb") as file:
            file.writelines(_pieces(home.check, _CONTEXT_LIMIT, "the build context"))
        with open(kept, "rb") as file:
            archive = is_archive(file)
        if archive:
            _unpack(kept, unpacked, home)
            yield _inside(unpacked, dockerfile or _DOCKERFILE)
            return
        if dockerfile is not None:
            raise InputError(
                f"--file {dockerfile} names a file of the archive on standard input, and no archive came",
                hint="leave --file out if a Dockerfile comes",
            )
        with open(kept, "rb") as file:
            text = file.read(MOST_TEXT + 1)
        if len(text) > MOST_TEXT or b"\0" in text:  # as in a zip archive
            raise InputError(
                "standard input holds neither a tar archive nor a Dockerfile",
                hint="`tar -c . | firebuild build -` sends a build context",
            )
        yield Given(unpacked, Path(_STDIN_NAME), _source(text), _NONE)


def _spellings(path: str) -> tuple[str, ...]:
    """Return where a Dockerfile may be: BuildKit takes `dockerfile` where there is no `Dockerfile`."""
    folder, slash, name = path.rpartition("/")
    return (path, f"{folder}{slash}{name.lower()}") if name == _DOCKERFILE else (path,)


def _pieces(check: Callable[[], None], limit: int, what: str) -> Iterator[bytes]:
    """Yield what comes; a signal is noticed while nothing does."""
    size = 0
    while True:
        check()
        if not select.select([_STDIN], [], [], _POLL_SECONDS)[0]:
            continue
        try:
            piece = os.read(_STDIN, _PIECE)
        except OSError as error:
            raise InputError(f"standard input can't be read: {error.strerror}") from error
        if not piece:
            check()  # Ctrl-C also ends what would have written more
            return
        size += len(piece)
        if size > limit:
            raise InputError(
                f"{what} on standard input is larger than {limit >> 20} MiB",
                hint="unpack it, and name the directory as the build context",
            )
        yield piece


def _source(text: bytes, name: str = _STDIN_NAME) -> DockerfileSource:
    if not text:
        raise InputError("the Dockerfile is empty", hint="it begins with FROM", location=Location(name))
    return DockerfileSource.decode(name, text)


def _inside(context: Path, name: str) -> Given:
    """Read the Dockerfile of an archive, whose links must not lead to the files of this host."""
    root = ContextRoot(context)
    try:
        for spelling in _spellings(name):
            with suppress(FileNotFoundError):
                node, name = root.resolve(spelling.split("/"), lambda _: True), spelling
                break
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not stat.S_ISREG(node.status.st_mode):
            raise InputError(
                "the Dockerfile is not a regular file",
                location=Location(name),
                hint="name another file of the archive with --file",
            )
        with root.open(node.parts) as file:
            source = _source(file.read(MOST_TEXT + 1), name)
    except OSError as error:
        raise InputError(
            f"the Dockerfile can't be read: {error.strerror or 'it leads nowhere'}",
            hint="name its path in the archive on standard input with --file",
            location=Location(name),
        ) from error
    finally:
        root.close()
    dockerfile = context / node.path
    for ignore in (context / ".dockerignore", dockerfile.with_name(f"{dockerfile.name}.dockerignore")):
        if os.path.lexists(ignore) and not stat.S_ISREG(os.lstat(ignore).st_mode):
            raise InputError(
                f"{ignore.relative_to(context)} of the build context on standard input is not a regular file",
                hint="send the file itself in the archive, not a link or a device",
            )
    return Given(context, dockerfile, source, _ON_STDIN)


def _unpack(archive: Path, into: Path, home: Home) -> None:
    plain = archive.with_name("plain")
    try:
        decompress(archive, plain, limit=_CONTEXT_LIMIT, name="the build context on standard input")
        archive.unlink()
        _require_end(plain)
        # Files have to be readable by this process, which only root is where others own them; COPY has its
        # own rule for owners in any case.
        full = home.idmap.mode is IdMode.FULL
        idmap = home.idmap if full else single(Host.current(), "the context's owners do not matter")
        report = Trees(Sandbox(idmap, check=home.check)).unpack(plain, into)
    except MachineError as error:
        raise InputError(
            f"the build context on standard input can't be unpacked: {error.message}",
            hint="it has to be a tar archive, as `tar -c . | firebuild build -` makes it",
        ) from error
    plain.unlink()
    _warn(report)


def _require_end(plain: Path) -> None:
    """Refuse an archive that was cut off: its end is blocks of zeros (POSIX.1, ustar)."""
    with open(plain, "rb") as file:
        file.seek(-min(plain.stat().st_size, _BLOCK), os.SEEK_END)
        if file.read() != bytes(_BLOCK):
            why = "its end mark is missing, so it was probably cut off"
            raise InputError(
                f"the build context on standard input is damaged: {why}",
                hint="look at the program that wrote it, and send it again",
            )


def _warn(report: UnpackReport) -> None:
    lost = {
        "devices": (report.devices, "device nodes of the build context were left out"),
        "stripped": (report.stripped, "files of the build context lost their set-user-ID bits"),
    }
    for kind, (count, what) in lost.items():
        if count:
            examples = ", ".join(map(repr, report.examples.get(kind, ())))
            click.echo(f"warning: {what}: {count}, for example {one_line(examples)}", err=True)
