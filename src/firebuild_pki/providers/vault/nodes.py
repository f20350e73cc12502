"""Requests to the nodes of a cluster: failover and backoff until one answers, within a time limit.

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
from dataclasses import field, replace
from itertools import count

from firebuild_pki.errors import ProviderError
from firebuild_pki.http import HTTPFailure, backoff
from firebuild_pki.providers.vault.transport import Answer, Request, Transport
from firebuild_pki.values import dataclass

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
        "set require_cn=false on the role {role}; names above 64 characters, and URIs, fit no common name",
    ),
    (
        r"URI Subject Alternative Names? (are|is) not allowed|URI Subject .* not valid for this role",
        "set allowed_uri_sans on the role {role}, such as spiffe://example.org/*",
    ),
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
    (r"^status 404$", "does Vault answer there? look at the setting address, and at a path in it"),
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
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0


@dataclass(frozen=True, slots=True)
class HintContext:
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


def hint_for(said: str, about: HintContext) -> str | None:
    """Find the hint for a refusal; None for words that are not known."""
    for pattern, hint in _HINTS:
        found = re.search(pattern, said, re.IGNORECASE)
        if found:
            return hint.format(found[0], *found.groups(), mount=about.mount, role=about.role)
    return None


def relevant_warning(warning: str, about: HintContext) -> str | None:
    """Word a warning of the server; None for those that only say that the CSR was used."""
    text = " ".join(warning.split())
    if _IGNORED.search(text):
        return None
    if _CAPPED.search(text):
        return (
            f"{text} (raise max_ttl of the role {about.role}, or, where it has none, that of the mount: "
            f"bao secrets tune -max-lease-ttl=… {about.mount})"
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


@dataclass(frozen=False, slots=True)
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
        dead: dict[str, HTTPFailure] = {}
        for attempt in count(1):
            answer, found = self._round(request, budget, dead)
            if answer is not None:
                return answer
            asked = max(failure.retry_after for failure in found)
            can_pass = any(failure.retryable for failure in found)
            if not can_pass or budget.left < _MOMENT or asked > budget.left:
                break
            if attempt == 1 and budget.left >= _WORTH_A_WORD:
                failures = "; ".join(failure.message for failure in found)
                self.report(f"no usable answer from {failures}; trying for {budget.left:.0f} s")
            pause = max(backoff(attempt, _FIRST_PAUSE, _LONGEST_PAUSE), asked)
            budget.timing.sleep(max(min(pause, budget.left), 0.0))
        text = "; ".join(failure.message for failure in found)
        if can_pass:
            text += f" (given up after {budget.spent:.0f} s)"
        if asked > budget.left > 0:
            text += f"; it asked to wait for {asked:g} s, more than retry_for has left"
        hints = [failure.hint for failure in found if failure.hint]
        hint = hints[0] if hints else "is Vault running, and is the setting address right?"
        raise ProviderError(f"no usable answer from {text}", hint=hint, retryable=can_pass)

    def _round(
        self, request: Request, budget: Budget, dead: dict[str, HTTPFailure]
    ) -> tuple[Answer | None, list[HTTPFailure]]:
        """Ask each node once that is worth it; what a node said is scrubbed."""
        failures: list[HTTPFailure] = []
        for address in self.addresses:
            failure = dead.get(address)
            if failure is None:
                try:
                    answer = self.transport.send(address, request, budget.request_timeout)
                except HTTPFailure as error:
                    failure = error
                else:
                    failure = failure_in(answer)
                    if failure is None:
                        self.addresses = [address, *(one for one in self.addresses if one != address)]
                        return answer, failures
                failure.message = self.scrub(failure.message)
            if not failure.retryable:
                dead[address] = failure
            failures.append(failure)
        return None, failures


def failure_in(answer: Answer) -> HTTPFailure | None:
    """Tell answers that another node, or a later moment, may do better on; None for all others."""
    status, said = answer.status, answer.errors
    words = f": {said}" if said else ""

    def failure(reason: str, hint: str | None = None, *, retryable: bool = True) -> HTTPFailure:
        wait = answer.retry_after
        return HTTPFailure(f"{answer.address}: {reason}", hint=hint, retryable=retryable, retry_after=wait)

    if status == 429:
        return failure(f"too many requests{words}", "wait, or raise the rate limit quota of the server")
    if status in _STANDBY:
        return failure(f"a standby that answers nothing (status {status})")
    if status == 501:
        return failure("not initialised", "initialise it: bao operator init", retryable=False)
    if status < 500 or is_lasting(said):
        return None
    if status == 503 and "sealed" in said.lower():
        return failure("sealed", "unseal it: bao operator unseal")
    return failure(f"status {status}{words}")
