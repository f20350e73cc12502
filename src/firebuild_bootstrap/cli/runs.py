"""`firebuild run --detach`, and `firebuild ps`, `logs`, `stop`, `wait` and `rm` (docs/run.md)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from firebuild_bootstrap.cli.failure import SIGNALS
from firebuild_bootstrap.cli.options import config_option, home_from, json_option, settings_from
from firebuild_pki.display import block, one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.events import Event
    from firebuild_bootstrap.running import RunRequest
    from firebuild_bootstrap.runs import Piece, Record, Run, Runs, RunWriter


def go_to_background() -> Background:
    """Go on in a process of its own, where this returns; the caller's ends when that has something to say.

    It prints the id of the run, or ends with the status of the other, whose errors go to the same place. It
    is forked, rather than started with arguments that all could read, before there are any threads.
    """
    answer, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(null, descriptor)
        os.close(null)
        return Background(theirs)
    os.close(theirs)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _pass_on(child, number))
    with open(answer, "rb") as pipe:
        said = pipe.read()
    if said:
        click.echo(said, nl=False)
        sys.exit(0)
    sys.exit(_status(os.waitpid(child, 0)[1]))


def _pass_on(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _status(result: int) -> int:
    code = os.waitstatus_to_exitcode(result)
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
        os.dup2(null, 2)  # who waits for its end must not wait for ours
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


@click.command()
@click.option("--all", "-a", "everything", is_flag=True, help="Also those that have ended.")
@click.option("--quiet", "-q", is_flag=True, help="Only the ids.")
@json_option
@config_option
def ps(everything: bool, quiet: bool, as_json: bool, config_file: Path | None) -> None:
    """List the runs that were started with `firebuild run --detach`, the newest first."""
    from firebuild_bootstrap.cli.screen import print_table

    found = [(run, alive) for run in _runs(config_file).list() if (alive := run.is_alive) or everything]
    if as_json:
        from firebuild_bootstrap.cli.output import as_text

        click.echo(as_text([_document(run, alive) for run, alive in found]), nl=False)
    elif quiet:
        for run, _ in found:
            click.echo(run.record.id)
    else:
        rows = [_row(run, alive) for run, alive in found]
        print_table(("ID", "NAME", "IMAGE", "COMMAND", "MACHINE", "STATUS"), rows)


@click.command()
@_run_argument
@click.option("--follow", "-f", is_flag=True, help="Go on until the run has ended.")
@click.option("--tail", "-n", metavar="N", type=click.IntRange(0), help="Begin with the last N lines.")
@click.option("--timestamps", "-t", is_flag=True, help="Begin each line with the time when it came.")
@config_option
def logs(run: str, follow: bool, tail: int | None, timestamps: bool, config_file: Path | None) -> None:
    """Print what a detached run has written, to standard output and standard error as it did."""
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


@click.command()
@_run_arguments
@click.option(
    "--time",
    "-t",
    "seconds",
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    default=10.0,
    show_default=True,
    help="How long the command has before its machine is ended.",
)
@config_option
def stop(runs: tuple[str, ...], seconds: float, config_file: Path | None) -> None:
    """Ask the commands of detached runs to end, with the image's STOPSIGNAL, and then end their machines."""
    for run in _found(runs, config_file):
        run.stop(seconds)
        click.echo(run.record.id)


@click.command()
@_run_arguments
@config_option
def wait(runs: tuple[str, ...], config_file: Path | None) -> None:
    """Wait until detached runs have ended, and print the exit status of each."""
    from firebuild_bootstrap.errors import GuestLost

    for run in _found(runs, config_file):
        end = run.outcome()
        if end is None:
            raise GuestLost(f"the run {run.record.id} has no exit status: its process was killed")
        click.echo(end.exit_code)


@click.command()
@_run_arguments
@click.option("--force", "-f", is_flag=True, help="Stop a run that has not ended, without waiting for it.")
@config_option
def rm(runs: tuple[str, ...], force: bool, config_file: Path | None) -> None:
    """Remove what is kept of detached runs that have ended."""
    for run in _found(runs, config_file):
        if force:
            run.stop(0)
        run.remove()
        click.echo(run.record.id)


def _found(names: Sequence[str], config_file: Path | None) -> list[Run]:
    """Find all before anything is done to one."""
    runs = _runs(config_file)
    return [runs.find(name) for name in names]


def _row(run: Run, alive: bool) -> tuple[str, ...]:
    import shlex

    record = run.record
    command = one_line(shlex.join(record.command), 40)
    return (record.id, record.name or "-", record.image, command, record.driver, _status_text(run, alive))


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
