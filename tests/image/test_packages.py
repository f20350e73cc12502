"""The packages of a tree: what databases in their documented forms say, and the CycloneDX made of it."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from firebuild_bootstrap.image.sbom import document
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.image.worker import packages as worker
from firebuild_bootstrap.image.worker.packages import Package, packages

IDENTITY = f"sha256:{'ab' * 32}"


def put(root: Path, path: str, content: str | bytes) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content.encode() if isinstance(content, str) else content)


def found(root: Path) -> list[Package]:
    return [Package(*each) for each in packages(str(root))["packages"]]


def made_of(root: Path, created: str = "2026-01-02T03:04:05+00:00") -> dict[str, Any]:
    """Return the document about a tree, which the published schema accepts."""
    made = document(IDENTITY, "a:1", "pkg:docker/a@1", created, packages(str(root)))
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made))
    assert problem is None, problem
    return made


def rpm_header(**fields: str | int) -> bytes:
    """Return a header as rpm's docs/manual/format_header.md has it."""
    tags = {
        "name": 1000,
        "version": 1001,
        "release": 1002,
        "epoch": 1003,
        "license": 1014,
        "arch": 1022,
        "source": 1044,
    }
    store, entries = b"", b""
    for name, value in fields.items():
        if isinstance(value, int):
            store += bytes(-len(store) % 4)
            entries += struct.pack(">IIiI", tags[name], 4, len(store), 1)
            store += struct.pack(">I", value)
        else:
            entries += struct.pack(">IIiI", tags[name], 6, len(store), 1)
            store += value.encode() + b"\0"
    return struct.pack(">II", len(entries) // 16, len(store)) + entries + store


BASH = rpm_header(
    name="bash",
    version="5.2",
    release="1.el10",
    epoch=3,
    license="GPL-3.0-or-later",
    arch="x86_64",
    source="bash-5.2-1.el10.src.rpm",
)
KEY = rpm_header(name="gpg-pubkey", version="1", release="2")


def rpm_sqlite(path: Path, *headers: bytes) -> None:
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY AUTOINCREMENT, blob BLOB NOT NULL)")
        database.executemany("INSERT INTO Packages (blob) VALUES (?)", [(each,) for each in headers])
    database.close()


def rpm_ndb(*headers: bytes) -> bytes:
    """Return a file as rpm's lib/backend/ndb/rpmpkg.c writes it: slots in the first page, blobs behind it."""
    slots, blobs = b"", b""
    for number, header in enumerate(headers, 1):
        at = 4096 + len(blobs)
        body = struct.pack("<4sIII", b"BlbS", number, 1, len(header)) + header
        body += bytes(-(len(body) + 12) % 16) + struct.pack("<II4s", 0, len(header), b"BlbE")
        slots += struct.pack("<4sIII", b"Slot", number, at // 16, len(body) // 16)
        blobs += body
    head = struct.pack("<4sIIIIIII", b"RpmP", 0, 1, 1, len(headers) + 1, 0, 0, 0)
    return (head + slots).ljust(4096, b"\0") + blobs


@pytest.mark.needs("dpkg")
def test_the_packages_of_this_host_are_those_that_dpkg_lists(tmp_path: Path) -> None:
    put(tmp_path, "var/lib/dpkg/status", Path("/var/lib/dpkg/status").read_bytes())
    form = "${db:Status-Status} ${Package} ${Version} ${Architecture}\n"
    listed = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True)
    lines = (line.split() for line in listed.stdout.splitlines())
    expected = sorted(tuple(words[1:]) for words in lines if words[0] == "installed")
    assert sorted((each.name, each.version, each.arch) for each in found(tmp_path)) == expected


def test_distroless_images_have_a_file_for_each_package(tmp_path: Path) -> None:
    put(tmp_path, "var/lib/dpkg/status.d/base", "Package: base-files\nVersion: 12.4\nArchitecture: amd64\n")
    put(tmp_path, "var/lib/dpkg/status.d/base.md5sums", "Package: no\nVersion: 1\n")
    put(tmp_path, "usr/lib/os-release", 'ID=debian\nVERSION_ID="12"\n# a comment\n')
    (only,) = made_of(tmp_path)["components"]
    assert only["purl"] == "pkg:deb/debian/base-files@12.4?arch=amd64&distro=debian-12"


def test_a_removed_package_is_not_there_and_descriptions_are_no_fields(tmp_path: Path) -> None:
    text = (
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: here\nStatus: install ok installed\nVersion: 2:1.0\nSource: origin (3)\n"
        "Description: text\n Version: 9\n"
    )
    put(tmp_path, "var/lib/dpkg/status", text)
    (only,) = found(tmp_path)
    assert (only.name, only.version, only.source) == ("here", "2:1.0", "origin")


