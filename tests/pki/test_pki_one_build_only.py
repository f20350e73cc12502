"""The embedded CA can vouch for the names of its build and for no others, and its keys end with it."""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from firebuild_pki import MaterialError, TLSMaterial, open_authority
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.provider import Profile, TrustBundle
from firebuild_pki.verify import Expectation, verify_certificate, verify_trust
from firebuild_pki.x509 import fingerprint, only_below
from pki.tools import CLIENT_AUTH, SERVER_AUTH, OperatorCA, certificates, pem
from support import writable_memory

DOMAIN = "b-1.firebuild.internal"
GUEST = f"guest-7.{DOMAIN}"
DNS, URI, MAIL = x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name


def address(text: str) -> x509.IPAddress:
    return x509.IPAddress(ipaddress.ip_address(text))


@dataclass(frozen=True)
class Names:
    """What a certificate says whom it is for."""

    alternative: tuple[x509.GeneralName, ...]
    common: str = "leaf"


OWN = {
    "the-server": Names((DNS(DOMAIN),)),
    "a-guest": Names((DNS(GUEST),), GUEST),
    "upper-case": Names((DNS(GUEST.upper()),)),
    "a-uri-of-the-build": Names((DNS(GUEST), URI(f"spiffe://{DOMAIN}/guest"))),
}
FOREIGN = {
    "another-build": Names((DNS("guest.b-2.firebuild.internal"),)),
    "the-domain-above": Names((DNS("firebuild.internal"),)),
    "the-same-ending": Names((DNS(f"x{DOMAIN}"),)),
    "one-beside-its-own": Names((DNS(GUEST), DNS("example.com"))),
    "an-address": Names((DNS(GUEST), address("127.0.0.1"))),
    "an-address-of-ipv6": Names((DNS(GUEST), address("::1"))),
    "a-uri": Names((DNS(GUEST), URI("spiffe://example.com/guest"))),
    "an-e-mail-address": Names((DNS(GUEST), MAIL("who@example.com"))),
    "a-common-name-alone": Names((), "example.com"),
}


class Build:
    """A CA with the constraints of one build, whose key somebody has taken."""

    def __init__(self) -> None:
        now = datetime.now(UTC)
        self.valid = (now - timedelta(minutes=5), now + timedelta(hours=1))
        self.ca = OperatorCA("One Build", valid=self.valid, constraints=only_below(DOMAIN), path_length=0)
        self.server = self.material(Profile.SERVER, Names((DNS(DOMAIN),)))
        self.guest = self.material(Profile.GUEST, Names((DNS(GUEST),)))

    def material(self, profile: Profile, names: Names) -> TLSMaterial:
        key = generate_key()
        common = x509.NameAttribute(NameOID.COMMON_NAME, names.common)
        leaf = self.ca.leaf(
            key.public_key(),
            [],
            other_names=names.alternative,
            usages=[SERVER_AUTH if profile is Profile.SERVER else CLIENT_AUTH],
            valid=self.valid,
            subject=x509.Name([common]),
        )
        identity = str(names.alternative[0].value) if names.alternative else names.common
        return TLSMaterial(
            pem(leaf), private_key_pem(key), self.ca.pem, DOMAIN, identity, *self.valid, fingerprint(leaf)
        )


@pytest.fixture(scope="module")
def build() -> Build:
    return Build()


@pytest.mark.parametrize("names", OWN.values(), ids=OWN)
def test_a_guest_with_names_of_the_build_is_let_in(build: Build, names: Names) -> None:
    handshake(build.server, build.material(Profile.GUEST, names))


@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_a_guest_with_another_name_is_refused_whoever_signed_it(build: Build, names: Names) -> None:
    with pytest.raises(MaterialError, match=r"the server refuses the guest: (permitted|excluded) subtree"):
        handshake(build.server, build.material(Profile.GUEST, names))


@pytest.mark.parametrize("names", [Names((DNS("example.com"),)), Names((), "example.com")], ids=["dns", "cn"])
def test_a_server_with_another_name_is_refused_whoever_signed_it(build: Build, names: Names) -> None:
    elsewhere = replace(build.guest, server_name="example.com")
    with pytest.raises(MaterialError, match="the guest refuses the server: permitted subtree violation"):
        handshake(build.material(Profile.SERVER, names), elsewhere)


