from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.names import Reference, at_home, default_home
from firebuild_bootstrap.image.remotecache import parse_cache
from support import said_without_home

SHA256 = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "familiar", "tag"),
    [
        ("debian", "debian", "latest"),
        ("hello:1.0", "hello", "1.0"),
        ("acme/web-app:1.0_RC", "acme/web-app", "1.0_RC"),
        ("acme/team/web/api:1", "acme/team/web/api", "1"),
        ("a__b/c--d.e_f", "a__b/c--d.e_f", "latest"),
        ("localhost:5000", "localhost", "5000"),
        ("localhost:5000/a/b:1", "localhost:5000/a/b", "1"),
        ("localhost/web", "localhost/web", "latest"),
        ("Registry.Example:443/team/web", "Registry.Example:443/team/web", "latest"),
        ("ACME/web:1", "ACME/web", "1"),
        ("192.168.0.1:5000/web", "192.168.0.1:5000/web", "latest"),
        ("[2001:db8::1]:5000/web:x", "[2001:db8::1]:5000/web", "x"),
        ("[::1]/web", "[::1]/web", "latest"),
        ("x:" + "T" * 128, "x", "T" * 128),
        ("x" * 255, "x" * 255, "latest"),
        ("a.b/" + "x" * 251 + ":_", "a.b/" + "x" * 251, "_"),
    ],
)
def test_a_reference_is_what_the_grammar_of_references_allows(text: str, familiar: str, tag: str) -> None:
    reference = Reference.parse(text)
    assert (reference.familiar, reference.tag, reference.digest) == (familiar, tag, "")
    assert str(reference) == (text if text.endswith(f":{tag}") and text != tag else f"{text}:latest")


@pytest.mark.parametrize(
    "digest",
    [
        SHA256,
        "sha512:" + "a" * 128,
        "sha384:" + "1" * 96,
        "md5:" + "A" * 32,
        "multihash+base58.x_y-z:" + "f" * 32,
    ],
)
def test_a_digest_of_any_algorithm_may_follow(digest: str) -> None:
    assert Reference.parse(f"debian@{digest}") == Reference("debian", "latest", digest)
    assert str(Reference.parse(f"debian:12@{digest}")) == f"debian:12@{digest}"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "for example"),
        (":1", "for example"),
        ("/web", "for example"),
        ("a//b", "for example"),
        ("../x", "for example"),
        ("acme/..:1", "for example"),
        ("x:..", "for example"),
        ("acme/-web:1", "for example"),
        ("acme/web-:1", "for example"),
        ("a___b", "for example"),
        ("acme/web:1\n", "for example"),
        (" acme/web:1", "for example"),
        ("acme/web:1/../../x", "for example"),
        ("a+b", "for example"),
        ("debian:", "for example"),
        ("wéb", "for example"),
        ("web:\u0661", "for example"),
        ("-a.io/web", "for example"),
        ("a_b.io:5/web:1:2", "for example"),
        ("[::1/web", "for example"),
        ("x" * 2000, "for example"),
        ("Debian", "has to be lower case"),
        ("localhost:5000/Web", "has to be lower case"),
        ("a/b:" + "1" * 129, "its tag has 129 characters, and 128 are allowed"),
        ("x" * 256, "its name has 256 characters, and 255 are allowed"),
        ("a.b/" + "x" * 252, "its name has 256 characters, and 255 are allowed"),
        ("0" * 64, "64 hexadecimal digits are an id"),
        ("debian@sha256:12", "for example"),
        ("debian@sha256:" + "0" * 63, "a sha256 digest has 64 lower-case hexadecimal digits"),
        ("debian@sha256:" + "A" * 64, "a sha256 digest has 64 lower-case hexadecimal digits"),
        ("debian@1x:" + "0" * 64, "for example"),
    ],
)
def test_anything_else_is_no_reference(text: str, hint: str) -> None:
    with pytest.raises(InputError, match="expected a reference, found") as caught:
        Reference.parse(text)
    assert hint in (caught.value.hint or "")
    assert len(caught.value.message) < 350


def test_the_name_of_an_image_in_the_store_has_no_digest() -> None:
    with pytest.raises(InputError, match="expected a name with an optional tag") as caught:
        Reference.parse_tag(f"debian@{SHA256}")
    assert caught.value.hint == "leave the digest out"
    assert str(Reference.parse_tag("hello")) == "hello:latest"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian", "docker.io/debian"),
        ("library/debian:12", "index.docker.io/debian:12"),
        ("acme/web:1", "docker.io/acme/web:1"),
        ("library/a/b", "docker.io/library/a/b"),
        ("docker.io/localhost/web", "index.docker.io/localhost/web"),
    ],
)
def test_spellings_that_docker_takes_for_one_image_are_one(one: str, other: str) -> None:
    first, second = Reference.parse(one), Reference.parse(other)
    assert first == second
    assert hash(first) == hash(second)
    for spelling in first.spellings:
        assert Reference.parse(f"{spelling}:{first.tag}") == first
    assert first.name in first.spellings
    assert second.name in first.spellings


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("debian:a", "debian:A"),
        ("localhost/web", "docker.io/localhost/web"),
        ("library/a/b", "a/b"),
        ("REG.example/web", "reg.example/web"),
        ("reg.example/library/web", "reg.example/web"),
        ("debian", f"debian@{SHA256}"),
    ],
)
def test_others_are_two(one: str, other: str) -> None:
    assert Reference.parse(one) != Reference.parse(other)


def test_the_name_stays_as_it_was_spelled() -> None:
    assert str(Reference.parse("docker.io/library/debian:12")) == "docker.io/library/debian:12"
    assert str(Reference("debian", "12")) == "debian:12"


def test_the_home_is_the_variable_or_the_users_data_directory() -> None:
    assert default_home({"FIREBUILD_HOME": "/x/y"}) == Path("/x/y")
    assert default_home({}).name == "firebuild"


@pytest.mark.needs("root")
def test_a_user_without_a_home_is_told_how_to_give_the_store_a_place() -> None:
    said = said_without_home("from firebuild_bootstrap.image.names import default_home", "default_home({})")
    assert "InputError: there is no directory for the store: this user has no home directory" in said
    assert "hint: set FIREBUILD_HOME to a directory for the store, or HOME" in said


def test_nothing_is_made_in_a_directory_called_after_a_user() -> None:
    assert at_home("~root/x", "store.path") == Path("/root/x")
    with pytest.raises(InputError, match=r"store\.path: no home directory is known for ~nobody-here"):
        at_home("~nobody-here/x", "store.path")
    with pytest.raises(InputError, match="dest of a cache: no home directory is known for ~nobody-here"):
        parse_cache("type=local,dest=~nobody-here/x", export=True)
