"""Providers whose certificates break the contract, one way each, and a good one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, ClassVar, NoReturn

from cryptography import x509

from firebuild_pki import Note, NoteLevel, RetryAfter, SignedCertificate, SignRequest, TrustBundle
from firebuild_pki.keys import generate_key
from pki.signers import Plugin
from pki.tools import CLIENT_AUTH, LEAF_USAGE, SERVER_AUTH, OperatorCA, pem
from pki_conformance.current import Answer, Current, now, plugin, whole


def answering(name: str, answer: Answer) -> Plugin:
    return plugin(name, type("Answering", (Current,), {"answer": staticmethod(answer)}))


def flawed(name: str, **flaws: Any) -> Plugin:
    def answer(self: Current, request: SignRequest) -> SignedCertificate:
        made = {key: make() if callable(make) else make for key, make in flaws.items()}
        return SignedCertificate(pem(self.leaf(request, **made)), self.intermediate.pem + self.upper.pem)

    return answering(name, answer)


def period(start: float, end: float) -> Callable[[], tuple[datetime, datetime]]:
    return lambda: (now() + timedelta(minutes=start), now() + timedelta(minutes=end))


def with_chain(name: str, chain: Callable[[Current, bytes], bytes]) -> Plugin:
    def answer(self: Current, request: SignRequest) -> SignedCertificate:
        leaf = pem(self.leaf(request))
        return SignedCertificate(leaf, chain(self, leaf))

    return answering(name, answer)


def fail(self: Current, request: SignRequest) -> Any:
    raise KeyError("certificate")


def sleep(self: Current, request: SignRequest) -> Any:
    time.sleep(2)
    return whole(self, request)


def sign_anything(self: Current, request: SignRequest) -> Any:
    return whole(self, request) if b"bm9uc2Vuc2U" not in request.csr_pem else SignedCertificate(self.root.pem)


good = plugin("good")
wrong_key = flawed("wrong-key", key=lambda: generate_key().public_key())
wrong_names = flawed("wrong-names", names=["somebody.else.example"])
both_usages = flawed("both-usages", usages=[SERVER_AUTH, CLIENT_AUTH])
leaf_is_ca = flawed("leaf-is-ca", ca=True)
no_signatures = flawed("no-signatures", key_usage={**LEAF_USAGE, "digital_signature": False})
no_key_usage = flawed("no-key-usage", key_usage=None)
signs_certificates = flawed("signs-certificates", key_usage={**LEAF_USAGE, "key_cert_sign": True})
same_serial = flawed("same-serial", serial=2**63 + 2**62)
small_serial = flawed("small-serial", serial=iter(range(1000, 100000)).__next__)
expired = flawed("expired", valid=period(-60, -1))
not_yet = flawed("not-yet", valid=period(10, 60))
too_short = flawed("too-short", valid=period(-5, 3))
reversed_chain = with_chain("reversed-chain", lambda self, leaf: self.upper.pem + self.intermediate.pem)
missing_intermediate = with_chain("missing-intermediate", lambda self, leaf: self.upper.pem)
root_in_chain = with_chain(
    "root-in-chain", lambda self, leaf: self.intermediate.pem + self.upper.pem + self.root.pem
)
leaf_in_chain = with_chain("leaf-in-chain", lambda self, leaf: leaf + self.intermediate.pem + self.upper.pem)
stranger_in_chain = with_chain(
    "stranger-in-chain", lambda self, leaf: self.intermediate.pem + self.upper.pem + self.aside.pem
)
repeated = with_chain("repeated", lambda self, leaf: (self.intermediate.pem + self.upper.pem) * 2)
chain_with_leaf = answering(
    "chain-with-leaf",
    lambda self, request: SignedCertificate(pem(self.leaf(request)) + self.intermediate.pem + self.upper.pem),
)
as_text = answering(
    "as-text",
    lambda self, request: SignedCertificate(
        pem(self.leaf(request)),
        (self.intermediate.pem + self.upper.pem).decode(),  # type: ignore[arg-type]
    ),
)
nothing = answering("nothing", lambda self, request: None)
raising = answering("raising", fail)
slow = answering("slow", sleep)
obliging = answering("obliging", sign_anything)


class Forgetful(Current):
    """Hands out other anchors than those it signs with, a moment later."""

    def trust(self) -> TrustBundle:
        return TrustBundle(self.root.pem * (2 if self.__dict__.setdefault("asked", False) else 1))

    def answered(self, request: SignRequest) -> Any:
        self.__dict__["asked"] = True
        return super().answered(request)


class Distrusted(Current):
    def trust(self) -> TrustBundle:
        return TrustBundle(pem(self.upper.leaf(generate_key().public_key(), ["a.b"])))


class Absent(Current):
    def trust(self) -> Any:
        return None


forgetful, absent = plugin("forgetful", Forgetful), plugin("absent", Absent)
distrusted = plugin("distrusted", Distrusted)


ELSEWHERE = x509.AuthorityKeyIdentifier(b"\1" * 20, None, None)
"""Names another key than any CA here has."""


def be_cancelled(self: Current, request: SignRequest) -> NoReturn:
    raise asyncio.CancelledError("the event loop was stopped")


def remark_one_text(self: Current, request: SignRequest) -> SignedCertificate:
    answer = whole(self, request)
    return SignedCertificate(answer.certificate_pem, answer.chain_pem, "capped")  # type: ignore[arg-type]


class Lazy(SignedCertificate):
    """Fetches its chain when somebody looks at it, and gets no answer."""

    @property
    def chain_pem(self) -> Any:
        time.sleep(2)
        return b""

    @chain_pem.setter
    def chain_pem(self, _: object) -> None:
        """Take what the constructor sets."""


def answer_lazily(self: Current, request: SignRequest) -> Any:
    lazy = object.__new__(Lazy)
    object.__setattr__(lazy, "certificate_pem", whole(self, request).certificate_pem)
    return lazy


class GeneratedCheck(Current):
    """Its check has not begun when it returns."""

    def check(self) -> Any:
        def looked() -> Iterator[Note]:
            time.sleep(2)
            yield Note("it answers", about="reachable", level=NoteLevel.OK)

        return looked()


class GeneratedTrust(Current):
    """Hands out a generator as its trust bundle."""

    def trust(self) -> Any:
        return (pem for pem in [self.root.pem])


class Listing(Current):
    """Lists its capabilities."""

    def capabilities(self) -> Any:
        return ["sign"]


other_issuer = flawed("other-issuer", authority_key=ELSEWHERE)
cancelled, one_remark = answering("cancelled", be_cancelled), answering("one-remark", remark_one_text)
lazy_answer = answering("lazy-answer", answer_lazily)
generated_check, generated_trust = (
    plugin("generated-check", GeneratedCheck),
    plugin("generated-trust", GeneratedTrust),
)
listing = plugin("listing", Listing)


class Pending(Current):
    """Has its certificates later, as AWS has; it needs its handle, and keeps nothing but its orders."""

    def open(self) -> None:
        super().open()
        self.orders: dict[str, SignedCertificate] = {}

    def answered(self, request: SignRequest) -> Any:
        made = super().answered(request)
        handle = f"order-{len(self.orders)}"
        self.orders[handle] = made
        return RetryAfter(0.01, handle, "the CA is at work")

    def poll(self, request: SignRequest, handle: str) -> Any:
        self.must_be_open()
        return self.orders[handle]

    def must_be_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("not open")


class PendingOne(Pending):
    """Remembers its latest order only."""

    def poll(self, request: SignRequest, handle: str) -> Any:
        return super().poll(request, f"order-{len(self.orders) - 1}")


class PendingForEver(Pending):
    """Goes on after it was closed."""

    def must_be_open(self) -> None:
        """Need no login for that."""


pending, pending_one = plugin("pending", Pending), plugin("pending-one", PendingOne)
pending_for_ever = plugin("pending-for-ever", PendingForEver)


class Rolling(Current):
    """Signs with the CA of its class, which rolls over at any time."""

    now: ClassVar[list[OperatorCA]] = []

    @classmethod
    def roll_over(cls) -> None:
        cls.now[:] = [OperatorCA("Rolled", valid=(now() - timedelta(days=1), now() + timedelta(days=30)))]

    def open(self) -> None:
        super().open()
        if not self.now:
            self.roll_over()

    def trust(self) -> TrustBundle:
        return TrustBundle(self.now[0].pem)

    def answered(self, request: SignRequest) -> Any:
        self.intermediate = self.now[0]
        return SignedCertificate(pem(self.leaf(request)))


class RollingUnseen(Rolling):
    """Tells of the anchors that it found when it was opened."""

    now: ClassVar[list[OperatorCA]] = []

    def open(self) -> None:
        super().open()
        self.found = self.now[0]

    def trust(self) -> TrustBundle:
        return TrustBundle(self.found.pem)


class RollingOnce(Rolling):
    """Tells of the anchors that the process found first."""

    now: ClassVar[list[OperatorCA]] = []
    first: ClassVar[list[OperatorCA]] = []

    def trust(self) -> TrustBundle:
        self.first[:] = self.first or self.now
        return TrustBundle(self.first[0].pem)


rolling, rolling_unseen = plugin("rolling", Rolling), plugin("rolling-unseen", RollingUnseen)
rolling_once = plugin("rolling-once", RollingOnce)
