"""A COPY or ADD for an old guest: files in portions, and the script that does the work of guest/copy.py.

An old guest keeps all files of one resource in memory until the last one is written, overwrites without
truncation and cannot make links. So files are cut into pieces and sent in portions, as new files in a
directory of their own, with names of no meaning where names could do harm. The script makes them what they
have to be.
"""

from __future__ import annotations

import hashlib
import posixpath
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import BinaryIO, Final

from firebuild_bootstrap import wire
from firebuild_bootstrap.context.entries import (
    SPECIAL,
    Entry,
    Resource,
    changed,
    content_of,
    kind_name,
    reading,
)
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.users import parse_mode
from firebuild_bootstrap.layers import tar
from firebuild_pki.values import dataclass

from .scripts import lines, words

PORTION_BYTES: Final = 16 * 1024 * 1024
_PORTION_PIECES: Final = 2000


def plain(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield entries for an old guest.

    Raises:
        InputError: one is something that it can't make.
    """
    for entry in entries:
        if entry.kind in SPECIAL:
            raise InputError(
                f"{entry.source!r} is a {kind_name(entry.kind)}, and the guest is too old to make one",
                hint="leave it out with --exclude or .dockerignore",
            )
        yield entry


@dataclass(frozen=True)
class Piece:
    """One thing that the guest writes: a directory, or a piece of a file.

    Args:
        path: where, below the staging directory; empty for that directory itself.
        entry: number of the file among all entries, -1 for a directory.
        size: bytes of the piece.
        last: the file ends with it.
    """

    path: str
    entry: int = -1
    size: int = 0
    last: bool = False


@dataclass(frozen=False)
class Batch:
    """Entries that can lie in one directory before they are merged into the destination.

    `single` is set where the batch is one file that the destination's rules name or place, `archive` where
    its entries are members of one. `entries` holds each path once; `None` stands for a directory that the
    source does not mention.
    """

    number: int
    single: bool
    archive: bool
    entries: dict[str, tuple[int, Entry] | None] = field(default_factory=dict)

    def takes(self, entry: Entry) -> bool:
        """Tell whether the entry can be added without meeting another one in the batch."""
        if self.single or not entry.from_directory or entry.member != self.archive:
            return False
        held = self.entries.get(entry.path)
        if held is not None or (entry.path in self.entries and entry.kind != tar.DIRECTORY):
            return False
        above = (self.entries.get(path) for path in parents(entry.path))
        return all(found is None or found[1].kind == tar.DIRECTORY for found in above)

    def add(self, index: int, entry: Entry) -> None:
        """Add an entry, and the directories above it that were not mentioned."""
        if not self.single:
            for path in parents(entry.path):
                self.entries.setdefault(path, None)
        if self.archive and not entry.path:
            self.entries.setdefault("", None)  # an archive says nothing about the destination itself
        else:
            self.entries[entry.path] = (index, entry)

    def staged(self, path: str) -> str:
        """Return where an entry waits, relative to the staging directory."""
        return str(self.number) if self.single or not path else f"{self.number}/{path}"


def parents(path: str) -> Iterator[str]:
    """Yield the directories above a path of an entry, outermost first; the first is the destination."""
    if not path:
        return
    yield ""
    names = path.split("/")[:-1]
    for count in range(1, len(names) + 1):
        yield "/".join(names[:count])


def batches(entries: Iterable[Entry]) -> list[Batch]:
    """Sort entries into batches, in their order; merged one after the other they give the same result."""
    found: list[Batch] = []
    for index, entry in enumerate(entries):
        if not found or not found[-1].takes(entry):
            found.append(Batch(len(found), single=not entry.from_directory, archive=entry.member))
        found[-1].add(index, entry)
    return found


@dataclass(frozen=True)
class File:
    """A regular file under way: its number and entry, where it has to be, and what it is sent as."""

    index: int
    entry: Entry
    staged: str
    pieces: tuple[Piece, ...]

    @property
    def arrived(self) -> str:
        """Where it is when its content is checked."""
        return self.pieces[0].path if len(self.pieces) == 1 else _harmless(self.index, self.staged)


def files(found: Iterable[Batch]) -> list[File]:
    """Return all regular files in the order of their entries."""
    result = []
    for batch in found:
        for path, held in batch.entries.items():
            if held is not None and held[1].kind == tar.FILE:
                index, entry = held
                staged = batch.staged(path)
                result.append(File(index, entry, staged, tuple(_pieces(index, entry.size, staged))))
    return sorted(result, key=lambda file: file.index)


def _pieces(index: int, size: int, staged: str) -> Iterator[Piece]:
    if size <= PORTION_BYTES:
        yield Piece(_harmless(index, staged), index, size, last=True)
        return
    for offset in range(0, size, PORTION_BYTES):
        rest = size - offset
        yield Piece(
            f"part{index}.{offset // PORTION_BYTES}",
            index,
            min(rest, PORTION_BYTES),
            last=rest <= PORTION_BYTES,
        )


def _harmless(index: int, staged: str) -> str:
    # sha256sum writes line feeds and backslashes in a way of its own; busybox does not read it.
    return staged if staged.isprintable() and "\\" not in staged else f"odd{index}"


def directories(found: Iterable[Batch]) -> list[Piece]:
    """Return the directories that have to exist before any file is sent, parents first."""
    paths = [
        batch.staged(path)
        for batch in found
        if not batch.single
        for path, held in batch.entries.items()
        if held is None or held[1].kind == tar.DIRECTORY
    ]
    # A mentioned directory may come after one that its child made necessary.
    return [Piece(""), *(Piece(path) for path in sorted(paths, key=lambda path: path.count("/")))]


def portions(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Cut the pieces into what one resource carries; at least one, which may be empty."""
    found: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if found[-1] and (size + piece.size > PORTION_BYTES or len(found[-1]) >= _PORTION_PIECES):
            found.append([])
            size = 0
        found[-1].append(piece)
        size += piece.size
    return found


# --- contents -------------------------------------------------------------------------------------


class Feed:
    """Reads a resource for the second time: the first time told what there is.

    Args:
        resource: yields its entries anew.
        planned: what it yielded the first time.
    """

    def __init__(self, resource: Resource, planned: Sequence[Entry]) -> None:
        self._entries = resource.entries()
        self._planned = planned
        self._next = 0
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self.digests: dict[int, str] = {}

    def piece(self, index: int, size: int, *, last: bool) -> Iterator[bytes]:
        """Yield the next `size` bytes of a file in chunks.

        Args:
            index: number of the file's entry; never lower than the one before.
            size: bytes of the piece.
            last: the file ends with it; its digest is in `digests` then.

        Raises:
            InputError: a source has vanished, cannot be read or has changed.
        """
        if self._file is None:
            self._file = self._open(index)
        entry = self._planned[index]
        with reading(entry):
            while size:
                data = self._file.read(min(size, wire.CHUNK_BYTES))
                if not data:
                    raise changed(entry.source, "it has become shorter")
                self._hash.update(data)
                size -= len(data)
                yield data
            if last:
                if self._file.read(1):
                    raise changed(entry.source, "it has become longer")
                self.digests[index] = self._hash.hexdigest()
                self._close_file()

    def _open(self, index: int) -> BinaryIO:
        self._hash = hashlib.sha256()
        while True:
            entry, planned = next(self._entries, None), self._planned[self._next]
            if entry is None or _facts(entry) != _facts(planned):
                raise changed(planned.source, "there is something else now")
            self._next += 1
            if self._next > index:
                return content_of(entry)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Let go of what is open."""
        self._close_file()
        close = getattr(self._entries, "close", None)
        if close is not None:
            close()


def _facts(entry: Entry) -> tuple[object, ...]:
    return (entry.source, entry.path, entry.kind, entry.mode, entry.size, entry.link_target, entry.owner)


# --- the script -----------------------------------------------------------------------------------

_BILLION: Final = 1_000_000_000

# `$D` is the destination without a slash at its end, `$O` the owner of what has none of its own.
# `A` is set for the members of an archive, for which the destination is the root (guest/copy.py): `below`
# makes `R` of a path in it, by following its links as chroot(2) would.
# `00` before a mode, because GNU's chmod leaves setuid and setgid of directories alone without it.
_FUNCTIONS: Final = r"""
below() {
  left=$1 R=$D links=0
  while [ -n "$left" ]; do
    part=${left%%/*}
    case $left in */*) left=${left#*/} ;; *) left= ;; esac
    case $part in
      '' | .) ;;
      ..) [ "$R" = "$D" ] || R=${R%/*} ;;
      *)
        if [ -L "$R/$part" ]; then
          links=$((links + 1))
          [ "$links" -le 40 ] || die "$D/$1: Too many levels of symbolic links"
          text=$(readlink "$R/$part"; echo x) text=${text%?x}
          left=$text/$left
          case $text in /*) R=$D ;; esac
        else R=$R/$part; fi ;;
    esac
  done
}
put() {
  if [ -d "$1" ] && [ ! -L "$1" ]; then
    if [ "$A" ] && implied "$1" && [ -L "$2" ]; then
      below "${2#"$D"/}"
      mk "$R" "$O"
      merge "$1" "$R"
    elif [ "$A" ] && ! implied "$1" && { [ -L "$2" ] || { [ -e "$2" ] && [ ! -d "$2" ]; }; }; then
      rm -f "$2" && mv -f "$1" "$2" || die "$2: it could not be written"
    elif [ -d "$2" ]; then
      merge "$1" "$2"
      if [ ! -L "$2" ] && ! implied "$1"; then alike "$1" "$2"; fi
    elif [ -e "$2" ] || [ -L "$2" ]; then die "$2: a file is where a directory is needed"
    else mv -f "$1" "$2" || die "$2: it could not be written"; fi
  else replace "$1" "$2"; fi
}
merge() {
  for found in "$1"/* "$1"/.[!.]* "$1"/..?*; do
    if [ -e "$found" ] || [ -L "$found" ]; then put "$found" "$2/${found##*/}"; fi
  done
}
replace() {
  if [ -L "$2" ]; then rm -f "$2" || failed
  elif [ -d "$2" ] && [ "$A" ]; then rm -rf "$2" || failed
  elif [ -d "$2" ]; then die "$2: a directory is there, and a file or link can't replace it"; fi
  mv -f "$1" "$2" || die "$2: it could not be written"
}
alike() {
  like=$(stat -c '%u:%g' "$1") && chown "$like" "$2" && like=$(stat -c %a "$1") && chmod "00$like" "$2" ||
    die "$2: its owner or mode could not be set"
}
tree() {
  if [ -d "$D/" ]; then merge "$S/$1" "$D"
  elif [ -e "$D" ] || [ -L "$D" ]; then die "$D: a file is where a directory is needed"
  else
    mk "${D%/*}" "$O"
    mv -f "$S/$1" "$D" || die "$D: it could not be written"
    NEW=$1
  fi
}
single() {
  if [ "$3" = into ] || [ -d "$D/" ]; then mk "$D" "$O"; at=$D/$2
  else
    mk "${D%/*}" "$O"; at=$D
    if [ -L "$at" ] && [ -e "$at" ]; then at=$(readlink -f "$at"); fi
  fi
  replace "$S/$1" "$at"
}
stamp() {
  seconds=$1${FRACTIONS:+.$2}; shift 2
  touch -h -d "@$seconds" "$@"
}
timed() {
  if [ "$4" = "" ] && [ "$NEW" != "$3" ]; then return; fi
  at=$D/$4
  case $A$4 in 1*/*) below "${4%/*}"; at=$R/${4##*/} ;; esac
  if [ -d "$at" ] && [ ! -L "$at" ]; then stamp "$1" "$2" "$at"; fi
}
"""

_VERIFY: Final = r"""
if ! sha256sum -c sums > checked 2>&1; then
  while IFS= read -r line; do case $line in *': OK') ;; *) printf '%s\n' "$line" >&2 ;; esac; done < checked
  die "the files did not arrive as they were sent"
