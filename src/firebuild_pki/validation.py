"""Validation of documents: pydantic finds the mistakes, this module says where they are."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from firebuild_pki.display import counted
from firebuild_pki.documents import Document, set_by
from firebuild_pki.errors import Problem, SettingsError
from firebuild_pki.positions import KeyPath, closest, kind_of, nearest_setting
from firebuild_pki.settings import write_duration
from firebuild_pki.values import dataclass
from firebuild_pki.wrapping import one_text

ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(
    model: type[ModelT],
    document: Document,
    at: str = "",
    *,
    context: Mapping[str, object] | None = None,
) -> ModelT:
    """Turn a document, or one section of it, into a settings object.

    A key without a value counts as not written. Types are strict: ``"5"`` is not a number and
    ``yes`` is not a boolean.

    Args:
        model: the settings class.
        document: where the data and the positions come from.
        at: dotted path of the section, empty for the whole document.
        context: handed to the validators of the model, along with the document.

    Raises:
        SettingsError: holds every problem, in document order.
    """
    base: KeyPath = tuple(at.split(".")) if at else ()
    data: Any = document.data
    for key in base:
        data = data.get(key) if isinstance(data, Mapping) else None
    data = without_empty(model, {} if data is None else data)
    try:
        return parse_strictly(model, data, context={"document": document, **(context or {})})
    except ValidationError as error:
        diagnostics = _diagnostics(model, data, error)
        problems = dict.fromkeys(found.as_problem(document, base) for found in diagnostics)
        raise SettingsError(sorted(problems, key=_document_order)) from None


def parse_strictly(
    model: type[ModelT], data: object, *, context: Mapping[str, object] | None = None
) -> ModelT:
    """Validate plain data with JSON's strictness: no number out of a string, lists for tuples."""
    if data == {}:
        text = "{}"
    else:
        import json  # defaults need none

        text = json.dumps(data, default=_json_default)
    return model.model_validate_json(text, strict=True, context=dict(context or {}))


def _json_default(value: object) -> str:
    return write_duration(value) if isinstance(value, timedelta) else str(value)


def _document_order(problem: Problem) -> tuple[bool, int, int, str]:
    return (problem.line is None, problem.line or 0, problem.column or 0, problem.source)


