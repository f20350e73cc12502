"""Code of plugins runs in their own thread, within its limit, and nothing that it raises gets through."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from firebuild_pki import (
    Authority,
    AuthorityClosed,
    CAError,
    Capability,
    MaterialError,
    Note,
    NoteLevel,
    PluginCatalog,
    Problem,
    ProviderError,
    ProviderLoadError,
    ReadyPair,
    SecretError,
    SettingsError,
    SignedCertificate,
    TrustBundle,
    crossing,
    open_authority,
)
from firebuild_pki.errors import causes
from firebuild_pki.worker import Unanswered, Worker
from firebuild_pki.wrapping import provider_errors
from pki import untrusted
from pki.conftest import Install
from pki.tools import Clock, ca_settings, entry
from pki.untrusted import FOREIGN, HABITS, LIMIT, THREAD_NAMES, raising, returning

EMBEDDED = entry("embedded", "firebuild_pki.providers.embedded")


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    HABITS.clear()
    THREAD_NAMES.clear()
    yield
    HABITS.clear()
    end = time.monotonic() + 20
    while any(one.name == "ca-provider(hostile)" for one in threading.enumerate()):
        assert time.monotonic() < end, "a provider's thread outlives its last call"
        time.sleep(0.02)
    assert set(THREAD_NAMES) <= {"ca-provider(hostile)"}


def opened(limit: float = LIMIT, **more: Any) -> Authority:
    catalog = PluginCatalog(
        providers=[EMBEDDED, entry("hostile", "pki.untrusted:hostile")],
        observers=[entry(name, f"pki.untrusted:{name}") for name in ("listening", "awaiting")],
    )
    section = {"provider": "hostile", "call_timeout": f"{limit}s", **more}
    return open_authority(ca_settings(section, catalog), build_id="b", clock=Clock())


CALLS: dict[str, tuple[Callable[[Authority], object], str]] = {
    "check": (lambda authority: authority.check(), "the check"),
    "sign": (lambda authority: authority.issue_server(), "issuing the server certificate"),
    "revoke": (lambda authority: authority.revoke(authority.issue_guest()), "revoking a certificate"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("method", CALLS)
def test_whatever_a_provider_raises_becomes_an_error_of_ours(method: str, kind: str) -> None:
    error, words = FOREIGN[kind]
    call, doing = CALLS[method]
    with opened(5) as authority:
        HABITS[method] = raising(error)
        with pytest.raises(ProviderError) as caught:
            call(authority)
    assert str(caught.value) == f"ca-provider(hostile): {doing} failed: {words}"
    assert all(f"{one!r}{one}" for one in causes(caught.value, lambda one: (one.__cause__, one.__context__)))
    assert "".join(traceback.format_exception(caught.value))


OPENING = {
    "validate": "looking at the settings",
    "open": "opening the provider",
    "trust_bundle": "reading the trust bundle",
    "capabilities": "asking for the capabilities",
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("method", OPENING)
def test_whatever_a_provider_raises_while_opening_is_named(method: str, kind: str) -> None:
    error, words = FOREIGN[kind]
    HABITS[method] = raising(error)
    with pytest.raises(ProviderError) as caught:
        opened(5)
    assert str(caught.value) == f"ca-provider(hostile): {OPENING[method]} failed: {words}"


@pytest.mark.parametrize("kind", FOREIGN)
def test_whatever_a_provider_raises_while_closing_is_a_warning(kind: str) -> None:
    error, words = FOREIGN[kind]
    with opened(5) as authority:
        HABITS["close"] = raising(error)
    assert authority.warnings == (f"closing the provider failed: {words}",)


@pytest.mark.parametrize("kind", FOREIGN)
def test_whatever_an_observer_raises_is_a_warning(kind: str) -> None:
    untrusted.listening.error, words = FOREIGN[kind]
    with opened(5, observers=["listening"]) as authority:
        authority.issue_server()
    assert authority.warnings == tuple(
        f'the observer "listening" failed on "{what}": {words}' for what in ("issued", "closed")
    )


async def awaited(*_: object, **_more: object) -> None:
    """What nobody awaits."""


def stepwise(*_: object, **_more: object) -> Iterator[None]:
    """What nobody steps through."""
    yield


IDLE: dict[str, tuple[Callable[..., object], str]] = {
    "async": (awaited, "the method did nothing, and returned coroutine to be awaited"),
    "generator": (stepwise, "the method did nothing, and returned generator"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", IDLE)
def test_a_method_that_has_not_begun_is_not_taken_for_one_that_is_done(kind: str) -> None:
    habit, words = IDLE[kind]
    with opened(5) as authority:
        HABITS["revoke"] = HABITS["close"] = habit
        with pytest.raises(ProviderError) as caught:
            authority.revoke(authority.issue_guest())
        assert str(caught.value).startswith(f"ca-provider(hostile): {words}")
        assert str(caught.value.hint).startswith("write the method without ")
    (warning,) = authority.warnings
    assert warning.startswith(f"closing the provider failed: {words}")
    HABITS["open"] = habit
    with pytest.raises(ProviderError, match=words):
        opened(5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["check", "sign"])
def test_an_answer_that_is_to_be_awaited_is_refused_with_the_reason(method: str) -> None:
    with opened(5) as authority:
        HABITS[method] = awaited
        with pytest.raises(ProviderError, match=IDLE["async"][1]) as caught:
            CALLS[method][0](authority)
        assert "without async" in str(caught.value.hint)


@pytest.mark.filterwarnings("error")
def test_an_observer_that_is_to_be_awaited_is_a_warning() -> None:
    with opened(5, observers=["awaiting"]) as authority:
        authority.issue_server()
    assert [IDLE["async"][1] in one for one in authority.warnings] == [True, True]


def test_an_error_whose_text_does_not_end_is_a_call_that_does_not_end() -> None:
    with opened() as authority:
        HABITS["sign"] = raising(untrusted.Endless())
        with pytest.raises(ProviderError, match="issuing the server certificate did not end within 1 s"):
            authority.issue_server()
    assert set(THREAD_NAMES) == {"ca-provider(hostile)"}


def test_a_cause_whose_text_is_computed_is_stood_in_for() -> None:
    error = CAError("no luck", hint="try\nagain")
    error.__cause__ = untrusted.Mute()
    with opened(5) as authority:
        HABITS["sign"] = raising(error)
        with pytest.raises(CAError) as caught:
            authority.issue_server()
    assert str(caught.value) == "ca-provider(hostile): no luck (hint: try again)"
    assert str(caught.value.__cause__) == "Mute: (a Mute that does not say more)"


def test_errors_of_ours_keep_their_kind_and_their_words() -> None:
    with opened(5) as authority:
        HABITS["sign"] = raising(untrusted.OfAcme("no secret", hint="set  it", retryable=True))
        with pytest.raises(SecretError) as caught:
            authority.issue_server()
    assert type(caught.value) is SecretError
    assert str(caught.value) == "ca-provider(hostile): no secret (hint: set  it)"
    assert caught.value.retryable


def test_of_a_group_of_one_that_one_is_told() -> None:
    # as asyncio's TaskGroup raises them
    refused = CAError("no such role", hint="create it")
    with pytest.raises(CAError) as caught, provider_errors("acme", "signing"):
        raise ExceptionGroup("unhandled errors in a TaskGroup", [ExceptionGroup("inner", [refused])])
    assert str(caught.value) == "ca-provider(acme): no such role (hint: create it)"
    with pytest.raises(ProviderError) as lost, provider_errors("acme", "signing"):
        raise ExceptionGroup("unhandled errors in a TaskGroup", [ConnectionError("gone")])
    assert lost.value.message == "signing failed: ConnectionError: gone"
    assert lost.value.retryable


def test_an_error_of_ours_that_cannot_be_read_is_still_an_error() -> None:
    with opened(5) as authority:
        HABITS["sign"] = raising(untrusted.Unreadable("x"))
        with pytest.raises(ProviderError, match="certificate failed, and so does the error that should say"):
            authority.issue_server()


def test_the_text_of_an_error_is_escaped_and_cut() -> None:
    with opened(5) as authority:
        HABITS["sign"] = raising(untrusted.Loud())
        with pytest.raises(ProviderError) as caught:
            authority.issue_server()
    assert r"failed: Loud: \x1b[31mred\x1b[0m and xxx" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2_000


def test_a_check_that_is_a_generator_is_read_within_its_limit() -> None:
    with opened() as authority:
        HABITS["check"] = untrusted.slowly
        began = time.monotonic()
        with pytest.raises(ProviderError, match="the check did not end within 1 s"):
            authority.check()
        assert time.monotonic() - began < 2.5
    assert set(THREAD_NAMES) == {"ca-provider(hostile)"}


def test_notes_without_end_are_refused() -> None:
    with opened(20) as authority:
        HABITS["check"] = untrusted.without_end
        with pytest.raises(ProviderError, match="expected notes of the check, 1000 at most, found more"):
            authority.check()


def test_a_generator_that_fails_halfway_is_named() -> None:
    with opened(5) as authority:
        HABITS["check"] = untrusted.failing_halfway
        with pytest.raises(ProviderError, match="the check failed: LookupError: the second half is missing"):
            authority.check()


def test_a_generator_of_notes_is_as_good_as_a_list() -> None:
    with opened(5) as authority:
        HABITS["check"] = lambda _: (Note(text) for text in ("one", "two"))
        assert [note.message for note in authority.check()] == ["one", "two"]


def test_attributes_that_take_their_time_are_read_within_the_limit() -> None:
    with opened() as authority:
        HABITS["check"] = returning([untrusted.LazyNote("later")])
        with pytest.raises(ProviderError, match="the check did not end within 1 s"):
            authority.check()


def test_attributes_that_raise_are_named() -> None:
    HABITS["trust_bundle"] = returning(untrusted.LazyBundle(b""))
    with pytest.raises(ProviderError, match=r"^ca-provider\(hostile\): .* LookupError: no anchors here$"):
        opened(5)


def test_a_certificate_that_is_computed_late_is_read_in_the_providers_thread() -> None:
    with opened() as authority:
        HABITS["sign"] = returning(untrusted.LazyCertificate())
        HABITS["chain_pem"] = raising(ConnectionError("gone"))
        with pytest.raises(ProviderError, match="failed: ConnectionError: gone") as caught:
            authority.issue_server()
        assert caught.value.retryable
        HABITS["chain_pem"] = lambda _: time.sleep(3 * LIMIT)
        with pytest.raises(ProviderError, match="did not end within 1 s"):
            authority.issue_server()


def test_strings_of_a_providers_own_class_become_plain_ones() -> None:
    text = untrusted.Subtle("as it was")
    with opened(5) as authority:
        HABITS["check"] = returning([Note(text, text, text, NoteLevel.OK, text)])
        (note,) = authority.check()
    assert (note.message, note.path, note.hint, note.about) == ("as it was",) * 4
    assert {type(note.message), type(note.path), type(note.hint), type(note.about)} == {str}


NO_NOTES: dict[str, tuple[object, str]] = {
    "text": ("capped", "expected notes of the check, found str"),
    "one": (Note("alone"), "expected notes of the check, found Note"),
    "number": (7, "expected notes of the check, found int"),
    "others": ([object()], "expected notes of the check, found object"),
    "message": ([Note(5)], "expected a string as the message of a note, found int"),  # type: ignore[arg-type]
    "level": (
        [Note("x", level="loud")],  # type: ignore[arg-type]
        'expected the level of a note to be one of ok, warning, fatal, found "loud"',
    ),
    "level of no kind": (
        [Note("x", level=3)],  # type: ignore[arg-type]
        "expected the level of a note to be one of ok, warning, fatal, found int",
    ),
}


@pytest.mark.parametrize("case", NO_NOTES)
def test_what_is_no_notes_is_named(case: str) -> None:
    found, words = NO_NOTES[case]
    with opened(5) as authority:
        HABITS["check"] = returning(found)
        with pytest.raises(ProviderError) as caught:
            authority.check()
    assert str(caught.value) == f"ca-provider(hostile): {words}"


CAPABILITIES: dict[str, tuple[object, str]] = {
    "list": ([Capability.SIGN], "expected a frozenset of capabilities, found list"),
    "text": ("sign", "expected a frozenset of capabilities, found str"),
    "unknown": ({"fly"}, f'expected a capability to be one of {", ".join(Capability)}, found "fly"'),
    "number": ({5}, f"expected a capability to be one of {', '.join(Capability)}, found int"),
}


@pytest.mark.parametrize("case", CAPABILITIES)
def test_what_is_no_capability_is_named(case: str) -> None:
    found, words = CAPABILITIES[case]
    HABITS["capabilities"] = returning(found)
    with pytest.raises(ProviderError) as caught:
        opened(5)
    assert str(caught.value) == f"ca-provider(hostile): {words}"


def test_a_set_of_words_is_a_set_of_capabilities() -> None:
    HABITS["capabilities"] = returning({"sign"})
    with opened(5) as authority:
        assert authority.capabilities == frozenset({Capability.SIGN})


def test_a_note_with_a_certificate_is_no_sequence_of_letters() -> None:
    with opened(5) as authority:
        answer = SignedCertificate(b"", b"", "capped")  # type: ignore[arg-type]
        HABITS["sign"] = returning(answer)
        with pytest.raises(ProviderError) as caught:
            authority.issue_server()
    words = "expected notes with the certificate, a tuple of sentences, found str"
    assert str(caught.value) == f"ca-provider(hostile): {words}"


def test_notes_with_a_certificate_are_escaped_and_cut() -> None:
    def remarking(usual: Callable[[], SignedCertificate]) -> SignedCertificate:
        signed = usual()
        remarks = ("\x1b[2J\nboo", "y" * 100_000)
        return SignedCertificate(signed.certificate_pem, signed.chain_pem, remarks)

    with opened(5) as authority:
        HABITS["sign"] = remarking
        authority.issue_server()
    assert authority.warnings[0] == r"\x1b[2J boo"
    assert authority.warnings[1].endswith("… (100000 characters in all)")


def test_more_than_a_megabyte_of_certificates_is_refused() -> None:
    with opened(5) as authority:
        HABITS["sign"] = returning(SignedCertificate(b"x" * (crossing.MAX_PEM + 1)))
        with pytest.raises(MaterialError, match="as certificate, 1048576 bytes at most, found 1048577"):
            authority.issue_server()


def test_values_of_other_types_are_named_where_they_cross() -> None:
    with pytest.raises(MaterialError, match="expected a DNS name as the name of a ReadyPair, found int"):
        crossing.ready_pair(ReadyPair(b"", b"", 5))  # type: ignore[arg-type]
    with pytest.raises(MaterialError, match="expected PEM text as trust anchors, found bytearray"):
        crossing.trust_bundle(TrustBundle(bytearray()))  # type: ignore[arg-type]
    assert crossing.ready_pair(ReadyPair("\ud800", b"k", "a.b")).certificate_chain_pem == b"?"  # type: ignore[arg-type]


def test_a_provider_that_was_too_slow_once_is_asked_again_once_it_has_ended() -> None:
    with opened() as authority:

        def tardy(usual: Callable[[], Any]) -> Any:
            time.sleep(1.5 * LIMIT)
            return usual()

        HABITS["sign"] = tardy
        with pytest.raises(ProviderError, match="did not end within 1 s"):
            authority.issue_server()
        with pytest.raises(ProviderError, match="issuing the server certificate has not ended yet"):
            authority.issue_guest()
        del HABITS["sign"]
        time.sleep(LIMIT)
        assert authority.issue_guest().identity == "guest.b.firebuild.internal"
    assert authority.warnings == ()


@pytest.mark.parametrize("place", ["import", "hook", "factory"])
@pytest.mark.parametrize(
    "error", ["asyncio.CancelledError()", "GeneratorExit()", "StopIteration()", "Mute()"]
)
def test_whatever_loading_a_plugin_raises_is_an_error_of_ours(
    error: str, place: str, install: Install
) -> None:
    fail = {one: f"raise {error}" if one == place else "pass" for one in ("import", "hook", "factory")}
    install(
        "acme-pki",
        f"""
        import asyncio
        from firebuild_pki import ProviderSpec, Settings, hookimpl

        class Mute(BaseException):
            def __str__(self):
                raise ValueError
            __repr__ = __str__

        {fail["import"]}

        def make(settings, context):
            {fail["factory"]}

        @hookimpl
        def register_ca_providers():
            {fail["hook"]}
            return ProviderSpec("acme", Settings, make, "for tests")
        """,
        name="acme",
        module="acme_pki",
    )
    expected = ProviderError if place == "factory" else ProviderLoadError
    with pytest.raises(
        expected, match=r"^ca-provider\(acme\): .*failed: " + error[:-2].removeprefix("asyncio.")
    ):
        open_authority({"provider": "acme"})


def install_acme(install: Install, settings: str = "pass", spec: str = "'acme', Acme, Acme, 'a CA'") -> None:
    install(
        "acme-pki",
        f"""
        import asyncio
        from pydantic import field_validator
        from firebuild_pki import Capability, ProviderSpec, Settings, hookimpl

        class Acme(Settings):
            size: int = 1

            @field_validator("size")
            @classmethod
            def fits(cls, value):
                {settings}
                return value

        class LazySpec(ProviderSpec):
            def __getattribute__(self, name):
                if name == "factory":
                    raise asyncio.CancelledError("not now")
                return super().__getattribute__(name)

        @hookimpl
        def register_ca_providers():
            kind = LazySpec if "lazy" in {spec!r} else ProviderSpec
            return kind({spec})
        """,
        name="acme",
        module="acme_pki",
    )


@pytest.mark.parametrize("error", ["asyncio.CancelledError()", "LookupError('what')", "SystemExit(1)"])
def test_whatever_a_validator_of_settings_raises_is_an_error_of_ours(error: str, install: Install) -> None:
    install_acme(install, settings=f"raise {error}")
    with pytest.raises(ProviderError, match=r"^ca-provider\(acme\): validating the settings failed: "):
        open_authority({"provider": "acme", "acme": {"size": 2}})


def test_what_a_validator_of_settings_says_is_escaped(install: Install) -> None:
    install_acme(install, settings=r"raise ValueError('too\x1b[31m\nlarge')")
    with pytest.raises(CAError, match=r"ca\.acme\.size: too\\x1b\[31m large$"):
        open_authority({"provider": "acme", "acme": {"size": 2}})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("'acme', dict, Acme, 'x'", "settings_model of its ProviderSpec is not a pydantic model"),
        ("'acme', Acme, 'Acme', 'x'", "factory of its ProviderSpec cannot be called"),
        ("'acme', Acme, Acme, None", "summary of its ProviderSpec is of the wrong type, NoneType"),
        ("'acme', Acme, Acme, 'x', [Capability.SIGN]", "its hook failed: TypeError"),
        ("'acme', Acme, Acme, 'x', {'sign', 'fly'}", "its hook failed: ValueError: 'fly' is not a valid"),
        ("'Acme', Acme, Acme, 'x'", 'its hook failed: "Acme" cannot be the name of a provider'),
        ("'acme', Acme, Acme, 'lazy'", "its hook failed: CancelledError: not now"),
    ],
)
def test_a_spec_with_a_field_of_the_wrong_type_is_named(spec: str, words: str, install: Install) -> None:
    install_acme(install, spec=spec)
    with pytest.raises(ProviderLoadError) as caught:
        open_authority({"provider": "acme"})
    assert str(caught.value).startswith(f"ca-provider(acme): cannot use the plugin of acme-pki 1.2: {words}")


def test_what_a_plugin_says_of_itself_is_escaped(install: Install) -> None:
    install_acme(install, spec=r"'acme', Acme, Acme, 'a \x1b[31mred\n CA'")
    assert PluginCatalog().load_provider("acme").summary == r"a \x1b[31mred CA"


@pytest.mark.parametrize("method", ["validate", "open", "check", "sign", "close"])
def test_an_interruption_by_the_user_goes_through(method: str) -> None:
    HABITS[method] = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), opened(5) as authority:
        authority.check()
        authority.issue_server()


@pytest.mark.parametrize("place", ["import", "settings"])
def test_so_it_does_while_a_plugin_is_loaded(place: str, install: Install) -> None:
    install_acme(install, settings="raise KeyboardInterrupt" if place == "settings" else "pass")
    if place == "import":
        install("other-pki", "raise KeyboardInterrupt", name="other", module="other_pki")
    with pytest.raises(KeyboardInterrupt):
        open_authority({"provider": "acme" if place == "settings" else "other", "acme": {"size": 2}})


class Impatient(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def test_so_it_does_while_an_error_is_read_and_out_of_an_observer() -> None:
    with opened(5) as authority:
        HABITS["sign"] = raising(Impatient())
        with pytest.raises(KeyboardInterrupt):
            authority.issue_server()
    untrusted.listening.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), opened(5, observers=["listening"]) as authority:
        del HABITS["sign"]
        authority.issue_server()


def test_an_error_of_ours_out_of_closing_says_that_it_was_about_closing() -> None:
    with opened(5) as authority:
        HABITS["close"] = raising(CAError("the token lives on", hint="revoke it"))
    assert authority.warnings == ("closing the provider failed: the token lives on (hint: revoke it)",)


def test_problems_with_settings_out_of_a_provider_stay_what_they_are() -> None:
    problem = Problem("fb.yaml", 3, 5, "ca.x", "too\nlarge\x1b[0m", "make it\nsmaller")
    with opened(5) as authority:
        HABITS["check"] = raising(SettingsError([problem, replace(problem, hint=None)]))
        with pytest.raises(SettingsError) as caught:
            authority.check()
    assert caught.value.problems[0].message == r"too large\x1b[0m"
    assert [one.hint for one in caught.value.problems] == ["make it smaller", None]


def test_the_conformance_kit_names_the_provider_in_the_same_way() -> None:
    words = r"^ca-provider\(acme\): trying failed: CancelledError$"
    with pytest.raises(ProviderError, match=words), provider_errors("acme", "trying"):
        raise asyncio.CancelledError
    with pytest.raises(KeyboardInterrupt), provider_errors("acme", "trying"):
        raise KeyboardInterrupt
    with provider_errors("acme", "trying"):
        pass


def test_a_call_after_the_end_is_refused() -> None:
    worker = Worker("over", timedelta(seconds=5), lambda: None)
    worker.finish(lambda: None)
    with pytest.raises(Unanswered, match="asking is not possible after the end"):
        worker.call("asking", lambda: None)


def test_the_files_of_a_thread_are_closed_when_a_call_that_was_left_behind_ends_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed, close = set[int](), os.close

    def recorded(number: int) -> None:
        closed.add(number)
        close(number)

    monkeypatch.setattr(os, "close", recorded)
    hang = threading.Event()
    worker = Worker("slow", timedelta(seconds=0.01), lambda: None)
    with pytest.raises(Unanswered, match=r"asking did not end within 0\.01 s"):
        worker.call("asking", hang.wait)
    with pytest.raises(Unanswered, match=r"asking did not end within 0\.01 s"):
        worker.finish(lambda: None)
    thread, files = worker._thread, {worker._wanted._eventfd, worker._ended._eventfd}
    del worker
    assert not files & closed
    hang.set()
    thread.join()
    del thread
    assert files <= closed


def test_a_provider_is_let_go_of_when_it_is_closed() -> None:
    authority = opened(5)
    authority.close()
    with pytest.raises(AuthorityClosed, match="the provider is closed"):
        authority._provider._made  # noqa: B018
