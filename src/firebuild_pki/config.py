"""Configuration of the framework: YAML in, typed settings out, all mistakes with their position.

The generic parts live next door and are offered here: `load_document` and `Document` (YAML with
positions), `Settings`, `Duration`, `SecretRef` and `validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
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
from pydantic_core import CoreSchema, InitErrorDetails

from firebuild_pki.documents import Document, load_document, parse_document
from firebuild_pki.errors import CAError, SettingsError
from firebuild_pki.keys import KeyType
from firebuild_pki.plugins import NOTHING_INSTALLED, PluginCatalog
from firebuild_pki.positions import KeyPath, kind_of
from firebuild_pki.provider import ProviderSpec
from firebuild_pki.settings import Duration, PositiveDuration, SecretRef, Settings
from firebuild_pki.spelling import nearest
from firebuild_pki.validation import Finding, parse_strictly, relocated, validate

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


class CASettings(Settings):
    """The section ``ca``: which provider, and its settings under the provider's own name."""

    model_config = ConfigDict(extra="allow")

    provider: str = "embedded"
    """Name of the provider: embedded, or that of any installed plugin."""
    observers: Annotated[tuple[str, ...], BeforeValidator(_tuple_of)] = ()
    """Names of the plugins that are told about every certificate."""
    name_suffix: str = "firebuild.internal"
    """Domain below which the names of server and guest are made: <build-id>.<suffix>."""
    key_type: KeyType = KeyType.P256
    """Kind of the server's and guest's keys: p256, p384, rsa2048, rsa3072 or rsa4096."""

    _spec: ProviderSpec = PrivateAttr()
    _catalog: PluginCatalog = PrivateAttr()

    @property
    def spec(self) -> ProviderSpec:
        """What the selected provider's plugin registered."""
        return self._spec

    @property
    def catalog(self) -> PluginCatalog:
        """The plugins among which the provider was found."""
        return self._catalog

    @property
    def provider_settings(self) -> BaseModel:
        """Settings of the selected provider, an instance of its own model."""
        settings: BaseModel = (self.model_extra or {})[self.provider]
        return settings

    @model_validator(mode="wrap")
    @classmethod
    def _with_provider(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)
        catalog = (info.context or {}).get("catalog") or PluginCatalog()
        blocks = _Blocks(cls, data, catalog)
        try:
            settings = handler(blocks.data)
        except ValidationError as error:
            blocks.errors[:0] = relocated(cls, blocks.data, error)
        if blocks.errors or blocks.spec is None:
            raise ValidationError.from_exception_data(cls.__name__, blocks.errors)
        settings._spec, settings._catalog = blocks.spec, catalog
        return settings

    @model_serializer(mode="wrap")
    def _without_others(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # the other blocks were never looked into, so they may hold anything
        fields = type(self).model_fields
        dumped: dict[str, Any] = handler(self)
        return {
            name: value if name in fields or name == self.provider else NOT_SELECTED
            for name, value in dumped.items()
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        body = handler.resolve_ref_schema(schema)
        catalog = _schema_catalog.get() or PluginCatalog()
        for plugin in catalog.providers():
            try:
                model = catalog.load_provider(plugin.name).settings_model
            except CAError:
                block: JsonSchemaValue = {"type": "object"}
            else:
                block = model.__get_pydantic_json_schema__(model.__pydantic_core_schema__, handler)
            body["properties"][plugin.name] = block
        body["additionalProperties"] = False
        return schema


class _Blocks:
    """The blocks of the providers in the raw ``ca`` section, and what is wrong with them."""

    def __init__(self, model: type[BaseModel], data: Mapping[str, Any], catalog: PluginCatalog) -> None:
        self.errors: list[InitErrorDetails] = []
        self.spec: ProviderSpec | None = None
        self.data = {key: value for key, value in data.items() if key in model.model_fields}
        self._known = set(model.model_fields)
        self._providers = {plugin.name for plugin in catalog.providers()}
        written_as = self._sort_blocks(data)
        self._check_observers({plugin.name for plugin in catalog.observers()})
        name = data.get("provider", model.model_fields["provider"].default)
        if not isinstance(name, str):
            return
        if name not in self._providers:
            hint = nearest(name, self._providers) or NOTHING_INSTALLED
            self._add(("provider",), f'no installed provider is called "{name}"', hint)
            return
        self.spec = catalog.load_provider(name)
        self._validate_selected(self.spec, (written_as.get(name, name),))

    def _sort_blocks(self, data: Mapping[str, Any]) -> dict[str, str]:
        written_as = {}
        for key in data.keys() - self._known:
            # environment variables cannot have the dash of a name like my-ca
            name = key if key in self._providers else key.replace("_", "-")
            if name not in self._providers:
                hint = nearest(key, self._providers | self._known)
                self._add((key,), "neither a setting nor an installed provider", hint, key=True)
            elif data[key] is not None and not isinstance(data[key], Mapping | BaseModel):
                self._add((key,), f"expected a mapping, found {kind_of(data[key])}")
            else:
                self.data[name], written_as[name] = data[key], key
        return written_as

    def _check_observers(self, installed: set[str]) -> None:
        names = self.data.get("observers")
        for index, name in enumerate(names if isinstance(names, list | tuple) else ()):
            if isinstance(name, str) and name not in installed:
                hint = nearest(name, installed) or NOTHING_INSTALLED
                message = f'no installed observer is called "{name}"'
                self._add(("observers", index), message, hint)

    def _validate_selected(self, spec: ProviderSpec, loc: tuple[str]) -> None:
        block = self.data.get(spec.name)
        if isinstance(block, spec.settings_model):
            return
        try:
            self.data[spec.name] = parse_strictly(spec.settings_model, block or {})
        except ValidationError as error:
            self.errors += relocated(spec.settings_model, block or {}, error, below=loc)

    def _add(self, path: KeyPath, message: str, hint: str | None = None, *, key: bool = False) -> None:
        self.errors.append(Finding(path, message, hint, about_key=key).as_error())


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
