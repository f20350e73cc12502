from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.names import ImageTag, Reference, default_home


def test_a_tag_has_an_organisation_a_name_and_a_version() -> None:
    tag = ImageTag.parse("acme/web-app:1.0_RC")
    assert (tag.org, tag.name, tag.version) == ("acme", "web-app", "1.0_RC")
    assert str(tag) == "acme/web-app:1.0_RC"


@pytest.mark.parametrize(
    "text",
    [
        "", "web", "acme/web", "web:1", "acme/web:", "/web:1", "Acme/web:1", "acme/web:1\n", " acme/web:1",
        "../web:1", "acme/..:1", "acme/web:..", "acme/web/x:1", "acme/-web:1", "a/b:" + "1" * 129,
        "acme/web:1 ", "acme/web:1/../../x", "a/" + "b" * 250 + ":1",
    ],
)  # fmt: skip
def test_anything_else_is_no_tag(text: str) -> None:
    with pytest.raises(InputError, match="org/name:version"):
        ImageTag.parse(text)


def test_a_reference_without_a_tag_means_latest() -> None:
    assert str(Reference.parse("debian")) == "debian:latest"
    assert str(Reference.parse("library/debian:12")) == "library/debian:12"
    digest = "sha256:" + "0" * 64
    assert Reference.parse(f"debian@{digest}") == Reference("debian", "latest", digest)
    assert str(Reference.parse(f"debian:12@{digest}")) == f"debian:12@{digest}"


@pytest.mark.parametrize("text", ["", "Debian", "debian:", "a//b", "../x", "x:..", "debian@sha256:12", "a+b"])
def test_anything_else_is_no_reference(text: str) -> None:
    with pytest.raises(InputError, match="expected a base such as"):
        Reference.parse(text)


def test_the_home_is_the_variable_or_the_users_data_directory() -> None:
    assert default_home({"FIREBUILD_HOME": "/x/y"}) == Path("/x/y")
    assert default_home({}).name == "firebuild"
