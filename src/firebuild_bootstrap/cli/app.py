"""The command's root: its groups, and how every error leaves it."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
from collections import UserDict
from importlib import import_module
from typing import Any, Final

import click

from firebuild_bootstrap import __version__
from firebuild_bootstrap.cli import completion  # noqa: F401 - shells ask click, which knows them from there
from firebuild_bootstrap.cli.docker import Commands
from firebuild_bootstrap.cli.examples import add_examples
from firebuild_bootstrap.cli.failure import SIGNALS, Interrupts, report
from firebuild_bootstrap.cli.output import guarded_stdout
from firebuild_bootstrap.errors import Interrupted
from firebuild_bootstrap.guest.kernel import hide_memory

_MODULES: Final = {
    **dict.fromkeys(("build", "rootfs"), "rootfs"),
    "run": "run",
    **dict.fromkeys(("ps", "logs", "stop", "wait", "rm"), "runs"),
    **dict.fromkeys(("base", "cache", "rm-tree"), "store"),
    **dict.fromkeys(("images", "du", "store"), "images"),
    "config": "config",
    **dict.fromkeys(("ca", "plugin"), "ca"),
    "initramfs": "initramfs",
    "doctor": "doctor",
    "completion": "completion",
}
"""The module of this package that a command is in, as a variable of its name."""


class _OnDemand(UserDict[str, Any]):
    """Commands by their names, at first their modules: a command is imported when somebody looks it up.

    Importing all takes longer than most commands, and who runs one needs none of the others.
    """

    def __getitem__(self, name: str) -> click.Command:
        if isinstance(self.data[name], str):
            module = import_module(f"firebuild_bootstrap.cli.{self.data[name]}")
            self.data[name] = getattr(module, name.replace("-", "_"))
            add_examples(self.data[name], name)
        command: click.Command = self.data[name]
        return command


@click.group(
    cls=Commands,
    commands=_OnDemand(_MODULES),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 success, 1 a step failed, 2 bad input, 3 certificate authority, 4 guest lost, 5"
    " timeout, 6 machine, 7 the image is not ready, 70 internal error, 74 standard output, 130 interrupted.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def app() -> None:
    """Build root file systems for Firecracker microVMs from Dockerfiles, over mutual TLS."""


# The events tell it all; without a handler, Python would print every warning a second time.
_QUIET = logging.NullHandler()
# Importing makes many objects, and all of them stay: looking for garbage among them is a tenth of a build.
_ALLOCATIONS_BETWEEN_COLLECTIONS = 50_000


def main(answer: int | None = None) -> None:
    """Run the command line and exit; `firebuild_bootstrap.cli.main` takes care of signals before.

    Args:
        answer: as there.
    """
    gc.set_threshold(_ALLOCATIONS_BETWEEN_COLLECTIONS)
    _forbid_core_dumps()
    # Some CI systems run jobs with umask 000: other users of the host could exchange what is in the store.
    # One that takes rights from ourselves would have us make directories that we can't write into.
    os.umask((os.umask(0o002) | 0o002) & 0o077)
    # gRPC's core writes refused handshakes to stderr by itself; the service reports them as events.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for name in ("firebuild", "firebuild_pki"):
        logging.getLogger(name).addHandler(_QUIET)
    interrupts = Interrupts(raising=True)
    try:
        with interrupts.installed(), guarded_stdout():
            status = app(prog_name="firebuild", standalone_mode=False, obj=answer)
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        status = report(interrupts.instead_of(error))
    for number in SIGNALS:
        # As it ends, Python gives handled signals back to the system, which would end it without its status.
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _forbid_core_dumps() -> None:
    """Keep private keys out of core dumps: ours here, and the guest's in the memory of its machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # machines inherit it
    hide_memory()  # the limit does not keep a dump from a program in /proc/sys/kernel/core_pattern (core(5))
