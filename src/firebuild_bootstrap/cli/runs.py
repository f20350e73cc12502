"""`firebuild run --detach`, and `firebuild ps`, `logs`, `stop`, `wait` and `rm` (docs/run.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from firebuild_bootstrap.cli.docker import DockerCommand
from firebuild_bootstrap.cli.failure import SIGNALS, report
from firebuild_bootstrap.cli.options import config_option, home_from, json_option, listing, settings_from
from firebuild_bootstrap.cli.output import print_json
from firebuild_pki.display import block, one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.events import Event
    from firebuild_bootstrap.running import RunRequest
    from firebuild_bootstrap.runs import Piece, Record, Run, Runs, RunWriter


_T = TypeVar("_T")


def start_in_background(argv: Sequence[str]) -> int:
    """Have a process of its own do what `argv` says, print the id of the run, and return the exit status.

    Its errors go to the same place as ours. What is asked of it comes to its standard input: its arguments
    stay for as long as the run goes on, and every user of this host can read them (proc(5), cmdline).
    """
    command = [sys.executable, "-P", "-m", "firebuild_bootstrap.cli.background"]
    reading, writing = os.pipe()
    with open(reading, "rb") as answer:
        with open(writing, "wb") as theirs, open(os.memfd_create("arguments"), "w+b") as arguments:
            arguments.write(json.dumps(list(argv)).encode())
            arguments.seek(0)
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it, and we, have handlers for them
            process = subprocess.Popen(command, stdin=arguments, stdout=theirs, start_new_session=True)
        for number in SIGNALS:
            signal.signal(number, lambda number, _: process.send_signal(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        said = answer.read()
    if said:
        process.returncode = 0  # it goes on without us, of which Python would warn
        click.echo(said, nl=False)
        return 0
    code = process.wait()
    return code if code >= 0 else 128 - code


class Background:
    """What a detached run keeps, and says to the process that has started it.

    Args:
        answer: the pipe to that process.
    """

    def __init__(self, answer: int) -> None:
        self._answer = answer
        self._writer: RunWriter | None = None

    @contextmanager
    def recording(
        self, store: Path, record: Record, *, status_of: Callable[[BaseException], int], keep: bool
    ) -> Iterator[None]:
        """Keep in a store what runs in the block, and how it ended unless it returned.

        Args:
            store: the directory of the store.
            record: what runs.
            status_of: the exit status for an error.
            keep: keep it when it has ended. What did not begin is not kept: its user was told.
        """
        from firebuild_bootstrap.runs import Runs

        with Runs(store).begin(record) as writer:
            self._writer = writer
            try:
                yield
            except BaseException as error:
                writer.end(status_of(error), str(error))
                raise
            finally:
                if not keep or self._answer >= 0:
                    writer.remove()

    def begun(self, command: Sequence[str]) -> None:
        """Tell that the command runs. Idempotent."""
        if self._writer is None or self._answer < 0:
            return
        self._writer.started(command)
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # who waits for their end must not wait for ours
            os.dup2(null, descriptor)
        os.close(null)
        with suppress(BrokenPipeError):
            os.write(self._answer, f"{self._writer.record.id}\n".encode())
        os.close(self._answer)
        self._answer = -1

    def ended(self, command: Sequence[str], status: int) -> None:
        """Take note of the command's end."""
        self.begun(command)  # it may have been too short for its guest to say so
        if self._writer is not None:
            self._writer.end(status)

    def show(self, event: Event) -> None:
        """Keep the command's output, and what firebuild says, which is shown as well while somebody waits."""
        from firebuild_bootstrap.events import Notice, StepOutput

        if self._writer is None:
            return
        match event:
            case StepOutput():
                self._writer.write("stdout" if event.stream == "stdout" else "stderr", event.data)
            case Notice(level="warning"):
                text = f"warning: {one_line(event.message, 1000)}"
                self._writer.write("stderr", f"{text}\n".encode())
                click.echo(text, err=True)


