"""Plugins for the tests: a provider for every turn of a provider's life, ready pairs, observers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from firebuild_pki import (
    CAEvent,
    Capability,
    CAProvider,
    Note,
    NoteLevel,
    Profile,
    ProviderContext,
    ReadyPair,
    RetryAfter,
    Settings,
    SignedCertificate,
    SignRequest,
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
                Note("modes are out", "mode", "use none", NoteLevel.FATAL),
                Note("and so is the rest", level=NoteLevel.FATAL),
                Note("by the way", "mode"),
            )
        return (Note("modes are odd", "mode", "use none"),) if self.mode == "odd" else ()

    def open(self) -> None:
        if self.mode == "locked":
            raise PermissionError("sealed")

    def check(self) -> Sequence[Note]:
        if self.mode == "wordy":
            return ["all is well"]  # type: ignore[list-item]
        if self.mode == "check":
            return (Note("the role is missing", hint="make it", level=NoteLevel.FATAL),)
        return (Note("expires in a week"),)

    def close(self) -> None:
        CLOSED.append(self.mode)
        if self.mode == "stuck":
            raise TimeoutError("the token could not be revoked")

    def revoke(self, certificate_pem: bytes) -> None:
        if self.mode == "immortal":
            raise LookupError("unknown serial")
        if self.mode == "away":
            raise ConnectionError("nobody there")
        REVOKED.append(certificate_pem)


CLOSED: list[str] = []
REVOKED: list[bytes] = []
revoker = Plugin(
    "revoker",
    Revoker,
    settings_model=RevokerSettings,
    capabilities=(Capability.SIGN, Capability.REVOKE),
)


class Undecided(Operator):
    """Promises both ways; its settings decide which it is."""

    def __init__(self, settings: RevokerSettings, context: ProviderContext) -> None:
        super().__init__(signed_with_chain, root_only)
        self.mode = settings.mode

    def capabilities(self) -> frozenset[Capability] | None:
        return {
            "both": None,
            "none": frozenset[Capability](),
            "extra": frozenset({Capability.SIGN, Capability.REVOKE}),
            "sign": frozenset({Capability.SIGN}),
        }[self.mode]


undecided = Plugin(
    "undecided",
    Undecided,
    settings_model=RevokerSettings,
    capabilities=(Capability.SIGN, Capability.READY_PAIRS),
)


class Sloth(Operator):
    """Does not answer: where, its settings say; until it is woken up."""

    def __init__(self, settings: RevokerSettings, context: ProviderContext) -> None:
        super().__init__(signed_with_chain, root_only)
        self.mode = settings.mode

    def open(self) -> None:
        self.sleep("open")

    def sign(self, request: SignRequest) -> SignedCertificate:
        self.sleep("sign")
        return super().sign(request)

    def close(self) -> None:
        CLOSED.append(self.mode)
        self.sleep("close")

    def sleep(self, where: str) -> None:
        if self.mode == where:
            MORNING.wait(60)
        if self.mode == f"exit {where}":
            raise SystemExit(f"leaving at {where}")
        if self.mode == f"timeout {where}":
            raise TimeoutError("the backend's own")


MORNING = threading.Event()
sloth = Plugin("sloth", Sloth, settings_model=RevokerSettings)


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
        key = ec.generate_private_key(ec.SECP521R1()) if self.flaw == "odd curve" else generate_key()
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


class Scribe:
    """An observer with settings."""

    class ScribeSettings(Settings):
        ink: str = "blue"
        pages: int

    def __init__(self) -> None:
        self.lines: list[str] = []

    @hookimpl
    def ca_observer_settings(self) -> type[Settings]:
        return self.ScribeSettings

    @hookimpl
    def ca_event(self, event: CAEvent, settings: ScribeSettings) -> None:
        self.lines.append(f"{event.kind} in {settings.ink} on {settings.pages}")


class Snorer:
    """An observer that does not return until it is woken up."""

    @hookimpl
    def ca_event(self, settings: object) -> None:
        assert settings is None
        MORNING.wait(60)


class BadModel:
    """An observer whose settings have no model."""

    @hookimpl
    def ca_observer_settings(self) -> Any:
        return dict

    @hookimpl
    def ca_event(self, event: CAEvent) -> None:
        raise AssertionError


class FailingModel:
    """An observer whose settings cannot be asked for."""

    @hookimpl
    def ca_observer_settings(self) -> Any:
        raise LookupError("not today")

    @hookimpl
    def ca_event(self, event: CAEvent) -> None:
        raise AssertionError


witness = Witness()
drunkard = Drunkard()
scribe = Scribe()
snorer = Snorer()
bad_model = BadModel()
failing_model = FailingModel()


class Registrar(Operator):
    """A CA that issues later: `ANSWERS` are what it says to each question, the certificate where they end."""

    def __init__(self, settings: Settings, context: ProviderContext) -> None:
        super().__init__(signed_with_chain, root_only)

    def sign(self, request: SignRequest) -> Any:
        return self._answer(request, "new")

    def poll(self, request: SignRequest, handle: str) -> Any:
        return self._answer(request, handle)

    def _answer(self, request: SignRequest, handle: str) -> Any:
        ASKED.append((request.profile, handle))
        return ANSWERS.pop(0) if ANSWERS else signed_with_chain(self, request)


ANSWERS: list[Any] = []
ASKED: list[tuple[Profile, str]] = []
registrar = Plugin("registrar", Registrar)


class ImpatientRegistrar(Operator):
    """Wants the same request once more, and knows of no handles."""

    def __init__(self, settings: Settings, context: ProviderContext) -> None:
        super().__init__(signed_with_chain, root_only)
        self._asked = 0

    def sign(self, request: SignRequest) -> Any:
        self._asked += 1
        return RetryAfter(0) if self._asked < 3 else signed_with_chain(self, request)


impatient = Plugin("impatient", ImpatientRegistrar)
