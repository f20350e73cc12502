"""The runs that were started with `--detach`: which there are, what they have written, how they ended.

Each has a directory `<store>/runs/ID`, which its process holds locked for as long as it lives: whether a run
goes on is asked of the kernel, so that no crash and no power cut leaves one that seems to. In it are

    run.json        what runs, and since when        output     what it has written (a record a line)
    ended.json      how it ended                      output.1   what it wrote before that
    watched         locked, shared, by those who want its end and all of its output: a run that removes
                    itself waits for them
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from firebuild_bootstrap.errors import MALFORMED, InputError, MachineError, remedy_of
from firebuild_bootstrap.image.content_store import files_in, lock_file
from firebuild_bootstrap.machine.cleanup import LOCK, own
from firebuild_bootstrap.removal import remove_tree
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

Stream = Literal["stdout", "stderr"]

LOG_BYTES: Final = 32 << 20
"""Of one file of output; there are two of them, and the older is given up for a new one."""
RECORD: Final = "run.json"
"""The file of a run that says what runs."""
_WATCHED: Final = "watched"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_MOST_BYTES: Final = 16 << 20  # of run.json: what is read is bounded, and 2 MiB of arguments are 12 at most
_PAUSE: Final = 0.1
_KILL_SECONDS: Final = 30.0
_WATCHED_SECONDS: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a run that has begun.

    Args:
        id: of the run, and of its machine.
        name: that the user gave it; empty for none.
        image: as the user named it.
        command: what is executed.
        driver: the machine that it runs in.
        created: when, as RFC 3339 has it.
        started: when its command began; empty as long as it has not.
        pid: of the process of this host that conducts it.
        born: when that process began, in ticks of the kernel (proc(5), starttime).
        ports: of this host that lead to the machine, as `127.0.0.1:8080->80/tcp`.
    """

    id: str
    name: str
    image: str
    command: tuple[str, ...]
    driver: str
    created: str
    started: str = ""
    pid: int = 0
    born: int = 0
    ports: tuple[str, ...] = ()


@dataclass(frozen=True)
class End:
    """How a run ended.

    Args:
        exit_code: as that of `firebuild run`.
        ended: when, as RFC 3339 has it.
        error: why it ended, where that was not its command's doing.
    """

    exit_code: int
    ended: str
    error: str = ""


@dataclass(frozen=True)
class Piece:
    """Something that the command has written.

    Args:
        time: when it came, as RFC 3339 has it.
        stream: where to.
        data: exactly that.
    """

    time: str
    stream: Stream
    data: bytes


