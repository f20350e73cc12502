"""What a provider returns, converted to plain values of known types, and bounded in number.

A provider may return generators, objects whose attributes are computed when they are read, or subclasses of
`str`: looking at those runs its code. These functions do all the looking. They are called in the provider's
own thread, within its time limit; what they return runs no foreign code.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Generator, Iterable, Iterator
from enum import StrEnum
from itertools import islice
from types import CoroutineType
from typing import Any, Final, TypeVar

from firebuild_pki.errors import MaterialError, ProviderError
from firebuild_pki.provider import (
    Capability,
    Note,
    NoteLevel,
    ReadyPair,
    RetryAfter,
    SignedCertificate,
    TrustBundle,
)
from firebuild_pki.wrapping import one_text

MAX_NOTES: Final = 1_000
"""More notes than any check has a use for."""

MAX_PEM: Final = 1024 * 1024
"""Bytes of certificates; more than any bundle has."""

MAX_HANDLE: Final = 4096
"""Characters of the handle of a pending certificate; an ARN has about 150."""

MAX_PAUSE: Final = 86_400.0
"""Seconds after which a provider may want to be asked again, at most; a build does not wait for longer."""

_MAX_NAME: Final = 1_000
_EnumT = TypeVar("_EnumT", bound=StrEnum)


def not_async(found: object) -> object:
    """Take what a method returned, if it did its work: one with ``async`` before ``def`` has not begun.

    Raises:
        ProviderError: it is something to be awaited, which nobody does.
    """
    if not isinstance(found, Awaitable):
        return found
    if isinstance(found, CoroutineType):
        found.close()  # or Python remarks on stderr that it was not awaited
    hint = "write the method without async; inside it, asyncio.run() runs what is"
    raise ProviderError(f"the method did nothing, and returned {_kind(found)} to be awaited", hint=hint)


def nothing(found: object) -> None:
    """Drop what a method returned that returns nothing.

    Raises:
        ProviderError: it is a generator: the method did nothing.
    """
    if isinstance(found, Generator | AsyncGenerator):
        hint = "write the method without yield"
        raise ProviderError(f"the method did nothing, and returned {_kind(found)}", hint=hint)


def notes(found: object, doing: str) -> tuple[Note, ...]:
    """Take the notes of `CAProvider.check` or `CAProvider.validate`; None means none.

    Args:
        found: what it returned.
        doing: what was going on, as a noun.

    Raises:
        ProviderError: they are not notes, or too many.
    """
    expected = f"notes of {doing}"
    return () if found is None else tuple(_note(one, expected) for one in _some(found, expected))


def capabilities(found: object) -> frozenset[Capability] | None:
    """Take the answer of `CAProvider.capabilities`.

    Raises:
        ProviderError: it is neither None nor a set of capabilities.
    """
    if found is None:
        return None
    if not isinstance(found, set | frozenset):
        raise ProviderError(f"expected a frozenset of capabilities, found {_kind(found)}")
    return frozenset(_member(Capability, one, "a capability") for one in _some(found, "capabilities"))


def trust_bundle(found: object) -> TrustBundle:
    """Take the answer of `CAProvider.trust_bundle`.

    Raises:
        MaterialError: it is something else, or one of its fields is.
    """
    bundle = _expected(TrustBundle, found)
    return TrustBundle(
        _pem(bundle.anchors_pem, "trust anchors"), _pem(bundle.intermediates_pem, "intermediates")
    )


def signing_answer(found: object) -> SignedCertificate | RetryAfter:
    """Take the answer of `CAProvider.sign` or `CAProvider.poll`.

    Raises:
        MaterialError: it is something else, or one of its fields is.
        ProviderError: its notes are not sentences, or it wants to be asked again after no sensible time.
    """
    if isinstance(found, RetryAfter):
        return _retry_after(found)
    answer = _expected(SignedCertificate, found)
    certificate, chain = _pem(answer.certificate_pem, "certificate"), _pem(answer.chain_pem, "chain")
    remarks = _some(answer.notes, "notes with the certificate, a tuple of sentences")
    return SignedCertificate(certificate, chain, tuple(_sentence(one, "a note") for one in remarks))


def _retry_after(found: RetryAfter) -> RetryAfter:
    wanted: object = found.seconds
    expected = "expected RetryAfter to name the seconds until the provider is to be asked again"
    never = "; what will never be issued is a CAError with the reason"
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        raise ProviderError(f"{expected}, a number, found {_kind(wanted)}{never if wanted is None else ''}")
    seconds = int.__int__(wanted) if isinstance(wanted, int) else float.__float__(wanted)
    if not 0 <= seconds <= MAX_PAUSE:  # neither is NaN
        shown = f"{seconds:g}" if isinstance(seconds, float) or seconds.bit_length() < 64 else "a huge number"
        raise ProviderError(f"{expected}, from 0 to {MAX_PAUSE:g}, found {shown}{never}")
    handle: object = found.handle
    if not isinstance(handle, str):
        raise ProviderError(f"expected a string as the handle of RetryAfter, found {_kind(handle)}")
    handle = str.__str__(handle)
    if len(handle) > MAX_HANDLE:
        raise ProviderError(
            f"expected a handle of RetryAfter of {MAX_HANDLE} characters at most, found {len(handle)}"
        )
    return RetryAfter(float(seconds), handle, _sentence(found.reason, "the reason of RetryAfter"))


def ready_pair(found: object) -> ReadyPair:
    """Take the answer of `CAProvider.ready_pair`.

    Raises:
        MaterialError: it is something else, or one of its fields is.
    """
    pair = _expected(ReadyPair, found)
    chain, key = _pem(pair.certificate_chain_pem, "certificate chain"), _pem(pair.private_key_pem, "key")
    name: object = pair.name
    if not isinstance(name, str):
        raise MaterialError(f"expected a DNS name as the name of a ReadyPair, found {_kind(name)}")
    return ReadyPair(chain, key, one_text(str.__str__(name), _MAX_NAME))


_AnswerT = TypeVar("_AnswerT", TrustBundle, SignedCertificate, ReadyPair)


def _expected(kind: type[_AnswerT], found: object) -> _AnswerT:
    if isinstance(found, kind):
        return found
    raise MaterialError(f"expected a {kind.__name__}, found {_kind(found)}")


def _some(found: Any, what: str) -> Iterator[object]:
    # a text is a sequence, too, of one-letter notes
    if isinstance(found, str | bytes) or not isinstance(found, Iterable):
        raise ProviderError(f"expected {what}, found {_kind(found)}")
    for number, one in enumerate(islice(found, MAX_NOTES + 1)):
        if number == MAX_NOTES:
            raise ProviderError(f"expected {what}, {MAX_NOTES} at most, found more")
        yield one


def _note(found: object, expected: str) -> Note:
    if not isinstance(found, Note):
        raise ProviderError(f"expected {expected}, found {_kind(found)}")
    hint: object = found.hint
    return Note(
        _sentence(found.message, "the message of a note"),
        _sentence(found.path, "the path of a note"),
        None if hint is None else _sentence(hint, "the hint of a note"),
        _member(NoteLevel, found.level, "the level of a note"),
        _sentence(found.about, "what a note is about"),
    )


def _sentence(found: object, what: str) -> str:
    if not isinstance(found, str):
        raise ProviderError(f"expected a string as {what}, found {_kind(found)}")
    return one_text(str.__str__(found))


def _member(kind: type[_EnumT], found: object, what: str) -> _EnumT:
    if isinstance(found, str):
        try:
            return kind(str.__str__(found))
        except ValueError:
            pass
    choices = ", ".join(kind)
    shown = f'"{one_text(str.__str__(found), 100)}"' if isinstance(found, str) else _kind(found)
    raise ProviderError(f"expected {what} to be one of {choices}, found {shown}")


def _pem(found: object, what: str) -> bytes:
    if isinstance(found, str):
        data = str.encode(found, errors="replace")
    elif isinstance(found, bytes):
        data = bytes.__bytes__(found)
    else:
        raise MaterialError(f"expected PEM text as {what}, found {_kind(found)}")
    if len(data) > MAX_PEM:
        raise MaterialError(f"expected PEM text as {what}, {MAX_PEM} bytes at most, found {len(data)}")
    return data


def _kind(found: object) -> str:
    return one_text(str(type(found).__name__), 100)
