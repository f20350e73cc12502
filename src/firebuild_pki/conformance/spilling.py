"""Looking for secrets where none may be."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Violation
from firebuild_pki.settings import SecretRef

MIN_LENGTH = 8
"""A shorter text may stand anywhere by chance."""

Path = tuple[str | int, ...]


def secret_refs(settings: object, at: Path = ()) -> Iterator[tuple[Path, SecretRef]]:
    """Find the references to secrets in validated settings, each with its path."""
    if isinstance(settings, SecretRef):
        yield at, settings
    elif isinstance(settings, BaseModel):
        for name in type(settings).model_fields:
            yield from secret_refs(getattr(settings, name), (*at, name))
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from secret_refs(value, (*at, key))
    elif isinstance(settings, Sequence) and not isinstance(settings, str | bytes):
        for index, value in enumerate(settings):
            yield from secret_refs(value, (*at, index))


def dotted(path: Path) -> str:
    """Write a path the way messages do."""
    return ".".join(map(str, path))


@dataclass(frozen=True, slots=True)
class Spill:
    """The secrets of a provider under test, by what they are called."""

    secrets: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, bench: Bench, planted: Mapping[str, str], more: Iterable[str]) -> Spill:
        """Gather the planted ones, those that the settings refer to, and more."""
        referred = {
            dotted(path): ref.resolve(bench.environ)
            for path, ref in secret_refs(bench.settings.provider_settings)
        }
        listed = {f"number {number} of ca_secrets": text for number, text in enumerate(more, 1)}
        return cls({**planted, **referred, **listed})

    def must_not_be_in(self, text: str, where: str) -> None:
        """Look for the secrets, and for private keys.

        Raises:
            Violation: one is there; the message names it and does not show it.
        """
        if "PRIVATE KEY-----" in text:
            raise Violation(f"a private key in {where}")
        for label, secret in self.secrets.items():
            if any(part in text for part in _recognisable(secret)):
                raise Violation(f"the secret {label} in {where}")


def _recognisable(secret: str) -> list[str]:
    # of a key in PEM, one line is enough
    lines = [line.strip() for line in secret.splitlines()]
    return [line for line in lines if len(line) >= MIN_LENGTH and not line.startswith("-----")]


@dataclass(slots=True)
class Record:
    """What was logged and raised."""

    lines: list[str] = field(default_factory=list)

    def add_error(self, error: BaseException) -> None:
        """Keep an error the way Python prints it, with causes."""
        self.lines.append("".join(traceback.format_exception(error)))

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.lines)


class _Recorder(logging.Handler):
    def __init__(self, record: Record) -> None:
        super().__init__(logging.DEBUG)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        self._record.lines.append(self.format(record))


@contextmanager
def recorded_logs() -> Iterator[Record]:
    """Record what all loggers say, at level DEBUG, and Python's warnings."""
    record = Record()
    handler, root = _Recorder(record), logging.getLogger()
    level, showwarning = root.level, warnings.showwarning

    def show(message: Warning | str, *more: Any, **named: Any) -> None:
        record.lines.append(str(message))
        showwarning(message, *more, **named)

    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    warnings.showwarning = show
    try:
        yield record
    finally:
        warnings.showwarning = showwarning
        root.setLevel(level)
        root.removeHandler(handler)


def with_secret(settings: Any, path: Path, ref: Mapping[str, str]) -> Any:
    """Copy raw settings, with another reference to a secret at the path.

    Args:
        settings: mappings and lists, as read from YAML; what is missing on the way is made.
        path: from there to the reference.
        ref: the reference to set.
    """
    if not path:
        return dict(ref)
    key, *below = path
    if isinstance(key, int):
        copy = list(settings)
        copy[key] = with_secret(copy[key], tuple(below), ref)
        return copy
    inner = settings.get(key) if settings else None
    return {**(settings or {}), key: with_secret(inner, tuple(below), ref)}
