"""Finding plugins by entry point, and loading the one that is wanted.

A provider's name is the name of its entry point in the group ``firebuild_pki.providers``; an
observer's is that in ``firebuild_pki.observers``, a key store's scheme that in
``firebuild_pki.key_stores``. Nothing is imported until it is asked for by name, so that a broken
plugin fails only where it is selected.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from importlib.metadata import EntryPoint
from types import CoroutineType, ModuleType
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar, cast

import pluggy
from pydantic import BaseModel

from firebuild_pki import hookspecs
from firebuild_pki.errors import ProviderConflict, ProviderLoadError, ProviderNotFound
from firebuild_pki.positions import nearest
from firebuild_pki.provider import API_VERSION, Capability, ProviderSpec
from firebuild_pki.values import dataclass
from firebuild_pki.wrapping import described, harmless, one_text

if TYPE_CHECKING:
    from firebuild_pki.keystores import KeyStoreSpec

_Spec = TypeVar("_Spec", ProviderSpec, "KeyStoreSpec")

PROVIDER_GROUP = "firebuild_pki.providers"
OBSERVER_GROUP = "firebuild_pki.observers"
KEY_STORE_GROUP = "firebuild_pki.key_stores"
_GROUPS = frozenset({PROVIDER_GROUP, OBSERVER_GROUP, KEY_STORE_GROUP})

NOTHING_INSTALLED = (
    "nothing is installed under that entry-point group; a source tree must be installed to count"
)
"""Hint for those who run from a bare checkout: entry points come with installed distributions."""


@dataclass(frozen=True, slots=True)
class InstalledPlugin:
    """A plugin as its distribution announces it; nothing of it has been imported.

    Args:
        name: the name used in the configuration.
        distribution: the package that brings it, as pip knows it.
        version: version of that package.
    """

    name: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True, slots=True)
class Observer:
    """An observer's plugin, imported.

    Args:
        name: the name used in the configuration.
        settings_model: model of the block ``ca.<name>``, None if it has no settings.
        notify: takes the arguments of the hook ``ca_event`` by name; returns what the plugin returned, and
            exceptions come through.
    """

    name: str
    settings_model: type[BaseModel] | None
    notify: Callable[..., Iterable[object]]


class PluginCatalog:
    """The installed plugins.

    Args:
        providers: entry points to use instead of those installed in this environment.
        observers: the same for observers.
        key_stores: the same for key stores.
    """

    def __init__(
        self,
        *,
        providers: Iterable[EntryPoint] | None = None,
        observers: Iterable[EntryPoint] | None = None,
        key_stores: Iterable[EntryPoint] | None = None,
    ) -> None:
        given = {PROVIDER_GROUP: providers, OBSERVER_GROUP: observers, KEY_STORE_GROUP: key_stores}
        installed = _installed(_path_state()) if None in given.values() else ()
        self._providers, self._observers, self._key_stores = (
            _sorted(_of(installed, group) if entries is None else entries) for group, entries in given.items()
        )

    def __eq__(self, other: object) -> bool:
        return self._entries == other._entries if isinstance(other, PluginCatalog) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._entries)

    @property
    def _entries(self) -> tuple[tuple[EntryPoint, ...], ...]:
        return (self._providers, self._observers, self._key_stores)

    @property
    def provider_names(self) -> frozenset[str]:
        """Names of the installed providers; unlike `providers`, this reads no metadata."""
        return frozenset(entry.name for entry in self._providers)

    @property
    def observer_names(self) -> frozenset[str]:
        """Names of the installed observers."""
        return frozenset(entry.name for entry in self._observers)

    def providers(self) -> tuple[InstalledPlugin, ...]:
        """List the installed providers by name, without importing any."""
        return tuple(_describe(entry) for entry in self._providers)

    def observers(self) -> tuple[InstalledPlugin, ...]:
        """List the installed observers by name, without importing any."""
        return tuple(_describe(entry) for entry in self._observers)

    def key_stores(self) -> tuple[InstalledPlugin, ...]:
        """List the installed key stores by scheme, without importing any."""
        return tuple(_describe(entry) for entry in self._key_stores)

    def load_provider(self, name: str) -> ProviderSpec:
        """Import one provider's plugin and ask it for its spec.

        Raises:
            ProviderNotFound: nothing installed has that name.
            ProviderConflict: several distributions, or several specs of one plugin, have it.
            ProviderLoadError: the plugin cannot be imported, has a wrong hook, registers nothing
                under that name, or was written for another version of the contract.
        """
        entry = _select(self._providers, name, "provider")
        specs = _registered(entry, "provider", "register_ca_providers", ProviderSpec, _plain)
        return _spec_named(entry, [(spec.name, spec) for spec in specs], "provider")

    def load_key_store(self, scheme: str) -> KeyStoreSpec:
        """Import one key store's plugin and ask it for its spec.

        Raises:
            ProviderNotFound, ProviderConflict, ProviderLoadError: as for `load_provider`.
        """
        from firebuild_pki.keystores import KeyStoreSpec  # only those who have such a key need it

        entry = _select(self._key_stores, scheme, "key store")
        specs = _registered(entry, "key store", "register_key_stores", KeyStoreSpec, _plain_store)
        return _spec_named(entry, [(spec.scheme, spec) for spec in specs], "key store")

    def load_observer(self, name: str) -> Observer:
        """Import one observer's plugin and ask it for the model of its settings.

        Raises:
            ProviderNotFound, ProviderConflict, ProviderLoadError: as for `load_provider`.
        """
        entry = _select(self._observers, name, "observer")
        manager = _register(entry, "observer")
        if not manager.hook.ca_event.get_hookimpls():
            raise _load_error(entry, "it does not implement the hook ca_event", _hook_hint())
        with _loading(entry, "its hook failed"):
            model = manager.hook.ca_observer_settings()
        if model is not None and not (isinstance(model, type) and issubclass(model, BaseModel)):
            found = getattr(model, "__name__", type(model).__name__)
            raise _load_error(entry, f"ca_observer_settings must return a pydantic model, found {found}")
        return Observer(name, model, manager.hook.ca_event)


def installed_providers() -> tuple[InstalledPlugin, ...]:
    """List the providers installed in this environment, without importing any."""
    return PluginCatalog().providers()


def load_provider(name: str) -> ProviderSpec:
    """Load one provider installed in this environment; see `PluginCatalog.load_provider`."""
    return PluginCatalog().load_provider(name)


def _of(found: Iterable[EntryPoint], group: str) -> Iterator[EntryPoint]:
    return (one for one in found if one.group == group)


def _sorted(found: Iterable[EntryPoint]) -> tuple[EntryPoint, ...]:
    return tuple(sorted(found, key=lambda entry: entry.name))


def _path_state() -> tuple[object, ...]:
    """What decides which distributions are found: the import path, and when its directories last changed."""
    changed = []
    for place in sys.path:
        try:
            changed.append(os.stat(place or ".").st_mtime_ns)
        except (OSError, ValueError):
            changed.append(0)
    return (*sys.path, *changed, *map(id, sys.meta_path))


@lru_cache(maxsize=2)
def _installed(_state: tuple[object, ...]) -> tuple[EntryPoint, ...]:
    """Find the entry points of our groups.

    `importlib.metadata.entry_points` parses those of every distribution, each time; here only the few files
    that mention a group of ours are.
    """
    found: list[EntryPoint] = []
    first = None
    for distribution in metadata.distributions(path=list(dict.fromkeys(sys.path))):
        place = str(distribution.locate_file(""))
        first = first or place
        text = distribution.read_text("entry_points.txt") or ""
        if not any(group in text for group in _GROUPS):
            continue
        # As when importing, the first of a name counts. Its name takes longer to read than all the rest, and
        # nothing is before what is in the first directory.
        if place == first or not _is_shadowed(distribution, place):
            found += distribution.entry_points
    return tuple(one for one in found if one.group in _GROUPS)


def _is_shadowed(distribution: metadata.Distribution, place: str) -> bool:
    try:
        return str(metadata.distribution(distribution.name).locate_file("")) != place
    except Exception:  # without METADATA, each version of Python fails in its own way
        return False


def _describe(entry: EntryPoint) -> InstalledPlugin:
    try:
        distribution, version = (entry.dist.name, entry.dist.version) if entry.dist else (None, None)
    except Exception:  # without METADATA, each version of Python fails in its own way
        distribution = version = None
    return InstalledPlugin(entry.name, distribution or entry.value, version or "")


def _select(entries: Sequence[EntryPoint], name: str, kind: str) -> EntryPoint:
    found = [entry for entry in entries if entry.name == name]
    if not found:
        hint = nearest(name, {one.name for one in entries}) or NOTHING_INSTALLED
        raise ProviderNotFound(f'no installed {kind} is called "{name}"', hint=hint)
    if len(found) > 1:
        owners = " and ".join(sorted(str(_describe(entry)) for entry in found))
        raise ProviderConflict(
            f'the {kind} name "{name}" is claimed by {owners}', hint="uninstall all but one"
        )
    return found[0]


def _register(entry: EntryPoint, kind: str) -> pluggy.PluginManager:
    if EntryPoint.pattern.match(entry.value) is None:
        hint = f"""write {entry.name} = "package.module" into its pyproject.toml, and install it again"""
        raise _load_error(entry, f'expected its entry point to lead to a module, found "{entry.value}"', hint)
    with _loading(entry, f"importing {entry.value} failed"):
        plugin: Any = entry.load()
    with _loading(entry, f"not a usable {kind} plugin", _hook_hint()):
        # An object of a plugin's own class may have no hash, or one of its own.
        return (_module_manager if type(plugin) is ModuleType else _manager)(plugin, entry.name)


def _registered(
    entry: EntryPoint, kind: str, hook: str, spec: type[_Spec], plain: Callable[[EntryPoint, _Spec], _Spec]
) -> list[_Spec]:
    """Return the specs that the hook of a plugin registers, each as `plain` copies it."""
    manager = _register(entry, kind)
    with _loading(entry, "its hook failed"):
        results = getattr(manager.hook, hook)()
        found = [one for result in results for one in _flat(entry, result, spec, hook)]
        return [plain(entry, one) for one in found]


def _manager(plugin: Any, name: str) -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name)
    manager.check_pending()
    return manager


_module_manager = lru_cache(maxsize=16)(_manager)
"""Looks for the hooks of a module once, because pluggy looks at every name in it."""


class _Output:
    """Standard output while plugins are loaded: what their threads write goes to standard error.

    Not `contextlib.redirect_stdout`, which takes the output of all threads, and of two at once that leave in
    another order than they came never gives it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = Counter[int]()

    @contextmanager
    def diverted(self) -> Iterator[None]:
        """Divert what this thread writes until the block ends."""
        thread = threading.get_ident()
        with self._lock:
            if sys.stdout is not None and not isinstance(sys.stdout, _Diverted):
                sys.stdout = cast(TextIO, _Diverted(sys.stdout, self._threads))
            self._threads[thread] += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads[thread] -= 1
                self._threads += Counter()  # without those that are at none
                if not self._threads and isinstance(sys.stdout, _Diverted):
                    sys.stdout = sys.stdout.real


