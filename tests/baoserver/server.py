"""A server of its own: for development (in memory, unsealed), or with storage."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import requests

from baoserver.api import Api
from baoserver.process import Process, free_port

READY_WITHIN = 45.0
"""Seconds that a server, or an election, may take on a busy machine."""

_ATTEMPTS = 5


class ServerFailed(Exception):
    """A server did not start, or did not get ready; the message ends with its log."""


def wait_until(condition: Callable[[], object], what: str, log: Callable[[], str] | None = None) -> None:
    """Poll until a condition holds; refused connections count as "not yet".

    Args:
        condition: called a few times per second.
        what: named in the error.
        log: returns what explains a failure.

    Raises:
        ServerFailed: it did not hold within `READY_WITHIN` seconds.
    """
    end = time.monotonic() + READY_WITHIN
    while time.monotonic() < end:
        try:
            if condition():
                return
        except requests.RequestException:
            pass
        time.sleep(0.05)
    raise ServerFailed(f"{what}: not within {READY_WITHIN:g} s\n{log() if log else ''}")


class Server(ABC):
    """What all servers have in common. Use it in a ``with`` block, or call `start` and `stop`.

    Args:
        parent: where its own directory is made; removed at the end.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="bao-", dir=parent))
        self.port = free_port()
        self._process: Process | None = None
        self._last_log = ""

    scheme = "http"

    @property
    def address(self) -> str:
        """URL of the API."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def ca_file(self) -> Path | None:
        """What to check its TLS certificate against; None without TLS."""
        return None

    @property
    @abstractmethod
    def root_token(self) -> str:
        """A token that may do anything."""

    @property
    def api(self) -> Api:
        """The API, with the root token."""
        return Api(self.address, self.root_token, ca_file=self.ca_file)

    @property
    def anonymous(self) -> Api:
        """The API, without a token."""
        return Api(self.address, ca_file=self.ca_file)

    @property
    def process(self) -> Process:
        """The running process."""
        if self._process is None:
            raise ServerFailed("the server was not started")
        return self._process

    @property
    def log(self) -> str:
        """All that it has written in its present run."""
        return self._process.log if self._process and self.directory.exists() else self._last_log

    def start(self) -> Self:
        """Start it and wait until it answers; on another port if its own was taken meanwhile."""
        for _ in range(_ATTEMPTS):
            self._process = Process(self._arguments(), self.directory, self.directory / "log")
            wait_until(lambda: not self.process.is_alive or self._answers(), "bao server", lambda: self.log)
            if self._process.is_alive:
                return self
            if not self._process.lost_its_port() or not self._may_move():
                break
            self.port = free_port()
        raise ServerFailed(f"bao server ended while starting\n{self.log}")

    def stop(self) -> None:
        """End it in good order."""
        if self._process:
            self._process.stop()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            print(f"log of the server at {self.address}:\n{self.log}")  # pytest shows it with the failure
        self.close()

    def close(self) -> None:
        """End it for good and remove its directory."""
        if self._process:
            self._process.kill()
        self._last_log = self.log
        shutil.rmtree(self.directory, ignore_errors=True)

    @abstractmethod
    def _arguments(self) -> list[str]: ...

    def _may_move(self) -> bool:
        return True

    def _answers(self) -> bool:
        # Any answer will do: sealed and uninitialised servers answer as well.
        return self.anonymous.request("GET", "sys/seal-status").ok


class DevServer(Server):
    """A server for development: in memory, unsealed, gone when it stops.

    Args:
        parent: where its own directory is made; removed at the end.
        tls: serve https; `ca_file` is what to trust.
    """

    def __init__(self, parent: Path | None = None, *, tls: bool = False) -> None:
        super().__init__(parent)
        self._tls = tls
        self.scheme = "https" if tls else "http"

    @property
    def root_token(self) -> str:
        """A token that may do anything."""
        return "root-of-tests"

    @property
    def ca_file(self) -> Path | None:
        """The CA that made the server's certificate."""
        return self.directory / "vault-ca.pem" if self._tls else None

    def _arguments(self) -> list[str]:
        tls = ["-dev-tls", f"-dev-tls-cert-dir={self.directory}"] if self._tls else []
        listen = f"-dev-listen-address=127.0.0.1:{self.port}"
        return ["-dev", f"-dev-root-token-id={self.root_token}", listen, *tls]

    def _answers(self) -> bool:
        if self.ca_file and not self.ca_file.exists():
            return False
        # The last step of a dev server's start is a mount; before that the root token may be missing.
        return "server started!" in self.log and self.anonymous.request("GET", "sys/health").ok


class StoredServer(Server):
    """A server from a configuration file, initialised and unsealed by `start`.

    Stopped and started again it has the same port and, except with ``inmem``, the same data.

    Args:
        parent: where its own directory is made; removed at the end.
        storage: on disk (``raft``; OpenBao has no ``file``), or in memory.
        unseal: whether `start` also unseals.
    """

    def __init__(
        self,
        parent: Path | None = None,
        *,
        storage: Literal["raft", "inmem"] = "raft",
        unseal: bool = True,
    ) -> None:
        super().__init__(parent)
        self._storage = storage
        self._unseal_at_start = unseal
        self.unseal_key = ""
        self._root_token = ""

    @property
    def root_token(self) -> str:
        """A token that may do anything; empty before the first start."""
        return self._root_token

    @property
    def is_sealed(self) -> bool:
        """Whether it is sealed now."""
        return bool(self._seal_status()["sealed"])

    def start(self) -> Self:
        """Start it; the first time also initialise it; unseal it unless told otherwise."""
        super().start()
        if not self._seal_status()["initialized"]:
            self.initialise()
        if self._unseal_at_start:
            self.unseal()
        return self

    def initialise(self) -> None:
        """Make the unseal key and the root token."""
        made = self.anonymous.call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self.unseal_key, self._root_token = made["keys"][0], made["root_token"]

    def seal(self) -> None:
        """Seal it: from now on it answers 503."""
        self.api.call("PUT", "sys/seal")

    def unseal(self) -> None:
        """Unseal it and wait until it can sign."""
        self.send_unseal_key()
        wait_until(lambda: self.anonymous.request("GET", "sys/health").ok, "active", lambda: self.log)

    def send_unseal_key(self) -> bool:
        """Send the unseal key once; tell whether the server is unsealed then."""
        answer = self.anonymous.request("PUT", "sys/unseal", {"key": self.unseal_key})
        return answer.ok and not answer.json()["sealed"]

    def configuration(self) -> dict[str, Any]:
        """Return what goes into the configuration file."""
        port = {"address": f"127.0.0.1:{self.port}", "cluster_address": f"127.0.0.1:{self.port + 1}"}
        return {
            "storage": {self._storage: self._storage_settings()},
            "listener": [{"tcp": {**port, "tls_disable": True}}],
            "api_addr": self.address,
            "cluster_addr": f"https://127.0.0.1:{self.port + 1}",
        }

    def _storage_settings(self) -> dict[str, Any]:
        if self._storage == "inmem":
            return {}
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        # The fastest elections; the default is for networks, not for loopback.
        return {"path": str(data), "node_id": self.directory.name, "performance_multiplier": 1}

    def _arguments(self) -> list[str]:
        file = self.directory / "config.json"
        file.write_text(json.dumps(self.configuration()))
        return [f"-config={file}"]

    def _may_move(self) -> bool:
        return not self._root_token  # later on, clients know the address

    def _seal_status(self) -> dict[str, Any]:
        return self.anonymous.call("GET", "sys/seal-status")
