"""What the kit finds in a certificate, the framework finds in a build, in words of its own."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from firebuild_pki import Authority, CAError, open_authority
from pki.tools import ca_settings
from pki_conformance.current import catalog

LEAF = r'"CN=leaf" \(sha256 [0-9a-f]{16}…\)'
NAMES = "expected a certificate for b.firebuild.internal"
USAGE = "expected the extended key usage serverAuth and nothing else in the server certificate"

REFUSED = {
    "wrong-key": f"the certificate {LEAF} is for another public key than the one requested",
    "wrong-names": f"{NAMES}, found subject alternative names: somebody.else.example",
    "leaf-is-ca": f"expected an end-entity certificate, but {LEAF} is a CA",
    "no-signatures": "the key usage of the certificate lacks digitalSignature, which TLS 1.3 needs",
    "signs-certificates": "the key usage of the certificate has keyCertSign; only a CA may",
    "expired": rf"{LEAF} expired at \S+ \S+, now is \S+ \S+ \(hint: renew it, or .*\)",
    "not-yet": rf"{LEAF} is not valid before .* \(hint: compare the clocks of this machine and of the CA\)",
    "too-short": rf"{LEAF} is valid until .*, but the build may need it until .*",
    "missing-intermediate": rf"the chain has a missing link: {LEAF} was issued by .*",
    "nothing": "expected a SignedCertificate, found NoneType",
    "raising": "issuing the server certificate failed: KeyError: 'certificate'",
    "slow": r"issuing the server certificate did not end within 0\.3 s \(hint: .*ca\.call_timeout\)",
}

WARNED = {
    "both-usages": f"{USAGE}, found: clientAuth, serverAuth",
    "reversed-chain": "the chain that the provider returned is out of order, and was sorted",
    "root-in-chain": "the chain that the provider returned holds a root, which was left out",
    "leaf-in-chain": "the chain that the provider returned holds the leaf, which was left out",
    "repeated": "the chain that the provider returned holds a certificate twice, which was left out",
    "no-key-usage": "the certificate has no key usage extension",
    "small-serial": "the serial number looks shorter than 64 random bits",
}


def opened(name: str) -> Authority:
    section = {"provider": name, "call_timeout": "300ms" if name == "slow" else "60s"}
    return open_authority(ca_settings(section, catalog(name)), build_id="b")


@pytest.mark.parametrize(("name", "message"), REFUSED.items(), ids=REFUSED)
def test_a_build_refuses_it(name: str, message: str) -> None:
    deadline = datetime.now(UTC) + timedelta(minutes=30)
    with opened(name) as authority, pytest.raises(CAError) as caught:
        authority.issue_server(build_deadline=deadline)
    assert re.fullmatch(rf"ca-provider\({name}\): {message}", str(caught.value))


@pytest.mark.parametrize(("name", "warning"), WARNED.items(), ids=WARNED)
def test_a_build_warns_of_it(name: str, warning: str) -> None:
    with opened(name) as authority:
        authority.issue_server()
    assert authority.warnings == (warning,)
