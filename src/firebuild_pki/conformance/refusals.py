"""Checks of what a provider must not do, and how it says no."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from firebuild_pki.authority import Authority, open_authority
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Breach, contract
from firebuild_pki.conformance.features import Feature
from firebuild_pki.errors import CAError, SettingsError, UnsupportedOperation
from firebuild_pki.provider import Capability, Profile

NONSENSE = b"-----BEGIN CERTIFICATE REQUEST-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE REQUEST-----\n"


class RefusalChecks(Checks):
    """Errors, by kind."""

    @contract(see="Capability")
    def test_the_way_of_issuing_is_clear(self, ca_bench: Bench) -> None:
        """A provider either signs or has ready pairs, and says so."""
        with ca_bench.direct(opened=False) as provider:
            found = provider.capabilities
        ways = found & {Capability.SIGN, Capability.READY_PAIRS}
        if len(ways) != 1:
            raise Breach(f"the capabilities {', '.join(sorted(found)) or 'none'}")
        if ways == {Capability.READY_PAIRS} and Feature.SIGN not in self.unsupported:
            raise Breach("ready pairs; declare Feature.SIGN unsupported")

    @contract(see="CAProvider")
    def test_what_is_not_promised_is_unsupported(self, ca_bench: Bench) -> None:
        """What the capabilities do not promise raises UnsupportedOperation."""
        with ca_bench.direct() as direct:
            provider, (request, _) = direct.provider, direct.request(Profile.SERVER)
            stranger = _stranger()
            attempts: dict[Capability, Callable[[], object]] = {
                Capability.SIGN: lambda: provider.sign(request),
                Capability.READY_PAIRS: lambda: provider.ready_pair(Profile.SERVER),
                Capability.REVOKE: lambda: provider.revoke(stranger),
            }
            for capability in attempts.keys() - direct.capabilities:
                try:
                    direct.call(f"trying to {capability}", attempts[capability])
                except UnsupportedOperation:
                    continue
                raise Breach(f"{capability} does not raise it; add the capability to the ProviderSpec")

    @contract(see="CAProvider.sign")
    def test_a_request_without_sense_is_refused(self, ca_bench: Bench) -> None:
        """A request that is no PKCS#10 is an error, and the next one works."""
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
        raise Breach(f"a {type(answer).__name__} for it")

    @contract(see="CAProvider.sign", needs=(Feature.POLICY,))
    def test_what_the_policy_forbids_is_refused(
        self, ca_bench: Bench, ca_refusing_settings: Mapping[str, Any] | None
    ) -> None:
        """What the backend's policy forbids is an error with the provider's name."""
        if ca_refusing_settings is None:
            raise Breach("no fixture ca_refusing_settings")
        with ca_bench.with_section(ca_refusing_settings).authority() as authority:
            _must_fail(authority.issue_server, "a certificate", ca_bench.name)

    @contract(see="CAProvider.open", needs=(Feature.FAULTS,))
    def test_a_failing_backend_is_an_error(
        self, ca_bench: Bench, ca_broken_settings: Mapping[str, Any] | None
    ) -> None:
        """A backend that fails is an error with the provider's name, and can be closed."""
        if ca_broken_settings is None:
            raise Breach("no fixture ca_broken_settings")
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
        """A certificate of the provider can be taken back."""
        with ca_bench.authority() as authority:
            authority.revoke(authority.issue_server())

    @contract(see="CAProvider.revoke", needs=(Feature.REVOKE,))
    def test_an_unknown_certificate_is_not_taken_back(self, ca_bench: Bench) -> None:
        """Taking back a certificate that the provider does not know is an error with its name."""
        with ca_bench.authority() as authority:
            _must_be_able_to_revoke(authority)
            known = authority.issue_server()
            stranger = replace(known, certificate_chain_pem=_stranger())
            _must_fail(lambda: authority.revoke(stranger), "no error", ca_bench.name)


def _stranger() -> bytes:
    with open_authority() as authority:
        return authority.issue_server().certificate_chain_pem


def _must_be_able_to_revoke(authority: Authority) -> None:
    if Capability.REVOKE not in authority.capabilities:
        raise UnsupportedOperation("no capability revoke")


def _must_fail(action: Callable[[], object], otherwise: str, provider: str) -> None:
    try:
        action()
    except SettingsError as error:
        raise Breach(f"settings that are wrong already, so nothing was tried: {error}") from error
    except CAError as error:
        if error.provider != provider:
            raise Breach(f"an error of {error.provider} instead of {provider}: {error}") from error
        return
    raise Breach(otherwise)
