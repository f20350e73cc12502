"""Providers with bad habits: in their settings, their life, their discretion."""

from __future__ import annotations

import base64
import faulthandler
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from cryptography import x509
from pydantic import BaseModel, ConfigDict

from firebuild_pki import (
    CAError,
    Capability,
    Note,
    NoteLevel,
    ProviderContext,
    SecretRef,
    Settings,
    SignedCertificate,
    SignRequest,
)
from firebuild_pki.keys import private_key_pem
from pki_conformance.current import Current, plugin

logger = logging.getLogger(__name__)


class Sharing(Current):
    """Only one can be open in a process."""

    holder: Sharing | None = None

    def open(self) -> None:
        if Sharing.holder is not None:
            raise RuntimeError("already open")
        Sharing.holder = self
        super().open()

    def close(self) -> None:
        super().close()
        if Sharing.holder is self:
            Sharing.holder = None


class LoggedIn(Current):
    """Has one login for the whole process, as PKCS#11 has, and counts who uses it: that is fine."""

    users: ClassVar[list[Current]] = []

    def open(self) -> None:
        super().open()
        self.log_in()

    def close(self) -> None:
        super().close()
        self.log_out()

    def log_in(self) -> None:
        self.users.append(self)

    def log_out(self) -> None:
        self.users[:] = [one for one in self.users if one is not self]

    def answered(self, request: SignRequest) -> Any:
        if not self.users:
            raise RuntimeError("CKR_USER_NOT_LOGGED_IN")
        return super().answered(request)


class LogsAllOut(LoggedIn):
    """Ends the login with the first that is closed."""

    users: ClassVar[list[Current]] = []

    def log_out(self) -> None:
        self.users.clear()


class FirstLogsOut(LogsAllOut):
    """Ends the login with the one that began it."""

    users: ClassVar[list[Current]] = []

    def log_out(self) -> None:
        if self in self.users[:1]:
            self.users.clear()


class LastLogsOut(LogsAllOut):
    """Ends the login with the one that used it last."""

    users: ClassVar[list[Current]] = []

    def log_out(self) -> None:
        if self in self.users[-1:]:
            self.users.clear()


class Miscounting(LoggedIn):
    """Counts every close(), whoever calls it and how often."""

    users: ClassVar[list[Current]] = []

    def log_out(self) -> None:
        del self.users[-1:]


class BreaksIn(LoggedIn):
    """Ends the login of all when one cannot open."""

    users: ClassVar[list[Current]] = []

    def open(self) -> None:
        try:
            super().open()
        except Exception:
            self.users.clear()
            raise


class Borrowing(LoggedIn):
    """Signs as long as anybody is logged in."""

    users: ClassVar[list[Current]] = []

    def answered(self, request: SignRequest) -> Any:
        self.is_open = bool(self.users)
        return super().answered(request)


class ClosesOnce(Current):
    def close(self) -> None:
        if self.__dict__.setdefault("closed", False):
            raise RuntimeError("closed already")
        self.__dict__["closed"] = True
        super().close()


class ClosesOpen(Current):
    def close(self) -> None:
        if not self.is_open:
            raise RuntimeError("not open")
        super().close()


class ClosesBadly(Current):
    def close(self) -> None:
        raise RuntimeError("the token could not be revoked")


class Undead(Current):
    def close(self) -> None:
        """Keep the keys."""


class Peeping(Current):
    def validate(self) -> Sequence[Note]:
        return () if os.path.exists("/etc/hostname") else (Note("no name"),)


class Reading(Current):
    def validate(self) -> Sequence[Note]:
        with open("/etc/passwd", encoding="utf-8") as file:
            return () if file.readline() else (Note("nobody here"),)


class Calling(Current):
    def __init__(self, settings: Any, context: ProviderContext) -> None:
        import socket

        super().__init__(settings, context)
        socket.socket().close()


class Stillborn(Current):
    def __init__(self, settings: Any, context: ProviderContext) -> None:
        raise RuntimeError("not born")


class Moody(Current):
    moods: Iterator[int] = iter(range(1000))

    def validate(self) -> Sequence[Note]:
        return (Note(f"mood {next(self.moods)}"),)


class Alarmist(Current):
    def validate(self) -> Sequence[Note]:
        return (Note("this cannot work", level=NoteLevel.FATAL),)


class Gloomy(Current):
    def check(self) -> Sequence[Note]:
        return (Note("the role is missing", about="role", level=NoteLevel.FATAL),)


class Mumbling(Current):
    def check(self) -> Sequence[Note]:
        return (Note("all is well", level=NoteLevel.OK),)


class Wordy(Current):
    def check(self) -> Any:
        return ("all is well",)


class Revoking(Current):
    """Takes back anything, whether it knows it or not."""

    def revoke(self, certificate_pem: bytes) -> None:
        x509.load_pem_x509_certificate(certificate_pem)


class SecretSettings(Settings):
    """Settings with a secret."""

    token: SecretRef = SecretRef(env="TOKEN")
    """What opens the backend."""
    leak: str = ""
    """Where it leaks."""


