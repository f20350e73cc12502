"""Plugins for the tests: providers that sign well, oddly or wrongly, one way each.

Every plugin is an attribute of this module; an entry point named `wrong-key` leads to `wrong_key`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from pydantic import BaseModel

from firebuild_pki import (
    CAError,
    Capability,
    CAProvider,
    Profile,
    ProviderContext,
    ProviderSpec,
    Settings,
    SignedCertificate,
    SignRequest,
    TrustBundle,
    hookimpl,
)
from firebuild_pki.keys import generate_key
from pki.tools import ANY_USAGE, CLIENT_AUTH, CODE_SIGNING, LEAF_USAGE, NOW, SERVER_AUTH, OperatorCA, pem

Sign = Callable[["Operator", SignRequest], Any]


class NoSettings(Settings):
    pass


class Operator(CAProvider):
    """A correct provider: root, intermediate, and whatever function signs."""

    def __init__(self, sign: Sign, trust: Callable[[Operator], Any]) -> None:
        self.root = OperatorCA("Operator Root")
        self.intermediate = OperatorCA("Operator Intermediate", self.root)
        self._sign, self._trust = sign, trust
        self.revoked: list[bytes] = []

    def trust_bundle(self) -> TrustBundle:
        bundle: TrustBundle = self._trust(self)
        return bundle

    def sign(self, request: SignRequest) -> SignedCertificate:
        answer: SignedCertificate = self._sign(self, request)
        return answer

    def leaf(self, request: SignRequest, **flaws: Any) -> x509.Certificate:
        usage = SERVER_AUTH if request.profile is Profile.SERVER else CLIENT_AUTH
        key: CertificatePublicKeyTypes = flaws.pop("key", None) or csr_key(request)
        names = flaws.pop("names", request.dns_names)
        return self.intermediate.leaf(key, names, **{"usages": [usage], **flaws})


def csr_key(request: SignRequest) -> CertificatePublicKeyTypes:
    return x509.load_pem_x509_csr(request.csr_pem).public_key()


def root_only(provider: Operator) -> TrustBundle:
    return TrustBundle(provider.root.pem)


class Plugin:
    """What an entry point leads to."""

    def __init__(
        self,
        name: str,
        factory: Callable[[Any, ProviderContext], CAProvider],
        *,
        settings_model: type[BaseModel] = NoSettings,
        capabilities: Sequence[Capability] = (Capability.SIGN,),
        **spec: Any,
    ) -> None:
        self._spec = ProviderSpec(name, settings_model, factory, "for tests", frozenset(capabilities), **spec)

    @hookimpl
    def register_ca_providers(self) -> ProviderSpec:
        return self._spec


def _plugin(name: str, sign: Sign, trust: Callable[[Operator], Any] = root_only) -> Plugin:
    return Plugin(name, lambda settings, context: Operator(sign, trust))


def _flawed(name: str, **flaws: Any) -> Plugin:
    def sign(provider: Operator, request: SignRequest) -> SignedCertificate:
        leaf = provider.leaf(request, **{k: v() if callable(v) else v for k, v in flaws.items()})
        return SignedCertificate(pem(leaf), provider.intermediate.pem)

    return _plugin(name, sign)


def _answering(name: str, answer: Callable[[Operator, bytes], Any], **more: Any) -> Plugin:
    return _plugin(name, lambda self, request: answer(self, pem(self.leaf(request))), **more)


def _failing(error: Exception) -> Callable[..., Any]:
    def fail(*_arguments: object) -> Any:
        raise error

    return fail


STARTED = NOW - timedelta(minutes=5)

# correct, or made correct by the framework
good = _flawed("good")


def _with_uris(name: str, *uris: str) -> Plugin:
    def sign(provider: Operator, request: SignRequest) -> SignedCertificate:
        found = [x509.UniformResourceIdentifier(uri.format(*request.uri_names)) for uri in uris]
        return SignedCertificate(pem(provider.leaf(request, other_names=found)), provider.intermediate.pem)

    capabilities = (Capability.SIGN, Capability.URI_NAMES)
    return Plugin(name, lambda settings, context: Operator(sign, root_only), capabilities=capabilities)


uris_too = _with_uris("uris-too", "{}")
no_uri = _with_uris("no-uri")
other_uri = _with_uris("other-uri", "spiffe://example.org/admin")
more_uris = _with_uris("more-uris", "{}", "spiffe://example.org/admin")


def _with_two_intermediates(provider: Operator, request: SignRequest) -> SignedCertificate:
    issuing = OperatorCA("Operator Issuing", provider.intermediate)
    usage = SERVER_AUTH if request.profile is Profile.SERVER else CLIENT_AUTH
    leaf = issuing.leaf(csr_key(request), request.dns_names, usages=[usage])
    return SignedCertificate(provider.root.pem + provider.intermediate.pem + issuing.pem + pem(leaf))


reversed_chain = _plugin("reversed-chain", _with_two_intermediates)
repeated = _answering(
    "repeated", lambda self, leaf: SignedCertificate(leaf, leaf + self.intermediate.pem * 3 + self.root.pem)
)
no_newlines = _answering(
    "no-newlines",
    lambda self, leaf: SignedCertificate(leaf.strip(), self.intermediate.pem.strip() + self.root.pem.strip()),
)


def _as_text(provider: Operator, leaf: bytes) -> Any:
    chain: Any = provider.intermediate.pem.decode()
    certificate: Any = leaf.decode()
    return SignedCertificate(certificate, chain)


text = _answering("text", _as_text)
chain_in_bundle = _answering(
    "chain-in-bundle",
    lambda self, leaf: SignedCertificate(leaf),
    trust=lambda self: TrustBundle(self.root.pem, self.intermediate.pem),
)
intermediate_trusted = _answering(
    "intermediate-trusted",
    lambda self, leaf: SignedCertificate(leaf, self.intermediate.pem),
    trust=lambda self: TrustBundle(self.intermediate.pem),
)
several_anchors = _answering(
    "several-anchors",
    lambda self, leaf: SignedCertificate(leaf, OperatorCA("Stranger").pem + self.intermediate.pem),
    trust=lambda self: TrustBundle(OperatorCA("Other Root").pem + self.root.pem),
)
remarking = _answering(
    "remarking", lambda self, leaf: SignedCertificate(leaf, self.intermediate.pem, ("the backend says hi",))
)
too_short_but_told = _plugin(
    "too-short-but-told",
    lambda self, request: SignedCertificate(
        pem(self.leaf(request, valid=(STARTED, NOW + timedelta(minutes=10)))),
        self.intermediate.pem,
        ("raise max_ttl of the role",),
    ),
)

# warned about
longer = _flawed("longer", valid=(STARTED, NOW + timedelta(hours=5)))
no_key_usage = _flawed("no-key-usage", key_usage=None)
lax_key_usage = _flawed(
    "lax-key-usage", key_usage={**LEAF_USAGE, "key_encipherment": True}, key_usage_critical=False
)
encipherment = _flawed("encipherment", key_usage={**LEAF_USAGE, "key_encipherment": True})
small_serial = _flawed("small-serial", serial=4711)
old_style = _flawed("old-style", identifiers=False)
both_usages = _flawed("both-usages", usages=[SERVER_AUTH, CLIENT_AUTH])

# refused: what the leaf says
wrong_key = _flawed("wrong-key", key=lambda: generate_key().public_key())
wrong_names = _flawed("wrong-names", names=["somebody.else.example"])
more_names = _flawed("more-names", names=["b.firebuild.internal", "*.firebuild.internal"])
more_kinds = _flawed("more-kinds", other_names=[x509.UniformResourceIdentifier("https://example.com/")])
no_names = _flawed("no-names", names=[])
any_usage = _flawed("any-usage", usages=[ANY_USAGE])
any_usage_besides = _flawed("any-usage-besides", usages=[SERVER_AUTH, CLIENT_AUTH, ANY_USAGE])
third_usage = _flawed("third-usage", usages=[SERVER_AUTH, CLIENT_AUTH, CODE_SIGNING])
swapped_usage = _flawed("swapped-usage", usages=[CLIENT_AUTH])
no_usage = _flawed("no-usage", usages=[])
leaf_is_ca = _flawed("leaf-is-ca", ca=True)
no_signature_usage = _flawed(
    "no-signature-usage", key_usage={**LEAF_USAGE, "digital_signature": False, "key_agreement": True}
)
signing_usage = _flawed("signing-usage", key_usage={**LEAF_USAGE, "key_cert_sign": True})
expired = _flawed("expired", valid=(NOW - timedelta(hours=2), NOW - timedelta(seconds=1)))
not_yet = _flawed("not-yet", valid=(NOW + timedelta(minutes=3), NOW + timedelta(hours=1)))
too_short = _flawed("too-short", valid=(STARTED, NOW + timedelta(minutes=10)))

# refused: chain and form
missing_intermediate = _answering("missing-intermediate", lambda self, leaf: SignedCertificate(leaf))
other_root = _answering(
    "other-root",
    lambda self, leaf: SignedCertificate(leaf, self.intermediate.pem),
    trust=lambda self: TrustBundle(OperatorCA("Operator Root").pem),
)
other_root_sent = _answering(
    "other-root-sent",
    lambda self, leaf: SignedCertificate(leaf, self.intermediate.pem + self.root.pem),
    trust=lambda self: TrustBundle(OperatorCA("Operator Root").pem),
)
garbage = _answering("garbage", lambda self, leaf: SignedCertificate(b"no PEM at all"))
broken_pem = _answering("broken-pem", lambda self, leaf: SignedCertificate(leaf, leaf.replace(b"M", b"?")))
no_bytes = _answering("no-bytes", lambda self, leaf: SignedCertificate(leaf, None))  # type: ignore[arg-type]
nothing = _answering("nothing", lambda self, leaf: None)


def _crooked(name: str, **flaws: Any) -> Plugin:
    def factory(settings: NoSettings, context: ProviderContext) -> CAProvider:
        provider = Operator(signed_with_chain, root_only)
        provider.intermediate = OperatorCA("Operator Intermediate", provider.root, **flaws)
        return provider

    return Plugin(name, factory)


def signed_with_chain(provider: Operator, request: SignRequest) -> SignedCertificate:
    return SignedCertificate(pem(provider.leaf(request)), provider.intermediate.pem)


intermediate_no_ca = _crooked("intermediate-no-ca", ca=False)
intermediate_cannot_sign = _crooked("intermediate-cannot-sign", key_cert_sign=False)
intermediate_other_purpose = _crooked("intermediate-other-purpose", extended_usage=[CLIENT_AUTH])
intermediate_expired = _crooked("intermediate-expired", valid=(STARTED - timedelta(days=1), STARTED))
intermediate_old_style = _crooked("intermediate-old-style", identifiers=False)

# failing
raising = _plugin("raising", _failing(KeyError("certificate")))
unreachable = _plugin("unreachable", _failing(ConnectionRefusedError(111, "Connection refused")))
explaining = _plugin(
    "explaining", _failing(CAError("the role does not allow it", hint="set allow_subdomains"))
)
untrusted = _answering("untrusted", lambda self, leaf: None, trust=_failing(ValueError("no anchors")))
no_bundle = _answering("no-bundle", lambda self, leaf: None, trust=lambda self: None)
odd_bundle = _answering(
    "odd-bundle",
    lambda self, leaf: None,
    trust=lambda self: TrustBundle(self.root.pem, None),  # type: ignore[arg-type]
)
leaf_as_anchor = _answering(
    "leaf-as-anchor",
    lambda self, leaf: None,
    trust=lambda self: TrustBundle(OperatorCA(ca=False, key_cert_sign=False).pem),
)
plain_anchor = _answering(
    "plain-anchor", lambda self, leaf: None, trust=lambda self: TrustBundle(OperatorCA(ca=None).pem)
)
expired_anchor = _answering(
    "expired-anchor",
    lambda self, leaf: None,
    trust=lambda self: TrustBundle(OperatorCA(valid=(STARTED - timedelta(days=1), STARTED)).pem),
)
bad_factory = Plugin("bad-factory", _failing(RuntimeError("no factory today")))
wrong_factory = Plugin("wrong-factory", lambda settings, context: object())  # type: ignore[arg-type, return-value]
no_methods = Plugin("no-methods", lambda settings, context: Anchored())


class Anchored(CAProvider):
    """Nothing but anchors: every optional method is the base class's."""

    def trust_bundle(self) -> TrustBundle:
        return TrustBundle(OperatorCA().pem)
