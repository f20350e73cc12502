"""The data store keeps Firecracker's limit and merge rule."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.mmds import DataStore, MetadataWriter, StoreError
from firebuild_bootstrap.mmds.store import ResourceNotFound, merge, size_of


# The examples of RFC 7396, appendix A.
@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patches_do_what_the_rfc_says(target: object, patch: object, result: object) -> None:
    assert merge(target, patch) == result


values = st.recursive(
    st.text(max_size=3) | st.integers(), lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3)
)


@settings(max_examples=50, deadline=None)
@given(values, values)
def test_a_patch_without_null_can_be_read_back_where_it_applies(target: object, patch: object) -> None:
    merged = merge(target, patch)
    assert merge(merged, patch) == merged


def test_a_patch_before_the_first_put_is_refused() -> None:
    with pytest.raises(StoreError) as refused:
        DataStore().patch({"a": "b"})
    assert refused.value.status == 400
    assert isinstance(refused.value, MachineError)


def test_an_empty_store_is_an_empty_object() -> None:
    assert DataStore().get("") == {}


def test_put_replaces_everything() -> None:
    store = DataStore()
    store.put({"a": "b"})
    store.put({"c": "d"})
    assert store.get("") == {"c": "d"}


def test_the_limit_counts_bytes_of_compact_json_and_a_refused_write_changes_nothing() -> None:
    exact = {"k": "ü" * 5}
    store = DataStore(limit=len('{"k":"') + 10 + len('"}'))
    store.put(exact)
    writes: list[tuple[Callable[[object], None], object]] = [
        (store.put, {"k": "ü" * 5 + "x"}),
        (store.patch, {"l": ""}),
    ]
    for write, value in writes:
        with pytest.raises(StoreError) as refused:
            write(value)
        assert refused.value.status == 413
        assert store.get("") == exact
    assert size_of(exact) == 18
    largest = {"k": "x" * (51_200 - len('{"k":""}'))}
    DataStore().put(largest)
    with pytest.raises(StoreError):
        DataStore().put({"k": largest["k"] + "x"})


def test_callers_cannot_change_what_is_stored() -> None:
    inner = {"b": "c"}
    store = DataStore()
    store.put({"a": inner})
    store.patch({"d": inner})
    inner["b"] = "changed"
    assert store.get("/a/b") == store.get("/d/b") == "c"


def test_a_pointer_has_to_start_with_a_slash() -> None:
    store = DataStore()
    store.put({"a": "b"})
    with pytest.raises(ResourceNotFound):
        store.get("a")


def test_writers_of_many_threads_lose_nothing() -> None:
    store = DataStore()
    store.put({})
    writer: MetadataWriter = store

    def write(name: int) -> None:
        for number in range(20):
            writer.patch({f"{name}-{number}": "x"})

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.get("")) == 80


@pytest.mark.parametrize("value", [float("nan"), b"x", {1: "x", "b": 1}, "\ud800", object()])
def test_what_is_no_json_is_refused_without_its_content(value: object) -> None:
    store = DataStore()
    for write in (store.put, store.patch):
        with pytest.raises(StoreError, match="the metadata is not JSON: ") as caught:
            write({"Key": value})
        assert caught.value.status == 400
        store.put({})
