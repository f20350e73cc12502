"""How a check reports a violation: what the contract requires, what was found, where to read more.

The checks raise; they hold no assert statements, so pytest need not rewrite them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NoReturn, TypeVar

import pytest

from firebuild_pki.conformance.watching import restored
from firebuild_pki.errors import CAError, ProviderConflict, ProviderLoadError, ProviderNotFound
from firebuild_pki.keys import KeyType
from firebuild_pki.values import dataclass

CheckT = TypeVar("CheckT", bound=Callable[..., None])

PAGE = "docs/conformance.md"


class Feature(StrEnum):
    """What not every provider can do. One that cannot lists it in ``unsupported``."""

    SIGN = "sign"
    """Signs requests. Providers of ready pairs do not."""
    REVOKE = "revoke"
    """Revokes certificates."""
    LIFETIME = "lifetime"
    """Certificates have the requested lifetime, up to two hours."""
    SEVERAL_NAMES = "several-names"
    """One certificate can have several names."""
    CHECK = "check"
    """`CAProvider.check` returns notes about the backend."""
    POLICY = "policy"
    """The backend can refuse to sign; needs the fixture ``ca_refusing_settings``."""
    FAULTS = "faults"
    """The backend can fail; needs the fixture ``ca_broken_settings``."""
    P256 = "p256"
    """Signs EC keys on the curve P-256."""
    P384 = "p384"
    """Signs EC keys on the curve P-384."""
    RSA2048 = "rsa2048"
    """Signs RSA keys of 2048 bits."""
    RSA3072 = "rsa3072"
    """Signs RSA keys of 3072 bits."""
    RSA4096 = "rsa4096"
    """Signs RSA keys of 4096 bits."""

    @classmethod
    def of_key(cls, key_type: KeyType) -> Feature:
        """Name the feature of signing a kind of key."""
        return cls(key_type.value)


class Violation(Exception):
    """The provider did something that the contract does not allow; says what was found."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What one check is about.

    Args:
        text: what the contract wants, as a sentence.
        see: the name that documents it, below ``firebuild_pki``.
        needs: the features without which a provider may break it.
    """

    text: str
    see: str
    needs: frozenset[Feature] = frozenset()

    def lacking(self, unsupported: frozenset[Feature], key_type: Any) -> frozenset[Feature]:
        """Tell which of the needed features a provider declared unsupported."""
        of_key = {Feature.of_key(key_type)} if key_type is not None else set()
        return (self.needs | of_key) & unsupported

    def broken(self, found: object) -> str:
        """Word a failure for the author of the provider."""
        lines = (
            f"the contract: {self.text}",
            f"found: {found}",
            f"read more: {PAGE}; firebuild_pki.{self.see}",
        )
        return "\n".join(lines)


def contract(*, see: str, needs: tuple[Feature, ...] = ()) -> Callable[[CheckT], CheckT]:
    """Make a method a check of the contract; its docstring says what the contract wants.

    It fails with the words of the contract on a `Violation` or a `CAError`. Where a feature that it
    needs is declared unsupported it is tried all the same: it has to fail, and counts as skipped. A check
    with the argument ``key_type`` needs the feature of that kind of key besides.
    """

    def decorate(check: CheckT) -> CheckT:
        terms = Contract(" ".join(str(check.__doc__).split()), see, frozenset(needs))

        @functools.wraps(check)
        def run(self: Any, **fixtures: Any) -> None:
            lacking = terms.lacking(self.unsupported, fixtures.get("key_type"))
            found: Exception | None = None
            try:
                with restored():
                    check(self, **fixtures)
            except (Violation, CAError) as error:
                found = error
            if lacking:
                _judge_unsupported(lacking, found, type(self).__name__)
            if found is not None:
                pytest.fail(terms.broken(found), pytrace=False)

        run.contract = terms  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


_absent: dict[type, str] = {}
"""Classes of checks whose plugin could not be loaded, with its name."""


def must_be_loadable(load: Callable[[], object], name: str, where: type, fixture: str) -> None:
    """Fail once where a plugin is not installed or not importable, instead of in every check.

    Args:
        load: loads the plugin.
        name: what the settings call it.
        where: the author's class of checks; the first of its checks fails, the others are skipped.
        fixture: which fixture names another catalog of plugins.
    """
    if where in _absent:
        pytest.skip(
            f"the plugin {_absent[where]} cannot be loaded; the first check of {where.__name__} says why"
        )
    found: CAError | None = None
    try:
        load()
    except (ProviderNotFound, ProviderConflict, ProviderLoadError) as error:
        found = error
    if found is not None:  # outside, so that pytest does not print the error a second time
        _absent[where] = name
        lines = (
            f"the plugin {name} cannot be loaded, so no check of {where.__name__} can run",
            f"found: {found}",
            "remedy: install the distribution of the plugin into the environment of pytest, for example with "
            f"`{sys.executable} -m pip install -e .` beside its pyproject.toml, again after a change of "
            f"its entry points; or name its entry point in the fixture {fixture}",
            f"read more: {PAGE}",
        )
        pytest.fail("\n".join(lines), pytrace=False)


def _judge_unsupported(lacking: frozenset[Feature], found: Exception | None, where: str) -> NoReturn:
    names = ", ".join(sorted(lacking))
    if found is not None:
        pytest.skip(f"declared unsupported: {names}: {found}")
    pytest.fail(
        f"declared unsupported, but works: {names}\nread more: {PAGE}; take it out of {where}.unsupported",
        pytrace=False,
    )
