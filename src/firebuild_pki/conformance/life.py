"""Checks of a provider's life: notes, check, close."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench, Direct
from firebuild_pki.conformance.contract import Breach, contract
from firebuild_pki.conformance.features import Feature
from firebuild_pki.errors import CAError
from firebuild_pki.provider import Note, Profile


class LifeChecks(Checks):
    """From opening to closing."""

    @contract(see="CAProvider.check")
    def test_a_check_finds_nothing_fatal(self, ca_bench: Bench) -> None:
        """check() returns notes, none of them fatal where all is well."""
        for note in _checked(ca_bench):
            if note.fatal:
                raise Breach(f"the fatal note: {note}")

    @contract(see="CAProvider.check", needs=(Feature.CHECK,))
    def test_a_check_says_what_it_looked_at(self, ca_bench: Bench) -> None:
        """check() returns a note for each thing it looked at, labelled with what that is."""
        notes = _checked(ca_bench)
        if not notes:
            raise Breach("no notes")
        for note in notes:
            if not note.about:
                raise Breach(f'a note without a label (about="..."): {note}')

    @contract(see="CAProvider.close")
    def test_closing_twice_is_fine(self, ca_bench: Bench) -> None:
        """close() may be called twice."""
        with ca_bench.direct() as provider:
            provider.close()
            provider.close()

    @contract(see="CAProvider.close")
    def test_closing_without_opening_is_fine(self, ca_bench: Bench) -> None:
        """close() may be called without open()."""
        with ca_bench.direct(opened=False) as provider:
            provider.close()

    @contract(see="CAProvider.close")
    def test_closing_after_a_failed_opening_is_fine(self, ca_bench: Bench) -> None:
        """close() may be called after an open() that failed."""
        with ca_bench.in_a_broken_world().direct(opened=False) as provider:
            _try_to_open(provider)
            provider.close()

    @contract(see="CAProvider.close")
    def test_nothing_is_issued_after_closing(self, ca_bench: Bench) -> None:
        """After close() there are neither keys nor tokens to issue with."""
        with ca_bench.direct() as provider:
            provider.close()
            try:
                provider.answer(Profile.SERVER)
            except (CAError, Breach):
                return
        raise Breach("a certificate that was issued after close()")

    @contract(see="CAProvider.close")
    def test_nothing_is_issued_after_closing_beside_an_open_one(self, ca_bench: Bench) -> None:
        """What another provider has open in the process is of no use to one that is closed."""
        with ca_bench.direct(), ca_bench.direct() as provider:
            provider.close()
            try:
                provider.answer(Profile.SERVER)
            except (CAError, Breach):
                return
        raise Breach("a certificate that was issued after close(), while another provider was open")

    @contract(see="CAProvider.close")
    def test_what_others_do_wrong_harms_no_open_one(
        self, ca_bench: Bench, ca_broken_settings: Mapping[str, Any] | None
    ) -> None:
        """A provider works on when others are closed twice or unopened, or fail to open."""
        with ca_bench.direct() as provider:
            for done in _missteps(ca_bench, ca_broken_settings):
                try:
                    provider.answer(Profile.SERVER)
                except CAError as error:
                    raise Breach(f"after another one {done}: {error}") from error

    @contract(see="CAProvider.close")
    def test_an_authority_closes_without_a_warning(self, ca_bench: Bench) -> None:
        """An authority closes without a warning."""
        with ca_bench.authority() as authority:
            before = authority.warnings
        if authority.warnings != before:
            raise Breach("the warnings: " + "; ".join(authority.warnings))

    @contract(see="CAProvider.open")
    def test_one_build_follows_another(self, ca_bench: Bench) -> None:
        """A provider can be opened again and again, by one build after the other."""
        for number in range(3):
            with ca_bench.authority(build_id=f"conformance-{number}") as authority:
                authority.issue_guest()


def _checked(bench: Bench) -> list[Note]:
    with bench.direct() as provider:
        notes = list(provider.call("the check", provider.provider.check) or ())
    for note in notes:
        if not isinstance(note, Note):
            raise Breach(f"a {type(note).__name__} instead of a Note")
    return notes


def _missteps(bench: Bench, broken: Mapping[str, Any] | None) -> Iterator[str]:
    """Do with other providers what can happen to them, and say what it was; their own errors do not count."""
    with suppress(CAError), bench.direct() as other:
        other.close()
        other.close()
    yield "was closed twice"
    with suppress(CAError), bench.direct(opened=False) as other:
        other.close()
    yield "was closed without having been opened"
    worlds = {"without clock and environment": bench.in_a_broken_world()}
    if broken is not None:
        worlds["with ca_broken_settings"] = bench.with_section(broken)
    for how, world in worlds.items():
        with suppress(CAError), world.direct(opened=False) as other:
            _try_to_open(other)
            other.close()
        yield f"was opened {how}, and closed"


def _try_to_open(provider: Direct) -> None:
    try:
        provider.open()
    except CAError:
        return
