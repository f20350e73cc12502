"""The sixth step of a build: waits for what the guest reports, and then for the end of its machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from firebuild_bootstrap.errors import GuestLost
from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.service import BootstrapServer, Outcome
from firebuild_pki.display import one_line

# Between the guest's last call and the end of its machine, which may still have to write its drive.
_STOP_SECONDS: Final = 60.0
# How long the guest's report may take to arrive once its process is seen to have ended.
_LAST_WORDS_SECONDS: Final = 2.0
# Characters of them.
_LAST_WORDS: Final = 2000
_POLL_SECONDS: Final = 0.1


def follow(server: BootstrapServer, machine: Machine, check: Callable[[], None]) -> Outcome:
    """Wait until it is known how the steps ended.

    Args:
        check: called again and again; may raise.

    Raises:
        GuestLost: the machine ended, and its guest has reported nothing.
    """
    ended = None
    while (outcome := server.wait(_LAST_WORDS_SECONDS if ended else _POLL_SECONDS)) is None:
        if ended is not None:
            said = "" if ended.explained else one_line(ended.log[-_LAST_WORDS:], _LAST_WORDS)
            raise GuestLost(
                f"the guest ended before it reported success or failure: {ended.description}",
                hint=f"its last words: {said}" if said else None,
            )
        check()
        ended = machine.poll()
    return outcome


def await_end(machine: Machine, check: Callable[[], None]) -> None:
    """Wait until the machine of a guest that has reported its success has ended, or for a minute.

    Args:
        check: called again and again; may raise.
    """
    end = time.monotonic() + _STOP_SECONDS
    while machine.wait(_POLL_SECONDS) is None and time.monotonic() < end:
        check()
