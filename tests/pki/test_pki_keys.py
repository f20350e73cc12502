"""Private keys that take long are begun before they are asked for."""

from __future__ import annotations

import threading

import pytest

from firebuild_pki import keys
from firebuild_pki.keys import Keys, KeyType, PrivateKey, generate_key, private_key_pem


def test_a_key_that_was_begun_is_given_to_one_taker_only() -> None:
    made = Keys(KeyType.RSA2048)
    made.begin(1)
    first, second = made.take(), made.take()
    assert first.key_size == second.key_size == 2048
    assert private_key_pem(first) != private_key_pem(second)


def test_keys_are_made_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    both_at_work = threading.Barrier(2, timeout=30)

    def slowly(key_type: KeyType) -> PrivateKey:
        both_at_work.wait()
        return generate_key(KeyType.P256 if key_type is KeyType.RSA4096 else key_type)

    monkeypatch.setattr(keys, "generate_key", slowly)
    made = Keys(KeyType.RSA4096)
    made.begin(2)
    assert private_key_pem(made.take()) != private_key_pem(made.take())


def test_kinds_that_take_no_time_are_not_begun_and_dropped_ones_are_not_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[KeyType] = []
    monkeypatch.setattr(keys, "_BegunKey", began.append)
    quick, slow = Keys(KeyType.P256), Keys(KeyType.RSA2048)
    for each in (quick, slow):
        each.begin(2)
    assert began == [KeyType.RSA2048, KeyType.RSA2048]
    slow.drop()
    assert slow.take().key_size == 2048


def test_where_making_a_key_ahead_failed_it_is_made_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys._BegunKey, "_make", lambda _: None)
    made = Keys(KeyType.RSA2048)
    made.begin(1)
    assert made.take().key_size == 2048
