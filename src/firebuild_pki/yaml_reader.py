"""YAML text to plain data, with the position of every key and value.

The scalars follow the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema): only
``true`` and ``false`` are booleans, so ``no``, ``on`` and ``1:30`` stay the strings they look like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import yaml

from firebuild_pki.errors import Problem, SettingsError
from firebuild_pki.positions import KeyPath, Position

MAX_NODES = 10_000
"""Upper bound of values in one document; aliases of aliases could otherwise grow without end."""

MAX_DEPTH = 50
"""Upper bound of values inside each other."""


def compose(text: str, position: Position) -> yaml.Node | None:
    """Parse YAML text into nodes; None for an empty text. Raises `SettingsError`."""
    try:
        return yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark is not None and position.source.partition(" ")[0] != "environment":
            position = replace(position, line=mark.line + 1, column=mark.column + 1)
        what = "; ".join(part for part in (error.context, error.problem) if part)
        raise SettingsError([position.problem((), f"not valid YAML: {what}")]) from None
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", "unreadable")
        raise SettingsError([position.problem((), f"not valid YAML: {reason}")]) from None


class _CoreLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # PyYAML, our `Reader` and pydantic go down by recursion.
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = f"more than {MAX_DEPTH} values inside each other"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


_CoreLoader.yaml_implicit_resolvers = {}


_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)

_STRANGE = re.compile(r"[\x00\ud800-\udfff]")
"""What can be written as an escape, and is in no path, name or text: NUL, and halves of characters."""

_SCALARS: dict[str, Any] = {
    "tag:yaml.org,2002:str": str,
    "tag:yaml.org,2002:null": lambda _: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": lambda text: int(text, 0 if text[:2] in {"0o", "0x"} else 10),
    "tag:yaml.org,2002:float": float,
}


def compose_variable(text: str, position: Position) -> yaml.Node | None:
    """Parse the value of an environment variable: in it are no comments, aliases, tags and blocks.

    What does not begin with a quote or a bracket is one scalar as it stands, whatever YAML would make
    of ``#``, ``*``, ``!`` or ``: ``. Raises `SettingsError`.
    """
    written = text.strip()
    if written.startswith(("[", "{", '"', "'")):
        return compose(written, position)
    tag = _CoreLoader("").resolve(yaml.ScalarNode, written, (True, False))  # type: ignore[no-untyped-call]
    return yaml.ScalarNode(tag, written)


class Reader:
    """Turns YAML nodes into plain data and notes positions and problems on the way."""

    def __init__(self, source: str, *, positions: bool = True) -> None:
        self.source = source
        self.positions = positions
        self.keys: dict[KeyPath, Position] = {}
        self.values: dict[KeyPath, Position] = {}
        self.problems: list[Problem] = []
        self._open: list[yaml.Node] = []
        self._count = 0

    def at(self, node: yaml.Node) -> Position:
        """Tell where a node begins."""
        if not self.positions:
            return Position(self.source)
        return Position(self.source, node.start_mark.line + 1, node.start_mark.column + 1)

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        """Turn a node into plain data; mistakes in it end up in ``problems``."""
        self._count += 1
        if self._count > MAX_NODES:
            self._give_up(node, path, f"more than {MAX_NODES} values in one document")
        if any(node is parent for parent in self._open):
            self._give_up(node, path, "an alias refers to the value that it is part of")
        self.values[path] = self.at(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return {key: self.read(child, (*path, key)) for key, child in self._pairs(node, path)}
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        finally:
            self._open.pop()

    def _pairs(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        seen: dict[str, Position] = {}
        for key_node, child in node.value:
            here = self.at(key_node)
            if key_node.tag != "tag:yaml.org,2002:str":
                self.problems.append(here.problem(path, "expected a string as key", "quote it"))
                continue
            key: str = key_node.value
            if _STRANGE.search(key):
                self._scalar(key_node, path)
                continue
            if key in seen:
                message = f"the key is here twice, first at line {seen[key].line}"
                self.problems.append(here.problem((*path, key), message, "keep one of the two"))
                continue
            seen[key] = self.keys[(*path, key)] = here
            yield key, child

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        convert = _SCALARS.get(node.tag)
        if convert is None:
            message = f"the tag {node.tag} has no meaning here"
            self.problems.append(self.at(node).problem(path, message, "remove the tag"))
            return None
        if strange := _STRANGE.search(node.value):
            message = f"a setting cannot hold the character U+{ord(strange[0]):04X}"
            self.problems.append(self.at(node).problem(path, message, "remove it"))
            return None
        try:
            return convert(node.value)
        except ValueError:
            message = f"expected a value that fits the tag {node.tag}"
            self.problems.append(self.at(node).problem(path, message))
            return None

    def _give_up(self, node: yaml.Node, path: KeyPath, message: str) -> NoReturn:
        raise SettingsError([*self.problems, self.at(node).problem(path, message)])