fi
"""


@dataclass(frozen=True)
class Placing:
    """All that the script for one COPY or ADD is made from."""

    command: wire.CopyCommand
    batches: Sequence[Batch]
    files: Sequence[File]

    def script(self) -> str:
        """Return the script; it runs after shell.library and ends with the step's mark."""
        command = self.command
        target, must_exist = _target(command)
        text = [
            _FUNCTIONS,
            'implied() { case ${1#"$S/"} in ' + self._implied() + " *) return 1 ;; esac; }",
            f"owner {shlex.quote(command.chown)}" if command.chown is not None else "O=0:0",
            f"mk {shlex.quote(wire.absolute('/', command.workdir))} 0:0",
            f"D={shlex.quote(target)} NEW= A=",
            'mk "$D" "$O"' if must_exist else "",
            'cd "$S" && : > probe || failed',
            "FRACTIONS=; ! touch -d @1.5 probe 2>/dev/null || FRACTIONS=1",
            *self._joined(),
            _VERIFY if self.files else "",
            *self._owned(),
            *self._moded(),
            *self._timed(),
            *(line for batch in self.batches for line in self._placed(batch)),
            *self._timed_directories(),
            'cd / && rm -rf "$S" || failed',
            "say E 0",
            "exit 0",
        ]
        return "\n".join(line for line in text if line) + "\n"

    def sums(self, digests: Mapping[int, str]) -> str:
        """Return the list that sha256sum checks, from the digest of each file by its number."""
        return "".join(f"{digests[file.index]}  {file.arrived}\n" for file in self.files)

    # --- before the merge -----------------------------------------------------------------------

    def _implied(self) -> str:
        paths = [batch.staged(path) for batch, path, entry in self._found() if entry is None]
        return f"{'|'.join(map(shlex.quote, paths))}) ;;" if paths else ""

    def _joined(self) -> Iterator[str]:
        for file in self.files:
            if len(file.pieces) > 1:
                parts = words(piece.path for piece in file.pieces)
                yield f"cat {parts} > {shlex.quote(file.arrived)} && rm -f {parts} || failed"

    def _found(self) -> Iterator[tuple[Batch, str, Entry | None]]:
        for batch in self.batches:
            for path, held in batch.entries.items():
                yield batch, path, held[1] if held else None

    def _everything(self) -> Iterator[tuple[str, Entry | None]]:
        """Yield what waits as a thing of its own: not the other names of a file."""
        odd = {file.staged: file.arrived for file in self.files}
        for batch, path, entry in self._found():
            if entry is None or entry.kind != tar.HARDLINK:
                staged = batch.staged(path)
                yield odd.get(staged, staged), entry

    def _owned(self) -> Iterator[str]:
        yield from self._links()
        owners: defaultdict[str, list[str]] = defaultdict(list)
        for staged, entry in self._everything():
            kept = entry.owner if entry is not None and self.command.chown is None else None
            owners[f"{kept[0]}:{kept[1]}" if kept else "$O"].append(staged)
        if self.command.chown is None:
            owners.pop("$O", None)  # the guest's own files are root's
        for owner, paths in owners.items():
            yield from lines(f'chown -h "{owner}"', paths)

    def _links(self) -> Iterator[str]:
        for batch, path, entry in self._found():
            if entry is not None and entry.kind == tar.SYMLINK:
                yield f"ln -s -- {words((entry.link_target, batch.staged(path)))} || failed"

    def _moded(self) -> Iterator[str]:
        modes: defaultdict[int, list[str]] = defaultdict(list)
        change = parse_mode(self.command.chmod) if self.command.chmod is not None else None
        for staged, entry in self._everything():
            if entry is None:
                modes[0o755].append(staged)
            elif entry.kind != tar.SYMLINK:
                directory = entry.kind == tar.DIRECTORY
                modes[change(entry.mode, directory) if change else entry.mode].append(staged)
        for mode, paths in modes.items():
            yield from lines(f"chmod {mode:o}", paths)

    def _timed(self) -> Iterator[str]:
        times: defaultdict[int, list[str]] = defaultdict(list)
        for staged, entry in self._everything():
            if entry is not None and entry.kind != tar.DIRECTORY:
                times[entry.mtime_ns].append(staged)
        for mtime, paths in times.items():
            yield from lines(f"stamp {_time(mtime)}", paths)

    # --- the merge ------------------------------------------------------------------------------

    def _placed(self, batch: Batch) -> Iterator[str]:
        for file in self.files:
            if file.arrived != file.staged and file.staged.startswith(f"{batch.number}/"):
                yield f"mv -f {words((file.arrived, file.staged))} || failed"
        if batch.single:
            ((path, _),) = batch.entries.items()
            yield f"single {batch.number} {shlex.quote(path)} {'into' if _into(self.command) else 'name'}"
            return
        yield "A=1" if batch.archive else "A="
        for path, held in batch.entries.items():
            if held is not None and held[1].kind == tar.HARDLINK:
                yield from _hard_link(batch, path, held[1].link_target)
        yield f"tree {batch.number}"

    def _timed_directories(self) -> Iterator[str]:
        last: dict[str, str] = {}
        for batch, path, entry in self._found():
            if entry is not None and entry.kind == tar.DIRECTORY:
                line = f"timed {_time(entry.mtime_ns)} {batch.number} {shlex.quote(path)} || failed"
                last[path or f"/{batch.number}"] = f"A={'1' if batch.archive else ''}; {line}"
        yield from last.values()


def _hard_link(batch: Batch, path: str, first: str) -> Iterator[str]:
    origin = shlex.quote(batch.staged(first))
    if not batch.entries.get(first):  # it is in the image already
        directory, name = posixpath.split(first)
        yield f"below {shlex.quote(directory)}"
        origin = f'"$R"/{shlex.quote(name)}'
    yield f"ln {origin} {shlex.quote(batch.staged(path))} || failed"


def _time(mtime_ns: int) -> str:
    seconds, fraction = divmod(mtime_ns, _BILLION)
    return f"{seconds} {fraction:09d}"


def _into(command: wire.CopyCommand) -> bool:
    target = command.target
    return command.target_is_directory or target.endswith(("/", "/.")) or target in ("", ".")


def _target(command: wire.CopyCommand) -> tuple[str, bool]:
    """Return the destination, and whether it is a directory by its name."""
    by_name = posixpath.basename(posixpath.join(command.workdir, command.target).rstrip("/"))
    path = wire.absolute(command.workdir, command.target)
    return "" if path == "/" else path, by_name == ".."
