"""Somebody with the right name and the wrong CA."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.material import TLSMaterial
from firebuild_pki.provider import Clock, Profile
from firebuild_pki.x509 import Validity, make_leaf, make_root, to_pem


def stranger_like(guest: TLSMaterial, clock: Clock) -> TLSMaterial:
    """Make a guest that trusts the same CA and has the same name, certified by a CA of its own."""
    validity = Validity.starting(clock(), timedelta(hours=1), backdate=timedelta(minutes=5))
    root = make_root(generate_key(), validity, with_intermediate=False)
    key = generate_key()
    leaf = make_leaf(key.public_key(), root, validity, profile=Profile.GUEST, dns_names=(guest.identity,))
    return replace(guest, certificate_chain_pem=to_pem([leaf]), private_key_pem=private_key_pem(key))
