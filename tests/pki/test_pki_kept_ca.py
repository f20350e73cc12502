"""The embedded CA in a directory: one for all who name it, for one user, and replaced in time."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from firebuild_pki import (
    Authority,
    CAError,
    Profile,
    SettingsError,
    open_authority,
    parse_certificates,
)
from pki.tools import Clock


def opened(directory: Path, clock: Clock | None = None, **embedded: Any) -> Authority:
    settings = {"provider": "embedded", "embedded": {"directory": str(directory), **embedded}}
    return open_authority(settings) if clock is None else open_authority(settings, clock=clock)


def test_all_who_open_it_at_once_get_the_same_ca(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "ca"

    def issue(number: int) -> tuple[bytes, bytes]:
        with opened(directory) as authority:
            # Names that nobody has announced: it is not for one build.
            made = authority.issue(Profile.PEER, f"host{number}.example")
            return made.trust_pem, made.certificate_chain_pem

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(issue, range(8)))
    assert len({trust for trust, _ in found}) == 1
    assert len({chain for _, chain in found}) == 8
    assert os.listdir(directory) == ["ca.pem"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "ca.pem").stat().st_mode) == 0o600


def test_a_successor_is_made_in_time_and_the_old_one_trusted_until_its_end(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock, ca_lifetime="10d", key_type="rsa2048") as authority:
        first = authority.trust_pem
    clock.advance(days=8)
    with opened(tmp_path, clock, ca_lifetime="10d") as authority:
        assert authority.trust_pem == first
    clock.advance(days=1.5)
    with opened(tmp_path, clock, ca_lifetime="10d") as authority:
        anchors = parse_certificates(authority.trust_pem, "trust")
        assert len(anchors) == 2
        assert anchors[1:] == parse_certificates(first, "trust")
        leaf = authority.issue(Profile.PEER, "web.example", timedelta(days=5))
        assert leaf.not_after == clock() + timedelta(days=1)  # leaf_lifetime, and not the old CA's end
    clock.advance(days=1)
    with opened(tmp_path, clock, ca_lifetime="10d") as authority:
        assert parse_certificates(authority.trust_pem, "trust") == anchors[:1]


def test_a_clock_that_is_ahead_for_a_while_costs_no_ca(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock, ca_lifetime="10d") as authority:
        first = authority.trust_pem
    clock.advance(days=400)
    for _ in range(2):
        with opened(tmp_path, clock, ca_lifetime="10d") as authority:
            assert authority.trust_pem != first
    clock.advance(days=-399)
    for _ in range(2):
        with opened(tmp_path, clock, ca_lifetime="10d") as authority:
            assert authority.trust_pem == first
            assert authority.issue(Profile.PEER, "web.example").trust_pem == first
    assert os.listdir(tmp_path) == ["ca.pem"]


def test_what_a_killed_process_has_begun_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".ca-x7").write_text("half a key")
    opened(tmp_path).close()
    assert os.listdir(tmp_path) == ["ca.pem"]


@pytest.mark.parametrize("damage", ["", "nonsense", "key", "other"])
def test_a_damaged_file_is_refused_and_never_replaced(tmp_path: Path, damage: str) -> None:
    opened(tmp_path / "other").close()
    opened(tmp_path).close()
    file = tmp_path / "ca.pem"
    key, _, root = file.read_text().partition("-----BEGIN CERTIFICATE")
    other = (tmp_path / "other/ca.pem").read_text().partition("-----BEGIN CERTIFICATE")[0]
    written = {"key": key, "other": f"{other}-----BEGIN CERTIFICATE{root}"}.get(damage, damage)
    file.write_text(written)
    with pytest.raises(CAError) as raised:
        opened(tmp_path)
    assert str(file) in str(raised.value)
    assert file.read_text() == written
    assert "PRIVATE" not in str(raised.value)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CAError, match="can't be used: No space left on device"):
        opened(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "ca.pem").chmod(0o644)
    with pytest.raises(CAError, match=r"the private key in it can be used .* \(mode 0644\)"):
        opened(tmp_path)


def test_a_directory_that_can_not_be_and_an_intermediate_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CAError, match=r"the CA in .*/file/ca can't be used: Not a directory"):
        opened(tmp_path / "file" / "ca")
    with pytest.raises(SettingsError, match="signs with its root"):
        opened(tmp_path, intermediate=True)
    with pytest.raises(CAError, match=r"the CA in .*/file can't be used: Not a directory"):
        opened(tmp_path / "file")
    with pytest.raises(SettingsError, match="directory"):
        open_authority({"provider": "embedded", "embedded": {"directory": ""}})
    with pytest.raises(CAError, match="~nobody-here/ca: no home directory is known for ~nobody-here"):
        opened(Path("~nobody-here/ca"))
    assert not Path("~nobody-here").exists()


@pytest.mark.parametrize(("mode", "who"), [(0o777, "every user"), (0o770, "its group")])
def test_a_directory_whose_ca_others_could_replace_is_refused(tmp_path: Path, mode: int, who: str) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(CAError, match=rf"{who} can replace .* \(mode {mode:04o}\)"):
        opened(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(tmp_path, 7, 7)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CAError, match=r"the user \d+, whom it belongs to, can replace"):
        opened(tmp_path)
