"""What an authority costs, against the cryptography that cannot be left out, and against trustme.

The limit is the same keys, requests and signatures, the same name constraints, and one validation of the
whole path for each leaf, by `cryptography` alone. A request's own signature is verified on neither side.
Times are of the processor, of all threads together: where others are at work, a change of thread can cost
anything by the clock. RSA, where two processors work side by side, and trustme are by the clock. trustme
makes a CA and two certificates below it, without an intermediate, requests, constraints or validation.

What path validation found of an authority's CAs is kept, so of each further leaf it verifies one signature,
where the limit verifies two. What is left: a certificate changes threads twice, as every provider has a
thread of its own, in which a call can be left behind. Where the other processor is idle, each change wakes
it and runs there with cold caches: 75 µs in a virtual machine, whatever wakes it (eventfd, pipe, socket,
lock, semaphore and queue were compared, and differ by less than their spread). On one processor (`taskset
-c 0`) a certificate for a guest came to 1.29 and the second row to 1.90, where two processors gave 1.46 and
2.13; without the threads, the second row would be 1.8. An authority has a new thread, whose first use of
OpenSSL takes 100 to 150 µs more than that of one in use; one that were kept for the next authority would
keep what a provider left in its thread-local variables. The name constraints of both CAs are read once by
the provider and once by the checks, 20 µs each; the first chain is looked at link by link. In a new process
it is the dataclasses and models (10 ms), the parts of `cryptography` that write PEM and make keys (6 ms),
and the entry points. RSA keys are made side by side; how long one takes is luck, so of these a quiet
machine's count.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store

from benchmarks.shape import Benchmark, Row, Run, command
from firebuild_pki import Profile, open_authority
from firebuild_pki.keys import KeyType, generate_key, private_key_pem
from firebuild_pki.provider import utc_now
from firebuild_pki.x509 import Validity, make_csr, make_intermediate, make_leaf, make_root, only_below

ALONE: Final = "limit: cryptography alone"
GUEST: Final = Row("a certificate for a guest", ALONE, "ms CPU", 1.25)
WHOLE: Final = Row("open, server, guest, close; not the first", ALONE, "ms CPU", 1.5)
WHOLE_RSA: Final = Row("the same with RSA 2048", "limit: its four keys, one after the other", "ms", 0.75)
PROCESS: Final = Row(
    "a new process: import and open", "limit: import cryptography.x509 and pydantic, one model", "ms CPU", 1.2
)
TRUSTME: Final = Row("CA, server and client, P-256", "trustme", "ms")
TRUSTME_RSA: Final = Row("CA, server and client, RSA 2048", "trustme", "ms")

NAMES: Final = {
    Profile.SERVER: "b0123456789abcdef.firebuild.internal",
    Profile.GUEST: "guest.b0123456789abcdef.firebuild.internal",
}
RSA: Final = {"key_type": "rsa2048", "embedded": {"key_type": "rsa2048"}}


class Bare:
    """The same certificates without the framework."""

    def __init__(self) -> None:
        self.validity = Validity.starting(utc_now(), timedelta(hours=1), backdate=timedelta(minutes=5))
        constraints = only_below(NAMES[Profile.SERVER])
        self.root = make_root(generate_key(), self.validity, with_intermediate=True, constraints=constraints)
        self.issuer = make_intermediate(generate_key(), self.root, self.validity)

    def issue(self, profile: Profile = Profile.GUEST) -> None:
        """Key, request, signature, and a full verification of the path."""
        name = NAMES[profile]
        key = generate_key()
        csr = x509.load_pem_x509_csr(make_csr(key, [name]))
        leaf = make_leaf(csr.public_key(), self.issuer, self.validity, profile=profile, dns_names=[name])
        policy = PolicyBuilder().store(Store([self.root.certificate])).time(utc_now())
        above = [self.issuer.certificate]
        if profile is Profile.SERVER:
            policy.build_server_verifier(x509.DNSName(name)).verify(leaf, above)
        else:
            policy.build_client_verifier().verify(leaf, above)
        for certificate in (leaf, self.issuer.certificate):
            certificate.public_bytes(Encoding.PEM)
        private_key_pem(key)


def whole(settings: Mapping[str, object]) -> None:
    """Open an authority, issue for server and guest, close it."""
    with open_authority(settings) as authority:
        authority.issue_server()
        authority.issue_guest()


def bare_whole() -> None:
    """Do the same with nothing but cryptography."""
    bare = Bare()
    bare.issue(Profile.SERVER)
    bare.issue(Profile.GUEST)


def by_trustme(key_type: trustme.KeyType) -> None:
    """Make a CA and a certificate for each side, all in PEM."""
    ca = trustme.CA(key_type=key_type)
    ca.cert_pem.bytes()
    for name in NAMES.values():
        leaf = ca.issue_cert(name, key_type=key_type)
        leaf.private_key_and_cert_chain_pem.bytes()


def four_rsa_keys() -> None:
    """Make the keys of root, intermediate, server and guest one after the other."""
    for _ in range(4):
        generate_key(KeyType.RSA2048)


COLD: Final = "import firebuild_pki; firebuild_pki.open_authority({}).close()"
COLD_LIMIT: Final = """
import cryptography.x509
from pydantic import BaseModel
class Settings(BaseModel):
    name: str = ""
"""


def children_and_self() -> float:
    """Return the processor's seconds of this process, its threads, and the processes that it waited for."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(one)[:2]) for one in both)


def measure(run: Run) -> None:
    """Issue in all these ways."""
    whole({})
    bare = Bare()
    with open_authority({}) as authority:
        authority.issue_guest()
        run.turns(GUEST, authority.issue_guest, bare.issue, each=20, clock=time.process_time)
    run.turns(WHOLE, lambda: whole({}), bare_whole, each=20, clock=time.process_time)
    run.turns(WHOLE_RSA, lambda: whole(RSA), four_rsa_keys, each=10)
    run.turns(TRUSTME, lambda: whole({}), lambda: by_trustme(trustme.KeyType.ECDSA), each=20)
    run.turns(TRUSTME_RSA, lambda: whole(RSA), lambda: by_trustme(trustme.KeyType.RSA), each=10)
    cold, limit = ([sys.executable, "-c", program] for program in (COLD, COLD_LIMIT))
    command(cold)
    run.turns(PROCESS, lambda: command(cold), lambda: command(limit), each=2, clock=children_and_self)


BENCHMARK: Final = Benchmark(
    "authority",
    __doc__,
    (GUEST, WHOLE, WHOLE_RSA, PROCESS, TRUSTME, TRUSTME_RSA),
    measure,
    rounds=10,
)