def record_of(request: RunRequest, name: str, driver: str) -> Record:
    """Return what is known of a run before it has begun."""
    from firebuild_bootstrap.runs import Record, now

    return Record(
        id=request.id,
        name=name,
        image=request.image,
        command=request.command,
        driver=driver,
        created=now(),
        ports=tuple(map(str, request.publish)),
    )


def _complete_runs(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    with suppress(Exception):  # a shell shows what is written here amid the user's line
        names = [run.record.name or run.record.id for run in _runs(None).list()]
        return [name for name in names if name.startswith(incomplete)]
    return []


def _runs(config_file: Path | None) -> Runs:
    from firebuild_bootstrap.runs import Runs

    return Runs(home_from(settings_from(config_file)).root)


_run_argument = click.argument("run", shell_complete=_complete_runs)
_run_arguments = click.argument(
    "runs", nargs=-1, required=True, metavar="RUN...", shell_complete=_complete_runs
)


@click.command(cls=DockerCommand)
@click.option("--all", "-a", "everything", is_flag=True, help="Show runs that have ended as well.")
@click.option("--quiet", "-q", is_flag=True, help="Only the ids.")
@json_option
@config_option
def ps(everything: bool, quiet: bool, as_json: bool, config_file: Path | None) -> None:
    """List the runs that were started with `firebuild run --detach`, the newest first."""
    from firebuild_bootstrap.cli.screen import print_table

    with listing() as leave_out:
        runs = _runs(config_file).list(leave_out)
        found = [(run, alive) for run in runs if (alive := run.is_alive) or everything]
        if as_json:
            print_json([_document(run, alive) for run, alive in found])
        elif quiet:
            for run, _ in found:
                click.echo(run.record.id)
        else:
            rows = [_row(run, alive) for run, alive in found]
            print_table(("ID", "NAME", "IMAGE", "COMMAND", "MACHINE", "STATUS", "PORTS"), rows)


class _Lines(click.IntRange):
    """A number of lines, or `all`, as for `docker logs`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or None for all."""
        return None if value == "all" else super().convert(value, param, ctx)


@click.command(cls=DockerCommand)
@_run_argument
@click.option("--follow", "-f", is_flag=True, help="Follow the output until the run ends.")
@click.option("--tail", "-n", metavar="N", type=_Lines(0), help="Begin with the last N lines.")
@click.option("--timestamps", "-t", is_flag=True, help="Begin each line with its time.")
@config_option
def logs(run: str, follow: bool, tail: int | None, timestamps: bool, config_file: Path | None) -> None:
    """Print the output of a detached run, on standard output and standard error as the command wrote it."""
    found = _runs(config_file).find(run)
    with found.watched():
        _print(found.output(follow=follow, tail=tail), timestamps)
        end = found.end
    if end is not None and end.error:
        click.echo(f"error: {block(end.error)}", err=True)


def _print(pieces: Iterable[Piece], timestamps: bool) -> None:
    unfinished = dict[str, bool]()  # lines, by their streams
    for piece in pieces:
        data = piece.data
        if timestamps:
            stamp = f"{piece.time} ".encode()
            lines = data.split(b"\n")
            heads = [
                b"" if unfinished.get(piece.stream) else stamp,
                *(stamp if line else b"" for line in lines[1:]),
            ]
            unfinished[piece.stream] = bool(lines[-1])
            data = b"\n".join(map(b"".join, zip(heads, lines, strict=True)))
        stream = sys.stdout if piece.stream == "stdout" else sys.stderr
        stream.buffer.write(data)
        stream.buffer.flush()


@click.command(cls=DockerCommand)
@_run_arguments
@click.option(
    "--time",
    "-t",
    "seconds",
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    default=10.0,
    show_default=True,
    help="Seconds until the machine is ended.",
)
@config_option
def stop(runs: tuple[str, ...], seconds: float, config_file: Path | None) -> None:
    """Stop detached runs: send the image's STOPSIGNAL to their commands, then end their machines."""
    found = _found(runs, config_file)
    _print_ids(found, lambda run: run.stop(seconds))


@click.command(cls=DockerCommand)
@_run_arguments
@config_option
def wait(runs: tuple[str, ...], config_file: Path | None) -> None:
    """Wait until detached runs have ended, and print the exit status of each.

    It prints - if the process of the run was killed.
    """
    from firebuild_bootstrap.errors import GuestLost
    from firebuild_bootstrap.runs import Run

    found, lost = _found(runs, config_file), []
    # At once: a run that removes itself waits for those who want its end, and not for long.
    for run, outcome in zip(found, _side_by_side(Run.outcome, found), strict=True):
        end = outcome.result()
        click.echo("-" if end is None else end.exit_code)
        if end is None:
            lost.append(run.record.id)
    if lost:
        which = f"the run {lost[0]} has" if len(lost) == 1 else f"the runs {', '.join(lost)} have"
        raise GuestLost(f"{which} no exit status: the process was killed")


@click.command(cls=DockerCommand)
@_run_arguments
@click.option("--force", "-f", is_flag=True, help="Kill a run that has not ended.")
@config_option
def rm(runs: tuple[str, ...], force: bool, config_file: Path | None) -> None:
    """Remove the records and logs of detached runs that have ended."""

    def remove(run: Run) -> None:
        if force:
            run.stop(0)
        run.remove()

    _print_ids(_found(runs, config_file), remove)


def _found(names: Sequence[str], config_file: Path | None) -> list[Run]:
    """Find all before anything is done to one; who is named twice is there once."""
    runs = _runs(config_file)
    return list({run.record.id: run for run in map(runs.find, names)}.values())


def _print_ids(runs: Sequence[Run], act: Callable[[Run], None]) -> None:
    """Do something to runs, and print the ids of those that it was done to.

    Raises:
        FirebuildError: as `act`; what failed before the last one is shown.
    """
    errors = []
    for run, outcome in zip(runs, _side_by_side(act, runs), strict=True):
        if (error := outcome.exception()) is None:
            click.echo(run.record.id)
        else:
            errors.append(error)
    for error in errors[:-1]:
        report(error)
    if errors:
        raise errors[-1]


def _side_by_side(act: Callable[[Run], _T], runs: Sequence[Run]) -> list[Future[_T]]:
    """Do something to all runs at once, in threads that do not outlive an interrupted command."""

    def work(run: Run, outcome: Future[_T]) -> None:
        try:
            outcome.set_result(act(run))
        except Exception as error:
            outcome.set_exception(error)

    outcomes = [Future[_T]() for _ in runs]
    for each in zip(runs, outcomes, strict=True):
        threading.Thread(target=work, args=each, daemon=True).start()
    return outcomes


def _row(run: Run, alive: bool) -> tuple[str, ...]:
    import shlex

    record = run.record
    command = one_line(shlex.join(record.command), 40)
    ports = ", ".join(record.ports) if alive else ""
    status = _status_text(run, alive)
    return (record.id, record.name or "-", record.image, command, record.driver, status, ports or "-")


def _status_text(run: Run, alive: bool) -> str:
    if alive:
        return f"up {_age(run.record.started)}" if run.record.started else "starting"
    end = run.end
    if end is None:
        return "lost"
    how = "failed" if end.error else "exited"
    return f"{how} ({end.exit_code}) {_age(end.ended)} ago"


def _age(moment: str) -> str:
    """Say how long ago something was, as RFC 3339 tells it."""
    from firebuild_bootstrap.progress import human_time

    with suppress(ValueError):
        return human_time((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
    return "?"


def _document(run: Run, alive: bool) -> dict[str, object]:
    end = run.end
    state = "running" if run.record.started else "starting"
    if not alive:
        state = "lost" if end is None else "ended"
    members = {name: value for name, value in asdict(run.record).items() if name not in ("pid", "born")}
    known = {"exit_code": None, "ended": None, "error": None} if end is None else asdict(end)
    return {**members, "state": state, **known}