class _Diverted:
    """Standard output, or standard error for some threads; it stays right for whoever keeps it."""

    def __init__(self, real: TextIO, threads: Mapping[int, int]) -> None:
        self.real = real
        self._threads = threads

    def __getattr__(self, name: str) -> Any:
        apart = threading.get_ident() in self._threads and sys.stderr is not None
        return getattr(sys.stderr if apart else self.real, name)


_OUTPUT: Final = _Output()


@contextmanager
def _loading(entry: EntryPoint, what: str, hint: str | None = None) -> Iterator[None]:
    """Turn whatever a plugin's code raises into an error that names its distribution.

    What it prints goes to standard error: standard output may carry JSON.

    Raises:
        ProviderLoadError: for anything but a KeyboardInterrupt, which is the user's.
    """
    try:
        with _OUTPUT.diverted():
            yield
    except KeyboardInterrupt:
        raise
    except ProviderLoadError as error:
        if error.provider == entry.name:
            raise
        failure = _load_error(entry, f"{what}: {described(error)}", hint)
    except (pluggy.PluginValidationError, ValueError) as error:
        # of pluggy, whose class says nothing to people
        reason = str(error) if hint else described(error)
        failure = _load_error(entry, f"{what}: {one_text(reason)}", hint)
        failure.__cause__ = error
    except BaseException as error:
        failure = _load_error(entry, f"{what}: {described(error)}", hint)
        failure.__cause__ = harmless(error)
    else:
        return
    raise failure


