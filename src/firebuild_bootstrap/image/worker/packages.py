"""Finds the packages of a tree: databases of dpkg, apk and rpm, metadata of Python and npm packages.

All of it is read as data and may be hostile: no link is followed, and size, number and depth are bounded.
What is malformed is left out, and named. Sources: deb-version(7) and dpkg(1); Alpine's "Apk spec"; rpm's
docs/manual/format_header.md, and for its databases lib/backend/sqlite.c and ndb/rpmpkg.c; PyPA's core
metadata specification; npm's package-json(5).
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any, Final, NamedTuple

from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tree import statuses

_MOST_PACKAGES: Final = 100_000
_MOST_FILES: Final = 200_000
_LARGEST_FILE: Final = 64 << 20  # bytes; the status of a workstation has 5 MB
_LARGEST_DATABASE: Final = 512 << 20
_LARGEST_METADATA: Final = 1 << 20
_LONGEST: Final = 500  # characters of a field
_MOST_INSTRUCTIONS: Final = (
    2_000  # millions of them, of sqlite's machine; a database of 64 MiB needs some tens
)
_RPM_HEADER: Final = struct.Struct(">II")
_RPM_ENTRY: Final = struct.Struct(">IIiI")
_RPM_TAGS: Final = {
    1000: "name",
    1001: "version",
    1002: "release",
    1003: "epoch",
    1011: "vendor",
    1014: "license",
    1022: "arch",
    1044: "source",
}
_STRINGS: Final = (6, 8, 9)  # STRING, STRING_ARRAY, I18NSTRING
_INT32: Final = 4


class Package(NamedTuple):
    """One package.

    Args:
        kind: deb, apk, rpm, pypi or npm: the type of its package URL.
        path: of the file that tells of it.
        license: as it is written there; empty where nothing is.
        arch: architecture, where packages have one.
        source: what it is built from, where that has a name of its own.
    """

    kind: str
    name: str
    version: str
    path: str
    license: str = ""
    arch: str = ""
    source: str = ""


def packages(root: str) -> dict[str, Any]:
    """Return what is found in the tree `root`.

    Returns:
        `packages`, a list of lists in the order of the fields of `Package`; `release`, the fields of
        os-release; `notes`, what could not be read, for people.
    """
    found: set[Package] = set()
    notes: dict[str, None] = {}
    release: Mapping[str, str] = {}
    with Root(root) as tree:
        for number, (path, status) in enumerate(_candidates(root)):
            if number >= _MOST_FILES or len(found) >= _MOST_PACKAGES:
                notes[f"there are more than {_MOST_PACKAGES} packages: the rest is left out"] = None
                break
            try:
                if path in ("etc/os-release", "usr/lib/os-release"):
                    release = release or _release(_read(tree, path, status, _LARGEST_METADATA))
                    continue
                reader, most = _reader_of(path)
                room = _MOST_PACKAGES + 1 - len(found)
                found.update(islice(reader(_read(tree, path, status, most), path), room))
            except _Unreadable as error:
                notes[f"/{path}: {error}"] = None
            except (ValueError, KeyError, RecursionError, struct.error, OSError):
                notes[f"/{path}: it is damaged"] = None
    kept = sorted(each for each in found if each.name and each.version)[:_MOST_PACKAGES]
    return {"packages": [list(each) for each in kept], "release": dict(release), "notes": list(notes)[:100]}


class _Unreadable(Exception):
    """A file that is there, and that is not read."""


Reader = Callable[[bytes, str], Iterator[Package]]


def _candidates(root: str) -> Iterator[tuple[str, os.stat_result]]:
    for path, status in statuses(root):
        if stat.S_ISREG(status.st_mode) and _is_wanted(path):
            yield path, status


def _is_wanted(path: str) -> bool:
    return path in ("etc/os-release", "usr/lib/os-release") or _reader_of(path)[1] > 0


def _reader_of(path: str) -> tuple[Reader, int]:
    """Return what reads a file and how many bytes it may have; 0 where it tells of no package."""
    above, _, name = path.rpartition("/")
    if path in _DATABASES:
        return _DATABASES[path]
    if above == "var/lib/dpkg/status.d" and not name.endswith(".md5sums"):
        return _dpkg, _LARGEST_METADATA  # of distroless images, a file for each package
    if _is_python(above, name):
        return _python, _LARGEST_METADATA
    if name == "package.json" and _is_npm(above):
        return _npm, _LARGEST_METADATA
    return _nothing, 0


def _is_python(above: str, name: str) -> bool:
    *_, place, own = ("", "", *above.split("/"))
    if name == "METADATA" and own.endswith(".dist-info"):
        return place in ("site-packages", "dist-packages")
    if name == "PKG-INFO" and own.endswith(".egg-info"):
        return place in ("site-packages", "dist-packages")
    return name.endswith(".egg-info") and own in ("site-packages", "dist-packages")


def _is_npm(above: str) -> bool:
    *_, scope, place, own = ("", "", "", *above.split("/"))
    return bool(own) and (place == "node_modules" or (place.startswith("@") and scope == "node_modules"))


def _read(tree: Root, path: str, status: os.stat_result, most: int) -> bytes:
    if status.st_size > most:
        raise _Unreadable(f"it has more than {most >> 20} MiB")
    with tree.locate(path, follow=False) as place:
        descriptor = place.open(os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(most)


def _nothing(_data: bytes, _path: str) -> Iterator[Package]:
    return iter(())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _cut(text: object) -> str:
    return "".join(sign for sign in str(text)[:_LONGEST] if sign.isprintable()).strip()


def _release(data: bytes) -> dict[str, str]:
    """Read os-release(5)."""
    pairs = (line.split("=", 1) for line in _text(data).splitlines() if "=" in line and line[0] != "#")
    return {name: _cut(value.strip().strip("\"'")) for name, value in pairs if name in ("ID", "VERSION_ID")}


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield paragraphs of `Name: value` lines; a line that begins with a space continues the one before."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            if fields:
                yield fields
            fields = {}
        elif not line[0].isspace():
            name, _, value = line.partition(":")
            fields.setdefault(name.lower(), value.strip())
    if fields:
        yield fields


def _dpkg(data: bytes, path: str) -> Iterator[Package]:
    for fields in _stanzas(_text(data)):
        state = fields.get("status", "install ok installed").split()
        if "package" in fields and state[-1:] == ["installed"]:
            source = fields.get("source", "").partition(" ")[0]
            yield _made(
                "deb",
                fields["package"],
                fields.get("version"),
                path,
                arch=fields.get("architecture"),
                source=source,
            )


def _apk(data: bytes, path: str) -> Iterator[Package]:
    for block in _text(data).split("\n\n"):
        # Upper and lower case mean different things, and most lines are of files.
        fields = {line[0]: line[2:] for line in block.splitlines() if line[1:2] == ":" and line[0] in "PVLAo"}
        if "P" in fields:
            yield _made(
                "apk",
                fields["P"],
                fields.get("V"),
                path,
                licence=fields.get("L"),
                arch=fields.get("A"),
                source=fields.get("o"),
            )


def _python(data: bytes, path: str) -> Iterator[Package]:
    # The description may have any lines, after the first empty one or continued.
    fields = next(_stanzas(_text(data).lstrip()), {})
    licence = fields.get("license-expression") or fields.get("license", "")
    if "name" in fields:
        name = re.sub(r"[-_.]+", "-", fields["name"]).lower()  # as package URLs have it (purl-spec, "pypi")
        yield _made("pypi", name, fields.get("version"), path, licence=licence)


def _npm(data: bytes, path: str) -> Iterator[Package]:
    document = json.loads(data)
    if not isinstance(document, dict) or not all(
        isinstance(document.get(key), str) for key in ("name", "version")
    ):
        return  # one that only says how files are loaded
    licence = document.get("license")
    if isinstance(licence, dict):  # as it was written before npm 2
        licence = licence.get("type")
    licence = licence if isinstance(licence, str) else ""
    yield _made("npm", document["name"], document["version"], path, licence=licence)


def _made(kind: str, name: str, version: str | None, path: str, **others: str | None) -> Package:
    """Return a package; `others` are `licence`, `arch` and `source`."""
    texts = (others.get(each) or "" for each in ("licence", "arch", "source"))
    return Package(kind, *map(_cut, (name, version or "", path, *texts)))


# --- rpm ------------------------------------------------------------------------------------------


def _rpm_sqlite(data: bytes, path: str) -> Iterator[Package]:
    import sqlite3

    connection = sqlite3.connect(":memory:")
    try:
        if (
            data[18:20] == b"\x02\x02"
        ):  # written ahead; what is not in the file yet can't be read without its log
            data = data[:18] + b"\x01\x01" + data[20:]
        # A schema is a program: a view may have no end, a generated column any size.
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, len(data))
        instructions = count(1)
        connection.set_progress_handler(lambda: next(instructions) > _MOST_INSTRUCTIONS, 1_000_000)
        connection.deserialize(data)
        kind = connection.execute("SELECT type FROM sqlite_master WHERE name = 'Packages'").fetchone()
        if kind != ("table",):
            raise ValueError
        blobs = (blob for (blob,) in connection.execute("SELECT blob FROM Packages"))
        yield from _rpm_packages(blobs, len(data), path)
    except sqlite3.Error as error:
        raise ValueError(str(error)) from error
    finally:
        connection.close()


def _rpm_ndb(data: bytes, path: str) -> Iterator[Package]:
    """Read the slots at the beginning of the file: each names where a blob is, in units of 16 bytes."""
    if data[:4] != b"RpmP":
        raise ValueError
    yield from _rpm_packages(_ndb_blobs(data), len(data), path)


def _ndb_blobs(data: bytes) -> Iterator[bytes]:
    (pages,) = struct.unpack_from("<I", data, 12)
    for offset in range(32, min(pages * 4096, len(data) - 15), 16):
        magic, number, block, blocks = struct.unpack_from("<4sIII", data, offset)
        if magic == b"Slot" and number and blocks:
            start = block * 16
            head, same, _, size = struct.unpack_from("<4sIII", data, start)
            if head != b"BlbS" or same != number:
                raise ValueError
            yield data[start + 16 : start + 16 + size]


def _rpm_bdb(_data: bytes, _path: str) -> Iterator[Package]:
    raise _Unreadable(
        "rpm's Berkeley DB, of distributions before 2021, is not read: `rpm -qa` lists its packages"
    )


def _rpm_packages(blobs: Iterable[object], size: int, path: str) -> Iterator[Package]:
    """Read the headers of a database of `size` bytes, and no more: entries may name one many times."""
    for blob in blobs:
        if not isinstance(blob, bytes) or (size := size - len(blob)) < 0:
            raise ValueError
        yield from _rpm_package(blob, path)


def _rpm_package(blob: bytes, path: str) -> Iterator[Package]:
    """Read a header: the numbers of entries and of bytes, the entries, the bytes."""
    entries, size = _RPM_HEADER.unpack_from(blob)
    start = 8 + 16 * entries
    if entries > 65_536 or start + size > len(blob):
        raise ValueError
    store = blob[start : start + size]
    fields: dict[str, str] = {}
    for index in range(entries):
        tag, kind, offset, _ = _RPM_ENTRY.unpack_from(blob, 8 + 16 * index)
        if (name := _RPM_TAGS.get(tag)) is None or not 0 <= offset < size:
            continue
        if kind in _STRINGS:
            fields[name] = _text(store[offset : store.index(b"\0", offset)])
        elif kind == _INT32:
            fields[name] = str(struct.unpack_from(">I", store, offset)[0])
    if fields.get("name") == "gpg-pubkey":
        return  # a key that rpm trusts, and no package
    epoch = f"{fields['epoch']}:" if fields.get("epoch", "0") != "0" else ""
    yield _made(
        "rpm",
        fields["name"],
        f"{epoch}{fields['version']}-{fields['release']}",
        path,
        licence=fields.get("license"),
        arch=fields.get("arch"),
        source=fields.get("source"),
    )


_RPM_PLACES: Final = ("var/lib/rpm", "usr/lib/sysimage/rpm", "usr/share/rpm")
_DATABASES: Final[dict[str, tuple[Reader, int]]] = {
    "var/lib/dpkg/status": (_dpkg, _LARGEST_FILE),
    "lib/apk/db/installed": (_apk, _LARGEST_FILE),
    "usr/lib/apk/db/installed": (_apk, _LARGEST_FILE),
    **{f"{place}/rpmdb.sqlite": (_rpm_sqlite, _LARGEST_DATABASE) for place in _RPM_PLACES},
    **{f"{place}/Packages.db": (_rpm_ndb, _LARGEST_DATABASE) for place in _RPM_PLACES},
    **{f"{place}/Packages": (_rpm_bdb, _LARGEST_DATABASE) for place in _RPM_PLACES},
}
