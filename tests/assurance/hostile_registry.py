"""Registries that lie, to those who pull, build and look for a cache."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import zstandard

from assurance.stores import Store, fresh_store
from assurance.trials import Effort, trial
from firebuild_bootstrap.image.oci import CONFIG, INDEX, LAYER, MANIFEST, canonical
from firebuild_bootstrap.image.platforms import Platform
from registry.servers import (
    AUTH,
    CA,
    PASSWORD,
    USER,
    Behaviour,
    Handler,
    descriptor,
    digest,
    once,
    small_registry,
    wants_basic,
)

AT_ONCE: Final = 2
"""Registries, each with its client."""
BIG: Final = 1 << 40
NUMBERS: Final = (0, -1, 1, 2**31, 2**63, 10**30, 1.5, "1", None, True)
TYPES: Final = (MANIFEST, INDEX, LAYER, "text/html")
WORDS: Final = (
    *(
        "",
        "../../../etc/passwd",
        "/etc/passwd",
        "sha256:../../x",
        "sha256:" + "0" * 64,
        "sha512:" + "0" * 128,
    ),
    *("a\x1b[31mb", "\0", "x" * 100_000, "ü", *TYPES),
)
PLACES: Final = (
    *("http://registry.example/x", "file:///etc/passwd", "//registry.example/x", "ftp://x/y", "https://", ""),
    *("https://[", "data:,x", "gopher://x", "http://localhost:1/", "\x7f", "https://x:99999/", "?"),
    *("http://registry.example:80/v2/", "unix:///run/docker.sock", "https://user:word@x/"),
)


def a_layer(files: dict[str, bytes]) -> bytes:
    """A layer as a registry has it: a compressed tar archive."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(plain.getvalue(), 1, mtime=0)


LAYERS: Final = (
    a_layer({"etc/a": b"one", "data": random.Random(1).randbytes(700_000)}),
    a_layer({"b": b"two"}),
)


def a_config(layers: tuple[bytes, ...], platform: Platform) -> bytes:
    diff_ids = [digest(gzip.decompress(layer)) for layer in layers]
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    return canonical(
        {"os": platform.os, "architecture": platform.architecture, "rootfs": rootfs, "config": {}}
    )


