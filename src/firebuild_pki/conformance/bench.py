"""The provider under test: through the framework, and directly, without the framework's repairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NoReturn, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from firebuild_pki import crossing
from firebuild_pki.authority import Authority, open_authority
from firebuild_pki.chain import parse_certificates
from firebuild_pki.config import CASettings, validate
from firebuild_pki.conformance.contract import Violation
from firebuild_pki.display import counted
from firebuild_pki.documents import Document
from firebuild_pki.guarded import provider_context
from firebuild_pki.issuing import Waiting, awaited
from firebuild_pki.keys import KeyType, PrivateKey, generate_key
from firebuild_pki.plugins import PluginCatalog
from firebuild_pki.provider import (
    Capability,
    CAProvider,
    Clock,
    Note,
    Profile,
    ProviderContext,
    ReadyPair,
    RetryAfter,
    SignedCertificate,
    SignRequest,
    TrustBundle,
)
from firebuild_pki.values import dataclass
from firebuild_pki.verify import public_key_bytes
from firebuild_pki.worker import Worker
from firebuild_pki.wrapping import provider_errors
from firebuild_pki.x509 import make_csr

ResultT = TypeVar("ResultT")

BUILD_ID = "conformance"
TTL = timedelta(hours=1)

one_key = cache(generate_key)
"""A key of each kind; the direct checks certify the same one again and again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A certificate, the others that came with it, and what was asked.

    Args:
        leaf: the one with the wanted key; if there is none, the first.
        others: the rest, in the provider's order.
        key_fits: whether the leaf is for the wanted key.
        flaw: what is wrong with the form of the answer.
        names: the names wanted.
        exact: whether other names are forbidden.
        until: the end of the validity that was asked for, None for ready pairs.
    """

    leaf: x509.Certificate
    others: tuple[x509.Certificate, ...]
    key_fits: bool
    flaw: str | None
    names: tuple[str, ...]
    exact: bool
    until: datetime | None = None


def from_signing(
    answer: SignedCertificate, flaw: str | None, request: SignRequest, key: PrivateKey, asked_at: datetime
) -> Answer:
    """Read the certificates of an answer to a request; `flaw` is what is wrong with its form.

    Raises:
        MaterialError: they cannot be read.
    """
    leaves = parse_certificates(answer.certificate_pem, "certificate")
    # no bytes are no reason to give up: one check is about that, the others look at the certificates
    chain = parse_certificates(answer.chain_pem, "chain") if answer.chain_pem else []
    until = asked_at + request.ttl
    if len(leaves) != 1:
        flaw = f"{counted(len(leaves), 'certificate')} in certificate_pem; issuers belong in chain_pem"
    return Answer(*_sorted([*leaves, *chain], key), flaw, request.dns_names, exact=True, until=until)


def from_pair(answer: ReadyPair) -> Answer:
    """Read a ready pair.

    Raises:
        Violation: its key cannot be read.
        MaterialError: its certificates cannot be read.
    """
    found = parse_certificates(answer.certificate_chain_pem, "certificate chain")
    try:
        key = serialization.load_pem_private_key(answer.private_key_pem, None)
    except (ValueError, TypeError):
        raise Violation("a private key that is not unencrypted PEM") from None
    if not isinstance(key, PrivateKey):
        raise Violation("a private key that is neither EC nor RSA")
    return Answer(*_sorted(found, key), None, (answer.name,), exact=False)


def _flaw(answer: object) -> str | None:
    for name in ("certificate_pem", "chain_pem") if isinstance(answer, SignedCertificate) else ():
        kind = type(getattr(answer, name))
        if kind is not bytes:
            return f"{name} of type {kind.__name__} instead of bytes"
    return None


def _sorted(
    found: list[x509.Certificate], key: PrivateKey
) -> tuple[x509.Certificate, tuple[x509.Certificate, ...], bool]:
    wanted = public_key_bytes(key.public_key())
    fitting = [one for one in found if public_key_bytes(one.public_key()) == wanted]
    leaf = (fitting or found)[0]
    position = found.index(leaf)
    return leaf, (*found[:position], *found[position + 1 :]), bool(fitting)


@dataclass(frozen=True, slots=True)
class Bench:
    """Makes authorities and bare providers out of what the author's fixtures say.

    Args:
        section: the section ``ca``.
        catalog: where the provider is found; None for the installed plugins.
        environ: environment variables.
        clock: the current time.
    """

    section: Mapping[str, Any]
    catalog: PluginCatalog | None
    environ: Mapping[str, str] = field(repr=False)
    clock: Clock

    @property
    def settings(self) -> CASettings:
        """The section, validated."""
        context = {"catalog": self.catalog}
        return validate(CASettings, Document({"ca": dict(self.section)}), at="ca", context=context)

    @property
    def name(self) -> str:
        """Name of the provider."""
        return self.settings.provider

    @property
    def context(self) -> ProviderContext:
        """What the provider may use of the world."""
        return provider_context(self.settings, self.clock, self.environ)

    def with_section(self, section: Mapping[str, Any]) -> Bench:
        """Make a bench with another section ``ca``."""
        return replace(self, section=section)

    def with_block(self, block: Mapping[str, Any]) -> Bench:
        """Make a bench with other settings of the provider."""
        return self.with_section({**self.section, self.name: block})

    def in_a_broken_world(self) -> Bench:
        """Make a bench with a clock that fails and no environment: most providers fail to open."""
        return replace(self, clock=_stopped_clock, environ={})

    def authority(self, *, build_id: str = BUILD_ID) -> Authority:
        """Open an authority."""
        return open_authority(self.settings, build_id=build_id, clock=self.clock, environ=self.environ)

    @contextmanager
    def direct(self, *, opened: bool = True) -> Iterator[Direct]:
        """Make the bare provider, open it, close it in the end whatever happens."""
        made = Direct(self)
        try:
            if opened:
                made.open()
            yield made
        finally:
            made.end()


def _stopped_clock() -> NoReturn:
    raise RuntimeError("the conformance kit stopped the clock")


class Direct:
    """A bare provider. As in a build, one thread makes all calls, and none may take too long."""

    def __init__(self, bench: Bench) -> None:
        self._settings = bench.settings
        self._clock = bench.clock
        self._worker = Worker(f"conformance({bench.name})", self._settings.call_timeout, lambda: None)
        self._closed = False
        spec = self._settings.spec
        try:
            self.provider: CAProvider = self.call(
                "making the provider", lambda: spec.factory(self._settings.provider_settings, bench.context)
            )
            said = self.call(
                "asking for the capabilities", lambda: crossing.capabilities(self.provider.capabilities())
            )
        except BaseException:
            self._worker.finish(lambda: None)
            raise
        self.capabilities: frozenset[Capability] = spec.capabilities if said is None else said

    def call(self, doing: str, function: Callable[[], ResultT]) -> ResultT:
        """Call something in the provider's thread; its errors become `CAError`."""
        name = self._settings.provider

        def work() -> ResultT:
            with provider_errors(name, doing):  # reading a foreign error runs foreign code
                return function()

        with provider_errors(name, doing):
            return self._worker.call(doing, work)

    def open(self) -> None:
        """Open the provider."""
        self.call("opening the provider", self.provider.open)

    def close(self) -> None:
        """Close the provider."""
        self._closed = True
        self.call("closing the provider", self.provider.close)

    def end(self) -> None:
        """Close the provider if it is still open, and end the thread; how it closes is for other checks."""
        closing = (lambda: None) if self._closed else self.provider.close
        with suppress(Exception):
            self._worker.finish(closing)

    def trust_bundle(self) -> TrustBundle:
        """Ask for the trust bundle."""
        return self.call(
            "reading the trust bundle", lambda: crossing.trust_bundle(self.provider.trust_bundle())
        )

    def check(self) -> tuple[Note, ...]:
        """Have the provider look at its backend."""
        return self.call("the check", lambda: crossing.notes(self.provider.check(), "the check"))

    def answer(self, profile: Profile) -> Answer:
        """Obtain a certificate in the way that this provider has: by signing, or a ready pair."""
        if Capability.READY_PAIRS in self.capabilities:
            doing = f"handing out the {profile} pair"
            return from_pair(self.call(doing, lambda: crossing.ready_pair(self.provider.ready_pair(profile))))
        return self.signed(profile)

    def signed(self, profile: Profile, *, names: tuple[str, ...] = (), ttl: timedelta = TTL) -> Answer:
        """Have the provider sign."""
        return self.asked(*self.request(profile, names=names, ttl=ttl)).wait()

    def asked(self, request: SignRequest, key: PrivateKey) -> Asked:
        """Begin to ask for a certificate."""
        return Asked(self, request, key, self._clock(), self._settings.issue_timeout)

    def request(
        self, profile: Profile, *, names: tuple[str, ...] = (), ttl: timedelta = TTL
    ) -> tuple[SignRequest, PrivateKey]:
        """Make a request like those of a build."""
        key = one_key(KeyType(self._settings.key_type))
        server = f"{BUILD_ID}.{self._settings.name_suffix}"
        names = names or (server if profile is Profile.SERVER else f"guest.{server}",)
        return SignRequest(make_csr(key, names), profile, names, ttl, BUILD_ID), key


