"""What wakes the guest's thread touches no file that has got the number of its pipe."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from firebuild_bootstrap.guest.attached import Control
from firebuild_bootstrap.guest.errors import ProtocolError
from firebuild_bootstrap.guest.stop import Stop


def _stop() -> tuple[Stop, Callable[[], None]]:
    stop = Stop()
    return stop, lambda: stop.set(ProtocolError("too late"))


def _control() -> tuple[Control, Callable[[], None]]:
    control = Control(lambda _: None)
    return control, lambda: control.put_window((1, 2))


@pytest.mark.parametrize("make", [_stop, _control])
def test_it_wakes_until_it_is_closed_and_writes_to_nobody_afterwards(
    make: Callable[[], tuple[Stop | Control, Callable[[], None]]],
) -> None:
    one, wake = make()
    number = one.fileno()
    if isinstance(one, Control):
        wake()
        assert os.read(number, 10) == b"x"
    one.close()
    one.close()
    reading, writing = os.pipe()  # they have the numbers now, as the lowest that are free
    try:
        assert number in (reading, writing)
        os.set_blocking(reading, False)
        thread = threading.Thread(target=wake)
        thread.start()
        thread.join()
        with pytest.raises(BlockingIOError):
            os.read(reading, 10)
    finally:
        os.close(reading)
        os.close(writing)


def test_what_ends_the_guest_wakes_whoever_waits_for_its_descriptor() -> None:
    stop = Stop()
    stop.set(ProtocolError("the end"))
    assert os.read(stop.fileno(), 10) == b"x"
    stop.close()
