"""The errors of the CA framework: one small tree, every leaf of it says what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from firebuild_pki.values import dataclass

_MOST_CAUSES: Final = 100


class CAError(Exception):
    """Anything that keeps the framework from handing out TLS material.

    Args:
        message: what was expected and what was found, in one sentence.
        provider: name of the provider that is to blame, as written in the configuration.
        hint: what the reader can do about it.
        retryable: whether the same call may succeed later without any change by a human.
    """

    def __init__(
        self,
        message: str,
        *,
        provider: str | None = None,
        hint: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.provider = provider
        self.hint = hint
        self.retryable = retryable

    def __str__(self) -> str:
        prefix = f"ca-provider({self.provider}): " if self.provider else ""
        suffix = f" (hint: {self.hint})" if self.hint else ""
        return f"{prefix}{self.message}{suffix}"


class IdentityError(CAError, ValueError):
    """A build id, a name or a label is not one: no DNS name, no URI, too long."""


class AuthorityClosed(CAError):
    """The authority was used before it was opened or after it was closed."""


class ProviderNotFound(CAError):
    """No installed plugin has the wanted name."""


class ProviderConflict(CAError):
    """Two installed plugins claim the same name, and neither may win silently."""


class ProviderLoadError(CAError):
    """A plugin was found, but it cannot be used: import failure, wrong version, wrong hook."""


class ProviderError(CAError):
    """A provider failed while doing its work; the original exception is ``__cause__``."""


class KeyStoreError(CAError):
    """A key store cannot open a key, or sign with it."""


class UnsupportedOperation(CAError):
    """The provider does not have the capability that was asked for."""


class MaterialError(CAError):
    """What a provider handed back fails the framework's own checks (see ``verify.py``)."""


class SecretError(CAError):
    """A secret reference points at nothing: variable unset, file missing or empty."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in the settings, and where it is.

    Args:
        source: file name, ``environment variable NAME`` or another origin.
        line: 1-based line in the file, or None where there are no lines.
        column: 1-based column in the file, or None where there are no columns.
        path: dotted YAML path of the setting, empty for the whole document.
        message: what was expected and what was found. Never the value of a secret.
        hint: what to write instead.
    """

    source: str
    line: int | None
    column: int | None
    path: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"
        path = f"{self.path}: " if self.path else ""
        hint = f" (hint: {self.hint})" if self.hint else ""
        return f"{where}: {path}{self.message}{hint}"


class SettingsError(CAError):
    """The configuration is wrong: all problems at once, each with its position.

    Args:
        problems: every problem found, in the order of the document.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def causes(
    error: BaseException | None,
    links: Callable[[BaseException], Iterable[object]] = lambda one: (one.__cause__,),
) -> Iterator[BaseException]:
    """Walk from an error to what caused it, nearest first; the only walk over a chain of exceptions.

    Args:
        error: where to begin; None yields nothing.
        links: what an exception refers to; anything else is passed over. Its `__cause__` by default.

    Yields:
        each exception once, 100 at most: others shape these chains, and one may be a circle or endless.
    """
    pending, seen = [error], list[BaseException]()
    while pending and len(seen) < _MOST_CAUSES:
        one = pending.pop(0)
        if one is None or any(one is known for known in seen):
            continue
        seen.append(one)
        yield one
        pending += [cause for cause in links(one) if isinstance(cause, BaseException)]
