"""The URIs of RFC 7512."""

from __future__ import annotations

import pytest
from firebuild_pki import CAError

from firebuild_pki_pkcs11.uri import parse


def test_all_attributes_are_decoded() -> None:
    found = parse(
        "pkcs11:token=The%20CA;serial=0a;id=%01%ff;object=is%3Bsuer;type=private;x-vendor=1?module-path=/m%20.so&x-y=2"
    )
    assert found.path["token"] == b"The CA"
    assert found.path["id"] == b"\x01\xff"
    assert found.path["object"] == b"is;suer"
    assert found.module_path == "/m .so"
    assert found.token_words == 'token "The CA", serial "0a"'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "pkcs11:tokn=ca",
            '"tokn" is not an attribute of PKCS#11 URIs (RFC 7512) (hint: did you mean "token"?)',
        ),
        ("pkcs11:token=ca;module-path=/m.so", '(hint: "module-path" stands after the question mark)'),
        ("pkcs11:?token=ca", '(hint: "token" stands before it)'),
        ("pkcs11:token", 'expected name=value between every ";", found "token"'),
        ("pkcs11:token=a;token=b", 'the attribute "token" is given twice'),
        ("pkcs11:token=a;type=cert", "expected type=private"),
        ("pkcs11:zzzzzz=1", "(hint: known are token, manufacturer"),
        ("pkcs11:token=a?pin-source=file:/pin", "ca_key_passphrase"),
        ("pkcs11:id=%zz?module-path=/%ff", "is not UTF-8"),
    ],
)
def test_what_is_wrong_is_told(text: str, words: str) -> None:
    with pytest.raises(CAError) as refused:
        parse(text)
    assert words in str(refused.value)


def test_the_pin_is_not_quoted() -> None:
    with pytest.raises(CAError) as refused:
        parse("pkcs11:token=a?pin-value=8391")
    assert "8391" not in str(refused.value)
