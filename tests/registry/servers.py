"""A CA, Debian's registry below it, and a small registry that does what it is told, wrong or right."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from firebuild_bootstrap.image.oci import CONFIG, INDEX, LAYER, MANIFEST, canonical
from firebuild_bootstrap.image.platforms import Platform
from firebuild_pki import Profile
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import Validity, make_leaf, make_root, to_pem
from support import serving

USER, PASSWORD = "user", "secret-of-the-registry"
AUTH = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
BASIC = f"Basic {AUTH}"
# `htpasswd -nbB -C 5` of both
HTPASSWD = "user:$2y$05$xa7oyO13azczrpdqUr3RTemi1x5vsiaRvE.HPMbzJ2vpau1rnkmOG\n"


@dataclass(frozen=True)
class CA:
    """A CA in files, and a certificate of it for localhost."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def key(self) -> Path:
        return self.directory / "ca-key.pem"

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.directory / "localhost.pem", self.directory / "localhost-key.pem"

    @classmethod
    def made(cls, directory: Path, name: str = "localhost", profile: Profile = Profile.SERVER) -> CA:
        now = datetime.now(UTC)
        validity = Validity(now - timedelta(hours=1), now + timedelta(days=1))
        issuer = make_root(generate_key(), validity, with_intermediate=False)
        key = generate_key()
        leaf = make_leaf(key.public_key(), issuer, validity, profile=profile, dns_names=[name])
        made = cls(directory)
        for path, content in (
            (made.certificate, to_pem([issuer.certificate])),
            (made.key, private_key_pem(issuer.key)),
            (made.pair[0], to_pem([leaf])),
            (made.pair[1], private_key_pem(key)),
        ):
            path.write_bytes(content)
            path.chmod(0o600)
        return made

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.pair)
        return context


@contextmanager
def debian_registry(directory: Path, ca: CA) -> Iterator[str]:
    """Run Debian's `docker-registry` with TLS and a login; yields its host."""
    (directory / "htpasswd").write_text(HTPASSWD)
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
        "http": {
            "addr": "localhost:0",
            "secret": "x",
            "tls": {"certificate": str(ca.pair[0]), "key": str(ca.pair[1])},
        },
        "auth": {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}},
    }
    (directory / "config.yml").write_text(json.dumps(config))  # which is YAML
    command = ["docker-registry", "serve", str(directory / "config.yml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        try:
            port = next(
                found[1] for line in process.stderr if (found := re.search(r"listening on .*?:(\d+)", line))
            )
            drain = threading.Thread(target=process.stderr.read, daemon=True)
            drain.start()
            yield f"localhost:{port}"
        finally:
            process.kill()
            process.wait()
            drain.join()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


@dataclass
class Image:
    """An image of some layers, whose content nobody looks at."""

    layers: tuple[bytes, ...] = (b"first layer " * 4000, b"second layer")
    platform: Platform = field(default_factory=Platform.host)

    @property
    def config(self) -> bytes:
        document = {
            "os": self.platform.os,
            "architecture": self.platform.architecture,
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in self.layers]},
            "config": {"Cmd": ["/bin/true"]},
        }
        return canonical(document)

    @property
    def manifest(self) -> bytes:
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, self.config),
            "layers": [descriptor(LAYER, layer) for layer in self.layers],
        }
        return canonical(document)


