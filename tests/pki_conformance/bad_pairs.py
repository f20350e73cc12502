"""Ready pairs of an operator, good and bad."""

from __future__ import annotations

from datetime import timedelta

from firebuild_pki import (
    Capability,
    CAProvider,
    Profile,
    ProviderContext,
    ReadyPair,
    Settings,
    TrustBundle,
)
from firebuild_pki.keys import generate_key, private_key_pem
from pki.characters import ED25519
from pki.signers import Plugin
from pki.tools import CLIENT_AUTH, SERVER_AUTH, OperatorCA, pem
from pki_conformance.current import now


class PairSettings(Settings):
    """Which flaw the pairs have."""

    flaw: str = ""
    """The flaw."""


class Pairs(CAProvider):
    """Two pairs, read when it is opened."""

    def __init__(self, settings: PairSettings, context: ProviderContext) -> None:
        self._flaw = settings.flaw
        self._pairs: dict[Profile, ReadyPair] = {}

    def open(self) -> None:
        valid = (now() - timedelta(days=1), now() + timedelta(days=30))
        self._ca = OperatorCA("Operator Root", valid=valid)
        names = {Profile.SERVER: "builds.example.com", Profile.GUEST: "guest-1.example.com"}
        for profile, name in names.items():
            usages = [SERVER_AUTH if profile is Profile.SERVER else CLIENT_AUTH]
            if self._flaw == "both usages":
                usages = [SERVER_AUTH, CLIENT_AUTH]
            key = generate_key()
            leaf = self._ca.leaf(key.public_key(), [name, "also.example.com"], usages=usages, valid=valid)
            key = generate_key() if self._flaw == "other key" else key
            secret = {"no key": b"nothing", "odd key": ED25519}.get(self._flaw, private_key_pem(key))
            called = "elsewhere.example.com" if self._flaw == "name" else name
            self._pairs[profile] = ReadyPair(pem(leaf, self._ca.certificate), secret, called)

    def close(self) -> None:
        self._pairs = {}

    def trust_bundle(self) -> TrustBundle:
        return TrustBundle(self._ca.pem)

    def ready_pair(self, profile: Profile) -> ReadyPair:
        if self._flaw == "nothing":
            return None  # type: ignore[return-value]
        return self._pairs[profile]


pairs = Plugin("pairs", Pairs, settings_model=PairSettings, capabilities=[Capability.READY_PAIRS])
