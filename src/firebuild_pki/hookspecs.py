"""Everything a plugin can plug into; the types are in `firebuild_pki.provider` and `keystores`.

A plugin is a module (or any object) with functions that carry `hookimpl`, announced by an entry
point: group ``firebuild_pki.providers`` for providers, ``firebuild_pki.observers`` for observers,
``firebuild_pki.key_stores`` for key stores. The entry point's name is the name used in the
configuration; of a key store, the scheme of its URIs. An implementation may take fewer
arguments than the specification, which is how the specification can grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pydantic import BaseModel

    from firebuild_pki.keystores import KeyStoreSpec
    from firebuild_pki.provider import CAEvent, ProviderSpec

PROJECT = "firebuild_pki"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_ca_providers() -> ProviderSpec | Sequence[ProviderSpec]:
    """Describe one provider or several; called once, after the plugin was selected by name.

    Returns:
        A spec whose name is that of the entry point, or a list that contains one.
    """
    raise NotImplementedError


@hookspec
def register_key_stores() -> KeyStoreSpec | Sequence[KeyStoreSpec]:
    """Describe one store of keys or several; called once, after a setting named a key with its scheme.

    Returns:
        A spec whose scheme is the name of the entry point, or a list that contains one.
    """
    raise NotImplementedError


@hookspec
def ca_event(event: CAEvent, settings: BaseModel | None) -> None:
    """Take notice of something the authority did: issued, refused, revoked, closed.

    Called after the fact, one call at a time, and only for the observers that ``ca.observers``
    names. An exception becomes a warning of the authority; it does not undo what happened.

    Args:
        event: what happened. Never holds a private key.
        settings: the block ``ca.<name of the observer>``, an instance of the model that
            `ca_observer_settings` returned; None without that hook.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def ca_observer_settings() -> type[BaseModel]:
    """Name the model of an observer's settings (best: a `Settings`); optional."""
    raise NotImplementedError
