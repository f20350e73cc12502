"""What an authority costs: opening one and issuing, against the cryptography that cannot be avoided.

    .venv/bin/python benchmarks/ca_issuing.py [--runs 200]

Framework and bare operations take turns, so that a busy machine slows both. The ratio of the medians is what
counts; on a busy machine that of the fastest runs says more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from firebuild_pki import Authority, Profile, open_authority
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.provider import utc_now
from firebuild_pki.x509 import Validity, make_csr, make_intermediate, make_leaf, make_root, to_pem

NAME = "guest.b.firebuild.internal"


class Bare:
    """The same certificates without the framework."""

    def __init__(self) -> None:
        self.validity = Validity.starting(utc_now(), timedelta(hours=1), backdate=timedelta(minutes=5))
        self.root = make_root(generate_key(), self.validity, with_intermediate=True)
        self.issuer = make_intermediate(generate_key(), self.root, self.validity)

    def issue(self) -> None:
        """Key, request, signature, and a full verification of the path."""
        key = generate_key()
        csr = x509.load_pem_x509_csr(make_csr(key, [NAME]))
        leaf = make_leaf(
            csr.public_key(), self.issuer, self.validity, profile=Profile.GUEST, dns_names=[NAME]
        )
        store = Store([self.root.certificate])
        PolicyBuilder().store(store).time(utc_now()).build_client_verifier().verify(
            leaf, [self.issuer.certificate]
        )
        to_pem([leaf, self.issuer.certificate])
        private_key_pem(key)


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> dict[str, float]:
    """Let both take turns; times in milliseconds."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    own, bare = ([1000 * pair[side] for pair in pairs] for side in (0, 1))
    return {
        "ms": statistics.median(own),
        "bare ms": statistics.median(bare),
        "ratio": statistics.median(own) / statistics.median(bare),
        "ratio of the fastest": min(own) / min(bare),
    }


FIRST = """
import time
from firebuild_pki import open_authority
import firebuild_pki.authority, firebuild_pki.providers.embedded, firebuild_pki.config
began = time.perf_counter()
open_authority({}).close()
print(time.perf_counter() - began)
"""


def first() -> float:
    """Open an authority in a fresh process, all imports aside; in milliseconds."""
    command = [sys.executable, "-c", FIRST]
    return 1000 * float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def reopen() -> None:
    open_authority({}).close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    reopen()
    authority: Authority = open_authority({})
    bare = Bare()
    result = {
        "guest certificate": compare(authority.issue_guest, bare.issue, runs),
        "open and close": compare(reopen, Bare, max(1, runs // 4)),
        "first open in a process": {"ms": min(first() for _ in range(5))},
    }
    authority.close()
    print(
        json.dumps({what: {k: round(v, 2) for k, v in row.items()} for what, row in result.items()}, indent=2)
    )


if __name__ == "__main__":
    main()
