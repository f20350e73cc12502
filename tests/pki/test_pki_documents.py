"""YAML documents: positions, strictness, and the layers on top of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_pki import Document, SettingsError, load_document, parse_document
from firebuild_pki.positions import Position


def refusal(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_document(text, source="fb.yaml")
    return str(caught.value)


def test_a_file_knows_the_place_of_every_key_and_value(tmp_path: Path) -> None:
    path = tmp_path / "fb.yaml"
    path.write_text("a: 1\nb:\n  - x\n  - c: [y,  z]\n")
    document = load_document(path)
    assert document.data == {"a": 1, "b": ["x", {"c": ["y", "z"]}]}
    assert document.source == str(path)
    assert document.key_position(("b",)) == Position(str(path), 2, 1)
    assert document.value_position(("b", 1, "c", 1)) == Position(str(path), 4, 13)
    assert document.key_position(("b", 1, "c", 1)) == Position(str(path), 4, 5)
    assert document.value_position(("b", 9, "d")) == Position(str(path), 2, 1)
    assert document.value_position(("nowhere",)) == Position(str(path))


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_is_an_empty_document(text: str) -> None:
    assert parse_document(text).data == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("12", 12),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1.5", 1.5),
        ("2e3", 2000.0),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2030-05-17", "2030-05-17"),
        ("90s", "90s"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("127.0.0.1", "127.0.0.1"),
        (".", "."),
        ("=", "="),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    found = parse_document(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_anchors_may_be_used_again() -> None:
    document = parse_document("a: &x {b: 1}\nc: *x\n")
    assert document.data == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "3:1: a: the key is here twice, first at line 1 (hint: keep one of the two)"),
        (
            "x:\n  a: 1\n  a: 3\n",
            "3:3: x.a: the key is here twice, first at line 2 (hint: keep one of the two)",
        ),
        ("- a\n- b\n", "1:1: expected a mapping at the top, found a list"),
        ("just text", "1:1: expected a mapping at the top, found a string"),
        ("a:\n  1: x\n", "2:3: a: expected a string as key (hint: quote it)"),
        ("[a]: x\n", "1:1: expected a string as key (hint: quote it)"),
        (
            "a: !python/object:os.system x",
            "1:4: a: the tag !python/object:os.system has no meaning here (hint: remove the tag)",
        ),
        ("a: !!int x", "1:4: a: expected a value that fits the tag tag:yaml.org,2002:int"),
        ("a: &x [*x]", "1:4: a[0]: an alias refers to the value that it is part of"),
        (
            "a: [1",
            "2:1: not valid YAML: while parsing a flow sequence; expected ',' or ']', but got '<stream end>'",
        ),
        ('a: "/x\\0y"', "1:4: a: a setting cannot hold the character U+0000 (hint: remove it)"),
        ('a: "\\ud800"', "1:4: a: a setting cannot hold the character U+D800 (hint: remove it)"),
        ('"a\\0": x', "1:1: a setting cannot hold the character U+0000 (hint: remove it)"),
        ("a: b: c", "1:5: not valid YAML: mapping values are not allowed here"),
        ("a: *missing", "1:4: not valid YAML: found undefined alias 'missing'"),
        (
            "a: 1\n---\nb: 2\n",
            "2:1: not valid YAML: expected a single document in the stream; but found another document",
        ),
    ],
)
def test_what_is_not_a_plain_mapping_is_refused(text: str, problem: str) -> None:
    assert refusal(text + ("\n" if text == "a: [1" else "")) == f"fb.yaml:{problem}"


def test_all_double_keys_are_reported_at_once() -> None:
    assert len(refusal("a: 1\na: 2\nb: 1\nb: 2\n").splitlines()) == 2


def test_unprintable_characters_are_not_yaml() -> None:
    assert refusal("a: \x00") == "fb.yaml: not valid YAML: special characters are not allowed"


def test_aliases_of_aliases_cannot_blow_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "more than 10000 values in one document" in refusal("\n".join(lines))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(SettingsError) as caught:
        load_document(path)
    assert str(caught.value) == f"{path}: cannot read the file: No such file or directory"


def test_a_file_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(SettingsError) as caught:
        load_document("/dev/zero")
    assert str(caught.value) == "/dev/zero: expected settings, found more than 4 MiB"


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: \xe4\n")
    with pytest.raises(SettingsError) as caught:
        load_document(path)
    assert str(caught.value) == f"{path}: expected UTF-8 text, byte 3 is not"


def test_environment_variables_go_down_by_two_underscores() -> None:
    document = parse_document("ca: {provider: file, my-ca: {url: x}}\n").merged(
        {
            "FIREBUILD_CA__PROVIDER": "vault",
            "firebuild_ca__provider": "lower-case prefixes do not count",
            "FIREBUILD_CA__MY_CA__URL": "https://ca",
            "FIREBUILD_BOOTSTRAP__Max_Guests": "12",
            "FIREBUILD_BOOTSTRAP__TAGS": "[a, 'b']",
            "FIREBUILD_BOOTSTRAP__NOTE": "",
            "FIREBUILD_CONFIG": "/etc/fb.yaml",
            "PATH": "/bin",
        },
        reserved=["FIREBUILD_CONFIG"],
    )
    assert document.data == {
        "ca": {"provider": "vault", "my-ca": {"url": "https://ca"}},
        "bootstrap": {"max_guests": 12, "tags": ["a", "b"], "note": None},
    }
    origin = document.value_position(("ca", "provider"))
    assert origin == Position("environment variable FIREBUILD_CA__PROVIDER")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("/keys/a #1.pem", "/keys/a #1.pem"),
        ("#1", "#1"),
        ("*star", "*star"),
        ("!bang", "!bang"),
        ("&and", "&and"),
        ("%percent", "%percent"),
        ("@at", "@at"),
        ("`tick", "`tick"),
        ("| pipe", "| pipe"),
        ("unix: /run/x", "unix: /run/x"),
        ("- a", "- a"),
        ("a\n\nb", "a\n\nb"),
        ("---", "---"),
        (" spaces ", "spaces"),
        ('" spaces "', " spaces "),
        ("'true'", "true"),
        ("true", True),
        ("True story", "True story"),
        ("~", None),
        ("~/ca.pem", "~/ca.pem"),
        ("0x10", 16),
        ("-1.5", -1.5),
        ("1.2.3", "1.2.3"),
        ("{a: [1, x]}", {"a": [1, "x"]}),
    ],
)
def test_a_variable_is_text_as_it_stands_where_it_is_nothing_else(written: str, value: object) -> None:
    assert Document({}).merged({"FIREBUILD_X": written}).data == {"x": value}


def test_the_file_keeps_its_positions_below_the_environment() -> None:
    document = parse_document("ca:\n  a: 1\n  b: {c: 2}\n", source="f").merged({"FIREBUILD_CA__B": "3"})
    assert document.data == {"ca": {"a": 1, "b": 3}}
    assert document.value_position(("ca", "a")) == Position("f", 2, 6)
    assert document.key_position(("ca",)) == Position("f", 1, 1)
    assert document.value_position(("ca", "b")).source == "environment variable FIREBUILD_CA__B"
    assert ("ca", "b", "c") not in document.values


def test_layers_leave_the_document_below_untouched() -> None:
    below = parse_document("ca: {provider: file}")
    below.merged({"FIREBUILD_CA__PROVIDER": "x"})
    below.overridden({"ca.provider": "y"})
    assert below.data == {"ca": {"provider": "file"}}


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("FIREBUILD_CA__A__B", "1", "ca.a: cannot set a value inside a string"),
        ("FIREBUILD_CA____B", "1", "ca.: expected a setting's name"),
        ("FIREBUILD_", "1", "expected a setting's name"),
        ("FIREBUILD_X", "[1", "not valid YAML: while parsing a flow sequence; expected"),
        ("FIREBUILD_X", "[!!int s]", "[0]: expected a value that fits the tag tag:yaml.org,2002:int"),
    ],
)
def test_a_variable_that_does_not_fit_is_named(variable: str, value: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_document("ca: {a: text}").merged({variable: value, "FIREBUILD_Y": "[["})
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"environment variable {variable}: {problem}")
    assert second.startswith("environment variable FIREBUILD_Y: not valid YAML")


def test_explicit_values_lie_on_top_and_are_used_as_they_are() -> None:
    document = Document({"ca": {"provider": "file"}, "machine": None}).overridden(
        {"ca.provider": "vault", "machine.driver": "local", "n.m": "5"}, origin="option --set"
    )
    assert document.data == {
        "ca": {"provider": "vault"},
        "machine": {"driver": "local"},
        "n": {"m": "5"},
    }
    assert document.value_position(("n", "m")) == Position("option --set")
    with pytest.raises(SettingsError, match="option: n: cannot set a value inside a string"):
        Document({"n": "text"}).overridden({"n.m": 1}, origin="option")