class Town:
    """A registry with an image and a cache, another one, what http requests go to, and who asks them."""

    def __init__(self, directory: Path, cleanup: ExitStack, seed: int) -> None:
        directory.mkdir()
        self.directory = directory
        self.chance = random.Random(seed)
        ca = CA.made(directory)
        self.small = cleanup.enter_context(small_registry(ca.server_context()))
        self.other = cleanup.enter_context(small_registry(ca.server_context()))
        self.plain = cleanup.enter_context(small_registry(None))
        ours = f"ca_file: {ca.certificate}, username: {USER}, password: {{env: REGISTRY_PASSWORD}}"
        config = directory / "firebuild.yaml"
        config.write_text(
            f"registries: {{timeout: 1s, attempts: 2, hosts: {{'{self.small.host}': {{{ours}}}, "
            f"'{self.other.host}': {{ca_file: {ca.certificate}}}}}}}\n"
        )
        self.environ = {
            "REGISTRY_PASSWORD": PASSWORD,
            "FIREBUILD_CONFIG": str(config),
            "FIREBUILD_PULL": "missing",
            "HOME": str(directory),
            "http_proxy": self.plain.url,  # which sees whatever is asked in plain http of other machines
            "no_proxy": "localhost",
        }
        self.config = a_config(LAYERS, Platform.host())
        self.manifest = canonical(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": descriptor(CONFIG, self.config),
                "layers": [descriptor(LAYER, layer) for layer in LAYERS],
            }
        )
        for server in (self.small, self.other):
            server.blobs |= {digest(blob): blob for blob in (self.config, *LAYERS)}
            server.name(MANIFEST, self.manifest, "1")
        self.image = f"{self.small.host}/app"
        self._context("from", f"FROM {self.image}:1\nCOPY f /f\n")
        # The tags of this registry are those of all its repositories.
        self.cache = f"type=registry,ref={self.small.host}/cache:records"
        self._digests = dict[str, str]()
        self._context("cached", "FROM scratch\nCOPY f /f\nCOPY g /g\nWORKDIR /w\n")

    def _context(self, name: str, dockerfile: str) -> None:
        (self.directory / name).mkdir()
        for file in ("f", "g"):
            (self.directory / name / file).write_bytes(random.Random(file).randbytes(100_000))
        (self.directory / name / "Dockerfile").write_text(dockerfile)

    def _honest(self, name: str, *words: str) -> str:
        """What a build says where the registry is honest; it is asked once, and before it lies."""
        if name not in self._digests:
            self.small.behaviours.clear()
            with self.fresh() as store:
                ended = store.run("build", "-q", "-t", f"{name}:1", *words, self.directory / name)
            assert ended.status == 0, ended
            self._digests[name] = ended.out
        return self._digests[name]

    @contextmanager
    def fresh(self) -> Iterator[Store]:
        """Have an empty store."""
        with fresh_store(self.directory, self.environ) as store:
            yield store

    # --- what is asked ------------------------------------------------------------------------------

    def asks(self, lie: str) -> None:
        """Have the registry lie in one way, give one command, and see what comes of it."""
        ways = (*(self._pull, self._pull_by_digest) * 3, self._from, self._cached)
        way = self.chance.choice(ways)
        if way == self._from:
            self._honest("from")
        elif way == self._cached:
            self._honest("cached", "--cache-to", self.cache)
        for server in (self.small, self.other, self.plain):
            server.requests.clear()
        self.small.behaviours[:] = [wants_basic] if self.chance.random() < 0.5 else []
        self.small.behaviours.append(LIES[lie](self))
        with self.fresh() as store:
            way(store, lie in NEW_IMAGES)
            for blob in (store.home / "blobs/sha256").glob("[0-9a-f]*"):
                data = blob.read_bytes() if blob.is_file() else None
                assert data is None or hashlib.sha256(data).hexdigest() == blob.name, blob
        self._told_nobody()

    def _pull(self, store: Store, other: bool) -> None:
        ended = self._run(store, "images", "pull", f"{self.image}:1")
        if ended and not other:
            self._has_all(store)

    def _pull_by_digest(self, store: Store, _: bool) -> None:
        if self._run(store, "images", "pull", f"{self.image}@{digest(self.manifest)}"):
            self._has_all(store)

    def _from(self, store: Store, other: bool) -> None:
        told = self._run(store, "build", "-q", "-t", "from:1", self.directory / "from")
        assert not told or other or told == self._honest("from"), told

    def _cached(self, store: Store, _: bool) -> None:
        """Whatever a cache says, the build is what it is without."""
        words = ("build", "-q", "-t", "cached:1", "--cache-from", self.cache)
        assert self._run(store, *words, self.directory / "cached") == self._honest("cached")

    def _run(self, store: Store, *words: str | Path) -> str:
        """Run a command; return what it says, or nothing if it refuses."""
        ended = store.run(*words)
        for secret in (PASSWORD, AUTH):
            assert secret not in ended.out + ended.err
        return "" if ended.status else ended.out or "done"

    def _has_all(self, store: Store) -> None:
        there = {path.name for path in (store.home / "blobs/sha256").iterdir()}
        wanted = {digest(blob).removeprefix("sha256:") for blob in (self.config, *LAYERS)}
        assert wanted <= there, there

    def _told_nobody(self) -> None:
        """See that the login went to the registry alone, and nothing out in plain text."""
        assert self.plain.requests == []
        for _, path, headers in self.other.requests:
            secrets = [name for name, value in headers.items() if AUTH in value or PASSWORD in value]
            assert secrets == [], path
            assert AUTH not in path


# --- answers that lie ----------------------------------------------------------------------------------

Answer = Callable[[Handler], None]


def honest(handler: Handler) -> bytes:
    """What an honest registry had sent."""
    name = handler.path.rpartition("/")[2]
    server = handler.server
    return server.manifests[name][1] if name in server.manifests else server.blobs.get(name, b"not here")


def sends(
    handler: Handler,
    data: bytes,
    headers: Mapping[str, str] = {},
    *,
    length: int | None = None,
    status: int = 200,
) -> None:
    """Send this, which may be other than what is announced."""
    handler.close_connection = True
    with suppress(OSError):
        handler.answer(
            status, data, **{"Content-Length": str(len(data) if length is None else length), **headers}
        )


