"""A provider in front of a scripted server, with a time of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime

from firebuild_pki import ProviderContext
from firebuild_pki.providers.vault.nodes import Timing
from firebuild_pki.providers.vault.provider import VaultProvider
from pki_vault.scripted import FakeTime, Reply
from pki_vault.tools import ca_settings

LOGIN = Reply(200, {"auth": {"client_token": "s.made", "token_type": "service"}})
AGAIN = Reply(200, {"auth": {"client_token": "s.made-again", "token_type": "service"}})
APPROLE = {"method": "approle", "role_id": {"env": "R"}, "secret_id": {"env": "S"}}


@contextmanager
def logging_in(
    *addresses: str, time: FakeTime, retry_for: float = 30, timeout: float = 5
) -> Iterator[VaultProvider]:
    """A provider that is not open yet, with a time of its own."""
    settings = ca_settings(
        {"address": list(addresses), "server_role": "s", "guest_role": "g", "auth": APPROLE}
    )
    context = ProviderContext(lambda: datetime.now(UTC), {"R": "r0123456789", "S": "s0123456789"})
    timing = Timing(timeout, retry_for, time.monotonic, time.sleep)
    provider = VaultProvider(settings.provider_settings, context, timing)  # type: ignore[arg-type]
    try:
        yield provider
    finally:
        provider.close()


def patiently(address: str, *, timeout: float) -> AbstractContextManager[VaultProvider]:
    """The same in real time, without retries."""
    clock = FakeTime()
    clock.monotonic = time.monotonic  # type: ignore[method-assign]
    return logging_in(address, time=clock, retry_for=0, timeout=timeout)
