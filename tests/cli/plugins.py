"""Providers that tests install: the moody one, in front of everything else on sys.path."""

from __future__ import annotations

from pki.conftest import Install

MOODY = "from pki_preflight.moody import register_ca_providers\n"


def install_moody(install: Install) -> None:
    """Install `pki_preflight.moody` as the provider `moody`."""
    install("acme-moody", MOODY, name="moody", module="acme_moody")