class Run:
    """A run of the store.

    Args:
        directory: of the run.
        record: what runs.
    """

    def __init__(self, directory: Path, record: Record) -> None:
        self.directory = directory
        self.record = record

    @property
    def is_alive(self) -> bool:
        """Whether its process lives."""
        try:
            os.close(own(self.directory, fcntl.LOCK_SH))  # two may ask at once
        except BlockingIOError:
            return True
        except (FileNotFoundError, PermissionError):  # removed meanwhile, or another user's
            pass
        return False

    @property
    def end(self) -> End | None:
        """How it ended; None while it goes on, and where its process was killed or the host has crashed."""
        members = _read(self.directory / "ended.json")
        try:
            return None if members is None else End(**members)
        except TypeError:
            return None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; False when it did not within `seconds`."""
        until = None if seconds is None else time.monotonic() + seconds
        while self.is_alive:
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(_PAUSE)
        return True

    def outcome(self) -> End | None:
        """Wait until it has ended, and return how; None where its process was killed."""
        with self.watched():
            while self._goes_on:
                time.sleep(_PAUSE)
            end = self.end
        self.wait()
        return end

    @property
    def _goes_on(self) -> bool:
        return self.is_alive and self.end is None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Have it kept until the block ends, for some seconds at most, even where it removes itself."""
        with ExitStack() as held:
            with suppress(OSError):  # it is gone already, or not ours
                descriptor = os.open(self.directory / _WATCHED, os.O_RDONLY | os.O_CLOEXEC)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield

    def stop(self, seconds: float) -> None:
        """Send the command the image's STOPSIGNAL, and after `seconds` end its machine.

        Raises:
            MachineError: its process is out of reach.
        """
        if self._signal(signal.SIGTERM) and not self.wait(seconds):
            # A second one ends the machine; of the same kind it could be taken for the first (signal(7)).
            self._signal(signal.SIGINT)
            if not self.wait(_KILL_SECONDS):
                self._signal(signal.SIGKILL)  # and then its cleanup process does
                self.wait(_KILL_SECONDS)

    def remove(self) -> None:
        """Remove what is kept of a run that has ended.

        Raises:
            InputError: it has not.
            MachineError: it can't be removed.
        """
        if self.is_alive:
            raise InputError(
                f"the run {self.record.id} has not ended",
                hint=f"`firebuild stop {self.record.id}`, or --force",
            )
        try:
            remove_tree(self.directory)
        except OSError as error:
            raise MachineError(
                f"{self.directory} can't be removed: {error.strerror}", hint=remedy_of(error)
            ) from error

    def _signal(self, number: int) -> bool:
        """Send its process a signal; False when it has ended."""
        record = self.record
        try:
            process = os.pidfd_open(record.pid)
        except (OSError, OverflowError):
            process = -1
        try:
            # In this order: what holds the lock now was alive when its number was looked up.
            if not self.is_alive:
                return False
            if process < 0 or _birth(record.pid) != record.born:
                raise MachineError(
                    f"the run {record.id} goes on, and its process {record.pid} is not on this host",
                    hint="stop it on the host, or in the container, where it was started",
                )
            signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            return False
        finally:
            if process >= 0:
                os.close(process)
        return True

    # --- what it has written ----------------------------------------------------------------------

    def output(self, *, follow: bool = False, tail: int | None = None) -> Iterator[Piece]:
        """Yield what it has written, in order.

        Args:
            follow: and what it writes until it ends.
            tail: of what is there already, the last lines only.
        """
        pieces = self._written(follow)
        if tail is not None:
            yield from last_lines(takewhile(lambda piece: piece is not None, pieces), tail)
        yield from (piece for piece in pieces if piece is not None)

    def _written(self, follow: bool) -> Iterator[Piece | None]:
        """Yield what it has written, and None where that is all for now."""
        newest = self.directory / "output"
        file = _opened(newest)
        before = _opened(self.directory / "output.1")
        if before is not None:
            with before:
                if file is not None and os.path.sameopenfile(file.fileno(), before.fileno()):
                    file.close()  # it has moved meanwhile
                    file = None
                yield from _pieces(before)
        while True:
            alive = follow and self._goes_on
            file = file or _opened(newest)
            if file is not None:
                yield from _pieces(file)
                if _is_another(file, newest):
                    yield from _pieces(file)
                    file.close()
                    file = None
                    continue
            yield None
            if not alive:
                break
            time.sleep(_PAUSE)
        if file is not None:
            file.close()


