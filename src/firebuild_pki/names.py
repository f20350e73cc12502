"""Names that certificates are for, DNS names and URIs (SPIFFE IDs above all), and labels of requests."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from typing import Final, Self
from urllib.parse import urlsplit

from firebuild_pki.display import one_line
from firebuild_pki.errors import IdentityError
from firebuild_pki.provider import Profile
from firebuild_pki.values import dataclass

MAX_NAME: Final = 253
"""Upper bound of a DNS name in text form, RFC 1035 section 3.1."""

MAX_URI: Final = 2048
"""Bytes of a SPIFFE ID that implementations have to take (SPIFFE-ID section 2.3); for other URIs as well."""

MAX_NAMES: Final = 100
"""Names of one certificate; TLS libraries and MMDS bound its size."""

MAX_CSR: Final = 2 * MAX_NAMES * MAX_URI
"""Bytes of a request, in PEM, that somebody else made: as many names as there may be, and then some."""

MAX_LABELS: Final = 16
"""Labels of one request."""

MAX_LABEL: Final = 256
"""Characters of a label's value: what fits into a header, a tag of a cloud and a line of a log."""

_MAX_TRUST_DOMAIN: Final = 255  # SPIFFE-ID section 2.1
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]+")
_SEGMENT: Final = re.compile(r"[a-zA-Z0-9._-]+")
_URI: Final = re.compile(r"[a-z][a-z0-9+.-]*://[\x21-\x7e]+")


def check_dns_name(name: str) -> None:
    """Make sure that a name is a lower-case DNS name (RFC 1123), with one label or more.

    Raises:
        IdentityError: it is not.
    """
    shown = f'"{one_line(name, 300)}"'
    if len(name) > MAX_NAME:
        raise IdentityError(f"the name {shown} is longer than {MAX_NAME} characters")
    labels = name.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        hint = (
            "certificates are for single hosts, without a wildcard"
            if "*" in name
            else "use lower-case letters, digits, dashes and dots, for example db.example.com; a URI has a ://"
        )
        raise IdentityError(f"expected a DNS name, found {shown}", hint=hint)
    if labels[-1].isdigit():  # RFC 1123 section 2.1: or it could not be told from an address
        raise IdentityError(
            f"expected a DNS name, found {shown}", hint="names are DNS names and URIs; addresses are neither"
        )


def check_uri(uri: str) -> None:
    """Make sure that a URI can be a name: absolute, with a host (RFC 5280 section 4.2.1.6).

    For SPIFFE IDs the rules are those of the standard "The SPIFFE Identity and Verifiable Identity Document",
    section 2: a trust domain, no port, no user, a path of plain segments, no query, no fragment, no
    percent-encoding; and of "The X.509 SPIFFE Verifiable Identity Document": the path of a leaf is not empty.

    Raises:
        IdentityError: it cannot.
    """
    problem = _spiffe_problem(uri) if uri[:9].lower() == "spiffe://" else _uri_problem(uri)
    if problem is not None:
        what = "a SPIFFE ID" if uri[:9].lower() == "spiffe://" else "a URI"
        raise IdentityError(
            f'expected {what}, found "{one_line(uri, 300)}": {problem}',
            hint="for example spiffe://example.org/build/agent",
        )


def _spiffe_problem(uri: str) -> str | None:
    if len(uri.encode("utf-8", "replace")) > MAX_URI:
        return f"it is longer than {MAX_URI} bytes"
    if not uri.startswith("spiffe://"):
        return "the scheme is written in lower case"
    domain, slash, path = uri.removeprefix("spiffe://").partition("/")
    if not _TRUST_DOMAIN.fullmatch(domain) or len(domain) > _MAX_TRUST_DOMAIN:
        return (
            "a trust domain has lower-case letters, digits, dots, dashes and underscores, "
            f"{_MAX_TRUST_DOMAIN} at most"
        )
    return (
        _path_problem(path) if slash else "it names a trust domain and no workload in it: the path is missing"
    )


def _path_problem(path: str) -> str | None:
    for segment in path.split("/"):
        if segment in ("", ".", ".."):
            return "a path has no empty segment, no segment . or .., and no slash at its end"
        if not _SEGMENT.fullmatch(segment):
            return "the segments of a path have letters, digits, dots, dashes and underscores"
    return None


