"""The contract of a key store as a test suite, for their authors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from firebuild_pki.authority import open_authority
from firebuild_pki.config import CASettings
from firebuild_pki.conformance.contract import PAGE, Violation, must_be_loadable
from firebuild_pki.conformance.secrecy import must_be_nowhere
from firebuild_pki.conformance.spilling import Record, Spill, recorded_logs
from firebuild_pki.conformance.watching import Traces, restored, traced
from firebuild_pki.documents import Document
from firebuild_pki.errors import CAError
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.keystores import OpenKey, SignatureAlgorithm, open_key, scheme_of
from firebuild_pki.plugins import PluginCatalog
from firebuild_pki.provider import ProviderContext, utc_now
from firebuild_pki.settings import SecretRef
from firebuild_pki.validation import validate
from firebuild_pki.x509 import Validity, make_root, to_pem

_MESSAGE = b"what is signed is hashed by the store: " * 100


class KeyStoreConformance:
    """The contract of a key store, check by check.

    Derive a class from it and override the fixture ``key_uri``, and the others where they apply.
    """

    @pytest.fixture
    def key_uri(self) -> str:
        """URI of a key that can sign; the one fixture that must be overridden."""
        pytest.fail(f"{type(self).__name__} has no fixture key_uri; {PAGE} shows an example", pytrace=False)

    @pytest.fixture
    def key_secret(self) -> SecretRef | None:
        """Where PIN, passphrase or token of the key is; None if it needs none."""
        return None

    @pytest.fixture
    def wrong_secret(self) -> str | None:
        """A secret that does not open the key; None if there is none, or if trying it does harm."""
        return None

    @pytest.fixture
    def missing_uri(self) -> str | None:
        """URI of a key that does not exist."""
        return None

    @pytest.fixture
    def other_uri(self, key_uri: str) -> str:
        """URI of another key, best in another place of the same kind; by default the same key again."""
        return key_uri

    @pytest.fixture
    def key_catalog(self) -> PluginCatalog:
        """Where plugins are found; by default those that are installed."""
        return PluginCatalog()

    @pytest.fixture
    def key_environ(self) -> Mapping[str, str]:
        """Environment variables for the store and the reference to the secret."""
        return os.environ

    @pytest.fixture
    def key_context(
        self, key_uri: str, key_catalog: PluginCatalog, key_environ: Mapping[str, str]
    ) -> ProviderContext:
        """What the keys are opened with; not to be overridden."""
        scheme = scheme_of(key_uri)
        if scheme is None:
            _broken(f"{key_uri} does not begin with a scheme of two letters or more and a colon")
        must_be_loadable(lambda: key_catalog.load_key_store(scheme), scheme, type(self), "key_catalog")
        return ProviderContext(utc_now, key_environ, key_store=key_catalog.load_key_store)

    @pytest.fixture
    def opened(
        self, key_uri: str, key_secret: SecretRef | None, key_context: ProviderContext
    ) -> Iterator[OpenKey]:
        """The key; not to be overridden."""
        key = open_key(key_uri, key_secret, key_context)
        yield key
        key.close()

    def test_signatures_hold(self, opened: OpenKey) -> None:
        """Each algorithm that the framework asks of this kind of key gives a signature that verifies."""
        for algorithm in _algorithms(opened):
            opened.sign(_MESSAGE, algorithm)  # which verifies it
            opened.sign(b"", algorithm)

    def test_the_public_key_stays_the_same(
        self, opened: OpenKey, key_uri: str, key_secret: SecretRef | None, key_context: ProviderContext
    ) -> None:
        """A second opening finds the same key."""
        again = open_key(key_uri, key_secret, key_context)
        try:
            if again.public_key() != opened.public_key():
                _broken("the second opening found another public key than the first")
        finally:
            again.close()

    def test_closing_ends_it(
        self, key_uri: str, key_secret: SecretRef | None, key_context: ProviderContext
    ) -> None:
        """A closed key signs nothing, may be closed again, and can be opened anew."""
        for _ in range(2):
            key = open_key(key_uri, key_secret, key_context)
            key.sign(_MESSAGE, _algorithms(key)[0])
            key.close()
            key.close()
            with pytest.raises(CAError):
                key.sign(_MESSAGE, _algorithms(key)[0])

    @pytest.mark.parametrize("first", [0, 1], ids=["the first ends first", "the first ends last"])
    def test_two_keys_do_not_disturb_each_other(
        self,
        first: int,
        key_uri: str,
        other_uri: str,
        key_secret: SecretRef | None,
        key_context: ProviderContext,
    ) -> None:
        """Two are open at once and closed in either order: that which is left goes on signing."""
        keys = [open_key(uri, key_secret, key_context) for uri in (key_uri, other_uri)]
        try:
            keys[first].close()
            left = keys[1 - first]
            left.sign(_MESSAGE, _algorithms(left)[0])
        finally:
            for key in keys:
                key.close()

    def test_threads_have_keys_of_their_own(
        self, key_uri: str, key_secret: SecretRef | None, key_context: ProviderContext
    ) -> None:
        """Four threads, as of four builds, each opening, signing and closing."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(3):
                    key = open_key(key_uri, key_secret, key_context)
                    key.sign(_MESSAGE, _algorithms(key)[0])
                    key.close()
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            _broken(f"{len(failed)} of 4 threads failed, the first with: {failed[0]}")

    def test_a_wrong_secret_is_refused(
        self,
        key_uri: str,
        wrong_secret: str | None,
        key_secret: SecretRef | None,
        key_context: ProviderContext,
    ) -> None:
        """The error has a hint, holds neither secret, and the right one still works."""
        if wrong_secret is None:
            pytest.skip("no wrong_secret is given")
        wrong = ProviderContext(utc_now, {"WRONG": wrong_secret}, key_store=key_context.key_store)
        with pytest.raises(CAError) as refused:
            open_key(key_uri, SecretRef(env="WRONG"), wrong)
        if wrong_secret in str(refused.value):
            _broken("the error holds the wrong secret")
        _must_have_hint(refused.value)
        open_key(key_uri, key_secret, key_context).close()

    def test_a_missing_key_is_named(
        self, missing_uri: str | None, key_secret: SecretRef | None, key_context: ProviderContext
    ) -> None:
        """The error has a hint, such as the keys that there are."""
        if missing_uri is None:
            pytest.skip("no missing_uri is given")
        with pytest.raises(CAError) as refused:
            open_key(missing_uri, key_secret, key_context)
        _must_have_hint(refused.value)

    def test_the_secret_turns_up_nowhere(
        self,
        key_uri: str,
        key_secret: SecretRef | None,
        key_environ: Mapping[str, str],
        key_context: ProviderContext,
    ) -> None:
        """Neither in what is printed or logged, a repr, an error, an argument, the environment nor a file."""
        secret = key_secret.resolve(key_environ) if key_secret is not None else ""
        record, traces = _lived(key_uri, key_secret, key_context)
        # a PIN is shorter than what the search in files and arguments takes for a secret
        if secret and any(secret in text for text in (record.text, *traces.printed.values())):
            _broken("the secret turns up in what is printed or logged, in a repr, or in an error")
        try:
            must_be_nowhere(Spill({"of the key": secret}), record, traces)
        except Violation as violation:
            _broken(str(violation))

    def test_nothing_is_changed_or_left(
        self, key_uri: str, key_secret: SecretRef | None, key_context: ProviderContext
    ) -> None:
        """The process stays as it was, no thread, child or file is left open, and nothing is printed."""
        _, traces = _lived(key_uri, key_secret, key_context)
        found = [f"{what} is changed {when}" for what, when in sorted(traces.changes.items())]
        found += [f"{one} is left after close()" for one in traces.left]
        found += ["there is text on standard output"] if traces.printed["standard output"] else []
        if found:
            _broken("; ".join(found))

    def test_a_ca_signs_with_it(
        self,
        *,
        opened: OpenKey,
        key_uri: str,
        key_secret: SecretRef | None,
        key_context: ProviderContext,
        key_catalog: PluginCatalog,
        tmp_path: Path,
    ) -> None:
        """With a CA of the provider ``file`` that has this key, server and guest meet over mutual TLS."""
        validity = Validity.starting(utc_now(), timedelta(hours=1), backdate=timedelta(minutes=5))
        root = make_root(opened.key, validity, with_intermediate=False)
        certificate = tmp_path / "ca.pem"
        certificate.write_bytes(to_pem([root.certificate]))
        block: dict[str, object] = {"ca_cert": str(certificate), "ca_key": key_uri}
        if key_secret is not None:
            block["ca_key_passphrase"] = key_secret.model_dump()
        settings = {"provider": "file", "file": block}
        section = validate(CASettings, Document({"ca": settings}), at="ca", context={"catalog": key_catalog})
        with open_authority(section, environ=key_context.environ) as authority:
            handshake(authority.issue_server(), authority.issue_guest())


