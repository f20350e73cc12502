"""Whether a finished image answers, before it is stored: `firebuild build --ready` (docs/ready.md).

The image is booted as `firebuild run` boots it, and a command is executed beside its own, as Docker does for
HEALTHCHECK (https://docs.docker.com/reference/dockerfile/#healthcheck).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.errors import GuestLost, InputError, NotReady, StepFailed
from firebuild_bootstrap.events import Event, EventSink, Notice, StepOutput
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.config import Healthcheck, ImageConfig
from firebuild_bootstrap.image.layertrees import Layer
from firebuild_bootstrap.running import RunRequest, command_of, run_layers
from firebuild_bootstrap.wire import Attach
from firebuild_pki.display import counted, escaped, one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.settings import BuildSettings

_SHELL: Final = ("/bin/sh", "-c")
_NANO: Final = 1e9
_FIRST_PAUSE: Final = 0.5
_CONSOLE_BYTES: Final = 16 * 1024
_CONSOLE_LINES: Final = 20
_OUTPUT: Final = 400


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Which command is executed, and when, in seconds; the defaults are Docker's.

    Args:
        argv: exit status 0 is an answer.
        interval: from the end of one to the begin of the next.
        timeout: after which one is killed, and has failed.
        retries: how many have to fail in a row.
        start_period: those that begin within it may fail.
        start_interval: instead of `interval` within it.
    """

    argv: tuple[str, ...]
    interval: float = 30.0
    timeout: float = 30.0
    retries: int = 3
    start_period: float = 0.0
    start_interval: float = 5.0


def checks_of(asked: Healthcheck, config: ImageConfig) -> Checks:
    """Return what is to be done.

    Args:
        asked: what the user asks for; what is empty or 0 there is that of the image.
        config: of the image.

    Raises:
        InputError: neither of them names a command.
    """
    own = config.healthcheck or Healthcheck(())
    kind, *words = asked.test or own.test or ("NONE",)
    if kind == "CMD-SHELL":
        words = [*(config.shell or _SHELL), *words]
    if kind not in ("CMD", "CMD-SHELL") or not words:
        raise InputError(
            "--ready: the image has no HEALTHCHECK", hint="name a command: --ready='curl -f localhost'"
        )

    def either(name: str) -> int:
        found: int = getattr(asked, name) or getattr(own, name)
        return found

    default = Checks(argv=())
    return Checks(
        argv=tuple(words),
        interval=either("interval_ns") / _NANO or default.interval,
        timeout=either("timeout_ns") / _NANO or default.timeout,
        retries=either("retries") or default.retries,
        start_period=either("start_period_ns") / _NANO,
        start_interval=either("start_interval_ns") / _NANO or default.start_interval,
    )


def check_request(name: str, asked: Healthcheck, config: ImageConfig, settings: BuildSettings) -> None:
    """Find out before the build what would be wrong after it.

    Raises:
        InputError: there is nothing to be booted, or nothing to boot it in, or nothing to ask it.
    """
    if settings.machine.driver == "external":
        raise InputError(
            "--ready starts a machine, which the driver external can't",
            hint="use --machine local, qemu or firecracker",
        )
    checks_of(asked, config)
    command_of(RunRequest(image=name), config)


class Schedule:
    """When a check begins, and what a failure of it means. It does nothing, and has no clock of its own.

    Docker's first check begins when an interval has passed. Until then the image is asked as well, at once
    and after growing pauses, because its answer is what the build waits for; those may fail.

    Args:
        checks: what is asked for.
        now: when the image's command began.
    """

    def __init__(self, checks: Checks, now: float) -> None:
        self._checks = checks
        self._began = now
        self._check_began = now
        self._counts = False
        self._due = now + (checks.start_interval if checks.start_period else checks.interval)
        self._early = now
        self._pause = _FIRST_PAUSE / 2
        self.failures = 0
        """How many have failed in a row, of those that count."""

    def begins(self, now: float) -> bool:
        """Whether a check begins now."""
        self._counts = now >= self._due
        self._check_began = now
        return self._counts or now >= self._early

    def is_late(self, now: float) -> bool:
        """Whether the check at work has taken too long."""
        return now - self._check_began > self._checks.timeout

    def failed(self, now: float) -> bool:
        """A check has failed; return whether that was the last."""
        if not self._counts:
            self._pause *= 2
            self._early = now + self._pause
            return False
        self._early = float("inf")
        starting = self._checks.start_period
        if self._check_began - self._began >= starting:
            self.failures += 1
        within = now - self._began < starting
        self._due = now + (self._checks.start_interval if within else self._checks.interval)
        return self.failures >= self._checks.retries


