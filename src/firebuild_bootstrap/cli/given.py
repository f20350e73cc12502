"""What is built: a directory, or what standard input (`-`), a repository or a URL holds, and its Dockerfile.

As in Docker, the content of standard input or of a URL decides: a tar archive (plain, gzip, bzip2, xz or
zstd) is a context, anything else a Dockerfile with an empty one. An archive is untrusted: it is unpacked by
the worker that also unpacks bases, in a sandbox that sees nothing but the directory it fills.
https://docs.docker.com/build/concepts/context/
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from firebuild_bootstrap.context.archive import is_archive
from firebuild_bootstrap.context.build_context import fetch_repository
from firebuild_bootstrap.context.entries import ContextPlace, FetchLimits
from firebuild_bootstrap.context.root import ContextRoot
from firebuild_bootstrap.dockerfile import DockerfileSource
from firebuild_bootstrap.dockerfile.graph import Download, GitTree
from firebuild_bootstrap.dockerfile.operations import file_name, read_git, redacted, scheme
from firebuild_bootstrap.dockerfile.syntax import MOST_TEXT
from firebuild_bootstrap.errors import InputError, Location, MachineError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.archives import decompress
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader
from firebuild_bootstrap.polling import readable
from firebuild_bootstrap.request import RemoteContext
from firebuild_bootstrap.sandbox import Host, Sandbox
from firebuild_bootstrap.sandbox.idmap import IdMode, single
from firebuild_pki.display import one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.sshagent import SshAgent

_CONTEXT_LIMIT: Final = 16 << 30
_PIECE: Final = 1 << 20
_BLOCK: Final = 512
_POLL_SECONDS: Final = 0.2
_STDIN: Final = 0
_STDIN_NAME: Final = "-"
_DOCKERFILE: Final = "Dockerfile"


@dataclass(frozen=True)
class Given:
    """What is built: as in `BuildRequest`."""

    context: Path
    dockerfile: Path
    source: DockerfileSource | None = None
    context_place: ContextPlace | None = None
    remote: RemoteContext | None = None


@dataclass(frozen=True)
class _Origin:
    """Where a context comes from that is no directory of its user's.

    Args:
        name: for messages.
        on: what comes before it behind what it holds.
    """

    name: str
    on: str = ""

    @property
    def of(self) -> str:
        return f" {self.on}{self.name}"

    @property
    def place(self) -> ContextPlace:
        return ContextPlace(self.of)

    @property
    def nowhere(self) -> ContextPlace:
        return ContextPlace(
            f", which is empty where the Dockerfile comes from {self.name}",
            "`firebuild build -f - DIRECTORY` reads a Dockerfile from standard input for a directory",
        )


_ON_STDIN: Final = _Origin("standard input", "on ")


@contextmanager
def given(
    context: str,
    dockerfile: str | None,
    home: Home,
    *,
    agent: SshAgent | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Given]:
    """Read what standard input holds, or fetch it, if anything of the build is to come from there.

    Args:
        context: a directory, `-`, or what Docker takes for a remote context: a git repository, or the URL of
            an archive or a Dockerfile.
        dockerfile: a file, `-`, or None for `Dockerfile` in the context; with a context that is no directory,
            `-`, or a path in it.
        home: where what came is kept meanwhile; nothing of it is left behind.
        agent: the SSH agent of git; that of the environment by default.
        say: told what is fetched.

    Raises:
        InputError: it can't be fetched, holds neither an archive nor a Dockerfile, or both are asked for.
        Interrupted: `home.check` raised it.
    """
    remote = None if context == _STDIN_NAME else _remote(context)
    if context != _STDIN_NAME and remote is None:
        yield _of_directory(Path(context), dockerfile, home)
        return
    if context == dockerfile == _STDIN_NAME:
        raise InputError(
            "the build context and the Dockerfile can't both come from standard input",
            hint="put the Dockerfile into the archive, and name it with --file, or leave --file - out",
        )
    with home.images.stage() as staging:
        if remote is None:
            kept = staging.path / "stdin"
            with open(kept, "wb") as received:
                received.writelines(_pieces(home.check, _CONTEXT_LIMIT, "the build context"))
            yield _received(kept, dockerfile, home, _ON_STDIN)
            return
        origin = _Origin(redacted(remote.url))
        say(f"fetching {origin.name}")
        if isinstance(remote, GitTree):
            cloned = fetch_repository(remote, None, staging.path, home.tasks, agent=agent, check=home.check)
            found, digest = _inside(cloned.path, dockerfile, home, origin), cloned.commit
        else:
            from firebuild_bootstrap.context.downloads import download  # few builds have one

            limits = FetchLimits()
            file = download(
                remote.url, staging.path, checksum="", location=None, limits=limits, check=home.check
            )
            found, digest = _received(file.path, dockerfile, home, origin), file.digest
        yield replace(found, remote=RemoteContext(remote, digest))


def _remote(context: str) -> GitTree | Download | None:
    """Read what Docker takes for a remote context; None for what is a directory, or has to be one."""
    if os.path.exists(context):
        return None
    text = context
    if context.startswith("github.com/"):  # as people copy it out of their browsers
        path, number, fragment = context.partition("#")
        text = f"https://{path.rstrip('/').removesuffix('.git')}.git{number}{fragment}"
    try:
        repository = read_git(text)
    except ValueError as error:
        raise InputError(f"{one_line(redacted(text))}: {error}") from error
    if repository is None and scheme(text) in ("http", "https"):
        return Download(text)
    return repository


def _of_directory(directory: Path, dockerfile: str | None, home: Home) -> Given:
    if dockerfile == _STDIN_NAME:
        return Given(directory, Path(_STDIN_NAME), _piped(home))
    if dockerfile is not None and scheme(dockerfile) in ("http", "https"):
        raise InputError(
            f"--file {one_line(redacted(dockerfile))} is a URL, and has to be a file",
            hint="`curl -sf URL | firebuild build -f - DIRECTORY` builds with a Dockerfile from elsewhere",
        )
    path = str(directory / _DOCKERFILE) if dockerfile is None else dockerfile
    found = next(filter(os.path.lexists, _spellings(path)), "")
    if dockerfile and not found and os.path.isfile(directory / dockerfile):  # where buildah looks, too
        raise InputError(
            f"the Dockerfile can't be read: {os.strerror(errno.ENOENT)}",
            hint=f"--file is relative to the current directory: --file {directory / dockerfile}",
            location=Location(dockerfile),
        )
    return Given(directory, Path(found or path))


def _received(kept: Path, dockerfile: str | None, home: Home, origin: _Origin) -> Given:
    """Read what came: an archive is a context, anything else a Dockerfile with an empty one."""
    unpacked = kept.with_name("context")
    unpacked.mkdir(mode=0o700)
    with open(kept, "rb") as file:
        archive = is_archive(file)
    if archive:
        _unpack(kept, unpacked, home, origin)
        return _inside(unpacked, dockerfile, home, origin)
    if dockerfile is not None:
        raise InputError(
            f"--file {dockerfile} names a file of the archive{origin.of}, and no archive came",
            hint="leave --file out if a Dockerfile comes",
        )
    with open(kept, "rb") as file:
        text = file.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT or b"\0" in text:  # as in a zip archive
        raise InputError(
            f"{origin.name} holds neither a tar archive nor a Dockerfile",
            hint="`tar -c . | firebuild build -` sends a build context",
        )
    name = _STDIN_NAME if origin is _ON_STDIN else file_name(origin.name) or _DOCKERFILE
    return Given(unpacked, Path(_STDIN_NAME), _source(text, name), origin.nowhere)


def _spellings(path: str) -> tuple[str, ...]:
    """Return where a Dockerfile may be: BuildKit takes `dockerfile` where there is no `Dockerfile`."""
    folder, slash, name = path.rpartition("/")
    return (path, f"{folder}{slash}{name.lower()}") if name == _DOCKERFILE else (path,)


def _pieces(check: Callable[[], None], limit: int, what: str) -> Iterator[bytes]:
    """Yield what comes; a signal is noticed while nothing does."""
    size = 0
    while True:
        check()
        if not readable(_STDIN, seconds=_POLL_SECONDS):
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


def _piped(home: Home) -> DockerfileSource:
    return _source(b"".join(_pieces(home.check, MOST_TEXT, "the Dockerfile")))


def _inside(context: Path, dockerfile: str | None, home: Home, origin: _Origin) -> Given:
    """Read the Dockerfile for a context from elsewhere, whose links must not lead to files of this host."""
    ignores = [context / ".dockerignore"]
    if dockerfile == _STDIN_NAME:
        path, source = Path(_STDIN_NAME), _piped(home)
    else:
        path, source = _read_inside(context, dockerfile or _DOCKERFILE, origin)
        ignores.append(path.with_name(f"{path.name}.dockerignore"))
    for ignore in ignores:
        if os.path.lexists(ignore) and not stat.S_ISREG(os.lstat(ignore).st_mode):
            raise InputError(
                f"{ignore.relative_to(context)} of the build context{origin.of} is not a regular file",
                hint="send the file itself in the archive, not a link or a device",
            )
    return Given(context, path, source, origin.place)


def _read_inside(context: Path, name: str, origin: _Origin) -> tuple[Path, DockerfileSource]:
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
                hint=f"name another file of the build context{origin.of} with --file",
            )
        with root.open(node.parts) as file:
            source = _source(file.read(MOST_TEXT + 1), name)
    except OSError as error:
        raise InputError(
            f"the Dockerfile can't be read: {error.strerror or 'it leads nowhere'}",
            hint=f"name its path in the build context{origin.of} with --file",
            location=Location(name),
        ) from error
    finally:
        root.close()
    return context / node.path, source


def _unpack(archive: Path, into: Path, home: Home, origin: _Origin) -> None:
    plain = archive.with_name("plain")
    try:
        decompress(archive, plain, limit=_CONTEXT_LIMIT, name=f"the build context{origin.of}")
        archive.unlink()
        _require_end(plain, origin)
        # Files have to be readable by this process, which only root is where others own them; COPY has its
        # own rule for owners in any case.
        full = home.idmap.mode is IdMode.FULL
        idmap = home.idmap if full else single(Host.current(), "the context's owners do not matter")
        report = Trees(Sandbox(idmap, check=home.check)).unpack(plain, into)
    except MachineError as error:
        raise InputError(
            f"the build context{origin.of} can't be unpacked: {error.message}",
            hint="it has to be a tar archive, as `tar -c . | firebuild build -` makes it",
        ) from error
    plain.unlink()
    _warn(report)


def _require_end(plain: Path, origin: _Origin) -> None:
    """Refuse an archive that was cut off: at its end are blocks of zeros (POSIX.1, ustar)."""
    with open(plain, "rb", buffering=0) as file:
        file.seek(-min(plain.stat().st_size, _BLOCK), os.SEEK_END)
        if file.read() != bytes(_BLOCK) and not _is_marked(file):
            why = "its end mark is missing, so it was probably cut off"
            raise InputError(
                f"the build context{origin.of} is damaged: {why}",
                hint="look at the program that wrote it, and try again",
            )


def _is_marked(file: io.FileIO) -> bool:
    file.seek(0)
    archive = LayerReader(file.fileno())
    with suppress(DamagedArchive):
        for _ in archive:
            pass
    return archive.marked


def _warn(report: UnpackReport) -> None:
    lost = {
        "devices": (report.devices, "device nodes of the build context were left out"),
        "stripped": (report.stripped, "files of the build context lost their set-user-ID bits"),
    }
    for kind, (count, what) in lost.items():
        if count:
            examples = ", ".join(map(repr, report.examples.get(kind, ())))
            click.echo(f"warning: {what}: {count}, for example {one_line(examples)}", err=True)
