"""The observer ``audit-log``: a line of JSON for each certificate issued, refused or revoked.

docs/audit-log.md describes the format.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from firebuild_pki.errors import CAError
from firebuild_pki.homes import own_directory
from firebuild_pki.hookspecs import hookimpl
from firebuild_pki.names import user_name
from firebuild_pki.provider import CAEvent
from firebuild_pki.settings import Settings

FORMAT = 1
"""Version of the lines; new fields do not change it."""

MAX_REASON = 4000
"""Upper bound of the characters of a reason: some backends answer with whole web pages."""

# O_NOFOLLOW: a planted link must not redirect our lines into another file of this user.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY


class AuditLogSettings(Settings):
    """Settings of ``ca.audit-log``."""

    path: str | None = None
    """File that the lines are added to; by default firebuild/ca-audit.jsonl in the user's state directory."""

    @property
    def file(self) -> Path:
        """Where the lines go; raises `CAError` where there is no such place."""
        if self.path is not None:
            from firebuild_pki.pem_files import expanded

            return Path(expanded(self.path))
        import platformdirs

        found = own_directory(platformdirs.user_state_dir)
        if found is None:
            hint = "set ca.audit-log.path"
            raise CAError(
                "there is no directory for the audit log: this user has no home directory", hint=hint
            )
        return found / "ca-audit.jsonl"


@hookimpl
def ca_observer_settings() -> type[AuditLogSettings]:
    """Name the model of the block ``ca.audit-log``."""
    return AuditLogSettings


@hookimpl
def ca_event(event: CAEvent, settings: AuditLogSettings) -> None:
    """Add the event to the log.

    Raises:
        CAError: the line cannot be written.
    """
    append(settings.file, line_of(event))


def line_of(event: CAEvent) -> bytes:
    """Write an event as one line: ASCII, so that no name or reason can break it or a terminal."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "time": _written(event.time),
        "kind": event.kind,
        "build_id": event.build_id,
        "provider": event.provider,
        "user": user_name(),
        "host": socket.gethostname(),
        "profile": event.profile,
        "names": event.names,
        "serial": event.serial,
        "fingerprint_sha256": event.fingerprint_sha256,
        "not_before": _written(event.not_before),
        "not_after": _written(event.not_after),
        "reason": event.reason and event.reason[:MAX_REASON],
        "labels": dict(event.labels),
        "signature_algorithm": event.signature_algorithm,
    }
    return json.dumps(fields, ensure_ascii=True).encode("ascii") + b"\n"


def append(path: Path, line: bytes) -> None:
    """Add a line to a file, in one write; the file and its directories are made where they are missing.

    The file is opened for each line, so it may be rotated at any time.

    Args:
        path: the file, readable by its owner alone if it is new. Not a symbolic link; directories
            on the way may be.
        line: with the newline at its end.

    Raises:
        CAError: it cannot be done.
    """
    with _explained(path):
        _make_directories(path.parent)
        descriptor = os.open(path, _FLAGS, 0o600)
        try:
            _write(descriptor, line)
        finally:
            os.close(descriptor)


def _write(descriptor: int, line: bytes) -> None:
    found = os.fstat(descriptor)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISCHR(found.st_mode)):
        raise OSError(errno.EINVAL, "expected a file")
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # or the end of the file may be in the middle of another's line
    found = os.fstat(descriptor)
    if found.st_size and os.pread(descriptor, 1, found.st_size - 1) != b"\n":
        line = b"\n" + line  # the disk was full in the middle of the line before
    written = os.write(descriptor, line)
    if written < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _make_directories(path: Path) -> None:
    for directory in reversed([path, *path.parents]):
        if not directory.exists():
            directory.mkdir(0o700, exist_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what, hint = error.strerror, "look at ca.audit-log.path"
        if error.errno == errno.ELOOP:
            what, hint = "it is a symbolic link", "name the file that it leads to in ca.audit-log.path"
        raise CAError(f"cannot write the audit log {path}: {what}", hint=hint) from error


def _written(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
