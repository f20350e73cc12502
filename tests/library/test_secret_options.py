"""`--secret`: where a secret comes from, and that no mistake shows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.request import Secret, SecretResource, missing_secret, read_secrets


def test_a_secret_comes_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").write_bytes(b"\0\xff\n")
    (tmp_path / "both").write_bytes(b"file")
    (tmp_path / "alone").write_bytes(b"alone")
    environment = {"TOKEN": "t", "both": "variable", "RAW": "\udcff"}
    options = [
        f'id=file,"src={tmp_path}/a,b"',
        "ID=source,Source=both,type=file",
        "type=env,id=env,env=TOKEN",
        "id=as-docker-has-it,type=env,src=TOKEN",
        "id=both",
        "id=alone",
        "id=raw,env=RAW",
        "id=twice,env=TOKEN",
        "id=twice,src=alone",
    ]
    assert {name: found.value for name, found in read_secrets(options, environment).items()} == {
        "file": b"\0\xff\n",
        "source": b"file",
        "env": b"t",
        "as-docker-has-it": b"t",
        "both": b"variable",
        "alone": b"alone",
        "raw": b"\xff",
        "twice": b"alone",
    }


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("", "it has no id"),
        ("src=hunter2", "it has no id"),
        ("id=a=hunter2", "with an equals sign"),
        ("id=a,src=hunter2,env=hunter2", "it has both src and env"),
        ("id=a,value=hunter2", "it has an unknown key, or a key without a value"),
        ("id=a,hunter2", "it has an unknown key, or a key without a value"),
        ("id=a,type=hunter2", "its type is neither file nor env"),
        ('id=a,"src=hunter2', "the double quote that is character 6 has no end"),
        ('id=a,src=hun"ter2', "the double quote that is character 13 is within a member"),
        ('id=a,"src="hunter2', "expected a comma after the double quote that is character 11"),
    ],
)
def test_what_is_not_understood_is_not_shown(option: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_secrets(["id=fine,env=HOME", option], {"HOME": "/"})
    assert f"option --secret number 2: {words}" in str(caught.value) or words in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("id=a,src={}/none", "--secret a: {}/none: No such file or directory"),
        ("id=a,src={}", "--secret a: {}: Is a directory"),
        ("id=a,src=\0", "null byte"),
        ("id=a,env=NONE", "--secret a: the variable NONE is not set\n  hint: export it, or name a file: "),
        ("id=none", "--secret none: none: No such file or directory"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, option: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        read_secrets([option.format(tmp_path)], {})
    assert words.format(tmp_path) in str(caught.value)


def test_a_secret_has_its_limit_and_an_endless_file_is_not_read_to_its_end() -> None:
    Secret(bytes(wire.MAX_SECRET_BYTES))
    with pytest.raises(InputError, match="more than 512000 bytes"):
        read_secrets(["id=a,src=/dev/zero"], {})


def test_a_secret_shows_in_no_repr_and_goes_to_the_guest_as_one_file() -> None:
    hidden = SecretResource("a\x1b", Secret(b"hunter2"))
    (entry,) = hidden.entries()
    assert entry.open is not None
    assert (entry.open().read(), entry.size, entry.mode) == (b"hunter2", 7, 0o400)
    assert "hunter2" not in repr([hidden, entry, dataclasses.asdict(entry) | {"open": entry.open}])
    assert "\x1b" not in entry.source


def test_a_missing_secret_is_told_with_what_to_do() -> None:
    error = missing_secret("token")
    assert "the secret token is required" in str(error)
    assert "--secret id=token,src=FILE" in str(error)
