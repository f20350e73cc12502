"""Checks of a provider's life: notes, check, close."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from firebuild_pki.authority import Authority, open_authority
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Asked, Bench, Direct
from firebuild_pki.conformance.contract import Feature, Violation, contract
from firebuild_pki.conformance.spilling import Record, recorded_logs
from firebuild_pki.conformance.watching import Traces, traced
from firebuild_pki.display import counted
from firebuild_pki.errors import CAError, SettingsError, UnsupportedOperation
from firebuild_pki.keys import generate_key
from firebuild_pki.provider import Capability, Note, Profile
from firebuild_pki.x509 import make_csr

NONSENSE = b"-----BEGIN CERTIFICATE REQUEST-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE REQUEST-----\n"


class RefusalChecks(Checks):
    """Errors, by kind."""

    @contract(see="Capability")
    def test_the_way_of_issuing_is_clear(self, ca_bench: Bench) -> None:
        """A provider either signs or has ready pairs, and declares which."""
        with ca_bench.direct(opened=False) as provider:
            found = provider.capabilities
        ways = found & {Capability.SIGN, Capability.READY_PAIRS}
        if len(ways) != 1:
            raise Violation(f"the capabilities {', '.join(sorted(found)) or 'none'}")
        if ways == {Capability.READY_PAIRS} and Feature.SIGN not in self.unsupported:
            raise Violation("ready pairs; declare Feature.SIGN unsupported")

    @contract(see="CAProvider")
    def test_what_is_not_promised_is_unsupported(self, ca_bench: Bench) -> None:
        """An operation without its capability raises UnsupportedOperation."""
        with ca_bench.direct() as direct:
            provider, (request, _) = direct.provider, direct.request(Profile.SERVER)
            unknown = _unknown_certificate()
            attempts: dict[Capability, Callable[[], object]] = {
                Capability.SIGN: lambda: provider.sign(request),
                Capability.READY_PAIRS: lambda: provider.ready_pair(Profile.SERVER),
                Capability.REVOKE: lambda: provider.revoke(unknown),
            }
            for capability in attempts.keys() - direct.capabilities:
                try:
                    direct.call(f"trying to {capability}", attempts[capability])
                except UnsupportedOperation:
                    continue
                raise Violation(f"{capability} does not raise it; add the capability to the ProviderSpec")

    @contract(see="CAProvider.sign")
    def test_a_request_without_sense_is_refused(self, ca_bench: Bench) -> None:
        """A request that is not PKCS#10 is an error, and the next one works."""
        with ca_bench.direct() as direct:
            if Capability.SIGN not in direct.capabilities:
                pytest.skip("ready pairs: there are no requests")
            request, _ = direct.request(Profile.SERVER)
            nonsense = replace(request, csr_pem=NONSENSE)
            try:
                answer: object = direct.call("signing nonsense", lambda: direct.provider.sign(nonsense))
            except CAError:
                direct.answer(Profile.SERVER)
                return
        raise Violation(f"a {type(answer).__name__} for it")

    @contract(see="CAProvider.sign", needs=(Feature.POLICY,))
    def test_what_the_policy_forbids_is_refused(
        self, ca_bench: Bench, ca_refusing_settings: Mapping[str, Any] | None
    ) -> None:
        """A request that the backend's policy forbids is an error with the provider's name."""
        if ca_refusing_settings is None:
            raise Violation("no fixture ca_refusing_settings")
        with ca_bench.with_section(ca_refusing_settings).authority() as authority:
            _must_fail(authority.issue_server, "a certificate", ca_bench.name)

    @contract(see="CAProvider.open", needs=(Feature.FAULTS,))
    def test_a_failing_backend_is_an_error(
        self, ca_bench: Bench, ca_broken_settings: Mapping[str, Any] | None
    ) -> None:
        """A backend that fails is an error with the provider's name, and can be closed."""
        if ca_broken_settings is None:
            raise Violation("no fixture ca_broken_settings")
        bench = ca_bench.with_section(ca_broken_settings)

        def build() -> None:
            with bench.authority() as authority:
                authority.issue_server()

        def use() -> None:
            direct.open()
            direct.answer(Profile.SERVER)

        _must_fail(build, "a certificate", ca_bench.name)
        with bench.direct(opened=False) as direct:
            _must_fail(use, "a certificate", ca_bench.name)
            direct.close()

    @contract(see="CAProvider.revoke", needs=(Feature.REVOKE,))
    def test_a_certificate_is_taken_back(self, ca_bench: Bench) -> None:
        """A certificate of the provider can be revoked."""
        with ca_bench.authority() as authority:
            authority.revoke(authority.issue_server())

    @contract(see="CAProvider.revoke", needs=(Feature.REVOKE,))
    def test_an_unknown_certificate_is_not_taken_back(self, ca_bench: Bench) -> None:
        """Revoking a certificate that the provider does not know is an error with the provider's name."""
        with ca_bench.authority() as authority:
            _must_be_able_to_revoke(authority)
            known = authority.issue_server()
            unknown = replace(known, certificate_chain_pem=_unknown_certificate())
            _must_fail(lambda: authority.revoke(unknown), "no error", ca_bench.name)