class Asked(CAProvider):
    """A request on its way: the provider, which is asked in its thread, and its answers are read there."""

    def __init__(
        self, direct: Direct, request: SignRequest, key: PrivateKey, at: datetime, limit: timedelta
    ) -> None:
        self._direct, self._request, self._key, self._at = direct, request, key, at
        self._waiting = Waiting(limit)
        self._flaw: str | None = None
        self._first: SignedCertificate | RetryAfter | None = None

    def begin(self) -> RetryAfter | None:
        """Ask for the first time; None if the certificate is there at once."""
        provider, request = self._direct.provider, self._request
        self._first = self._answer(lambda: provider.sign(request))
        return self._first if isinstance(self._first, RetryAfter) else None

    def wait(self) -> Answer:
        """Wait for the certificate, as an authority does."""
        answer = awaited(self, self._request, self._waiting)
        return from_signing(answer, self._flaw, self._request, self._key, self._at)

    def trust_bundle(self) -> TrustBundle:
        """Pass it on."""
        return self._direct.trust_bundle()

    def sign(self, request: SignRequest) -> SignedCertificate | RetryAfter:
        """Return what `begin` was told, or ask."""
        begun, self._first = self._first, None
        return begun or self._answer(lambda: self._direct.provider.sign(request))

    def poll(self, request: SignRequest, handle: str) -> SignedCertificate | RetryAfter:
        """Ask again."""
        return self._answer(lambda: self._direct.provider.poll(request, handle))

    def _answer(self, ask: Callable[[], object]) -> SignedCertificate | RetryAfter:
        def read() -> SignedCertificate | RetryAfter:
            found = ask()
            self._flaw = _flaw(found)
            return crossing.signing_answer(found)

        return self._direct.call(f"signing the {self._request.profile} certificate", read)