def _lived(key_uri: str, key_secret: SecretRef | None, key_context: ProviderContext) -> tuple[Record, Traces]:
    """Let a key live its whole life, and be used once more."""
    with restored(), recorded_logs() as record, traced() as traces:
        opened = open_key(key_uri, key_secret, key_context)
        try:
            traces.look("after opening")
            opened.sign(_MESSAGE, _algorithms(opened)[0])
            record.lines += [repr(opened), repr(opened.key), repr(vars(opened))]
            traces.look("after signing")
        finally:
            opened.close()
        try:
            opened.sign(_MESSAGE, _algorithms(opened)[0])
        except CAError as error:
            record.add_error(error)
        traces.look("after close()")
    return record, traces


def _broken(what: str) -> NoReturn:
    pytest.fail(f"{what}; {PAGE} says what a key store has to do", pytrace=False)


def _must_have_hint(error: CAError) -> None:
    if not error.hint:
        _broken(f'the error "{error}" has no hint, which says what to do')


def _algorithms(opened: OpenKey) -> list[SignatureAlgorithm]:
    if isinstance(opened.key, ec.EllipticCurvePrivateKey):
        return [SignatureAlgorithm.ECDSA_SHA256, SignatureAlgorithm.ECDSA_SHA384]
    return [SignatureAlgorithm.RSA_SHA256]
