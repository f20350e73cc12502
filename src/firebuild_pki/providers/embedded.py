"""The provider ``embedded``: a CA in memory, born and dead with the build."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from cryptography import x509

from firebuild_pki.errors import AuthorityClosed
from firebuild_pki.hookspecs import hookimpl
from firebuild_pki.keys import CAKeyType, make_ca_keys
from firebuild_pki.provider import (
    Capability,
    CAProvider,
    Note,
    NoteLevel,
    ProviderContext,
    ProviderSpec,
    SignedCertificate,
    SignRequest,
    TrustBundle,
)
from firebuild_pki.settings import Duration, PositiveDuration, Settings
from firebuild_pki.x509 import Issuer, Validity, make_intermediate, make_leaf, make_root, only_below, to_pem

_WITHOUT_INTERMEDIATE = frozenset({CAKeyType.ML_DSA_65, CAKeyType.ML_DSA_87})
"""The kinds of which one signature and one key more are too much; see `grpc_credentials.MAX_GUEST_CHAIN`."""


class EmbeddedSettings(Settings):
    """Settings of ``ca.embedded``; all have defaults that suit a build."""

    intermediate: bool | None = None
    """Sign leaves with an intermediate CA; the root's key is then forgotten at once. By default yes, but for
    ml-dsa-65 and ml-dsa-87, whose chains would be too long for gRPC."""
    key_type: CAKeyType = CAKeyType.P256
    """Kind of the CA's keys. Those of server and guest follow ca.key_type."""
    ca_lifetime: PositiveDuration = timedelta(hours=24)
    """How long the CA's certificates are valid. Must cover the build."""
    leaf_lifetime: PositiveDuration = timedelta(hours=24)
    """Upper bound of the lifetime of the certificates for server and guest."""
    backdate: Duration = timedelta(minutes=5)
    """How far certificates begin in the past, for guests whose clock is slow."""


class EmbeddedProvider(CAProvider):
    """A root, and below it an intermediate, whose keys never leave the memory."""

    def __init__(self, settings: EmbeddedSettings, context: ProviderContext) -> None:
        self._settings = settings
        self._clock = context.clock
        too_long = settings.key_type in _WITHOUT_INTERMEDIATE
        self._intermediate = not too_long if settings.intermediate is None else settings.intermediate
        self._constraints = only_below(context.domain, context.names) if context.domain else None
        self._root: x509.Certificate | None = None
        self._issuer: Issuer | None = None

    def validate(self) -> Sequence[Note]:
        """Refuse a chain that gRPC cannot take."""
        kind = self._settings.key_type
        if not self._intermediate or kind not in _WITHOUT_INTERMEDIATE:
            return ()
        why = f"with {kind}, the guest's chain gets longer than gRPC's server can take"
        hint = f"leave it out, or choose {CAKeyType.ML_DSA_44}, which fits with an intermediate"
        return (Note(why, "intermediate", hint, NoteLevel.FATAL),)

    def open(self) -> None:
        """Make the keys and the CA certificates."""
        settings = self._settings
        validity = Validity.starting(self._clock(), settings.ca_lifetime, backdate=settings.backdate)
        first, *second = make_ca_keys(settings.key_type, 2 if self._intermediate else 1)
        root = make_root(first, validity, with_intermediate=self._intermediate, constraints=self._constraints)
        self._root, self._issuer = root.certificate, root
        for key in second:
            self._issuer = make_intermediate(key, root, validity)

    def close(self) -> None:
        """Forget the keys."""
        self._root = self._issuer = None

    def trust_bundle(self) -> TrustBundle:
        """Return the root, and the intermediate if there is one."""
        root, issuer = self._opened()
        chain = [] if issuer.certificate == root else [issuer.certificate]
        return TrustBundle(anchors_pem=to_pem([root]), intermediates_pem=to_pem(chain))

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Sign the key of the request; the names are those of the request, not of the CSR."""
        root, issuer = self._opened()
        lifetime = min(request.ttl, self._settings.leaf_lifetime)
        leaf = make_leaf(
            x509.load_pem_x509_csr(request.csr_pem).public_key(),
            issuer,
            Validity.starting(self._clock(), lifetime, backdate=self._settings.backdate),
            profile=request.profile,
            dns_names=request.dns_names,
            uri_names=request.uri_names,
        )
        chain = [] if issuer.certificate == root else [issuer.certificate]
        return SignedCertificate(to_pem([leaf]), to_pem(chain))

    def _opened(self) -> tuple[x509.Certificate, Issuer]:
        if self._root is None or self._issuer is None:
            raise AuthorityClosed("the embedded CA has no keys: it is not open")
        return self._root, self._issuer


@hookimpl
def register_ca_providers() -> ProviderSpec:
    """Register the embedded CA."""
    return ProviderSpec(
        name="embedded",
        settings_model=EmbeddedSettings,
        factory=EmbeddedProvider,
        summary="a CA in memory, made for one build and gone with it; needs no set-up",
        capabilities=frozenset({Capability.SIGN, Capability.URI_NAMES, Capability.PEER}),
    )
