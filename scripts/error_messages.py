"""Find the messages of firebuild's errors in its source: what is said, what helps, and where.

A message is what an exception class of the product is made with. Functions that make one of what they
are given are followed to their callers, names to what they were assigned, and functions for problems
return parts of messages. `…` stands for what is not known before it runs.

What is left out is a rule, too: exceptions of Python itself (a mistake in firebuild, or caught and put
into words), but for a ValueError of a module that reads what users write; the conformance kit, which
speaks to authors of plugins; and what only passes on another message.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

HOLE: Final = "…"
PASSED_ON: Final = ""
"""Instead of the class of an error: the message is a part of another."""
_WORDS_OF_USERS: Final = re.compile(r"dockerfile/|settings\.py$|/sizes\.py$|image/(outputs|platforms)\.py$")
_FOR_AUTHORS: Final = re.compile(r"firebuild_pki/(conformance|scaffold|benching)|/_proto/")
_BUILT_IN: Final = frozenset({"Exception", "BaseException", "ValueError", "OSError", "LookupError"})
_MOST: Final = 60  # alternatives of one message
_ROUNDS: Final = 5  # functions that call each other with a message


_NOWHERE: Final[ast.FunctionDef] = ast.parse("def top(): pass").body[0]  # type: ignore[assignment]


class Message(NamedTuple):
    """What an error says.

    Args:
        text: with `…` for what is not known before it runs.
        hint: what to do about it; empty without one.
        error: the exception class, or the one of a public module `errors` that it is a
            case of; `PASSED_ON` for what a function for problems returns.
        module: path of the module, below its `src`.
    """

    text: str
    hint: str
    error: str
    module: str


class _Parameter(NamedTuple):
    name: str


_Text = tuple[str | _Parameter, ...]


class _Template(NamedTuple):
    error: str
    text: _Text
    hint: _Text


@dataclass(eq=False)
class _Function:
    node: ast.FunctionDef
    module: _Module
    owner: str
    outer: _Function | None
    calls: list[ast.Call] = field(default_factory=list)
    assigned: dict[str, list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    returned: list[ast.expr] = field(default_factory=list)
    templates: set[_Template] = field(default_factory=set)
    makes_errors: bool | None = None

    @property
    def parameters(self) -> list[str]:
        names = [one.arg for one in (*self.node.args.posonlyargs, *self.node.args.args)]
        static = any(getattr(one, "id", "") == "staticmethod" for one in self.node.decorator_list)
        return names[1:] if self.owner and not static else names

    @property
    def all_parameters(self) -> list[str]:
        return [*self.parameters, *(one.arg for one in self.node.args.kwonlyargs)]

    @property
    def defaults(self) -> dict[str, ast.expr]:
        arguments = self.node.args
        positional = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
        found = dict(zip(reversed(positional), reversed(arguments.defaults), strict=False))
        keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return found | {one.arg: value for one, value in keywords if value is not None}


@dataclass(eq=False)
class _Module:
    path: str
    constants: dict[str, list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here: module, name there


class _Reader(ast.NodeVisitor):
    """Collects the functions of a module, with their calls and assignments."""

    def __init__(self, module: _Module, exceptions: dict[str, list[str]], public: set[str]) -> None:
        self.module, self.exceptions, self.public = module, exceptions, public
        self.top = _Function(_NOWHERE, module, "", None)
        self.functions = [self.top]
        self._owner, self._at = "", self.top

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [getattr(one, "id", getattr(one, "attr", "")) for one in node.bases]
        self.exceptions.setdefault(node.name, []).extend(bases)
        if self.module.path.endswith("/errors.py"):
            self.public.add(node.name)
        owner, self._owner = self._owner, node.name
        self.generic_visit(node)
        self._owner = owner

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, owner = self._at, self._owner
        self._at = _Function(node, self.module, owner, outer)
        self._owner = ""
        self.functions.append(self._at)
        self.generic_visit(node)
        self._at, self._owner = outer, owner

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]  # noqa: N815

    def visit_Call(self, node: ast.Call) -> None:
        self._at.calls.append(node)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            self._at.returned.append(node.value)
        self.generic_visit(node)

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name) and value is not None:
            names = self.module.constants if self._at is self.top else self._at.assigned
            names[target.id].append(value)
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, part in zip(target.elts, value.elts, strict=False):
                self._assign(one, part)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for one in node.names:
            self.module.imported[one.asname or one.name] = (node.module or "", one.name)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._assign(node.target, node.value)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign(node.target, node.value)
        self.generic_visit(node)


class _Source:
    """The whole product: its functions and exception classes."""

    def __init__(self, roots: Iterable[Path]) -> None:
        bases: dict[str, list[str]] = {}
        self.public: set[str] = set()
        self.functions: dict[str, list[_Function]] = defaultdict(list)
        self._modules: dict[str, _Module] = {}
        for root in roots:
            for path in sorted(root.rglob("*.py")):
                name = str(path.relative_to(root))
                if not _FOR_AUTHORS.search(name):
                    module = _Module(name)
                    dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                    self._modules[dotted] = module
                    reader = _Reader(module, bases, self.public)
                    reader.visit(ast.parse(path.read_text("utf-8")))
                    for one in reader.functions:
                        self.functions[one.node.name].append(one)
        self.kinds = {name: self._ancestors(name, bases) for name in bases if self._is_error(name, bases)}

    def _ancestors(self, name: str, bases: Mapping[str, Sequence[str]]) -> list[str]:
        found = [name]
        for one in found:
            found += [base for base in bases.get(one, ()) if base not in found]
        return found

    def _is_error(self, name: str, bases: Mapping[str, Sequence[str]]) -> bool:
        return not _BUILT_IN.isdisjoint(self._ancestors(name, bases))

    def messages(self) -> set[Message]:
        """Return every message that is complete."""
        everything = [one for same in self.functions.values() for one in same]
        makers = {one.node.name for one in everything if self._makes_errors(one)}
        makers |= {*self.kinds, "PydanticCustomError", "Problem", "ValueError"}
        calls = [(call, one) for one in everything for call in one.calls if _called(call) in makers]
        for _ in range(_ROUNDS):
            for call, function in calls:
                function.templates.update(itertools.islice(self._made(call, function), _MOST))
        for function in everything:
            returns = function.node.returns
            if "problem" in function.node.name and returns is not None and "str" in ast.unparse(returns):
                for text in (text for one in function.returned for text in self._texts(one, function)):
                    function.templates.add(_Template(PASSED_ON, text, ()))
        return {
            Message(_flat(one.text), _flat(one.hint), self._public(one.error), function.module.path)
            for function in everything
            for one in function.templates
            if not self._makes_errors(function) or not any(isinstance(part, _Parameter) for part in one.text)
        }

    def _made(self, call: ast.Call, function: _Function) -> Iterator[_Template]:
        name = _called(call)
        given = {one.arg: one.value for one in call.keywords if one.arg}
        if name == "PydanticCustomError" and len(call.args) > 1:
            names = dict(_members(call.args[2])) if len(call.args) > 2 else {}
            text = names.get("text", call.args[1])
            yield from self._templates("SettingsError", text, names.get("hint"), function)
        elif name == "Problem" and len(call.args) > 4:
            hint = given.get("hint", call.args[5] if len(call.args) > 5 else None)
            yield from self._templates("SettingsError", call.args[4], hint, function)
        elif name == "__init__" and function.owner in self.kinds and call.args:
            yield from self._templates(function.owner, call.args[0], given.get("hint"), function)
        elif name == "ValueError" and _WORDS_OF_USERS.search(function.module.path) and call.args:
            yield from self._templates("ValueError", call.args[0], None, function)
        elif name in self.kinds:
            own = [one for one in self.functions["__init__"] if one.owner == name]
            if own and name not in {"_Described", "CAError", "FirebuildError", "StepFailed", "OutputError"}:
                yield from self._passed_on(call, own[0], function)
            elif call.args or "message" in given:
                hint = given.get("hint", call.args[1] if len(call.args) > 1 else None)
                yield from self._templates(
                    name, call.args[0] if call.args else given["message"], hint, function
                )
        elif name not in {"error", "warning"} or "log" not in ast.unparse(call.func).lower():
            for callee in self._callees(call, function):
                yield from self._passed_on(call, callee, function)

    def _public(self, error: str) -> str:
        return next((one for one in self.kinds.get(error, ()) if one in self.public), error)

    def _makes_errors(self, function: _Function) -> bool:
        """Tell whether a function is there for errors, by what it returns."""
        if function.makes_errors is None:
            returns = function.node.returns
            names = set(re.findall(r"\w+", ast.unparse(returns))) if returns is not None else set()
            known = {*self.kinds, "Exception", "NoReturn"}
            function.makes_errors = function.owner in self.kinds or not names.isdisjoint(known)
        return function.makes_errors

    def _callees(self, call: ast.Call, function: _Function) -> list[_Function]:
        """Return what a call may reach: of its own module first, and no method by a bare name."""
        name = _called(call)
        bare = isinstance(call.func, ast.Name)
        found = [one for one in self.functions[name] if not (bare and one.owner)]
        near = [one for one in found if one.module is function.module]
        own = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in {"self", "cls"}
        return near or ([] if own and len(found) > 1 else found)

    def _passed_on(self, call: ast.Call, callee: _Function, function: _Function) -> Iterator[_Template]:
        wanted = [one for one in callee.templates if any(isinstance(part, _Parameter) for part in one.text)]
        if callee is function or not self._makes_errors(callee):
            return
        arguments = dict(callee.defaults)
        arguments |= dict(zip(callee.parameters, call.args, strict=False))
        arguments |= {one.arg: one.value for one in call.keywords if one.arg}
        for one in wanted:
            for text, hint in itertools.product(
                self._filled(one.text, arguments, function), self._filled(one.hint, arguments, function)
            ):
                yield _Template(one.error, text, hint)

    def _filled(self, text: _Text, arguments: Mapping[str, ast.expr], function: _Function) -> list[_Text]:
        parts = [
            self._texts(arguments[part.name], function)
            if isinstance(part, _Parameter) and part.name in arguments
            else [(HOLE,)] if isinstance(part, _Parameter) else [(part,)]
            for part in text
        ]  # fmt: skip
        return _products(parts)

    def _templates(
        self, error: str, text: ast.expr, hint: ast.expr | None, function: _Function
    ) -> Iterator[_Template]:
        hints = self._texts(hint, function) if hint is not None else [()]
        for one, other in itertools.product(self._texts(text, function), hints):
            yield _Template(error, one, other)

    def _texts(self, node: ast.expr, function: _Function, depth: int = 0) -> list[_Text]:
        """Evaluate an expression as far as its source says it: all that it can be."""
        found: list[_Text] = [(HOLE,)]
        match node:
            case ast.Constant(value=str(text)):
                found = [(text,)]
            case ast.Constant(value=None):
                found = [()]
            case ast.JoinedStr(values=values):
                found = _products([self._texts(one, function, depth) for one in values])
            case ast.FormattedValue(value=ast.Name() | ast.IfExp() | ast.Call() as value, conversion=-1):
                found = _sentences(self._texts(value, function, depth))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                found = _products([self._texts(one, function, depth) for one in (left, right)])
            case ast.IfExp(body=body, orelse=orelse):
                found = [*self._texts(body, function, depth), *self._texts(orelse, function, depth)][:_MOST]
            case ast.BoolOp(op=ast.Or(), values=values):
                found = [text for one in values for text in self._texts(one, function, depth)][:_MOST]
            case ast.Name(id=name):
                found = self._named(name, function, depth)
            case ast.Call() if depth < 3:
                found = self._returned(node, function, depth)
        return found

    def _named(self, name: str, function: _Function, depth: int) -> list[_Text]:
        at: _Function | None = function
        while at is not None:
            values = at.assigned.get(name, [])
            if values and depth < 3:
                at.assigned[name] = []  # in what it is assigned, the name itself is left open
                found = _unique(text for one in values for text in self._texts(one, function, depth + 1))
                at.assigned[name] = values
                return found
            if name in at.all_parameters:
                return [(_Parameter(name),)] if at is function else [(HOLE,)]
            at = at.outer
        return self._constant(function.module, name)

    def _constant(self, module: _Module, name: str) -> list[_Text]:
        """Evaluate a constant of a module, or of the one that it has it from."""
        while name not in module.constants and name in module.imported:
            source, name = module.imported[name]
            if source not in self._modules:
                return [(HOLE,)]
            module = self._modules[source]
        top = _Function(_NOWHERE, module, "", None)
        values = module.constants.get(name, [])
        return [text for one in values for text in self._texts(one, top, 3)] or [(HOLE,)]

    def _returned(self, call: ast.Call, function: _Function, depth: int) -> list[_Text]:
        """Evaluate what a function of the same module returns; others make a form of what they get."""
        found: list[_Text] = []
        for callee in self._callees(call, function):
            for one in callee.returned if callee.module is function.module else ():
                found += [
                    tuple(HOLE if isinstance(part, _Parameter) else part for part in text)
                    for text in self._texts(one, callee, depth + 1)
                ]
        return _unique(found) or [(HOLE,)]


def _called(call: ast.Call) -> str:
    return str(getattr(call.func, "id", getattr(call.func, "attr", "")))


def _members(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield str(key.value), value


def _products(parts: Sequence[Sequence[_Text]]) -> list[_Text]:
    chosen = itertools.islice(itertools.product(*parts), _MOST)
    return [tuple(itertools.chain.from_iterable(one)) for one in chosen]


def _sentences(texts: Sequence[_Text]) -> list[_Text]:
    """Leave open what a part of a message is, but for sentences: names and endings tell nothing."""
    found = [
        one
        if not one or _words(_flat(one)) > 2 or any(isinstance(part, _Parameter) for part in one)
        else (HOLE,)
        for one in texts
    ]
    return _unique(one or (HOLE,) for one in found) if (HOLE,) in found else _unique(found)


def _unique(texts: Iterable[_Text]) -> list[_Text]:
    return list(dict.fromkeys(texts))[:_MOST]


def _flat(text: _Text) -> str:
    joined = "".join(HOLE if isinstance(part, _Parameter) else part for part in text)
    return re.sub(f"{HOLE}(?:{HOLE})+", HOLE, " ".join(joined.split()))


def _words(text: str) -> int:
    return len(re.findall(r"[A-Za-z']{2,}", text))


def pattern(text: str) -> re.Pattern[str]:
    """Return what finds a message in what was printed; each `…` is anything in its line."""
    return re.compile(".*".join(re.escape(part) for part in text.split(HOLE)))


def messages(repository: Path) -> list[Message]:
    """Return all messages of the product that say something of their own, by module and text."""
    roots = [repository / "src", *sorted(repository.glob("plugins/*/src"))]
    found = {one for one in _Source(roots).messages() if max(map(_words, one.text.split(HOLE))) > 1}
    return sorted(found, key=lambda one: (one.module, one.text, one.hint, one.error))