def pours(handler: Handler, head: bytes, piece: bytes, pause: float = 0.0, seconds: float = 30.0) -> None:
    """Send a head and then the same again and again."""
    handler.close_connection = True
    end = time.monotonic() + seconds
    with suppress(OSError):
        handler.wfile.write(head)
        while time.monotonic() < end:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)


def somewhere(town: Town, answer: Answer) -> Behaviour:
    """Answer so to some requests, each time or the first few."""
    places = ("/manifests/", "/blobs/", "/v2/", digest(LAYERS[0]), digest(LAYERS[1]), digest(town.config))
    return once(town.chance.choice(places), answer, times=town.chance.choice((-1, -1, 1, 2)))


def flipped(town: Town) -> Behaviour:
    def answer(handler: Handler) -> None:
        data = bytearray(honest(handler))
        data[town.chance.randrange(len(data))] ^= 1 << town.chance.randrange(8)
        sends(handler, bytes(data))

    return somewhere(town, answer)


def cut(town: Town) -> Behaviour:
    def answer(handler: Handler) -> None:
        data = honest(handler)
        sends(handler, data[: town.chance.randrange(len(data))], length=len(data))

    return somewhere(town, answer)


def wrong_sizes(town: Town) -> Behaviour:
    def answer(handler: Handler) -> None:
        data = honest(handler)
        lengths = (None, len(data), 0, len(data) + 1, BIG, 2**63, -1)
        other = town.chance.choice((data[:-1], data + b"x", data * 2, b"", data))
        sends(handler, other, length=town.chance.choice(lengths))

    return somewhere(town, answer)


def endless(town: Town) -> Behaviour:
    heads = (b"", b"Content-Length: %d\r\n" % BIG, b"Transfer-Encoding: chunked\r\n", b"X-Long: ")

    def answer(handler: Handler) -> None:
        piece = town.chance.choice((b"x" * 0x10000, b"10000\r\n" + bytes(0x10000) + b"\r\n", b"{" * 1000))
        pours(handler, b"HTTP/1.1 200 OK\r\n" + town.chance.choice(heads) + b"\r\n", piece)

    return somewhere(town, answer)


def slow(town: Town) -> Behaviour:
    heads = (
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 404 No\r\n\r\n",
    )

    def answer(handler: Handler) -> None:
        pours(handler, town.chance.choice(heads), b"x", pause=0.1, seconds=8)

    return somewhere(town, answer)


def storms(town: Town) -> Behaviour:
    dates = ("Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 1900 00:00:00 GMT")
    waits = ("0", "1", "3600", "-1", "1e400", "nan", "x", *dates)
    passing, odd = (429, 429, 408, 500, 502, 503, 504), (401, 403, 404, 416, 100, 204, 206, 304, 999)
    bodies = (b"", b"<html>", b'{"errors": [{"code": "X", "message": "\\u001b[2J"}]}', b"[" * 9000)

    def answer(handler: Handler) -> None:
        status, said = town.chance.choice((*passing, *odd)), town.chance.choice(bodies)
        sends(handler, said, {"Retry-After": town.chance.choice(waits)}, status=status)

    return somewhere(town, answer)


def redirects(town: Town) -> Behaviour:
    def answer(handler: Handler) -> None:
        places = (*PLACES, f"{town.other.url}{handler.path}", handler.path, f"{town.other.url}/nothing", "..")
        place = town.chance.choice(places)
        sends(handler, b"", {"Location": place}, status=town.chance.choice((301, 302, 303, 307, 308)))

    return somewhere(town, answer)


def foreign_realms(town: Town) -> Behaviour:
    """Ask for a token of a realm that is no realm."""
    scope = 'service="s",scope="repository:app:pull"'

    def answer(handler: Handler) -> None:
        realm = town.chance.choice([place for place in PLACES if "localhost" not in place])
        challenges = (
            f'Bearer realm="{realm}",{scope}',
            "Bearer",
            'Bearer realm="',
            "Basic,Bearer,," * 500,
            "Digest x=y",
        )
        sends(handler, b"", {"WWW-Authenticate": town.chance.choice(challenges)}, status=401)

    return once("/v2/", answer, times=-1)


