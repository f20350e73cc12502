"""The cases: small Dockerfiles with their contexts, one rule each, and the bases that they start from.

A case is a member of a file in `cases/`, by its name:

    dockerfile: the text
    files:      what is in the context besides it; see `lay`
    args, target, platform, secrets (id -> content), contexts (name -> files)
    served:     name -> content of files that a web server at the build argument URL delivers
    times:      whether times of modification are a part of what is expected

What BuildKit makes of it is in `recorded/`, put there by `record.py`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from firebuild_bootstrap.image.config import ImageConfig
from support import serving_files

HERE: Final = Path(__file__).parent
TIME: Final = 1_000_000_000  # of every file of which the case says nothing else
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"

Files = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One Dockerfile; `area` is the file that it stands in. See the module."""

    area: str
    name: str
    dockerfile: str
    files: Files = field(default_factory=dict)
    args: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    platform: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict)
    contexts: Mapping[str, Files] = field(default_factory=dict)
    served: Mapping[str, str] = field(default_factory=dict)
    times: bool = False

    def lay(self, directory: Path) -> Path:
        """Make the context with the Dockerfile in `directory`/context, and secrets and contexts beside it."""
        context = directory / "context"
        # BuildKit takes a file for one that it had in an earlier build if name, size and time are equal.
        time = TIME * 10**9 + zlib.crc32(self.name.encode()) % 10**9
        lay(context, {"Dockerfile": self.dockerfile, **self.files}, time)
        lay(directory / "secrets", self.secrets)
        for name, files in self.contexts.items():
            lay(directory / "contexts" / name, files, time)
        return context

    @contextmanager
    def serving(self, directory: Path) -> Iterator[Mapping[str, str]]:
        """Serve what the case wants served; yields the build arguments."""
        if not self.served:
            yield self.args
            return
        lay(directory / "served", self.served)
        with serving_files(directory / "served") as address:
            yield {**self.args, "URL": f"http://{address}"}


@cache
def cases() -> tuple[Case, ...]:
    """Return all cases, in the order of their files and in these."""
    found = []
    for path in sorted((HERE / "cases").glob("*.yaml")):
        for name, members in yaml.safe_load(path.read_text()).items():
            found.append(Case(area=path.stem, name=name, **members))
    return tuple(found)


def recorded() -> dict[str, Any]:
    """Return what BuildKit made of each case, by its name."""
    records: dict[str, Any] = {}
    for path in sorted((HERE / "recorded").glob("*.json")):
        records |= json.loads(path.read_text())
    return records


# --- files ---------------------------------------------------------------------------------------


