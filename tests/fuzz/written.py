"""File systems and trees that are written from what somebody else chose."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4
from firebuild_bootstrap.image.worker.extfs import Ext4Image
from firebuild_bootstrap.image.worker.imagewalk import image_entries
from firebuild_bootstrap.image.worker.packages import packages
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.apply import apply
from firebuild_bootstrap.layers.reader import LayerReader, Limits
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import Content, Entry, LayerError, write_layer
from fuzz.choices import Choices

ENV: Final = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
KINDS: Final[tuple[tar.Kind, ...]] = (
    tar.FILE, tar.DIRECTORY, tar.SYMLINK, tar.HARDLINK, tar.CHARACTER, tar.BLOCK_DEVICE, tar.FIFO,
    tar.WHITEOUT, tar.OPAQUE,
)  # fmt: skip
NAMES: Final = (b"a", b"b", b"c", b"d", b"\xff", b"n" * 255, b"lost+found", b".wh.a", b"..", b"")
LINKS: Final = ("a", "..", "/", "../../outside", "/a/b", "x" * 59, "x" * 60, "a/../../b", "a" * 4000)
TIMES: Final = (0, 1, -1, 1_500_000_000, 2**31 * 10**9, -(2**31) * 10**9)
NUMBERS: Final = (0, 1, 1000, 65535, 65536, 2**32 - 2)


def _attributes(choices: Choices) -> dict[str, bytes]:
    names = ("user.a", "security.capability", "user.b", "user." + "n" * 200)
    return {choices.one(names): choices.bytes() * choices.one((1, 1, 100)) for _ in range(choices.below(4))}


def _entry(choices: Choices, path: str, kind: tar.Kind, known: list[str]) -> tuple[Entry, bytes]:
    content = choices.bytes() * choices.one((1, 0, 300, 4096)) if kind == tar.FILE else b""
    link = ""
    if kind == tar.SYMLINK:
        link = choices.one(LINKS)
    elif kind == tar.HARDLINK:
        link = choices.one((*known, "missing", "../outside"))
    is_device = kind in (tar.CHARACTER, tar.BLOCK_DEVICE)
    device = (choices.below(4096), choices.number(2)) if is_device else (0, 0)
    entry = Entry(
        path=path,
        kind=kind,
        mode=choices.number(2) & 0o7777,
        uid=choices.one(NUMBERS),
        gid=choices.one(NUMBERS),
        mtime_ns=choices.one(TIMES),
        size=len(content),
        linkname=link,
        device=device,
        xattrs=_attributes(choices) if kind in (tar.FILE, tar.DIRECTORY) else {},
    )
    return entry, content


# --- the writer of ext4 ---------------------------------------------------------------------------


def ext4_written(data: bytes) -> None:
    """Write a tree as ext4: e2fsck finds nothing wrong with it, and what we read is what was put in."""
    choices = Choices(data)
    files: list[tuple[Entry, Content]] = [(Entry("", tar.DIRECTORY, 0o755), b"")]
    known: list[str] = []
    _tree(choices, "", 3, files, known)
    size = choices.one((0, 4 << 20, 1 << 20))
    options = Ext4Options(free=1 << 20, size=size, inodes=choices.below(200), journal=bool(choices.below(2)))
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        try:
            make_ext4(files, str(image), options)
        except LayerError:
            assert not image.exists()
            return
        done = subprocess.run(
            ["e2fsck", "-fn", image], env=ENV, capture_output=True, text=True, errors="replace", check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        with closing(Ext4Image(str(image))) as opened:
            assert _archive(image_entries(opened)) == _archive(files)


def _archive(files: object) -> bytes:
    out = io.BytesIO()
    write_layer(out, files)  # type: ignore[arg-type]
    return out.getvalue()


def _tree(
    choices: Choices, above: str, depth: int, files: list[tuple[Entry, Content]], known: list[str]
) -> None:
    """Put some files into a directory, in the order of their names, as `tree_entries` does."""
    names = {
        choices.one((*NAMES[:6], choices.bytes(6).replace(b"/", b"").replace(b"\0", b"")))
        for _ in range(choices.below(6))
    }
    for number, name in enumerate(sorted(names - {b"", b".", b".."})):
        path = os.fsdecode((os.fsencode(above) + b"/" if above else b"") + name)
        kind: tar.Kind = choices.one(KINDS[:7])
        if kind == tar.HARDLINK and not known:
            kind = tar.FILE
        entry, content = _entry(choices, path, kind, known)
        if kind == tar.HARDLINK:
            first = known[number % len(known)]
            other = next(one for one, _ in files if one.path == first)  # it is the same file
            entry = other._replace(path=path, kind=kind, linkname=first, size=0, xattrs={})
        files.append((entry, content))
        if kind == tar.FILE:
            known.append(path)
        if kind == tar.DIRECTORY and depth:
            _tree(choices, path, depth - 1, files, known)


# --- a layer on a tree ----------------------------------------------------------------------------


def layers_applied(data: bytes) -> None:
    """Unpack layers, one on the other; nothing outside of the tree changes, whatever they link to."""
    choices = Choices(data)
    with tempfile.TemporaryDirectory() as directory:
        outside, inside = Path(directory, "outside"), Path(directory, "tree")
        outside.mkdir()
        inside.mkdir()
        Path(outside, "kept").write_text("kept", "utf-8")
        Path(inside, "out").symlink_to(outside)
        Path(inside, "up").symlink_to("../outside")
        before = _state(outside)
        root = Root(str(inside))
        try:
            for _ in range(1 + choices.below(3)):
                archive = _layer(choices)
                apply(
                    LayerReader(io.BytesIO(archive), Limits(entries=1000, content=1 << 22), whiteouts=True),
                    root,
                )
        except (LayerError, OSError):
            pass
        finally:
            root.close()
        assert _state(outside) == before
        assert sorted(os.listdir(directory)) == ["outside", "tree"]


def _state(directory: Path) -> tuple[object, ...]:
    found = os.lstat(directory)
    names = tuple(sorted(os.listdir(directory)))
    texts = tuple(Path(directory, name).read_bytes() for name in names)
    return names, texts, found.st_mode, found.st_mtime_ns, found.st_uid


def _layer(choices: Choices) -> bytes:
    out = io.BytesIO()
    known = ["a", "a/b", "out/kept", "up/kept", "out"]
    files: list[tuple[Entry, Content]] = []
    for _ in range(1 + choices.below(8)):
        parts = [
            choices.one(("out", "up", "a", "b", "c", "..", "d" * 100)) for _ in range(1 + choices.below(4))
        ]
        entry, content = _entry(choices, "/".join(parts), choices.one(KINDS), known)
        files.append((entry._replace(uid=os.geteuid(), gid=os.getegid()), content))
    with suppress(LayerError, ValueError):
        write_layer(out, files)
    archive = bytearray(out.getvalue())
    if archive and choices.below(4) == 1:  # a name that our own writer would not write
        at = 512 * choices.below(max(1, len(archive) // 512))
        archive = bytearray(
            _renamed(bytes(archive), at, choices.one((b"../outside/x", b"/up/x", b"out/../../x")))
        )
    return bytes(archive)


def _renamed(archive: bytes, at: int, name: bytes) -> bytes:
    """Write a name into a header, and its checksum (pax(1), ustar)."""
    head = bytearray(archive[at : at + 512])
    head[: len(name) + 1] = name + b"\0"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return archive[:at] + bytes(head) + archive[at + 512 :]


# --- databases of packages ------------------------------------------------------------------------

PLACES: Final = (
    "var/lib/dpkg/status",
    "lib/apk/db/installed",
    "var/lib/rpm/rpmdb.sqlite",
    "var/lib/rpm/Packages.db",
    "usr/lib/python3/site-packages/a.dist-info/METADATA",
    "usr/lib/node_modules/a/package.json",
    "etc/os-release",
)


def package_databases(data: bytes) -> None:
    """Read a tree with one database of packages, whose name is the first byte."""
    choices = Choices(data)
    place = choices.one(PLACES)
    content = choices.raw(len(data))
    if place.endswith("sqlite") and not content.startswith(b"SQLite format 3\0"):
        content = sqlite_of(content)
    elif place.endswith("Packages.db") and not content.startswith(b"RpmP"):
        content = ndb_of(content)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, place)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        found = packages(directory)
    assert len(found["notes"]) <= 100
    assert all(
        all(isinstance(field, str) and len(field) <= 500 for field in one) for one in found["packages"]
    )


def sqlite_of(content: bytes) -> bytes:
    """Return a database in which the columns of `Packages` are what a fuzzer wants."""
    import sqlite3

    choices = Choices(content)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob)")
        for _ in range(1 + choices.below(4)):
            odd = (choices.number(), None, 1.5, "text", choices.raw(20))
            value = rpm_header(choices) if choices.below(3) else choices.one(odd)
            database.execute("INSERT INTO Packages (blob) VALUES (?)", (value,))
        database.commit()
        return database.serialize()


def ndb_of(content: bytes) -> bytes:
    """Return a database of rpm's own form with one page of slots."""
    choices = Choices(content)
    blobs, slots = b"", b""
    for number in range(1, 2 + choices.below(4)):
        blob = rpm_header(choices)
        start = 4096 + len(blobs)
        blobs += b"BlbS" + number.to_bytes(4, "little") + bytes(4) + len(blob).to_bytes(4, "little") + blob
        blobs += bytes(-len(blobs) % 16)
        slots += b"Slot" + b"".join(
            one.to_bytes(4, "little") for one in (number, start // 16, choices.number())
        )
    head = b"RpmP" + bytes(8) + choices.one((1, 1, 0, 1 << 31)).to_bytes(4, "little") + bytes(16)
    return (head + slots).ljust(4096, b"\0") + blobs


def rpm_header(choices: Choices) -> bytes:
    """Return a header of rpm with the fields of a package, some of which are not."""
    store, entries = bytearray(), b""
    for tag in (1000, 1001, 1002, 1003, 1014, 1022):
        kind = choices.one((4,)) if tag == 1003 else choices.one((6, 6, 6, 9, 4, 7))
        offset = choices.one((len(store), len(store), len(store), choices.number()))
        store += choices.bytes(8) + bytes(4)
        entries += b"".join(one.to_bytes(4, "big") for one in (tag, kind, offset, 1))
    count = choices.one((6, 6, 6, 5, 7, 65_537))
    return count.to_bytes(4, "big") + len(store).to_bytes(4, "big") + entries + bytes(store)
