"""The block ``ca.aws-pca``, and what can be said about it without asking AWS."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from firebuild_pki import Duration, Note, NoteLevel, Profile, SecretRef, Settings
from firebuild_pki.http import is_safe

MAX_ATTEMPTS = 5
"""Together with the timeout, this keeps a call from going on for ever."""

_CA = re.compile(
    r"arn:aws(?:-[a-z]+){0,3}:acm-pca:[a-z]{2,4}-[a-z-]{1,30}-[0-9]{1,2}:[0-9]{12}:"
    r"certificate-authority/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)
_ROLE = re.compile(r"arn:aws(?:-[a-z]+){0,3}:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)
_TEMPLATE = re.compile(
    r"(?:arn:aws(?:-[a-z]+){0,3}:acm-pca:::template/)?(?P<name>[A-Za-z0-9_]{1,90})/V[0-9]{1,3}", re.ASCII
)
_SESSION_NAME = re.compile(r"[\w+=,.@-]{2,64}", re.ASCII)
"""What STS takes as a RoleSessionName."""

SigningAlgorithm = Literal[
    "SHA256WITHECDSA",
    "SHA384WITHECDSA",
    "SHA512WITHECDSA",
    "SHA256WITHRSA",
    "SHA384WITHRSA",
    "SHA512WITHRSA",
    "ML_DSA_44",
    "ML_DSA_65",
    "ML_DSA_87",
]


class AccessKey(Settings):
    """Settings of ``ca.aws-pca.access_key``."""

    id: SecretRef
    """Where the access key id is."""
    secret: SecretRef
    """Where the secret access key is."""
    session_token: SecretRef | None = None
    """Where the session token of temporary credentials is."""


class AwsPcaSettings(Settings):
    """Settings of ``ca.aws-pca``."""

    certificate_authority_arn: str
    """ARN of the private CA; its region is the one that is asked."""
    profile: str | None = None
    """Profile of the AWS configuration files that has the credentials."""
    access_key: AccessKey | None = None
    """Credentials by reference, instead of those that botocore finds."""
    role_arn: str | None = None
    """ARN of a role to assume with these credentials, for example in the account of the CA."""
    external_id: str | None = None
    """External id that the trust policy of role_arn asks for."""
    role_session_name: str = "firebuild"
    """Name of the role's session, which CloudTrail shows."""
    endpoint_url: str | None = None
    """URL of a VPC endpoint of AWS Private CA. Plain http is accepted on loopback only."""
    sts_endpoint_url: str | None = None
    """URL of a VPC endpoint of AWS STS, which is asked with role_arn and for checks. Plain http is accepted
    on loopback only."""
    ca_file: Path | None = None
    """PEM file with the CA of the endpoints' own TLS certificates, instead of the public ones that come with
    botocore."""
    server_template: str = "EndEntityServerAuthCertificate/V1"
    """Name or ARN of the template for server certificates."""
    guest_template: str = "EndEntityClientAuthCertificate/V1"
    """Name or ARN of the template for certificates of guests and other clients."""
    peer_template: str = "EndEntityCertificate/V1"
    """Name or ARN of the template for workloads that are servers and clients in one."""
    signing_algorithm: SigningAlgorithm | None = None
    """Algorithm of the CA's signatures; by default the one that fits its key."""
    timeout: Duration = timedelta(seconds=10)
    """How long connecting, and each answer, may take."""
    attempts: int = 3
    """How often a request is sent, at most 5, if AWS cannot be reached, throttles or fails."""

    @property
    def region(self) -> str:
        """Whose endpoint answers for the CA."""
        return self.certificate_authority_arn.split(":")[3]

    def template_for(self, end: Profile) -> str:
        """Return the ARN of the template for the certificates of one end of a connection, or of a peer."""
        name: str = getattr(self, f"{end}_template")
        # Templates belong to AWS: without region and account, but in a partition.
        partition = self.certificate_authority_arn.split(":")[1]
        return name if name.startswith("arn:") else f"arn:{partition}:acm-pca:::template/{name}"


def look_at(settings: AwsPcaSettings) -> Iterator[Note]:
    """Say what is wrong with the settings; no I/O."""
    if _CA.fullmatch(settings.certificate_authority_arn) is None:
        yield _wrong(
            "certificate_authority_arn",
            "expected the ARN of a private CA, such as arn:aws:acm-pca:eu-central-1:123456789012:"
            "certificate-authority/11111111-2222-3333-4444-555555555555",
            "aws acm-pca list-certificate-authorities shows them",
        )
    yield from _credentials(settings)
    for path in ("endpoint_url", "sts_endpoint_url"):
        yield from _endpoint(path, getattr(settings, path))
    for end in (*Profile, Profile.PEER):
        yield from _template(f"{end}_template", getattr(settings, f"{end}_template"))
    if not timedelta(0) < settings.timeout:
        yield _wrong("timeout", "expected a duration above zero")
    if not 1 <= settings.attempts <= MAX_ATTEMPTS:
        yield _wrong("attempts", f"expected a number from 1 to {MAX_ATTEMPTS}, found {settings.attempts}")


def _credentials(settings: AwsPcaSettings) -> Iterator[Note]:
    if settings.profile is not None and settings.access_key is not None:
        yield _wrong("profile", "profile and access_key name two sets of credentials", "leave one out")
    if settings.role_arn is None and settings.external_id is not None:
        yield _wrong("external_id", "external_id is for role_arn, which is missing")
    if settings.role_arn is not None and not _ROLE.fullmatch(settings.role_arn):
        yield _wrong("role_arn", "expected the ARN of a role, such as arn:aws:iam::123456789012:role/builds")
    if not _SESSION_NAME.fullmatch(settings.role_session_name):
        yield _wrong("role_session_name", "expected 2 to 64 letters, digits and characters of +=,.@_-")


def _endpoint(path: str, address: str | None) -> Iterator[Note]:
    if address is None:
        return
    try:
        url = urlsplit(address)
        usable = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in url.netloc or url.query or url.fragment:
        hint = "scheme, host and port; no user, no query"
        yield _wrong(
            path, "expected a URL such as https://vpce-0123.acm-pca.eu-west-1.vpce.amazonaws.com", hint
        )
    elif not is_safe(address):
        yield _wrong(path, f"plain http to {url.hostname}; it is accepted on loopback only", "use https")


def _template(path: str, template: str) -> Iterator[Note]:
    found = _TEMPLATE.fullmatch(template)
    if found is None:
        hint = "a name of the AWS Private CA User Guide, or its ARN"
        yield _wrong(path, "expected a template such as EndEntityServerAuthCertificate/V1", hint)
    elif "EndEntity" not in (name := found["name"]):
        yield _wrong(path, f"{name} is not a template for end-entity certificates")
    elif name.startswith("Blank") and not passes_usages(template):
        hint = "BlankEndEntityCertificate_APIPassthrough/V1 takes them from this provider"
        yield _wrong(path, f"{name} takes the key usages from the signing request, which has none", hint)


def passes_usages(template: str) -> bool:
    """Tell whether a template takes key usages from the call: APIPassthrough, APICSRPassthrough."""
    return "_API" in template


def _wrong(path: str, message: str, hint: str | None = None) -> Note:
    return Note(message, path, hint, NoteLevel.FATAL)
