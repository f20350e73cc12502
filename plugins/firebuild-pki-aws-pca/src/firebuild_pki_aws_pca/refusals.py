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

# What a code, without "Exception" at its end, comes down to; what to change.
_MEANINGS: Mapping[str, tuple[str, str]] = {
    "ExpiredToken": (
        "the AWS credentials have expired",
        "get new ones; without access_key botocore renews those of roles and of SSO by itself",
    ),
    "InvalidClientTokenId": (
        "AWS does not know the access key",
        "the access key id is wrong, deleted or inactive, or a temporary one without its session token; or "
        "the account has not enabled the region {region}",
    ),
    "SignatureDoesNotMatch": (
        "AWS does not accept the signature of the request",
        "the secret access key is wrong, or the clock of this machine is off by more than five minutes",
    ),
    "InvalidState": (
        "the CA is in a state that does not allow this",
        "aws acm-pca describe-certificate-authority shows its state",
    ),
    "ResourceNotFound": (
        "there is no such private CA in the region {region}",
        "compare certificate_authority_arn with aws acm-pca list-certificate-authorities; a CA of another "
        "account has to be shared with this one",
    ),
    "MalformedCSR": (
        "AWS does not accept the signing request",
        "this kind of key may not be supported: see ca.key_type",
    ),
    "InvalidArgs": (
        "AWS does not accept the arguments of the request",
        "look at signing_algorithm, which has to fit the CA's key, and at server_template and guest_template",
    ),
    "LimitExceeded": (
        "a quota of AWS Private CA is used up",
        "its message says which; quotas are raised in the Service Quotas console",
    ),
    "Throttling": (
        "AWS throttles the requests",
        "fewer builds at the same time, more attempts, or a higher quota for the rate of {action}",
    ),
    "InternalFailure": ("AWS Private CA failed", "try again; the AWS Health Dashboard tells of outages"),
    "RequestFailed": (
        "AWS could not issue the certificate",
        "try again; then look into the CA's audit report",
    ),
    "OptInRequired": (
        "the account is not signed up for AWS Private CA",
        "sign up, and enable the region {region}",
    ),
}
_SAME: Mapping[str, str] = {
    "ConcurrentModification": "Throttling",
    "IncompleteSignature": "SignatureDoesNotMatch",
    "InternalServer": "InternalFailure",
    "InvalidArn": "ResourceNotFound",
    "InvalidSignature": "SignatureDoesNotMatch",
    "RequestExpired": "SignatureDoesNotMatch",
    "ServiceUnavailable": "InternalFailure",
    "SubscriptionRequired": "OptInRequired",
    "UnrecognizedClient": "InvalidClientTokenId",
    "Validation": "InvalidArgs",
}
_PASSING = frozenset({"LimitExceeded", "Throttling", "InternalFailure", "RequestFailed"})
_STATES: Mapping[str, tuple[str, str]] = {
    "CREATING": ("is still being created", "wait a minute, then import its certificate"),
    "PENDING_CERTIFICATE": (
        "has no certificate yet",
        "have its request signed by a root or the parent CA, and import the certificate",
    ),
    "DISABLED": ("is disabled", "aws acm-pca update-certificate-authority --status ACTIVE enables it"),
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
        kind = code.removesuffix("Exception")
        kind = _SAME.get(kind, kind)
        what, hint = _MEANINGS.get(kind, (f"AWS refuses {asked.action}", ""))
        if kind == "AccessDenied":
            what, hint = f"{asked.action} is not allowed on {asked.resource}", _allow(said, asked)
        words = {"action": asked.action, "region": asked.region}
        # What is said of a signature is the request, whose headers may be secrets.
        lines = [] if kind == "SignatureDoesNotMatch" else said.splitlines()
        quote = f': "{one_line(lines[0], MAX_QUOTE)}"' if lines else ""
        message = f"{what.format(**words)} (AWS: {one_line(code, 100)}{quote})"
        super().__init__(message, hint=hint.format(**words) or None, retryable=kind in _PASSING)


def _allow(said: str, asked: Asked) -> str:
    if "explicit deny" in said:
        return "a policy denies it explicitly, which outweighs what others allow"
    if asked.action.startswith("sts:AssumeRole"):
        return (
            "the trust policy of the role has to allow it for these credentials, with external_id if it asks "
            f"for one, and a policy of theirs has to allow {asked.action} on {asked.resource}"
        )
    hint = f"allow {asked.action} on {asked.resource} in a policy of these credentials"
    if asked.template is not None:
        hint += f"; a Condition on acm-pca:TemplateArn has to allow {asked.template}"
    return hint


def in_state(status: str) -> CAError:
    """Say that a CA cannot sign in its state, and what to do about it."""
    shown = one_line(status, 50)
    what, hint = _STATES.get(status, (f"is in the state {shown}", "it has to be ACTIVE"))
    return CAError(f"the private CA {what} ({shown})", hint=hint)


# Classes of botocore's exceptions by name: what happened; what to change.
_FAULTS: Mapping[str, tuple[str, str]] = {
    "NoCredentialsError": (
        "there are no AWS credentials",
        "set access_key or profile, or give this machine a role; botocore looks into AWS_ACCESS_KEY_ID, the "
        "files in ~/.aws, and the metadata of ECS, EKS and EC2",
    ),
    "PartialCredentialsError": ("the AWS credentials are incomplete", "id and secret belong together"),
    "ProfileNotFound": (
        "the AWS configuration files do not have the profile",
        "profile, or else AWS_PROFILE, has to be a section of ~/.aws/config or ~/.aws/credentials",
    ),
    "ConfigParseError": ("an AWS configuration file cannot be read", "look at ~/.aws/config"),
    "InvalidConfigError": ("an AWS configuration file has a mistake", "look at ~/.aws/config"),
    "SSOTokenLoadError": ("nobody is logged in to AWS SSO", "aws sso login"),
    "UnauthorizedSSOTokenError": ("the login to AWS SSO has expired", "aws sso login"),
    "TokenRetrievalError": ("the login to AWS SSO has expired", "aws sso login"),
    "LoginRefreshRequired": ("the login to AWS has expired", "aws login"),
    "CredentialRetrievalError": (
        "the AWS credentials could not be fetched",
        "look at credential_process of the profile, or at the role of this machine",
    ),
    "EndpointConnectionError": (
        "there is no connection to {endpoint}",
        "is the network up, and does AWS Private CA exist in the region {region}? a private subnet needs a "
        "VPC endpoint, whose address may have to be {setting}",
    ),
    "ConnectTimeoutError": (
        "there is no connection to {endpoint} in time",
        "a security group or firewall may drop it; a private subnet needs a VPC endpoint, whose address may "
        "have to be {setting}",
    ),
    "ReadTimeoutError": ("{endpoint} gives no answer in time", "timeout gives it more time"),
    "ConnectionClosedError": ("{endpoint} closed the connection", "a firewall or proxy may have done that"),
    "ProxyConnectionError": ("the proxy in HTTPS_PROXY did not connect to {endpoint}", "see NO_PROXY"),
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
    inside = causes(error, lambda one: (getattr(one, "kwargs", {}).get("error"), *one.args, one.__context__))
    for one in inside:
        if isinstance(one, ssl.SSLCertVerificationError):
            message = f"{endpoint}: its TLS certificate is not accepted: {one.verify_message.rstrip('.')}"
            return CAError(message, hint="ca_file holds the CA of a certificate that no public CA has signed")
    for kind in type(error).__mro__:
        if kind.__name__ in _FAULTS:
            what, hint = _FAULTS[kind.__name__]
            retryable = "{endpoint}" in what or kind.__name__ == "CredentialRetrievalError"
            return CAError(what.format(**words), hint=hint.format(**words), retryable=retryable)
    return CAError(f"asking {endpoint} failed: {type(error).__name__}")
