"""Checks with real gRPC connections: the right peer gets in, all others stay out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from typing import TypeVar

import pytest

from firebuild_pki.authority import open_authority
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import BUILD_ID, Bench
from firebuild_pki.conformance.certificates import each_profile
from firebuild_pki.conformance.contract import Feature, Violation, contract
from firebuild_pki.errors import CAError, MaterialError
from firebuild_pki.grpc_handshake import Handshake, handshake
from firebuild_pki.keys import KeyType
from firebuild_pki.material import TLSMaterial
from firebuild_pki.provider import Capability, Profile

ResultT = TypeVar("ResultT")

THREADS = 6

ORDERS = tuple(permutations(("first", "second", "third")))
"""Orders in which three authorities can end: who logged in first, last or in between may matter."""


class HandshakeChecks(Checks):
    """Server and guest of one authority, and rogue peers."""

    @contract(see="TLSMaterial")
    def test_server_and_guest_talk(self, ca_bench: Bench) -> None:
        """Server and guest of an authority can connect with mutual TLS."""
        handshake(*_ends(ca_bench))

    @contract(see="Profile")
    def test_a_guest_makes_no_server(self, ca_bench: Bench) -> None:
        """The guest's certificate is not accepted as a server's."""
        _, guest = _ends(ca_bench)
        # its name would be right, so that nothing but the usage is in the way
        _must_be_refused(guest, replace(guest, server_name=guest.identity))

    @contract(see="Profile")
    def test_a_server_makes_no_guest(self, ca_bench: Bench) -> None:
        """The server's certificate is not accepted as a guest's."""
        server, _ = _ends(ca_bench)
        _must_be_refused(server, server)

    @contract(see="TLSMaterial")
    def test_a_guest_without_a_certificate_is_refused(self, ca_bench: Bench) -> None:
        """A guest without a certificate is refused."""
        _must_be_refused(*_ends(ca_bench), anonymous=True)

    @contract(see="TLSMaterial")
    def test_a_guest_of_another_ca_is_refused(self, ca_bench: Bench) -> None:
        """A guest with a certificate of another CA is refused."""
        server, guest = _ends(ca_bench)
        _, rogue = _rogue_peers(ca_bench)
        _must_be_refused(server, _disguised(rogue, guest))

    @contract(see="TLSMaterial")
    def test_a_server_of_another_ca_is_refused(self, ca_bench: Bench) -> None:
        """A server with a certificate of another CA is refused."""
        server, guest = _ends(ca_bench)
        rogue, _ = _rogue_peers(ca_bench)
        _must_be_refused(_disguised(rogue, server), replace(guest, server_name=rogue.server_name))

    @contract(see="TLSMaterial")
    def test_a_server_with_another_name_is_refused(self, ca_bench: Bench) -> None:
        """A server with another name is refused."""
        server, guest = _ends(ca_bench)
        _must_be_refused(server, replace(guest, server_name=f"other.{ca_bench.settings.name_suffix}"))


def _ends(bench: Bench) -> tuple[TLSMaterial, TLSMaterial]:
    with bench.authority() as authority:
        return authority.issue_server(), authority.issue_guest()


def _rogue_peers(bench: Bench) -> tuple[TLSMaterial, TLSMaterial]:
    settings = {"name_suffix": bench.settings.name_suffix}
    with open_authority(settings, build_id=BUILD_ID) as authority:
        return authority.issue_server(), authority.issue_guest()


def _disguised(rogue: TLSMaterial, as_: TLSMaterial) -> TLSMaterial:
    return replace(
        as_,
        private_key_pem=rogue.private_key_pem,
        certificate_chain_pem=rogue.certificate_chain_pem,
    )


def _must_be_refused(server: TLSMaterial, guest: TLSMaterial, *, anonymous: bool = False) -> None:
    try:
        seen: Handshake = handshake(server, guest, anonymous=anonymous)
    except MaterialError:
        return
    raise Violation(f"a connection to {seen.server_name} that was accepted")


class FrameworkChecks(Checks):
    """The framework with this provider."""

    @each_profile
    @contract(see="SignedCertificate")
    def test_the_framework_has_nothing_to_remark(self, ca_bench: Bench, profile: Profile) -> None:
        """The framework accepts the certificates without a warning."""
        with ca_bench.authority() as authority:
            _ = authority.issue_server() if profile is Profile.SERVER else authority.issue_guest()
        if authority.warnings:
            raise Violation("the warnings: " + "; ".join(authority.warnings))

    @contract(see="SignRequest")
    def test_the_certificates_outlive_the_build(self, ca_bench: Bench) -> None:
        """The certificates outlive the deadline of the build."""
        deadline = ca_bench.clock() + timedelta(minutes=45)
        with ca_bench.authority() as authority:
            authority.issue_server(build_deadline=deadline)
            authority.issue_guest(build_deadline=deadline)

    @pytest.mark.parametrize("key_type", list(KeyType), ids=str)
    @contract(see="KeyType", needs=(Feature.SIGN,))
    def test_the_kind_of_key_is_certified(self, ca_bench: Bench, key_type: KeyType) -> None:
        """Keys of this type are certified."""
        section = {**ca_bench.section, "key_type": str(key_type)}
        with ca_bench.with_section(section).authority() as authority:
            if Capability.SIGN not in authority.capabilities:
                raise Violation("ready pairs, whose keys are what they are")
            authority.issue_server()

    @contract(see="Authority")
    def test_threads_share_an_authority(self, ca_bench: Bench) -> None:
        """Many threads can share an authority."""
        with ca_bench.authority() as authority:
            server = authority.issue_server()
            guests = _in_threads(authority.issue_guest)
        for guest in guests:
            handshake(server, guest)

    @contract(see="open_authority")
    def test_several_authorities_are_open_at_once(self, ca_bench: Bench) -> None:
        """Several authorities can be open at the same time, one for each build."""
        builds = iter(range(THREADS))

        def pair() -> tuple[TLSMaterial, TLSMaterial]:
            with ca_bench.authority(build_id=f"conformance-{next(builds)}") as authority:
                return authority.issue_server(), authority.issue_guest()

        with ca_bench.authority() as first:
            pairs = _in_threads(pair)
            pairs.append((first.issue_server(), first.issue_guest()))
        for server, guest in pairs:
            handshake(server, guest)

    @pytest.mark.parametrize("order", ORDERS, ids="-".join)
    @contract(see="CAProvider.close")
    def test_authorities_end_in_any_order(self, ca_bench: Bench, order: tuple[str, ...]) -> None:
        """Authorities that are open at the same time can end in any order: the others issue as before."""
        with ExitStack() as stack:
            open_ones = {
                name: stack.enter_context(ca_bench.authority(build_id=f"conformance-{name}"))
                for name in ("first", "second", "third")
            }
            server = {name: authority.issue_server() for name, authority in open_ones.items()}
            for ended in order:
                open_ones.pop(ended).close()
                for name, authority in open_ones.items():
                    try:
                        guest = authority.issue_guest()
                    except CAError as error:
                        raise Violation(
                            f"the {name} of three, after the {ended} was closed: {error}"
                        ) from error
                    handshake(server[name], guest)


class RollOverChecks(Checks):
    """A CA that rolls over to a new one; skipped without the fixture ``ca_roll_over``."""

    @contract(see="CAProvider.trust_bundle")
    def test_a_build_survives_a_roll_over(
        self, ca_bench: Bench, ca_roll_over: Callable[[], None] | None
    ) -> None:
        """Certificates issued before stay usable; a build goes on, or fails because its CA rolled over."""
        roll_over = _given(ca_roll_over)
        with ca_bench.authority() as authority:
            server, guest = authority.issue_server(), authority.issue_guest()
            roll_over()
            handshake(server, guest)
            try:
                later = authority.issue_guest()
            except CAError as error:
                if "rolled over" in str(error):
                    return
                raise Violation(f"trust_bundle() has to return the anchors of now: {error}") from error
        handshake(server, later)

    @contract(see="CAProvider.trust_bundle")
    def test_the_next_build_follows_a_roll_over(
        self, ca_bench: Bench, ca_roll_over: Callable[[], None] | None
    ) -> None:
        """A build that begins after the roll-over works while one from before is still open."""
        roll_over = _given(ca_roll_over)
        with ca_bench.authority() as before:
            before.issue_server()
            roll_over()
            handshake(*_ends(ca_bench))


def _given(roll_over: Callable[[], None] | None) -> Callable[[], None]:
    if roll_over is None:
        pytest.skip("no fixture ca_roll_over")
    return roll_over


def _in_threads(function: Callable[[], ResultT]) -> list[ResultT]:
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(function) for _ in range(THREADS)]
    return [job.result() for job in jobs]
