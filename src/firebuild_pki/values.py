"""Dataclasses, frozen unless told otherwise, that cost next to nothing to define.

`dataclasses` compiles six functions for each frozen class: 0.3 ms, and a build defines two hundred of them,
most of which it never compares, shows or even makes. Here a class is a dataclass as any other for `fields`,
`replace`, `asdict`, `match` and type checkers, but its `__init__` is compiled when the first instance is
made, and the other methods are closures.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, dataclass_transform, overload

if TYPE_CHECKING:
    import inspect

_T = TypeVar("_T")
_ORDER: Final = (operator.lt, operator.le, operator.gt, operator.ge)
_FRESH: Final = object()  # an argument that was not given, where the field has a factory


@overload
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def dataclass(cls: type[_T], /) -> type[_T]: ...


@overload
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def dataclass(
    *, frozen: bool = True, order: bool = False, kw_only: bool = False, slots: bool = False
) -> Callable[[type[_T]], type[_T]]: ...


def dataclass(
    cls: type[_T] | None = None,
    /,
    *,
    frozen: bool = True,
    order: bool = False,
    kw_only: bool = False,
    slots: bool = False,
) -> type[_T] | Callable[[type[_T]], type[_T]]:
    """Make a class a dataclass, whose instances are equal, and hash if they are frozen, by their fields.

    Args:
        cls: the class.
        frozen: whether no attribute of an instance can be changed.
        order: whether instances are greater and less than others by their fields.
        kw_only: whether `__init__` takes arguments by name only.
        slots: whether instances have slots instead of a dictionary.
    """
    if cls is None:
        return lambda cls: _made(cls, frozen=frozen, order=order, kw_only=kw_only, slots=slots)
    return _made(cls, frozen=frozen, order=order, kw_only=kw_only, slots=slots)


def _made(cls: type[_T], *, frozen: bool, order: bool, kw_only: bool, slots: bool) -> type[_T]:
    own = {name for name, value in vars(cls).items() if value is not None}  # `__eq__` makes `__hash__` None
    # Where a class has none, `dataclasses` writes it with `inspect`, which takes longer than all the rest.
    cls.__doc__ = cls.__doc__ or cls.__qualname__
    # What makes a class frozen is compiled, too; it is asked for only where `dataclasses` insists.
    frozen_above = any(_params(base).frozen for base in cls.__bases__ if dataclasses.is_dataclass(base))
    make = dataclasses.dataclass(
        init=False, repr=False, eq=False, frozen=frozen_above, kw_only=kw_only, slots=slots
    )
    made = make(cls)
    _params(made).frozen = frozen  # a usual dataclass below has to be the same
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    compared = [one.name for one in fields if one.compare]
    values: Callable[[object], object] = operator.attrgetter(*compared) if compared else lambda _: ()

    def first_init(self: object, *args: object, **kwargs: object) -> None:
        init = _compiled_init(made, fields, slots=slots)
        setattr(made, "__init__", init)  # noqa: B010 - mypy allows no other way
        init(self, *args, **kwargs)

    def by_values(relation: Callable[[Any, Any], bool]) -> Callable[[object, object], bool]:
        def holds(self: object, other: object) -> bool:
            same = other.__class__ is self.__class__
            return relation(values(self), values(other)) if same else NotImplemented

        return holds

    def shown(self: object) -> str:
        words = (f"{one.name}={getattr(self, one.name)!r}" for one in fields if one.repr)
        return f"{type(self).__qualname__}({', '.join(words)})"

    methods: dict[str, object] = {"__init__": first_init, "__repr__": shown, "__signature__": _Signature()}
    methods |= {"__eq__": by_values(operator.eq), "__hash__": None}
    if frozen:
        methods |= {"__hash__": lambda self: hash(values(self))}
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse}
    if frozen and slots:  # else `copy` and `pickle` set the attributes
        methods |= {"__getstate__": _state, "__setstate__": _set_state}
    if order:
        methods |= {f"__{one.__name__}__": by_values(one) for one in _ORDER}
    for name, method in methods.items():
        if name not in own:
            setattr(made, name, method)
    return made


def _params(cls: type) -> Any:
    return getattr(cls, "__dataclass_params__")  # noqa: B009 - type checkers do not know it


class _Signature:
    """What `inspect` and `help` show: the parameters of `__init__` before it is compiled."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature | None:
        if "__signature__" not in vars(owner):
            return None  # a class below the dataclass may have another `__init__`
        import inspect  # of use to nobody else

        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        parameters = []
        for one in dataclasses.fields(owner):
            if one.init:
                default = one.default_factory if _has_factory(one) else one.default
                shown = inspect.Parameter(one.name, kinds[bool(one.kw_only)], annotation=one.type)
                required = default is dataclasses.MISSING
                parameters.append(shown if required else shown.replace(default=default))
        return inspect.Signature(sorted(parameters, key=lambda one: one.kind))


def _state(self: Any) -> list[object]:
    return [getattr(self, one.name) for one in dataclasses.fields(self)]


def _set_state(self: Any, state: list[object]) -> None:
    for one, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, one.name, value)


def _refuse(self: object, name: str, *_: object) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot change {name!r} of a frozen {type(self).__qualname__}")


def _compiled_init(
    cls: type, fields: tuple[dataclasses.Field[Any], ...], *, slots: bool
) -> Callable[..., None]:
    taken = [one for one in fields if one.init]
    by_name = [_parameter(one) for one in taken if one.kw_only is True]
    parameters = ["self", *(_parameter(one) for one in taken if not one.kw_only)]
    parameters += ["*", *by_name] if by_name else []
    # Three times as fast as `object.__setattr__`, which slots need.
    to = '_set_(self, "{}", {})' if slots else '_own_["{}"] = {}'
    lines = [] if slots else ["_own_ = self.__dict__"]
    lines += [to.format(*each) for each in _assignments(fields)]
    lines += ["self.__post_init__()" if hasattr(cls, "__post_init__") else "pass"]
    made: dict[str, Any] = {f"_{one.name}": one.default for one in fields}
    made |= {f"_{one.name}": one.default_factory for one in fields if _has_factory(one)}
    made |= {"_FRESH_": _FRESH, "_set_": object.__setattr__}
    # As in `dataclasses`: a function of these parameters comes from nowhere else.
    exec(f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines), made)  # noqa: S102
    init: Callable[..., None] = made["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"  # errors about arguments name the class
    return init


def _has_factory(one: dataclasses.Field[Any]) -> bool:
    return one.default_factory is not dataclasses.MISSING


def _parameter(one: dataclasses.Field[Any]) -> str:
    if _has_factory(one):
        return f"{one.name}=_FRESH_"
    return one.name if one.default is dataclasses.MISSING else f"{one.name}=_{one.name}"


def _assignments(fields: tuple[dataclasses.Field[Any], ...]) -> Iterator[tuple[str, str]]:
    for one in fields:
        fresh = f"_{one.name}()"
        if not one.init:
            if _has_factory(one) or one.default is not dataclasses.MISSING:
                yield one.name, fresh if _has_factory(one) else f"_{one.name}"
        elif _has_factory(one):
            yield one.name, f"{fresh} if {one.name} is _FRESH_ else {one.name}"
        else:
            yield one.name, one.name