def _plain(entry: EntryPoint, spec: ProviderSpec) -> ProviderSpec:
    """Copy a spec, which may be of a plugin's own class, with every field of the type that it has to be."""
    kinds: dict[str, type | tuple[type, ...]] = {"name": str, "summary": str, "api_version": int}
    found = _fields(entry, spec, "ProviderSpec", {**kinds, "capabilities": (set, frozenset)})
    model, factory = spec.settings_model, spec.factory
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise _load_error(entry, "settings_model of its ProviderSpec is not a pydantic model")
    if not callable(factory):
        raise _load_error(entry, "factory of its ProviderSpec cannot be called")
    return ProviderSpec(
        name=str.__str__(found["name"]),
        settings_model=model,
        factory=factory,
        summary=one_text(str.__str__(found["summary"])),
        capabilities=frozenset(map(Capability, found["capabilities"])),
        api_version=int(found["api_version"]),
    )


def _plain_store(entry: EntryPoint, spec: KeyStoreSpec) -> KeyStoreSpec:
    found = _fields(entry, spec, "KeyStoreSpec", {"scheme": str, "summary": str, "api_version": int})
    open_key = spec.open_key
    if not callable(open_key):
        raise _load_error(entry, "open_key of its KeyStoreSpec cannot be called")
    check_uri = spec.check_uri
    if check_uri is not None and not callable(check_uri):
        raise _load_error(entry, "check_uri of its KeyStoreSpec cannot be called")
    return type(spec)(
        scheme=str.__str__(found["scheme"]),
        open_key=open_key,
        summary=one_text(str.__str__(found["summary"])),
        api_version=int(found["api_version"]),
        check_uri=check_uri,
    )


