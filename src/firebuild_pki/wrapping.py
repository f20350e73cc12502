"""Exceptions of plugins, wrapped in errors of ours.

Reading an exception of a foreign class runs foreign code: its `__str__` may sleep, raise, or write a
megabyte of escape sequences. So that is done once, where it was caught (for a provider: in its thread, within
its limit), and what goes on from there is an error of ours that holds plain text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import WrapperDescriptorType
from typing import Final

from firebuild_pki import errors
from firebuild_pki.display import block, counted, error_text, text_of
from firebuild_pki.errors import CAError, Problem, ProviderError, SettingsError, causes

TEXT_LIMIT: Final = 2_000
"""Characters that are kept of a message, a hint or a note of a plugin."""

_MOST_PROBLEMS: Final = 100
_MOST_NESTED: Final = 20
_SHOWN_MEMBERS: Final = 5
_HARMLESS: Final = (type(None), bool, int, float, str, bytes)


class ForeignError(Exception):
    """Stands for an exception whose text is computed by code of a plugin; has its traceback."""


def one_text(text: str, limit: int = TEXT_LIMIT) -> str:
    """Make one harmless line of a text, like `display.one_line`, but leave blanks in it as they are.

    Hints hold commands and paths, which may have two blanks in a row.
    """
    shown = block(text[: 2 * limit], limit)
    if len(text) <= limit >= len(shown):
        return " ".join(line.strip() for line in shown.split("\n")).strip()
    end = f"… ({counted(len(text), 'character')} in all)"  # within the limit, so that it is not cut again
    return " ".join(line.strip() for line in shown[: limit - len(end)].split("\n")).strip() + end


def described(error: BaseException) -> str:
    """Describe an exception of any class: ``KeyError: 'certificate'``; a `CAError` by its message."""
    if isinstance(error, CAError):
        return str(_own(error))
    text = error_text(error, TEXT_LIMIT - 200)  # with what comes before, within the limit
    members = _members(error)
    if not members:
        return text
    return one_text(f"{text}: {'; '.join(error_text(one) for one in members[:_SHOWN_MEMBERS])}")


def _members(error: BaseException) -> tuple[BaseException, ...]:
    """Return what is in an exception group, past what a class of a plugin makes of it."""
    if not isinstance(error, BaseExceptionGroup):
        return ()
    found: tuple[BaseException, ...] = vars(BaseExceptionGroup)["exceptions"].__get__(error)
    return found


def _alone(error: BaseException) -> BaseException:
    """Of a group of one, return that one: asyncio's TaskGroup makes a group of whatever ended it."""
    for _ in range(_MOST_NESTED):
        members = _members(error)
        if len(members) != 1:
            break
        error = members[0]
    return error


def as_ca_error(error: BaseException, provider: str, doing: str) -> CAError:
    """Make an error of ours of anything that a provider raised.

    Args:
        error: what it raised.
        provider: its name in the configuration.
        doing: what was going on, as a noun: "signing the server certificate".

    Returns:
        A new `CAError` with plain text; a `ProviderError` unless the provider raised one of ours. The cause
        is the original, or a `ForeignError` if nothing but a plugin's code can say what it says.
    """
    try:
        ours = _worded(_alone(error), doing)
    except KeyboardInterrupt:
        raise
    except BaseException:  # even reading it fails
        ours = ProviderError(f"{doing} failed, and so does the error that should say why")
    ours.provider = ours.provider or provider
    return ours


@contextmanager
def provider_errors(provider: str, doing: str) -> Iterator[None]:
    """Name the provider in every error that the block raises; see `as_ca_error`.

    Raises:
        CAError: for anything but a KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        ours = as_ca_error(error, provider, doing)
    else:
        return
    raise ours


@contextmanager
def named(provider: str) -> Iterator[None]:
    """Name the provider in every `CAError` that the block raises; anything else is not the provider's."""
    try:
        yield
    except CAError as error:
        error.provider = error.provider or provider
        raise


def _worded(error: BaseException, doing: str) -> CAError:
    if isinstance(error, CAError):
        ours = _own(error)
        ours.__cause__ = error.__cause__ and harmless(error.__cause__)
        return ours
    message = f"{doing} failed: {described(error)}"
    ours = ProviderError(message, retryable=isinstance(error, ConnectionError | TimeoutError))
    ours.__cause__ = harmless(error)
    return ours


def _own(error: CAError) -> CAError:
    hint = None if error.hint is None else one_text(text_of(error.hint))
    if isinstance(error, SettingsError):
        ours: CAError = SettingsError([_plain(one) for one in error.problems[:_MOST_PROBLEMS]])
    else:
        # of a plugin's own class, the nearest of ours
        kind = next(one for one in type(error).__mro__ if getattr(errors, one.__name__, None) is one)
        ours = kind(one_text(text_of(error.message)))
    ours.hint = hint
    ours.retryable = bool(error.retryable)
    ours.provider = None if error.provider is None else one_text(text_of(error.provider), 100)
    return ours.with_traceback(error.__traceback__)


def _plain(problem: Problem) -> Problem:
    return replace(
        problem,
        source=text_of(problem.source),
        path=one_text(text_of(problem.path)),
        message=one_text(text_of(problem.message)),
        hint=None if problem.hint is None else one_text(text_of(problem.hint)),
    )


def harmless(error: BaseException) -> BaseException:
    """Return an exception, or a `ForeignError` in its place if showing it would run code of a plugin."""
    chain = causes(error, lambda one: (one.__cause__, one.__context__))
    if all(_is_self_explanatory(one) for one in chain):
        return error
    return ForeignError(described(error)).with_traceback(error.__traceback__)


def _is_self_explanatory(error: BaseException) -> bool:
    kind = type(error)
    texts = (kind.__str__, kind.__repr__)  # of built-in classes, these are written in C
    return all(isinstance(one, WrapperDescriptorType) for one in texts) and all(
        type(one) in _HARMLESS for one in error.args
    )