def realms_that_lie(town: Town) -> Behaviour:
    """Ask for a token of our own realm, which answers anything."""
    answers = (
        *(b"", b"[]", b'{"token": 1}', b'{"token": "a\\r\\nX: y"}', b"{" * 9999, b'{"token": "\\ud800"}'),
        *(
            b'{"token": "t", "expires_in": 1e999}',
            b'{"token": "t", "expires_in": NaN}',
            b'{"access_token": "t"}',
        ),
    )

    def answer(handler: Handler) -> None:
        if handler.path.startswith("/realm"):
            match town.chance.choice(("answer", "redirect", "endless", "status")):
                case "answer":
                    sends(handler, town.chance.choice(answers))
                case "redirect":
                    sends(handler, b"", {"Location": f"{town.other.url}/realm"}, status=307)
                case "endless":
                    pours(handler, b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 16))
                case _:
                    sends(handler, b"{}", status=town.chance.choice((400, 401, 403, 418, 500)))
        elif handler.headers.get("Authorization") == "Bearer t":
            handler.serve()
        else:
            sends(handler, b"", {"WWW-Authenticate": f'Bearer realm="{town.small.url}/realm"'}, status=401)

    return once("/", answer, times=-1)


def odd_heads(town: Town) -> Behaviour:
    heads = (
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nxx\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nxx\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(1 << 24)),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 300,
        b"HTTP/1.1 200 OK\r\nContent-Type: \xff\x1b[2J\r\nDocker-Content-Digest: md5:\x1b\r\n\r\n{}",
        b"\r\n\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",
    )

    def answer(handler: Handler) -> None:
        pours(handler, town.chance.choice((*heads, town.chance.randbytes(3000))), b"", seconds=0)

    return somewhere(town, answer)


def swapped(town: Town) -> Behaviour:
    """Send something else that this registry has, with its type and its digest."""

    def answer(handler: Handler) -> None:
        data = town.chance.choice(
            [*town.small.blobs.values(), *(one for _, one in town.small.manifests.values())]
        )
        kind = town.chance.choice(TYPES)
        sends(handler, data, {"Content-Type": kind, "Docker-Content-Digest": digest(honest(handler))})

    return somewhere(town, answer)


# --- images that lie -----------------------------------------------------------------------------------


def changed(chance: random.Random, document: Any) -> Any:
    """Change one value somewhere in a document, or leave it out, or double it."""
    if isinstance(document, dict) and document and chance.random() < 0.85:
        key = chance.choice(sorted(document))
        if chance.random() < 0.15:
            return {name: value for name, value in document.items() if name != key}
        return {**document, key: changed(chance, document[key])}
    if isinstance(document, list) and document and chance.random() < 0.7:
        place = chance.randrange(len(document))
        return [*document[:place], changed(chance, document[place]), *document[place + 1 :]]
    if isinstance(document, list) and document:
        return document * chance.choice((0, 2, 500))
    return chance.choice((*NUMBERS, *WORDS, [], {}, [[]], {"": {}}))


def manifests_that_lie(town: Town) -> Behaviour:
    """Have a manifest that is changed somewhere, nested, or too large; its own digest is right."""
    chance = town.chance
    whole = json.loads(town.manifest)
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor(INDEX, town.manifest)]}
    loop = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [{"mediaType": INDEX, "digest": "1", "size": 2}],
    }
    data = chance.choice(
        (
            canonical(changed(chance, changed(chance, whole))),
            canonical(changed(chance, whole)),
            canonical(changed(chance, index)),
            canonical(loop),
            canonical({**whole, "layers": whole["layers"] * 3000}),
            canonical({**whole, "annotations": {"a\x1b[2J": "b" * 3_000_000}}),
            b"[" * chance.choice((500, 100_000)),
            b'{"a":' * 50_000,
            town.manifest[: chance.randrange(len(town.manifest))],
            b"{" + b" " * 5_000_000 + b"}",
            b'{"schemaVersion": 2, "schemaVersion": NaN}',
            b"\xff\xfe{}",
        )
    )
    kind = chance.choice(
        (MANIFEST, MANIFEST, INDEX, "", "text/plain", "application/vnd.docker.distribution.manifest.v1+json")
    )
    return once("/manifests/", lambda handler: sends(handler, data, {"Content-Type": kind}), times=-1)


