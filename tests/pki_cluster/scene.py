"""What the tests of faults share: a CA in a server, and authorities that use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from baoserver import (
    Api,
    AppRole,
    add_role,
    create_token,
    enable_approle,
    mount_pki,
    sign_policy,
    write_policy,
)
from firebuild_pki import Authority, CAError, CASettings, PluginCatalog, open_authority
from pki.tools import ca_settings, entry

CATALOG = PluginCatalog(providers=[entry("vault", "firebuild_pki.providers.vault")])


@dataclass(frozen=True)
class Scene:
    """A CA that is ready for builds.

    Args:
        api: with the root token.
        mount: of the PKI; also the name of its policy.
        login: of the builds.
    """

    api: Api
    mount: str
    login: AppRole

    @classmethod
    def made(cls, api: Api, mount: str) -> Scene:
        """Mount a CA, with a role per use, a policy, and AppRole."""
        mount_pki(api, mount)
        add_role(api, "server", mount=mount, use="server")
        add_role(api, "guest", mount=mount, use="client")
        policy = write_policy(api, mount, sign_policy("server", "guest", mount=mount, revoke=True))
        return cls(api, mount, enable_approle(api, policy, mount=f"{mount}-approle"))

    @property
    def environ(self) -> dict[str, str]:
        """Where the settings expect the secrets."""
        return {"ROLE_ID": self.login.role_id, "SECRET_ID": self.login.secret_id}

    def section(
        self, address: str | Sequence[str], *, framework: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Return the section `ca`.

        Args:
            address: the setting `address`.
            framework: settings beside the provider's block.
            options: settings in the provider's block.
        """
        block = {
            "address": address if isinstance(address, str) else list(address),
            "mount": self.mount,
            "server_role": "server",
            "guest_role": "guest",
            "auth": {
                "method": "approle",
                "mount": self.login.mount,
                "role_id": {"env": "ROLE_ID"},
                "secret_id": {"env": "SECRET_ID"},
            },
        }
        return {"provider": "vault", **(framework or {}), "vault": {**block, **options}}

    def settings(self, address: str | Sequence[str], **options: Any) -> CASettings:
        """Return the validated section `ca`; arguments as for `section`."""
        return ca_settings(self.section(address, **options), CATALOG)

    def open(self, address: str | Sequence[str], **options: Any) -> Authority:
        """Open an authority; arguments as for `section`."""
        return self.open_with(self.settings(address, **options))

    def open_with(self, settings: CASettings, *, ahead: timedelta = timedelta(0)) -> Authority:
        """Open an authority.

        Args:
            settings: the section `ca`.
            ahead: how far this machine's clock is ahead of the server's.
        """
        return open_authority(settings, environ=self.environ, clock=lambda: datetime.now(UTC) + ahead)

    def fixed_token(self) -> str:
        """Make a token as an operator would who gives builds nothing else."""
        return create_token(self.api, self.mount)


@dataclass
class Builds:
    """Builds in threads, each of which opens an authority and issues both certificates, repeatedly.

    Args:
        open: opens an authority.
        rounds: how many times each of them does.
    """

    rounds: int
    serials: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, number: int, opener: Callable[[], Authority]) -> None:
        """Start some builds."""
        for _ in range(number):
            thread = threading.Thread(target=self._run, args=(opener,))
            self._threads.append(thread)
            thread.start()

    def wait_for(self, certificates: int) -> None:
        """Wait until so many certificates were issued, by all builds together."""
        end = time.monotonic() + 60
        while len(self.serials) < certificates and not self.errors:
            assert time.monotonic() < end, f"only {len(self.serials)} certificates"
            time.sleep(0.01)

    def finish(self) -> None:
        """Wait for all builds; raise the errors of those that failed."""
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise ExceptionGroup("builds failed", [e for e in self.errors if isinstance(e, Exception)])

    def _run(self, opener: Callable[[], Authority]) -> None:
        try:
            for _ in range(self.rounds):
                with opener() as authority:
                    for issue in (authority.issue_server, authority.issue_guest):
                        self.serials.append(issue().fingerprint_sha256)
        except BaseException as error:
            self.errors.append(error)


@dataclass
class Failure:
    """How an operation failed, and after how many seconds."""

    error: CAError | None = None
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The message for the user."""
        return str(self.error)


@contextmanager
def failing() -> Iterator[Failure]:
    """Expect the block to end with an error for the user, and measure the time."""
    failure = Failure()
    start = time.monotonic()
    with pytest.raises(CAError) as caught:
        yield failure
    failure.error, failure.seconds = caught.value, time.monotonic() - start


def sockets() -> set[str]:
    """Name the sockets that this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def provider_threads() -> list[str]:
    """Name the living threads of providers."""
    return [thread.name for thread in threading.enumerate() if "ca-provider" in thread.name]
