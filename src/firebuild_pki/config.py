"""Configuration of the framework: YAML in, typed settings out, all mistakes with their position.

The generic parts live next door and are offered here: `load_document` and `Document` (YAML with
positions), `Settings`, `Duration`, `SecretRef` and `validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from firebuild_pki.documents import Document, load_document, parse_document
from firebuild_pki.errors import CAError, IdentityError, Problem, SettingsError
from firebuild_pki.keys import ML_DSA, KeyType
from firebuild_pki.names import Identity
from firebuild_pki.plugins import NOTHING_INSTALLED, Observer, PluginCatalog
from firebuild_pki.positions import KeyPath, kind_of, nearest, nearest_setting
from firebuild_pki.provider import Note, ProviderSpec
from firebuild_pki.settings import Duration, PositiveDuration, SecretRef, Settings
from firebuild_pki.validation import Diagnostic, parse_strictly, relocated, validate, without_empty
from firebuild_pki.wrapping import as_ca_error

__all__ = [
    "CASettings",
    "Document",
    "Duration",
    "PositiveDuration",
    "SecretRef",
    "Settings",
    "SettingsError",
    "ca_json_schema",
    "load_document",
    "parse_document",
    "redacted",
    "validate",
]

_schema_catalog: ContextVar[PluginCatalog | None] = ContextVar("_schema_catalog", default=None)

NOT_SELECTED = "(settings of a provider that is not selected)"


def _tuple_of(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _of_a_leaf(value: object) -> object:
    if isinstance(value, str) and value in ML_DSA:
        text = f"gRPC cannot use a certificate with a key of the kind {value} for server or guest"
        hint = "the CA's own keys can be of that kind: ca.embedded.key_type, or the file of ca.file.ca_key"
        raise PydanticCustomError("key_type", "{text}", {"text": text, "hint": hint})
    return value


class CASettings(Settings):
    """The section ``ca``: which provider, and its settings under the provider's own name."""

    model_config = ConfigDict(extra="allow")

    provider: str = "embedded"
    """Name of the provider: embedded, or that of any installed plugin."""
    observers: Annotated[tuple[str, ...], BeforeValidator(_tuple_of)] = ()
    """Names of the plugins that are told about every certificate."""
    name_suffix: str = "firebuild.internal"
    """Domain below which the names of server and guest are made: <build-id>.<suffix>."""
    key_type: Annotated[KeyType, BeforeValidator(_of_a_leaf)] = KeyType.P256
    """Kind of the server's and guest's keys: p256, p384, rsa2048, rsa3072 or rsa4096."""
    call_timeout: PositiveDuration = timedelta(seconds=60)
    """How long the provider may take for one answer, its retries included."""
    issue_timeout: PositiveDuration = timedelta(minutes=5)
    """How long one certificate may be pending, where the CA issues it later and is asked again."""
    revoke_at_end: bool = False
    """Revoke the certificates of a build when it ends, where the provider can."""

    _spec: ProviderSpec = PrivateAttr()
    _blocks: _Blocks = PrivateAttr()

    @property
    def spec(self) -> ProviderSpec:
        """What the selected provider's plugin registered."""
        return self._spec

    @property
    def catalog(self) -> PluginCatalog:
        """The plugins among which the provider was found."""
        return self._blocks.catalog

    @property
    def provider_settings(self) -> BaseModel:
        """Settings of the selected provider, an instance of its own model."""
        settings: BaseModel = (self.model_extra or {})[self.provider]
        return settings

    @property
    def selected_observers(self) -> tuple[tuple[Observer, BaseModel | None], ...]:
        """The observers that the configuration names, each with its settings."""
        blocks = self.model_extra or {}
        return tuple((observer, blocks.get(observer.name)) for observer in self._blocks.observers)

    def problem(self, note: Note) -> Problem:
        """Say where the setting is written that a provider's note is about."""
        block = self._blocks.written_as.get(self.provider, self.provider)
        path = ("ca", block, *(note.path.split(".") if note.path else ()))
        return self._blocks.document.value_position(path).problem(path, note.message, note.hint)

    def suffix_problem(self) -> Problem | None:
        """Say where the domain is written, if no names of builds can be below it."""
        try:
            Identity("b" * 16, self.name_suffix)
        except IdentityError as error:
            path = ("ca", "name_suffix")
            return self._blocks.document.value_position(path).problem(path, error.message, error.hint)
        return None

    @model_validator(mode="wrap")
    @classmethod
    def _with_provider(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)
        context = info.context or {}
        catalog = context.get("catalog") or PluginCatalog()
        blocks = _Blocks(cls, data, catalog, context.get("document") or Document({}))
        try:
            settings = handler(blocks.data)
        except ValidationError as error:
            blocks.errors[:0] = relocated(cls, blocks.data, error)
        if blocks.errors or blocks.spec is None:
            raise ValidationError.from_exception_data(cls.__name__, blocks.errors)
        settings._spec, settings._blocks = blocks.spec, blocks
        return settings

    @model_serializer(mode="wrap")
    def _without_others(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # the other blocks were never looked into, so they may hold anything
        known = {*type(self).model_fields, self.provider, *self.observers}
        dumped: dict[str, Any] = handler(self)
        return {name: value if name in known else NOT_SELECTED for name, value in dumped.items()}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        body = handler.resolve_ref_schema(schema)
        catalog = _schema_catalog.get() or PluginCatalog()
        plugins = [(name, _provider_model) for name in sorted(catalog.provider_names)]
        plugins += [(name, _observer_model) for name in sorted(catalog.observer_names)]
        for name, model_of in plugins:
            try:
                model = model_of(catalog, name)
            except CAError:
                block: JsonSchemaValue = {"type": "object"}
            else:
                if model is None:
                    continue
                block = model.__get_pydantic_json_schema__(model.__pydantic_core_schema__, handler)
            body["properties"][name] = block
        body["additionalProperties"] = False
        return schema


def _provider_model(catalog: PluginCatalog, name: str) -> type[BaseModel] | None:
    return catalog.load_provider(name).settings_model


def _observer_model(catalog: PluginCatalog, name: str) -> type[BaseModel] | None:
    return catalog.load_observer(name).settings_model


class _Blocks:
    """The blocks of the plugins in the raw ``ca`` section, and what is wrong with them."""

    def __init__(
        self,
        model: type[BaseModel],
        data: Mapping[str, Any],
        catalog: PluginCatalog,
        document: Document,
    ) -> None:
        self.errors: list[InitErrorDetails] = []
        self.spec: ProviderSpec | None = None
        self.observers: list[Observer] = []
        self.catalog = catalog
        self.document = document
        self.data = {key: value for key, value in data.items() if key in model.model_fields}
        self.written_as: dict[str, str] = {}
        self._known = set(model.model_fields)
        self._sort_blocks(data)
        self._select_provider(data.get("provider", model.model_fields["provider"].default))
        self._select_observers(self.data.get("observers"))

    def __eq__(self, other: object) -> bool:
        # settings are equal wherever they were written
        return isinstance(other, _Blocks) and self.catalog == other.catalog

    __hash__ = None  # type: ignore[assignment]

    def _sort_blocks(self, data: Mapping[str, Any]) -> None:
        plugins = self.catalog.provider_names | self.catalog.observer_names
        for key in (key for key in data if key not in self._known):
            # environment variables cannot have the dash of a name like my-ca
            name = key if key in plugins else key.replace("_", "-")
            if name not in plugins:
                hint = nearest_setting(key, plugins | self._known)
                self._add((key,), "neither a setting nor an installed plugin", hint, key=True)
            elif data[key] is not None and not isinstance(data[key], Mapping | BaseModel):
                self._add((key,), f"expected a mapping, found {kind_of(data[key])}")
            elif name in self.written_as:
                message = f"the settings of {name} are here twice, also as {self.written_as[name]}"
                self._add((key,), message, "keep one of the two", key=True)
            else:
                self.data[name], self.written_as[name] = data[key], key

    def _select_provider(self, name: object) -> None:
        installed = self.catalog.provider_names
        if not isinstance(name, str):
            return
        if name not in installed:
            hint = nearest(name, installed) or NOTHING_INSTALLED
            self._add(("provider",), f'no installed provider is called "{name}"', hint)
            return
        self.spec = self.catalog.load_provider(name)
        self._validate_selected(name, self.spec.settings_model)

    def _select_observers(self, names: object) -> None:
        installed = self.catalog.observer_names
        names = names if isinstance(names, list | tuple) else ()
        for index, name in enumerate(names):
            if not isinstance(name, str):
                continue
            if name not in installed:
                hint = nearest(name, installed) or NOTHING_INSTALLED
                self._add(("observers", index), f'no installed observer is called "{name}"', hint)
                continue
            if name in names[:index]:
                self._add(("observers", index), f'the observer "{name}" is named twice')
                continue
            observer = self.catalog.load_observer(name)
            self.observers.append(observer)
            if observer.settings_model is not None:
                self._validate_selected(name, observer.settings_model)
            elif self.data.get(name):
                block = (self.written_as[name],)
                self._add(block, f'the observer "{name}" has no settings', key=True)

    def _validate_selected(self, name: str, model: type[BaseModel]) -> None:
        block = self.data.get(name)
        if isinstance(block, model):
            return
        block = without_empty(model, block or {})
        below = (self.written_as.get(name, name),)
        try:
            self.data[name] = parse_strictly(model, block)
            return
        except KeyboardInterrupt:
            raise
        except ValidationError as error:
            self.errors += relocated(model, block, error, below=below)
            return
        except BaseException as error:  # validators are code of the plugin, and may raise anything
            failure = as_ca_error(error, name, "validating the settings")
        raise failure

    def _add(self, path: KeyPath, message: str, hint: str | None = None, *, key: bool = False) -> None:
        self.errors.append(Diagnostic(path, message, hint, about_key=key).as_error())


def ca_json_schema(catalog: PluginCatalog | None = None) -> dict[str, Any]:
    """Describe the section ``ca`` as JSON Schema, with the settings of every usable provider.

    Args:
        catalog: the plugins to describe, by default those installed.
    """
    token = _schema_catalog.set(catalog)
    try:
        return CASettings.json_schema()
    finally:
        _schema_catalog.reset(token)


def redacted(settings: BaseModel) -> dict[str, Any]:
    """Dump settings for display: secrets stay references, foreign blocks are left out.

    The result, without the left-out blocks, loads to equal settings again.
    """
    return settings.model_dump(mode="json")
