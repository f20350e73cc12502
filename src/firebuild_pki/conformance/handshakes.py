"""Checks with real gRPC connections: the right peer gets in, all others stay out."""

from __future__ import annotations

from dataclasses import replace

from firebuild_pki.authority import open_authority
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import BUILD_ID, Bench
from firebuild_pki.conformance.contract import Breach, contract
from firebuild_pki.errors import MaterialError
from firebuild_pki.grpc_handshake import Handshake, handshake
from firebuild_pki.material import TLSMaterial


class HandshakeChecks(Checks):
    """Server and guest of one authority, and those who are not."""

    @contract(see="TLSMaterial")
    def test_server_and_guest_talk(self, ca_bench: Bench) -> None:
        """Server and guest of an authority talk over mutual TLS."""
        handshake(*_ends(ca_bench))

    @contract(see="Profile")
    def test_a_guest_makes_no_server(self, ca_bench: Bench) -> None:
        """The guest's certificate does not make a server."""
        _, guest = _ends(ca_bench)
        # its name would be right, so that nothing but the usage is in the way
        _must_be_refused(guest, replace(guest, server_name=guest.identity))

    @contract(see="Profile")
    def test_a_server_makes_no_guest(self, ca_bench: Bench) -> None:
        """The server's certificate does not make a guest."""
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
        _, stranger = _strangers(ca_bench)
        _must_be_refused(server, _disguised(stranger, guest))

    @contract(see="TLSMaterial")
    def test_a_server_of_another_ca_is_refused(self, ca_bench: Bench) -> None:
        """A server with a certificate of another CA is refused."""
        server, guest = _ends(ca_bench)
        stranger, _ = _strangers(ca_bench)
        _must_be_refused(_disguised(stranger, server), replace(guest, server_name=stranger.server_name))

    @contract(see="TLSMaterial")
    def test_a_server_with_another_name_is_refused(self, ca_bench: Bench) -> None:
        """A server with another name is refused."""
        server, guest = _ends(ca_bench)
        _must_be_refused(server, replace(guest, server_name=f"other.{ca_bench.settings.name_suffix}"))


def _ends(bench: Bench) -> tuple[TLSMaterial, TLSMaterial]:
    with bench.authority() as authority:
        return authority.issue_server(), authority.issue_guest()


def _strangers(bench: Bench) -> tuple[TLSMaterial, TLSMaterial]:
    settings = {"name_suffix": bench.settings.name_suffix}
    with open_authority(settings, build_id=BUILD_ID) as authority:
        return authority.issue_server(), authority.issue_guest()


def _disguised(stranger: TLSMaterial, as_: TLSMaterial) -> TLSMaterial:
    return replace(
        as_,
        private_key_pem=stranger.private_key_pem,
        certificate_chain_pem=stranger.certificate_chain_pem,
    )


def _must_be_refused(server: TLSMaterial, guest: TLSMaterial, *, anonymous: bool = False) -> None:
    try:
        seen: Handshake = handshake(server, guest, anonymous=anonymous)
    except MaterialError:
        return
    raise Breach(f"a connection to {seen.server_name} that was accepted")
