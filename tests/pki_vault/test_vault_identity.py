"""A machine's identity in production: issued by Vault, and taken back when the machine ends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from baoserver import add_role, create_token, sign_policy, write_policy
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.csr import make_request
from firebuild_bootstrap.identities import IdentityRequest, MachineIdentity
from firebuild_bootstrap.mmds import DataStore
from firebuild_bootstrap.service.console import Console
from firebuild_bootstrap.wire import IdentityFiles
from firebuild_pki import parse_certificates
from pki_vault.tools import Backend

NAMES = ("web.machines.example", "spiffe://example.org/web")


def test_all_certificates_of_a_machine_are_revoked_at_its_end(backend: Backend, unique: str) -> None:
    uris = ["spiffe://example.org/*"]
    add_role(backend.api, unique, use="both", suffix="machines.example", allowed_uri_sans=uris)
    rules = sign_policy("server", "guest", unique, mount="pki", revoke=True)
    token = create_token(backend.api, write_policy(backend.api, unique, rules))
    now, warnings, store, console = datetime.now(UTC), list[str](), DataStore(), Console()
    files = IdentityFiles(names=NAMES, csr=True)
    with backend.with_token(token).open(peer_role=unique) as authority:
        identity = MachineIdentity(
            IdentityRequest(files=files, ttl=timedelta(minutes=10)),
            authority,
            store,
            console,
            warn=warnings.append,
            clock=lambda: now,
        )
        assert identity.begin() is None
        console.executed()
        chains = []
        for number in (1, 2):
            console.identity.said(pb.IdentityState(number=number, csr=make_request(NAMES)[1]))
            identity.advance()
            (said,) = [pb.ToGuest.FromString(each) for each in console.messages()]
            chains.append(said.identity.chain)
            console.identity.said(pb.IdentityState(number=number))
            identity.advance()
            now += timedelta(minutes=9)
            identity.advance()
            list(console.messages())
        now -= timedelta(minutes=10)  # both are valid
        identity.close()
        assert warnings == []
    for chain in chains:
        (leaf, *_) = parse_certificates(chain.encode(), "chain")
        serial = leaf.serial_number.to_bytes(20).hex("-").removeprefix("00-")
        assert backend.api.read(f"pki/cert/{serial}")["revocation_time"] > 0