@pytest.mark.parametrize(
    ("names", "good"), [*((one, True) for one in OWN.values()), *((one, False) for one in FOREIGN.values())]
)
@pytest.mark.needs("openssl")
def test_openssl_reads_the_constraints_as_grpc_does(
    build: Build, names: Names, good: bool, tmp_path: Path
) -> None:
    (tmp_path / "root.pem").write_bytes(build.ca.pem)
    (tmp_path / "leaf.pem").write_bytes(build.material(Profile.GUEST, names).certificate_chain_pem)
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-purpose",
        "sslclient",
        "-CAfile",
        "root.pem",
        "leaf.pem",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is good, done.stderr
    assert good or "subtree violation" in done.stderr


def test_the_framework_refuses_such_a_name_before_a_peer_does(build: Build) -> None:
    foreign = build.material(Profile.GUEST, FOREIGN["another-build"])
    (leaf,) = certificates(foreign.certificate_chain_pem)
    now, name = datetime.now(UTC), "guest.b-2.firebuild.internal"
    trust = verify_trust(TrustBundle(build.ca.pem), now)
    expected = Expectation(Profile.GUEST, (name,), leaf.public_key(), now, now)
    with pytest.raises(MaterialError, match=f'do not permit the name "{re.escape(name)}"'):
        verify_certificate(foreign.certificate_chain_pem, b"", trust, expected)


@pytest.mark.parametrize("intermediate", [True, False])
def test_every_ca_of_a_build_has_the_constraints_and_they_are_critical(intermediate: bool) -> None:
    with open_authority({"embedded": {"intermediate": intermediate}}, build_id="b-1") as authority:
        server = authority.issue_server()
        authority.issue_guest()
    _, *issuers = certificates(server.certificate_chain_pem)
    authorities = [*certificates(server.trust_pem), *issuers]
    assert len(authorities) == 1 + intermediate
    for ca in authorities:
        extension = ca.extensions.get_extension_for_class(x509.NameConstraints)
        assert (extension.critical, extension.value) == (True, only_below(DOMAIN))


def test_names_that_were_announced_are_permitted_and_nothing_beside_them() -> None:
    constraints = only_below(
        DOMAIN, ["db.example.com", "spiffe://example.org/web", "spiffe://example.org/db"]
    )
    assert constraints.permitted_subtrees == [
        DNS(DOMAIN),
        DNS("db.example.com"),
        URI("example.org"),
        MAIL(DOMAIN),
    ]
    with pytest.raises(ValueError, match="the URI spiffe:///web has no host"):
        only_below(DOMAIN, ["spiffe:///web"])


# --- the keys -------------------------------------------------------------------------------------

# The private numbers are told by a child of the process that is looked into, so that the telling leaves no
# copies of them where they are looked for.
HOLDER = """
import gc, os, sys
from firebuild_pki import open_authority
from firebuild_pki.providers import embedded
taken, make = [], embedded.make_ca_keys
def noting(kind, count):
    taken.extend(made := make(kind, count))
    return made
embedded.make_ca_keys = noting
authority = open_authority({"embedded": {"intermediate": True, "key_type": "p256"}}, build_id="b-1")
embedded.make_ca_keys = make
if os.fork() == 0:
    for key in taken:
        print(f"{key.private_numbers().private_value:064x}", flush=True)
    os._exit(0)
os.wait()
authority.issue_server(), authority.issue_guest()
root, intermediate = taken
del root
taken.clear()
print(flush=True)
sys.stdin.readline()
del intermediate
authority.close()
print(flush=True)
sys.stdin.readline()
"""


def holds(pid: int, keys: list[bytes]) -> list[bool]:
    """Tell which of the private numbers are in a process, as OpenSSL keeps them or as PKCS#8 writes them."""
    written = [(one, one[::-1]) for one in keys]
    parts = list(writable_memory(pid))
    return [any(form in part for part in parts for form in forms) for forms in written]


# cryptography 50 leaves a copy of the seed of each ML-DSA key that it makes: docs/providers/embedded.md.
def test_a_key_of_the_ca_is_nowhere_in_the_process_once_it_is_closed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        numbers = [bytes.fromhex(process.stdout.readline()) for _ in range(2)]
        process.stdout.readline()
        assert holds(process.pid, numbers) == [False, True], "the root's is forgotten, the other one signs"
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        assert holds(process.pid, numbers) == [False, False]
        process.stdin.write("\n")
