"""The copy of the serial console."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.machine.console import BoundedLog, check_copy, copied, open_copy

SETTING = "machine.qemu.serial_log"


def piped(data: bytes) -> IO[bytes]:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(data)
    return os.fdopen(reading, "rb")


def test_a_home_that_nobody_has_is_a_directory_that_is_not_there() -> None:
    with pytest.raises(InputError, match=f"{SETTING}: ~nobody-here/log can't be written: No such file"):
        open_copy("~nobody-here/log", SETTING)


def test_all_of_it_is_copied_while_it_is_read(tmp_path: Path) -> None:
    log = BoundedLog(copied(piped(b"one\ntwo\n"), open_copy(str(tmp_path / "serial"), SETTING)))
    log.finish(10)
    assert log.text() == "one\ntwo\n"
    assert (tmp_path / "serial").read_text() == "one\ntwo\n"


def test_the_copy_ends_at_its_limit_and_the_machine_does_not(tmp_path: Path) -> None:
    data = bytes(range(256)) * 200
    with copied(piped(data), open_copy(str(tmp_path / "serial"), SETTING), limit=5000) as reader:
        assert reader.read() == data
    assert (tmp_path / "serial").read_bytes() == data[:5000]


def test_of_a_console_without_end_the_end_and_a_bounded_copy_are_kept(tmp_path: Path) -> None:
    data = b"".join(b"line %07d\n" % number for number in range(1_500_000))
    (tmp_path / "said").write_bytes(data)
    log = BoundedLog(copied((tmp_path / "said").open("rb"), open_copy(str(tmp_path / "serial"), SETTING)))
    log.finish(60)
    assert 60_000 < len(log.text()) <= 64 << 10
    assert log.text().endswith("line 1499999\n")
    assert (tmp_path / "serial").stat().st_size == 16 << 20


def test_a_disk_without_space_does_not_stop_the_machine() -> None:
    with copied(piped(b"words"), open_copy("/dev/full", SETTING)) as reader:
        assert reader.read() == b"words"


def test_without_a_name_nothing_is_copied() -> None:
    check_copy(None, SETTING)
    with piped(b"words") as source:
        assert copied(source, open_copy(None, SETTING)) is source


def test_a_file_that_can_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    check_copy("~/serial", SETTING)
    assert (tmp_path / "serial").exists()
    with pytest.raises(InputError, match=r"machine\.qemu\.serial_log: .*/gone/serial can't be written"):
        check_copy(str(tmp_path / "gone/serial"), SETTING)
