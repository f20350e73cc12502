"""The events of a build: the one stream that renderers and library users see.

Every event becomes one JSON object with `--progress rawjson`: `{"event": <type>, "time": <RFC 3339>, ...}`
with the fields of the class. Within a `SCHEMA`, kinds and fields are only ever added.
"""

from __future__ import annotations

import base64
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field, fields
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Literal

from firebuild_pki.display import escaped
from firebuild_pki.values import dataclass

SCHEMA: Final = 1
"""Version of what events look like; it grows when a kind or a field goes, or means something else."""

_MEASURE_SECONDS: Final = 0.5
# Kept of the output of each step.
_KEPT_BYTES: Final = 16 * 1024
_KEPT_LINES: Final = 15


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened; `time` is in UTC."""

    type: ClassVar[str] = "event"
    time: datetime = field(default_factory=_now)

    def as_json(self) -> dict[str, Any]:
        """Return the event as JSON-ready values; bytes as UTF-8 text, or base64 where they are none."""
        document: dict[str, Any] = {"event": self.type}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, datetime):
                value = value.isoformat(timespec="milliseconds")
            if isinstance(value, tuple):
                value = list(value)
            if isinstance(value, bytes):
                document.update(_json_bytes(entry.name, value))
                continue
            document[entry.name] = value
        return document


def _json_bytes(name: str, value: bytes) -> dict[str, str]:
    try:
        return {name: value.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode("ascii")}


EventSink = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class StreamStarted(Event):
    """The first line of `--progress rawjson`: `schema` is the version of all that follows.

    Within a version, kinds and fields are only ever added; another number is for what goes, or changes its
    meaning.
    """

    type: ClassVar[str] = "stream-started"
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class BuildStarted(Event):
    """The plan is made; nothing has been started yet."""

    type: ClassVar[str] = "build-started"
    build_id: str
    tag: str
    steps: int
    base: str
    ca_provider: str


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """One of the seven steps of the build itself began (`phase` 1 to 7)."""

    type: ClassVar[str] = "phase-started"
    phase: int
    name: str


@dataclass(frozen=True, kw_only=True)
class TaskStarted(Event):
    """Work that may take a while began, inside a phase or a step; `task` is its number in the build.

    `total_bytes` is how much there is to do, 0 where that is not known.
    """

    type: ClassVar[str] = "task-started"
    task: int
    name: str
    total_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskProgress(Event):
    """So many bytes of a task are done; comes now and then, and only for tasks that can be measured."""

    type: ClassVar[str] = "task-progress"
    task: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class TaskFinished(Event):
    """A task ended, well or not; `bytes` is 0 where they are not known."""

    type: ClassVar[str] = "task-finished"
    task: int
    seconds: float
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StageStarted(Event):
    """A stage begins on a machine of its own; `step` is its FROM.

    `stage` is its name or index, empty where the build has one stage only. Stages that do not need each other
    run side by side, and their events mix.
    """

    type: ClassVar[str] = "stage-started"
    stage: str
    step: int


@dataclass(frozen=True, kw_only=True)
class StageFinished(Event):
    """All steps of a stage have succeeded, and its machine has stopped."""

    type: ClassVar[str] = "stage-finished"
    stage: str
    step: int


@dataclass(frozen=True, kw_only=True)
class StepStarted(Event):
    """The guest began a step of the Dockerfile; `step` counts from 1 through all stages."""

    type: ClassVar[str] = "step-started"
    step: int
    total: int
    instruction: str
    line: int
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class StepCached(Event):
    """A step need not be executed: its result is in the cache.

    `origin` is the remote cache that another machine has put it into; empty for that of the store.
    """

    type: ClassVar[str] = "step-cached"
    step: int
    total: int
    instruction: str
    line: int
    stage: str = ""
    origin: str = ""


@dataclass(frozen=True, kw_only=True)
class StepOutput(Event):
    """A piece of what a step wrote, exactly as it was written; pieces break anywhere."""

    type: ClassVar[str] = "step-output"
    step: int
    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True, kw_only=True)
class StepProgress(Event):
    """So many bytes of the files of a step have been sent to the guest; comes now and then."""

    type: ClassVar[str] = "step-progress"
    step: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StepFinished(Event):
    """A step ended; `exit_code` is 0 on success."""

    type: ClassVar[str] = "step-finished"
    step: int
    exit_code: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something the user should know and that does not end the build.

    It belongs into the output of `step`; 0 where it is of none.
    """

    type: ClassVar[str] = "notice"
    level: Literal["info", "warning"]
    message: str
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class GuestConnected(Event):
    """The guest made its first authenticated call.

    `key_exchange` is the group of the key exchange, empty where TLS 1.2 was spoken; `X25519MLKEM768` is safe
    from quantum computers.
    """

    type: ClassVar[str] = "guest-connected"
    peer: str
    tls_version: str
    key_exchange: str = ""