def test_apk_says_name_version_licence_and_origin(tmp_path: Path) -> None:
    text = (
        "C:Q1\nP:musl\nV:1.2.5-r0\nA:x86_64\nL:MIT\no:musl-src\nF:lib\nR:ld.so\n\nP:zlib\nV:1.3\nA:x86_64\n"
    )
    put(tmp_path, "lib/apk/db/installed", text)
    put(tmp_path, "etc/os-release", "ID=alpine\nVERSION_ID=3.20.1\n")
    musl, zlib = made_of(tmp_path)["components"]
    assert musl["purl"] == ("pkg:apk/alpine/musl@1.2.5-r0?arch=x86_64&distro=alpine-3.20.1&upstream=musl-src")
    assert musl["licenses"] == [{"license": {"name": "MIT"}}]
    assert "licenses" not in zlib


@pytest.mark.parametrize("place", ["var/lib/rpm", "usr/lib/sysimage/rpm"])
def test_rpm_in_sqlite_has_packages_and_keys_that_are_none(tmp_path: Path, place: str) -> None:
    rpm_sqlite(tmp_path / place / "rpmdb.sqlite", BASH, KEY)
    (only,) = made_of(tmp_path)["components"]
    assert only["purl"] == (
        "pkg:rpm/redhat/bash@5.2-1.el10?arch=x86_64&epoch=3&upstream=bash-5.2-1.el10.src.rpm"
    )


def test_rpm_in_ndb_has_the_same(tmp_path: Path) -> None:
    other = rpm_header(name="zypper", version="1", release="2", arch="noarch")
    put(tmp_path, "usr/lib/sysimage/rpm/Packages.db", rpm_ndb(BASH, KEY, other))
    assert [(each.name, each.version) for each in found(tmp_path)] == [
        ("bash", "3:5.2-1.el10"),
        ("zypper", "1-2"),
    ]


def test_a_database_that_is_not_read_is_named_in_the_document(tmp_path: Path) -> None:
    put(tmp_path, "var/lib/rpm/Packages", b"\0\0\0\0")
    (note,) = made_of(tmp_path)["metadata"]["properties"]
    assert note["name"] == "firebuild:incomplete"
    assert note["value"].startswith("/var/lib/rpm/Packages: rpm's Berkeley DB")


def test_what_pip_has_installed_is_found(tmp_path: Path) -> None:
    wheel = tmp_path / "Some_Thing-1.5-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_thing.py", "")
        info = "some_thing-1.5.dist-info"
        text = "Metadata-Version: 2.4\nName: Some_Thing\nVersion: 1.5\nLicense-Expression: MIT\n\nName: no\n"
        archive.writestr(f"{info}/METADATA", text)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"some_thing.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")
    target = tmp_path / "root/usr/lib/python3.11/site-packages"
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", target)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True)
    put(
        tmp_path / "root",
        "usr/lib/python3/dist-packages/old.egg-info",
        "Name: old\nVersion: 0.1\nLicense: BSD\n",
    )
    put(tmp_path / "root", "usr/lib/python3/dist-packages/e.egg-info/PKG-INFO", "Name: e\nVersion: 2\n")
    put(tmp_path / "root", "srv/made.dist-info/METADATA", "Name: elsewhere\nVersion: 2\n")
    purls = [each["purl"] for each in made_of(tmp_path / "root")["components"]]
    assert purls == ["pkg:pypi/e@2", "pkg:pypi/old@0.1", "pkg:pypi/some-thing@1.5"]


def test_npm_has_scopes_old_licences_and_many_copies_of_one_package(tmp_path: Path) -> None:
    plain = json.dumps({"name": "left-pad", "version": "1.3.0", "license": {"type": "WTFPL"}})
    put(tmp_path, "app/node_modules/left-pad/package.json", plain)
    put(tmp_path, "app/node_modules/a/node_modules/left-pad/package.json", plain)
    put(tmp_path, "app/node_modules/@types/node/package.json", '{"name": "@types/node", "version": "20.1.0"}')
    put(tmp_path, "app/node_modules/a/esm/package.json", '{"type": "module"}')
    put(tmp_path, "app/node_modules/b/package.json", '{"type": "module"}')
    put(tmp_path, "app/package.json", '{"name": "app", "version": "1.0.0"}')
    node, pad = made_of(tmp_path)["components"]
    assert node["purl"] == "pkg:npm/%40types/node@20.1.0"
    assert pad["licenses"] == [{"license": {"name": "WTFPL"}}]
    assert [each["location"] for each in pad["evidence"]["occurrences"]] == [
        "/app/node_modules/a/node_modules/left-pad/package.json",
        "/app/node_modules/left-pad/package.json",
    ]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("a/node_modules/b/package.json", "[" * 100_000),
        ("a/node_modules/b/package.json", "{"),
        ("var/lib/rpm/rpmdb.sqlite", b"SQLite format 3\0" + bytes(100)),
        ("var/lib/rpm/Packages.db", b"RpmX" + bytes(40)),
        ("var/lib/rpm/Packages.db", b"RpmP" + bytes(4)),
        ("var/lib/rpm/Packages.db", rpm_ndb(BASH)[:4100]),
        ("var/lib/rpm/Packages.db", rpm_ndb(BASH).replace(b"BlbS", b"Blob")),
        ("var/lib/rpm/Packages.db", rpm_ndb(struct.pack(">II", 2**31, 2**31))),
        ("var/lib/rpm/Packages.db", rpm_ndb(rpm_header(name="a", version="1"))),
    ],
)
def test_what_is_damaged_is_named_and_ends_nothing(tmp_path: Path, path: str, content: str | bytes) -> None:
    put(tmp_path, path, content)
    put(tmp_path, "lib/apk/db/installed", "P:musl\nV:1\n")
    answer = packages(str(tmp_path))
    assert [each[1] for each in answer["packages"]] == ["musl"]
    assert answer["notes"] == [f"/{path}: it is damaged"]