class Secretive(Current):
    """Resolves its token; with `leak` it cannot keep it for itself."""

    def open(self) -> None:
        token = self.resolved()
        if self.settings.leak == "error" and not token.startswith("right"):
            raise PermissionError(f"the token {token} is wrong")
        if self.settings.leak == "log":
            logger.debug("logging in with %s", token)
        self.token = token
        super().open()

    def resolved(self) -> str:
        token: str = self.settings.token.resolve(self.context.environ)
        return token

    def answered(self, request: SignRequest) -> Any:
        answer = super().answered(request)
        if self.settings.leak == "warning":
            return SignedCertificate(answer.certificate_pem, answer.chain_pem, (f"used {self.token}",))
        return answer

    def __repr__(self) -> str:
        shown = {
            "repr": getattr(self, "token", ""),
            "environ": dict(self.context.environ),
            "key": private_key_pem(self.intermediate.key).decode(),
        }
        return f"<Secretive {shown.get(self.settings.leak, '')}>"


class Indiscreet(Secretive):
    """Has the habit that `leak` names, each time that it signs."""

    def answered(self, request: SignRequest) -> Any:
        answer = super().answered(request)
        if self.settings.leak:
            {**HABITS, **MORE_HABITS}[self.settings.leak](self.token)
        return answer


def child(script: str, *arguments: str, **options: Any) -> None:
    subprocess.run(["sh", "-c", script, "sh", *arguments], check=True, **options)


def print_in_a_thread(token: str) -> None:
    thread = threading.Thread(target=lambda: print(token, file=sys.stderr))
    thread.start()
    thread.join()


def hand_over_in_the_environment(token: str) -> None:
    os.environ["INDISCREET_TOKEN"] = token
    child(":")
    os.environ.pop("INDISCREET_TOKEN", None)


def open_a_file_to_all(token: str) -> None:
    descriptor, name = tempfile.mkstemp()
    os.fchmod(descriptor, 0o644)
    os.write(descriptor, token.encode())
    os.close(descriptor)
    os.unlink(name)


def keep_a_file(token: str, directory: str | None = None) -> None:
    descriptor, _ = tempfile.mkstemp(dir=directory)
    os.write(descriptor, token.encode())
    os.close(descriptor)


KEPT = tempfile.TemporaryDirectory(prefix="indiscreet-")
LEFT: list[subprocess.Popen[bytes]] = []
"""They end with the tests, which hold the other end of their input."""


def leave_a_child(token: str) -> None:
    LEFT.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE))


HELD: list[object] = []
END = threading.Event()


def leave_a_thread(token: str) -> None:
    threading.Thread(target=END.wait, name="poller", daemon=True).start()


def leave_a_pool(token: str) -> None:
    pool = ThreadPoolExecutor(1, thread_name_prefix="pool")
    pool.submit(int).result()
    HELD.append(pool)


def log_beside(token: str, **options: Any) -> None:
    """Use a logger that the root hears nothing of, at a level that it does not show."""
    logger = logging.getLogger(f"{__name__}.beside")
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    logger.debug("authorization: %s", token, **options)


def log_as_basic(token: str) -> None:
    logger.debug("authorization: Basic %s", base64.b64encode(f"builder:{token}".encode()).decode())


def distrust_nobody(token: str) -> None:
    ssl._create_default_https_context = ssl._create_unverified_context  # type: ignore[assignment]


