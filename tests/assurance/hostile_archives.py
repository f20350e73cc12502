"""Archives of all kinds that are damaged or hostile, to everything that takes archives."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import zstandard

from assurance.stores import Store, fresh_store
from assurance.trials import Effort, trial
from firebuild_bootstrap.image.oci import CONFIG, INDEX, LAYER, MANIFEST, canonical
from firebuild_bootstrap.image.platforms import Platform
from registry.servers import descriptor, digest

AT_ONCE: Final = 3
"""Archives that are taken side by side, each into a store of its own."""
KINDS: Final = (
    *(tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE),
    *(tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE),
    *(b"V", b"Z", b"\xff"),
)
NEAR: Final = (
    "a",
    "a/b",
    "a/b/c",
    "b",
    "d/e",
    "link",
    "link/x",
    "./a",
    "a//b",
    ".",
    ".wh.a",
    "/x",
    "x" * 300,
)
"""Names that are no trouble alone."""
FAR: Final = (
    *(
        "link/../x",
        "../x",
        "a/../../x",
        "..",
        "/",
        "",
        ".wh..wh..opq",
        "a/.wh.b",
        "../.wh.a",
        ".wh...",
        ".wh.",
    ),
    *("dev/null", "n\udcff", "y/" * 2000 + "z", "a\n\x1b[31m", "etc/passwd", "proc/self/root/x"),
    "lost+found/x",
)
TIMES: Final = (0, 1, -1, 2**31, 2**33, 2**62, -(2**40), 1.5)
IDS: Final = (0, 1, 1000, 65534, 2**16, 2**31, 2**32 - 1, 2**40)
COMPRESSIONS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, 1),
    ".bz2": lambda data: bz2.compress(data, 1),
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zstandard.compress,
}


def a_member(chance: random.Random, outside: str, *, tame: bool) -> tuple[tarfile.TarInfo, bytes]:
    """A member of any kind with anything in it, or not much; `outside` is where it must not get."""
    far = (*FAR, f"{outside}/made", f"link{outside}/made")
    info = tarfile.TarInfo(chance.choice(NEAR if tame or chance.random() < 0.5 else far))
    info.type = chance.choice(KINDS[:5] if tame else KINDS)
    ways = (outside, f"{outside}/canary", "../" * 40 + outside[1:], "/proc/1/root")
    info.linkname = chance.choice((*NEAR[:6], *ways) if tame else (*NEAR, *FAR, *ways))
    info.mode = chance.choice((0, 0o644, 0o7777, 0o1000000))
    info.uid, info.gid = chance.choices(IDS[:4] if tame else IDS, k=2)
    info.mtime = chance.choice(TIMES)
    info.devmajor, info.devminor = chance.choices((0, 1, 8, 4096), k=2)
    if not tame and chance.random() < 0.2:
        info.pax_headers = dict(chance.choices(PAX, k=chance.randint(1, 3)))
    content = chance.randbytes(chance.choice((0, 1, 511, 512, 513, 5000))) if info.isreg() else b""
    info.size = len(content)
    return info, content


PAX: Final = (
    *(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "../x"), ("size", "-1")),
    *(("GNU.sparse.realsize", str(2**50)), ("GNU.sparse.map", "0,1,99999999999,1"), ("path", "/../x")),
    *(("size", str(2**63)), ("mtime", "1e999"), ("uid", "x"), ("linkpath", "\udcff"), ("path", "")),
    *(("SCHILY.xattr.user.a", "b" * 70_000), ("SCHILY.xattr.security.capability", "x"), ("a" * 3000, "b")),
    *(("SCHILY.xattr.system.posix_acl_access", "x"), ("SCHILY.xattr.trusted.overlay.opaque", "y")),
)


def an_archive(chance: random.Random, outside: str) -> bytes:
    """Members by chance, then perhaps some damage; never with compression."""
    data = bytearray()
    formats: Sequence[Literal[1, 2]] = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    tame = chance.random() < 0.5
    for _ in range(chance.randint(0, 12)):
        info, content = a_member(chance, outside, tame=tame)
        data += (
            info.tobuf(chance.choice(formats), "utf-8", "surrogateescape")
            + content
            + bytes(-len(content) % 512)
        )
    data += bytes(1024) if chance.random() < 0.8 else b""
    if not tame and chance.random() < 0.5 and data:
        for _ in range(chance.randint(1, 4)):
            field = chance.choice((0, 100, 108, 116, 124, 135, 136, 156, 157, 257, 329, 345, 386, 483, 500))
            place = chance.randrange(0, len(data), 512)
            data[place + field] = chance.randrange(256)
            data[place + 148 : place + 156] = b" " * 8  # so that the damage gets behind the checksum
            data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    if chance.random() < 0.15 and data:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


def a_bomb(chance: random.Random, _: str) -> bytes:
    """Little that says it is much: holes, entries, names."""
    match chance.choice(("hole", "entries", "announced", "deep", "links")):
        case "hole":
            info = tarfile.TarInfo("hole")
            info.pax_headers = {
                "GNU.sparse.major": "0",
                "GNU.sparse.minor": "1",
                "GNU.sparse.size": str(chance.choice((2**40, 2**62, 2**63))),
                "GNU.sparse.map": "0,0",
            }
            return info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
        case "entries":
            block = tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)
            return block * 50_000 + bytes(1024)
        case "announced":
            info = tarfile.TarInfo("x")
            info.size = chance.choice((2**33, 2**62))
            return info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16)
        case "deep":
            names = ["d/" * depth + "d" for depth in range(1, 1500, 7)]
            return b"".join(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT) for name in names) + bytes(1024)
        case _:
            info = tarfile.TarInfo("x")
            links = [info.tobuf(tarfile.GNU_FORMAT)]
            for number in range(3000):
                info = tarfile.TarInfo(f"l{number}")
                info.type, info.linkname = tarfile.LNKTYPE, "x"
                links.append(info.tobuf(tarfile.GNU_FORMAT))
            return b"".join(links) + bytes(1024)


def changed_anywhere(chance: random.Random, data: bytes) -> bytes:
    """Damage what is compressed: change it, cut it, have more behind it."""
    match chance.choice(("flip", "cut", "more", "twice")):
        case "flip":
            place = chance.randrange(len(data) or 1)
            return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        case "cut":
            return data[: chance.randrange(len(data) or 1)]
        case "more":
            return data + chance.randbytes(600)
        case _:
            return data * 2


def harmless(chance: random.Random) -> tuple[bytes, dict[str, bytes]]:
    """An archive with nothing wrong in it, and the files that have to come out."""
    sizes = (0, 1, 512, 70_000)
    files = {f"d{chance.randrange(5)}/f{n}": chance.randbytes(chance.choice(sizes)) for n in range(9)}
    out = io.BytesIO()
    format_ = chance.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), chance.choice((0, 1, 10**9))
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue(), files


class Mail:
    """What takes archives, with a place beside it that nothing may get to."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        directory.mkdir()
        self._chance = chance
        self._directory = directory
        self._outside = directory / "outside"
        self._outside.mkdir()
        (self._outside / "canary").write_text("alive")
        self._status = (self._outside / "canary").lstat()
        self._context = directory / "context"
        self._context.mkdir()

    def goes_on(self, effort: Effort) -> None:
        """Have one archive after the other taken."""
        works: dict[str, Callable[[str], None]] = {
            "archives": partial(self.hostile, make=an_archive),
            "bombs": partial(self.hostile, make=a_bomb),
            "good archives": self.harmless,
        }
        while effort.goes_on():
            way = self._chance.choice(("base import", "base import", "images load", "images load", "ADD"))
            kind = self._chance.choice(
                ("archives", "archives", "archives", "archives", "bombs", "good archives")
            )
            effort.attempt(f"{kind} for {way}", partial(works[kind], way))

    def hostile(self, way: str, make: Callable[[random.Random, str], bytes]) -> None:
        """Have an archive taken that should better not be."""
        suffix = self._chance.choice(list(COMPRESSIONS))
        data = make(self._chance, str(self._outside))
        if way == "images load" and self._chance.random() < 0.8:
            data = self._image(data)
        data = COMPRESSIONS[suffix](data)
        if self._chance.random() < 0.2:
            data = changed_anywhere(self._chance, data)
        with fresh_store(self._directory, {"FIREBUILD_PULL": "never"}) as store:
            self._take(store, way, data, suffix)
        self._nothing_is_outside()

    def harmless(self, way: str) -> None:
        """Have an archive taken that is as it should be: its files are in the image, and no others."""
        suffix = self._chance.choice(list(COMPRESSIONS))
        data, files = harmless(self._chance)
        with fresh_store(self._directory, {"FIREBUILD_PULL": "never"}) as store:
            assert self._take(store, way, COMPRESSIONS[suffix](data), suffix), "it was refused"
            (self._context / "Dockerfile").write_text("FROM taken:1\n")
            made = self._directory / "made.tar"
            made.unlink(missing_ok=True)
            ended = store.run("build", "-q", "-t", "made:1", "-o", f"tar,dest={made}", self._context)
            assert ended.status == 0, ended
            with tarfile.open(made) as archive:
                members = [member for member in archive if member.isreg()]
                found = {member.name.removeprefix("./"): self._read(archive, member) for member in members}
        wanted = {f"x/{name}" if way == "ADD" else name: content for name, content in files.items()}
        assert found == wanted, (sorted(found), sorted(wanted))

    def _read(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()

    def _take(self, store: Store, way: str, data: bytes, suffix: str) -> bool:
        path = self._context / f"archive.tar{suffix}"
        path.write_bytes(data)
        try:
            match way:
                case "base import":
                    ended = store.run("base", "import", "taken:1", path)
                case "images load":
                    ended = store.run("images", "load", "--name", "taken:1", path)
                case _:
                    (self._context / "Dockerfile").write_text(f"FROM scratch\nADD {path.name} /x/\n")
                    ended = store.run("build", "-q", "-t", "taken:1", self._context)
        finally:
            path.unlink()
        return ended.status == 0

    def _image(self, layer: bytes) -> bytes:
        """An archive of an image with this layer, as an OCI layout or as docker saves it, perhaps changed."""
        from assurance.hostile_registry import changed

        chance = self._chance
        platform = Platform.host()
        config: Any = {"os": platform.os, "architecture": platform.architecture, "config": {},
                       "rootfs": {"type": "layers", "diff_ids": [digest(layer)]}}  # fmt: skip
        config = canonical(changed(chance, config) if chance.random() < 0.2 else config)
        plain = LAYER.removesuffix("+gzip")
        manifest: Any = {"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG, config),
                         "layers": [descriptor(plain, layer)]}  # fmt: skip
        manifest = canonical(changed(chance, manifest) if chance.random() < 0.3 else manifest)
        index: Any = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor(MANIFEST, manifest)]}
        saved: Any = [{"Config": "config.json", "RepoTags": ["taken:1"], "Layers": ["layer.tar"]}]
        if chance.random() < 0.3:
            index, saved = changed(chance, index), changed(chance, saved)
        if chance.random() < 0.5:
            files = {
                "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
                "index.json": json.dumps(index).encode(),
            }
            files |= {f"blobs/sha256/{digest(one)[7:]}": one for one in (config, manifest, layer)}
        else:
            files = {"manifest.json": json.dumps(saved).encode(), "config.json": config, "layer.tar": layer}
        names = list(files)
        out = bytearray()
        for name in names if chance.random() < 0.7 else chance.choices(names, k=len(names) + 2):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            if chance.random() < 0.05:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, f"{self._outside}/canary", 0
            out += info.tobuf(tarfile.GNU_FORMAT)
            if info.size:
                out += files[name] + bytes(-len(files[name]) % 512)
        return bytes(out) + bytes(1024)

    def _nothing_is_outside(self) -> None:
        assert [path.name for path in self._outside.iterdir()] == ["canary"]
        now = (self._outside / "canary").lstat()
        wanted = self._status
        assert (now.st_mode, now.st_uid, now.st_size, now.st_mtime_ns, now.st_nlink, now.st_ino) == (
            (
                wanted.st_mode,
                wanted.st_uid,
                wanted.st_size,
                wanted.st_mtime_ns,
                wanted.st_nlink,
                wanted.st_ino,
            )
        )


@trial(
    "hostile-archives",
    "archives by chance, damaged or hostile, and good ones, for images load, base import and ADD",
    seconds=240,
    needs=("userns",),
)
def archives(effort: Effort) -> None:
    """Have archives taken: good ones come out whole, others are refused in words or stay where they are."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        seeds = [effort.chance.getrandbits(64) for _ in range(AT_ONCE)]
        mails = [Mail(effort.directory / str(n), random.Random(seed)) for n, seed in enumerate(seeds)]
        list(pool.map(lambda mail: mail.goes_on(effort), mails))
