"""What a refusal of AWS means, and what to do about it: the likeliest cause first.

AWS's own words are quoted, but their first line alone: the further lines of a refused signature are the
request that was signed, with its session token.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from firebuild_pki import CAError
from firebuild_pki.display import one_line
from firebuild_pki.errors import causes

MAX_QUOTE = 300
"""Characters of AWS's own words that a message repeats."""

# What a code comes down to; what to change; whether it may pass by itself.
_MEANINGS: Mapping[str, tuple[str, str, bool]] = {
    "ExpiredToken": (
        "the AWS credentials have expired",
        "get new ones; without access_key boto3 renews those of roles and of SSO by itself",
        False,
    ),
    "InvalidClientTokenId": (
        "AWS does not know the access key",
        "the access key id is wrong, deleted or inactive, or a temporary one without its session token; or "
        "the account has not enabled the region {region}",
        False,
    ),
    "SignatureDoesNotMatch": (
        "AWS does not accept the signature of the request",
        "the secret access key is wrong, or the clock of this machine is off by more than five minutes",
        False,
    ),
    "InvalidStateException": (
        "the CA is in a state that does not allow this",
        "aws acm-pca describe-certificate-authority shows its state",
        False,
    ),
    "ResourceNotFoundException": (
        "there is no such private CA in the region {region}",
        "compare certificate_authority_arn with aws acm-pca list-certificate-authorities; a CA of another "
        "account has to be shared with this one",
        False,
    ),
    "InvalidArnException": (
        "AWS does not take the ARN for one of a private CA",
        "compare certificate_authority_arn with aws acm-pca list-certificate-authorities",
        False,
    ),
    "MalformedCSRException": (
        "AWS does not accept the signing request",
        "this kind of key may not be supported: see ca.key_type",
        False,
    ),
    "InvalidArgsException": (
        "AWS does not accept the arguments of the request",
        "look at signing_algorithm, which has to fit the CA's key, and at server_template and guest_template",
        False,
    ),
    "LimitExceededException": (
        "a quota of AWS Private CA is used up",
        "its message says which; quotas are raised in the Service Quotas console",
        True,
    ),
    "ThrottlingException": (
        "AWS throttles the requests",
        "fewer builds at the same time, more attempts, or a higher quota for the rate of {action}",
        True,
    ),
    "InternalFailure": (
        "AWS Private CA failed",
        "try again; the AWS Health Dashboard tells of outages",
        True,
    ),
    "RequestFailedException": (
        "AWS could not issue the certificate",
        "try again; then look into the CA's audit report",
        True,
    ),
    "OptInRequired": (
        "the account is not signed up for AWS Private CA",
        "sign up, and enable the region {region}",
        False,
    ),
}
_SAME: Mapping[str, str] = {
    "ConcurrentModificationException": "ThrottlingException",
    "ExpiredTokenException": "ExpiredToken",
    "IncompleteSignature": "SignatureDoesNotMatch",
    "InternalError": "InternalFailure",
    "InternalServerException": "InternalFailure",
    "InvalidSignatureException": "SignatureDoesNotMatch",
    "RequestExpired": "SignatureDoesNotMatch",
    "ServiceUnavailable": "InternalFailure",
    "ServiceUnavailableException": "InternalFailure",
    "SubscriptionRequiredException": "OptInRequired",
    "Throttling": "ThrottlingException",
    "TooManyRequestsException": "ThrottlingException",
    "UnrecognizedClientException": "InvalidClientTokenId",
    "ValidationException": "InvalidArgsException",
}
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "NotAuthorized", "UnauthorizedOperation"})
_STATES: Mapping[str, tuple[str, str]] = {
    "CREATING": ("is still being created", "wait a minute, then import its certificate"),
    "PENDING_CERTIFICATE": (
        "has no certificate yet",
        "have its request signed by a root or the parent CA, and import the certificate",
    ),
    "DISABLED": (
        "is disabled",
        "aws acm-pca update-certificate-authority --status ACTIVE enables it",
    ),
    "EXPIRED": ("has an expired certificate", "renew and import it, or name another CA"),
    "DELETED": (
        "is deleted",
        "aws acm-pca restore-certificate-authority brings it back within its restoration period",
    ),
    "FAILED": ("has failed, which is final", "delete it, and create another"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What AWS was asked.

    Args:
        action: in IAM's words, ``acm-pca:IssueCertificate``.
        resource: its ARN, as IAM wants it in a policy.
        region: where it was asked.
        template: ARN of a certificate template, where one was asked for.
    """

    action: str
    resource: str
    region: str
    template: str | None = None


class Refused(CAError):
    """AWS understood a request and said no.

    Args:
        code: of the error, such as AccessDeniedException.
        said: AWS's own words.
        asked: for what.
    """

    def __init__(self, code: str, said: str, asked: Asked) -> None:
        self.code = code
        if code in _DENIED:
            what, hint, retryable = (
                f"{asked.action} is not allowed on {asked.resource}",
                _allow(said, asked),
                False,
            )
        else:
            unknown = (f"AWS refuses {asked.action}", "", False)
            what, hint, retryable = _MEANINGS.get(_SAME.get(code, code), unknown)
        words = {"action": asked.action, "region": asked.region}
        # What is said of a signature is the request, whose headers may be secrets.
        lines = [] if _SAME.get(code, code) == "SignatureDoesNotMatch" else said.splitlines()
        quote = f': "{one_line(lines[0], MAX_QUOTE)}"' if lines else ""
        super().__init__(
            f"{what.format(**words)} (AWS: {one_line(code, 100)}{quote})",
            hint=hint.format(**words) or None,
            retryable=retryable,
        )


def _allow(said: str, asked: Asked) -> str:
    if asked.action == "sts:AssumeRole":
        return (
            "the trust policy of role_arn has to allow it for these credentials, with external_id if it asks "
            f"for one, and a policy of theirs has to allow sts:AssumeRole on {asked.resource}"
        )
    if "explicit deny" in said:
        return "a policy denies it explicitly, which outweighs what others allow"
    hint = f"allow {asked.action} on {asked.resource} in a policy of these credentials"
    if asked.template is not None:
        hint += f"; a Condition on acm-pca:TemplateArn has to allow {asked.template}"
    return hint


def state_words(status: str) -> tuple[str, str]:
    """Say in words what a CA's state means, and what to do about it."""
    return _STATES.get(status, (f"is in the state {one_line(status, 50)}", "it has to be ACTIVE"))


def in_state(status: str) -> CAError:
    """Say that a CA cannot sign in its state."""
    what, hint = state_words(status)
    return CAError(f"the private CA {what} ({one_line(status, 50)})", hint=hint)


# Classes of botocore's exceptions by name: what happened; what to change; whether it may pass.
_FAULTS: Mapping[str, tuple[str, str, bool]] = {
    "NoCredentialsError": (
        "there are no AWS credentials",
        "set access_key or profile, or give this machine a role; boto3 looks into AWS_ACCESS_KEY_ID, the "
        "files in ~/.aws, and the metadata of ECS, EKS and EC2",
        False,
    ),
    "PartialCredentialsError": ("the AWS credentials are incomplete", "id and secret belong together", False),
    "ProfileNotFound": (
        "the AWS configuration files do not have the profile",
        "profile, or else AWS_PROFILE, has to be a section of ~/.aws/config or ~/.aws/credentials",
        False,
    ),
    "ConfigParseError": ("an AWS configuration file cannot be read", "look at ~/.aws/config", False),
    "InvalidConfigError": ("an AWS configuration file has a mistake", "look at ~/.aws/config", False),
    "SSOTokenLoadError": ("nobody is logged in to AWS SSO", "aws sso login", False),
    "UnauthorizedSSOTokenError": ("the login to AWS SSO has expired", "aws sso login", False),
    "TokenRetrievalError": ("the login to AWS SSO has expired", "aws sso login", False),
    "LoginRefreshRequired": ("the login to AWS has expired", "aws login", False),
    "CredentialRetrievalError": (
        "the AWS credentials could not be fetched",
        "look at credential_process of the profile, or at the role of this machine",
        True,
    ),
    "MetadataRetrievalError": (
        "the AWS credentials could not be fetched",
        "look at the role of this machine",
        True,
    ),
    "EndpointConnectionError": (
        "there is no connection to {endpoint}",
        "is the network up, and does AWS Private CA exist in the region {region}? a private subnet needs a "
        "VPC endpoint, whose address may have to be {setting}",
        True,
    ),
    "ConnectTimeoutError": (
        "there is no connection to {endpoint} in time",
        "a security group or firewall may drop it; a private subnet needs a VPC endpoint, whose address may "
        "have to be {setting}",
        True,
    ),
    "ReadTimeoutError": ("{endpoint} gives no answer in time", "timeout gives it more time", True),
    "ConnectionClosedError": (
        "{endpoint} closed the connection",
        "a firewall or proxy may have done that",
        True,
    ),
    "ProxyConnectionError": ("the proxy in HTTPS_PROXY did not connect to {endpoint}", "see NO_PROXY", True),
}


def unanswered(error: Exception, *, endpoint: str, region: str, setting: str) -> CAError:
    """Say in words why there was no answer of AWS.

    Args:
        error: of botocore. It may quote what it was working on, so it is no cause of the result.
        endpoint: the URL that was asked.
        region: its region.
        setting: what would lead elsewhere.
    """
    words = {"endpoint": endpoint, "region": region, "setting": setting}
    for one in causes(
        error, lambda one: (*one.args, getattr(one, "kwargs", {}).get("error"), one.__context__)
    ):
        if isinstance(one, ssl.SSLCertVerificationError):
            message = f"{endpoint}: its TLS certificate is not accepted: {one.verify_message.rstrip('.')}"
            return CAError(message, hint="ca_file holds the CA of a certificate that no public CA has signed")
    for kind in type(error).__mro__:
        if kind.__name__ in _FAULTS:
            what, hint, retryable = _FAULTS[kind.__name__]
            return CAError(what.format(**words), hint=hint.format(**words), retryable=retryable)
    return CAError(f"asking {endpoint} failed: {type(error).__name__}")