def test_links_lead_nowhere_and_neither_size_nor_number_is_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "outside", "Package: outside\nVersion: 1\n")
    root = tmp_path / "root"
    put(root, "a/node_modules/b/package.json", " " * (2 << 20))
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "var/lib/dpkg/available")
    answer = packages(str(root))
    assert answer["packages"] == []
    assert answer["notes"] == ["/a/node_modules/b/package.json: it has more than 1 MiB"]
    monkeypatch.setattr(worker, "_MOST_PACKAGES", 1)
    for name in ("c", "d"):
        put(root, f"a/node_modules/{name}/package.json", f'{{"name": "{name}", "version": "1"}}')
    answer = packages(str(root))
    assert [each[1] for each in answer["packages"]] == ["c"]
    assert answer["notes"][-1] == "there are more than 1 packages: the rest is left out"


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("var/lib/rpm/rpmdb.sqlite", 512),
        ("var/lib/rpm/Packages.db", 512),
        ("var/lib/dpkg/status", 64),
        ("lib/apk/db/installed", 64),
        ("var/lib/dpkg/status.d/one", 1),
    ],
)
def test_a_database_of_more_than_its_limit_is_not_read(tmp_path: Path, path: str, most: int) -> None:
    put(tmp_path, path, "")
    os.truncate(tmp_path / path, (most << 20) + 1)  # a hole, which takes no room
    assert packages(str(tmp_path))["notes"] == [f"/{path}: it has more than {most} MiB"]


def test_no_text_of_an_image_reaches_a_terminal_unescaped(tmp_path: Path) -> None:
    put(tmp_path, "lib/apk/db/installed", b"P:mu\x1b[31msl\xff\nV:1\n\nP:long\nV:" + b"9" * 5000 + b"\n")
    long, musl = found(tmp_path)
    assert musl.name == "mu[31msl\N{REPLACEMENT CHARACTER}"
    assert len(long.version) == 500


def test_the_same_tree_gives_the_same_bytes_and_a_time_that_is_none_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "lib/apk/db/installed", "P:musl\nV:1\n")
    assert made_of(tmp_path) == made_of(tmp_path)
    assert "timestamp" not in made_of(tmp_path, created="yesterday")["metadata"]


@pytest.mark.needs("bwrap")
def test_the_tree_is_read_in_the_sandbox(tmp_path: Path, trees: Trees) -> None:
    put(tmp_path, "lib/apk/db/installed", "P:musl\nV:1\n")
    rpm_sqlite(tmp_path / "var/lib/rpm/rpmdb.sqlite", BASH)
    assert [each[1] for each in trees.packages(tmp_path)["packages"]] == ["musl", "bash"]


@pytest.mark.parametrize(
    "schema",
    [
        # Without an end, of any size, and of no bytes.
        "CREATE VIEW Packages AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) "
        "SELECT x AS blob FROM n",
        "CREATE TABLE Packages (a, blob AS (zeroblob(900000000))); INSERT INTO Packages (a) VALUES (1)",
        "CREATE TABLE Packages (blob); INSERT INTO Packages VALUES (1)",
        "CREATE TABLE Packages (blob); INSERT INTO Packages VALUES (NULL)",
    ],
)
def test_a_database_that_is_a_program_is_damaged(tmp_path: Path, schema: str) -> None:
    path = tmp_path / "var/lib/rpm/rpmdb.sqlite"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(schema)
    found = packages(str(tmp_path))
    assert (found["packages"], found["notes"]) == ([], ["/var/lib/rpm/rpmdb.sqlite: it is damaged"])


def test_slots_that_name_one_header_again_and_again_are_damage(tmp_path: Path) -> None:
    blob = struct.pack("<4sIII", b"BlbS", 1, 1, len(BASH)) + BASH
    slot = struct.pack("<4sIII", b"Slot", 1, 4096 // 16, 1)
    head = struct.pack("<4sIII", b"RpmP", 0, 0, 1) + bytes(16)
    put(tmp_path, "var/lib/rpm/Packages.db", (head + slot * 200).ljust(4096, b"\0") + blob)
    assert packages(str(tmp_path))["notes"] == ["/var/lib/rpm/Packages.db: it is damaged"]
