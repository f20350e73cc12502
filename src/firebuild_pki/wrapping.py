"""Foreign exceptions in, `CAError` out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from firebuild_pki.errors import CAError, ProviderError


@contextmanager
def provider_errors(provider: str, doing: str) -> Iterator[None]:
    """Name the provider in every error that the block raises.

    Args:
        provider: its name in the configuration.
        doing: what was going on, as a noun: "signing the server certificate".

    Raises:
        ProviderError: for anything that is not a `CAError` yet; the original is its cause.
    """
    try:
        yield
    except CAError as error:
        error.provider = error.provider or provider
        raise
    except (Exception, SystemExit) as error:
        message = f"{doing} failed: {type(error).__name__}: {error}"
        retryable = isinstance(error, ConnectionError | TimeoutError)
        raise ProviderError(message, provider=provider, retryable=retryable) from error
