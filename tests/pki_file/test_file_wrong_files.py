"""Files that are not what they should be: each mistake with the path, what is there, and a remedy."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from firebuild_pki import CAError
from firebuild_pki.pem_files import Source, read
from pki_file.operator_files import CA, Shop, opened
from pki_file.refusing import refusal
from support import unprivileged

pytestmark = pytest.mark.needs("openssl")


ACCEPTED: dict[str, Callable[[bytes], bytes]] = {
    "Windows line ends": lambda data: data.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "text around": lambda data: b"Bag Attributes\n  friendlyName: ca\n" + data + b"\nthe end\n",
    "no newline at the end": lambda data: data.rstrip(),
    "blank lines": lambda data: b"\n\n" + data + b"\n\n",
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_harmless_differences_are_accepted(form: str, usual: Shop, shop: Shop) -> None:
    change = ACCEPTED[form]
    cert = shop.write("ca.pem", change(usual.read("builds.pem")), change(usual.read("policy.pem")))
    key = shop.write("ca.key", change(usual.read("builds.key")))
    with opened(ca_cert=cert, ca_key=key, anchors=[usual.path("root.pem")]) as authority:
        assert authority.issue_server()


# what is in the file -> words for it, and the command (or the beginning of the advice)
FOREIGN = {
    "DER certificate": ("found a DER certificate", "convert it: openssl x509 -inform DER -in {file}"),
    "DER key": ("found a DER private key", "convert it: openssl pkey -inform DER -in {file}"),
    "encrypted DER key": ("found a DER private key", "convert it: openssl pkey -inform DER -in {file}"),
    "PKCS#12": ("found a PKCS#12 file", "take it apart: openssl pkcs12 -in {file} -nokeys"),
    "PKCS#7": ("found a PKCS#7 bundle", "convert it: openssl pkcs7 -in {file} -print_certs"),
    "PKCS#7 in DER": (
        "found a PKCS#7 bundle in DER",
        "convert it: openssl pkcs7 -inform DER -in {file} -print_certs",
    ),
    "CSR": ("found a certificate signing request (CSR)", "name the certificate that the CA made"),
    "CSR in DER": ("found a certificate signing request (CSR)", "name the certificate that the CA made"),
    "public key": ("found a public key", None),
    "OpenSSL's form": ("found a certificate in OpenSSL's own TRUSTED form", "convert it: openssl x509"),
    "curve parameters": ("found the parameters of an elliptic curve, and no key", None),
    "UTF-16": ("found UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {file}"),
    "base64 of PEM": (
        "found a PEM file in base64, as in a Kubernetes secret",
        "decode it: base64 -d {file}",
    ),
    "base64 of DER": ("found base64 without BEGIN and END lines", "decode it to DER first: base64 -d {file}"),
    "escaped ends of lines": (
        'found a PEM block whose ends of lines are written as "\\n", as in JSON',
        'write them as such: printf %b "$(cat {file})"',
    ),
    "cut off": ("found a PEM block without its END line", "the file was cut off"),
    "one of two cut off": ("found a PEM block without its END line", "the file was cut off"),
    "cut off again and again": ("found a PEM block without its END line", "the file was cut off"),
    "text": ("found text without any BEGIN line", None),
    "binary": ("found binary data", None),
    "DER of nothing": ("found binary data", None),
    "Java keystore": ("found a Java keystore", "convert it: keytool -importkeystore"),
    "another block": ('found a PEM block called "MESSAGE"', None),
    "OpenSSH": ("found a key in OpenSSH's own form", "convert a copy: ssh-keygen -p -m PKCS8 -f {file}"),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, usual: Shop) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("foreign"))
    run, root, key = shop.openssl, str(usual.path("root.pem")), str(usual.path("root.key"))
    request = usual.request("builds")
    pem = usual.read("root.pem")
    der = run("x509", "-in", root, "-outform", "DER")
    shop.write("der", der)
    contents = {
        "DER certificate": der,
        "DER key": run("pkey", "-in", key, "-outform", "DER"),
        "encrypted DER key": run("pkcs8", "-topk8", "-in", key, "-outform", "DER", "-passout", "pass:x"),
        "PKCS#12": run("pkcs12", "-export", "-inkey", key, "-in", root, "-passout", "pass:x"),
        "PKCS#7": run("crl2pkcs7", "-nocrl", "-certfile", root),
        "PKCS#7 in DER": run("crl2pkcs7", "-nocrl", "-certfile", root, "-outform", "DER"),
        "CSR": request.read_bytes(),
        "CSR in DER": run("req", "-in", str(request), "-outform", "DER"),
        "public key": run("pkey", "-in", key, "-pubout"),
        "OpenSSL's form": run("x509", "-in", root, "-trustout"),
        "curve parameters": run("ecparam", "-name", "prime256v1"),
        "UTF-16": pem.decode().encode("utf-16"),
        "base64 of PEM": run("base64", "-A", "-in", root),
        "base64 of DER": run("base64", "-in", str(shop.path("der"))),
        "escaped ends of lines": pem.replace(b"\n", b"\\n"),
        "cut off": pem[: len(pem) // 2],
        "one of two cut off": pem[: len(pem) // 2] + b"\n" + pem,
        "cut off again and again": b"-----BEGIN CERTIFICATE-----\n" * 35_000,
        "text": b"ca_cert: see the wiki\n",
        "binary": b"\x89PNG\0\0",
        "DER of nothing": b"\x30\x03\x02\x01\x01",
        "Java keystore": b"\xfe\xed\xfe\xed\0\0\0\2",
        "another block": b"-----BEGIN MESSAGE-----\naGk=\n-----END MESSAGE-----\n",
        "OpenSSH": b"-----BEGIN OPENSSH PRIVATE KEY-----\naGk=\n-----END OPENSSH PRIVATE KEY-----\n",
    }
    assert contents.keys() == FOREIGN.keys()
    for name, content in contents.items():
        shop.write(name, content)
    return shop


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("setting", ["ca_cert", "ca_key", "chain", "anchors"])
def test_what_is_no_pem_of_the_kind_is_named(what: str, setting: str, usual: Shop, foreign: Shop) -> None:
    found, advice = FOREIGN[what]
    path = foreign.path(what)
    error = refusal(usual, **{setting: [path] if setting == "anchors" else path})
    wanted = "a private key" if setting == "ca_key" else "a certificate"
    assert error.message == f"{setting} {path}: expected {wanted} in PEM, {found}"
    assert (error.hint or "").startswith((advice or "").replace("{file}", shlex.quote(str(path))))
    assert bool(error.hint) == bool(advice)


CONVERSIONS = [
    "DER certificate",
    "PKCS#7",
    "PKCS#7 in DER",
    "OpenSSL's form",
    "UTF-16",
    "base64 of PEM",
    "escaped ends of lines",
]


@pytest.mark.parametrize("what", CONVERSIONS)
def test_the_command_in_the_hint_makes_the_file_work(
    what: str, usual: Shop, foreign: Shop, shop: Shop
) -> None:
    error = refusal(usual, ca_cert=foreign.path(what))
    _, _, command = str(error.hint).partition(": ")
    subprocess.run(command, shell=True, cwd=shop.place, check=True)
    (made,) = shop.place.iterdir()
    opened(ca_cert=made, ca_key=usual.path("root.key")).close()


def test_certificate_and_key_swapped_are_noticed(usual: Shop) -> None:
    error = refusal(usual, ca_cert=usual.path("root.key"), ca_key=usual.path("root.pem"))
    assert error.message.endswith("expected a certificate in PEM, found a private key")
    assert error.hint == "has this file been swapped with that of the certificate?"
    error = refusal(usual, ca_key=usual.path("root.pem"))
    assert error.message.endswith("expected a private key in PEM, found a certificate")
    assert error.hint == "has this file been swapped with that of the key?"


def test_a_damaged_certificate_is_counted(usual: Shop, shop: Shop) -> None:
    good = usual.read("root.pem")
    lines = good.splitlines(keepends=True)
    bad = shop.write("ca.pem", good, lines[0], *lines[2:])
    assert f"ca_cert {bad}: certificate 2 in it cannot be read: " in refusal(usual, ca_cert=bad).message


def test_a_certificate_without_words_for_its_flaw_is_still_named(shop: Shop, usual: Shop) -> None:
    der = shop.openssl("x509", "-in", str(usual.path("root.pem")), "-outform", "DER")
    assert b"\x0c\x08Operator" in der
    shop.write("bad.der", der.replace(b"\x0c\x08Operator", b"\x0c\x08\xff\xff\xff\xfferat"))
    pem = b"-----BEGIN CERTIFICATE-----\n%s-----END CERTIFICATE-----\n"
    bad = shop.write("ca.pem", pem % shop.openssl("base64", "-in", "bad.der"))
    assert "certificate 1 in it cannot be read: " in refusal(usual, ca_cert=bad).message


def test_a_certificate_that_is_whole_but_not_understood_is_not_to_be_copied_again(shop: Shop) -> None:
    shop.root("root")
    shop.issue("odd", "root", f"{CA}\nnameConstraints=critical,permitted;IP:10.1.2.3/255.0.0.0")
    error = refusal(shop, ca_cert=shop.path("odd.pem"), ca_key=shop.path("odd.key"))
    assert error.message == (
        f"ca_cert {shop.path('odd.pem')}: certificate 1 in it cannot be read: "
        "its extensions: 10.1.2.3/8 has host bits set"
    )
    assert "have it reissued; openssl x509 -in " in str(error.hint)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("setting", ["ca_cert", "ca_key", "chain"])
def test_an_empty_file_is_called_empty(content: bytes, setting: str, usual: Shop, shop: Shop) -> None:
    path = shop.write("empty", content)
    assert refusal(usual, **{setting: path}).message == f"{setting} {path}: the file is empty"


def test_a_file_that_is_longer_than_it_says_is_not_read_to_its_end(usual: Shop) -> None:
    path = Path("/proc/kallsyms")  # proc(5): its size is 0, and it has millions of bytes
    assert refusal(usual, ca_cert=path).message == (
        f"ca_cert {path}: expected certificates or a key, found more than 1048576 bytes; "
        "no such file is larger than 1048576"
    )


def test_a_missing_file_is_called_missing(usual: Shop, shop: Shop) -> None:
    path = shop.path("none.pem")
    error = refusal(usual, ca_cert=path)
    assert (error.message, error.hint) == (f"ca_cert {path}: there is no such file", None)


def test_a_relative_path_is_relative_to_the_current_directory(
    usual: Shop, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(usual.place)
    opened(ca_cert="root.pem", ca_key="./root.key").close()
    monkeypatch.chdir(shop.place)
    error = refusal(usual, ca_cert="root.pem")
    assert error.message == "ca_cert root.pem: there is no such file"
    assert error.hint == f"relative paths start at {shop.place}"


def test_a_tilde_is_the_home_directory(usual: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(usual.place))
    opened(ca_cert="~/root.pem", ca_key="~/root.key").close()
    assert f"ca_cert {usual.path('none.pem')}: " in refusal(usual, ca_cert="~/none.pem").message


def test_a_link_into_nothing_is_named(usual: Shop, shop: Shop) -> None:
    shop.path("ca.pem").symlink_to("gone.pem")
    error = refusal(usual, ca_cert=shop.path("ca.pem"))
    assert error.message.endswith(f"the link leads to {shop.path('gone.pem')}, which does not exist")


def test_a_directory_is_no_file(usual: Shop, shop: Shop) -> None:
    error = refusal(usual, ca_key=shop.place)
    assert error.message == f"ca_key {shop.place}: expected a file, found a directory"


def test_a_pipe_is_no_file_and_blocks_nobody(usual: Shop, shop: Shop) -> None:
    os.mkfifo(shop.path("pipe"), 0o600)
    error = refusal(usual, ca_key=shop.path("pipe"))
    assert "expected a regular file, found a pipe, a device or a socket" in error.message


@pytest.mark.parametrize("size", [1 << 40, (1 << 20) + 1])
def test_a_huge_file_is_not_read(usual: Shop, shop: Shop, size: int) -> None:
    with shop.path("disk.img").open("wb") as file:
        file.truncate(size)
    error = refusal(usual, chain=shop.path("disk.img"))
    assert f"expected certificates or a key, found {size} bytes" in error.message


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{root}/below", "cannot be read: Not a directory"),
        ("/" + "x" * 300, "cannot be read: File name too long"),
        ("nul\0", "the path cannot be that of a file"),
    ],
)
def test_impossible_paths_are_named(path: str, reason: str, usual: Shop) -> None:
    error = refusal(usual, ca_cert=path.replace("{root}", str(usual.path("root.pem"))))
    assert error.message.endswith(reason)


@contextmanager
def nobody(path: Path) -> Iterator[None]:
    """Make a file unreadable for the user that runs the block, also if that is root."""
    path.chmod(0)
    with unprivileged():
        yield


def test_a_file_that_may_not_be_read_is_named(shop: Shop) -> None:
    path = shop.write("ca.key", "secret")
    with nobody(path), pytest.raises(CAError) as caught:
        read(Source("ca_key", str(path)))
    assert "may not read it" in caught.value.message
    assert caught.value.hint == "let this user read the file and enter the directories above it"
