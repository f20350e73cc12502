"""What goes wrong at AWS, and what people read about it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions as boto
from firebuild_pki import AuthorityClosed, CAError, NoteLevel, Profile, SignRequest

from firebuild_pki_aws_pca.client import silenced_debug
from firebuild_pki_aws_pca.refusals import unanswered
from pca_server import BUILDS, TEMPORARY
from pca_servers import ENVIRON, KEYS, MISSING, REGION, TEMPLATE, Server

ROLE = "arn:aws:iam::123456789012:role/builds"
TOKEN_KEYS = {**KEYS, "session_token": {"env": "PCA_TOKEN"}}
TOKEN_ENVIRON = dict(zip(("PCA_KEY_ID", "PCA_SECRET", "PCA_TOKEN"), TEMPORARY, strict=True))


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def error_of(server: Server, arn: str, *, environ: Mapping[str, str] = ENVIRON, **block: Any) -> CAError:
    """Open, issue for the server, and return what went wrong; no secret may be in it."""
    with pytest.raises(CAError) as caught, server.opened(arn, environ=environ, **block) as authority:
        authority.issue_server()
    cause: BaseException | None = caught.value
    while cause is not None:
        for secret in (BUILDS[1], *TEMPORARY[1:]):
            assert secret not in str(cause) + repr(cause)
        cause = cause.__cause__
    return caught.value


REFUSALS = [  # code, message, hint, retryable
    (
        "ThrottlingException",
        "AWS throttles the requests",
        "the rate of acm-pca:IssueCertificate",
        True,
    ),
    ("LimitExceededException", "a quota of AWS Private CA is used up", "Service Quotas", True),
    ("InvalidArgsException", "AWS does not accept the arguments", "look at signing_algorithm", False),
    ("ValidationException", "AWS does not accept the arguments", "look at signing_algorithm", False),
    ("MalformedCSRException", "AWS does not accept the signing request", "see ca.key_type", False),
    ("InvalidStateException", "the CA is in a state that does not allow this", "shows its state", False),
    (
        "ResourceNotFoundException",
        f"no such private CA in the region {REGION}",
        "certificate_authority_arn",
        False,
    ),
    ("InternalFailure", "AWS Private CA failed", "AWS Health Dashboard", True),
    ("SubscriptionRequiredException", "not signed up", f"enable the region {REGION}", False),
]


@pytest.mark.parametrize(("code", "message", "hint", "retryable"), REFUSALS)
def test_a_refusal_is_put_into_words(
    server: Server, root: str, code: str, message: str, hint: str, retryable: bool
) -> None:
    server.behave(errors={"IssueCertificate": code})
    error = error_of(server, root)
    assert message in error.message
    assert f'(AWS: {code}: "as the test wants it")' in error.message
    assert hint in str(error.hint)
    assert error.retryable is retryable


def test_a_refusal_that_is_not_known_is_quoted(server: Server, root: str) -> None:
    server.behave(errors={"IssueCertificate": "NewException"})
    error = error_of(server, root)
    assert 'AWS refuses acm-pca:IssueCertificate (AWS: NewException: "as the test wants it")' in error.message
    assert error.hint is None


def test_what_iam_denies_names_action_resource_and_template(server: Server, root: str) -> None:
    server.behave(denied=["acm-pca:IssueCertificate"])
    error = error_of(server, root)
    assert f"acm-pca:IssueCertificate is not allowed on {root}" in error.message
    assert "no identity-based policy allows" in error.message
    assert f"allow acm-pca:IssueCertificate on {root} in a policy" in str(error.hint)
    assert f"acm-pca:TemplateArn has to allow {TEMPLATE}EndEntityServerAuthCertificate/V1" in str(error.hint)
    server.behave(denied=["acm-pca:GetCertificate"])
    assert f"acm-pca:GetCertificate is not allowed on {root}" in error_of(server, root).message


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        ("CREATING", "is still being created", "wait a minute"),
        ("PENDING_CERTIFICATE", "has no certificate yet", "import the certificate"),
        ("DISABLED", "is disabled", "--status ACTIVE"),
        ("EXPIRED", "has an expired certificate", "renew and import it"),
        ("DELETED", "is deleted", "restore-certificate-authority"),
        ("FAILED", "has failed, which is final", "create another"),
        ("NOVEL", "is in the state NOVEL", "has to be ACTIVE"),
    ],
)
def test_the_state_of_a_ca_is_put_into_words(server: Server, status: str, message: str, hint: str) -> None:
    arn = server.create("in a state", "EC_prime256v1")
    server.admin.update_certificate_authority(CertificateAuthorityArn=arn, Status=status)
    error = error_of(server, arn)
    assert f"the private CA {message} ({status})" in error.message
    assert hint in str(error.hint)


def test_a_ca_that_is_disabled_during_a_build(server: Server) -> None:
    arn = server.make("Short of breath", "EC_prime256v1")
    provider = server.bare(arn)
    provider.open()
    with server.opened(arn) as authority:
        server.admin.update_certificate_authority(CertificateAuthorityArn=arn, Status="DISABLED")
        with pytest.raises(CAError, match="the private CA is disabled"):
            authority.issue_server()
        (note,) = [note for note in provider.check() if note.about == "reachable"]
        assert note.level is NoteLevel.FATAL
        server.behave(denied=["acm-pca:DescribeCertificateAuthority"])
        with pytest.raises(CAError, match="the CA is in a state that does not allow this"):
            authority.issue_server()
    provider.close()


def test_a_ca_that_does_not_exist(server: Server) -> None:
    assert f"there is no such private CA in the region {REGION}" in error_of(server, MISSING).message


def test_a_wrong_access_key(server: Server, root: str) -> None:
    error = error_of(server, root, environ={**ENVIRON, "PCA_KEY_ID": "AKIANOBODY0000000000"})
    assert "AWS does not know the access key" in error.message
    error = error_of(server, root, environ={**TOKEN_ENVIRON, "PCA_TOKEN": "x" * 20}, access_key=TOKEN_KEYS)
    assert "a temporary one without its session token" in str(error.hint)


def test_a_wrong_secret_shows_nothing_of_the_request(server: Server, root: str) -> None:
    environ = {**TOKEN_ENVIRON, "PCA_SECRET": "not-the-secret-of-it"}
    error = error_of(server, root, environ=environ, access_key=TOKEN_KEYS)
    assert "not accept the signature of the request (AWS: InvalidSignatureException)" in error.message
    assert "the clock of this machine" in str(error.hint)


def test_an_expired_session_token(server: Server, root: str) -> None:
    server.behave(expired=True)
    error = error_of(server, root, environ=TOKEN_ENVIRON, access_key=TOKEN_KEYS)
    assert "the AWS credentials have expired" in error.message


def test_no_credentials(server: Server, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of(server, root, access_key=None)
    assert "there are no AWS credentials" in error.message
    assert "access_key or profile" in str(error.hint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", BUILDS[0])
    assert "the AWS credentials are incomplete" in error_of(server, root, access_key=None).message


def test_a_profile_that_does_not_exist(server: Server, root: str) -> None:
    error = error_of(server, root, access_key=None, profile="nobody")
    assert "the AWS configuration files do not have the profile" in error.message


def test_a_role_that_may_not_be_assumed(server: Server, root: str) -> None:
    server.behave(external_id="of the other account")
    error = error_of(server, root, role_arn=ROLE)
    assert f"sts:AssumeRole is not allowed on {ROLE}" in error.message
    assert "external_id" in str(error.hint)


def test_nobody_listens(server: Server, root: str) -> None:
    error = error_of(server, root, endpoint_url="http://127.0.0.1:1")
    assert "there is no connection to http://127.0.0.1:1" in error.message
    assert f"does AWS Private CA exist in the region {REGION}?" in str(error.hint)
    assert "have to be endpoint_url" in str(error.hint)
    assert error.retryable
    error = error_of(server, root, sts_endpoint_url="http://127.0.0.1:1", role_arn=ROLE)
    assert "have to be sts_endpoint_url" in str(error.hint)


def test_no_answer(server: Server, root: str) -> None:
    server.behave(silent=True)
    error = error_of(server, root, timeout="100ms")
    assert f"{server.address} gives no answer in time" in error.message
    assert error.retryable


def test_a_connection_that_is_closed(server: Server, root: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.close()
        assert "there is no connection" in error_of(server, root, endpoint_url=address).message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (boto.SSOTokenLoadError(error_msg="x"), "nobody is logged in to AWS SSO"),
        (
            boto.ConnectTimeoutError(endpoint_url="x", error="x"),
            "no connection to https://pca in time",
        ),
        (boto.ConnectionClosedError(endpoint_url="x"), "https://pca closed the connection"),
        (boto.SSLError(endpoint_url="x", error="unknown"), "asking https://pca failed: SSLError"),
        (boto.UnknownServiceError(service_name="x", known_service_names=""), "failed: UnknownServiceError"),
    ],
)
def test_what_botocore_raises_is_put_into_words(error: Exception, message: str) -> None:
    found = unanswered(error, endpoint="https://pca", region=REGION, setting="endpoint_url")
    assert message in found.message


def test_a_throttled_request_is_sent_again(server: Server, root: str) -> None:
    with server.opened(root, attempts=3) as authority:
        server.behave(throttled=1)
        authority.issue_server()
    assert server.operations() == ["IssueCertificate", "IssueCertificate", "GetCertificate"]
    tokens = {
        parameters["IdempotencyToken"] for name, parameters in server.calls() if name == "IssueCertificate"
    }
    assert len(tokens) == 1


def test_no_session_token_is_in_botocores_debug_log(
    server: Server, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with server.opened(root, environ=TOKEN_ENVIRON, access_key=TOKEN_KEYS, role_arn=ROLE) as authority:
        authority.issue_server()
        authority.check()
    assert not [one for one in caplog.records if one.name.startswith("botocore")]
    logging.getLogger("botocore.parsers").debug("as before")
    assert "as before" in caplog.text


def test_others_log_while_a_thread_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("botocore.endpoint")
    before = list(logger.filters)
    with silenced_debug():
        logger.debug("ours")
        logger.info("worth a word")
    assert logger.filters == before
    assert [one.message for one in caplog.records] == ["worth a word"]


def test_after_closing_nothing_is_signed(server: Server, root: str) -> None:
    provider = server.bare(root)
    with pytest.raises(AuthorityClosed, match="not open"):
        provider.check()
    provider.open()
    provider.close()
    provider.close()
    with pytest.raises(AuthorityClosed, match="not open"):
        provider.poll(SignRequest(b"", Profile.SERVER, (), timedelta(hours=1), "b1"), root)