class Runs:
    """The detached runs of a store.

    Args:
        store: its directory (`Home.root`).
    """

    def __init__(self, store: Path) -> None:
        self._directory = store / "runs"

    def list(self, damaged: Callable[[MachineError], object] = lambda _: None) -> list[Run]:
        """Return all that can be read, the newest first.

        Args:
            damaged: told of each of the others, but for those of other users.

        Raises:
            MachineError: the store can't be read.
        """
        try:
            directories = [path for path in self._directory.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise MachineError(
                f"{self._directory} can't be read: {error.strerror}", hint=remedy_of(error)
            ) from error
        found = []
        for path in directories:
            try:
                run = _run(path)
            except MachineError as error:
                damaged(error)
                continue
            if run is not None:
                found.append(run)
        return sorted(found, key=lambda run: (run.record.created, run.record.id), reverse=True)

    def unknown(self) -> Iterator[Path]:
        """Yield the directories of runs of which nothing is known, and whose processes live no more.

        Raises:
            OSError: the store can't be read.
        """
        with ExitStack() as held:
            with suppress(OSError):  # there are no runs, or nobody can begin one where this can't write
                held.enter_context(lock_file(self._directory / LOCK))
            for directory in files_in(self._directory):
                with suppress(OSError):  # a file, a run that goes on, or another user's
                    os.close(own(directory, fcntl.LOCK_SH))
                    try:
                        known = _run(directory) is not None
                    except MachineError:
                        known = False
                    if not known:
                        yield directory

    def find(self, text: str) -> Run:
        """Return the run with a name, an id, or an id that begins so.

        Raises:
            InputError: there is none, or there are several.
            MachineError: there is none, and one whose `run.json` is damaged.
        """
        damaged: list[MachineError] = []
        runs = self.list(damaged.append)
        exact = [run for run in runs if text in (run.record.name, run.record.id)]
        found = exact or [run for run in runs if text and run.record.id.startswith(text)]
        if len(found) == 1:
            return found[0]
        if damaged and not found:
            raise damaged[0]
        several = ", ".join(run.record.id for run in found[:5])
        raise InputError(
            f"{text!r} is the start of several ids: {several}" if found else f"there is no run {text!r}",
            hint="`firebuild ps --all` lists them; the runs of a terminal end with it, and are not listed",
        )

    @contextmanager
    def begin(self, record: Record) -> Iterator[RunWriter]:
        """Make the directory of a run of this process, and hold it until the block ends.

        Raises:
            InputError: the name is impossible, or another run has it.
            MachineError: the store can't be written.
        """
        if record.name and _NAME.fullmatch(record.name) is None:
            raise InputError(
                f"--name: expected letters, digits and . _ -, found {record.name!r:.80}",
                hint="a name begins with a letter or a digit, and has 63 characters at most",
            )
        directory = self._directory / record.id
        record = replace(record, pid=os.getpid(), born=_birth(os.getpid()))
        lock = -1
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock_file(self._directory / LOCK):
                namesake = next((run for run in self.list() if record.name in _names(run)), None)
                if namesake is not None:
                    raise InputError(
                        f"the run {namesake.record.id} has the name {record.name}",
                        hint=f"`firebuild rm {record.name}` frees the name once that run has ended",
                    )
                directory.mkdir(mode=0o700)
                lock = own(directory)
                (directory / _WATCHED).touch(0o600)
                _write(directory / RECORD, asdict(record))
        except OSError as error:
            if lock >= 0:
                os.close(lock)
            with suppress(OSError):
                remove_tree(directory, ignore_errors=True)
            raise MachineError(
                f"{directory} can't be made: {error.strerror}", hint=remedy_of(error)
            ) from error
        writer = RunWriter(directory, record)
        try:
            yield writer
        finally:
            writer.close()
            os.close(lock)


class RunWriter:
    """Keeps what a run writes, and how it ends; what a full disk does not take is left out.

    Args:
        directory: of the run.
        record: what runs.
    """

    def __init__(self, directory: Path, record: Record) -> None:
        self._directory = directory
        self.record = record
        self._file: BinaryIO | None = None
        self._size = 0
        self._lost = 0

    def started(self, command: Sequence[str]) -> None:
        """Take note that the command runs; never raises."""
        self.record = replace(self.record, started=now(), command=tuple(command))
        with suppress(OSError):
            _write(self._directory / RECORD, asdict(self.record))

    def write(self, stream: Stream, data: bytes) -> None:
        """Keep what came; never raises."""
        if self._lost:
            words = f"firebuild: {counted(self._lost, 'byte')} of output could not be kept\n".encode()
            if not self._append("stderr", words):
                self._lost += len(data)
                return
            self._lost = 0
        if not self._append(stream, data):
            self._lost += len(data)

    def end(self, exit_code: int, error: str = "") -> None:
        """Keep how it ended; where the disk is full the run seems to be lost."""
        with suppress(OSError):
            _write(self._directory / "ended.json", asdict(End(exit_code, now(), error)))

    def remove(self) -> None:
        """Keep nothing, once those who watch it have seen its end."""
        self.close()
        until = time.monotonic() + _WATCHED_SECONDS
        while _is_watched(self._directory) and time.monotonic() < until:
            time.sleep(_PAUSE / 2)
        remove_tree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _append(self, stream: Stream, data: bytes) -> bool:
        # Each byte is a character of Latin-1: so any of them can be text of JSON, and is one again.
        members = {"time": now(), "stream": stream, "data": data.decode("latin-1")}
        line = json.dumps(members, ensure_ascii=False).encode() + b"\n"
        path = self._directory / "output"
        try:
            if self._file is not None and self._size + len(line) > LOG_BYTES:
                self.close()
                path.replace(self._directory / "output.1")
            if self._file is None:
                self._file = open(path, "ab", buffering=0, opener=_private)  # noqa: SIM115 - it stays open
                self._size = os.fstat(self._file.fileno()).st_size
            written = self._file.write(line)
            if written != len(line):  # the rest of the disk: half a record would spoil the next
                self._file.truncate(self._size)
                return False
            self._size += len(line)
        except OSError:
            return False
        return True


def last_lines(pieces: Iterable[Piece | None], count: int) -> list[Piece]:
    """Return the last lines of what was written, each a piece of its own."""
    lines: deque[tuple[Piece, bytearray]] = deque(maxlen=count)
    for piece in filter(None, pieces):
        for data in io.BytesIO(piece.data):  # by \n alone: what shows progress ends nothing with \r
            last, line = lines[-1] if lines else (piece, bytearray(b"\n"))
            if last.stream == piece.stream and not line.endswith(b"\n"):
                line += data
            else:
                lines.append((piece, bytearray(data)))
    return [replace(piece, data=bytes(line)) for piece, line in lines]


def _names(run: Run) -> tuple[str, ...]:
    return (run.record.name, run.record.id) if run.record.name else (run.record.id,)


def _run(directory: Path) -> Run | None:
    """Return a run; None where it is being made or removed, and where it is another user's.

    Raises:
        MachineError: its `run.json` is damaged.
    """
    path = directory / RECORD
    members = _read(path)
    try:
        if members is None:
            if not os.access(path, os.R_OK):
                return None
            raise TypeError
        record = Record(**members)
        record = replace(record, command=_texts(record.command), ports=_texts(record.ports))
    except TypeError as error:
        raise MachineError(
            f"{path} is damaged, so that nothing is known of this run",
            hint="`firebuild store check --repair` removes it unless it goes on",
        ) from error
    return Run(directory, record)


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(map(str, values))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            members = json.loads(file.read(_MOST_BYTES))
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError, RecursionError):
        return None
    return members if isinstance(members, dict) else None


def _write(path: Path, members: dict[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}")
    with open(fresh, "w", encoding="utf-8", opener=_private) as file:
        json.dump(members, file)
    fresh.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def _is_watched(directory: Path) -> bool:
    try:
        with open(directory / _WATCHED, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _is_another(file: BinaryIO, path: Path) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _pieces(file: BinaryIO) -> Iterator[Piece]:
    """Yield what is in a file from its position on; a record that is not complete yet is left there."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        try:
            members = json.loads(line)
            stream: Stream = "stderr" if members["stream"] == "stderr" else "stdout"
            yield Piece(str(members["time"]), stream, members["data"].encode("latin-1"))
        except MALFORMED:
            continue  # the power went while it was written


def _birth(pid: int) -> int:
    """Return when a process began, in ticks since the start of the host; 0 where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        return int(stat.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def now() -> str:
    """Return the time as RFC 3339 has it, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
