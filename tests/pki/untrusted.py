"""Plugins for the tests whose own code runs wherever they are touched, and what they raise."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from firebuild_pki import (
    CAError,
    CAEvent,
    Capability,
    Note,
    ProviderContext,
    SecretError,
    Settings,
    SignedCertificate,
    SignRequest,
    TrustBundle,
    hookimpl,
)
from pki.signers import Operator, Plugin, root_only, signed_with_chain

LIMIT = 1.0
"""What `call_timeout` is for them, in seconds."""


class Hostile(Operator):
    """Behaves, but for what a test puts into `HABITS`."""

    def __init__(self, settings: Settings, context: ProviderContext) -> None:
        super().__init__(signed_with_chain, root_only)

    def capabilities(self) -> Any:
        return self._habit("capabilities", lambda: None)

    def validate(self) -> Any:
        return self._habit("validate", lambda: ())

    def open(self) -> Any:
        return self._habit("open", lambda: None)

    def check(self) -> Any:
        return self._habit("check", lambda: ())

    def trust_bundle(self) -> Any:
        return self._habit("trust_bundle", super().trust_bundle)

    def sign(self, request: SignRequest) -> Any:
        return self._habit("sign", lambda: signed_with_chain(self, request))

    def revoke(self, certificate_pem: bytes) -> Any:
        return self._habit("revoke", lambda: None)

    def close(self) -> Any:
        return self._habit("close", lambda: None)

    def _habit(self, name: str, usual: Callable[[], Any]) -> Any:
        habit = HABITS.get(name)
        return usual() if habit is None else habit(usual)


HABITS: dict[str, Callable[[Callable[[], Any]], Any]] = {}
THREAD_NAMES: set[str] = set()
hostile = Plugin("hostile", Hostile, capabilities=(Capability.SIGN, Capability.REVOKE))


def here() -> None:
    """Note the thread that some code of a plugin runs in."""
    THREAD_NAMES.add(threading.current_thread().name)


def slowly(_usual: object) -> Iterator[Note]:
    here()
    time.sleep(3 * LIMIT)
    yield Note("too late")


def without_end(_usual: object) -> Iterator[Note]:
    while True:
        here()
        yield Note("more")


def failing_halfway(_usual: object) -> Iterator[Note]:
    yield Note("fine")
    raise LookupError("the second half is missing")


@dataclass(frozen=True)
class LazyCertificate(SignedCertificate):
    """Computes its chain when it is asked for."""

    certificate_pem: bytes = b""

    def __getattribute__(self, name: str) -> Any:
        if name == "chain_pem":
            here()
            return HABITS["chain_pem"](lambda: b"")
        return super().__getattribute__(name)


class LazyNote(Note):
    """Computes its message when it is asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name == "message":
            here()
            time.sleep(3 * LIMIT)
        return super().__getattribute__(name)


class LazyBundle(TrustBundle):
    def __getattribute__(self, name: str) -> Any:
        if name == "anchors_pem":
            here()
            raise LookupError("no anchors here")
        return super().__getattribute__(name)


class Subtle(str):
    """A string that does something when it is used."""

    def __str__(self) -> str:
        here()
        return "not what it is"

    def __format__(self, spec: str) -> str:
        here()
        return "not what it is"

    def split(self, *_: Any) -> Any:
        here()
        raise LookupError


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class Endless(Exception):
    def __str__(self) -> str:
        here()
        time.sleep(3 * LIMIT)
        return "at last"

    __repr__ = __str__


class Loud(Exception):
    def __str__(self) -> str:
        return "\x1b[31mred\x1b[0m\nand " + "x" * 100_000


class Unreadable(CAError):
    """A CAError without a message."""

    @property
    def message(self) -> str:
        raise LookupError

    @message.setter
    def message(self, value: str) -> None:
        pass


class OfAcme(SecretError):
    """A plugin's own kind of one of our errors."""


def raising(error: BaseException) -> Callable[[object], Any]:
    def habit(_usual: object) -> Any:
        raise error

    return habit


def returning(value: object) -> Callable[[object], Any]:
    return lambda _usual: value


def circle() -> Exception:
    error = KeyError("round")
    error.__cause__ = error
    return error


FOREIGN: dict[str, tuple[BaseException, str]] = {
    "cancelled": (asyncio.CancelledError(), "CancelledError"),
    "exit": (SystemExit(3), "SystemExit: 3"),
    "generator": (GeneratorExit(), "GeneratorExit"),
    "stop": (StopIteration("end"), "StopIteration: end"),
    "base": (BaseException("bare"), "BaseException: bare"),
    "memory": (MemoryError(), "MemoryError"),
    "recursion": (RecursionError("too deep"), "RecursionError: too deep"),
    "mute": (Mute(), "Mute: (a Mute that does not say more)"),
    "group": (
        BaseExceptionGroup("two", [KeyError(1), SystemExit()]),
        "BaseExceptionGroup: two (2 sub-exceptions): KeyError: 1; SystemExit",
    ),
    "circle": (circle(), "KeyError: 'round'"),
}


class Listening:
    """An observer that raises what a test wants."""

    error: BaseException = KeyError()

    @hookimpl
    def ca_event(self, event: CAEvent) -> None:
        raise self.error


class Awaiting:
    """An observer that is to be awaited."""

    @hookimpl
    async def ca_event(self, event: CAEvent) -> None:
        raise LookupError


listening, awaiting = Listening(), Awaiting()
