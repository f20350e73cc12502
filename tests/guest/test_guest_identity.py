"""The files that say who a machine is: replaced as one, and left alone by what goes wrong."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from firebuild_bootstrap import wire
from firebuild_bootstrap.guest import csr
from firebuild_bootstrap.guest.errors import GuestError, Interrupted, ProtocolError
from firebuild_bootstrap.guest.identity import Channel, Files, Renewal, Said
from firebuild_bootstrap.guest.stop import Stop

Answers = list[tuple[int, bytes, str]]


class Scene:
    """A guest whose host is the test."""

    def __init__(self, directory: Path, *, csr: bool = False) -> None:
        self.directory = directory
        self.answers: Answers = []
        self.answered = threading.Semaphore(0)
        self.metadata: dict[str, Any] = {}
        self.stop = Stop()
        self.channel = Channel(self._answer)
        self.files = Files(str(directory), (os.geteuid(), os.getegid()), 0o440)
        wanted = wire.IdentityFiles(names=("web.example", "https://x.example/a,b"), csr=csr)
        self.renewal = Renewal(wanted, self.files, self.channel, self.stop, metadata=lambda: self.metadata)

    def _answer(self, number: int, *, csr: bytes = b"", error: str = "") -> None:
        self.answers.append((number, csr, error))
        self.answered.release()

    def say(self, *said: Any) -> tuple[int, bytes, str]:
        self.channel.put(Said(*said))
        assert self.answered.acquire(timeout=20)
        return self.answers[-1]

    def read(self) -> list[str]:
        return [(self.directory / name).read_text() for name in ("cert.pem", "key.pem", "ca.pem")]

    def close(self) -> None:
        self.files.close()
        self.stop.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


@pytest.fixture
def own_key(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path, csr=True)
    yield scene
    scene.close()


def block(number: int) -> Mapping[str, Any]:
    return {
        "Identity": wire.IdentityBlock(number=number, cert=f"c{number}", key=f"k{number}", ca="ca").as_json()
    }


def test_all_files_are_replaced_at_one_moment_and_those_before_can_still_be_read(
    scene: Scene, tmp_path: Path
) -> None:
    scene.renewal.begin(block(1))
    assert scene.read() == ["c1", "k1", "ca"]
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o440
    assert stat.S_IMODE((tmp_path / "cert.pem").stat().st_mode) == 0o444
    before = (tmp_path / "..data").resolve()
    with scene.renewal.following():
        scene.metadata = dict(block(2))
        assert scene.say(2) == (2, b"", "")
        assert scene.read() == ["c2", "k2", "ca"]
        assert (before / "key.pem").read_text() == "k1"
        scene.metadata = dict(block(3))
        assert scene.say(3) == (3, b"", "")
    assert not before.exists()
    assert sorted(os.listdir(tmp_path)) == ["..2", "..3", "..data", "ca.pem", "cert.pem", "key.pem"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "the Identity metadata lacks Number"),
        (block(3), "the metadata have certificate 3 instead of 2"),
        ({"Identity": {**block(2)["Identity"], "Key": 5}}, "the Identity metadata lacks Key"),
        ({"Identity": {**block(2)["Identity"], "Number": "two"}}, "Number of the Identity metadata is not"),
    ],
)
def test_metadata_that_are_wrong_leave_the_files_as_they_are(
    scene: Scene, metadata: dict[str, Any], message: str
) -> None:
    scene.renewal.begin(block(1))
    with scene.renewal.following():
        scene.metadata = metadata
        number, _, error = scene.say(2)
        assert number == 2
        assert error.startswith(message)
        assert "k2" not in error
    assert scene.read() == ["c1", "k1", "ca"]


def test_files_that_can_not_be_written_leave_those_that_are_there(scene: Scene, tmp_path: Path) -> None:
    scene.renewal.begin(block(1))
    (tmp_path / "..next").mkdir()  # where the new link would be made
    with scene.renewal.following():
        scene.metadata = dict(block(2))
        assert "File exists" in scene.say(2)[2]
    assert scene.read() == ["c1", "k1", "ca"]
    assert "..2" not in os.listdir(tmp_path)


def test_a_key_that_is_made_here_comes_with_a_request_for_exactly_the_names(own_key: Scene) -> None:
    own_key.channel.put(Said(1, "chain", "trust"))
    own_key.renewal.begin({})
    (_, request, _), last = own_key.answers
    assert last == (1, b"", "")
    found = x509.load_pem_x509_csr(request)
    assert found.is_signature_valid
    (extension,) = found.extensions
    names = extension.value
    assert isinstance(names, x509.SubjectAlternativeName)
    assert [name.value for name in names] == ["web.example", "https://x.example/a,b"]
    chain, key, trust = own_key.read()
    assert (chain, trust) == ("chain", "trust")
    assert load_pem_private_key(key.encode(), None).public_key() == found.public_key()
    for _ in range(2):  # the two of `begin`
        own_key.answered.acquire()
    with own_key.renewal.following():
        assert b"REQUEST" in own_key.say(2)[1]
        assert own_key.say(2, "next", "trust") == (2, b"", "")
        assert own_key.read()[0] == "next"
        assert "was not requested" in own_key.say(3, "another", "trust")[2]
    assert own_key.read()[0] == "next"


@pytest.mark.parametrize("csr", [False, True], ids=["host-key", "own-key"])
def test_of_certificates_that_were_not_taken_only_the_last_counts(tmp_path: Path, csr: bool) -> None:
    scene = Scene(tmp_path, csr=csr)
    if csr:
        scene.channel.put(Said(1, "c1", "ca"))
    scene.renewal.begin(block(1))
    scene.answers.clear()
    scene.answered = threading.Semaphore(0)
    for number in range(2, 31):
        scene.channel.put(Said(number))
    scene.metadata = dict(block(30))
    with scene.renewal.following():
        assert scene.answered.acquire(timeout=20)
        number, request, error = scene.answers[-1]
        assert (number, bool(request), error) == (30, csr, "")
        if csr:
            assert scene.say(30, "c30", "ca") == (30, b"", "")
    assert scene.read()[0] == "c30"
    assert len(scene.answers) == 1 + csr
    scene.close()


def test_a_host_that_does_not_answer_the_first_request_is_refused(own_key: Scene) -> None:
    own_key.channel.put(Said(1))
    with pytest.raises(ProtocolError, match="did not answer the request"):
        own_key.renewal.begin({})


def test_a_guest_that_is_asked_to_end_waits_for_no_certificate(own_key: Scene) -> None:
    own_key.stop.set(Interrupted(15, "SIGTERM"))
    with pytest.raises(Interrupted):
        own_key.renewal.begin({})


def test_a_session_that_is_lost_while_it_is_answered_ends_the_guest(scene: Scene) -> None:
    def lost(number: int, *, csr: bytes = b"", error: str = "") -> None:
        assert (number, csr) == (2, b"")
        raise GuestError(error or "lost")

    scene.renewal.begin(block(1))
    scene.channel.answer = lost
    with scene.renewal.following():
        scene.metadata = dict(block(2))
        scene.channel.put(Said(2))
        assert scene.stop.wait(20)
    assert str(scene.stop.reason) == "lost"


def test_a_library_without_the_functions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(csr._FUNCTIONS, "no_such_function", (None,))
    csr._libcrypto.cache_clear()
    with pytest.raises(csr.NoLibrary, match="shows no no_such_function"):
        csr.make_request(["web.example"])
    csr._libcrypto.cache_clear()
    monkeypatch.undo()
    with pytest.raises(GuestError, match="EVP_PKEY_CTX_new_id of libcrypto failed"):
        csr._call("EVP_PKEY_CTX_new_id", 1, None)
