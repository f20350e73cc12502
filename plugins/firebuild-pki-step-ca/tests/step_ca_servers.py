"""Real step-ca servers for the tests: keys and certificates of our own, and a ca.json written by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from firebuild_pki import Authority, Profile, ProviderContext, open_authority
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import Validity, make_intermediate, make_leaf, make_root, to_pem
from joserfc.jwk import ECKey, OKPKey

from firebuild_pki_step_ca import StepCAProvider, StepCASettings

FETCHED: Final = Path("/var/cache/firebuild-tests/step-ca")
PASSWORD: Final = "correct horse battery staple"
JWK: Final = {"method": "jwk", "provisioner": "builds", "password": {"env": "PASSWORD"}}
ROUNDS: Final = 10_000  # step writes 600,000, which cost a second of each test
TEMPLATE: Final = """{{ range .SANs }}
{{ if not (or (and (eq .Type "dns") (hasSuffix ".firebuild.internal" .Value))
              (and (eq .Type "uri") (hasPrefix "spiffe://firebuild.internal/" .Value))) }}
{{ fail "not a name of a build" }}{{ end }}{{ end }}{
  "subject": {"commonName": {{ toJson .Subject.CommonName }}},
  "sans": {{ toJson .SANs }},
  "keyUsage": ["digitalSignature"],
  "extKeyUsage": {{ toJson .Token.firebuild.usages }}
}"""
ANY_USE: Final = TEMPLATE.replace("{{ toJson .Token.firebuild.usages }}", '["any"]')
BRIEF: Final = {"maxTLSCertDuration": "10m", "defaultTLSCertDuration": "5m"}


def program() -> str | None:
    """Find step-ca: on PATH, or where `fetch` puts it."""
    return shutil.which("step-ca") or shutil.which("step-ca", path=str(FETCHED))


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Pki:
    """The files of one step-ca, and the keys of its provisioners."""

    home: Path
    jwk: ECKey
    other_jwk: ECKey
    edwards: OKPKey = field(default_factory=lambda: OKPKey.generate_key("Ed25519"))

    def __getattr__(self, name: str) -> Path:
        """``root`` is root.pem, ``client_key`` is client-key.pem."""
        return self.home / f"{name.replace('_', '-')}.pem"

    def encrypted(self, key: ECKey | OKPKey | None = None, rounds: int = ROUNDS) -> str:
        """Encrypt a key as `step` does."""
        return encrypt(json.dumps((key or self.jwk).as_dict(private=True)), rounds)


def encrypt(text: str, rounds: int) -> str:
    header = {"alg": "PBES2-HS256+A128KW", "enc": "A256GCM", "p2c": rounds, "p2s": base64url(b"salt" * 4)}
    protected = base64url(json.dumps(header).encode())
    salt = b"PBES2-HS256+A128KW\0" + b"salt" * 4
    derived = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), salt, rounds, 16)
    key, nonce = os.urandom(32), os.urandom(12)
    sealed = AESGCM(key).encrypt(nonce, text.encode(), protected.encode())
    parts = (aes_key_wrap(derived, key), nonce, sealed[:-16], sealed[-16:])
    return ".".join([protected, *map(base64url, parts)])


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def make_pki(home: Path) -> Pki:
    validity = Validity.starting(now(), timedelta(days=30), backdate=timedelta(minutes=5))
    root = make_root(generate_key(), validity, with_intermediate=True)
    issuer = make_intermediate(generate_key(), root, validity)
    for name, ca in {"root": root, "ca": issuer}.items():
        write(home, name, to_pem([ca.certificate]))
        write(home, f"{name}-key", private_key_pem(ca.key))
    stranger = make_root(generate_key(), validity, with_intermediate=False)
    write(home, "stranger", to_pem([stranger.certificate]))
    for name, ca in {"client": issuer, "strange-client": stranger}.items():
        key = generate_key()
        leaf = make_leaf(
            key.public_key(), ca, validity, profile=Profile.GUEST, dns_names=("builder.example",)
        )
        above = [] if ca is stranger else [issuer.certificate]
        write(home, name, to_pem([leaf, *above]))
        write(home, f"{name}-key", private_key_pem(key))
        if ca is issuer:
            write(home, f"locked-{name}", to_pem([leaf, *above]))
            write(home, f"locked-{name}-key", locked(key))
    return Pki(home, ECKey.generate_key("P-256"), ECKey.generate_key("P-256"))


def locked(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    encryption = serialization.BestAvailableEncryption(PASSWORD.encode())
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, form, encryption)
    return pem


def write(home: Path, name: str, pem: bytes) -> Path:
    path = home / f"{name}.pem"
    path.touch(mode=0o600)
    path.write_bytes(pem)
    return path


def provisioners(pki: Pki) -> list[dict[str, Any]]:
    public = {**pki.jwk.as_dict(private=False), "kid": pki.jwk.thumbprint(), "use": "sig", "alg": "ES256"}
    usages = {"options": {"x509": {"template": TEMPLATE}}}
    jwk = {"type": "JWK", "key": public, "encryptedKey": pki.encrypted()}
    roots = base64.b64encode(pki.root.read_bytes()).decode()
    return [
        {**jwk, "name": "builds", **usages},
        {**jwk, "name": "plain", "encryptedKey": ""},
        {
            **jwk,
            "name": "brief",
            **usages,
            "claims": BRIEF,
        },
        {
            **jwk,
            "name": "any-use",
            "options": {"x509": {"template": ANY_USE}},
        },
        {
            "type": "JWK",
            "name": "edwards",
            "key": {**pki.edwards.as_dict(private=False), "kid": "edwards", "use": "sig", "alg": "EdDSA"},
            **usages,
        },
        {"type": "X5C", "name": "certified", "roots": roots, **usages},
    ]


@contextmanager
def serving(pki: Pki, **changes: Any) -> Iterator[str]:
    """Run a step-ca; yield its URL."""
    for attempt in range(5):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        home = pki.home / f"server-{port}-{attempt}"
        home.mkdir()
        config: dict[str, Any] = {
            "root": str(pki.root),
            "crt": str(pki.ca),
            "key": str(pki.ca_key),
            "address": f"127.0.0.1:{port}",
            "dnsNames": ["127.0.0.1", "localhost"],
            "db": {"type": "badgerv2", "dataSource": str(home / "db")},
            "logger": {"format": "text"},
            "authority": {"provisioners": provisioners(pki), **changes},
        }
        (home / "ca.json").write_text(json.dumps(config))
        with (home / "log").open("wb") as log:
            command = [str(program()), str(home / "ca.json")]
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            if _listens(port, process):
                yield f"https://127.0.0.1:{port}"
                return
        finally:
            process.kill()
            process.wait()
    raise RuntimeError(f"step-ca does not start: {(home / 'log').read_text()}")


@contextmanager
def saying(pki: Pki, pieces: Callable[[], Iterable[bytes]]) -> Iterator[str]:
    """Run what is no step-ca, with the certificate of its intermediate; yield its URL.

    Args:
        pki: has the certificate and its key.
        pieces: makes what a client is sent once it has asked, which may be without end.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pki.ca, pki.ca_key)

    def answer() -> None:
        while True:
            with suppress(OSError), listener.accept()[0] as accepted:
                accepted.settimeout(60)
                with tls.wrap_socket(accepted, server_side=True) as client:
                    client.recv(1 << 16)
                    for piece in takewhile(lambda _: not over.is_set(), pieces()):
                        client.sendall(piece)
            if over.is_set():
                return

    over, thread = threading.Event(), threading.Thread(target=answer)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread.start()
        try:
            yield f"https://127.0.0.1:{port}"
        finally:
            over.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 45
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def section(address: str, pki: Pki, auth: Mapping[str, Any] | None = None, **block: Any) -> dict[str, Any]:
    """Write the section ``ca`` for a server."""
    return {
        "provider": "step-ca",
        "step-ca": {
            "address": address,
            "root": str(pki.root),
            "auth": {**JWK, **(auth or {})},
            "attempts": 1,
            **block,
        },
    }


def x5c(pki: Pki, name: str = "client", **more: Any) -> dict[str, Any]:
    files = {"cert_file": str(pki.home / f"{name}.pem"), "key_file": str(pki.home / f"{name}-key.pem")}
    return {"method": "x5c", "provisioner": "certified", **files, **more}


def opened(written: Mapping[str, Any], clock: Any = now, **environ: str) -> Authority:
    """Open an authority."""
    return open_authority(written, build_id="b1", clock=clock, environ={"PASSWORD": PASSWORD, **environ})


def bare(written: Mapping[str, Any], clock: Any = now, **environ: str) -> StepCAProvider:
    """Make the provider itself, without the framework around it."""
    settings = StepCASettings.model_validate(written["step-ca"])
    return StepCAProvider(settings, ProviderContext(clock, {"PASSWORD": PASSWORD, **environ}))


def leaf_of(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def required() -> bool:
    return bool(os.environ.get("TESTS_REQUIRE_ALL"))