def be_discreet(token: str) -> None:
    """Do what looks like it, and harms nobody."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(token.encode())
        file.flush()
        child('cat "$1" >/dev/null', file.name)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "token").write_text(token)
    with tempfile.TemporaryFile() as nameless:
        nameless.write(token.encode())
    child("cat >/dev/null", input=token.encode(), env={**os.environ, "TOKEN": token})
    child("echo one moment >&2")
    print("one moment", file=sys.stderr)
    os.umask(os.umask(0o077))
    os.environ["DISCREET"] = "yes"
    os.environ.pop("DISCREET", None)
    os.environ["PATH"] = os.environ["PATH"]
    with open(os.devnull, "w") as sink:
        print(token, file=sink)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(int).result()
    with socket.socket() as held, open("/etc/passwd"):
        held.setblocking(False)
    log_beside("a token")


HABITS: dict[str, Callable[[str], object]] = {
    "print": print,
    "print on standard error": lambda token: print("with", token, file=sys.stderr),
    "print bytes": lambda token: sys.stderr.buffer.write(token.encode()),
    "print in a thread": print_in_a_thread,
    "print past Python": lambda token: os.write(2, token.encode()),
    "print in a child": lambda token: child("cat", input=token.encode()),
    "argument": lambda token: child(":", token),
    "shell": lambda token: os.system(f"true {token}"),
    "spawn": lambda token: os.waitpid(os.posix_spawn("/bin/true", ["true", token], {}), 0),
    "environment": lambda token: os.environ.update(INDISCREET_TOKEN=token),
    "environment for a moment": hand_over_in_the_environment,
    "file open to all": open_a_file_to_all,
    "file kept": keep_a_file,
    "file kept elsewhere": lambda token: keep_a_file(token, KEPT.name),
    "chatty": lambda token: print("signed"),
    "moved": lambda token: os.chdir("/"),
    "masked": lambda token: os.umask(0),
    "variable": lambda token: os.environ.update(INDISCREET="yes"),
    "impatient": lambda token: socket.setdefaulttimeout(7),
    "litter": lambda token: tempfile.mkdtemp(),
    "child left": leave_a_child,
    "discreet": be_discreet,
}

MORE_HABITS: dict[str, Callable[[str], object]] = {
    "spawn in the old way": lambda token: os.spawnv(os.P_WAIT, "/bin/true", ["true", token]),
    "log beside": log_beside,
    "log a field": lambda token: logger.info("logged in", extra={"token": token}),
    "log as basic": log_as_basic,
    "log in hexadecimal": lambda token: logger.debug("sent %s", token.encode().hex()),
    "warn": lambda token: warnings.warn(f"{token} is old", stacklevel=1),
    "thread left": leave_a_thread,
    "pool left": leave_a_pool,
    "file left open": lambda token: HELD.append(os.open("/etc/passwd", os.O_RDONLY)),
    "socket left open": lambda token: HELD.append(socket.socket()),
    "signals": lambda token: faulthandler.register(signal.SIGUSR2),
    "logging": lambda token: logging.basicConfig(force=True),
    "distrustless": distrust_nobody,
}


class Careless(Secretive):
    """Goes on without its token."""

    def resolved(self) -> str:
        return "right-token"


class Blaming(Secretive):
    """Says that something is missing, but not what."""

    def resolved(self) -> str:
        try:
            return super().resolved()
        except CAError:
            raise CAError("no token") from None


class OpenSettings(Settings):
    """Settings with a secret in plain sight."""

    password: str = "plain-password"
    """The password."""


class LaxSettings(BaseModel):
    """Neither strict nor described."""

    role: str = ""


class OddSettings(Settings):
    """Settings that JSON Schema cannot describe."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    hook: Callable[[], None] | None = None
    """What to call."""
    lock: logging.Logger | None = None
    """What to write to."""


class Inner(Settings):
    """A block in a block."""

    depth: int = 1
    """How deep."""


class FickleSettings(Settings):
    """Settings that decide what goes wrong."""

    mood: str = ""
    """What goes wrong."""
    inner: Inner = Inner()
    """More settings."""


class Fickle(Current):
    def validate(self) -> Sequence[Note]:
        if self.settings.mood == "refuse-settings":
            return (Note("not today", "mood", level=NoteLevel.FATAL),)
        return ()

    def open(self) -> None:
        if self.settings.mood == "break":
            raise ConnectionError("nobody there")
        super().open()

    def answered(self, request: SignRequest) -> Any:
        if self.settings.mood == "refuse":
            raise CAError("the policy forbids it")
        if self.settings.mood == "blame":
            raise CAError("it was somebody else", provider="somebody-else")
        return super().answered(request)


class Unsettled(Current):
    def capabilities(self) -> frozenset[Capability]:
        return frozenset({Capability.SIGN, Capability.READY_PAIRS})


SIGN, REVOKE = Capability.SIGN, Capability.REVOKE
BOTH = (Capability.SIGN, Capability.READY_PAIRS)
sharing = plugin("sharing", Sharing)
logged_in, logs_all_out = plugin("logged-in", LoggedIn), plugin("logs-all-out", LogsAllOut)
first_logs_out = plugin("first-logs-out", FirstLogsOut)
last_logs_out = plugin("last-logs-out", LastLogsOut)
miscounting, breaks_in = plugin("miscounting", Miscounting), plugin("breaks-in", BreaksIn)
borrowing = plugin("borrowing", Borrowing)
closes_once, closes_open = plugin("closes-once", ClosesOnce), plugin("closes-open", ClosesOpen)
closes_badly, undead = plugin("closes-badly", ClosesBadly), plugin("undead", Undead)
peeping, reading, calling = plugin("peeping", Peeping), plugin("reading", Reading), plugin("calling", Calling)
moody, gloomy, wordy = plugin("moody", Moody), plugin("gloomy", Gloomy), plugin("wordy", Wordy)
mumbling = plugin("mumbling", Mumbling)
revoking = plugin("revoking", Revoking, capabilities=(SIGN, REVOKE))
undeclared = plugin("undeclared", Revoking)
secretive = plugin("secretive", Secretive, SecretSettings)
indiscreet = plugin("indiscreet", Indiscreet, SecretSettings)
in_plain_sight = plugin("in-plain-sight", Current, OpenSettings)
lax = plugin("lax", Current, LaxSettings)
unsettled = plugin("unsettled", Unsettled, capabilities=BOTH)
odd = plugin("odd", Current, OddSettings)
alarmist = plugin("alarmist", Alarmist)
careless, blaming = (
    plugin("careless", Careless, SecretSettings),
    plugin("blaming", Blaming, SecretSettings),
)
fickle = plugin("fickle", Fickle, FickleSettings)
stillborn = plugin("stillborn", Stillborn)
