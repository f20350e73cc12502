"""How the metadata service answers a guest: requests in, responses out, no sockets.

The rules are Firecracker's (docs/mmds/mmds-user-guide.md of firecracker-microvm/firecracker), so that a
guest that works here works there.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import field
from enum import Enum
from typing import Any, Final
from urllib.parse import urlsplit

from firebuild_bootstrap.mmds.store import DataStore, ResourceNotFound, compact_json
from firebuild_pki.values import dataclass

MAX_REQUEST_BYTES: Final = 2500
TOKEN_PATH: Final = "/latest/api/token"  # noqa: S105 - a path
MAX_TOKEN_TTL: Final = 21_600
# Session tokens and their aliases came to V1 with this release.
_TOKENS_EVERYWHERE: Final = (1, 13)
# Those that Firecracker's HTTP server knows at all.
_METHODS: Final = ("GET", "PUT", "PATCH")
_TEXT: Final = "text/plain"
_JSON: Final = "application/json"


class MmdsVersion(Enum):
    """V2 wants a session token with every read, V1 does not."""

    V1 = "V1"
    V2 = "V2"


class BadRequest(ValueError):
    """The bytes are not a request that the service reads."""


@dataclass(frozen=True)
class Request:
    """A request as the service sees it; header names are in lower case."""

    method: str
    target: str
    http_version: str = "HTTP/1.1"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> str:
        """The path of the target, which may be an absolute URI; empty where it has none."""
        if self.target.startswith("/"):
            return self.target
        try:
            return urlsplit(self.target).path
        except (
            ValueError
        ):  # brackets that hold no IPv6 address; which texts those are differs between Pythons
            return ""

    @property
    def keep_alive(self) -> bool:
        """Whether the connection may carry another request (RFC 9112, section 9.3)."""
        wish = self.headers.get("connection", "").lower()
        return wish == "keep-alive" if self.http_version == "HTTP/1.0" else wish != "close"


@dataclass(frozen=True)
class Response:
    """A response; `headers` come on top of the length and type of the body."""

    status: int
    body: str = field(default="", repr=False)
    content_type: str = _TEXT
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, *, keep_alive: bool) -> bytes:
        """Return the bytes on the wire."""
        body = self.body.encode()
        headers = {
            "Server": "Firecracker API",
            "Connection": "keep-alive" if keep_alive else "close",
            "Content-Type": self.content_type,
            "Content-Length": str(len(body)),
            **self.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status} {_REASONS[self.status]}\r\n{head}\r\n".encode("latin-1") + body


_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    501: "Not Implemented",
}


def parse_request(buffer: bytes) -> tuple[Request, int] | None:
    """Read one request from the start of `buffer`.

    Returns:
        The request and the bytes that it took, or None while it is incomplete.

    Raises:
        BadRequest: it is malformed or longer than `MAX_REQUEST_BYTES`.
    """
    head, separator, _ = buffer[:MAX_REQUEST_BYTES].partition(b"\r\n\r\n")
    if not separator:
        if len(buffer) >= MAX_REQUEST_BYTES:
            raise BadRequest(f"A request must not be longer than {MAX_REQUEST_BYTES} bytes.")
        return None
    line, *header_lines = head.decode("latin-1").split("\r\n")
    parts = line.split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.0", "HTTP/1.1") or not parts[1]:
        raise BadRequest("Invalid request line.")
    headers = _parse_headers(header_lines)
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise BadRequest("Invalid Content-Length.")
    total = len(head) + len(separator) + int(length)
    if total > MAX_REQUEST_BYTES:
        raise BadRequest(f"A request must not be longer than {MAX_REQUEST_BYTES} bytes.")
    return (Request(parts[0], parts[1], parts[2], headers), total) if len(buffer) >= total else None


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise BadRequest("Invalid header line.")
        headers[name.lower()] = value.strip()
    if "transfer-encoding" in headers:
        raise BadRequest("Transfer-Encoding is not supported.")
    return headers


class TokenIssuer:
    """Session tokens that carry their own expiry under a signature, so that none has to be remembered.

    Args:
        clock: seconds that only ever grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)

    def issue(self, ttl: int) -> str:
        """Return a token that is good for `ttl` seconds."""
        claim = struct.pack(">d16s", self._clock() + ttl, secrets.token_bytes(16))
        return base64.urlsafe_b64encode(claim + self._sign(claim)).decode("ascii")

    def is_valid(self, token: str) -> bool:
        """Tell whether `token` was issued here and has not expired."""
        try:
            raw = base64.b64decode(token.encode("latin-1"), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return False
        claim, signature = raw[:24], raw[24:]
        if len(claim) != 24 or not hmac.compare_digest(signature, self._sign(claim)):
            return False
        expires: float = struct.unpack(">d16s", claim)[0]
        return self._clock() < expires

    def _sign(self, claim: bytes) -> bytes:
        return hmac.digest(self._key, claim, "sha256")


class MetadataService:
    """Answers requests from one store.

    Args:
        store: where the values come from.
        version: V1 or V2, as in `PUT /mmds/config`.
        release: the Firecracker release to behave like; from 1.13 V1 issues tokens too, and the
            `X-aws-ec2-…` names of the token headers are known.
        clock: seconds that only ever grow; tokens expire by it.
    """

    def __init__(
        self,
        store: DataStore,
        *,
        clock: Callable[[], float],
        version: MmdsVersion = MmdsVersion.V2,
        release: tuple[int, int] = _TOKENS_EVERYWHERE,
    ) -> None:
        self._store = store
        self._version = version
        self._has_tokens = version is MmdsVersion.V2 or release >= _TOKENS_EVERYWHERE
        self._prefixes: tuple[str, ...] = ("x-metadata-token",)
        if release >= _TOKENS_EVERYWHERE:
            self._prefixes += ("x-aws-ec2-metadata-token",)
        self._tokens = TokenIssuer(clock)

    def respond(self, request: Request) -> Response:
        """Return the answer to `request`; never raises for anything that a guest can send."""
        if request.method not in _METHODS:
            return Response(501, "Unsupported HTTP method.")
        if not request.path:
            return Response(400, "Invalid URI.")
        if request.method == "GET":
            return self._get(request)
        if request.method == "PUT" and self._has_tokens:
            return self._put(request)
        allowed = "GET, PUT" if self._has_tokens else "GET"
        return Response(405, "Not allowed HTTP method.", headers={"Allow": allowed})

    def _get(self, request: Request) -> Response:
        if self._version is MmdsVersion.V2:
            token = self._header(request, "")
            if token is None:
                return Response(401, f"No MMDS token provided. Use {self._names('')} to send one.")
            if not self._tokens.is_valid(token):
                return Response(401, "MMDS token not valid.")
        try:
            value = self._store.get(_pointer(request.path).removesuffix("/"))
        except ResourceNotFound:
            return Response(404, f"Resource not found: {request.path}.")
        if request.headers.get("accept") == _JSON:
            return Response(200, compact_json(value), _JSON)
        return _imds(value)

    def _put(self, request: Request) -> Response:
        if "x-forwarded-for" in request.headers:
            return Response(400, "Invalid header: X-Forwarded-For is not allowed.")
        if _pointer(request.path) != TOKEN_PATH:
            return Response(404, f"Resource not found: {request.path}.")
        ttl = self._header(request, "-ttl-seconds")
        if ttl is None:
            return Response(
                400, f"Token time to live value not found. Use {self._names('-ttl-seconds')} to send it."
            )
        if not (ttl.isascii() and ttl.isdigit() and len(ttl) <= 10 and 1 <= int(ttl) <= MAX_TOKEN_TTL):
            return Response(
                400, f"Invalid time to live value provided for token: 1 to {MAX_TOKEN_TTL} is valid."
            )
        return Response(200, self._tokens.issue(int(ttl)))

    def _header(self, request: Request, suffix: str) -> str | None:
        names = (prefix + suffix for prefix in self._prefixes)
        return next((request.headers[name] for name in names if name in request.headers), None)

    def _names(self, suffix: str) -> str:
        return " or ".join(f"`X{prefix[1:]}{suffix}`" for prefix in self._prefixes)


def _pointer(path: str) -> str:
    return re.sub("/{2,}", "/", path)


def _imds(value: Any) -> Response:
    if isinstance(value, Mapping):
        names = (f"{key}/" if isinstance(value[key], Mapping) else key for key in sorted(value))
        return Response(200, "\n".join(names))
    if isinstance(value, str):
        return Response(200, value)
    return Response(501, "Cannot retrieve value. The value has an unsupported type.")
