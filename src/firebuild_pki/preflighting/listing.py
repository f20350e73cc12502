"""Which providers are installed, and what is wrong with those that cannot be used."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

from firebuild_pki.errors import CAError
from firebuild_pki.plugins import InstalledPlugin, PluginCatalog
from firebuild_pki.values import dataclass


@dataclass(frozen=True, slots=True)
class ListedProvider:
    """An installed provider or key store.

    Args:
        name: the name used in the configuration.
        distribution: the package that brings it.
        version: version of that package.
        location: file of the plugin, or the directory of its package if it cannot be imported.
        summary: what it says of itself; empty if it cannot be used.
        capabilities: what it can do.
        problem: why it cannot be used; None if it can.
        hint: what to do about that.
        kind: ``provider``, or ``key store``, whose name is the scheme of its URIs.
    """

    name: str
    distribution: str
    version: str
    location: str
    summary: str = ""
    capabilities: tuple[str, ...] = ()
    problem: str | None = None
    hint: str | None = None
    kind: str = "provider"

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {**asdict(self), "capabilities": list(self.capabilities)}


def list_providers(catalog: PluginCatalog | None = None) -> tuple[ListedProvider, ...]:
    """Import every installed provider and key store and list it; a broken one harms no other.

    Args:
        catalog: the plugins, by default those installed.
    """
    plugins = PluginCatalog() if catalog is None else catalog
    stores = (_listed_store(plugins, plugin) for plugin in plugins.key_stores())
    return (*(_listed(plugins, plugin) for plugin in plugins.providers()), *stores)


def _listed(catalog: PluginCatalog, plugin: InstalledPlugin) -> ListedProvider:
    known = (plugin.name, plugin.distribution, plugin.version)
    try:
        spec = catalog.load_provider(plugin.name)
    except CAError as error:
        return ListedProvider(*known, _directory(plugin), problem=error.message, hint=error.hint)
    location = _location(spec.factory, plugin)
    return ListedProvider(*known, location, spec.summary, tuple(sorted(spec.capabilities)))


def _listed_store(catalog: PluginCatalog, plugin: InstalledPlugin) -> ListedProvider:
    known, kind = (plugin.name, plugin.distribution, plugin.version), "key store"
    try:
        spec = catalog.load_key_store(plugin.name)
    except CAError as error:
        where = _directory(plugin)
        return ListedProvider(*known, where, problem=error.message, hint=error.hint, kind=kind)
    return ListedProvider(*known, _location(spec.open_key, plugin), spec.summary, kind=kind)


def _location(function: object, plugin: InstalledPlugin) -> str:
    module = sys.modules.get(getattr(function, "__module__", ""))
    return getattr(module, "__file__", None) or _directory(plugin)


def _directory(plugin: InstalledPlugin) -> str:
    try:
        return str(metadata.distribution(plugin.distribution).locate_file(""))
    except metadata.PackageNotFoundError:
        return ""
