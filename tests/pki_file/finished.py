"""Finished certificates as settings, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from firebuild_pki import CAError, TLSMaterial
from firebuild_pki.grpc_handshake import handshake
from pki_file.operator_files import Shop, opened

Pairs = dict[str, Any]


def pairs_of(shop: Shop, ca_cert: Path, server: str = "server", client: str = "client") -> Pairs:
    return {
        "ca_cert": ca_cert,
        "server_cert": shop.path(f"{server}.pem"),
        "server_key": shop.path(f"{server}.key"),
        "client_cert": shop.path(f"{client}.pem"),
        "client_key": shop.path(f"{client}.key"),
    }


def issued(block: Pairs, **more: Any) -> tuple[TLSMaterial, TLSMaterial]:
    with opened(block, **more) as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
        handshake(server, guest)
        assert authority.warnings == ()
    return server, guest


def refusal(block: Pairs, **more: Any) -> CAError:
    with pytest.raises(CAError) as caught:
        opened(block, **more)
    assert str(caught.value).startswith("ca-provider(file): ")
    return caught.value
