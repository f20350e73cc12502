"""What an authority costs, against the cryptography that cannot be left out; prints its table.

    .venv/bin/python benchmarks/ca_issuing.py [--runs 200]

The limit is the same keys, requests and signatures, the same name constraints, and one validation of the
whole path for each leaf, by `cryptography` alone. A request's own signature is verified on neither side.
Framework and limit take turns, so that a busy machine slows both. Times are of the processor, of all threads
together: where others are at work, a change of thread can cost anything by the clock. Where two processors
work side by side they are by the clock. On a busy machine the fastest runs say more than the medians.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store

from firebuild_pki import Authority, Profile, open_authority
from firebuild_pki.keys import KeyType, generate_key, private_key_pem
from firebuild_pki.provider import utc_now
from firebuild_pki.x509 import Validity, make_csr, make_intermediate, make_leaf, make_root, only_below

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


def process(program: str) -> None:
    """Run a program in a new interpreter."""
    subprocess.run([sys.executable, "-c", program], check=True)


def children_and_self() -> float:
    """Return the processor's seconds of this process, its threads, and the processes that it waited for."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(one)[:2]) for one in both)


Clock = Callable[[], float]


def compare(
    ours: Callable[[], object], limit: Callable[[], object], runs: int, clock: Clock
) -> tuple[list[float], list[float]]:
    """Let both take turns; return the milliseconds of each."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for times, action in zip(found, (ours, limit), strict=True):
            began = clock()
            action()
            times.append(1000 * (clock() - began))
    return found


def rows(runs: int) -> Iterator[str]:
    """Yield the lines of the table, as they come."""
    whole({})
    authority: Authority = open_authority({})
    bare = Bare()
    few = max(1, runs // 10)
    # What, the framework, its limit, to reach, how often, by which clock.
    cases = (
        ("a certificate for a guest", authority.issue_guest, bare.issue, 1.25, runs, time.process_time),
        (
            "open, server, guest, close; not the first",
            lambda: whole({}),
            bare_whole,
            1.5,
            runs,
            time.process_time,
        ),
        (
            "the same with RSA 2048; limit: its four keys one after the other, by the clock",
            lambda: whole(RSA),
            four_rsa_keys,
            0.75,
            runs // 2,
            time.perf_counter,
        ),
        (
            "a new process: import and open; limit: import cryptography.x509 and pydantic, one model",
            lambda: process(COLD),
            lambda: process(COLD_LIMIT),
            1.2,
            few,
            children_and_self,
        ),
    )
    yield "| what | firebuild, ms | limit, ms | ratio | fastest, ms | its limit, ms | its ratio | to reach |"
    yield "|---|---|---|---|---|---|---|---|"
    for what, ours, limit, goal, count, clock in cases:
        own, least = compare(ours, limit, max(1, count), clock)
        figures = [
            f"{one:.2f} | {other:.2f} | {one / other:.2f}"
            for one, other in (
                (statistics.median(own), statistics.median(least)),
                (min(own), min(least)),
            )
        ]
        yield f"| {what} | {' | '.join(figures)} | {goal} |"
    authority.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=200)
    for line in rows(parser.parse_args().runs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
