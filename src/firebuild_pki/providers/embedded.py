"""The provider ``embedded``: a CA in memory, born and dead with the build; or one of a machine's user, in a
directory, for what has to trust each other longer than that."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from shlex import quote
from typing import Annotated

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import StringConstraints

from firebuild_pki.chain import parse_certificates
from firebuild_pki.errors import AuthorityClosed, CAError
from firebuild_pki.hookspecs import hookimpl
from firebuild_pki.keys import CAKeyType, CAPrivateKey, make_ca_keys, private_key_pem
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

_A_DAY = timedelta(days=1)
_A_YEAR = timedelta(days=365)
_FILE, _FORMER, _UNFINISHED = "ca.pem", "ca-former.pem", ".ca-"
_LEFT_AT_LEAST = 1 / 10


class EmbeddedSettings(Settings):
    """Settings of ``ca.embedded``; all have defaults that suit a build."""

    intermediate: bool | None = None
    """Sign leaves with an intermediate CA; the root's key is then forgotten at once. By default yes, but for
    ml-dsa-65 and ml-dsa-87, whose chains would be too long for gRPC."""
    key_type: CAKeyType = CAKeyType.P256
    """Kind of the CA's keys. Those of server and guest follow ca.key_type."""
    ca_lifetime: PositiveDuration | None = None
    """How long the CA's certificates are valid. Must cover the build. By default 24 hours, in a directory a
    year."""
    leaf_lifetime: PositiveDuration = timedelta(hours=24)
    """Upper bound of the lifetime of the certificates for server and guest."""
    backdate: Duration = timedelta(minutes=5)
    """How far certificates begin in the past, for guests whose clock is slow."""
    directory: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Keep the CA in this directory, for your user alone, instead of in memory: all that is issued by those
    who name the same one trusts each other. It is made at the first use, and replaced in time."""


class EmbeddedProvider(CAProvider):
    """A root, and below it an intermediate, whose keys never leave the memory."""

    def __init__(self, settings: EmbeddedSettings, context: ProviderContext) -> None:
        self._settings = settings
        self._clock = context.clock
        too_long = settings.key_type in _WITHOUT_INTERMEDIATE
        kept = settings.directory is not None
        self._intermediate = (
            not (too_long or kept) if settings.intermediate is None else settings.intermediate
        )
        self._constraints = only_below(context.domain, context.names) if context.domain else None
        self._older: list[x509.Certificate] = []
        self._root: x509.Certificate | None = None
        self._issuer: Issuer | None = None

    def validate(self) -> Sequence[Note]:
        """Refuse a chain that gRPC cannot take."""
        kind = self._settings.key_type
        if self._settings.directory is not None and self._settings.intermediate:
            why = "a CA in a directory signs with its root, whose key is needed again"
            return (Note(why, "intermediate", "leave it out", NoteLevel.FATAL),)
        if not self._intermediate or kind not in _WITHOUT_INTERMEDIATE:
            return ()
        why = f"with {kind}, the guest's chain gets longer than gRPC's server can take"
        hint = f"leave it out, or choose {CAKeyType.ML_DSA_44}, which fits with an intermediate"
        return (Note(why, "intermediate", hint, NoteLevel.FATAL),)

    def open(self) -> None:
        """Make the keys and the CA certificates."""
        settings = self._settings
        if settings.directory is not None:
            lifetime = settings.ca_lifetime or _A_YEAR
            kept = _KeptCA(settings.directory, settings.key_type, lifetime, settings.backdate)
            self._issuer, self._older = kept.load_or_make(self._clock())
            self._root = self._issuer.certificate
            return
        lifetime = settings.ca_lifetime or _A_DAY
        validity = Validity.starting(self._clock(), lifetime, backdate=settings.backdate)
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
        return TrustBundle(anchors_pem=to_pem([root, *self._older]), intermediates_pem=to_pem(chain))

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


class _KeptCA:
    """A root with its key in one file of a directory; all processes of the user may use it at a time.

    Its names are not constrained: who may read it runs the machines, and names them.
    """

    def __init__(self, directory: str, key_type: CAKeyType, lifetime: timedelta, backdate: timedelta) -> None:
        from firebuild_pki.pem_files import expanded  # a CA in memory has no file

        self._directory = os.path.abspath(expanded(directory))
        self._key_type = key_type
        self._lifetime = lifetime
        self._backdate = backdate
        self._path = os.path.join(self._directory, _FILE)
        self._former = os.path.join(self._directory, _FORMER)

    def load_or_make(self, now: datetime) -> tuple[Issuer, list[x509.Certificate]]:
        """Return the CA, and the roots before it that are still valid.

        Raises:
            CAError: the directory or the file can't be used.
        """
        try:
            with self._locked():
                if not os.path.exists(self._path):
                    return self._make(now, [])
                key, roots = self._load()
                if roots[0].not_valid_before_utc > now and os.path.exists(self._former):
                    os.replace(self._former, self._path)  # the clock was ahead when it was replaced
                    key, roots = self._load()
                roots = [root for root in roots if root.not_valid_after_utc > now]
                if roots and roots[0].not_valid_after_utc - now > self._lifetime * _LEFT_AT_LEAST:
                    return Issuer(roots[0], key), roots[1:]
                return self._make(now, roots)
        except OSError as error:
            raise CAError(
                f"the CA in {self._directory} can't be used: {error.strerror or error}",
                hint="name another one in ca.embedded.directory",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with suppress(FileExistsError):  # where it is no directory, opening it says so
            os.makedirs(self._directory, mode=0o700)
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._must_be_own(os.fstat(descriptor))
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for some milliseconds, while a key is made
            for name in os.listdir(descriptor):
                if name.startswith(_UNFINISHED):  # whoever wrote it was killed
                    os.unlink(name, dir_fd=descriptor)
            yield
        finally:
            os.close(descriptor)

    def _must_be_own(self, directory: os.stat_result) -> None:
        """Refuse one in which another user could put a CA of theirs, which all machines would trust."""
        if directory.st_uid not in (0, os.geteuid()):
            who, remedy = f"the user {directory.st_uid}, whom it belongs to,", ""
        elif directory.st_mode & stat.S_IWOTH:
            who, remedy = "every user", f"chmod go-w {quote(self._directory)}, or "
        elif directory.st_mode & stat.S_IWGRP:
            who, remedy = "its group", f"chmod go-w {quote(self._directory)}, or "
        else:
            return
        raise CAError(
            f"the CA in {self._directory} can't be used: {who} can replace what is in the directory "
            f"(mode {stat.S_IMODE(directory.st_mode):04o})",
            hint=f"{remedy}name one in ca.embedded.directory that is not there yet",
        )

    def _load(self) -> tuple[CAPrivateKey, list[x509.Certificate]]:
        from firebuild_pki.pem_files import Source, read

        source = Source("directory", self._path)
        content = read(source)
        content.must_be_private()
        try:
            key = load_pem_private_key(content.data, None)
            roots = parse_certificates(content.data, self._path)
            if key.public_key() != roots[0].public_key():
                raise ValueError
        except (CAError, ValueError, TypeError):  # the reason could quote the key
            hint = "remove it; what trusts this CA has to be started again then"
            raise source.wrong("expected a CA's key and its certificate", hint) from None
        return key, roots  # type: ignore[return-value]

    def _make(self, now: datetime, older: list[x509.Certificate]) -> tuple[Issuer, list[x509.Certificate]]:
        (key,) = make_ca_keys(self._key_type, 1)
        validity = Validity.starting(now, self._lifetime, backdate=self._backdate)
        root = make_root(key, validity, with_intermediate=False, constraints=None)
        descriptor, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._directory)  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(private_key_pem(key) + to_pem([root.certificate, *older]))
                file.flush()
                os.fsync(descriptor)
            if not older and os.path.exists(self._path):  # it has ended, unless the clock is ahead
                with suppress(FileNotFoundError):
                    os.unlink(self._former)
                os.link(self._path, self._former)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise
        return root, older


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
