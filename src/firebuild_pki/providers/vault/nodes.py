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

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from firebuild_pki.errors import ProviderError
from firebuild_pki.providers.vault.transport import Answer, Failure, NodeFailed, Request, Transport

_NAMES = (
    "allow the name on the role {role}: allowed_domains with the ca.name_suffix of this build, and "
    "allow_subdomains=true (allow_bare_domains for the domain itself, allow_glob_domains for patterns, "
    "allow_wildcard_certificates for *); cn_validations and enforce_hostnames may refuse it as well"
)

_HINTS: tuple[tuple[str, str], ...] = (
    (r"(common name|subject alternate name) \S+ not allowed", _NAMES),
    (
        r"role requires keys of type (\w+)",
        "set ca.key_type to a kind of {1} key, or key_type=any on the role {role} "
        "(gRPC can use rsa and ec, not ed25519)",
    ),
    (
        r"role requires a minimum of a (\d+)-bit key",
        "set ca.key_type to a key of {1} bits, or lower key_bits of the role {role}",
    ),
    (
        r"common_name field is required",
        "set require_cn=false on the role {role}; names above 64 characters do not fit a common name",
    ),
    (r"URI Subject Alternative Names? (are|is) not allowed", "set allowed_uri_sans on the role {role}"),
    (r"IP Subject Alternative Names? (are|is) not allowed", "set allow_ip_sans=true on the role {role}"),
    (r"other SAN OID", "set allowed_other_sans on the role {role}"),
    (
        r"beyond the expiration of the CA",
        "renew the CA, shorten the build's timeout, or set leaf_not_after_behavior=truncate on the issuer",
    ),
    (
        r"ttl or not_after should be provided|value for not_?after",
        "clear not_after of the role {role}, and set max_ttl instead",
    ),
    (r"unknown role", "set server_role and guest_role to roles of the mount {mount}: bao list {mount}/roles"),
    (r"no default issuer", "make or import a CA in the mount {mount}, or choose a default issuer"),
    (
        r"unable to find PKI issuer|could not fetch the CA certificate",
        "look at the setting issuer and at issuer_ref of the role {role}: bao list {mount}/issuers",
    ),
    (
        r"no handler for route|unsupported path|Invalid path for a versioned K/V",
        "set mount to the path of a PKI secrets engine: bao secrets list",
    ),
    (r"namespace not found", "look at the setting namespace: bao namespace list"),
    (
        r"ttl must be|TTL .* (negative|greater)",
        "look at ttl and max_ttl of the role {role} and of the mount {mount}",
    ),
)

_LASTING = re.compile(
    r"unable to find PKI issuer|could not fetch the CA certificate|no default issuer"
    r"|unable to verify signature on presented cert",
    re.IGNORECASE,
)

_IGNORED = re.compile(r"field was provided but the role is set with", re.IGNORECASE)
_CAPPED = re.compile(r"is longer than permitted maxTTL", re.IGNORECASE)


_STANDBY = {412, 472, 473}
_WORTH_A_WORD = 2.0  # seconds of waiting
_MOMENT = 0.001  # seconds; with less left, no further request is made


@dataclass(frozen=True, slots=True)
class Place:
    """What the hints name.

    Args:
        mount: path of the PKI mount.
        role: the role that was asked to sign.
    """

    mount: str
    role: str


def is_lasting(said: str) -> bool:
    """Tell a 500 that is about the settings, not about the server's health."""
    return bool(_LASTING.search(said))


def hint_for(said: str, place: Place) -> str | None:
    """Find the hint for a refusal; None for words that are not known."""
    for pattern, hint in _HINTS:
        found = re.search(pattern, said, re.IGNORECASE)
        if found:
            return hint.format(found[0], *found.groups(), mount=place.mount, role=place.role)
    return None


def relevant_warning(warning: str, place: Place) -> str | None:
    """Word a warning of the server; None for those that only say that the CSR was used."""
    text = " ".join(warning.split())
    if _IGNORED.search(text):
        return None
    if _CAPPED.search(text):
        return (
            f"{text} (raise max_ttl of the role {place.role}, or, where it has none, that of the mount: "
            f"bao secrets tune -max-lease-ttl=… {place.mount})"
        )
    return f"the server remarked: {text}"


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

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__()
        self.failures = failures

    @property
    def can_pass(self) -> bool:
        return not all(failure.lasting for failure in self.failures)

    @property
    def retry_after(self) -> float:
        return max(failure.retry_after for failure in self.failures)


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
        dead: dict[str, Failure] = {}
        backoff = wait_random_exponential(multiplier=0.5, max=5)

        def wait(state: RetryCallState) -> float:
            if state.attempt_number == 1 and budget.left >= _WORTH_A_WORD:
                failures = "; ".join(map(str, _failure(state).failures))
                self.report(f"no usable answer of {failures}; trying for {budget.left:.0f} s")
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

    def _round(self, request: Request, budget: Budget, dead: dict[str, Failure]) -> Answer:
        failures: list[Failure] = []
        for address in self.addresses:
            if address in dead:
                failures.append(dead[address])
                continue
            try:
                return self._usable(self.transport.send(address, request, budget.request_timeout))
            except NodeFailed as failed:
                failures.append(failed.failure)
            if failures[-1].lasting:
                dead[address] = failures[-1]
        raise _RoundFailed(failures)

    def _usable(self, answer: Answer) -> Answer:
        failure = failure_in(answer)
        if failure is not None:
            raise NodeFailed(replace(failure, reason=self.scrub(failure.reason)))
        others = [address for address in self.addresses if address != answer.address]
        self.addresses = [answer.address, *others]
        return answer

    def _error(self, failed: _RoundFailed, budget: Budget) -> ProviderError:
        text = "; ".join(str(failure) for failure in failed.failures)
        hints = [failure.hint for failure in failed.failures if failure.hint]
        if failed.can_pass:
            text += f" (given up after {budget.spent:.0f} s)"
        if failed.retry_after > budget.left > 0:
            text += f"; it asked to wait for {failed.retry_after:g} s, more than retry_for has left"
        hint = hints[0] if hints else "is Vault running, and is the setting address right?"
        return ProviderError(f"no usable answer of {text}", hint=hint, retryable=failed.can_pass)


def failure_in(answer: Answer) -> Failure | None:
    """Tell answers that another node, or a later moment, may do better on; None for all others."""
    status, said = answer.status, answer.errors
    words = f": {said}" if said else ""
    if status == 429:
        hint = "wait, or raise the rate limit quota of the server"
        return Failure(answer.address, f"too many requests{words}", False, hint, answer.retry_after)
    if status in _STANDBY:
        return Failure(answer.address, f"a standby that answers nothing (status {status})")
    if status == 501:
        return Failure(answer.address, "not initialised", True, "initialise it: bao operator init")
    if status < 500 or is_lasting(said):
        return None
    if status == 503 and "sealed" in said.lower():
        return Failure(answer.address, "sealed", False, "unseal it: bao operator unseal", answer.retry_after)
    return Failure(answer.address, f"status {status}{words}", False, None, answer.retry_after)


def _failure(state: RetryCallState) -> _RoundFailed:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, _RoundFailed) else _RoundFailed([Failure("", "")])