def _fields(
    entry: EntryPoint, spec: object, what: str, kinds: Mapping[str, type | tuple[type, ...]]
) -> dict[str, Any]:
    found = {name: getattr(spec, name) for name in kinds}
    for name, kind in kinds.items():
        if not isinstance(found[name], kind):
            message = f"{name} of its {what} is of the wrong type, {type(found[name]).__name__}"
            raise _load_error(entry, message)
    return found


def _flat(entry: EntryPoint, result: object, kind: type[_Spec], hook: str) -> Sequence[_Spec]:
    specs: list[_Spec] = []
    if isinstance(result, CoroutineType):
        result.close()  # or Python remarks on stderr that it was not awaited
    for spec in result if isinstance(result, list | tuple) else [result]:
        if not isinstance(spec, kind):
            message = f"{hook} must return {kind.__name__} objects, found {type(spec).__name__}"
            raise _load_error(entry, message)
        specs.append(spec)
    return specs


def _spec_named(entry: EntryPoint, specs: Sequence[tuple[str, _Spec]], kind: str) -> _Spec:
    matching = [spec for name, spec in specs if name == entry.name]
    if not matching:
        names = ", ".join(name for name, _ in specs) or "nothing"
        raise _load_error(
            entry,
            f'expected it to register a {kind} called "{entry.name}", found {names}',
            "the name of the entry point and that of the spec must be the same" if specs else _hook_hint(),
        )
    if len(matching) > 1:
        raise ProviderConflict(f"{_describe(entry)} registers it twice", provider=entry.name)
    spec = matching[0]
    if spec.api_version != API_VERSION:
        raise _load_error(
            entry,
            f"it is written for version {spec.api_version} of the contract, "
            f"this framework speaks version {API_VERSION}",
            f"install a release of {_describe(entry).distribution} that fits",
        )
    return spec


def _load_error(entry: EntryPoint, message: str, hint: str | None = None) -> ProviderLoadError:
    text = f"cannot use the plugin of {_describe(entry)}: {message}"
    return ProviderLoadError(text, provider=entry.name, hint=hint)


def _hook_hint() -> str:
    return "hooks are functions decorated with @firebuild_pki.hookimpl, see docs/plugins.md"