@dataclass(frozen=True, kw_only=True)
class PeerRefused(Event):
    """A connection or call was refused; subject and fingerprint are empty where no certificate came."""

    type: ClassVar[str] = "peer-refused"
    peer: str
    reason: str
    subject: str = ""
    fingerprint_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageStored(Event):
    """The image is complete in the store.

    `path`, `size` and `digest` are those of the first output that was asked for. Without any they are the
    image's directory, the bytes of its layers, and empty: to find out the id of an image takes time.
    """

    type: ClassVar[str] = "image-stored"
    tag: str
    path: str
    size: int
    digest: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BuildFailed(Event):
    """The build ended without an image; `exit_status` is the status of the command.

    `message` has all that there is to say, the last lines of the failed step included, which are `output`.
    """

    type: ClassVar[str] = "build-failed"
    exit_status: int
    error: str
    message: str
    step: int = 0
    exit_code: int | None = None
    output: tuple[str, ...] = ()


class EventBus:
    """The one place that all events of a build go through: it serialises them for their consumer.

    The build's threads and those of its servers produce events concurrently. The bus also keeps the end of
    each step's output, for the error of a step that fails.

    Args:
        consumer: receives one event at a time. It may produce events itself.
    """

    def __init__(self, consumer: EventSink) -> None:
        self._consumer = consumer
        self._lock = threading.RLock()
        self._tails: defaultdict[int, bytes] = defaultdict(bytes)

    def __call__(self, event: Event) -> None:
        """Pass one event on, from any thread."""
        with self._lock:
            if isinstance(event, StepOutput):
                self._tails[event.step] = (self._tails[event.step] + event.data)[-_KEPT_BYTES:]
            self._consumer(event)

    def last_lines(self, step: int) -> list[str]:
        """Return the last lines of a step, fit for a message."""
        text = self._tails[step].decode("utf-8", "surrogateescape")
        return [escaped(line.expandtabs()) for line in text.splitlines()[-_KEPT_LINES:]]


@dataclass(frozen=True)
class StepInfo:
    """What the events say about a step: its number, its line in the Dockerfile, its text."""

    number: int
    line: int
    instruction: str


class Tasks:
    """Reports the progress of long work.

    Args:
        events: receives the events; an exception of it during a task does not end the task.
    """

    def __init__(self, events: EventSink = lambda _: None) -> None:
        self._events = events
        self._numbers = itertools.count(1)

    @contextmanager
    def task(self, name: str, *, total: int = 0, measure: Callable[[], int] | None = None) -> Iterator[None]:
        """Report one piece of work, from the beginning of the block to its end.

        Args:
            name: what is done, as `packing rootfs.tar`.
            total: bytes that there are to do, if that is known.
            measure: returns the bytes done so far; called twice a second in a separate thread.
        """
        number = next(self._numbers)
        began = time.monotonic()
        self._events(TaskStarted(task=number, name=name, total_bytes=total))
        ended = threading.Event()
        meter = None
        if measure is not None:
            arguments = (number, measure, ended)
            meter = threading.Thread(target=self._measure, args=arguments, name="meter", daemon=True)
            meter.start()
        try:
            yield
        finally:
            done = _measured(measure)
            ended.set()
            if meter is not None:
                meter.join()
            self._events(TaskFinished(task=number, seconds=time.monotonic() - began, bytes=done))

    def warn(self, message: str) -> None:
        """Say something that does not end the work."""
        self._events(Notice(level="warning", message=message))

    def _measure(self, number: int, measure: Callable[[], int], ended: threading.Event) -> None:
        while not ended.wait(_MEASURE_SECONDS):
            try:
                self._events(TaskProgress(task=number, bytes=_measured(measure)))
            except Exception:
                return  # the next event of the build's own thread fails the same way


def _measured(measure: Callable[[], int] | None) -> int:
    try:
        return 0 if measure is None else measure()
    except OSError:  # not there yet, or not there any more
        return 0
