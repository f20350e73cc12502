"""Dataclasses of ours are dataclasses like any other."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import FrozenInstanceError, asdict, field, replace
from typing import Any

import pytest

from firebuild_pki.values import dataclass


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 2
    names: list[str] = field(default_factory=list)
    note: str = field(default="", repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Named:
    title: str
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class Child(Named):
    parent: Named | None = None
    made: int = field(init=False, default=7)
    doubled: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubled", [2 * self.size])


@dataclass(frozen=True, slots=True)
class Slotted:
    a: str
    b: int = 1


@dataclass(frozen=True, order=True)
class Version:
    major: int
    minor: int = 0
    note: str = field(default="", compare=False)


@dataclass(frozen=False)
class Counter:
    name: str
    seen: list[int] = field(default_factory=list)


@dataclass
class Empty:
    pass


@dataclass
class Own:
    value: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own) and self.value.lower() == other.value.lower()

    def __repr__(self) -> str:
        return "own"


def test_arguments_come_by_place_and_name_with_their_defaults() -> None:
    assert asdict(Point(1)) == {"x": 1, "y": 2, "names": [], "note": ""}
    assert asdict(Point(1, note="n", y=3, names=["a"])) == {"x": 1, "y": 3, "names": ["a"], "note": "n"}
    assert Point(1).names is not Point(1).names
    assert (Slotted("s").a, Slotted("s").b) == ("s", 1)


def test_what_init_does_not_take_is_there_all_the_same() -> None:
    child = Child(title="t", size=2)
    assert (child.made, child.doubled, child.parent) == (7, [4], None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Named("t"),  # type: ignore[call-arg]
        lambda: Point(y=1),  # type: ignore[call-arg]
        lambda: Child(title="t", made=1),  # type: ignore[call-arg]
    ],
)
def test_wrong_arguments_are_refused_by_the_name_of_the_class(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"(Named|Point|Child)\.__init__"):
        wrong()


@dataclasses.dataclass(frozen=True)
class Usual(Named):
    more: int = 1


class Plain(Named):
    pass


@dataclass(frozen=True, kw_only=True)
class BelowPlain(Plain):
    more: int = 1


class Below(Slotted):
    def __init__(self, other: bytes) -> None:
        super().__init__(str(other))


@pytest.mark.parametrize(
    ("made", "parameters"),
    [
        (Point, "(x: 'int', y: 'int' = 2, names: 'list[str]' = <class 'list'>, note: 'str' = '')"),
        (Child, "(*, title: 'str', size: 'int' = 0, parent: 'Named | None' = None)"),
        (Slotted, "(a: 'str', b: 'int' = 1)"),
        (Empty, "()"),
    ],
)
def test_parameters_show_before_the_first_instance(made: type, parameters: str) -> None:
    assert str(inspect.signature(made)) == parameters


def test_a_usual_dataclass_can_be_below_one_of_ours() -> None:
    usual = Usual(1, title="t")
    assert asdict(usual) == {"title": "t", "size": 0, "more": 1}
    with pytest.raises(FrozenInstanceError):
        usual.more = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="cannot inherit non-frozen dataclass from a frozen one"):
        dataclasses.make_dataclass("Changing", ["x"], bases=(Named,))


def test_a_class_that_is_none_may_be_between_two_dataclasses() -> None:
    assert BelowPlain(title="t") == BelowPlain(title="t", size=0, more=1)
    with pytest.raises(FrozenInstanceError):
        BelowPlain(title="t").more = 2  # type: ignore[misc]


def test_a_class_below_shows_its_own_parameters() -> None:
    assert [*inspect.signature(Below).parameters] == ["other"]


def test_values_are_equal_and_hash_by_the_fields_that_count() -> None:
    assert Named(title="t") == Named(title="t")
    assert hash(Named(title="t")) == hash(Named(title="t"))
    assert Named(title="t") != Named(title="u")
    assert Named(title="t") != Child(title="t")
    assert Point(1, note="a") == Point(1, note="b")
    assert Empty() == Empty()
    assert len({Slotted("a"), Slotted("a", 1), Slotted("b")}) == 2


def test_what_a_class_defines_itself_stays() -> None:
    assert Own("A") == Own("a")
    assert repr(Own("A")) == "own"


def test_fields_show_in_a_repr_unless_they_should_not() -> None:
    assert repr(Point(1, note="secret")) == "Point(x=1, y=2, names=[])"
    assert repr(Slotted("a")) == "Slotted(a='a', b=1)"


@pytest.mark.parametrize("value", [Named(title="t"), Slotted("a")])
def test_nothing_can_be_changed(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(FrozenInstanceError, match=f"cannot change '{name}' of a frozen"):
        setattr(value, name, "new")
    with pytest.raises(FrozenInstanceError):
        delattr(value, name)


def test_what_is_not_frozen_can_be_changed_and_has_no_hash() -> None:
    counter = Counter("a")
    counter.name = "b"
    counter.seen.append(1)
    assert counter == Counter("b", [1]) != Counter("b")
    del counter.name
    assert not hasattr(counter, "name")
    with pytest.raises(TypeError, match="unhashable"):
        hash(counter)


def test_what_has_an_order_is_sorted_by_the_fields_that_count() -> None:
    assert sorted([Version(2), Version(1, 3), Version(1)]) == [Version(1), Version(1, 3), Version(2)]
    assert Version(1, note="a") <= Version(1, note="b") >= Version(1)
    assert not Version(1, note="a") < Version(1, note="b")
    with pytest.raises(TypeError, match="not supported"):
        _ = Version(1) < 2  # type: ignore[operator]
    with pytest.raises(TypeError, match="not supported"):
        _ = Named(title="a") < Named(title="b")  # type: ignore[operator]


def test_values_are_replaced_copied_and_matched() -> None:
    assert replace(Point(1), y=5) == Point(1, 5)
    for value in (Named(title="t"), Slotted("a"), Point(1, names=["n"]), Counter("c")):
        copies = [copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))]
        assert copies == [value] * 3
        assert all(one is not value for one in copies)
    match Slotted("a", 3):
        case Slotted(a, b):
            assert (a, b) == ("a", 3)