def _uri_problem(uri: str) -> str | None:
    if len(uri) > MAX_URI:
        return f"it is longer than {MAX_URI} characters"
    if not _URI.fullmatch(uri):
        return "it has a lower-case scheme, then ://, then printable ASCII characters without blanks"
    try:
        host = urlsplit(uri).hostname
    except ValueError:
        host = None
    return None if host else "it has no host"


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one certificate.

    Args:
        dns: DNS names.
        uris: URIs.
    """

    dns: tuple[str, ...]
    uris: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: str | Iterable[str]) -> Self:
        """Sort names into DNS names and URIs, which are those with ``://``.

        Raises:
            IdentityError: a name is neither, there is none, one is named twice, or there are too many; of
                URIs one alone if it is a SPIFFE ID, as X.509-SVID has it.
        """
        given = (names,) if isinstance(names, str) else tuple(names)
        for name in given:
            if not isinstance(name, str):
                raise IdentityError(f"expected a name as a string, found {type(name).__name__}")
        made = cls(
            tuple(name for name in given if "://" not in name), tuple(name for name in given if "://" in name)
        )
        made._check()
        return made

    @property
    def all(self) -> tuple[str, ...]:
        """DNS names, then URIs."""
        return (*self.dns, *self.uris)

    def _check(self) -> None:
        if not self.all:
            raise IdentityError("expected a name at least: a DNS name or a URI")
        if len(self.all) > MAX_NAMES:
            raise IdentityError(f"expected {MAX_NAMES} names at most, found {len(self.all)}")
        if len(set(self.all)) < len(self.all):
            twice = next(name for name in self.all if self.all.count(name) > 1)
            raise IdentityError(f'the name "{one_line(twice, 300)}" is there twice')
        for name in self.dns:
            check_dns_name(name)
        for uri in self.uris:
            check_uri(uri)
        if len(self.uris) > 1 and any(uri.startswith("spiffe://") for uri in self.uris):
            raise IdentityError(
                f"expected a SPIFFE ID and no other URI, found {len(self.uris)} URIs",
                hint="peers refuse a certificate with several; issue one for each",
            )


@dataclass(frozen=True, slots=True)
class Identity:
    """DNS names of the server and the guest of one build.

    Args:
        build_id: one DNS label (RFC 1123): lower-case letters, digits and inner dashes, at most 63.
        suffix: domain that the names are below.

    Raises:
        IdentityError: they do not make DNS names.
    """

    build_id: str
    suffix: str

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.build_id):
            raise IdentityError(
                f'expected a build id that is a DNS label, found "{one_line(self.build_id, 100)}"',
                hint="use 1 to 63 lower-case letters, digits and dashes, no dash at the ends",
            )
        if not all(_LABEL.fullmatch(label) for label in self.suffix.split(".")):
            raise IdentityError(
                f'expected a lower-case domain as name suffix, found "{one_line(self.suffix, 300)}"',
                hint="for example firebuild.internal",
            )
        if len(self.guest) > MAX_NAME:
            raise IdentityError(f"the name {self.guest} is longer than {MAX_NAME} characters")

    @property
    def server(self) -> str:
        """Name of the server, which the guest checks."""
        return f"{self.build_id}.{self.suffix}"

    @property
    def guest(self) -> str:
        """Name of the guest."""
        return f"guest.{self.server}"

    def of(self, profile: Profile) -> str:
        """Name of one end."""
        return self.server if profile is Profile.SERVER else self.guest


def random_build_id() -> str:
    """Make up an id that no other build has."""
    return secrets.token_hex(8)


def user_name() -> str:
    """Name the user that this process runs as; not from the environment, which any caller can set."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def audit_labels(**texts: str) -> dict[str, str]:
    """Make labels for a backend's audit, of texts that may hold anything, and with who asks: ``user@host``.

    Args:
        texts: by key; what is not printable ASCII is escaped, what is too long cut, what is empty left out.
    """
    told = {"requester": f"{user_name()}@{socket.gethostname()}", **texts}
    plain = {key: ascii(text)[1:-1] for key, text in told.items() if text}
    return {key: text[:MAX_LABEL] for key, text in plain.items()}


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Copy labels for the audit of a backend.

    They end up in headers, tags and log files of others, so they are bounded: `MAX_LABELS` of them, keys like
    DNS labels, values of `MAX_LABEL` printable ASCII characters at most.

    Raises:
        IdentityError: they are not like that.
    """
    if len(labels) > MAX_LABELS:
        raise IdentityError(f"expected {MAX_LABELS} labels at most, found {len(labels)}")
    for key, value in labels.items():
        if not isinstance(key, str) or not _LABEL.fullmatch(key):
            raise IdentityError(
                f'expected the key of a label like "image-tag", found "{one_line(str(key), 100)}"',
                hint="use 1 to 63 lower-case letters, digits and inner dashes",
            )
        if (
            not isinstance(value, str)
            or len(value) > MAX_LABEL
            or not (value.isascii() and value.isprintable())
        ):
            raise IdentityError(
                f"expected {MAX_LABEL} printable ASCII characters at most as the value of the label {key}, "
                f'found "{one_line(str(value), 100)}"'
            )
    return dict(labels)
