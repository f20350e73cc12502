"""Asking the nodes of a cluster until one answers: failover, backoff, and an end to both.

=====================================  ==============================================
status                                 what it means
=====================================  ==============================================
429                                    rate limit; Retry-After is respected
472, 473, 412                          a standby that does not answer such requests
501                                    not initialised: no use in waiting
503                                    sealed, or no active node just now
500, 502, 504 and others               a fault of the server, or of what is before it
=====================================  ==============================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from firebuild_pki.errors import ProviderError
from firebuild_pki.providers.vault.faults import Fault, NodeFailed
from firebuild_pki.providers.vault.refusals import is_lasting
from firebuild_pki.providers.vault.transport import Answer, Request, Transport

_STANDBY = {412, 472, 473}
_WORTH_A_WORD = 2.0  # seconds of waiting
_MOMENT = 0.001  # seconds; less than that is not worth another request


@dataclass(frozen=True, slots=True)
class Timing:
    """Time and its limits.

    Args:
        timeout: seconds for one request.
        retry_for: seconds during which requests are repeated.
        monotonic: seconds that only grow.
        sleep: waits some seconds.
    """

    timeout: float
    retry_for: float
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def budget(self, at_most: float | None = None) -> Budget:
        """Begin an operation, which may take several requests.

        Args:
            at_most: seconds, where the operation matters less than the time.
        """
        limited = self
        if at_most is not None:
            limited = replace(
                self, timeout=min(self.timeout, at_most), retry_for=min(self.retry_for, at_most)
            )
        return Budget(limited, self.monotonic(), limited.retry_for)


@dataclass(frozen=True, slots=True)
class Budget:
    """The time that is left of one operation."""

    timing: Timing
    start: float
    retry_for: float

    @property
    def spent(self) -> float:
        """Seconds since the operation began."""
        return self.timing.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds during which a request may still be repeated."""
        return self.retry_for - self.spent

    @property
    def request_timeout(self) -> float:
        """Seconds for the next request; the first may take its full time, all others what is left."""
        left = max(self.retry_for, self.timing.timeout) - self.spent
        # the last one, begun at the very end, is to say what is wrong, not that there was no time
        return min(self.timing.timeout, max(left, 1.0))


class _RoundFailed(Exception):
    """No node gave a usable answer."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__()
        self.faults = faults

    @property
    def can_pass(self) -> bool:
        return not all(fault.lasting for fault in self.faults)

    @property
    def retry_after(self) -> float:
        return max(fault.retry_after for fault in self.faults)


@dataclass(slots=True)
class Nodes:
    """The nodes of one cluster; the one that answered last is asked first.

    Args:
        addresses: base URLs.
        transport: sends the requests.
        scrub: takes secrets out of what a server said.
        report: told when no node has answered and they are tried again.
    """

    addresses: Sequence[str]
    transport: Transport = field(repr=False)
    scrub: Callable[[str], str] = field(repr=False)
    report: Callable[[str], None] = field(default=lambda _: None, repr=False)

    def ask(self, request: Request, budget: Budget) -> Answer:
        """Ask until a node answers; answers that say no are answers.

        Raises:
            ProviderError: none did within the budget, or there is no use in waiting.
        """
        dead: dict[str, Fault] = {}
        backoff = wait_random_exponential(multiplier=0.5, max=5)

        def wait(state: RetryCallState) -> float:
            if state.attempt_number == 1 and budget.left >= _WORTH_A_WORD:
                faults = "; ".join(map(str, _failure(state).faults))
                self.report(f"no usable answer of {faults}; trying for {budget.left:.0f} s")
            pause = max(backoff(state), _failure(state).retry_after)
            return max(min(pause, budget.left), 0.0)

        def stop(state: RetryCallState) -> bool:
            return budget.left < _MOMENT or _failure(state).retry_after > budget.left

        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, _RoundFailed) and error.can_pass),
            wait=wait,
            stop=stop,
            sleep=budget.timing.sleep,
            reraise=True,
        )
        try:
            return retrying(self._round, request, budget, dead)
        except _RoundFailed as failed:
            raise self._error(failed, budget) from None

    def _round(self, request: Request, budget: Budget, dead: dict[str, Fault]) -> Answer:
        faults: list[Fault] = []
        for address in self.addresses:
            if address in dead:
                faults.append(dead[address])
                continue
            try:
                return self._usable(self.transport.send(address, request, budget.request_timeout))
            except NodeFailed as failed:
                faults.append(failed.fault)
            if faults[-1].lasting:
                dead[address] = faults[-1]
        raise _RoundFailed(faults)

    def _usable(self, answer: Answer) -> Answer:
        fault = fault_in(answer)
        if fault is not None:
            raise NodeFailed(replace(fault, reason=self.scrub(fault.reason)))
        others = [address for address in self.addresses if address != answer.address]
        self.addresses = [answer.address, *others]
        return answer

    def _error(self, failed: _RoundFailed, budget: Budget) -> ProviderError:
        text = "; ".join(str(fault) for fault in failed.faults)
        hints = [fault.hint for fault in failed.faults if fault.hint]
        if failed.can_pass:
            text += f" (given up after {budget.spent:.0f} s)"
        if failed.retry_after > budget.left > 0:
            text += f"; it asked to wait for {failed.retry_after:g} s, more than retry_for has left"
        hint = hints[0] if hints else "is Vault running, and is the setting address right?"
        return ProviderError(f"no usable answer of {text}", hint=hint, retryable=failed.can_pass)


def fault_in(answer: Answer) -> Fault | None:
    """Tell answers that another node, or a later moment, may do better on; None for all others."""
    status, said = answer.status, answer.errors
    words = f": {said}" if said else ""
    if status == 429:
        hint = "wait, or raise the rate limit quota of the server"
        return Fault(answer.address, f"too many requests{words}", False, hint, answer.retry_after)
    if status in _STANDBY:
        return Fault(answer.address, f"a standby that answers nothing (status {status})")
    if status == 501:
        return Fault(answer.address, "not initialised", True, "initialise it: bao operator init")
    if status < 500 or is_lasting(said):
        return None
    if status == 503 and "sealed" in said.lower():
        return Fault(answer.address, "sealed", False, "unseal it: bao operator unseal", answer.retry_after)
    return Fault(answer.address, f"status {status}{words}", False, None, answer.retry_after)


def _failure(state: RetryCallState) -> _RoundFailed:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, _RoundFailed) else _RoundFailed([Fault("", "")])
