"""A provider that keeps the contract now, not in 2030, and ways to make it break the contract."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from typing import Any

from cryptography import x509
from pydantic import BaseModel

from firebuild_pki import (
    Capability,
    PluginCatalog,
    ProviderContext,
    Settings,
    SignedCertificate,
    SignRequest,
    TrustBundle,
)
from pki.signers import Operator, Plugin
from pki.tools import OperatorCA, pem

Answer = Callable[["Current", SignRequest], Any]


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class NoSettings(Settings):
    pass


def whole(self: Current, request: SignRequest) -> SignedCertificate:
    return SignedCertificate(pem(self.leaf(request)), self.intermediate.pem + self.upper.pem)


class Current(Operator):
    """Keeps the contract: root, two intermediates; `answer` makes it break the contract."""

    answer: Answer = staticmethod(whole)

    def __init__(self, settings: Any, context: ProviderContext) -> None:
        super().__init__(lambda operator, request: self.answered(request), lambda operator: self.trust())
        self.settings, self.context = settings, context
        self.is_open = False

    def open(self) -> None:
        self.context.clock()
        valid = (now() - timedelta(days=1), now() + timedelta(days=30))
        self.root = OperatorCA("Operator Root", valid=valid)
        self.upper = OperatorCA("Operator Upper", self.root, valid=valid)
        self.intermediate = OperatorCA("Operator Intermediate", self.upper, valid=valid)
        self.aside = OperatorCA("Operator Aside", self.root, valid=valid)
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    def trust(self) -> TrustBundle:
        return TrustBundle(self.root.pem)

    def answered(self, request: SignRequest) -> Any:
        if not self.is_open:
            raise RuntimeError("not open")
        return type(self).answer(self, request)

    def leaf(self, request: SignRequest, **flaws: Any) -> x509.Certificate:
        valid = (now() - timedelta(minutes=5), now() + request.ttl)
        return super().leaf(request, **{"valid": valid, **flaws})


def plugin(
    name: str,
    provider: type[Current] = Current,
    settings_model: type[BaseModel] = NoSettings,
    capabilities: Sequence[Capability] = (Capability.SIGN,),
) -> Plugin:
    return Plugin(name, provider, settings_model=settings_model, capabilities=capabilities)


def catalog(name: str) -> PluginCatalog:
    """Find a plugin in the modules next door; an entry point named `wrong-key` leads to `wrong_key`."""
    group, attribute = "firebuild_pki.providers", name.replace("-", "_")
    modules = (f"pki_conformance.bad_{kind}" for kind in ("answers", "habits", "pairs"))
    (module,) = (one for one in modules if hasattr(importlib.import_module(one), attribute))
    embedded = EntryPoint("embedded", "firebuild_pki.providers.embedded", group)
    return PluginCatalog(providers=[embedded, EntryPoint(name, f"{module}:{attribute}", group)])