def _unknown_certificate() -> bytes:
    with open_authority() as authority:
        return authority.issue_server().certificate_chain_pem


def _must_be_able_to_revoke(authority: Authority) -> None:
    if Capability.REVOKE not in authority.capabilities:
        raise UnsupportedOperation("no capability revoke")


def _must_fail(action: Callable[[], object], otherwise: str, provider: str) -> None:
    try:
        action()
    except SettingsError as error:
        raise Violation(f"settings that are wrong already, so nothing was tried: {error}") from error
    except CAError as error:
        if error.provider != provider:
            raise Violation(f"an error of {error.provider} instead of {provider}: {error}") from error
        return
    raise Violation(otherwise)


class LifeChecks(Checks):
    """From opening to closing."""

    @contract(see="CAProvider.check")
    def test_a_check_finds_nothing_fatal(self, ca_bench: Bench) -> None:
        """check() returns notes, none of them fatal if the backend works."""
        for note in _checked(ca_bench):
            if note.fatal:
                raise Violation(f"the fatal note: {note}")

    @contract(see="CAProvider.check", needs=(Feature.CHECK,))
    def test_a_check_says_what_it_looked_at(self, ca_bench: Bench) -> None:
        """check() returns a note for each thing it tested, with a label for it."""
        notes = _checked(ca_bench)
        if not notes:
            raise Violation("no notes")
        for note in notes:
            if not note.about:
                raise Violation(f'a note without a label (about="..."): {note}')

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
        """After close() no keys and tokens are left to issue with."""
        with ca_bench.direct() as provider:
            provider.close()
            try:
                provider.answer(Profile.SERVER)
            except (CAError, Violation):
                return
        raise Violation("a certificate that was issued after close()")

    @contract(see="CAProvider.close")
    def test_nothing_is_issued_after_closing_beside_an_open_one(self, ca_bench: Bench) -> None:
        """A closed provider cannot issue through what another provider of the process has open."""
        with ca_bench.direct(), ca_bench.direct() as provider:
            provider.close()
            try:
                provider.answer(Profile.SERVER)
            except (CAError, Violation):
                return
        raise Violation("a certificate that was issued after close(), while another provider was open")

    @contract(see="CAProvider.close")
    def test_what_others_do_wrong_harms_no_open_one(
        self, ca_bench: Bench, ca_broken_settings: Mapping[str, Any] | None
    ) -> None:
        """A provider keeps working when others are closed twice or unopened, or fail to open."""
        with ca_bench.direct() as provider:
            for done in _missteps(ca_bench, ca_broken_settings):
                try:
                    provider.answer(Profile.SERVER)
                except CAError as error:
                    raise Violation(f"after another one {done}: {error}") from error

    @contract(see="CAProvider.close")
    def test_an_authority_closes_without_a_warning(self, ca_bench: Bench) -> None:
        """An authority closes without a warning."""
        with ca_bench.authority() as authority:
            before = authority.warnings
        if authority.warnings != before:
            raise Violation("the warnings: " + "; ".join(authority.warnings))

    @contract(see="CAProvider")
    def test_the_process_stays_as_it_was(self, ca_bench: Bench) -> None:
        """Working directory, umask, environment and other process state are unchanged after each call."""
        _, traces = lived(ca_bench)
        if traces.changes:
            found = (f"{what} is changed {when}" for what, when in sorted(traces.changes.items()))
            raise Violation("; ".join(found))

    @contract(see="CAProvider")
    def test_standard_output_is_left_alone(self, ca_bench: Bench) -> None:
        """A provider writes nothing to standard output; it has notes and loggers."""
        _, traces = lived(ca_bench)
        size = len(traces.printed["standard output"])
        if size:
            raise Violation(f"{counted(size, 'character')} on standard output")

    @contract(see="CAProvider.close")
    def test_nothing_is_left_behind(self, ca_bench: Bench) -> None:
        """After close() there are no temporary files, child processes, threads and open descriptors."""
        _, traces = lived(ca_bench)
        if traces.left:
            raise Violation(", ".join(traces.left))

    @contract(see="CAProvider.open")
    def test_one_build_follows_another(self, ca_bench: Bench) -> None:
        """A provider can be opened by one build after the other."""
        for number in range(3):
            with ca_bench.authority(build_id=f"conformance-{number}") as authority:
                authority.issue_guest()


