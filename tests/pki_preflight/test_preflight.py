"""`preflight` in this process: what it looks at, and what it makes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from firebuild_pki import (
    CASettings,
    EventKind,
    MaterialError,
    PluginCatalog,
    ProviderLoadError,
    SettingsError,
    TLSMaterial,
    grpc_handshake,
)
from firebuild_pki.preflighting import PreflightReport, PreflightRow, RowLevel, Verdict, preflight, refused
from pki import characters
from pki.tools import Clock, ca_settings, entry
from pki_preflight.moody import WAKE

OK, WARNING, FATAL, SKIPPED = RowLevel
BUILD_TIME = timedelta(minutes=31)
CATALOG = PluginCatalog(
    providers=[
        entry("embedded", "firebuild_pki.providers.embedded"),
        entry("file", "firebuild_pki.providers.file"),
        entry("moody", "pki_preflight.moody"),
    ],
    observers=[entry("witness", "pki.characters:witness"), entry("drunkard", "pki.characters:drunkard")],
)


def moody(*moods: str, ca: Mapping[str, Any] | None = None, **block: Any) -> CASettings:
    section = {"provider": "moody", **(ca or {}), "moody": {"moods": list(moods), **block}}
    return ca_settings(section, CATALOG)


def fly(settings: CASettings, **options: Any) -> PreflightReport:
    return preflight(settings, build_time=BUILD_TIME, **options)


def rows(report: PreflightReport, about: str) -> list[tuple[RowLevel, str, str | None]]:
    return [(row.level, row.message, row.hint) for row in report.rows if row.about == about]


def levels(report: PreflightReport) -> dict[str, RowLevel]:
    return {row.about: row.level for row in reversed(report.rows)}


def test_a_good_authority_is_ready() -> None:
    seen: list[PreflightRow] = []
    report = fly(ca_settings({}, CATALOG), on_row=seen.append)
    assert (report.verdict, report.ready, report.provider) == (Verdict.READY, True, "embedded")
    assert levels(report) == {
        **dict.fromkeys(["plugin", "settings", "open", "backend", "issue server", "issue guest"], OK),
        **dict.fromkeys(["verification", "handshake", "algorithms", "refusal"], OK),
        "revocation": SKIPPED,
    }
    assert tuple(seen) == report.rows
    server = rows(report, "issue server")[0][1]
    assert server.startswith(f"{report.build_id}.firebuild.internal until ")
    assert report.build_id.startswith("preflight-")
    assert rows(report, "algorithms")[0][1] == (
        "key exchange X25519MLKEM768; certificates signed with ECDSA with SHA-256"
    )
    assert [message for _, message, _ in rows(report, "refusal")] == [
        "a guest without a certificate is refused",
        "a guest of the same name with a certificate of another CA is refused",
        "a server with the guest's certificate is refused",
        "a guest that this CA certified as guest.another-build.invalid, outside of its build, is refused: "
        "permitted subtree violation",
    ]


def test_the_document_holds_all_rows_and_nothing_secret() -> None:
    document = fly(ca_settings({}, CATALOG)).to_json()
    assert list(document) == ["provider", "build_id", "verdict", "warnings", "seconds", "rows"]
    assert list(document["rows"][0]) == ["about", "level", "message", "hint", "seconds", "step"]
    assert (document["verdict"], document["warnings"]) == ("ready", 0)
    assert "PRIVATE KEY" not in repr(document)


def test_the_certificates_are_asked_for_as_long_as_a_build_takes() -> None:
    report = fly(moody(leaf_lifetime="30m"))
    assert report.verdict is Verdict.AUTHORITY
    [(level, message, hint)] = rows(report, "issue server")
    assert level is FATAL
    assert "but the build may need it until" in message
    assert hint == "shorten the build's timeout, or let the CA issue for longer"
    assert levels(report)["issue guest"] is FATAL
    assert rows(report, "revocation") == [(SKIPPED, "nothing was issued", None)]


def test_warnings_of_the_facade_have_rows_of_their_own() -> None:
    report = fly(moody(leaf_lifetime="70m"), ttl=timedelta(minutes=80))  # an hour is the default
    assert report.ready
    assert [level for level, _, _ in rows(report, "issue server")] == [OK, WARNING]
    assert rows(report, "issue server")[1][1].startswith(
        "the CA capped the lifetime of the server certificate"
    )
    assert [level for level, _, _ in rows(report, "issue guest")] == [OK, WARNING]
    assert report.count(WARNING) == report.to_json()["warnings"] == 2


def test_notes_about_the_settings_are_rows_once() -> None:
    report = fly(moody("many"))
    assert rows(report, "settings") == [
        (WARNING, "settings: ca.moody.moods: that is many moods", "have fewer")
    ]
    assert report.count(WARNING) == 1
    assert report.ready


@pytest.mark.parametrize(
    ("settings", "message", "hint", "verdict"),
    [
        (
            moody("wrong-settings"),
            "settings: ca.moody.moods: expected better settings",
            "be serious",
            "settings",
        ),
        (
            moody(ca={"name_suffix": "Ü"}),
            'expected a lower-case domain as name suffix, found "Ü"',
            "for",
            "settings",
        ),
        (
            moody("no-factory"),
            "making the provider failed: RuntimeError: no factory today",
            None,
            "authority",
        ),
    ],
)
def test_wrong_settings_end_it_before_anything_is_opened(
    settings: CASettings, message: str, hint: str | None, verdict: str
) -> None:
    report = fly(settings)
    [(level, found, advice)] = rows(report, "settings")
    assert (level, found) == (FATAL, message)
    assert (advice or "").startswith(hint or "")
    assert report.verdict == verdict
    assert {row.level for row in report.rows[2:]} == {SKIPPED}
    assert rows(report, "open") == [(SKIPPED, "needs: settings", None)]


@pytest.mark.parametrize(
    ("mood", "message", "hint"),
    [
        ("locked", "the door is locked", "knock"),
        (
            "busy",
            "opening the provider failed: ConnectionRefusedError: busy",
            "it may work later: try again",
        ),
    ],
)
def test_an_authority_that_does_not_open_skips_the_rest(mood: str, message: str, hint: str) -> None:
    report = fly(moody(mood))
    assert rows(report, "open") == [(FATAL, message, hint)]
    assert report.verdict is Verdict.AUTHORITY
    assert rows(report, "issue server") == [(SKIPPED, "needs: backend", None)]
    assert rows(report, "revocation") == [(SKIPPED, "needs: open", None)]


def test_secrets_are_looked_up_in_the_given_environment() -> None:
    settings = moody(password={"env": "PASSWORD"})
    assert fly(settings, environ={"PASSWORD": "hunter2"}).ready
    report = fly(settings, environ={})
    assert "PASSWORD, but it is not set" in rows(report, "open")[0][1]
    assert "hunter2" not in repr(report)


def test_what_the_provider_finds_out_has_rows_also_beside_a_fatal_one() -> None:
    report = fly(moody("no-role"))
    assert rows(report, "reachable") == [(OK, "unsealed", None)]
    assert rows(report, "role") == [(FATAL, "role: no such role", "write it")]
    assert report.verdict is Verdict.AUTHORITY
    assert {
        levels(report)[name] for name in ("issue server", "issue guest", "verification", "handshake")
    } == {SKIPPED}


def test_a_note_without_a_subject_is_about_the_backend() -> None:
    assert rows(fly(moody("tired")), "backend") == [(WARNING, r"tired\x1b[31m and old", None)]


def test_a_check_that_returns_no_notes_is_named() -> None:
    report = fly(moody("strings"))
    assert rows(report, "backend") == [(FATAL, "expected notes of the check, found str", None)]


def test_one_end_is_tried_although_the_other_failed() -> None:
    report = fly(moody("no-guest", "revokes"))
    assert rows(report, "issue guest") == [(FATAL, "no guest today", None)]
    assert levels(report)["issue server"] is OK
    assert rows(report, "handshake") == [(SKIPPED, "needs: issue guest", None)]
    assert rows(report, "revocation") == [(OK, "the server certificate is revoked", None)]


def test_what_was_issued_is_revoked() -> None:
    report = fly(moody("revokes"))
    assert [message for _, message, _ in rows(report, "revocation")] == [
        "the server certificate is revoked",
        "the guest certificate is revoked",
    ]


def test_a_failed_revocation_is_a_warning_where_builds_revoke() -> None:
    report = fly(moody("revokes-badly", ca={"revoke_at_end": True}))
    assert report.ready
    level, message, _ = rows(report, "revocation")[0]
    assert (level, message) == (WARNING, "the server certificate was not revoked: the list is full")


def test_a_failed_revocation_does_not_matter_where_builds_do_not_revoke() -> None:
    level, message, _ = rows(fly(moody("revokes-badly")), "revocation")[0]
    assert level is SKIPPED
    assert message.startswith("the server certificate stays valid until 2")
    assert message.endswith("Z: the list is full")


def test_a_failure_at_the_end_is_a_warning() -> None:
    report = fly(moody("slams"))
    assert report.ready
    assert rows(report, "close") == [
        (WARNING, "closing the provider failed: RuntimeError: the door fell off", None)
    ]


def test_observers_are_told_and_their_failures_are_rows() -> None:
    good = fly(ca_settings({"observers": ["witness"]}, CATALOG))
    assert rows(good, "observers") == [(OK, "told of all this: witness", None)]
    report = fly(ca_settings({"observers": ["drunkard"]}, CATALOG))
    assert report.ready
    assert rows(report, "observers")[0][0] is WARNING
    assert rows(report, "observers")[0][1].startswith('the observer "drunkard" failed on "issued"')
    assert [level for level, _, _ in rows(report, "issue server")] == [OK]


def test_a_handshake_that_fails_is_a_row() -> None:
    report = fly(ca_settings({}, CATALOG), clock=Clock())  # valid in 2030 only
    [(level, message, _)] = rows(report, "handshake")
    assert level is FATAL
    assert message
    assert rows(report, "refusal") == [(SKIPPED, "needs: handshake", None)]
    assert report.verdict is Verdict.AUTHORITY


def test_a_server_that_lets_everybody_in_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    real = grpc_handshake.handshake

    def blind(server: TLSMaterial, guest: TLSMaterial, **options: Any) -> grpc_handshake.Handshake:
        try:
            return real(server, guest, **options)
        except MaterialError:
            return grpc_handshake.Handshake(server.server_name, (), "", "TLSv1.3", 0.0)

    monkeypatch.setattr(grpc_handshake, "handshake", blind)
    report = fly(ca_settings({}, CATALOG))
    assert report.verdict is Verdict.AUTHORITY
    assert rows(report, "refusal")[0] == (FATAL, "a guest without a certificate was let in", None)
    assert len(rows(report, "refusal")) == 4


def test_an_interruption_is_noticed_before_the_first_step() -> None:
    def check() -> None:
        raise KeyboardInterrupt

    seen: list[PreflightRow] = []
    with pytest.raises(KeyboardInterrupt):
        fly(ca_settings({}, CATALOG), check=check, on_row=seen.append)
    assert seen == []


def test_an_interruption_ends_it_and_closes_the_authority() -> None:
    class Enough(BaseException):
        pass

    opened: list[PreflightRow] = []
    moments = iter(range(3))  # before the step, and twice while the backend is waited for

    def check() -> None:
        if opened and next(moments, None) is None:
            WAKE.set()
            raise Enough

    def on_row(row: PreflightRow) -> None:
        if row.step == "open":
            opened.append(row)

    began = time.monotonic()
    characters.witness.events.clear()
    with pytest.raises(Enough):
        fly(moody("hangs", ca={"observers": ["witness"]}), check=check, on_row=on_row)
    assert [event.kind for event in characters.witness.events] == [EventKind.CLOSED]
    WAKE.clear()
    assert time.monotonic() - began < 30


def test_a_backend_that_does_not_answer_is_given_up() -> None:
    report = fly(moody("hangs", ca={"call_timeout": "200ms"}))
    [(level, message, hint)] = rows(report, "backend")
    assert (level, message) == (FATAL, "the check did not end within 0.2 s")
    assert hint == "look at the backend, or raise ca.call_timeout"
    assert report.seconds < 30


def test_ready_pairs_may_be_for_both_ends(ready_pairs: Mapping[str, Path]) -> None:
    block = {name: str(path) for name, path in ready_pairs.items()}
    report = fly(ca_settings({"provider": "file", "file": block}, CATALOG))
    assert report.ready, report
    assert rows(report, "issue server")[0][1].startswith("both.example.org until ")
    assert len(rows(report, "refusal")) == 2
    assert rows(report, "revocation")[0][0] is SKIPPED


def test_settings_that_cannot_be_loaded_have_a_report_too() -> None:
    with pytest.raises(SettingsError) as caught:
        ca_settings({"provider": "embedded", "embedded": {"backdat": "5m"}, "key_type": "p1"}, CATALOG)
    seen: list[PreflightRow] = []
    report = refused(caught.value, on_row=seen.append)
    assert report.verdict is Verdict.SETTINGS
    assert [level for level, _, _ in rows(report, "settings")] == [FATAL, FATAL]
    assert {"plugin", "settings"}.isdisjoint(row.about for row in seen if row.level is SKIPPED)
    assert levels(report)["revocation"] is SKIPPED


def test_a_plugin_that_cannot_be_loaded_has_a_report_too() -> None:
    error = ProviderLoadError("importing it failed", provider="broken", hint="mend it")
    report = refused(error)
    assert (report.verdict, report.provider) == (Verdict.AUTHORITY, "broken")
    assert rows(report, "plugin") == [(FATAL, "importing it failed", "mend it")]
    assert rows(report, "settings") == [(SKIPPED, "needs: plugin", None)]


def test_what_harms_nobody_is_a_row_and_no_warning() -> None:
    providers = [entry("encipherment", "pki.signers:encipherment")]
    section = {"provider": "encipherment", "call_timeout": "20s"}
    report = preflight(
        ca_settings(section, PluginCatalog(providers=providers)),
        build_time=BUILD_TIME,
        ttl=timedelta(hours=1),
        clock=Clock(),
    )
    remark = "the key usage has keyEncipherment, which means nothing for an EC key"
    assert (OK, remark, None) in rows(report, "issue server")
    assert remark not in [message for _, message, _ in rows(report, "issue guest")]  # once is enough
    assert report.count(WARNING) == 0


def test_a_file_with_a_secret_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("s.token")
    secret.chmod(0o640)
    catalog = PluginCatalog(providers=[entry("moody", "pki_preflight.moody")])
    block = {"password": {"file": str(secret)}}
    settings = ca_settings({"provider": "moody", "moody": block}, catalog)

    def warned() -> list[tuple[str, str | None]]:
        report = preflight(settings, build_time=timedelta(minutes=31))
        return [(row.message, row.hint) for row in report.rows if row.level is RowLevel.WARNING]

    text = f"ca.moody.password: the secret in {secret} can be read by its group"
    assert warned() == [(text, f"chmod 600 {secret}")]
    secret.chmod(0o600)
    assert warned() == []