def lay(directory: Path, files: Files, time: int = TIME * 10**9) -> None:
    """Make files, each a text or an object with the members that it needs:

    `content`, `base64` or `size` (of zeros), or `link`, `hard` (a name in the same files), `fifo`, `socket`,
    or `archive` (files, packed as `form`: tar, gz, bz2, xz); `mode` (octal digits), `owner` (uid:gid),
    `mtime`, `xattr` (as Latin-1). A name that ends in a slash is a directory. `time`, in nanoseconds, is that
    of the last; each other is a nanosecond later.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, text_or_members in files.items():
        members = _members(text_or_members)
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _make(path, directory, name, members)
        if "link" not in members and "hard" not in members:
            path.chmod(int(members.get("mode", "755" if name.endswith("/") else "644"), 8))
        uid, gid = _owner(members)
        if (uid, gid) != (0, 0):
            os.chown(path, uid, gid, follow_symlinks=False)
        for key, value in members.get("xattr", {}).items():
            os.setxattr(path, key, value.encode("latin-1"), follow_symlinks=False)
    # Making a file changes the time of its directory.
    for number, path in enumerate(sorted(directory.rglob("*"), reverse=True)):
        given = _members(files.get(str(path.relative_to(directory)) + "/" * path.is_dir(), ""))
        when = given["mtime"] * 10**9 if "mtime" in given else time + number
        os.utime(path, ns=(when, when), follow_symlinks=False)
    os.utime(directory, ns=(time, time))


def _make(path: Path, directory: Path, name: str, members: Mapping[str, Any]) -> None:
    if name.endswith("/"):
        path.mkdir(exist_ok=True)
    elif "link" in members:
        path.symlink_to(members["link"])
    elif "hard" in members:
        path.hardlink_to(directory / members["hard"])
    elif "fifo" in members:
        os.mkfifo(path)
    elif "socket" in members:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path.write_bytes(content(members))


def content(text_or_members: Any) -> bytes:
    """Return the bytes of a file."""
    members = _members(text_or_members)
    if "archive" in members:
        return pack(members["archive"], members.get("form", "tar"))
    if "base64" in members:
        return base64.b64decode(members["base64"])
    return str(members.get("content", "")).encode() or bytes(members.get("size", 0))


def pack(files: Files, form: str = "tar") -> bytes:
    """Return a tar archive of files, the same for the same files."""
    buffer = io.BytesIO()
    mode: Any = "w" if form == "tar" else f"w:{form}"
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.PAX_FORMAT) as tar:
        for name, text_or_members in files.items():
            members = _members(text_or_members)
            member = tarfile.TarInfo(name.rstrip("/") if name != "./" else "./")
            member.mtime = members.get("mtime", TIME)
            member.mode = int(members.get("mode", "755" if name.endswith("/") else "644"), 8)
            member.uid, member.gid = _owner(members)
            member.pax_headers = {
                f"SCHILY.xattr.{key}": value for key, value in members.get("xattr", {}).items()
            }
            data = b""
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            elif "link" in members:
                member.type, member.linkname, member.mode = tarfile.SYMTYPE, members["link"], 0o777
            elif "hard" in members:
                member.type, member.linkname = tarfile.LNKTYPE, members["hard"]
            elif "fifo" in members:
                member.type = tarfile.FIFOTYPE
            else:
                data = content(members)
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _members(text_or_members: Any) -> Mapping[str, Any]:
    return text_or_members if isinstance(text_or_members, dict) else {"content": text_or_members or ""}


def _owner(members: Mapping[str, Any]) -> tuple[int, int]:
    uid, _, gid = str(members.get("owner", "0:0")).partition(":")
    return int(uid), int(gid)


# --- bases ---------------------------------------------------------------------------------------

_APPLETS: Final = (
    "cat chmod chown cp echo env find grep head id ln ls mkdir mv printf rm sed sh sleep sort stat touch wc"
)


@dataclass(frozen=True, kw_only=True)
class BaseImage:
    """An image to start FROM: its configuration, and its files as an uncompressed tar archive."""

    name: str
    config: ImageConfig
    archive: bytes

    def layout(self, directory: Path) -> str:
        """Make an OCI layout of it and return the digest of its manifest."""
        blobs = directory / "blobs/sha256"
        blobs.mkdir(parents=True)

        def blob(data: bytes, media: str) -> dict[str, Any]:
            digest = hashlib.sha256(data).hexdigest()
            (blobs / digest).write_bytes(data)
            return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

        layer = blob(self.archive, _LAYER)
        members = self.config.as_json()
        config = {
            "architecture": "amd64",
            "os": "linux",
            "author": members.pop("author", ""),
            "config": members,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": blob(json.dumps(config).encode(), _CONFIG),
            "layers": [layer],
        }
        found = blob(json.dumps(manifest).encode(), _MANIFEST)
        index = {"schemaVersion": 2, "manifests": [found]}
        (directory / "index.json").write_text(json.dumps(index))
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        return str(found["digest"])


@cache
def bases() -> Mapping[str, BaseImage]:
    """Return the bases of `bases.yaml`, by name; all have busybox and the same files."""
    document = yaml.safe_load((HERE / "bases.yaml").read_text())
    busybox = {"base64": base64.b64encode(Path("/bin/busybox").read_bytes()), "mode": "755"}
    applets = {f"bin/{name}": {"link": "busybox"} for name in _APPLETS.split()}
    archive = pack({**document["files"], "bin/": "", "bin/busybox": busybox, **applets})
    return {
        name: BaseImage(name=name, config=ImageConfig.from_json(config or {}), archive=archive)
        for name, config in document["images"].items()
    }