class PendingChecks(Checks):
    """Certificates that the backend issues later; skipped if it issues them at once."""

    @contract(see="CAProvider.poll")
    def test_pending_certificates_do_not_mix(self, ca_bench: Bench) -> None:
        """Of two requests that are pending at the same time, each gets its own certificate."""
        with _pending(ca_bench) as (direct, first):
            request, _ = direct.request(Profile.GUEST)
            key = generate_key()  # another one than that of the first
            csr = make_csr(key, request.dns_names)
            second = direct.asked(replace(request, csr_pem=csr), key)
            second.begin()
            answers = {"second": second.wait(), "first": first.wait()}
        for which, answer in answers.items():
            if not answer.key_fits:
                raise Violation(f"a certificate of another key for the {which} of two requests")

    @contract(see="CAProvider.poll")
    def test_nothing_that_is_pending_comes_after_closing(self, ca_bench: Bench) -> None:
        """Closing an authority while a certificate is pending is no error, and nothing is issued later."""
        with _pending(ca_bench) as (direct, first):
            direct.close()
            try:
                first.wait()
            except CAError:
                return
        raise Violation("a certificate that was fetched after close()")


@contextmanager
def _pending(bench: Bench) -> Iterator[tuple[Direct, Asked]]:
    with bench.direct() as direct:
        if Capability.SIGN not in direct.capabilities:
            pytest.skip("ready pairs are there at once")
        asked = direct.asked(*direct.request(Profile.SERVER))
        if asked.begin() is None:
            pytest.skip("the certificate was there at once")
        yield direct, asked


def _checked(bench: Bench) -> tuple[Note, ...]:
    with bench.direct() as provider:
        return provider.check()


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


def lived(bench: Bench) -> tuple[Record, Traces]:
    """Let providers live their whole life, be refused, and fail; return what was said, and what it left."""
    with recorded_logs() as record, traced() as traces:
        live(bench, record, traces)
        _be_refused(bench, record)
        _fail_to_open(bench, record)
        traces.look("after close()")
    return record, traces


def live(bench: Bench, record: Record, traces: Traces) -> None:
    """Do all that a build and `firebuild ca check` do; an error ends it, and is recorded."""
    try:
        with bench.authority() as authority:
            traces.look("after open()")
            authority.check()
            traces.look("after check()")
            server, _ = authority.issue_server(), authority.issue_guest()
            traces.look("after something was issued")
            if Capability.REVOKE in authority.capabilities:
                authority.revoke(server)
                traces.look("after revoke()")
        record.lines += authority.warnings
    except CAError as error:
        record.add_error(error)


def _be_refused(bench: Bench, record: Record) -> None:
    try:
        with bench.direct() as direct:
            request = replace(direct.request(Profile.GUEST)[0], csr_pem=NONSENSE)
            direct.call("signing nonsense", lambda: direct.provider.sign(request))
    except CAError as error:
        record.add_error(error)


def _fail_to_open(bench: Bench, record: Record) -> None:
    try:
        with bench.in_a_broken_world().direct():
            pass
    except CAError as error:
        record.add_error(error)
