"""Real cfssl servers for the tests: a CA made by cfssl itself, and servers on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from firebuild_pki import Authority, ProviderContext, open_authority

from firebuild_pki_cfssl import CfsslProvider, CfsslSettings

Clock = Callable[[], datetime]

KEY = "8d2f0c6b1a9e4f7d3c5b7a9081726354"
LABEL = "builds"
STARTS = 5

PROFILES: dict[str, dict[str, Any]] = {
    "firebuild-server": {"usages": ["digital signature", "server auth"]},
    "firebuild-guest": {"usages": ["digital signature", "client auth"]},
    "both": {"usages": ["digital signature", "server auth", "client auth"]},
    "long": {"usages": ["digital signature", "server auth"], "expiry": "720h"},
    "elsewhere": {"usages": ["digital signature", "server auth"], "name_whitelist": r"\.example$"},
    "open": {"usages": ["digital signature", "server auth"], "auth_key": None},
}


def now() -> datetime:
    return datetime.now(UTC)


def section(address: str, **block: Any) -> dict[str, Any]:
    """Write the section ``ca`` for a server; http unless the address says otherwise."""
    return {
        "provider": "cfssl",
        "cfssl": {
            "address": address if "://" in address else f"http://{address}",
            "auth_key": {"env": "CFSSL_KEY"},
            "server_profile": "firebuild-server",
            "guest_profile": "firebuild-guest",
            "attempts": 1,
            **{name: str(value) if isinstance(value, Path) else value for name, value in block.items()},
        },
    }


def opened(address: str, *, key: str = KEY, clock: Clock = now, **block: Any) -> Authority:
    """Open an authority at a server."""
    environ = {"CFSSL_KEY": key}
    return open_authority(section(address, **block), build_id="b1", clock=clock, environ=environ)


def bare(address: str, **block: Any) -> CfsslProvider:
    """Make the provider itself, without the framework around it."""
    settings = CfsslSettings.model_validate(section(address, **block)["cfssl"])
    return CfsslProvider(settings, ProviderContext(now, {"CFSSL_KEY": KEY}))


@dataclass(frozen=True)
class Pki:
    """A root, an intermediate below it, and certificates for TLS, as files."""

    home: Path

    def __getattr__(self, name: str) -> Path:
        """``root`` is root.pem, ``root_key`` is root-key.pem."""
        return self.home / f"{name.replace('_', '-')}.pem"


def make_pki(home: Path) -> Pki:
    """Make the files with cfssl, as its operators do."""
    (home / "ca.json").write_text(json.dumps(_signing(_ca_profile(), {})))
    (home / "tls.json").write_text(json.dumps(_signing(_tls_profile(), {})))
    config = {"signing": _signing_with_auth(), "auth_keys": {"firebuild": {"type": "standard", "key": KEY}}}
    (home / "config.json").write_text(json.dumps(config))
    _cert(home, "root", "-initca")
    below = ("-ca", str(home / "root.pem"), "-ca-key", str(home / "root-key.pem"), "-config")
    _cert(home, "ca", *below, str(home / "ca.json"))
    for name in ("tls", "client"):
        _cert(home, name, *below, str(home / "tls.json"), "-hostname", "127.0.0.1")
    _cert(home, "stranger", "-initca")
    return Pki(home)


def _signing_with_auth() -> dict[str, Any]:
    default = {"usages": ["digital signature"], "expiry": "65m", "backdate": "5m", "auth_key": "firebuild"}
    profiles = {
        name: {key: value for key, value in {**default, **profile}.items() if value is not None}
        for name, profile in PROFILES.items()
    }
    return {"default": default, "profiles": profiles}


def _signing(default: dict[str, Any], profiles: dict[str, Any]) -> dict[str, Any]:
    return {"signing": {"default": default, "profiles": profiles}}


def _ca_profile() -> dict[str, Any]:
    constraint = {"is_ca": True, "max_path_len": 0, "max_path_len_zero": True}
    return {"usages": ["cert sign", "crl sign"], "expiry": "8760h", "ca_constraint": constraint}


def _tls_profile() -> dict[str, Any]:
    return {"usages": ["digital signature", "server auth", "client auth"], "expiry": "24h"}


def _cert(home: Path, name: str, *arguments: str) -> None:
    request = {"CN": f"Example {name}", "key": {"algo": "ecdsa", "size": 256}}
    done = subprocess.run(
        ["cfssl", "gencert", "-loglevel=5", *arguments, "-"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.loads(done.stdout)
    (home / f"{name}.pem").write_text(made["cert"])
    (home / f"{name}-key.pem").write_text(made["key"])
    (home / f"{name}-key.pem").chmod(0o600)


@contextmanager
def serving(pki: Pki, *options: str, config: Path | None = None) -> Iterator[str]:
    """Run ``cfssl serve``; yield host and port."""
    config = config or pki.home / "config.json"
    with _running(
        pki,
        *("cfssl", "serve", "-address=127.0.0.1", "-port={port}", "-ca", str(pki.ca)),
        *("-ca-key", str(pki.ca_key), "-config", str(config), *options),
    ) as address:
        yield address


@contextmanager
def multirootca(pki: Pki, *options: str, sections: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run ``multirootca`` with one CA for each section; the value is more text for the section."""
    roots = pki.home / f"roots-{time.monotonic_ns()}.conf"
    common = f"private = file://{pki.ca_key}\ncertificate = {pki.ca}\nconfig = {pki.home}/config.json\n"
    text = [f"[ {name} ]\n{common}{more}\n" for name, more in (sections or {LABEL: ""}).items()]
    roots.write_text("\n".join(text))
    with _running(pki, "multirootca", "-a", "127.0.0.1:{port}", "-roots", str(roots), *options) as address:
        yield address


@contextmanager
def _running(pki: Pki, *command: str) -> Iterator[str]:
    for _ in range(STARTS):
        port = free_port()
        filled = [part.replace("{port}", str(port)) for part in command]
        with log_of(pki, f"127.0.0.1:{port}").open("w") as log:
            process = subprocess.Popen(filled, stdout=log, stderr=log)
        try:
            if _listens(port, process):
                yield f"127.0.0.1:{port}"
                return
        finally:
            process.kill()
            process.wait()
    raise RuntimeError(f"{command[0]} does not start")


def log_of(pki: Pki, address: str) -> Path:
    """Name the file with what a server said."""
    return pki.home / f"{address.replace(':', '-')}.log"


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
