"""Typed settings: the base class of every block, durations, references to secrets."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Annotated, Any

import durationpy
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from firebuild_pki.display import one_line
from firebuild_pki.errors import SecretError
from firebuild_pki.homes import read_small
from firebuild_pki.positions import kind_of


class _SettingsJsonSchema(GenerateJsonSchema):
    """Writes defaults the way the settings are written, not as ISO 8601."""

    def encode_default(self, dft: Any) -> Any:
        return write_duration(dft) if isinstance(dft, timedelta) else super().encode_default(dft)


class Settings(BaseModel):
    """Base class of every block of settings: unknown keys are errors, instances are frozen.

    The string below a setting describes it in the JSON Schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # pydantic's use_attribute_docstrings reads the source whenever a class is made: half of all start-up.
    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in _attribute_docstrings(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return schema

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Describe the block as JSON Schema (draft 2020-12), defaults included."""
        return cls.model_json_schema(schema_generator=_SettingsJsonSchema)


def _attribute_docstrings(model: type[Settings]) -> dict[str, str]:
    parents = [parent for parent in reversed(model.__mro__) if issubclass(parent, Settings)]
    return {name: text for parent in parents for name, text in _own_docstrings(parent)}


@cache  # to find them takes longer than all the rest of a schema
def _own_docstrings(model: type[Settings]) -> tuple[tuple[str, str], ...]:
    try:
        source = textwrap.dedent(inspect.getsource(model))
    except (OSError, TypeError):  # made at run time, or shipped without its source
        return ()
    (definition,) = ast.parse(source).body
    found = []
    for attribute, text in pairwise(definition.body if isinstance(definition, ast.ClassDef) else ()):
        match attribute, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                found.append((name, inspect.cleandoc(words)))
    return tuple(found)


_LONGEST = timedelta(days=36_500)
"""A hundred years: further ahead there are moments that neither dates nor the timers of a system can hold."""


def _parse_duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    wanted = "expected a duration such as 90s or 1h30m"
    if not isinstance(value, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        found = f"the bare number {value}" if number else kind_of(value)
        hint = f'add a unit, for example "{value}s"' if number else ""
        raise PydanticCustomError("duration", "{text}", {"text": f"{wanted}, found {found}", "hint": hint})
    try:
        parsed = durationpy.from_str(value)
    except durationpy.DurationError:
        text = f'{wanted}, found "{one_line(value, 100)}"'
        hint = "units are ms, s, m and h, joined without spaces"
        raise PydanticCustomError("duration", "{text}", {"text": text, "hint": hint}) from None
    if parsed < timedelta(0):
        text = f'expected a duration of zero or more, found "{one_line(value, 100)}"'
        raise PydanticCustomError("duration", "{text}", {"text": text})
    if parsed > _LONGEST:
        text = f'expected a duration of 876000h at most, found "{one_line(value, 100)}"'
        raise PydanticCustomError("duration", "{text}", {"text": text})
    return parsed


def write_duration(value: timedelta) -> str:
    """Write a duration the way `Duration` reads it."""
    return str(durationpy.to_str(value))


Duration = Annotated[
    timedelta,
    BeforeValidator(_parse_duration),
    PlainSerializer(write_duration, return_type=str),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": r"^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h|d|w|mm|y))+$|^0$",
            "examples": ["90s", "1h30m"],
        }
    ),
]
"""A timedelta written like ``90s`` or ``1h30m`` (Go's notation); bare numbers are refused."""


def _above_zero(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("expected a duration above zero")
    return value


PositiveDuration = Annotated[Duration, AfterValidator(_above_zero)]
"""A `Duration` above zero."""


_MAX_SECRET = 1024 * 1024
"""More bytes than any secret has, be it a bundle of keys; protects from a wrong path."""


_PATH_BEGINS = ("/", "~", "./", "../")
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_USUAL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""What a shell can export (POSIX, XBD section 8.1); tokens have dots and dashes besides."""


class SecretRef(Settings):
    """Where a secret is, never the secret itself: ``{env: NAME}`` or ``{file: PATH}``."""

    env: str | None = None
    """Name of the environment variable that holds the secret."""
    file: str | None = None
    """Path of the file that holds the secret; ~ is the home directory, one newline at the end is ignored."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["env"]}, {"required": ["file"]}]})

    @model_validator(mode="before")
    @classmethod
    def _refuse_literals(cls, value: object) -> object:
        given = {"env", "file"} & set(value) if isinstance(value, Mapping) else set()
        if isinstance(value, SecretRef):
            return value
        if len(given) == 1:
            return _must_lead_somewhere(value, *given)
        found = "both" if given else f"{kind_of(value)} (not shown)"
        raise PydanticCustomError(
            "secret_ref",
            "{text}",
            {
                "text": f"expected a reference to a secret, found {found}",
                "hint": "write {env: NAME} or {file: PATH}; secrets do not belong in this file",
            },
        )

    @model_serializer
    def _as_written(self) -> dict[str, str]:
        return dict(self.__repr_args__())

    def __repr_args__(self) -> Iterator[tuple[str, str]]:
        yield ("env", self.env) if self.env is not None else ("file", str(self.file))

    def resolve(self, environ: Mapping[str, str]) -> str:
        """Fetch the secret now.

        Args:
            environ: usually ``os.environ``.

        Raises:
            SecretError: the variable is unset or the file unreadable, or either is empty.
        """
        if self.env is not None:
            where, secret = f"the environment variable {self.env}", environ.get(self.env)
            if secret is None and not _USUAL_NAME.fullmatch(self.env):  # the secret itself, most likely
                raise SecretError(
                    "expected a secret in an environment variable, but the name in {env: NAME} (not shown) "
                    "is that of none",
                    hint="write the name of a variable there, not the secret, and export it",
                )
            if secret is None:
                raise SecretError(
                    f"expected a secret in {where}, but it is not set",
                    hint="export it, or refer to a file: {file: PATH}",
                )
            if not secret.isascii() and any("\ud800" <= one <= "\udfff" for one in secret):  # PEP 383
                raise _not_text(where)
        else:
            where = f"the file {self.file}"
            secret = self._read(where)
        if not secret:
            raise SecretError(f"expected a secret in {where}, but it is empty")
        return secret

    def _read(self, where: str) -> str:
        try:
            data = read_small(os.path.expanduser(str(self.file)), _MAX_SECRET)
            text = data.decode("utf-8-sig")  # with the mark that editors of Windows put in front
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise SecretError(
                    f"expected a secret in {where}, but it has more than {_MAX_SECRET} bytes",
                    hint="write the secret alone into it, as text",
                ) from error
            if not str(self.file).startswith(_PATH_BEGINS) and error.errno in _NO_SUCH_FILE:
                raise SecretError(  # the secret itself, most likely
                    "cannot read a secret from a file, because what {file: PATH} names (not shown) "
                    "is not there",
                    hint="write the path of the file there, not the secret; one that begins with ./ is shown",
                ) from None
            raise SecretError(
                f"cannot read a secret from {where}: {error.strerror}",
                hint="let this user read it, or refer to a variable: {env: NAME}",
            ) from error
        except UnicodeDecodeError:
            raise _not_text(where) from None
        return text.removesuffix("\n").removesuffix("\r")


def _not_text(where: str) -> SecretError:
    return SecretError(
        f"expected a secret in {where}, but it is not UTF-8 text",
        hint="write the secret alone into it, as text",
    )


def _must_lead_somewhere(value: Any, kind: str) -> Any:
    """Refuse what no environment variable and no file can be called; it may be the secret itself."""
    name = value[kind]
    if not isinstance(name, str):
        return value
    wanted, wrong = ("the name of an environment variable", "=$\0") if kind == "env" else ("a path", "\0")
    if name and not set(name) & set(wrong):
        return value
    found = "something else (not shown)" if name else "nothing"
    hint = "write the name alone: {env: NAME}" if kind == "env" else "write {file: PATH}"
    text = f"expected {wanted} for a secret, found {found}"
    raise PydanticCustomError("secret_ref", "{text}", {"text": text, "hint": hint})