class Handler(BaseHTTPRequestHandler):
    """One request to a `Small` registry."""

    protocol_version = "HTTP/1.1"
    server: Small

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers.items())))
        for behave in self.server.behaviours:
            if behave(self):
                return
        self.serve()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def serve(self) -> None:
        """Do what a registry does."""
        kind, _, name = self.path.rpartition("/")
        if kind == "/uploads":
            self.upload(name)
        elif self.command == "PUT":
            self.take(kind, name)
        elif kind.endswith("/manifests") and name in self.server.manifests:
            media_type, data = self.server.manifests[name]
            extra = {"Docker-Content-Digest": digest(data), "Content-Type": media_type}
            self.answer(200, data, **extra)
        elif kind.endswith("/blobs") and name in self.server.blobs:
            data = self.server.blobs[name]
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if found:
                begin = int(found[1])
                there = f"bytes {begin}-{len(data) - 1}/{len(data)}"
                self.answer(206, data[begin:], **{"Content-Range": there})
            else:
                self.answer(200, data)
        elif self.command == "POST":
            number = str(next(self.server.numbers))
            self.server.uploads[number] = bytearray()
            self.answer(202, b"", Location=f"/uploads/{number}?state=x%2Fy", **self.server.begins)
        else:
            self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "not here"}]}')

    def upload(self, name: str) -> None:
        """Take a blob or a part of one, or say how much there is (end-5, end-6, end-13)."""
        number = name.partition("?")[0]
        if self.command == "PUT":
            self.server.uploads.setdefault(number, bytearray())
        taken = self.server.uploads.get(number)
        if taken is None or self.command == "DELETE":
            self.answer(404 if taken is None else 204)
            return
        begin, left = len(taken), int(self.headers.get("Content-Length", "0"))
        place = self.headers.get("Content-Range", "0-")
        while left and (piece := self.rfile.read1(min(left, 1 << 16))):
            taken += piece
            left -= len(piece)
        if left:
            self.close_connection = True
        elif self.command == "PUT":
            self.server.blobs[digest(bytes(taken))] = bytes(self.server.uploads.pop(number))
            self.answer(201)
        elif self.command == "PATCH" and place.partition("-")[0] != str(begin):
            del taken[begin:]
            self.answer(416)
        else:
            where = {"Location": f"/uploads/{number}?state=z", "Range": f"0-{max(len(taken) - 1, 0)}"}
            self.answer(202 if self.command == "PATCH" else 204, b"", **where)

    def take(self, kind: str, name: str) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if kind.endswith("/manifests"):
            self.server.name(self.headers["Content-Type"], data, name)
        else:
            self.server.blobs[digest(data)] = data
        self.answer(201)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self, body: bytes, announced: int) -> None:
        """Send a part of what was announced, and hang up."""
        self.answer(200, body, **{"Content-Length": str(announced)})
        self.close_connection = True


Behaviour = Callable[[Handler], bool]


class Small(ThreadingHTTPServer):
    """A registry that keeps everything in memory, and behaves as it is told first."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.behaviours: list[Behaviour] = []
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.numbers = itertools.count(1)  # of uploads; several begin and end side by side
        self.begins: dict[str, str] = {}  # headers of what begins an upload
        self._tls = tls
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def host(self) -> str:
        return f"localhost:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://{self.host}"

    def get_request(self) -> tuple[object, object]:  # type: ignore[override]
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake belongs to the handler, which closes the connection when it fails.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        pass

    def add(self, image: Image, *tags: str) -> str:
        """Have an image; returns the digest of its manifest."""
        for blob in (image.config, *image.layers):
            self.blobs[digest(blob)] = blob
        return self.name(MANIFEST, image.manifest, *tags)

    def add_index(self, images: dict[Platform, Image], *tags: str) -> str:
        """Have several images under one tag."""
        members = []
        for platform, image in images.items():
            self.add(image)
            where = {"os": platform.os, "architecture": platform.architecture, "variant": platform.variant}
            members.append({**descriptor(MANIFEST, image.manifest), "platform": where})
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": members}
        return self.name(INDEX, canonical(document), *tags)

    def name(self, media_type: str, data: bytes, *tags: str) -> str:
        for name in (*tags, digest(data)):
            self.manifests[name] = (media_type, data)
        return digest(data)

    def asked(self, *methods: str) -> list[str]:
        """The paths that were asked for, in order."""
        return [path for method, path, _ in self.requests if method in methods or not methods]


@contextmanager
def small_registry(tls: ssl.SSLContext | None) -> Iterator[Small]:
    server = Small(tls)
    with serving(server):
        yield server


def once(path: str, act: Callable[[Handler], None], *, times: int = 1) -> Behaviour:
    """Behave so at the first requests whose path has `path` in it."""
    left = [times]

    def behave(handler: Handler) -> bool:
        if path not in handler.path or not left[0]:
            return False
        left[0] -= 1
        act(handler)
        return True

    return behave


def always(path: str, act: Callable[[Handler], None]) -> Behaviour:
    return once(path, act, times=-1)


def wants_basic(handler: Handler) -> bool:
    if handler.headers.get("Authorization") == BASIC:
        return False
    handler.answer(401, b'{"errors": [{"code": "UNAUTHORIZED"}]}', **{"WWW-Authenticate": 'Basic realm="x"'})
    return True
