"""Process 1 of a machine that builds (docs/initramfs.md): prepares it, runs vminit on the drive, ends it.

Nothing here may end this process otherwise: the kernel would panic. vminit runs in a child, so that whatever
happens to it is survived and reported.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from contextlib import closing, suppress
from typing import NoReturn

from . import init_system as system
from .errors import GuestError, GuestExit, complain
from .init_network import bring_up
from .init_settings import COMMAND, InitError, InitSettings, Report, parse_command_line, say
from .metadata import MetadataClient

_LOG = "/run/vminit.log"
_LOG_TAIL = 4000
_CLOCK_TOLERANCE = 2.0


def main() -> NoReturn:
    """Do everything, and end the machine; refused where this is not a machine's first process."""
    if os.getpid() != 1:
        sys.exit("this is the first process of a machine, and would end it: it can't be started by hand")
    settings = InitSettings()
    try:
        system.notice_ctrl_alt_del()
        system.mount_file_systems()
        system.name_machine()
        system.raise_limits()
        with open("/proc/cmdline", encoding="ascii", errors="replace") as file:
            settings = parse_command_line(file.read())
        report = run(settings)
    except InitError as error:
        report = Report(error.status, message=error.message)
    except BaseException as error:
        say(traceback.format_exc())
        report = Report("internal", message=f"{type(error).__name__}: {error}")
    with suppress(OSError):
        system.quiet_kernel()
    say(report.line())
    system.end_machine(settings.end)
    sys.exit(f"the machine did not {settings.end}")  # the kernel panics, which ends it as well


def run(settings: InitSettings) -> Report:
    """Prepare the machine, run vminit, and take the drives down again that outlive the machine.

    Raises:
        InitError: the machine can't be prepared.
    """
    system.load_modules()
    bring_up(settings.network, metadata_host(settings.mmds))
    kept: tuple[str, ...] = (system.ROOT,)
    if settings.scratch:
        kept = system.mount_drives(settings.root, settings.rootfstype, settings.scratch, settings.caches)
    else:
        system.mount_drive(settings.root, settings.rootfstype)
    killed = system.times_out_of_memory()
    try:
        status = run_vminit(settings)
        report = describe(status, out_of_memory=system.times_out_of_memory() > killed)
    finally:
        system.end_processes()
        problem = "; ".join(filter(None, map(system.release_drive, kept)))
    if not problem:
        return report
    if report.status == "success":
        return Report("drive", report.exit, problem)
    return report._replace(message=f"{report.message}; {problem}")


def metadata_host(address: str) -> str:
    """Return the host in `http://host[:port]`."""
    return address.partition("://")[2].partition("/")[0].partition(":")[0]


def run_vminit(settings: InitSettings) -> int:
    """Run vminit in a child and return its exit status; 128 + N when signal N ended it."""
    pid = os.fork()
    if pid == 0:
        _child(settings)
    signal.signal(signal.SIGINT, lambda _signum, _frame: _forward(pid))
    while True:
        ended, result = os.wait()  # orphans of RUN commands come here, too
        if ended == pid:
            code = os.waitstatus_to_exitcode(result)
            return code if code >= 0 else 128 - code


def _forward(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _child(settings: InitSettings) -> NoReturn:
    status = int(GuestExit.INTERNAL)
    try:
        _redirect()
        status = take_part(settings)
    except GuestError as error:
        complain(error.message)
        status = error.exit_status
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def _redirect() -> None:
    """Keep what vminit says until its end, and gRPC's core from writing to the console by itself."""
    log = os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    null = os.open("/dev/null", os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    sys.stdout = sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    os.environ["GRPC_VERBOSITY"] = "NONE"


def take_part(settings: InitSettings) -> int:
    """Be vminit: read the metadata, set the clock, take part in the build; or do what the initramfs says.

    Returns:
        the exit status of vminit.

    Raises:
        GuestError: the build failed.
    """
    import gc

    gc.set_threshold(50_000)  # as vminit's own main does
    if os.path.exists(COMMAND):
        from .alone import run_alone

        return run_alone(system.ROOT)
    from .enter import Launcher

    with closing(Launcher(fork=True)) as launcher:
        client = MetadataClient(settings.mmds, timeout=settings.mmds_timeout)
        document = client.read()
        from .bootstrap import bootstrap, read_block

        block = read_block(document)
        set_clock(block.host_time)
        # Without a scratch drive the steps change the image's own, and there are no layers.
        drives = (system.LAYERS, system.MOUNTS, system.CACHES) if settings.scratch else ("", "", "")
        layers, scratch, caches = drives
        bootstrap(
            block,
            system.ROOT,
            connect_timeout=settings.connect_timeout,
            sync=not settings.scratch,
            launcher=launcher,
            document=document,
            metadata=client.read,
            layers=layers,
            scratch=scratch,
            caches=caches,
        )
    return 0


def set_clock(host_time: float | None) -> None:
    """Set the clock to the host's where it is off, in either direction: nobody else uses it here.

    A machine without a battery-backed clock starts in 1970, with a wrong one anywhere.
    """
    if host_time is not None and abs(time.time() - host_time) > _CLOCK_TOLERANCE:
        time.clock_settime(time.CLOCK_REALTIME, host_time)


def describe(status: int, log: str = _LOG, *, out_of_memory: bool = False) -> Report:
    """Put the end of vminit into a report, with the last that it said; all of that goes to the console.

    Args:
        status: its exit status.
        log: what it wrote.
        out_of_memory: the kernel has killed a process for want of memory.
    """
    if status == 0:
        return Report("success", 0)
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            text = file.read().decode("utf-8", "replace").strip()
    except OSError:
        text = ""
    if text:
        say(text)
    last = text.splitlines()[-1].removeprefix("vminit: ") if text else f"vminit ended with status {status}"
    if status > 128 and not text:
        last = f"vminit was ended by {_signal_name(status - 128)}"
    if out_of_memory:
        last += " (the machine ran out of memory)"
    return Report("failed", status, last)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