def without_empty(model: type[BaseModel], data: Any, path: KeyPath = ()) -> Any:
    """Drop the keys without a value, as far as they are settings of the model."""
    if isinstance(data, list):
        return [without_empty(model, item, (*path, index)) for index, item in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    known = fields_at(model, path)
    return {
        key: without_empty(model, value, (*path, key))
        for key, value in data.items()
        if not (value is None and key in known)
    }


def fields_at(model: type[BaseModel], path: KeyPath) -> set[str]:
    """Names of the settings that a model allows in the mapping at a path."""
    return {name for one in _models_at(model, path) for name in one.model_fields}


def _known_at(model: type[BaseModel], data: Any, path: KeyPath) -> set[str]:
    """Names of the settings in the mapping at a path; of several models, those of the one that is meant."""
    for part in path:
        data = data[part] if _has(data, part) else None
    models, tag = _models_at(model, path), _tag_of(model, path, data)
    meant = {
        one
        for one in models
        if tag is not None
        and any(tag in typing.get_args(info.annotation) for info in one.model_fields.values())
    }
    return {name for one in meant or models for name in one.model_fields}


def _models_at(model: type[BaseModel], path: KeyPath) -> set[type[BaseModel]]:
    models = {model}
    for part in path:
        found: set[type[BaseModel]] = set()
        for one in models:
            info = one.model_fields.get(part) if isinstance(part, str) else None
            if info is not None:
                found |= set(_models_in(info.annotation))
            elif isinstance(part, int):
                found.add(one)
        models = found
    return models


def _tag_of(model: type[BaseModel], path: KeyPath, data: object) -> object:
    """Return the value that tells which of several models is meant at a path; None where there is one."""
    if not isinstance(data, Mapping):
        return None
    while path and isinstance(path[-1], int):
        path = path[:-1]
    fields = [one.model_fields.get(str(path[-1])) for one in _models_at(model, path[:-1])] if path else []
    named = [name for info in fields if info is not None for name in _discriminators_of(info)]
    return next((data[name] for name in named if name in data), None)


def _discriminators_of(info: FieldInfo) -> Iterator[str]:
    if isinstance(info.discriminator, str):
        yield info.discriminator
    pending = [info.annotation]
    while pending:
        annotation = pending.pop()
        arguments = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Annotated:
            found = [getattr(one, "discriminator", None) for one in arguments[1:]]
            yield from (one for one in found if isinstance(one, str))
        pending += arguments


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A mistake in plain data, on its way from pydantic's words to a `Problem`.

    Args:
        path: where, below the data that was validated.
        message: what was expected and what was found.
        hint: what to write instead.
        about_key: whether the key is at fault rather than its value.
        section: whether it is about a mapping of settings.
    """

    path: KeyPath
    message: str
    hint: str | None
    about_key: bool
    section: bool = False

    def as_problem(self, document: Document, base: KeyPath) -> Problem:
        """Add the position in the document."""
        full = (*base, *self.path)
        at = document.key_position(full) if self.about_key else document.value_position(full)
        laid_over = at.source != document.source  # then it names another variable or option of the section
        hint = set_by(full, section=self.section) if self.message == _REQUIRED and laid_over else self.hint
        return at.problem(full, self.message, hint)

    def as_error(self, below: KeyPath = ()) -> InitErrorDetails:
        """Wrap it for a ValidationError that a validator raises on behalf of an inner model."""
        error = PydanticCustomError(_DIAGNOSTIC, "{text}", {"text": self.message, "diagnostic": self})
        return InitErrorDetails(type=error, loc=(*below, *self.path), input=None)


_DIAGNOSTIC = "firebuild_finding"
_REQUIRED = "this setting is required"


def relocated(
    model: type[BaseModel], data: object, error: ValidationError, *, below: KeyPath = ()
) -> list[InitErrorDetails]:
    """Carry the errors of an inner model to where its data is in the outer one."""
    return [diagnostic.as_error(below) for diagnostic in _diagnostics(model, data, error)]


def _diagnostics(model: type[BaseModel], data: object, error: ValidationError) -> Iterator[Diagnostic]:
    for detail in error.errors(include_url=False):
        kind, context = detail["type"], detail.get("ctx") or {}
        if kind == _DIAGNOSTIC:
            yield replace(context["diagnostic"], path=detail["loc"])
            continue
        path = _path_in(model, data, detail["loc"], missing=kind == "missing")
        if kind in {"union_tag_invalid", "union_tag_not_found"}:
            path = (*path, context["discriminator"].strip("'"))
        message, hint = _wording(detail, _known_at(model, data, path[:-1]))
        # Both may quote what is written in the file, or come from a plugin's validator.
        hint = None if hint is None else one_text(str(hint))
        about_key, section = kind in {"missing", "extra_forbidden"}, bool(_models_at(model, path))
        yield Diagnostic(path, one_text(message), hint, about_key, section)


def _path_in(model: type[BaseModel], data: Any, loc: tuple[str | int, ...], *, missing: bool) -> KeyPath:
    # pydantic puts names of union members into the location; they are not part of the document
    path: list[str | int] = []
    tag: object = None
    for index, part in enumerate(loc):
        if tag is not None and part == tag:  # there may be a setting of that name, too
            tag = None
            continue
        if _has(data, part):
            data = data[part]
            tag = _tag_of(model, (*path, part), data)
        elif not (missing and index == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _has(data: object, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(data, list) and part < len(data)
    return isinstance(data, Mapping) and part in data


_EXPECTED = {
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


def _wording(detail: ErrorDetails, known: set[str]) -> tuple[str, str | None]:
    context = detail.get("ctx") or {}
    kind, found = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return "unknown setting", nearest_setting(str(detail["loc"][-1]), known)
    if kind in {"missing", "union_tag_not_found"}:
        return _REQUIRED, None
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {kind_of(found)}", _remedy(kind, found)
    if kind in {"literal_error", "enum"}:
        return _choice(context["expected"], found)
    if kind == "union_tag_invalid":
        return _choice(context["expected_tags"], context["tag"])
    # a validator of a plugin may say nothing
    message = str(detail["msg"]).removeprefix("Value error, ").strip() or "this value is not accepted"
    if kind in {"too_short", "string_too_short"}:
        least = counted(context["min_length"], "character" if kind == "string_too_short" else "value")
        message = f"expected at least {least}, found {context.get('actual_length') or 'none'}"
    elif message.startswith("Input should be"):
        bound = kind.startswith(("greater_than", "less_than"))  # then a text is a number with its unit: 1MiB
        shown = f"{found}" if isinstance(found, int | float) or bound else kind_of(found)
        wanted = message.removeprefix("Input should be ")
        wanted = wanted if wanted.startswith(("a ", "an ")) else f"a value {wanted}"
        message = f"expected {wanted}, found {shown}"
        if kind == "greater_than_equal" and isinstance(found, str) and isinstance(context["ge"], int):
            message = f"expected at least {_in_units(context['ge'])}, found {shown}"
    return message, context.get("hint") or None


def _in_units(number: int) -> str:
    """Write a number of bytes as settings have it: 256MiB."""
    units = {0: "", 10: "KiB", 20: "MiB", 30: "GiB"}
    shift = max(shift for shift in units if number % (1 << shift) == 0)
    return f"{number >> shift}{units[shift]}"


def _remedy(kind: str, found: object) -> str | None:
    """Say how a scalar is written that YAML takes for something else; it is not shown."""
    if kind == "string_type" and isinstance(found, bool | int | float):
        return "quote it; in an environment variable as well: '\"…\"'"
    if kind in {"list_type", "tuple_type"} and isinstance(found, str):
        return "write [a, b]; brackets are also for a single one"
    return None


def _choice(expected: str, found: object) -> tuple[str, str | None]:
    if not isinstance(found, str):
        return f"expected {expected}, found {kind_of(found)}", None
    choices = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
    match = closest(found, choices)
    return f"expected {expected}, found '{found}'", f'did you mean "{match}"?' if match else None
