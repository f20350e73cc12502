"""Providers that tests install: the moody one, in front of everything else on sys.path."""

from __future__ import annotations

from pki.conftest import Install

TALKING = """
import os, sys
def say(when):
    print("print", when, flush=True)
    sys.stdout.buffer.write(f"buffer {when}\\n".encode())
    sys.stdout.buffer.flush()
    os.write(1, f"descriptor {when}\\n".encode())
    os.system(f"echo program {when}")
say("import")
from firebuild_pki import ProviderSpec, hookimpl
from firebuild_pki.providers.embedded import EmbeddedProvider, EmbeddedSettings
class Talking(EmbeddedProvider):
    def open(self):
        say("open")
        super().open()
    def sign(self, request):
        say("sign")
        return super().sign(request)
@hookimpl
def register_ca_providers():
    say("hook")
    return ProviderSpec("talking", EmbeddedSettings, Talking, "says a lot")
"""
MOODY = "from pki_preflight.moody import register_ca_providers\n"


def install_moody(install: Install) -> None:
    """Install `pki_preflight.moody` as the provider `moody`."""
    install("acme-moody", MOODY, name="moody", module="acme_moody")
