"""Looking for secrets where none may be."""

from __future__ import annotations

import base64
import json
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Any
from unittest import mock
from urllib.parse import quote, quote_plus

from pydantic import BaseModel

from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Violation
from firebuild_pki.settings import SecretRef
from firebuild_pki.values import dataclass

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
            parts = _recognisable(secret)
            if any(part in text for part in parts):
                raise Violation(f"the secret {label} in {where}")
            for how, encoded in _encoded(parts):
                if encoded in text:
                    raise Violation(f"the secret {label} in {where}, as {how}")


def _recognisable(secret: str) -> list[str]:
    # of a key in PEM, one line is enough
    lines = [line.strip() for line in secret.splitlines()]
    return [line for line in lines if len(line) >= MIN_LENGTH and not line.startswith("-----")]


def _encoded(parts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The ways in which HTTP, shells and dumps write a text; reading them back takes a moment."""
    for part in parts:
        yield from encodings(part.encode())
        yield "an escaped string", json.dumps(part)[1:-1]
        yield "part of a URL", quote(part, safe="")
        yield "part of a URL", quote_plus(part)


def encodings(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield how bytes are written as text, also in the midst of a longer text, with the names of the ways."""
    yield "hexadecimal digits", data.hex()
    # in "user:password" a secret begins at any of three places in a group of four characters
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encode(b"\0" * before + data).rstrip(b"=").decode()
            yield "base64", whole[(before * 8 + 5) // 6 : -1]


@dataclass(frozen=False, slots=True)
class Record:
    """What was logged and raised."""

    lines: list[str] = field(default_factory=list)

    def add_error(self, error: BaseException | None) -> None:
        """Keep an error the way Python prints it, with causes and notes."""
        self.lines.append("".join(traceback.format_exception(error)))

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.lines)

    def add_record(self, record: logging.LogRecord) -> None:
        """Keep what was logged: message, exception, and the fields that handlers for JSON write."""
        more = {name: value for name, value in vars(record).items() if name not in _FIELDS}
        try:
            text = _FORMATTER.format(record)
        except Exception:  # arguments that do not fit: logging prints them on standard error
            text = repr((record.msg, record.args))
        self.lines.append(text + (f" {more!r}" if more else ""))


_FORMATTER = logging.Formatter()
_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""What every record has; ``args`` are in the message."""


@contextmanager
def recorded_logs() -> Iterator[Record]:
    """Record what all loggers say, at level DEBUG, Python's warnings, and what no one caught.

    A logger may have a level of its own, and keep what it says from the root: it is recorded all the same,
    since whoever runs a build can turn that on. What a logger filters out stays out.
    """
    record = Record()
    enabled, call_handlers = logging.Logger.isEnabledFor, logging.Logger.callHandlers
    showwarning, unraisable, uncaught = warnings.showwarning, sys.unraisablehook, threading.excepthook

    def always(*_: object) -> bool:
        return True

    def log(logger: logging.Logger, one: logging.LogRecord) -> None:
        record.add_record(one)
        if enabled(logger, one.levelno):
            call_handlers(logger, one)

    def show(message: Warning | str, *more: Any, **named: Any) -> None:
        record.lines.append(str(message))
        showwarning(message, *more, **named)

    def in_del(lost: Any) -> None:
        record.lines.append(str(lost.err_msg))
        record.add_error(lost.exc_value)
        unraisable(lost)

    def in_thread(lost: Any) -> None:
        record.add_error(lost.exc_value)
        uncaught(lost)

    with (
        mock.patch.object(logging.Logger, "isEnabledFor", always),
        mock.patch.object(logging.Logger, "callHandlers", log),
        mock.patch.object(warnings, "showwarning", show),
        mock.patch.object(sys, "unraisablehook", in_del),
        mock.patch.object(threading, "excepthook", in_thread),
    ):
        yield record
