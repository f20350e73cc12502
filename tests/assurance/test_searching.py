"""The search for secrets finds each kind of them in each place where it looks."""

from __future__ import annotations

import base64
import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import zstandard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from assurance.searching import KEY, TOKEN, Allowed, Search, Watch
from support import eventually, family, highest_peak, peak

SECRET: Final = b"n0t-to-be-f0und-anywhere"
RAW: Final = bytes(range(200, 232))
SEARCH: Final = {"text": SECRET, "bytes": RAW}
_KEY: Final = ec.generate_private_key(ec.SECP256R1())
PEM: Final = serialization.Encoding.PEM
DER: Final = serialization.Encoding.DER


def key(encoding: serialization.Encoding, form: serialization.PrivateFormat) -> bytes:
    return _KEY.private_bytes(encoding, form, serialization.NoEncryption())


PKCS8, SEC1 = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
ENCRYPTED: Final = _KEY.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(SECRET))


def in_tar(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("blobs/sha256/1")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def in_squashfs(content: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        command = ["sqfstar", "-quiet", "-no-progress", "-no-duplicates", str(image)]
        subprocess.run(command, input=in_tar(content), check=True)
        return image.read_bytes()


def in_erofs(content: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        tree, image = Path(directory, "tree"), Path(directory, "image")
        tree.mkdir()
        (tree / "f").write_bytes(content)
        subprocess.run(["mkfs.erofs", str(image), str(tree)], capture_output=True, check=True)
        return image.read_bytes()


FORMS: Final[dict[str, tuple[str, bytes]]] = {
    "text": ("text", b"x" + SECRET + b"y"),
    "hexadecimal digits": ("text", SECRET.hex().encode()),
    "capital hexadecimal digits": ("bytes", RAW.hex().upper().encode()),
    "base64": ("text", base64.b64encode(SECRET)),
    "a login in base64": ("text", base64.b64encode(b"user:" + SECRET + b"\n")),
    "base64 for URLs": ("bytes", base64.urlsafe_b64encode(b"u" + RAW)),
    "a PEM file": (KEY, key(PEM, PKCS8)),
    "an old PEM file": (KEY, key(PEM, SEC1)),
    "an encrypted key": (KEY, ENCRYPTED),
    "a PEM file in base64": (KEY, base64.b64encode(key(PEM, PKCS8))),
    "PKCS#8": (KEY, key(DER, PKCS8)),
    "SEC1": (KEY, key(DER, SEC1)),
    "PKCS#8 in base64": (KEY, base64.b64encode(b"12" + key(DER, PKCS8))),
    "SEC1 in hexadecimal digits": (KEY, key(DER, SEC1).hex().encode()),
    "a token of OpenBao": (TOKEN, b'{"token": "s.Ab1cdefghijklmnopqrstuvw"}'),
    "a token of Vault": (TOKEN, b"hvs.CAESIJ1abcdefghijklmnopqrstuvwxyz0123456789"),
}
WRAPPED: Final[dict[str, Callable[[bytes], bytes]]] = {
    "a file": lambda data: data,
    "a file with a hole": lambda data: bytes(9 << 20) + data,
    "the border of what is read at once": lambda data: bytes((4 << 20) - 10) + data,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "squashfs": lambda data: in_squashfs(data + b"a" * 100_000),
    "EROFS": lambda data: in_erofs(data + b"a" * 100_000),
    "a compressed layer of an archive": lambda data: in_tar(gzip.compress(in_tar(data))),
}


@pytest.mark.needs("mkfs.erofs", "sqfstar")
@pytest.mark.parametrize(
    ("form", "place"),
    [*((form, "a file") for form in FORMS), *(("text", place) for place in WRAPPED)]
    + [(form, "a compressed layer of an archive") for form in ("PKCS#8", "a token of OpenBao")],
)
def test_a_secret_in_a_file_is_found(form: str, place: str, tmp_path: Path) -> None:
    what, data = FORMS[form]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(WRAPPED[place](data))
    search = Search(SEARCH)
    for _ in range(2):  # what is found is found again
        assert {found.what for found in search.tree(tmp_path)} == {what}


def test_names_links_and_attributes_are_looked_at(tmp_path: Path) -> None:
    text = SECRET.decode()
    (tmp_path / f"a-{text}").mkdir()
    (tmp_path / "l").symlink_to(f"/nowhere/{text}")
    (tmp_path / "f").touch()
    os.setxattr(tmp_path / "f", "user.x", SECRET)
    where = sorted(found.where.split(" /")[0] for found in Search(SEARCH).tree(tmp_path))
    assert where == ["the attribute user.x of", "the link", "the name"]


def test_what_is_no_secret_is_not_found(tmp_path: Path) -> None:
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "public.pem").write_bytes(_KEY.public_key().public_bytes(PEM, spki))
    (tmp_path / "public.der").write_bytes(_KEY.public_key().public_bytes(DER, spki))
    (tmp_path / "half").write_bytes(SECRET[: len(SECRET) // 2])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(os.urandom(9000))[:-2000])
    (tmp_path / "module.py").write_text("parameters.something_that_is_long = this.a1\n")
    assert Search(SEARCH).tree(tmp_path) == set()


def test_what_is_written_later_is_found(tmp_path: Path) -> None:
    search, file = Search(SEARCH), tmp_path / "f"
    file.write_bytes(bytes(len(SECRET)))
    os.utime(file, (0, 0))
    assert search.tree(tmp_path) == set()
    file.write_bytes(SECRET)
    os.utime(file, (0, 0))
    assert len(search.tree(tmp_path)) == 1


def test_a_secret_is_allowed_in_its_place_with_its_mode_only(tmp_path: Path) -> None:
    allowed = [Allowed(KEY, f"{tmp_path}/key\\.pem")]
    file, other = tmp_path / "key.pem", tmp_path / "other-key.pem"
    for path in (file, other):
        path.write_bytes(key(PEM, PKCS8))
        path.chmod(0o600)
    assert {found.where for found in Search(SEARCH).tree(tmp_path, allowed)} == {str(other)}
    other.unlink()
    file.chmod(0o640)
    assert {found.where for found in Search(SEARCH).tree(tmp_path, allowed)} == {str(file)}
    file.write_bytes(SECRET)
    file.chmod(0o600)
    assert {found.what for found in Search(SEARCH).tree(tmp_path, allowed)} == {"text"}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that knows the secret, does what it is told, waits, and ends with its input."""
    path = tmp_path / "program.py"
    (tmp_path / "secret").write_bytes(SECRET)
    lines = (
        "import os, subprocess, sys, tempfile",
        f"secret = open({str(tmp_path / 'secret')!r}).read()",
        "exec(sys.argv[1])",
        "sys.stdin.read()",
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("does", "where"),
    [
        ("f = tempfile.TemporaryFile(); f.write(secret.encode()); f.flush()", "the unnamed file "),
        ("subprocess.run(['sh', '-c', 'read -r x; true', secret])", "the arguments of sh"),
        ("subprocess.run(['sh', '-c', 'read -r x; true'], env={'A': secret})", "the environment of sh"),
    ],
)
def test_what_processes_show_is_looked_at(does: str, where: str, program: Path) -> None:
    with subprocess.Popen([sys.executable, program, does], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with Watch(Search(SEARCH), process.pid, frozenset(), frozenset()) as watch:
            assert eventually(lambda: watch.found)
            assert watch.living()
            process.stdin.close()
            assert eventually(lambda: not watch.living())
    assert [found.where for found in watch.found if not found.where.startswith(where)] == []


@pytest.mark.needs("userns")
def test_a_sandbox_may_not_have_what_the_user_gave(program: Path) -> None:
    words = [sys.executable, str(program), ""]
    sandbox = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    for command, found in ((words, set()), ([*sandbox, *words], {"text"})):
        environ = {**os.environ, "GIVEN": SECRET.decode(), "MOUNTED": RAW.hex()}
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environ) as process:
            assert process.stdin is not None
            known = frozenset({"text", "bytes"})
            with Watch(Search(SEARCH), process.pid, known, frozenset({"bytes"})) as watch:
                assert eventually(lambda: len(watch.seen) == (1 if command is words else 2))  # noqa: B023
                process.stdin.close()
                process.wait()
            assert {each.what for each in watch.found} == found


def test_the_peak_of_a_process_is_known_until_it_has_ended() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        assert process.pid in family({os.getpid()})
        assert highest_peak({process.pid}) > 0
        process.kill()
        assert eventually(lambda: peak(process.pid) is None)  # nobody has waited for it
        assert process.pid in family({os.getpid()})
    assert (peak(process.pid), highest_peak({process.pid})) == (None, 0)
    assert process.pid not in family({os.getpid()})
