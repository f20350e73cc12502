"""Plugins for the tests: a provider for every turn of a provider's life, ready pairs, observers."""

from __future__ import annotations

from collections.abc import Sequence

from firebuild_pki import (
    CAEvent,
    Capability,
    CAProvider,
    Note,
    Profile,
    ProviderContext,
    ReadyPair,
    Settings,
    TrustBundle,
    hookimpl,
)
from firebuild_pki.keys import generate_key, private_key_pem
from pki.signers import Operator, Plugin, root_only, signed_with_chain
from pki.tools import CLIENT_AUTH, SERVER_AUTH, OperatorCA, pem


class RevokerSettings(Settings):
    mode: str = "fine"


class Revoker(Operator):
    """Can revoke; its settings decide what goes wrong around that."""

    def __init__(self, settings: RevokerSettings, context: ProviderContext) -> None:
        super().__init__(signed_with_chain, root_only)
        self.mode = settings.mode

    def validate(self) -> Sequence[Note]:
        if self.mode == "mute":
            return None  # type: ignore[return-value]
        if self.mode == "refused":
            return (
                Note("modes are out", "mode", "use none", fatal=True),
                Note("and so is the rest", fatal=True),
                Note("by the way", "mode"),
            )
        return (Note("modes are odd", "mode", "use none"),) if self.mode == "odd" else ()

    def open(self) -> None:
        if self.mode == "locked":
            raise PermissionError("sealed")

    def check(self) -> Sequence[Note]:
        if self.mode == "check":
            return (Note("the role is missing", hint="make it", fatal=True),)
        return (Note("expires in a week"),)

    def close(self) -> None:
        CLOSED.append(self.mode)
        if self.mode == "stuck":
            raise TimeoutError("the token could not be revoked")

    def revoke(self, certificate_pem: bytes) -> None:
        if self.mode == "immortal":
            raise LookupError("unknown serial")
        REVOKED.append(certificate_pem)


CLOSED: list[str] = []
REVOKED: list[bytes] = []
revoker = Plugin(
    "revoker",
    Revoker,
    settings_model=RevokerSettings,
    capabilities=(Capability.SIGN, Capability.REVOKE),
)


class PairSettings(Settings):
    flaw: str = "none"


class Pairs(CAProvider):
    """An operator's finished pairs."""

    def __init__(self, settings: PairSettings, context: ProviderContext) -> None:
        self.ca = OperatorCA("Operator Root")
        self.flaw = settings.flaw

    def trust_bundle(self) -> TrustBundle:
        return TrustBundle(self.ca.pem)

    def ready_pair(self, profile: Profile) -> ReadyPair:
        names = {Profile.SERVER: "builds.example.com", Profile.GUEST: "guest-1.example.com"}
        usages = [SERVER_AUTH if profile is Profile.SERVER else CLIENT_AUTH]
        if self.flaw == "both usages":
            usages = [SERVER_AUTH, CLIENT_AUTH]
        if self.flaw == "swapped":
            usages = [CLIENT_AUTH if profile is Profile.SERVER else SERVER_AUTH]
        key = generate_key()
        leaf = self.ca.leaf(key.public_key(), [names[profile], "also.example.com"], usages=usages)
        if self.flaw == "nothing":
            return None  # type: ignore[return-value]
        secret = private_key_pem(generate_key() if self.flaw == "other key" else key)
        if self.flaw == "broken key":
            secret = secret[:60]
        if self.flaw == "odd key":
            secret = ED25519
        name = "elsewhere.example.com" if self.flaw == "name" else names[profile]
        return ReadyPair(pem(leaf), secret, name)


ED25519 = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
"""
pairs = Plugin("pairs", Pairs, settings_model=PairSettings, capabilities=(Capability.READY_PAIRS,))


class Witness:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[CAEvent] = []

    @hookimpl
    def ca_event(self, event: CAEvent) -> None:
        self.events.append(event)


class Drunkard:
    """An observer that always fails."""

    @hookimpl
    def ca_event(self, event: CAEvent) -> None:
        raise OSError("disk full")


witness = Witness()
drunkard = Drunkard()