def new_image(town: Town, config: bytes, *layers: tuple[str, bytes], announce: int = 0) -> Behaviour:
    """Have an image of these instead."""
    parts = [{**descriptor(kind, data), "size": len(data) + announce} for kind, data in layers]
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, config),
        "layers": parts,
    }
    manifest = canonical(document)
    blobs = {digest(data): data for data in (config, *(data for _, data in layers))}

    def answer(handler: Handler) -> None:
        name = handler.path.rpartition("/")[2]
        if "/manifests/" in handler.path:
            sends(handler, manifest, {"Content-Type": MANIFEST})
        else:
            sends(handler, blobs.get(name, b""), status=200 if name in blobs else 404)

    return once("/v2/app/", answer, times=-1)


def configs_that_lie(town: Town) -> Behaviour:
    config = canonical(changed(town.chance, json.loads(town.config)))
    odd = (config, b"[]", b"{}", b"{" * 50_000, b"", b"null", town.config[:-1])
    return new_image(town, town.chance.choice(odd), *((LAYER, layer) for layer in LAYERS))


def layers_that_lie(town: Town) -> Behaviour:
    """Have layers that are not what their config says, of hostile archives, or bombs."""
    from assurance.hostile_archives import an_archive

    chance = town.chance
    plain = an_archive(chance, "/nowhere")
    zeros = bytes(1 << 20)
    blob, kind = chance.choice(
        (
            (gzip.compress(plain, 1), LAYER),
            (plain, LAYER.removesuffix("+gzip")),
            (zstandard.compress(plain), LAYER.replace("+gzip", "+zstd")),
            (gzip.compress(plain, 1)[: chance.randrange(20, 5000)], LAYER),
            (gzip.compress(plain, 1) + b"rubbish", LAYER),
            (gzip.compress(zeros * 100, 1), LAYER),
            (zstandard.compress(zeros * 100), LAYER.replace("+gzip", "+zstd")),
            (b"", LAYER),
            (LAYERS[0], LAYER.replace("+gzip", "+zstd")),
        )
    )
    diff_id = digest(plain) if chance.random() < 0.7 else "sha256:" + "0" * 64
    config = {**json.loads(town.config), "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    return new_image(town, canonical(config), (kind, blob), announce=chance.choice((0, 0, 0, 1, -1, BIG)))


LIES: Final[dict[str, Callable[[Town], Behaviour]]] = {
    "flipped bits": flipped,
    "bodies that are cut off": cut,
    "wrong sizes": wrong_sizes,
    "bodies and heads without end": endless,
    "slow bodies": slow,
    "storms of refusals": storms,
    "redirects": redirects,
    "foreign realms": foreign_realms,
    "realms that lie": realms_that_lie,
    "odd heads": odd_heads,
    "swapped answers": swapped,
    "manifests that lie": manifests_that_lie,
    "configs that lie": configs_that_lie,
    "layers that lie": layers_that_lie,
}
NEW_IMAGES: Final = {"manifests that lie", "configs that lie", "layers that lie", "swapped answers"}
"""With these a tag may well name another image."""


@trial(
    "hostile-registries",
    "a registry that lies to pulls, builds and caches",
    seconds=240,
    needs=("userns",),
)
def registries(effort: Effort) -> None:
    """Give commands to registries that lie; each gets the right bytes, or says why not."""
    with ExitStack() as cleanup, ThreadPoolExecutor(AT_ONCE) as pool:
        seeds = [effort.chance.getrandbits(64) for _ in range(AT_ONCE if effort.seconds > 30 else 1)]
        towns = [Town(effort.directory / str(n), cleanup, seed) for n, seed in enumerate(seeds)]

        def go_on(town: Town) -> None:
            while effort.goes_on():
                for lie in effort.shuffled(LIES):
                    effort.attempt(lie, partial(town.asks, lie))

        list(pool.map(go_on, towns))
