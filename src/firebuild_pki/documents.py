"""Settings documents: plain data that remembers where each part was written."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping
from dataclasses import field, replace
from typing import Any, Final

from firebuild_pki.display import one_line
from firebuild_pki.errors import Problem, SettingsError
from firebuild_pki.positions import KeyPath, Position, kind_of
from firebuild_pki.values import dataclass

_PREFIX: Final = "FIREBUILD_"
_MOST_BYTES: Final = 4 << 20
"""Bytes of a file of settings; protects from a wrong path, such as that of a device."""


@dataclass(frozen=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and the origin of each part.

    Args:
        data: the content; a mapping at the top.
        source: what to call the whole in messages, normally the file's path.
        keys: position of the key of every path in a mapping.
        values: position of the value of every path.
    """

    data: Mapping[str, Any]
    source: str = "settings"
    keys: Mapping[KeyPath, Position] = field(default_factory=dict, repr=False)
    values: Mapping[KeyPath, Position] = field(default_factory=dict, repr=False)

    def key_position(self, path: KeyPath) -> Position:
        """Find where the last key of a path is written, or its nearest parent."""
        return self._nearest(self.keys, path)

    def value_position(self, path: KeyPath) -> Position:
        """Find where the value of a path is written, or its nearest parent."""
        return self._nearest(self.values, path)

    def _nearest(self, positions: Mapping[KeyPath, Position], path: KeyPath) -> Position:
        if path in positions:
            return positions[path]
        for length in range(len(path) - 1, 0, -1):
            parent = self.keys.get(path[:length]) or self.values.get(path[:length])
            if parent is not None:
                return parent
        return Position(self.source)

    def merged(
        self,
        environ: Mapping[str, str],
        *,
        reserved: Collection[str] = (),
    ) -> Document:
        """Lay environment variables over the document.

        ``FIREBUILD_CA__PROVIDER=vault`` sets ``ca.provider``: two underscores go one level down,
        upper and lower case are the same, and a dash in a key of the file may be written as an
        underscore. What is quoted or in brackets, a number, ``true``, ``false`` and ``null`` mean what
        they do in a file; any other value is a string as it stands.

        Args:
            environ: usually ``os.environ``.
            reserved: names that begin with ``FIREBUILD_`` and mean something else to the caller.

        Raises:
            SettingsError: a value is not YAML, or would replace a scalar by a mapping.
        """
        document = self
        problems: list[Problem] = []
        for name in sorted(environ):
            if not name.startswith(_PREFIX) or name in reserved:
                continue
            position = Position(f"environment variable {name}")
            segments = name.removeprefix(_PREFIX).split("__")
            try:
                value = _parse_variable(environ[name], position)
                document = document._with(segments, value, position, fold=True)
            except SettingsError as error:
                problems += error.problems
        if problems:
            raise SettingsError(problems)
        return document

    def overridden(self, values: Mapping[str, object], *, origin: str = "command line") -> Document:
        """Lay explicit values, such as those of CLI options, over the document.

        Args:
            values: dotted path to value, ``{"ca.provider": "vault"}``. Values are used as they are.
            origin: what messages call the place where the values come from.

        Raises:
            SettingsError: a path goes through something that is not a mapping.
        """
        document = self
        for path, value in values.items():
            document = document._with(path.split("."), value, Position(origin), fold=False)
        return document

    def _with(self, segments: list[str], value: object, position: Position, *, fold: bool) -> Document:
        for text in (*segments, value):
            if isinstance(text, str) and not _is_unicode(text):
                message = f"expected UTF-8 text, found {one_line(text, 100)}"
                raise SettingsError([position.problem(tuple(segments), message)])
        data = dict(self.data)
        here, path = data, tuple[str, ...]()
        for index, segment in enumerate(segments):
            key = _matching_key(here, segment) if fold else segment
            path = (*path, key)
            if not key:
                raise SettingsError([position.problem(path, "expected a setting's name")])
            if index < len(segments) - 1:
                child = _child(here.get(key), path, position)
                here[key] = child
                here = child
        here[path[-1]] = value
        return self._replaced(data, path, position)

    def _replaced(self, data: Mapping[str, Any], path: KeyPath, position: Position) -> Document:
        parents = {path[:length]: position for length in range(1, len(path))}
        keys, values = (
            {at: old for at, old in known.items() if at[: len(path)] != path}
            for known in (self.keys, self.values)
        )
        keys, values = {**parents, **keys, path: position}, {**values, path: position}
        return replace(self, data=data, keys=keys, values=values)


def _is_unicode(text: str) -> bool:
    """Tell what was UTF-8 from what Python made of other bytes in arguments and environment (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _child(value: object, path: KeyPath, position: Position) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    raise SettingsError([position.problem(path, f"cannot set a value inside {kind_of(value)}")])


def _matching_key(mapping: Mapping[str, Any], segment: str) -> str:
    wanted = segment.casefold()
    for key in mapping:
        if key.casefold().replace("-", "_") == wanted:
            return key
    return wanted


def load_document(source: str | os.PathLike[str]) -> Document:
    """Read a YAML file.

    Args:
        source: path of the file.

    Returns:
        The document; an empty file is an empty document.

    Raises:
        SettingsError: the file cannot be read, is not UTF-8 YAML, has a key twice in one mapping
            or anything but a mapping at the top.
    """
    name = os.fspath(source)
    try:
        with open(name, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            problem = Position(name).problem(
                (), f"expected settings, found more than {_MOST_BYTES >> 20} MiB"
            )
            raise SettingsError([problem])
        text = io.StringIO(content.decode("utf-8"), newline=None).read()
    except OSError as error:
        problem = Position(name).problem((), f"cannot read the file: {error.strerror}")
        raise SettingsError([problem]) from error
    except UnicodeDecodeError as error:
        problem = Position(name).problem((), f"expected UTF-8 text, byte {error.start} is not")
        raise SettingsError([problem]) from error
    return parse_document(text, source=name)


def parse_document(text: str, *, source: str = "settings") -> Document:
    """Parse YAML text; ``source`` is its name in messages. Raises like `load_document`."""
    from firebuild_pki.yaml_reader import Reader, compose  # slow to import, and often there is no file

    node = compose(text, Position(source))
    if node is None:
        return Document({}, source)
    reader = Reader(source)
    data = reader.read(node, ())
    if data is None:
        data = {}
    elif not isinstance(data, dict):
        message = f"expected a mapping at the top, found {kind_of(data)}"
        reader.problems.append(reader.at(node).problem((), message))
    if reader.problems:
        raise SettingsError(reader.problems)
    return Document(data, source, reader.keys, reader.values)


def _parse_variable(text: str, position: Position) -> object:
    from firebuild_pki.yaml_reader import Reader, compose_variable

    node = compose_variable(text, position)
    if node is None:
        return None
    reader = Reader(position.source, positions=False)
    value = reader.read(node, ())
    if reader.problems:
        raise SettingsError(reader.problems)
    return value


def set_by(path: KeyPath, *, section: bool) -> str | None:
    """Word a hint that says how a setting, or a section, is given; None in a list, which has no variables."""
    if not all(isinstance(part, str) for part in path):
        return None
    variable = _PREFIX + "__".join(str(part) for part in path).upper().replace("-", "_")
    return f"set {variable}{'__…' if section else ''}, or write it in the file of --config"
