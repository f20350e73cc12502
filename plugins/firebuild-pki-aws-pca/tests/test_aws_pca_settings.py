"""What is said about the settings before anything is asked of AWS."""

from __future__ import annotations

from typing import Any

import pytest
from firebuild_pki import CASettings, Document, SettingsError, open_authority, redacted, validate

from pca_server import BUILDS
from pca_servers import ENVIRON, KEYS, MISSING

ROLE = "arn:aws:iam::123456789012:role/builds"


def problems(**block: Any) -> list[tuple[str, str]]:
    section = {"certificate_authority_arn": MISSING, "access_key": KEYS, **block}
    with pytest.raises(SettingsError) as caught:
        open_authority({"provider": "aws-pca", "aws-pca": section}, environ=ENVIRON)
    return [(one.path.removeprefix("ca.aws-pca."), one.message) for one in caught.value.problems]


@pytest.mark.parametrize(
    "arn",
    [
        "",
        "builds",
        MISSING.replace("acm-pca", "acm"),
        MISSING.replace("eu-central-1", ""),
        MISSING.replace("eu-central-1", "eu-central-1/evil.example"),
        MISSING.replace("123456789012", "12"),
        MISSING + "/certificate/1",
        MISSING + "\n",
    ],
)
def test_the_ca_is_named_by_its_arn(arn: str) -> None:
    ((path, message),) = problems(certificate_authority_arn=arn)
    assert path == "certificate_authority_arn"
    assert message.startswith("expected the ARN of a private CA, such as arn:aws:acm-pca:")


@pytest.mark.parametrize("partition", ["aws-cn", "aws-us-gov", "aws-iso-b"])
def test_templates_are_those_of_the_partition(partition: str) -> None:
    from firebuild_pki import Profile

    from firebuild_pki_aws_pca import AwsPcaSettings

    settings = AwsPcaSettings(certificate_authority_arn=MISSING.replace("arn:aws:", f"arn:{partition}:"))
    found = settings.template_for(Profile.SERVER)
    assert found == f"arn:{partition}:acm-pca:::template/EndEntityServerAuthCertificate/V1"


@pytest.mark.parametrize("setting", ["endpoint_url", "sts_endpoint_url"])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pca.example", "expected a URL such as https://"),
        ("https://me:pw@pca.example", "expected a URL such as https://"),
        ("https://[", "expected a URL such as https://"),
        ("http://pca.example", "plain http to pca.example; it is accepted on loopback only"),
    ],
)
def test_an_endpoint_is_https_or_loopback(setting: str, address: str, message: str) -> None:
    ((path, found),) = problems(**{setting: address})
    assert path == setting
    assert found.startswith(message)
    assert "pw" not in found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("EndEntityServerAuthCertificate", "expected a template such as EndEntityServerAuthCertificate/V1"),
        ("arn:aws:acm-pca:eu-west-1:1:template/EndEntityCertificate/V1", "expected a template such as"),
        ("SubordinateCACertificate_PathLen0/V1", "is not a template for end-entity certificates"),
        ("BlankEndEntityCertificate_CSRPassthrough/V1", "takes the key usages from the signing request"),
    ],
)
def test_a_template_is_for_end_entities(template: str, message: str) -> None:
    ((path, found),) = problems(guest_template=template)
    assert path == "guest_template"
    assert message in found


def test_all_mistakes_are_said_at_once() -> None:
    found = problems(profile="builds", external_id="x", role_session_name="?", timeout="0s", attempts=6)
    assert found == [
        ("profile", "profile and access_key name two sets of credentials"),
        ("external_id", "external_id is for role_arn, which is missing"),
        ("role_session_name", "expected 2 to 64 letters, digits and characters of +=,.@_-"),
        ("timeout", "expected a duration above zero"),
        ("attempts", "expected a number from 1 to 5, found 6"),
    ]
    assert [path for path, _ in problems(role_arn="builds")] == ["role_arn"]


def test_a_key_in_the_settings_is_refused_and_not_repeated() -> None:
    found = problems(access_key={"id": {"env": "X"}, "secret": BUILDS[1]})
    assert [path for path, _ in found] == ["access_key.secret"]
    assert BUILDS[1] not in str(found)


def test_the_settings_are_shown_without_the_key() -> None:
    block = {"certificate_authority_arn": MISSING, "access_key": KEYS}
    settings = validate(CASettings, Document({"ca": {"provider": "aws-pca", "aws-pca": block}}), at="ca")
    assert redacted(settings)["aws-pca"]["access_key"]["secret"] == {"env": "PCA_SECRET"}
