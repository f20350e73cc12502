"""Files that are what they say but do not belong together, and certificates that are no CA's."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from pki_file.operator_files import LEAF, Shop
from pki_file.refusing import refusal

pytestmark = pytest.mark.needs("openssl")


def test_a_key_that_fits_nothing_is_shown_how_to_compare(usual: Shop) -> None:
    key, cert = usual.path("policy.key"), usual.path("root.pem")
    error = refusal(usual, ca_key=key)
    assert error.message.startswith(f'ca_key {key}: the key does not fit "CN=root,O=Operator" (sha256 ')
    assert error.message.endswith(f"in ca_cert {cert}")
    _, _, commands = str(error.hint).partition(": ")
    one, other = commands.split("; ")
    assert subprocess.check_output(shlex.split(one)) == usual.openssl("pkey", "-in", "policy.key", "-pubout")
    assert b"BEGIN PUBLIC KEY" in subprocess.check_output(shlex.split(other))


def test_a_key_that_fits_a_certificate_of_another_setting_is_told_so(usual: Shop) -> None:
    error = refusal(usual, ca_key=usual.path("policy.key"), chain=usual.path("policy.pem"))
    assert str(error.hint).startswith('it fits "CN=policy,O=Operator" (sha256 ')
    assert str(error.hint).endswith(f"in chain {usual.path('policy.pem')}")


def test_a_leaf_is_no_ca(usual: Shop) -> None:
    pem = usual.path("server.pem")
    error = refusal(usual, ca_cert=pem, ca_key=usual.path("server.key"))
    assert error.message.startswith(f'ca_cert {pem}: "CN=server,O=Operator" (sha256 ')
    assert error.message.endswith("is not a CA")
    assert "CA:TRUE" in str(error.hint)


def test_a_ca_whose_key_usage_forbids_signing_is_refused(usual: Shop, shop: Shop) -> None:
    ca = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,digitalSignature"
    cert = shop.root("ca", extensions=ca)
    error = refusal(usual, ca_cert=cert, ca_key=shop.path("ca.key"))
    assert error.message.endswith("lacks keyCertSign")
    assert error.hint == "reissue it with keyUsage=critical,keyCertSign,cRLSign"


def test_a_certificate_of_version_1_is_refused_with_the_reason(usual: Shop, shop: Shop) -> None:
    shop.request("ca")
    # OpenSSL 3.4 and later make version 3 unless they are told.
    if b"-x509v1" in shop.openssl("req", "-help", given=b"", both=True):
        shop.openssl(
            *("req", "-x509v1", "-config", os.devnull, "-in", "ca.csr", "-key", "ca.key", "-out", "ca.pem")
        )
    else:
        shop.openssl("x509", "-req", "-in", "ca.csr", "-signkey", "ca.key", "-out", "ca.pem")
    error = refusal(usual, ca_cert=shop.path("ca.pem"), ca_key=shop.path("ca.key"))
    assert error.message.endswith("is an X.509 certificate of version 1")


def test_an_anchor_that_is_no_ca_is_refused(usual: Shop) -> None:
    error = refusal(usual, anchors=[usual.path("root.pem"), usual.path("server.pem")])
    assert error.message.startswith(f"anchors {usual.path('server.pem')}: ")
    assert error.message.endswith("is not a CA")


def test_an_issuer_in_the_chain_that_is_no_ca_is_refused(usual: Shop, shop: Shop) -> None:
    shop.root("root")
    shop.issue("middle", by="root", extensions=LEAF)
    cert = shop.issue("ca", by="middle")
    error = refusal(
        usual,
        ca_cert=cert,
        ca_key=shop.path("ca.key"),
        chain=shop.write("chain.pem", shop.read("middle.pem", "root.pem")),
    )
    assert error.message.startswith(f"chain {shop.path('chain.pem')}: ")
    assert error.message.endswith("is not a CA")
