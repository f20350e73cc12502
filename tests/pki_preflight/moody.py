"""A provider that works, except for what its settings ask for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator

from firebuild_pki import (
    CAError,
    Capability,
    Note,
    NoteLevel,
    ProviderContext,
    ProviderSpec,
    SecretRef,
    SignedCertificate,
    SignRequest,
    hookimpl,
)
from firebuild_pki.providers.embedded import EmbeddedProvider, EmbeddedSettings

WAKE = threading.Event()
"""Ends a check that hangs."""


class MoodySettings(EmbeddedSettings):
    moods: Annotated[tuple[str, ...], BeforeValidator(tuple)] = ()
    password: SecretRef | None = None


class Moody(EmbeddedProvider):
    def __init__(self, settings: MoodySettings, context: ProviderContext) -> None:
        super().__init__(settings, context)
        self.moods, self.context, self.settings = settings.moods, context, settings
        if "no-factory" in self.moods:
            raise RuntimeError("no factory today")

    def capabilities(self) -> frozenset[Capability]:
        revokes = any(mood.startswith("revokes") for mood in self.moods)
        return frozenset({Capability.SIGN, *([Capability.REVOKE] if revokes else [])})

    def validate(self) -> Sequence[Note]:
        if "wrong-settings" in self.moods:
            return [Note("expected better settings", "moods", "be serious", NoteLevel.FATAL)]
        return [Note("that is many moods", "moods", "have fewer")] if "many" in self.moods else []

    def open(self) -> None:
        if self.settings.password is not None:
            self.settings.password.resolve(self.context.environ)
        if "locked" in self.moods:
            raise CAError("the door is locked", hint="knock")
        if "waits" in self.moods:
            self.context.report("no answer of it, trying\x1b[31m for 30 s")
        if "busy" in self.moods:
            raise ConnectionRefusedError("busy")
        super().open()

    def check(self) -> Sequence[Note]:
        if "hangs" in self.moods:
            WAKE.wait(60)
        if "strings" in self.moods:
            return ["fine"]  # type: ignore[list-item]
        if "no-role" in self.moods:
            return [
                Note("unsealed", level=NoteLevel.OK, about="reachable"),
                Note("no such role", "role", "write it", NoteLevel.FATAL, about="role"),
            ]
        return [Note("tired\x1b[31m\nand old")] if "tired" in self.moods else []

    def sign(self, request: SignRequest) -> SignedCertificate:
        if f"no-{request.profile}" in self.moods:
            raise CAError(f"no {request.profile} today")
        return super().sign(request)

    def revoke(self, certificate_pem: bytes) -> None:
        if "revokes-badly" in self.moods:
            raise CAError("the list is full")

    def close(self) -> None:
        super().close()
        if "slams" in self.moods:
            raise RuntimeError("the door fell off")


@hookimpl
def register_ca_providers() -> ProviderSpec:
    can = frozenset({Capability.SIGN, Capability.REVOKE})
    return ProviderSpec("moody", MoodySettings, Moody, "a CA with moods", can)
