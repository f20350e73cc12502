"""An operator with a shell: CAs and certificates made by the real `openssl`, in a directory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from firebuild_pki import Authority, CASettings, PluginCatalog, open_authority
from firebuild_pki.provider import utc_now
from pki.tools import ca_settings

CATALOG = PluginCatalog(
    providers=[EntryPoint("file", "firebuild_pki.providers.file", "firebuild_pki.providers")]
)

CA = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash"
LEAF = (
    "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
    "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid"
)
SERVER = f"{LEAF}\nextendedKeyUsage=serverAuth\nsubjectAltName=DNS:builds.example.com"
CLIENT = f"{LEAF}\nextendedKeyUsage=clientAuth\nsubjectAltName=DNS:guest.example.com"


def later(**by: float) -> Callable[[], datetime]:
    """A clock that is so much ahead, or behind."""
    return lambda: datetime.now(UTC) + timedelta(**by)


def settings_of(block: Mapping[str, Any], **section: Any) -> CASettings:
    return ca_settings({"provider": "file", "file": dict(block), **section}, CATALOG)


def opened(
    block: Mapping[str, Any] | None = None,
    *,
    clock: Callable[[], datetime] = utc_now,
    environ: Mapping[str, str] | None = None,
    **more: Any,
) -> Authority:
    """Open an authority with the settings of `ca.file`."""
    written = {key: _plain(value) for key, value in {**(block or {}), **more}.items()}
    return open_authority(settings_of(written), build_id="b", clock=clock, environ=environ or {})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [str(one) for one in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Shop:
    """A directory, and the commands that an operator runs in it. Names are without their suffix."""

    place: Path

    def openssl(self, *arguments: str, given: bytes | None = None, both: bool = False) -> bytes:
        done = subprocess.run(
            ["openssl", *arguments], cwd=self.place, input=given, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout + done.stderr if both else done.stdout

    def path(self, name: str) -> Path:
        return self.place / name

    def write(self, name: str, *parts: bytes | str) -> Path:
        data = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
        self.path(name).write_bytes(data)
        self.path(name).chmod(0o600)
        return self.path(name)

    def read(self, *names: str) -> bytes:
        return b"".join(self.path(name).read_bytes() for name in names)

    def key(self, name: str, *kind: str) -> Path:
        """Make a private key in `name.key`; a P-256 one unless told otherwise."""
        if not self.path(f"{name}.key").exists():
            kind = kind or ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
            self.openssl("genpkey", *kind, "-out", f"{name}.key")
            self.path(f"{name}.key").chmod(0o600)
        return self.path(f"{name}.key")

    def root(
        self,
        name: str = "root",
        *,
        extensions: str = CA,
        subject: str | None = None,
        days: int = 3650,
        more: tuple[str, ...] = (),
    ) -> Path:
        """Make a self-signed certificate in `name.pem`."""
        self.key(name)
        added = [part for line in extensions.splitlines() for part in ("-addext", line)]
        config = self.write("empty.cnf", "[req]\ndistinguished_name=dn\n[dn]\n")
        self.openssl(
            *("req", "-x509", "-new", "-config", str(config), "-key", f"{name}.key"),
            *("-subj", subject or f"/O=Operator/CN={name}", "-days", str(days)),
            *("-out", f"{name}.pem", *added, *more),
        )
        return self.path(f"{name}.pem")

    def issue(
        self,
        name: str,
        by: str,
        extensions: str = f"{CA}\nauthorityKeyIdentifier=keyid",
        *,
        subject: str | None = None,
        days: int = 1000,
        more: tuple[str, ...] = (),
    ) -> Path:
        """Make a certificate in `name.pem` that another CA signs."""
        self.key(name)
        request = self.request(name, subject)
        written = self.write(f"{name}.ext", extensions)
        self.openssl(
            *("x509", "-req", "-in", request.name, "-CA", f"{by}.pem", "-CAkey", f"{by}.key"),
            *("-CAcreateserial", "-days", str(days), "-extfile", written.name, "-out", f"{name}.pem", *more),
        )
        return self.path(f"{name}.pem")

    def request(self, name: str, subject: str | None = None) -> Path:
        """Make a signing request in `name.csr`."""
        config = self.write("empty.cnf", "[req]\ndistinguished_name=dn\n[dn]\n")
        self.key(name)
        self.openssl(
            *("req", "-new", "-config", str(config), "-key", f"{name}.key"),
            *("-subj", subject or f"/O=Operator/CN={name}", "-out", f"{name}.csr"),
        )
        return self.path(f"{name}.csr")