class _Answered(Exception):
    """The image has answered."""


class _Conversation:
    """Asks the image, from the thread that waits for its command."""

    def __init__(self, checks: Checks, events: EventSink) -> None:
        from firebuild_bootstrap.service.console import Console

        self.console = Console(begun=self._starts, probed=self._ended)
        self._checks = checks
        self._events = events
        self._schedule: Schedule | None = None
        self._asking = False
        self._killed = False
        self._result: tuple[int, bytes] | None = None
        self._tail = b""

    def _starts(self) -> None:
        self._schedule = Schedule(self._checks, time.monotonic())

    def _ended(self, status: int, output: bytes) -> None:
        self._result = (status, output)

    def take(self, event: Event) -> None:
        """Keep the end of what the image writes; pass warnings on."""
        match event:
            case StepOutput():
                self._tail = (self._tail + event.data)[-_CONSOLE_BYTES:]
            case Notice(level="warning"):
                self._events(event)

    def check(self) -> None:
        """Do what is due.

        Raises:
            _Answered: a check has succeeded.
            NotReady: as many as may fail have.
        """
        if (schedule := self._schedule) is None:
            return
        now = time.monotonic()
        if self._result is not None:
            (status, output), self._result = self._result, None
            self._asking, killed = False, self._killed
            if not status and not killed:
                raise _Answered
            if schedule.failed(now):
                how = (
                    f"took longer than {self._checks.timeout:g}s" if killed else f"ended with status {status}"
                )
                said = one_line(output.decode("utf-8", "replace").strip(), _OUTPUT)
                times = f"{counted(schedule.failures, 'check')} in a row failed, and the last"
                which = times if schedule.failures > 1 else "the check"
                raise NotReady(
                    f"the image does not answer: {which} {how}{said and ': '}{said}",
                    hint="--ready-start-period and --ready-retries give it longer; "
                    "`firebuild run NAME` tries one that was built without --ready",
                )
        elif self._asking:
            if not self._killed and schedule.is_late(now):
                self._killed = True
                self.console.probe(())
        elif schedule.begins(now):
            self._asking, self._killed = True, False
            self.console.probe(self._checks.argv)

    def with_console(self, message: str) -> str:
        """Return a message with what the image has written last."""
        lines = self._tail.decode("utf-8", "surrogateescape").splitlines()[-_CONSOLE_LINES:]
        if not lines:
            return f"{message}\n  its command has written nothing"
        shown = "\n".join(f"    {escaped(line.expandtabs())}" for line in lines)
        return f"{message}\n  the end of its console:\n{shown}"


def await_answer(
    layers: Sequence[Layer],
    config: ImageConfig,
    asked: Healthcheck,
    *,
    name: str,
    settings: BuildSettings,
    home: Home,
    events: EventSink,
) -> float:
    """Boot an image in a machine of its own until it answers; return after how many seconds.

    Args:
        layers: what it is made of, the lowest first; held by the caller.
        config: its configuration.
        asked: see `checks_of`.
        name: its tag.
        settings: of the build.
        home: as `run_image`.
        events: receives warnings.

    Raises:
        NotReady: it does not answer, or its command ended before it did.
        GuestLost: its machine ended.
        FirebuildError: the machine could not be started.
        Interrupted: `home.check` raised it.
        firebuild_pki.CAError: the provider issued no usable certificates.
    """
    talk = _Conversation(checks_of(asked, config), events)
    # On this host's network a port of the image could be somebody else's, and so could the answer.
    hosts = settings.machine.driver == "local" and settings.machine.local.network == "host"
    network = "none" if hosts else "default"
    request = RunRequest(image=name, attach=Attach(probed=True), network=network)
    began = time.monotonic()
    try:
        with closing(home.limited(talk.check)) as own, home.tasks.task("waiting until the image answers"):
            status = run_layers(
                layers,
                config,
                request=request,
                settings=settings,
                home=own,
                console=talk.console,
                events=talk.take,
            )
    except _Answered:
        return time.monotonic() - began
    except NotReady as error:
        raise NotReady(talk.with_console(error.message), hint=error.hint) from None
    except StepFailed as error:
        raise NotReady(
            f"the command of the image can't be executed: {error.message}",
            hint="correct ENTRYPOINT and CMD; --target names another stage",
        ) from error
    except GuestLost as error:
        raise GuestLost(talk.with_console(error.message), hint=error.hint) from error
    raise NotReady(
        talk.with_console(f"the command of the image ended with status {status} before it answered")
    )
