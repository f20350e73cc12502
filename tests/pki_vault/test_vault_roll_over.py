"""The CA of a mount rolls over while an authority is open."""

from __future__ import annotations

from typing import Any

import pytest

from firebuild_pki import MaterialError
from firebuild_pki.grpc_handshake import handshake
from pki_vault.tools import Backend, raises

pytestmark = pytest.mark.needs("bao")

NEW = {"common_name": "New root", "key_type": "ec", "key_bits": 256, "ttl": "700h"}


@pytest.fixture
def at(backend: Backend, unique: str) -> Backend:
    """A mount whose root signs the leaves."""
    return Backend.prepared(backend.api, unique, intermediate=False)


def rotate(at: Backend) -> Any:
    return at.api.write(f"{at.pki.mount}/root/rotate/internal", **NEW)


def take_the_new_root(at: Backend) -> None:
    at.api.write(f"{at.pki.mount}/root/replace", default="next")


def test_a_build_is_told_that_its_root_was_replaced_and_the_next_one_works(at: Backend) -> None:
    with at.open() as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
        rotate(at)
        handshake(server, authority.issue_guest())  # the new root does not sign yet
        take_the_new_root(at)
        with raises(MaterialError, "rolled over", '"CN=New root"', "begin the build again", "cross-signed"):
            authority.issue_guest()
        handshake(server, guest)
        with at.open() as later:
            handshake(later.issue_server(), later.issue_guest())


def test_a_build_that_has_issued_nothing_yet_is_told_too(at: Backend) -> None:
    with at.open() as authority:
        rotate(at)
        take_the_new_root(at)
        with raises(MaterialError, "rolled over"):
            authority.issue_server()


def test_a_new_root_that_the_old_one_has_cross_signed_disturbs_nobody(at: Backend) -> None:
    mount = at.pki.mount
    with at.open() as authority:
        server = authority.issue_server()
        old = at.api.read(f"{mount}/config/issuers")["default"]
        new = rotate(at)
        csr = at.api.write(f"{mount}/intermediate/cross-sign", common_name="New root", key_ref=new["key_id"])
        signed = at.api.write(
            f"{mount}/issuer/{old}/sign-intermediate", csr=csr["csr"], common_name="New root", ttl="600h"
        )
        at.api.write(f"{mount}/intermediate/set-signed", certificate=signed["certificate"])
        take_the_new_root(at)
        handshake(server, authority.issue_guest())
        assert authority.warnings == ()


def test_a_new_intermediate_disturbs_nobody(backend: Backend, unique: str) -> None:
    at = Backend.prepared(backend.api, unique)
    name = {"common_name": "New intermediate"}
    with at.open() as authority:
        server = authority.issue_server()
        csr = at.api.write(f"{unique}/intermediate/generate/internal", key_type="ec", key_bits=256, **name)
        signed = at.api.write(f"{unique}-root/root/sign-intermediate", csr=csr["csr"], ttl="600h", **name)
        made = at.api.write(f"{unique}/intermediate/set-signed", certificate=signed["certificate"])
        at.api.write(f"{unique}/config/issuers", default=made["imported_issuers"][0])
        handshake(server, authority.issue_guest())
        assert authority.warnings == ()
